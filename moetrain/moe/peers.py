"""The exchange of `moe.exchange` through memory that every rank of the group can write and read: shared memory of one machine, or the memory of
the GPUs of one node.

A row is written once, where its receiver wants it, and a returning row is read where it lies and added: the copies into and out of messages are
not made. Every verb is one phase: write, wait for all, read. There are two halves, used in turn: a half is written again two phases later,
and by then every rank has waited once more after reading it, so one wait per phase is enough.

A wait is a barrier of the process group on CPUs, with its timeout and its errors when a rank is lost, and one of the symmetric memory's own
kernels on GPUs, where nothing waits on the host.

Letters: T tokens of this rank, D model dim, W ranks of the group, P (token, rank) pairs this rank sends, N rows it receives.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import ops
from moetrain.moe.exchange import PROBED, ROUTED, Collective, RouteList, Sizes

_ROUND = 2 << 20
"""Bytes: halves are multiples of it."""


class PeersUnavailable(Exception):
    """Why these ranks can't reach each other's memory. All ranks of the group raise it alike."""


@dataclass
class _Memory:
    """capacity: bytes of a half. own: both halves of this rank, bytes. addresses: of each half, (W,) int64 on the device. wait: until all ranks
    are here. held: what must live as long."""

    capacity: int
    own: list[Tensor]
    addresses: list[Tensor]
    wait: Callable[[], None]
    held: Any


class Peers:
    """Row and number exchange of one group, for all layers: there is one pair of buffers, which grows with what is sent."""

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

    def send_rows(self, x: Tensor, pairs: RouteList, sizes: Sizes) -> Tensor:
        """x: (T, D) -> (N, D): the row of each of `pairs`, which are sorted by rank, into its rank's memory."""
        return self._push(x, pairs.tokens, sizes, (ROUTED, PROBED), False)

    def return_rows(self, rows: Tensor, back: RouteList, sizes: Sizes) -> Tensor:
        """(N, D) -> (T, D): each token's rows are added where its experts' ranks have them, in float32."""
        memory, half = self._next(_most(sizes, (ROUTED, PROBED), False) * rows.shape[1] * rows.element_size())
        memory.own[half][: rows.nbytes].view(rows.dtype).view(rows.shape).copy_(rows)
        memory.wait()
        # A rank has this rank's pairs with a route first, then those with probes only, which are not read.
        begins, _ = _table(sizes, (ROUTED,), self.rank, False)
        _, places = _table(sizes, (ROUTED, PROBED), self.rank, False)
        return ops.pull_rows(rows, back.row_offsets, back.positions, begins, places, memory.addresses[half], memory.capacity)

    def numbers(self, tensor: Tensor, sizes: Sizes, *counts: int, back: bool = False) -> Tensor:
        """(n,) -> (m,): as many numbers for each rank as the sum of `counts` says, or, `back`, the way back of as many."""
        return self._push(tensor[:, None], None, sizes, counts, back)[:, 0]

    def _push(self, x: Tensor, tokens: Tensor | None, sizes: Sizes, counts: tuple[int, ...], back: bool) -> Tensor:
        width = x.shape[1]
        memory, half = self._next(_most(sizes, counts, back) * width * x.element_size())
        ops.push_rows(x, tokens, *_table(sizes, counts, self.rank, back), memory.addresses[half], memory.capacity)
        memory.wait()
        number = sum(sizes.sent_of(*counts) if back else sizes.received_of(*counts))
        # A copy: the half is written again while backward still needs these.
        return memory.own[half][: number * width * x.element_size()].view(x.dtype).view(number, width).clone()

    def _next(self, nbytes: int) -> tuple[_Memory, int]:
        """The half whose turn it is, with room for `nbytes`, which is the same number on all ranks."""
        if nbytes > self._memory.capacity:
            # Nobody is still reading the old halves when they go.
            self._memory.wait()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            capacity = max(nbytes, self._memory.capacity * 3 // 2)
            del self._memory
            self._memory = self._map((capacity + _ROUND - 1) // _ROUND * _ROUND, self.group, self.device)
        self._turn ^= 1
        return self._memory, self._turn


def _most(sizes: Sizes, counts: tuple[int, ...], back: bool) -> int:
    """What the rank that receives most receives."""
    assert sizes.by_all is not None, "sizes of all ranks"
    amounts = [[sum(cell[c] for c in counts) for cell in row] for row in sizes.by_all]
    return max(map(sum, amounts if back else zip(*amounts)))


def _table(sizes: Sizes, counts: tuple[int, ...], rank: int, back: bool) -> tuple[Tensor, Tensor]:
    """Of what this rank sends, where each rank's part begins, (W + 1,); and where it begins there, after the parts of the ranks before, (W,); int32.
    Computed on the device: numbers from the host would have to be copied there."""
    assert sizes.every is not None, "sizes of all ranks"
    amounts = sum(sizes.every[..., c] for c in counts)
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

    return _Memory(capacity, list(own.split(capacity)), [starts, starts + capacity], wait, views)


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
    return _Memory(capacity, list(whole.split(capacity)), [starts, starts + capacity], lambda: handle.barrier(channel=0), (whole, handle))


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
