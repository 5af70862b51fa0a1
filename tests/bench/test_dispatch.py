"""`moetrain bench dispatch`: the ways that are compared compute the same, and the table has their rows. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.bench.dispatch import ALONE, BY_ROUTE, OURS, PEERS, ways_of
from moetrain.bench.problem import Shape, make
from moetrain.cli import main
from tests.distributed import run


def one_rank() -> list[float]:
    """How far outputs and input gradients of the two ways are from weights times the input; bytes of each way."""
    problem = make(Shape(40, 8, 4, 8, 3, variable=True), torch.float32, "skew", seed=dist.get_rank())
    assert problem.active is not None and problem.weights is not None and dist.group.WORLD is not None
    factor = (problem.weights * problem.active).sum(-1, keepdim=True)
    ways = ways_of(problem, 2, dist.group.WORLD)
    away = [float((ways[name][0]() - factor * problem.x).abs().max()) for name in (OURS, PEERS, BY_ROUTE)]
    pairs, routes = int(problem.active.view(40, 2, 4).any(-1).sum()), int(problem.active.sum())
    return [*away, ways[OURS][1] - ways[ALONE][1], ways[BY_ROUTE][1] - 4 * 8 * 4 * routes, routes - pairs]


def test_both_ways_compute_the_same() -> None:
    for ours, peers, by_route, same_bytes, row_bytes, saved in run(one_rank, 2):
        assert ours < 1e-6 and peers < 1e-6 and by_route < 1e-6
        assert same_bytes == row_bytes == 0 and saved > 0


def test_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "dispatch", "--shapes", "16,8,4,4,2", "--dtypes", "float32", "--routings", "skew", "--rounds", "2"]
    assert main([*words, "--json", str(tmp_path / "d.json")]) == 0
    rows = json.loads((tmp_path / "d.json").read_text())["tables"][0]["rows"]
    assert [(r["way"], r["ranks"], r["routing"]) for r in rows] == [(w, 2, "skew") for w in (ALONE, OURS, PEERS, BY_ROUTE)]
    assert rows[0]["of exchange"] == 1
    capfd.readouterr()
    assert main([*words, "--ranks", "3"]) == 2 and "--ranks 3: must divide the 4 experts of shape 16,8,4,4,2" in capfd.readouterr().err
