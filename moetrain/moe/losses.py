"""What routers' losses count for, and the controller that holds a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moetrain.config import ModelConfig
from moetrain.config.routers import BudgetOptions


@dataclass
class BudgetController:
    """Holds the mean number of routes per token at `target` by adapting coefficients of a loss: one for the whole model or one per MoE layer.

    ReMoE (arXiv 2412.14711, Eq. 9) multiplies or divides the coefficient by alpha each step. A coefficient decides how fast gates close more
    than where they stand, so the mean answers late, and a rule on the error alone swings around the target or shoots past it. Here, with
    e = log(mean / target) within [-1, 1] and m its running mean, the coefficient's logarithm changes in a step by

        INTEGRAL * e, within [-log(factor), log(factor)], + LEAD * (m - m of the step before).

    Far from the target the first term is ReMoE's rule; near it, it takes away what is left of the error. The second one answers to a mean that
    moves before it gets there. Both were tried on small models (tests/test_budgets.py).
    """

    INTEGRAL, LEAD, SMOOTHING = 0.5, 10.0, 0.7
    LIMITS = (1e-12, 1e6)

    loss: str
    target: float
    factor: float
    coefficients: list[float]
    errors: list[float] | None = None
    """m, of each coefficient; None before the first step."""

    def update(self, mean_active: list[float]) -> None:
        """After a step, with the mean routes per token of each MoE layer, over tokens and ranks."""
        if len(self.coefficients) == 1:
            mean_active = [sum(mean_active) / len(mean_active)]
        (low, high), most = self.LIMITS, math.log(self.factor)
        errors = [math.log(min(math.e, max(1 / math.e, mean / self.target))) for mean in mean_active]
        before = self.errors or errors
        self.errors = [self.SMOOTHING * m + (1 - self.SMOOTHING) * e for m, e in zip(before, errors, strict=True)]
        for i, (error, old, new) in enumerate(zip(errors, before, self.errors, strict=True)):
            change = max(-most, min(most, self.INTEGRAL * error)) + self.LEAD * (new - old)
            self.coefficients[i] = min(high, max(low, self.coefficients[i] * math.exp(change)))

    def state(self) -> dict[str, Any]:
        return {"coefficients": list(self.coefficients), "errors": self.errors}

    def load(self, state: dict[str, Any]) -> None:
        """ValueError for a state that is none. A controller over layers takes up the one coefficient of a controller over the model, and the
        other way round their geometric mean."""
        values, errors = state["coefficients"], state.get("errors")
        if not values or not all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"controller state: coefficients {values!r} are no positive numbers")
        if errors is not None and not (len(errors) == len(values) and all(isinstance(v, float) and abs(v) <= 1 for v in errors)):
            raise ValueError(f"controller state: errors {errors!r} are no numbers within [-1, 1] for {len(values)} coefficients")
        number = len(self.coefficients)
        if len(values) != number:
            if number != 1 and len(values) != 1:
                raise ValueError(f"controller state: {len(values)} coefficients for {number} MoE layers")
            values = [math.exp(sum(map(math.log, values)) / len(values))] * number
            errors = None  # of another mean
        self.coefficients, self.errors = list(values), errors


def build_controller(config: ModelConfig) -> BudgetController | None:
    router = None if config.moe is None else config.moe.router
    if not isinstance(router, BudgetOptions) or router.target_active is None:
        return None
    number = 1 if router.target_over == "model" else config.num_moe_layers
    return BudgetController("sparsity", router.target_active, router.controller_factor, [router.sparsity_coef] * number)


def coefficients(config: ModelConfig, controller: BudgetController | None) -> dict[str, list[float]]:
    """Loss name -> its coefficient in each MoE layer, for the losses that a router of this config reports."""
    if config.moe is None:
        return {}
    n = config.num_moe_layers
    factors = {name: [value] * n for name, value in config.moe.router.coefficients().items()}
    if controller is not None:
        factors[controller.loss] = controller.coefficients * (n if len(controller.coefficients) == 1 else 1)
    return factors
