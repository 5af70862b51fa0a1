"""What a conversion did to the function: relative output differences on a sample text before any training, sizes and cost.

Both models are computed side by side, layer by layer: memory is one block of each, the embedding, and the sample's hidden states and logits.
It reads both checkpoints once and costs a forward pass over SAMPLE_TOKENS tokens. Letters: S positions, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.attention import Layout, layer_window, make_layout, rope_frequencies, rope_tables
from moetrain.config import ModelConfig
from moetrain.convert.huggingface import read_tensors
from moetrain.data.tokenizer import load_tokenizer
from moetrain.model import Block
from moetrain.modules import RMSNorm
from moetrain.moe.routing import TokenContext

SAMPLE_TOKENS = 512
SAMPLE_TEXT = """A river does not hurry, and yet it reaches the sea. In spring the water is high and brown and carries branches; by August
children cross it on stones. The mill stood there for two hundred years. Its owner kept a book of every sack, 3 shillings and 4 pence each, and
wrote the weather beside it: "rain, wind from the west, the wheel stopped at noon".

def mean(values: list[float]) -> float:
    # The mean of nothing is an error, not zero.
    if not values:
        raise ValueError("mean of an empty list")
    return sum(values) / len(values)

If f is continuous on [a, b] and f(a) < 0 < f(b), then there is a c between a and b with f(c) = 0. Proof: let c be the least upper bound of all x
with f(x) < 0.

Der Fluss hat es nicht eilig. La rivière ne se presse pas. El río no tiene prisa. Река не торопится. 河水不急。川は急がない。강은 서두르지 않는다.
{"name": "mill", "year": 1742, "open": false, "tags": ["water", "grain"]}
"""


@dataclass(frozen=True)
class Receipt:
    sample: str
    """Where the tokens are from."""
    tokens: int
    layers: list[dict[str, float]]
    """By layer: ffn, the FFN's output on the reference's own input; hidden, the stream after the layer; each ||difference|| / ||reference||.
    Of a mixture: active, mean experts per token, and empty, share of tokens without one."""
    logits: float
    """Relative difference of the logits, that is of the whole."""
    loss: tuple[float, float]
    """Nats per token on the sample: of the reference and of the result."""
    parameters: tuple[int, int]
    activated: tuple[float, float]
    """Parameters that a token of the sample uses."""
    flops_per_token: tuple[float, float]
    """Of a forward pass, at the sample's length."""

    def to_dict(self) -> dict[str, Any]:
        pairs = {
            name: dict(zip(("before", "after"), getattr(self, name))) for name in ("loss", "parameters", "activated", "flops_per_token")
        }
        return {"sample": self.sample, "tokens": self.tokens, "relative_difference": {"logits": self.logits, "layers": self.layers}, **pairs}

    def lines(self) -> list[str]:
        """For the console."""
        before, after = (f"{p / 1e6:.2f}M activated, {f / 1e6:.2f}M FLOPs/token" for p, f in zip(self.activated, self.flops_per_token))
        ffn, hidden = (" ".join(f"{layer[k]:.2g}" for layer in self.layers) for k in ("ffn", "hidden"))
        return [
            f"before: {before}, loss {self.loss[0]:.4f} on {self.tokens} tokens of {self.sample}",
            f"after:  {after}, loss {self.loss[1]:.4f}",
            f"relative difference before training: logits {self.logits:.2g}",
            f"  FFN by layer: {ffn}",
            f"  stream by layer: {hidden}",
        ]


def sample_tokens(folder: str | Path, config: ModelConfig) -> tuple[Tensor, str]:
    """(1, S) int64 and where they are from: the sample text by the folder's tokenizer, random ids where there is none that fits."""
    count = min(SAMPLE_TOKENS, config.max_position_embeddings)
    reason = "no tokenizer.json"
    if (Path(folder) / "tokenizer.json").is_file():
        try:
            ids = torch.tensor(load_tokenizer(str(folder)).encode(SAMPLE_TEXT), dtype=torch.int64)[:count]
            if len(ids) > 1 and int(ids.max()) < config.vocab_size:
                return ids[None], "the sample text"
            reason = "its tokenizer has ids beyond vocab_size"
        except ValueError as error:
            reason = str(error)
    draws = torch.Generator("cpu").manual_seed(0)
    return torch.randint(0, config.vocab_size, (1, count), generator=draws), f"random ids ({reason})"


