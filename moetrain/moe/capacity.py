"""Which routes are kept where an expert or a group of experts takes only so many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.moe.routing import filled


def within_capacity(active: Tensor, priority: Tensor, factor: float, top_k: int, sequence: int | None) -> Tensor:
    """(T, E) bool, the routes that stay: in each sequence an expert takes C = ceil(factor * top_k * S / E), those of the least priority, among
    equals the earlier (Switch, arXiv 2101.03961 Eq. 3; GShard).

    active: (T, E) bool. priority: (T, E). sequence: S, tokens per sequence, padding included; None: all T. The papers count a group of tokens
    that is whatever a device holds; over a sequence, what is dropped depends neither on the layout of ranks nor on the micro-batch.
    """
    T, E = active.shape
    # Less the rounding of the product: 1.1 * 1 * 50 / 5 is 11, not 12.
    capacity = math.ceil(factor * top_k * (T if sequence is None else sequence) / E - 1e-9)
    return within_capacities(active, priority, [capacity] * E, sequence)


def within_capacities(active: Tensor, priority: Tensor, capacities: list[int], sequence: int | None) -> Tensor:
    """`within_capacity` with a capacity of each expert's own."""
    T, E = active.shape
    S = T if sequence is None else sequence
    keys = torch.where(active, priority, math.inf).view(T // max(1, S), S, E)
    order = torch.argsort(keys, dim=1, stable=True)
    places = torch.arange(S, device=active.device)[None, :, None].expand_as(order)
    room = filled(capacities, order)
    return active & (torch.empty_like(order).scatter(1, order, places) < room).view(T, E)


def within_groups(scores: Tensor, num_groups: int, top_groups: int, top_k: int) -> Tensor:
    """(T, E), -inf for experts outside the `top_groups` groups whose top_k / top_groups best scores add up to most (DeepSeek-V3; among equals
    the lower group).

    scores: (T, E), group by group.
    """
    T, E = scores.shape
    groups = scores.view(T, num_groups, E // num_groups)
    best = groups.topk(min(E // num_groups, max(1, top_k // top_groups))).values.sum(-1)
    kept = torch.sort(best, dim=-1, descending=True, stable=True).indices[:, :top_groups]
    open_groups = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
    return torch.where(open_groups[:, :, None], groups, -math.inf).view(T, E)
