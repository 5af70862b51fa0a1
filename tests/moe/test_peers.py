"""The exchange through memory: operators against plain copies, buffers that grow, slow readers, ranks that can't share memory; and on one GPU with
several ranks, where there is one. That it computes what messages compute is proven in test_dispatch.py and test_train.py."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain import ops
from moetrain.moe import peers
from moetrain.moe.exchange import PAIRS, ROUTES, Collective, Numbers, RouteList, Sizes
from moetrain.moe.peers import Peers, open_exchange
from tests.distributed import run

CPU = torch.device("cpu")


def tables(T: int = 9, ranks: int = 3, D: int = 5, dtype: torch.dtype = torch.float64):
    """Pairs of T tokens and ranks, where they go, and buffers of this process in place of other ranks' memory."""
    generator = torch.Generator().manual_seed(T + ranks)
    mask = torch.rand(T, ranks, generator=generator) < 0.6
    mask[:, 1:2] = False  # nothing for one rank
    pairs = RouteList(*ops.route(mask, int(mask.sum())))
    begins = torch.nn.functional.pad(pairs.counts.cumsum(0), (1, 0)).int()
    places = torch.randint(0, 4, (ranks,), generator=generator, dtype=torch.int32)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    capacity = (T + 4) * D * x.element_size()
    buffers = [torch.full((T + 4, D), 7.0, dtype=dtype) for _ in range(ranks)]
    return pairs, begins, places, x, capacity, buffers, torch.tensor([b.data_ptr() for b in buffers])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("T, D", [(9, 5), (700, 64), (0, 3), (4, 0)])
def test_push(dtype, T, D):
    """Each row is where it belongs, and no other byte has changed."""
    pairs, begins, places, x, capacity, buffers, addresses = tables(T, 3, D, torch.float64)
    x, buffers = (x * 100).to(dtype), [b.to(dtype) for b in buffers]
    addresses = torch.tensor([b.data_ptr() for b in buffers])
    want = [b.clone() for b in buffers]
    for w in range(3):
        listed = pairs.tokens[begins[w] : begins[w + 1]].long()
        want[w][places[w] : places[w] + len(listed)] = x[listed]
    ops.push_rows(x, pairs.tokens, begins, places, addresses, capacity)
    assert all(torch.equal(a, b) for a, b in zip(buffers, want))
    ops.push_rows(x[:0], None, torch.zeros(4, dtype=torch.int32), places, addresses, capacity)
    assert all(torch.equal(a, b) for a, b in zip(buffers, want))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, D", [(9, 5), (700, 64), (0, 3), (4, 0)])
