"""The budget controller holds its target in closed loop and goes on from its saved state."""

from __future__ import annotations

import math

import pytest

from moetrain.config import SigmoidSteRouter, TopKRouter
from moetrain.moe.losses import BudgetController, build_controller, coefficients
from tests.moe.test_layer import model_config


def test_far_from_the_target_it_is_remoes_rule():
    controller = BudgetController(target=3.0, factor=1.2, coefficient=1.0)
    controller.update(6.0)
    assert controller.coefficient == pytest.approx(1.2)
    controller.update(1.0)
    controller.update(1.0)
    assert controller.coefficient == pytest.approx(1 / 1.2)


def test_it_settles_on_the_target():
    """A plant that answers slowly, and falls as the coefficient rises: within 1 % of the target after 300 steps, and it does not swing."""
    controller, active, last = BudgetController(target=3.0, factor=1.2, coefficient=1.0), 8.0, []
    for step in range(300):
        wanted = 8 / (1 + (controller.coefficient / 0.05) ** 0.5)
        active += 0.3 * (wanted - active)
        controller.update(active)
        if step >= 240:
            last.append(active)
    assert max(abs(a - 3.0) for a in last) < 0.03


def test_it_stays_within_limits():
    controller = BudgetController(target=3.0, factor=2.0, coefficient=1.0)
    for _ in range(200):
        controller.update(8.0)
    assert controller.coefficient == 1e6
    for _ in range(400):
        controller.update(0.0)
    assert controller.coefficient == 1e-12


def test_state_goes_on_and_nonsense_is_refused():
    first = BudgetController(3.0, 1.2, 0.5)
    first.update(4.0)
    second = BudgetController(3.0, 1.2, 1.0)
    second.load(first.state())
    assert second.coefficient == first.coefficient
    for bad in (math.nan, -1.0, 0.0, "1", math.inf):
        with pytest.raises(ValueError, match="coefficient"):
            second.load({"coefficient": bad})


def test_coefficients_are_the_configs():
    assert coefficients(model_config(SigmoidSteRouter(sparsity_coef=0.7)), None) == {"sparsity": 0.7}
    assert coefficients(model_config(TopKRouter(top_k=2, balance_coef=0.3, z_coef=0.1)), None) == {"balance": 0.3, "z": 0.1}
    held = model_config(SigmoidSteRouter(target_active=2.0, sparsity_coef=0.4))
    controller = build_controller(held)
    assert controller is not None and coefficients(held, controller) == {"sparsity": 0.4}
    assert build_controller(model_config(SigmoidSteRouter())) is None
