"""The budget controller holds its target in closed loop and goes on from its saved state."""

from __future__ import annotations

import json
import math

import pytest

from moetrain.config import SigmoidSteRouter, TopKRouter
from moetrain.moe.losses import BudgetController, build_controller, coefficients
from tests.moe.test_layer import model_config

LAYERS = model_config(SigmoidSteRouter()).num_layers


def controller_of(factor: float, number: int = 1) -> BudgetController:
    return BudgetController("sparsity", target=3.0, factor=factor, coefficients=[1.0] * number)


def test_far_from_the_target_it_is_remoes_rule():
    controller = controller_of(1.2)
    controller.update([5.0, 7.0])
    assert controller.coefficients[0] == pytest.approx(1.2)
    controller.update([1.0])
    controller.update([1.0])
    assert controller.coefficients[0] == pytest.approx(1 / 1.2)


def test_it_settles_on_the_target():
    """A plant that answers slowly, and falls as the coefficient rises: within 1 % of the target after 300 steps, and it does not swing."""
    controller, active, last = controller_of(1.2), 8.0, []
    for step in range(300):
        wanted = 8 / (1 + (controller.coefficients[0] / 0.05) ** 0.5)
        active += 0.3 * (wanted - active)
        controller.update([active])
        if step >= 240:
            last.append(active)
    assert max(abs(a - 3.0) for a in last) < 0.03


def test_it_stays_within_limits():
    controller = controller_of(2.0)
    for _ in range(200):
        controller.update([8.0])
    assert controller.coefficients[0] == 1e6
    for _ in range(400):
        controller.update([0.0])
    assert controller.coefficients[0] == 1e-12


def test_state_goes_on_and_nonsense_is_refused():
    first = controller_of(1.2)
    first.update([4.0])
    second = controller_of(1.2)
    second.load(json.loads(json.dumps(first.state())))
    assert second.coefficients == first.coefficients != [1.0]
    for bad in (math.nan, -1.0, 0.0, "1", math.inf):
        with pytest.raises(ValueError, match="coefficient"):
            second.load({"coefficients": [bad]})


def test_coefficients_are_the_configs():
    assert coefficients(model_config(SigmoidSteRouter(sparsity_coef=0.7)), None) == {"sparsity": [0.7] * LAYERS}
    assert coefficients(model_config(TopKRouter(top_k=2, balance_coef=0.3, z_coef=0.1)), None) == {"balance": [0.3] * LAYERS, "z": [0.1] * LAYERS}
    held = model_config(SigmoidSteRouter(target_active=2.0, sparsity_coef=0.4))
    controller = build_controller(held)
    assert controller is not None and coefficients(held, controller) == {"sparsity": [0.4] * LAYERS}
    assert build_controller(model_config(SigmoidSteRouter())) is None


def test_each_layer_holds_its_own_budget():
    """Layers that answer differently to the same coefficient: each one's mean comes to the target, each with its own coefficient."""
    strength = [0.01, 0.05, 0.4]
    controller, active = controller_of(1.2, 3), [8.0, 8.0, 8.0]
    for _ in range(400):
        for i, s in enumerate(strength):
            active[i] += 0.3 * (8 / (1 + (controller.coefficients[i] / s) ** 0.5) - active[i])
        controller.update(active)
    assert active == pytest.approx([3.0] * 3, rel=0.01)
    assert controller.coefficients == sorted(controller.coefficients) and controller.coefficients[2] > 10 * controller.coefficients[0]


def test_a_state_of_the_other_kind_is_taken_up():
    whole, layers = controller_of(1.2), controller_of(1.2, 3)
    layers.load({"coefficients": [0.5]})
    assert layers.coefficients == [0.5] * 3
    whole.load({"coefficients": [0.1, 1.0, 10.0]})
    assert whole.coefficients == pytest.approx([1.0])
    with pytest.raises(ValueError, match="2 coefficients for 3 MoE layers"):
        layers.load({"coefficients": [0.5, 0.5]})


def test_a_controller_of_layers_comes_from_the_config():
    held = model_config(SigmoidSteRouter(target_active=2.0, sparsity_coef=0.4, target_over="layer"))
    controller = build_controller(held)
    assert controller is not None and controller.coefficients == [0.4] * held.num_moe_layers
    controller.coefficients = [0.1 * (i + 1) for i in range(held.num_moe_layers)]
    assert coefficients(held, controller)["sparsity"] == controller.coefficients
