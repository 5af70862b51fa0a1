"""Decoder Transformer for one device: LLaMA, Mistral, Qwen2, Qwen3 and DeepSeek, dense or with a mixture of experts in some or all layers.

Letters: B rows of a batch, S positions of a row, T = B*S tokens, D model dim, V vocabulary. Parameters are kept in float32 (or float64),
activations run in the dtype a caller asks for, every matrix product in the dtype of its activation. The model knows nothing of
parallelism; parallel/parallelize.py applies it from outside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moetrain.attention import (
    Attention,
    KVCache,
    LatentAttention,
    Layout,
    document_positions,
    layer_window,
    make_layout,
    rope_frequencies,
    rope_tables,
)
from moetrain.config import ModelConfig
from moetrain.modules import Linear, RMSNorm, SwiGLU
from moetrain.moe.finedeep import Finedeep
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import start_value
from moetrain.moe.routing import LayerReport, TokenContext
from moetrain.moe.strata import StratifiedMoELayer

IGNORE = -100
"""Label of a token that has no loss."""

_CHUNK_NUMEL = 1 << 25
"""Logits that exist at a time while the loss is computed (128 MiB in float32)."""


@dataclass
class ModelOutput:
    logits: Tensor | None
    """(B, S, V) float32 or float64; None when labels were given."""
    loss_sum: Tensor | None
    """Scalar, float32 or float64: cross-entropy summed over the labels that count; None without labels."""
    token_losses: Tensor | None
    """(B, S) float32, detached; 0 where a label does not count."""
    reports: list[LayerReport]
    """One per layer."""


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((vocab_size, dim), math.nan))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class FeedForward(SwiGLU):
    """Dense SwiGLU FFN with the call of an MoE layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor, context: TokenContext, residual: Tensor) -> tuple[Tensor, LayerReport]:  # type: ignore[override]
        """x: (T, D), normed. Returns (T, D) and an empty report."""
        return super().forward(x), LayerReport({}, {})


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config, layer) if config.mla is None else LatentAttention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = build_ffn(config, layer)

    def forward(self, x: Tensor, layout: Layout, context: TokenContext, cache: KVCache | None = None) -> tuple[Tensor, LayerReport]:
        """x: (B, S, D). Returns (B, S, D) and the FFN's report."""
        x, normed = self.ffn_norm.of_sum(x, self.attn(self.attn_norm(x), layout, cache))
        y, report = self.ffn(normed.flatten(0, 1), context, x.flatten(0, 1))
        return x + y.view_as(x), report


def build_ffn(config: ModelConfig, layer: int) -> nn.Module:
    """What a block has behind its attention, of whichever kind."""
    if layer not in config.moe_layers:
        return FeedForward(config) if config.finedeep is None else Finedeep(config)
    assert config.moe is not None, "a dense model has no MoE layers"
    return MoELayer(config, layer) if config.moe.strata is None else StratifiedMoELayer(config, layer)


