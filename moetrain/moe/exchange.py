"""What travels between the ranks that share a layer's experts, as collectives of their process group. `moetrain.moe.peers` does the same through
memory.

Both have the same three verbs: `sizes` (how much will travel), `send_rows` and `return_rows` (hidden states to the ranks of their experts and back).
With the rows go, in the same exchange, `Numbers` that belong to them: route lists, weights, their gradients. The verbs are called by every rank of
the group in the same order, also by one with nothing to send: a rank that left one out would leave the others waiting.

Letters: T tokens of this rank, D model dim, W ranks of the group, P (token, rank) pairs this rank sends, N rows it receives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import ops

Per = tuple[int, int, int, int]
"""How many of something there are for each of what is counted between two ranks: (token, rank) pairs with a route, pairs with probes only, routes,
probes."""

PAIRS: Per = (1, 1, 0, 0)
RESULTS: Per = (1, 0, 0, 0)
ROUTES: Per = (0, 0, 1, 0)
PROBES: Per = (0, 0, 0, 1)
ENTRIES: Per = (0, 0, 1, 1)


class Numbers(NamedTuple):
    """What travels beside rows. values: (n,) of 4 or 8 bytes each, in order of the ranks they go to. per: how many there are."""

    values: Tensor
    per: Per


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


_Amounts = Callable[[Per], list[int]]


@dataclass(frozen=True)
class Sizes:
    """sent, received: per rank, the four counts. every: (W, W, 4) int64, from each rank to each, with `by_all`, the same as numbers; where only the
    ranks' memory is used (`moe.peers`)."""

    sent: list[list[int]]
    received: list[list[int]]
    every: Tensor | None = None
    by_all: list[list[list[int]]] | None = None

    def sent_of(self, per: Per) -> list[int]:
        """To each rank."""
        return [amount(counts, per) for counts in self.sent]

    def received_of(self, per: Per) -> list[int]:
        """From each rank."""
        return [amount(counts, per) for counts in self.received]


def amount(counts: Sequence[int], per: Per) -> int:
    return sum(map(operator.mul, counts, per))


def words_of(numbers: Sequence[Numbers]) -> Per:
    """The words of 4 bytes in the message of `pack`."""
    widths = [n.values.element_size() // 4 for n in numbers]
    a, b, c, d = (sum(width * n.per[count] for width, n in zip(widths, numbers)) for count in range(4))
    return a, b, c, d


def pack(numbers: Sequence[Numbers], amounts: _Amounts) -> Tensor:
    """(words,) int32: of each of the `numbers` those for rank 0, then those for rank 1, and so on. amounts: `Sizes.sent_of` or, on the way back,
    `Sizes.received_of`."""
    parts = [n.values.split(amounts(n.per)) for n in numbers]
    return torch.cat([part.view(torch.int32) for of_rank in zip(*parts) for part in of_rank])


def unpack(message: Tensor, numbers: Sequence[Numbers], amounts: _Amounts) -> list[Tensor]:
    """The values that came, in order of the ranks they came from, from the message of all ranks. numbers: what was sent, of the same kind."""
    widths = [n.values.element_size() // 4 for n in numbers]
    parts = message.split([width * n for of_rank in zip(*(amounts(n.per) for n in numbers)) for width, n in zip(widths, of_rank)])
    return [torch.cat(parts[i :: len(numbers)]).view(n.values.dtype) for i, n in enumerate(numbers)]


class Part(NamedTuple):
    """One tensor of an exchange. tensor: (sum(send), ...), its first send[0] rows for rank 0 of the group, and so on. output: (sum(receive), ...),
    where what is received goes; None: it is made."""

    tensor: Tensor
    send: list[int]
    receive: list[int]
    output: Tensor | None = None


def all_to_all(parts: Sequence[Part], group: dist.ProcessGroup) -> list[Tensor]:
    """What is received of each part: (sum(receive), ...). All are under way before one is waited for. In one message to each rank they would have
    to be copied apart; so each is received where it stays."""
    outputs = [p.tensor.new_empty((sum(p.receive), *p.tensor.shape[1:])) if p.output is None else p.output for p in parts]
    works = [
        # The last is waited for in torch's function: an error then has that name, as one of the others has this function's.
        dist.all_to_all_single(output, p.tensor, p.receive, p.send, group=group, async_op=p is not parts[-1])
        for p, output in zip(parts, outputs)
    ]
    for work in works[:-1]:
        work.wait()
    return outputs


class Collective:
    """All-to-alls: NCCL on GPUs, gloo on CPUs. Rows that leave, and those that come home only to be added, lie in two buffers, which all layers use
    and which grow with what is sent; what a rank receives for its experts is kept for backward and has memory of its own."""

    name = "collective"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def sizes(self, counts: Tensor) -> Sizes:
        """counts: (W, 4) int64, from this rank to each. This is where the layer waits for the device, once."""
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self.group)
        return Sizes(*torch.stack([counts, incoming]).tolist())

    def send_rows(self, x: Tensor, pairs: RouteList, sizes: Sizes, numbers: Sequence[Numbers] = ()) -> tuple[Tensor, list[Tensor]]:
        """x: (T, D) -> (N, D): the row of each of `pairs`, which are sorted by rank, to its rank; and the numbers."""
        leaving = torch.index_select(x.contiguous(), 0, pairs.tokens, out=self._buffer(0, x, pairs.tokens.numel()))
        rows = Part(leaving, sizes.sent_of(PAIRS), sizes.received_of(PAIRS))
        return self._exchange(rows, numbers, sizes.sent_of, sizes.received_of)

    def return_rows(self, rows: Tensor, back: RouteList, sizes: Sizes, numbers: Sequence[Numbers] = ()) -> tuple[Tensor, list[Tensor]]:
        """(N, D) -> (T, D): the rows of pairs with a route, which `back` has alone, go home, and a token's rows are added in float32. And the
        numbers."""
        kept, start = [], 0
        for routed, probed, *_ in sizes.received:
            kept.append(rows[start : start + routed])
            start += routed + probed
        sent, received = sizes.received_of(RESULTS), sizes.sent_of(RESULTS)
        leaving = torch.cat(kept, out=self._buffer(0, rows, sum(sent)))
        part = Part(leaving, sent, received, self._buffer(1, rows, sum(received)))
        home, came = self._exchange(part, numbers, sizes.received_of, sizes.sent_of)
        return ops.combine(home, *back.without_counts()), came

    def _exchange(self, rows: Part, numbers: Sequence[Numbers], there: _Amounts, here: _Amounts) -> tuple[Tensor, list[Tensor]]:
        if not numbers:
            return all_to_all([rows], self.group)[0], []
        per = words_of(numbers)
        message, came = all_to_all([Part(pack(numbers, there), there(per), here(per)), rows], self.group)
        return came, unpack(message, numbers, here)

    def _buffer(self, which: int, like: Tensor, rows: int) -> Tensor:
        """(rows, D) of the kind of `like`."""
        nbytes = rows * like.shape[1] * like.element_size()
        if nbytes > self._buffers[which].numel() or self._buffers[which].device != like.device:
            self._buffers[which] = torch.empty(max(nbytes, self._buffers[which].numel() * 3 // 2), dtype=torch.uint8, device=like.device)
        return self._buffers[which][:nbytes].view(like.dtype).view(rows, like.shape[1])
