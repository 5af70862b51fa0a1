"""The forced routes of `moetrain bench layer` have the counts that their names say."""

from __future__ import annotations

import pytest
import torch

from moetrain.bench.problem import Shape, make


def test_routes_are_what_they_are_called() -> None:
    shape = Shape(4096, 8, 8, 16, 4)
    for routing, ratio in (("balanced", 1.0), ("skew", 8.0)):
        problem = make(shape, torch.float32, routing)
        assert (problem.active.sum(1) == 4).all() and torch.equal(torch.zeros_like(problem.active).scatter(1, problem.chosen, True), problem.active)
        load = problem.active.sum(0).double()
        assert load[:8].mean() / load[8:].mean() == pytest.approx(ratio, rel=0.05)
        assert load[:8].std() / load[:8].mean() < 0.1
    variable = make(Shape(4096, 8, 8, 8, 3, variable=True), torch.float32, "balanced").active.sum(1)
    assert variable.double().mean() == pytest.approx(3, rel=0.03) and variable.min() == 0 and variable.max() >= 7
