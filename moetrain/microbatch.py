"""One micro-batch: the forward pass with what layers want to know of its tokens, and the sums that a step or an evaluation takes over many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config import ModelConfig
from moetrain.data.dataset import IGNORE
from moetrain.model import ModelOutput, Transformer
from moetrain.moe.routing import StepCounts, TokenContext

Batch = dict[str, Tensor]
"""As `data.dataset.BatchIterator` yields it: tokens, labels, positions, document_ids (B, S), sample_index, source (B,)."""


def forward(
    model: Transformer,
    batch: Batch,
    dtype: torch.dtype,
    isolate_documents: bool,
    num_tokens: Tensor | None = None,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    counts: StepCounts | None = None,
    tags: Tensor | None = None,
    classes: tuple[Tensor, int] | None = None,
) -> ModelOutput:
    """num_tokens: labels of the whole step over all ranks, which router losses are divided by; None: of this call. seed: of the routers' draws.
    group: ranks that share the micro-batch. counts: of the step's micro-batches so far. tags: of `source_tags`, for the sources of the batch.
    classes: (B, S), and how many there are, by which routes are counted apart.

    A token without a label has no routes: it is padding or the last of its document, and nobody reads its output.
    """
    labels = batch["labels"]
    sequence = labels.shape[1]
    # The name of a token, whatever rank it is on: its sample's index and its place in it, moved by the seed.
    keys = batch["sample_index"][:, None] * sequence + torch.arange(sequence, device=labels.device) + seed * 0x632BE59BD9B4E019 % 2**62
    wide = torch.promote_types(dtype, torch.float32)
    source = batch["source"]
    tag = (source if tags is None else torch.where(source < 0, -1, tags[source.clamp(min=0)]))[:, None].expand_as(labels)
    context = TokenContext(
        keys=keys.flatten(), valid=(labels != IGNORE).flatten(), num_tokens=None if num_tokens is None else num_tokens.to(wide), group=group,
        sequence=sequence, counts=counts, tags=tag.flatten(), classes=None if classes is None else classes[0].flatten(),
        num_classes=0 if classes is None else classes[1],
    )  # fmt: skip
    return model(
        batch["tokens"], labels=labels, positions=batch["positions"], document_ids=batch["document_ids"] if isolate_documents else None,
        context=context, dtype=dtype,
    )  # fmt: skip


def source_classes(batch: Batch, num_sources: int) -> tuple[Tensor, int]:
    """The `classes` of `forward` that count by source. A blank sample (source -1) has no token that counts anywhere."""
    return batch["source"].clamp(min=0)[:, None].expand_as(batch["labels"]), num_sources


def source_tags(config: ModelConfig, names: list[str], device: torch.device) -> Tensor | None:
    """(len(names),) int64: the router's tag of each source's tokens, -1 for a source that it does not know; None: it has no names of its own."""
    known = [] if config.moe is None else config.moe.router.tag_names()
    return torch.tensor([known.index(n) if n in known else -1 for n in names], device=device) if known else None


@dataclass(frozen=True)
class Totals:
    """Over all ranks. lm: summed loss. losses: by name, of each MoE layer. sources: mean loss and tokens of each. moe: statistics by MoE layer.
    loads: of each MoE layer, routes per expert. class_loads: the same of each class, where tokens had classes, else empty. class_tokens: tokens of
    each class. sums: of each MoE layer, `LayerReport.sums`, flattened. mean_active: over layers."""

    lm: float
    losses: dict[str, list[float]]
    sources: list[dict[str, Any]]
    moe: dict[str, list[float]]
    loads: list[list[float]]
    class_loads: list[list[list[float]]]
    class_tokens: list[int]
    sums: list[dict[str, list[float]]]
    mean_active: float | None


class Sums:
    """Sums over tokens of a step or an evaluation, and one collective that adds them over ranks."""

    def __init__(self, losses: list[str], num_sources: int, device: torch.device) -> None:
        """losses: names of the routers' losses to sum up."""
        self.loss_names = losses
        self.lm = torch.zeros((), dtype=torch.float64, device=device)
        self.sources = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
        self.layers: list[dict[str, Tensor]] = []
        """Of each MoE layer, everything that is summed up, by name: losses, stats and the router's own sums, which begin with a dot."""

    @torch.no_grad()
    def add(self, output: ModelOutput, batch: Batch) -> None:
        """One micro-batch. A blank sample (source -1) has no labels and counts nowhere."""
        assert output.loss_sum is not None and output.token_losses is not None, "a forward with labels"
        self.lm += output.loss_sum.detach()
        source = batch["source"].clamp(min=0)
        counted = (batch["labels"] != IGNORE).sum(-1).double()
        self.sources[0].index_add_(0, source, output.token_losses.double().sum(-1))
        self.sources[1].index_add_(0, source, counted)
        found = []
        for report in output.reports:
            if report.stats:
                losses = {name: report.losses[name].detach() for name in self.loss_names}
                found.append({**losses, **report.stats, **{f".{name}": value for name, value in report.sums.items()}})
        if not self.layers:
            self.layers = [{name: torch.zeros_like(value, dtype=torch.float64) for name, value in layer.items()} for layer in found]
        for total, layer in zip(self.layers, found, strict=True):
            for name, value in layer.items():
                total[name] += value

    def reduce(self, group: dist.ProcessGroup | None) -> Totals:
        flat = torch.cat([self.lm[None], self.sources.flatten(), *(value.flatten() for layer in self.layers for value in layer.values())])
        if group is not None:
            dist.all_reduce(flat, group=group)
        values = iter(flat.tolist())
        lm = next(values)
        n = self.sources.shape[1]
        totals, tokens = [next(values) for _ in range(n)], [next(values) for _ in range(n)]
        sources = [{"loss": total / count if count else 0.0, "tokens": int(count)} for total, count in zip(totals, tokens)]
        layers = [{name: [next(values) for _ in range(value.numel())] for name, value in layer.items()} for layer in self.layers]
        moe: dict[str, list[float]] = {}
        for layer in layers:
            tokens, squares, empty, probes, dropped = (layer[name][0] for name in ("tokens", "active_sq", "empty", "probes", "dropped"))
            load = layer["load"]
            tokens, routes = max(1.0, tokens), sum(load)
            mean = routes / tokens
            for name, value in {
                "active": mean,
                "active_std": math.sqrt(max(0.0, squares / tokens - mean * mean)),
                "load_max_mean": max(load) * len(load) / routes if routes else 0.0,
                "dead": sum(count == 0 for count in load),
                "probe_share": probes / (tokens * len(load)),
                "empty": empty / tokens,
                "dropped": dropped / max(1.0, routes + dropped),
            }.items():
                moe.setdefault(name, []).append(value)
            if "no_room" in layer:
                moe.setdefault("no_room", []).append(layer["no_room"][0] / max(1.0, routes + dropped))
        active = moe.get("active")
        tokens_apart = [int(count) for count in layers[0].get("class_tokens", [])] if layers else []
        apart = [[_part(layer["class_load"], i, len(tokens_apart)) for layer in layers] for i in range(len(tokens_apart))]
        return Totals(
            lm=lm,
            losses={name: [layer[name][0] for layer in layers] for name in self.loss_names},
            sources=sources,
            moe=moe,
            loads=[layer["load"] for layer in layers],
            class_loads=apart,
            class_tokens=tokens_apart,
            sums=[{name[1:]: value for name, value in layer.items() if name[0] == "."} for layer in layers],
            mean_active=sum(active) / len(active) if active else None,
        )


def _part(values: list[float], number: int, parts: int) -> list[float]:
    """The `number`-th of equal parts of a list."""
    size = len(values) // parts
    return values[number * size : (number + 1) * size]
