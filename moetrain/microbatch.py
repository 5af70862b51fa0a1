"""One micro-batch: the forward pass with what layers want to know of its tokens, and the sums that a step or an evaluation takes over many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
) -> ModelOutput:
    """num_tokens: labels of the whole step over all ranks, which router losses are divided by; None: of this call. seed: of the routers' draws.
    group: ranks that share the micro-batch. counts: of the step's micro-batches so far.

    A token without a label has no routes: it is padding or the last of its document, and nobody reads its output.
    """
    labels = batch["labels"]
    sequence = labels.shape[1]
    # The name of a token, whatever rank it is on: its sample's index and its place in it, moved by the seed.
    keys = batch["sample_index"][:, None] * sequence + torch.arange(sequence, device=labels.device) + seed * 0x632BE59BD9B4E019 % 2**62
    wide = torch.promote_types(dtype, torch.float32)
    context = TokenContext(
        keys=keys.flatten(), valid=(labels != IGNORE).flatten(), num_tokens=None if num_tokens is None else num_tokens.to(wide), group=group,
        sequence=sequence, counts=counts,
    )  # fmt: skip
    return model(
        batch["tokens"], labels=labels, positions=batch["positions"], document_ids=batch["document_ids"] if isolate_documents else None,
        context=context, dtype=dtype,
    )  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """Over all ranks. lm: summed loss. losses: by name. sources: mean loss and tokens of each. moe: statistics by layer. loads:
    of each MoE layer, routes per expert. mean_active: over layers."""

    lm: float
    losses: dict[str, float]
    sources: list[dict[str, Any]]
    moe: dict[str, list[float]]
    loads: list[list[float]]
    mean_active: float | None


class Sums:
    """Sums over tokens of a step or an evaluation, and one collective that adds them over ranks."""

    def __init__(self, num_layers: int, losses: list[str], num_sources: int, device: torch.device) -> None:
        self.loss_names, self.num_layers = losses, num_layers
        self.lm = torch.zeros((), dtype=torch.float64, device=device)
        self.losses = torch.zeros(len(losses), dtype=torch.float64, device=device)
        self.sources = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
        self.layers: list[Tensor | None] = [None] * num_layers

    @torch.no_grad()
    def add(self, output: ModelOutput, batch: Batch) -> None:
        """One micro-batch. A blank sample (source -1) has no labels and counts nowhere."""
        assert output.loss_sum is not None and output.token_losses is not None, "a forward with labels"
        self.lm += output.loss_sum.detach()
        source = batch["source"].clamp(min=0)
        counted = (batch["labels"] != IGNORE).sum(-1).double()
        self.sources[0].index_add_(0, source, output.token_losses.double().sum(-1))
        self.sources[1].index_add_(0, source, counted)
        for i, report in enumerate(output.reports):
            if self.loss_names:
                zero = self.lm.new_zeros(())
                self.losses += torch.stack([report.losses[n].detach().double() if n in report.losses else zero for n in self.loss_names])
            if report.stats:
                s = report.stats
                packed = torch.cat([torch.stack([s["tokens"], s["active_sq"], s["empty"], s["probes"], s["dropped"]]), s["load"]])
                self.layers[i] = packed if self.layers[i] is None else self.layers[i] + packed

    def reduce(self, group: dist.ProcessGroup | None) -> Totals:
        sparse = [layer for layer in self.layers if layer is not None]
        flat = torch.cat([self.lm[None], self.losses, self.sources.flatten(), *sparse])
        if group is not None:
            dist.all_reduce(flat, group=group)
        values = flat.tolist()
        lm, values = values[0], values[1:]
        losses, values = dict(zip(self.loss_names, values)), values[len(self.loss_names) :]
        n = self.sources.shape[1]
        sources = [{"loss": total / tokens if tokens else 0.0, "tokens": int(tokens)} for total, tokens in zip(values[:n], values[n : 2 * n])]
        values = values[2 * n :]
        moe: dict[str, list[float]] = {}
        loads: list[list[float]] = []
        for layer in sparse:
            (tokens, squares, empty, probes, dropped), load = values[:5], values[5 : layer.numel()]
            loads.append(load)
            values = values[layer.numel() :]
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
        active = moe.get("active")
        return Totals(lm, losses, sources, moe, loads, sum(active) / len(active) if active else None)