def test_pull(dtype, T, D):
    """Bit for bit what `combine` makes of the same rows in one list."""
    pairs, begins, places, x, capacity, buffers, addresses = tables(T, 3, D, dtype)
    rows = torch.randn(len(pairs.tokens), D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    ops.push_rows(rows, None, begins, places, addresses, capacity)
    got = ops.pull_rows(x, pairs.row_offsets, pairs.positions, begins, places, addresses, capacity)
    assert torch.equal(got, ops.combine(rows, *pairs.without_counts()))


def test_what_does_not_fit_is_refused():
    """Before anything is written."""
    pairs, begins, places, x, capacity, buffers, addresses = tables()
    given = {"x": x, "tokens": pairs.tokens, "begins": begins, "places": places, "buffers": addresses, "capacity": capacity}
    for change, message in (
        ({"capacity": x.element_size() * x.shape[1]}, "places: expected rows within a buffer of 40 bytes"),
        ({"places": places - 9}, "places"),
        ({"begins": begins.flip(0)}, "begins: expected offsets that rise"),
        ({"tokens": pairs.tokens + 9}, "tokens: expected indices"),
        ({"buffers": addresses.int()}, "buffers: expected int64"),
        ({"places": places[:1]}, "places: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.push_rows(*{**given, **change}.values())
    assert all((b == 7).all() for b in buffers)
    with pytest.raises(RuntimeError, match="positions"):
        ops.pull_rows(x, pairs.row_offsets, pairs.positions + 99, begins, places, addresses, capacity)


def one_row_each(exchange: Collective | Peers, dtype: torch.dtype, number: int) -> tuple[torch.Tensor, RouteList, Sizes]:
    """A row for the other of two ranks and, as if they were routes, so many numbers for each."""
    rank = dist.get_rank()
    pairs = RouteList(*ops.route(torch.arange(2)[None] != rank, 1))
    return torch.full((1, 3), 10.0 + rank, dtype=dtype), pairs, exchange.sizes(torch.tensor([[int(w != rank), 0, number, 0] for w in range(2)]))


def growing(dtype: torch.dtype) -> list[bool]:
    """More than fits into the first buffers, then little again; there and back; float64, float32 and int32 beside a row of `dtype`, behind which no
    number could lie without a gap."""
    group, rank = dist.group.WORLD, dist.get_rank()
    exchange, plain, same, received = Peers(group, CPU), Collective(group), [], []
    for step, length in enumerate((3, 700_000, 5, 2_000_000, 1)):
        length += 2 * rank
        x, pairs, sizes = one_row_each(exchange, dtype, length)
        x += step
        wide, narrow = (torch.arange(2 * length, dtype=d) + 10 * rank for d in (torch.float64, torch.float32))
        sent = [Numbers(wide, ROUTES), Numbers(torch.tensor([rank], dtype=torch.int32), PAIRS), Numbers(narrow, ROUTES)]
        rows, found = exchange.send_rows(x, pairs, sizes, sent)
        others, expected = plain.send_rows(x, pairs, sizes, sent)
        same += [torch.equal(a, b) for a, b in zip([rows, *found], [others, *expected])]
        same.append(rows.tolist() == [[11.0 - rank + step] * 3] and found[1].tolist() == [1 - rank])
        home, back = exchange.return_rows(rows * 2, pairs, sizes, [Numbers(f, n.per) for f, n in zip(found, sent)])
        same += [torch.equal(a, n.values) for a, n in zip(back, sent)] + [torch.equal(home, 2 * x)]
        same.append(torch.equal(plain.return_rows(rows * 2, pairs, sizes)[0], home))
        received += [(t, t.clone()) for t in [rows, others, *found]]
    return same + [torch.equal(found, then) for found, then in received]  # what was received is not the buffer itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_buffers_grow(dtype):
    for same in run(growing, 2, dtype):
        assert all(same)


def slow() -> bool:
    """Rank 0 comes late out of each wait, while rank 1 is already writing what comes next."""
    exchange, rank = Peers(dist.group.WORLD, CPU), dist.get_rank()
    wait = exchange._memory.wait

    def late() -> None:
        wait()
        time.sleep(0.05 if rank == 0 else 0)

    exchange._memory.wait = late
    x, pairs, sizes = one_row_each(exchange, torch.float32, 4)
    good = True
    for i in range(8):
        rows, (found,) = exchange.send_rows(x + i, pairs, sizes, [Numbers(torch.full((8,), 2.0 * i + rank), ROUTES)])
        good = good and found.tolist() == [2.0 * i] * 4 + [2.0 * i + 1] * 4 and rows[:, 0].tolist() == [11.0 - rank + i]
    return good


def test_a_slow_reader_is_not_overtaken():
    assert run(slow, 2) == [True, True]


def apart(place: str) -> list[str]:
    """Ranks that are, or seem to be, on different machines; a rank whose memory can't be opened."""
    group, rank, told = dist.group.WORLD, dist.get_rank(), []
    peers._machine = lambda: (f"machine {rank}", 1)
    exchange, reason = open_exchange("auto", group, CPU)
    told += [exchange.name, reason]
    try:
        open_exchange("peers", group, CPU)
    except ValueError as error:
        told.append(str(error))
    peers._machine = lambda: ("machine", 1)
    if rank == 1:
        del os.memfd_create
    exchange, reason = open_exchange("auto", group, CPU)
    return [*told, exchange.name, reason]


def test_ranks_that_share_no_memory(tmp_path: Path):
    """All ranks take the other exchange alike, and say why."""
    for told in run(apart, 2, str(tmp_path)):
        assert told[:2] == ["collective", "the ranks are not on one machine"]
        assert told[2] == "parallel.exchange: peers: the ranks are not on one machine; use auto or collective"
        assert told[3] == "collective" and told[4].startswith(("no shared memory", "a rank has no shared memory"))


def nothing_left() -> bool:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Peers(dist.group.WORLD, CPU)
    return len(os.listdir("/proc/self/fd")) <= before + 1


def test_no_descriptor_stays_open():
    assert all(run(nothing_left, 2))


def on_one_gpu() -> list[float]:
    """Two ranks of one GPU against messages between copies on the CPU."""
    # Here, in the rank: the process that ranks are forked from may be older than the test.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device, group, rank = torch.device("cuda", 0), dist.group.WORLD, dist.get_rank()
    exchange, plain = Peers(group, device), Collective(group)
    T, D = 300, 128
    generator = torch.Generator().manual_seed(rank)
    mask = torch.rand(T, 2, generator=generator) < 0.7
    x = torch.randn(T, D, generator=generator)
    pairs = RouteList(*ops.route(mask, int(mask.sum())))
    counts = torch.zeros(2, 4, dtype=torch.int64)
    counts[:, 0] = mask.sum(0)
    sizes = plain.sizes(counts)
    here = exchange.sizes(counts.to(device))
    gpu = RouteList(*(t.to(device) for t in pairs))
    away = []
    for _ in range(5):
        numbers = [Numbers(torch.arange(len(pairs.tokens), dtype=torch.int32), PAIRS)]
        there = [Numbers(n.values.to(device), n.per) for n in numbers]
        (want, [said]), (got, [heard]) = plain.send_rows(x, pairs, sizes, numbers), exchange.send_rows(x.to(device), gpu, here, there)
        away += [float((got.cpu() - want).abs().max()), float((heard.cpu() - said).abs().max())]
        (back, _), (got, _) = plain.return_rows(2 * want, pairs, sizes), exchange.return_rows(2 * got, gpu, here)
        away.append(float((got.cpu() - back).abs().max()))
    return away


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_ranks_of_one_gpu():
    for away in run(on_one_gpu, 2):
        assert away == [0.0] * 15
