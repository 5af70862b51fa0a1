"""`moetrain bench dispatch`: rows to the ranks of their experts and back, forward and backward, on real ranks of this machine: ours, the way that
sends a row for each route, and the exchange alone."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moetrain import ops
from moetrain.bench import measure
from moetrain.bench.measure import Table
from moetrain.bench.problem import Problem, Shape, make
from moetrain.config import ConfigError
from moetrain.moe.dispatch import AllToAllDispatcher
from moetrain.moe.exchange import Collective, Part, all_to_all
from moetrain.moe.peers import Peers, open_exchange
from moetrain.moe.routing import Decision, Routing

OURS, PEERS, BY_ROUTE, ALONE = "moetrain", "moetrain, peers", "a row per route", "exchange alone"
_COLUMNS = ["shape T,D,F,E,k", "dtype", "routing", "ranks", "way", "ms", "spread %", "MB sent", "of exchange"]


def run(shapes: list[Shape], dtypes: list[torch.dtype], routings: list[str], rounds: int, ranks: int) -> list[Table]:
    """T tokens on each rank; E experts over all ranks. Threads: those of this process, in each rank. ConfigError for experts that can't be
    spread evenly."""
    for shape in shapes:
        if shape.experts % ranks:
            raise ConfigError(f"--ranks {ranks}: must divide the {shape.experts} experts of shape {shape}")
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, folder, torch.get_num_threads(), shapes, dtypes, routings, rounds)
        mp.spawn(_rank, given, nprocs=ranks)  # type: ignore[no-untyped-call]
        rows = json.loads((Path(folder) / "rows.json").read_text())
    title = f"Dispatch and combine without experts, forward + backward, {ranks} ranks of {torch.get_num_threads()} thread(s) on this machine"
    notes = [
        f"{OURS}: a token goes once to each rank that has an expert for it, with all its weights; one row comes back.",
        f"{PEERS}: the same, straight into the memory of the other ranks.",
        f"{BY_ROUTE}: a token goes once for each of its experts, and each sends a row back (dispatchers with (tokens, k) tensors do).",
        f"{ALONE}: the all-to-alls of ours with rows that lie ready; its time over the way's time is `of exchange`.",
        "MB sent: by the fullest rank in a step, to others and to itself; times are those of the slowest rank.",
    ]
    return [Table(title, _COLUMNS, rows, notes)]


def _rank(
    rank: int, ranks: int, folder: str, threads: int, shapes: list[Shape], dtypes: list[torch.dtype], routings: list[str], rounds: int
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            for routing in routings:
                if rank == 0:
                    measure.progress(f"{shape} {measure.name_of(dtype)} {routing}")
                # Where the router would decide, routes are drawn alike for all experts: here they are given.
                problem = make(shape, dtype, "balanced" if routing == "router" else routing, seed=rank)
                rows += _rows(problem, routing, ranks, rounds, dist.group.WORLD)
    if rank == 0:
        measure.progress("")
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _rows(problem: Problem, routing: str, ranks: int, rounds: int, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    ways = ways_of(problem, ranks, group)
    steps = {name: _until_all(step) for name, (step, _) in ways.items()}
    timings = measure.interleave(steps, ALONE, rounds, time.perf_counter)
    most = torch.tensor([float(sent) for _, sent in ways.values()])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    shared = {"shape T,D,F,E,k": str(problem.shape), "dtype": measure.name_of(problem.x.dtype), "routing": routing, "ranks": ranks}
    return [
        {**shared, "way": name, "ms": t.median * 1e3, "spread %": 100 * t.spread, "MB sent": sent / 1e6, "of exchange": t.ratio}
        for (name, t), sent in zip(timings.items(), most.tolist())
    ]


def _until_all(step: Callable[[], object]) -> Callable[[], object]:
    def whole() -> None:
        step()
        dist.barrier()

    return whole


def ways_of(problem: Problem, ranks: int, group: dist.ProcessGroup) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """Way -> (step: forward and backward, returning the output (T, D); bytes that this rank sends in it). Experts return what they get, so that
    the output of the first two is each token's sum of weights times itself: over the ranks, where a rank weighs, or over the routes."""
    assert problem.active is not None and problem.weights is not None
    active, shape = problem.active, problem.shape
    x, weights = problem.x.clone().requires_grad_(), problem.weights.clone().requires_grad_()
    local, size = shape.experts // ranks, problem.x.element_size()
    decision = Decision(active)

    def move(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return all_to_all([Part(rows, send, receive)], group)[0]

    def ours(dispatcher: AllToAllDispatcher) -> Tensor:
        x.grad = weights.grad = None
        work, plan = dispatcher.dispatch(x, Routing(decision, weights))
        row = work.routes.tokens.long()
        total = work.weights.new_zeros(work.rows.shape[0]).index_add(0, row, work.weights)
        output = dispatcher.combine(work.rows * total.to(work.rows.dtype)[:, None], plan)
        output.backward(problem.grad)
        return output.detach()

    def by_route() -> Tensor:
        x.grad = weights.grad = None
        tokens, counts, *way_back = ops.route(active, int(active.sum()))
        sent = counts.view(ranks, local).sum(1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        sizes = (sent.tolist(), received.tolist())
        expert = torch.repeat_interleave(counts.long(), output_size=tokens.numel())
        chosen = weights[tokens.long(), expert]
        with torch.no_grad():
            home = move(move(ops.permute(x, tokens, *way_back), *sizes), *reversed(sizes))
            output = ops.combine(home, tokens, *way_back, chosen)
            # Backward by hand: the gradient goes out as the rows came home, and the rows' gradient comes back as the rows went out.
            out = move(ops.permute(problem.grad, tokens, *way_back) * chosen.to(x.dtype)[:, None], *sizes)
            x.grad = ops.combine(move(out, *reversed(sizes)), tokens, *way_back)
            weights.grad = torch.zeros_like(weights).index_put_((tokens.long(), expert), (home * problem.grad[tokens.long()]).sum(-1).float())
        return output

    pairs = active.view(shape.tokens, ranks, local).any(-1).sum(0)
    incoming = torch.empty_like(pairs)
    dist.all_to_all_single(incoming, pairs, group=group)
    there, back = pairs.tolist(), incoming.tolist()
    ready, answer = (torch.randn(sum(n), shape.hidden).to(problem.x.dtype) for n in (there, back))

    def alone() -> Tensor:
        for _ in range(2):  # forward and backward
            move(ready, there, back)
            home = move(answer, back, there)
        return home

    row, routes = shape.hidden * size, int(active.sum())
    by_pair = 2 * row * (sum(there) + sum(back))
    ways = {ALONE: (alone, by_pair), OURS: (partial(ours, AllToAllDispatcher(Collective(group))), by_pair)}
    exchanges = open_exchange("auto", group, x.device)[0]
    if isinstance(exchanges, Peers):
        ways[PEERS] = (partial(ours, AllToAllDispatcher(exchanges)), by_pair)
    return ways | {
        BY_ROUTE: (by_route, 4 * row * routes),
    }
