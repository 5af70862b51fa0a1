"""What the layers of the comparison compute: one input, output gradient, weights and, if they are forced, routes.

Letters: T tokens, D model dim, F expert dim, E experts, k routes per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """variable: k is a mean, each (token, expert) pair is a route with probability k / E; else every token has k routes."""

    tokens: int
    hidden: int
    expert_dim: int
    experts: int
    k: int
    variable: bool = False

    def __str__(self) -> str:
        return f"{self.tokens},{self.hidden},{self.expert_dim},{self.experts},{'~' if self.variable else ''}{self.k}"


@dataclass(frozen=True)
class Problem:
    """x, grad: (T, D). gate_up: (E, 2F, D). down: (E, D, F). router: (E, D).

    active: (T, E) bool, the forced routes, or None where the contestant's router decides. chosen: (T, k) int64, k forced routes per token for
    layers that know no other; as many as `active` has on average, by the same shares. weights: (T, E) float32, 1 / k on every route.
    """

    shape: Shape
    x: Tensor
    grad: Tensor
    gate_up: Tensor
    down: Tensor
    router: Tensor
    active: Tensor | None
    chosen: Tensor | None
    weights: Tensor | None

    def leaf(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.clone())


def make(shape: Shape, dtype: torch.dtype, routing: str, seed: int = 0, device: torch.device | None = None) -> Problem:
    """routing: `router` (each contestant's own router decides), `balanced` (all experts alike) or `skew` (half of the experts get 8 times as
    many routes as the others). The numbers are the same on every device (None: the CPU)."""
    generator = torch.Generator().manual_seed(seed)
    T, D, F, E, k = shape.tokens, shape.hidden, shape.expert_dim, shape.experts, shape.k

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * std).to(dtype)

    x, grad = normal(T, D), normal(T, D)
    gate_up, down, router = normal(E, 2 * F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5), normal(E, D, std=D**-0.5)
    active = chosen = weights = None
    if routing != "router":
        share = torch.ones(E, dtype=torch.float64)
        if routing == "skew":
            share[: E // 2] = 8.0
        share = (k * share / share.sum()).clamp(max=1.0)
        chosen = _systematic(share, T, k, generator)
        if shape.variable:
            active = torch.rand(T, E, generator=generator) < share
        else:
            active = torch.zeros(T, E, dtype=torch.bool).scatter(1, chosen, True)
        weights = active.float() / k
    tensors = (x, grad, gate_up, down, router, active, chosen, weights)
    return Problem(shape, *(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]


def _systematic(share: Tensor, rows: int, k: int, generator: torch.Generator) -> Tensor:
    """(rows, k): k different experts per row, expert e with probability share[e]: marks at distance 1 on a line of the shares, which sum to k,
    in an order of the experts that is drawn for each row."""
    order = torch.rand(rows, len(share), generator=generator, dtype=torch.float64).argsort(1)
    ends = share[order].cumsum(1)
    ends[:, -1] = k  # rounding must not lose the last mark
    marks = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + torch.arange(k)
    return order.gather(1, torch.searchsorted(ends, marks, right=True).clamp(max=len(share) - 1))
