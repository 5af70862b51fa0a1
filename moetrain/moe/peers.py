"""The exchange of `moe.exchange` through memory that every rank of the group can write and read: shared memory of one machine, or the memory of
the GPUs of one node.

A row is written once, where its receiver wants it, and a returning row is read where it lies and added: the copies into and out of messages are
not made. Numbers lie behind the rows. Every verb is one phase: write, wait for all, read. There are two halves, used in turn: a half is written again
two phases later, and by then every rank has waited once more after reading it, so one wait per phase is enough.

A wait is a barrier of the process group on CPUs, with its timeout and its errors when a rank is lost, and one of the symmetric memory's own
kernels on GPUs, where nothing waits on the host.

Letters: T tokens of this rank, D model dim, W ranks of the group, P (token, rank) pairs this rank sends, N rows it receives.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import ops
from moetrain.moe.exchange import PAIRS, RESULTS, Collective, Numbers, Per, RouteList, Sizes, amount, pack, unpack, words_of

_ROUND = 2 << 20
"""Bytes: halves are multiples of it."""


class PeersUnavailable(Exception):
    """Why these ranks can't reach each other's memory. All ranks of the group raise it alike."""


@dataclass(frozen=True)
class _Half:
    """own: bytes of this rank's. addresses: where each rank's are, (W,) int64 on the device. All ranks' are of one size."""

    own: Tensor
    addresses: Tensor

    def behind(self, nbytes: int) -> _Half:
        """What is left after the first bytes."""
        return _Half(self.own[nbytes:], self.addresses + nbytes)

    def push(self, x: Tensor, tokens: Tensor | None, begins: Tensor, places: Tensor) -> None:
        ops.push_rows(x, tokens, begins, places, self.addresses, self.own.numel())

    def rows(self, like: Tensor, number: int) -> Tensor:
        """The first, of the width and dtype of `like`: no copy."""
        return self.own[: number * like.shape[1] * like.element_size()].view(like.dtype).view(number, like.shape[1])


@dataclass
class _Memory:
    """wait: until all ranks are here. held: what must live as long."""

    halves: list[_Half]
    wait: Callable[[], None]
    held: Any

    @property
    def capacity(self) -> int:
        return self.halves[0].own.numel()


