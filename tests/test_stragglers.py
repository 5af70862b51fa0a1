"""Every rank's step times, side by side."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moetrain.config import ParallelConfig
from moetrain.parallel.mesh import build_meshes, limit_collectives
from moetrain.stragglers import StepTimes
from tests.distributed import run

CPU = torch.device("cpu")


def _report() -> list[dict[str, list[float]]]:
    times, rank = StepTimes(dist.group.WORLD, CPU), dist.get_rank()
    empty = times.report()
    for i in (0, 4, 1):
        times.add(1.0 + i, 0.5 * rank, 0.25 - 0.125 * rank)
    return [empty, times.report(), times.report()]


def test_report() -> None:
    """Median and worst of each rank, equal on all; a report begins anew; one rank alone has none."""
    want = {"median_s": [2.0, 2.0], "worst_s": [5.0, 5.0], "data_s": [0.0, 0.5], "wait_s": [0.25, 0.125]}
    assert run(_report, 2) == [[{}, want, {}]] * 2
    alone = StepTimes(None, CPU)
    alone.add(1.0, 0.0, 0.0)
    assert alone.report() == {}


def _limits() -> list[float]:
    meshes = build_meshes(ParallelConfig(dp_replicate=1, dp_shard=2, ep=2), CPU)
    limit_collectives(meshes, 7)
    assert meshes is not None and meshes.ep is not None and meshes.experts is not None
    groups = [dist.group.WORLD, meshes.ep.get_group(), meshes.experts.get_group(), meshes.dense.get_group()]
    return [g._get_backend(CPU).options._timeout.total_seconds() for g in groups]


def test_every_axis_has_the_limit() -> None:
    """torch gives a group made for an axis its own default (30 minutes), in which a cut link would go unnoticed."""
    assert run(_limits, 4) == [[7.0] * 4] * 4