@torch.no_grad()
def compare(reference: str | Path, before: ModelConfig, result: str | Path, after: ModelConfig) -> Receipt:
    """reference, result: Hugging Face folders of models with the same number of layers, hidden size and vocabulary, and their configs."""
    tokens, sample = sample_tokens(reference, before)
    old, new = _Streamed(reference, before), _Streamed(result, after)
    old.start(tokens)
    new.start(tokens)
    layers = []
    context = TokenContext(tokens=tokens.flatten())
    active: tuple[list[float], list[float]] = ([], [])
    for i in range(before.num_layers):
        a, b = old.block(i), new.block(i)
        # The new FFN on the old one's input: the layer by itself, without what earlier layers did.
        stream = old.x + a.attn(a.attn_norm(old.x), old.layout)
        normed = a.ffn_norm(stream).flatten(0, 1)
        y, old_report = a.ffn(normed, context, stream.flatten(0, 1))
        other, _ = b.ffn(normed, context, stream.flatten(0, 1))
        old.x = stream + y.view_as(stream)
        new.x, report = b(new.x, new.layout, context)
        row = {"ffn": _difference(other, y), "hidden": _difference(new.x, old.x)}
        for means, stats in zip(active, (old_report.stats, report.stats)):
            if stats:
                means.append(float(stats["load"].sum() / stats["tokens"]))
        if report.stats:
            row["active"] = active[1][-1]
            row["empty"] = float(report.stats["empty"] / report.stats["tokens"])
        layers.append(row)
    first, second = old.finish(), new.finish()
    mean_active = [sum(means) / len(means) if means else None for means in active]
    return Receipt(
        sample=sample,
        tokens=tokens.numel(),
        layers=layers,
        logits=_difference(second, first),
        loss=(_loss(first, tokens), _loss(second, tokens)),
        parameters=(before.num_params(), after.num_params()),
        activated=tuple(c.num_active_params(m) for c, m in zip((before, after), mean_active)),
        flops_per_token=tuple(c.flops_per_token(tokens.shape[1], m) for c, m in zip((before, after), mean_active)),
    )


class _Streamed:
    """A checkpoint computed block by block, in the order in which its tensors are read."""

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.config = config
        self.tensors: Iterator[tuple[str, Tensor]] = read_tensors(folder, config)
        self.x: Tensor
        self.layout: Layout
        self.embed: Tensor

    def start(self, tokens: Tensor) -> None:
        _, embed = next(self.tensors)
        self.embed = embed.to(torch.promote_types(embed.dtype, torch.float32))
        self.x = F.embedding(tokens, self.embed)
        frequencies, scale = rope_frequencies(self.config)
        cos, sin = rope_tables(frequencies, scale, torch.arange(tokens.shape[1])[None], self.x.dtype)
        windows = {layer_window(self.config, i) for i in range(self.config.num_layers)}
        head_dim = max(self.config.head_size, self.config.value_size)
        self.layout = make_layout(cos, sin, None, windows, self.x.dtype, head_dim=head_dim)

    def block(self, layer: int) -> Block:
        with torch.device("meta"):
            block = Block(self.config, layer)
        return self._fill(block, f"layers.{layer}.")

    def finish(self) -> Tensor:
        """(1, S, V) logits."""
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.norm_eps)
        x = self._fill(norm, "norm.")(self.x)
        head = self.embed if self.config.tie_embeddings else next(self.tensors)[1].to(self.embed.dtype)
        return F.linear(x, head)

    def _fill(self, module: nn.Module, prefix: str) -> Any:
        state = {}
        for name, _ in module.named_parameters():
            found, tensor = next(self.tensors)
            assert found == prefix + name, f"{found} is read where {prefix + name} is due"
            state[name] = tensor.to(self.embed.dtype)
        module.load_state_dict(state, assign=True)
        return module.eval()


def _difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; where b is 0, 0 for equals and 1 else."""
    size, gap = b.double().norm(), (a.double() - b.double()).norm()
    return float(gap / size) if size > 0 else float(gap > 0)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(F.cross_entropy(logits[0, :-1].double(), tokens[0, 1:]))
