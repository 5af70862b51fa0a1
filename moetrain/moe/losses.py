"""What routers' losses count for, and the controller that holds a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.config import ModelConfig
from moetrain.config.routers import BudgetOptions


@dataclass
class BudgetController:
    """Holds the mean number of routes per token at `target` by adapting coefficients of a loss: one for the whole model or one per MoE layer.

    ReMoE (arXiv 2412.14711, Eq. 9) multiplies or divides the coefficient by alpha each step. A coefficient decides how fast gates close more
    than where they stand, and Adam's momentum delays them, so a rule on the error alone shoots past the target and swings around it. Here, with
    e = log(mean / target) within [-1, 1] and m its running mean, the coefficient's logarithm changes in a step by

        INTEGRAL * e, within [-log(factor), log(factor)], + LEAD * (m - m of the step before) + r.

    Far from the target the first term is ReMoE's rule; near it, it takes away what is left of the error. The second answers to a mean that
    moves before it gets there. r, the trend, is the sum of TREND * e while |e| < NEAR, and fades elsewhere: while the model learns, the
    coefficient that holds the target drifts, and a rule without r would follow it at a distance.
    """

    INTEGRAL, LEAD, SMOOTHING, TREND, NEAR = 0.5, 10.0, 0.5, 0.01, 0.25
    LIMITS = (1e-12, 1e6)

    loss: str
    target: float
    factor: float
    coefficients: list[float]
    errors: list[float] | None = None
    """m, of each coefficient; None before the first step."""
    trends: list[float] | None = None
    """r, likewise."""

    def update(self, mean_active: list[float], sums: Sequence[Mapping[str, list[float]]] = ()) -> None:
        """After a step, with the mean routes per token of each MoE layer, over tokens and ranks; or those that a router's sums have as `nominal`
        (with `tokens`), where it moves its threshold as well: two controllers of the same mean would pull at each other."""
        if sums and all("nominal" in s for s in sums):
            mean_active = [s["nominal"][0] / max(1.0, s["tokens"][0]) for s in sums]
        if len(self.coefficients) == 1:
            mean_active = [sum(mean_active) / len(mean_active)]
        (low, high), most = self.LIMITS, math.log(self.factor)
        errors = [math.log(min(math.e, max(1 / math.e, mean / self.target))) for mean in mean_active]
        before = self.errors or errors
        self.errors = [self.SMOOTHING * m + (1 - self.SMOOTHING) * e for m, e in zip(before, errors, strict=True)]
        self.trends = [
            max(-most, min(most, trend + self.TREND * error)) if abs(error) < self.NEAR else 0.9 * trend
            for trend, error in zip(self.trends or [0.0] * len(errors), errors, strict=True)
        ]
        for i, (error, old, new, trend) in enumerate(zip(errors, before, self.errors, self.trends, strict=True)):
            change = max(-most, min(most, self.INTEGRAL * error)) + self.LEAD * (new - old) + trend
            self.coefficients[i] = min(high, max(low, self.coefficients[i] * math.exp(change)))

    def state(self) -> dict[str, Any]:
        return {"coefficients": list(self.coefficients), "errors": self.errors, "trends": self.trends}

    def load(self, state: dict[str, Any]) -> None:
        """ValueError for a state that is none. A controller over layers takes up the one coefficient of a controller over the model, and the
        other way round their geometric mean."""
        values, errors, trends = state["coefficients"], state.get("errors"), state.get("trends")
        if not values or not all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"controller state: coefficients {values!r} are no positive numbers")
        for name, found in (("errors", errors), ("trends", trends)):
            if found is not None and not (len(found) == len(values) and all(isinstance(v, float) and math.isfinite(v) for v in found)):
                raise ValueError(f"controller state: {name} {found!r} are no numbers for {len(values)} coefficients")
        number = len(self.coefficients)
        if len(values) != number:
            if number != 1 and len(values) != 1:
                raise ValueError(f"controller state: {len(values)} coefficients for {number} MoE layers")
            values = [math.exp(sum(map(math.log, values)) / len(values))] * number
            errors = trends = None  # of another mean
        self.coefficients, self.errors, self.trends = list(values), errors, trends


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