class Peers:
    """The exchange of one group, for all layers: there is one pair of buffers, which grows with what is sent."""

    name = "peers"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Collective. Raises PeersUnavailable."""
        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._map = _map_gpus if device.type == "cuda" else _map_shared
        self._memory = self._map(_ROUND, group, device)
        self._turn = 0

    def sizes(self, counts: Tensor) -> Sizes:
        """counts: (W, 4) int64, from this rank to each. This is where the layer waits for the device, once."""
        every = counts.new_empty(self.world, *counts.shape)
        dist.all_gather(list(every.unbind()), counts, group=self.group)
        by_all = every.tolist()
        return Sizes(by_all[self.rank], [row[self.rank] for row in by_all], every, by_all)

    def send_rows(self, x: Tensor, pairs: RouteList, sizes: Sizes, numbers: Sequence[Numbers] = ()) -> tuple[Tensor, list[Tensor]]:
        """x: (T, D) -> (N, D): the row of each of `pairs`, which are sorted by rank, into its rank's memory; and the numbers."""
        here, behind = self._next(x, numbers, sizes, False)
        here.push(x, pairs.tokens, *_table(sizes, PAIRS, self.rank, False))
        self._push(numbers, behind, sizes, False)
        self._memory.wait()
        # A copy: the half is written again while backward still needs the rows.
        return here.rows(x, sum(sizes.received_of(PAIRS))).clone(), _came(numbers, behind, sizes.received_of)

    def return_rows(self, rows: Tensor, back: RouteList, sizes: Sizes, numbers: Sequence[Numbers] = ()) -> tuple[Tensor, list[Tensor]]:
        """(N, D) -> (T, D): each token's rows are added where its experts' ranks have them, in float32. And the numbers."""
        here, behind = self._next(rows, numbers, sizes, True)
        here.rows(rows, rows.shape[0]).copy_(rows)
        self._push(numbers, behind, sizes, True)
        self._memory.wait()
        # A rank has this rank's pairs with a route first, then those with probes only, which are not read.
        begins, _ = _table(sizes, RESULTS, self.rank, False)
        _, places = _table(sizes, PAIRS, self.rank, False)
        y = ops.pull_rows(rows, back.row_offsets, back.positions, begins, places, here.addresses, here.own.numel())
        return y, _came(numbers, behind, sizes.sent_of)

    def _push(self, numbers: Sequence[Numbers], behind: _Half, sizes: Sizes, back: bool) -> None:
        if numbers:
            message = pack(numbers, sizes.received_of if back else sizes.sent_of)
            behind.push(message[:, None], None, *_table(sizes, words_of(numbers), self.rank, back))

    def _next(self, rows: Tensor, numbers: Sequence[Numbers], sizes: Sizes, back: bool) -> tuple[_Half, _Half]:
        """The half whose turn it is, and what of it is behind the rows, with room for both on whatever rank needs most: all ranks come to the
        same places without asking each other."""
        # `push_rows` wants buffers that are aligned to 16 bytes.
        nbytes = -(-_most(sizes, PAIRS, False) * rows.shape[1] * rows.element_size() // 16) * 16
        self._reserve(nbytes + _most(sizes, words_of(numbers), back) * 4)
        self._turn ^= 1
        half = self._memory.halves[self._turn]
        return half, half.behind(nbytes)

    def _reserve(self, nbytes: int) -> None:
        """Halves of as many bytes, which are the same number on all ranks."""
        if nbytes <= self._memory.capacity:
            return
        # Nobody is still reading the old halves when they go.
        self._memory.wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        capacity = max(nbytes, self._memory.capacity * 3 // 2)
        del self._memory
        self._memory = self._map((capacity + _ROUND - 1) // _ROUND * _ROUND, self.group, self.device)


def _most(sizes: Sizes, per: Per, back: bool) -> int:
    """What the rank that receives most receives."""
    assert sizes.by_all is not None, "sizes of all ranks"
    amounts = [[amount(counts, per) for counts in row] for row in sizes.by_all]
    return max(map(sum, amounts if back else zip(*amounts)))


def _came(numbers: Sequence[Numbers], behind: _Half, amounts: Callable[[Per], list[int]]) -> list[Tensor]:
    if not numbers:
        return []
    length = 4 * sum(amounts(words_of(numbers)))
    return unpack(behind.own[:length].view(torch.int32), numbers, amounts)


def _table(sizes: Sizes, per: Per, rank: int, back: bool) -> tuple[Tensor, Tensor]:
    """Of what this rank sends, where each rank's part begins, (W + 1,); and where it begins there, after the parts of the ranks before, (W,); int32.
    Computed on the device: numbers from the host would have to be copied there."""
    assert sizes.every is not None, "sizes of all ranks"
    amounts = sum(sizes.every[..., c] * n for c, n in enumerate(per) if n)
    assert isinstance(amounts, Tensor), "at least one count"
    amounts = amounts.T if back else amounts  # (from, to)
    begins = torch.nn.functional.pad(amounts[rank].cumsum(0), (1, 0)).to(torch.int32)
    return begins, amounts[:rank].sum(0).to(torch.int32)


# -------------------------------------------------------------------------------------------------------------- shared memory


def _map_shared(capacity: int, group: dist.ProcessGroup, device: torch.device) -> _Memory:
    """Anonymous files, which the other ranks open through /proc: nothing is left behind when a rank is killed, and the size of /dev/shm, 64 MB in
    many containers, does not matter. Pages are taken when they are first written."""
    found: tuple[mmap.mmap, int] | str
    try:
        descriptor = os.memfd_create("moetrain-exchange")
        os.ftruncate(descriptor, 2 * capacity)
        found = mmap.mmap(descriptor, 2 * capacity), descriptor
        told = (_machine(), os.getpid(), descriptor)
    except (OSError, AttributeError) as error:  # AttributeError: not Linux
        found, told = f"no shared memory ({error})", None
    maps, reason = [], found if isinstance(found, str) else ""
    everyone = _told(told, group)
    if not reason and None in everyone:
        reason = "a rank has no shared memory"
    if not reason and any(machine != _machine() for machine, *_ in everyone):
        reason = "the ranks are not on one machine"
    try:
        for v, (_, pid, number) in enumerate(everyone if not reason else ()):
            if v == dist.get_rank(group):
                maps.append(found[0])
                continue
            theirs = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                maps.append(mmap.mmap(theirs, 2 * capacity))
            finally:
                os.close(theirs)
    except OSError as error:
        reason = f"a rank's memory can't be opened ({error})"
    reasons = _told(reason, group)
    if not isinstance(found, str):
        os.close(found[1])  # all who could have opened it
    if any(reasons):
        raise PeersUnavailable(next(r for r in reasons if r))
    views = [torch.frombuffer(m, dtype=torch.uint8) for m in maps]
    own = views[dist.get_rank(group)]
    starts = torch.tensor([view.data_ptr() for view in views], dtype=torch.int64)

    def wait() -> None:
        dist.barrier(group)

    return _Memory([_Half(own[at : at + capacity], starts + at) for at in (0, capacity)], wait, views)


def _machine() -> tuple[str, int]:
    """The same for processes that see each other in /proc."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read(), os.stat("/proc/self/ns/pid").st_ino


def _told(what: Any, group: dist.ProcessGroup) -> list[Any]:
    """Of each rank."""
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, what, group=group)
    return everyone


# ------------------------------------------------------------------------------------------------------- memory of the GPUs


def _map_gpus(capacity: int, group: dist.ProcessGroup, device: torch.device) -> _Memory:
    """torch's symmetric memory. It has never run: no GPU has been at hand."""
    from torch.distributed import _symmetric_memory as symmetric

    machines = _told(_machine(), group)
    if any(machine != machines[0] for machine in machines):
        raise PeersUnavailable("the ranks are not on one machine")
    whole, reason = None, ""
    try:
        whole = symmetric.empty(2 * capacity, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        reason = f"no symmetric memory ({str(error).splitlines()[0]})"
    reasons = _told(reason, group)
    if whole is None or any(reasons):
        raise PeersUnavailable(next(r for r in reasons if r))
    try:
        handle = symmetric.rendezvous(whole, group)
    except RuntimeError as error:  # such as GPUs without access to each other: on every rank
        raise PeersUnavailable(f"the GPUs can't reach each other's memory ({str(error).splitlines()[0]})") from None
    starts = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    halves = [_Half(whole[at : at + capacity], starts + at) for at in (0, capacity)]
    return _Memory(halves, lambda: handle.barrier(channel=0), (whole, handle))


def open_exchange(choice: str, group: dist.ProcessGroup, device: torch.device) -> tuple[Collective | Peers, str]:
    """The exchange of a group by `parallel.exchange`, and why it is this one. Collective. ValueError: `peers` is asked for and impossible."""
    if choice == "collective":
        return Collective(group), "by parallel.exchange"
    if choice == "auto" and device.type == "cuda":
        return Collective(group), "peers has never run on GPUs; parallel.exchange: peers tries it"
    try:
        return Peers(group, device), "the ranks share memory"
    except PeersUnavailable as error:
        if choice == "peers":
            raise ValueError(f"parallel.exchange: peers: {error}; use auto or collective") from None
        return Collective(group), str(error)
