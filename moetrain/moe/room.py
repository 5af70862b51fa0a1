"""Room for a fixed number of routes, so that no size depends on what a router decides and nobody waits for a device to learn it.

With `model.moe.route_budget` B, T tokens have R = ceil(B T) rows for routes, rounded up to a multiple of 8, in training. What is not filled is
padding. What finds no room is dropped: the routes of the smallest weights, whichever token they are of, so that every place in the batch is
treated alike and a token with many routes loses some before one with few. A dropped route is none; its weight does not go to the others. The room
is that of one micro-batch on one rank: results do not depend on the layout of ranks as long as nothing is dropped, and what is dropped does.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import MoEConfig
from moetrain.moe.routing import Decision, Routing, recorded


@dataclass(frozen=True)
class Room:
    """budget: rows per token. most: routes that a token can have. probe_rate: probability of a probe, of each pair for itself; 1: any pair may be
    one."""

    budget: float
    most: float
    probe_rate: float

    @staticmethod
    def of(moe: MoEConfig) -> Room | None:
        if moe.route_budget is None:
            return None
        router = moe.router
        most = router.default_active(moe.num_experts) if router.NEVER_MORE else moe.num_experts
        return Room(moe.route_budget, most, router.probed_share())

    def fit(self, routing: Routing) -> tuple[Routing, Tensor]:
        """The routing with a decision that has a `room`, and no more routes and probes than that; and how many routes it lost, ()."""
        decision, lost = recorded(lambda: self._fit(routing.decision, routing.weights.detach()))
        return dataclasses.replace(routing, decision=decision), lost

    def _fit(self, decision: Decision, weights: Tensor) -> tuple[Decision, Tensor]:
        active, probes = decision.active, decision.probes
        T, E = active.shape
        rows, probe_rows = route_rows(self.budget, T), probe_rows_for(self.probe_rate, T * E)
        # A router with a fixed number of routes per token, for which there is room, is not charged for a choice between them.
        kept = largest_within(active, weights.abs(), rows) if rows < self.most * T else active
        lost = (active & ~kept).sum()
        dropped = lost if decision.dropped is None else decision.dropped + lost
        if probes is not None and probe_rows < T * E:
            # Too many come up once in 10^12 draws of a micro-batch; by chance again some of them are left out.
            probes = torch.where(largest_within(probes > 0, torch.zeros_like(weights), probe_rows), probes, 0)
        return dataclasses.replace(decision, active=kept, probes=probes, dropped=dropped, room=(rows, probe_rows)), lost


def route_rows(budget: float, num_tokens: int) -> int:
    """Rows for `budget` routes per token in the mean: eights, since kernels like whole pieces of 16 bytes in either direction."""
    # Less the rounding of the product: 1.1 * 10 is 11, not 12.
    return -(-math.ceil(budget * num_tokens - 1e-9) // 8) * 8


def probe_rows_for(rate: float, pairs: int) -> int:
    """Rows for probes of `pairs` (token, expert) pairs, of which each is probed with probability `rate`, independently: more than this come up with
    probability 10^-12 at most (Bernstein's inequality: P(X - n q >= t) <= exp(-t^2 / (2 n q (1 - q) + 2 t / 3))); n with a rate of 1."""
    exponent = 12 * math.log(10)
    spread = exponent / 3 + math.sqrt((exponent / 3) ** 2 + 2 * exponent * pairs * rate * (1 - rate))
    return pairs if rate == 1 else min(pairs, math.ceil(pairs * rate + spread))


def largest_within(mask: Tensor, size: Tensor, room: int) -> Tensor:
    """(T, E) bool, of the ones in `mask` the `room` with the largest `size`; without a wait for the device.

    mask: (T, E) bool. size: (T, E), >= 0, compared in float32. room: < T E. Equal sizes are taken by a scramble of their places, so that what is
    left out is spread over the batch.
    """
    if room == 0:
        return torch.zeros_like(mask)
    # Floats >= 0 have the order of their bits; 31 of these above 32 of the place, which a product with an odd number permutes: all keys differ.
    places = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    keys = (size.float().view(torch.int32).long() << 32) | ((places * 0x9E3779B1) & 0xFFFFFFFF)
    keys = torch.where(mask, keys, -1)
    last = keys.flatten().topk(room, sorted=False).values.min()
    return mask & (keys >= last)