class Transformer(nn.Module):
    """The whole model. Parameters are NaN until `init_weights` or a checkpoint sets them, so that a forgotten one is seen at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        # No buffer: it follows from the config, and `to_empty` or `to(dtype)` would spoil it.
        self.rope_frequencies, self.rope_scale = rope_frequencies(config)
        self.windows = {layer_window(config, i) for i in range(config.num_layers)}

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        context: TokenContext | None = None,
        cache: KVCache | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelOutput:
        """Logits, or with `labels` the summed loss.

        tokens: (B, S) int64. labels: (B, S) int64, already shifted (the label of a position is the token after it), -100 where there is
        none. positions: (B, S) int64; None: from 0 in each document, after what is in `cache`. document_ids: (B, S) int32; runs of equal
        ids are documents that don't see each other; None: each row is one. cache: read and extended; excludes document_ids. dtype: of the
        activations; None: that of the embedding.
        """
        B, S = tokens.shape
        if cache is not None and document_ids is not None:
            raise ValueError("Transformer: a cache holds one document per row; document_ids can't be given with it")
        if positions is None:
            if document_ids is not None:
                positions = document_positions(document_ids)
            else:
                start = 0 if cache is None else cache.length
                positions = torch.arange(start, start + S, device=tokens.device).expand(B, S)
        x = self.embed(tokens)
        x = x if dtype is None else x.to(dtype)
        cos, sin = rope_tables(self.rope_frequencies.to(x.device), self.rope_scale, positions, x.dtype)
        layout = Layout(cos, sin, "sdpa")
        if cache is None:
            layout = make_layout(cos, sin, document_ids, self.windows, x.dtype, head_dim=max(self.config.head_size, self.config.value_size))
        context = TokenContext() if context is None else context
        context = dataclasses.replace(context, tokens=tokens.flatten(), sequence=S if context.sequence is None else context.sequence)
        reports = []
        for layer in self.layers:
            x, report = layer(x, layout, context, cache)
            if report.scores is not None:
                context = dataclasses.replace(context, previous=report.scores)
            reports.append(report)
        if cache is not None:
            cache.length += S
        x = self.norm(x)
        weight = self.embed.weight if self.head is None else self.head.weight
        if labels is None:
            logits = F.linear(x, weight.to(x.dtype))
            return ModelOutput(logits.to(_wide(x.dtype)), None, None, reports)
        loss_sum, token_losses = cross_entropy(x.flatten(0, 1), weight, labels.flatten())
        return ModelOutput(None, loss_sum, token_losses.view(B, S), reports)


# ----------------------------------------------------------------------------------------------------------------------- loss


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the logits `hidden @ weight.T` without ever holding all of them.

    hidden: (T, D). weight: (V, D). labels: (T,) int64, -100 where there is no loss. Returns the sum, a float32 (float64 for float64)
    scalar with gradients, and the loss of each token, (T,) float32, without. Where gradients are wanted they are made here, chunk by chunk, since
    a scalar's gradient can only scale them: no logits are computed twice (as Liger Kernel does, arXiv 2410.10989). A second backward through the
    same loss raises RuntimeError: the first scaled them in place.
    """
    return _CrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, grad_enabled: bool) -> tuple[Tensor, Tensor]:
        wide, w = _wide(hidden.dtype), weight.to(hidden.dtype)
        counts = labels != IGNORE
        targets = torch.where(counts, labels, 0)[:, None]
        losses = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Float32 sum over the chunks: in bfloat16 the later chunks would be rounded away.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits = (hidden[part] @ w.T).to(wide)
            logits -= logits.amax(dim=-1, keepdim=True)
            at_target = logits.gather(1, targets[part])
            total = logits.exp_().sum(dim=-1, keepdim=True)
            losses[part] = (total.log() - at_target)[:, 0]
            if grad_hidden is None and grad_weight is None:
                continue
            counted = counts[part, None].to(wide)
            grad_logits = logits.mul_(counted / total).scatter_add_(1, targets[part], -counted).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ w
            if grad_weight is not None:
                if wide == hidden.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden[part])
                else:
                    grad_weight += grad_logits.T @ hidden[part]
        losses = torch.where(counts, losses, 0)
        # Not `save_for_backward`: backward scales them where they are, since another gradient of a large vocabulary's weight may not fit.
        ctx.made = [grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)]
        token_losses = losses.float() if wide == torch.float64 else losses.clone()
        ctx.mark_non_differentiable(token_losses)
        return losses.sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.made is None:
            raise RuntimeError("cross_entropy: backward a second time; its gradients went with the first, so compute the loss again")
        grad_hidden, grad_weight = (None if made is None else made.mul_(grad) for made in ctx.made)
        ctx.made = None
        return grad_hidden, grad_weight, None, None


def _chunks(tokens: int, vocab_size: int) -> list[slice]:
    step = max(1, _CHUNK_NUMEL // vocab_size)
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# -------------------------------------------------------------------------------------------------------------- start weights


def initial_tensor(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Start value, float32 on the CPU, of the parameter of this global name and global shape.

    A function of name, shape, config and seed alone, so every layout of ranks starts from the same weights. Norms are 1, biases 0 (the
    router's: `bias_init`), the weights of a router's noise and its own statistics 0, matrices normal; what writes into the residual stream is
    divided by sqrt(2 * num_layers) (GPT-2; with Finedeep's M sub-layers (1 + M) * num_layers). A router may say
    otherwise (`routers.start_value`).
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = start_value(config, name, shape, generator)
    if value is not None:
        return value
    if name.endswith("norm.weight") or ".norms." in name:
        return torch.ones(*shape, device="cpu")
    router = None if config.moe is None or ".router." not in name else config.moe.router
    if name.endswith((".selection_bias", ".noise", ".cut")):
        return torch.zeros(*shape, device="cpu")
    if name.endswith(".bias"):
        value = getattr(config.moe.router, "bias_init", 0.0) if config.moe is not None and name.endswith("router.bias") else 0.0
        return torch.full(tuple(shape), value, device="cpu")
    std = config.init_std
    if router is not None:
        std = router.init_std if "init_std" in type(router).model_fields else std
    elif name.endswith(("o_proj.weight", "down_proj.weight", ".down")):
        # So many summands of a layer go into the stream.
        writes = 2 if config.finedeep is None else 1 + config.finedeep.sublayers
        std /= math.sqrt(writes * config.num_layers)
    return torch.empty(tuple(shape), device="cpu").normal_(0, std, generator=generator)


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Set every parameter of an unsharded model to its start value."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, model.config, seed))
