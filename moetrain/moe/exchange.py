"""What travels between the ranks that share a layer's experts, as collectives of their process group. `moe.peers` does the same through memory.

Both have the same four verbs: `sizes` (how much will travel), `send_rows` and `return_rows` (hidden states to the ranks of their experts and back),
and `numbers` (route lists, weights and their gradients). They are called by every rank of the group in the same order, also by one with nothing to
send: a rank that left one out would leave the others waiting.

Letters: T tokens of this rank, D model dim, W ranks of the group, P (token, rank) pairs this rank sends, N rows it receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import ops

ROUTED, PROBED, ROUTES, PROBES = range(4)
"""What is counted for each pair of ranks: (token, rank) pairs with a route, pairs with probes only, routes, probes."""


class RouteList(NamedTuple):
    """Routes sorted by expert, and the way back to rows; all int32 (see `ops.route`). Where the counts add up to less than R, the rest is padding.

    tokens: (R,) row of each route. counts: (experts,). row_offsets: (rows + 1,). positions: (R,), row by row.
    """

    tokens: Tensor
    counts: Tensor
    row_offsets: Tensor
    positions: Tensor

    def without_counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `ops.permute` and `ops.combine` take."""
        return self.tokens, self.row_offsets, self.positions


@dataclass(frozen=True)
class Sizes:
    """sent, received: per rank, the four counts. every: (W, W, 4) int64, from each rank to each, with `by_all`, the same as numbers; where only the
    ranks' memory is used (`moe.peers`)."""

    sent: list[list[int]]
    received: list[list[int]]
    every: Tensor | None = None
    by_all: list[list[list[int]]] | None = None

    def sent_of(self, *counts: int) -> list[int]:
        return [sum(row[c] for c in counts) for row in self.sent]

    def received_of(self, *counts: int) -> list[int]:
        return [sum(row[c] for c in counts) for row in self.received]


def exchange(tensor: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """(sum(send), ...) -> (sum(receive), ...): the first send[0] rows go to rank 0 of the group, and so on."""
    output = tensor.new_empty((sum(receive), *tensor.shape[1:]))
    dist.all_to_all_single(output, tensor.contiguous(), receive, send, group=group)
    return output


class Collective:
    """All-to-alls: NCCL on GPUs, gloo on CPUs."""

    name = "collective"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def sizes(self, counts: Tensor) -> Sizes:
        """counts: (W, 4) int64, from this rank to each. This is where the layer waits for the device, once."""
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self.group)
        return Sizes(*torch.stack([counts, incoming]).tolist())

    def send_rows(self, x: Tensor, pairs: RouteList, sizes: Sizes) -> Tensor:
        """x: (T, D) -> (N, D): the row of each of `pairs`, which are sorted by rank, to its rank."""
        return exchange(_gather(x, pairs), sizes.sent_of(ROUTED, PROBED), sizes.received_of(ROUTED, PROBED), self.group)

    def return_rows(self, rows: Tensor, back: RouteList, sizes: Sizes) -> Tensor:
        """(N, D) -> (T, D): the rows of pairs with a route, which `back` has alone, go home, and a token's rows are added in float32."""
        kept, start = [], 0
        for routed, probed, *_ in sizes.received:
            kept.append(rows[start : start + routed])
            start += routed + probed
        home = exchange(torch.cat(kept), sizes.received_of(ROUTED), sizes.sent_of(ROUTED), self.group)
        return ops.combine(home, *back.without_counts())

    def numbers(self, tensor: Tensor, sizes: Sizes, *counts: int, back: bool = False) -> Tensor:
        """(n,) -> (m,): as many numbers for each rank as the sum of `counts` says, or, `back`, the way back of as many."""
        there, here = sizes.sent_of(*counts), sizes.received_of(*counts)
        return exchange(tensor, here, there, self.group) if back else exchange(tensor, there, here, self.group)


def _gather(x: Tensor, pairs: RouteList) -> Tensor:
    return ops.permute(x.contiguous(), *pairs.without_counts())
