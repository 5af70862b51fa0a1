"""The budget controller holds its target in closed loop and goes on from its saved state."""

from __future__ import annotations

import json
import math
import random

import pytest

from moetrain.config import SigmoidSteRouter, TopKRouter
from moetrain.moe.losses import BudgetController, build_controller, coefficients
from tests.moe.test_layer import model_config

LAYERS = model_config(SigmoidSteRouter()).num_layers


def controller_of(factor: float, number: int = 1) -> BudgetController:
    return BudgetController("sparsity", target=3.0, factor=factor, coefficients=[1.0] * number)


def test_far_from_the_target_it_is_remoes_rule():
    for active, factor in ((7.0, 1.2), (1.0, 1 / 1.2)):
        controller = controller_of(1.2)
        for step in range(1, 4):  # a mean that stands still
            controller.update([active - 1, active + 1])
            assert controller.coefficients[0] == pytest.approx(factor**step)


def test_the_change_of_a_step_written_out():
    controller, wanted = controller_of(1.2), 0.0
    e = math.log(1.1)
    controller.update([3.3])
    wanted += 0.5 * e + 0.01 * e  # the trend comes on top
    assert math.log(controller.coefficients[0]) == pytest.approx(wanted)
    controller.update([3.0])  # on the target, but falling: the running mean goes half of the way from e to 0
    wanted += -10 * 0.5 * e + 0.01 * e
    assert math.log(controller.coefficients[0]) == pytest.approx(wanted)
    controller.update([0.0])  # no route at all counts as e times too few; far off, the trend fades
    wanted += -math.log(1.2) + 10 * 0.5 * (-1 - 0.5 * e) + 0.009 * e
    assert math.log(controller.coefficients[0]) == pytest.approx(wanted)


@pytest.mark.parametrize("drift", [-0.02, 0.0, 0.02])
@pytest.mark.parametrize("rate", [0.02, 0.05])
def test_it_settles_where_the_coefficient_is_a_speed(rate, drift):
    """A plant as gates are: the logarithm of the mean moves at `rate` times how far the coefficient is from the one that would balance the
    model's wish, through a momentum of 0.9; that wish drifts, and each step's mean is off by 3 %. Over the last 60 of 300 steps the mean is
    within 2 % of the target."""
    draws = random.Random(0)
    controller, active, speed, wish, last = BudgetController("sparsity", 3.0, 1.05, [1.0]), 3.9, 0.0, -4.0, []
    for step in range(300):
        wish += drift
        speed = 0.9 * speed + 0.1 * math.tanh(math.log(controller.coefficients[0]) - wish)
        active = min(8.0, active * math.exp(-rate * speed))
        controller.update([active * math.exp(draws.gauss(0, 0.03))])
        if step >= 240:
            last.append(active)
    assert sum(last) / 60 == pytest.approx(3.0, rel=0.02)


def test_it_settles_where_the_coefficient_is_a_place():
    """A plant that answers at once, and falls as the coefficient rises."""
    controller, active, last = controller_of(1.2), 8.0, []
    for step in range(300):
        active += 0.3 * (8 / (1 + (controller.coefficients[0] / 0.05) ** 0.5) - active)
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
    first.update([3.5])
    second = controller_of(1.2)
    second.load(json.loads(json.dumps(first.state())))
    assert second == first and second.errors is not None and first.coefficients != [1.0]
    second.update([3.2])
    first.update([3.2])
    assert second == first
    second.load({"coefficients": [0.5]})  # of a run before there were errors
    assert second.errors is None
    with pytest.raises(ValueError, match="errors"):
        second.load({"coefficients": [0.5], "errors": [math.nan]})
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


def test_where_a_threshold_moves_too_the_coefficient_holds_the_mean_without_that():
    """By the routes that there would be at the option's threshold, not by those that there are."""
    by_sums, by_means = controller_of(1.2), controller_of(1.2)
    by_sums.update([3.0, 3.0], [{"nominal": [50.0], "tokens": [10.0]}, {"nominal": [20.0], "tokens": [10.0]}])
    by_means.update([5.0, 2.0])
    assert by_sums == by_means and by_sums.coefficients[0] > 1.0
