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

    ReMoE (arXiv 2412.14711, Eq. 9) multiplies or divides the coefficient by alpha each step. Here the exponent is the relative error over
    `BAND`, limited to [-1, 1]: far from the target that is ReMoE's rule, near it the coefficient settles instead of swinging around it.
    """

    BAND = 0.3
    LIMITS = (1e-12, 1e6)

    loss: str
    target: float
    factor: float
    coefficients: list[float]

    def update(self, mean_active: list[float]) -> None:
        """After a step, with the mean routes per token of each MoE layer, over tokens and ranks."""
        if len(self.coefficients) == 1:
            mean_active = [sum(mean_active) / len(mean_active)]
        low, high = self.LIMITS
        for i, mean in enumerate(mean_active):
            error = (mean - self.target) / (self.BAND * self.target)
            self.coefficients[i] = min(high, max(low, self.coefficients[i] * self.factor ** max(-1.0, min(1.0, error))))

    def state(self) -> dict[str, Any]:
        return {"coefficients": list(self.coefficients)}

    def load(self, state: dict[str, Any]) -> None:
        """ValueError for a state that is none. A controller over layers takes up the one coefficient of a controller over the model, and the
        other way round their geometric mean."""
        values = state["coefficients"]
        if not values or not all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"controller state: coefficients {values!r} are no positive numbers")
        if len(self.coefficients) == 1:
            values = [values[0] if len(values) == 1 else math.exp(sum(map(math.log, values)) / len(values))]
        elif len(values) == 1:
            values = values * len(self.coefficients)
        if len(values) != len(self.coefficients):
            raise ValueError(f"controller state: {len(values)} coefficients for {len(self.coefficients)} MoE layers")
        self.coefficients = list(values)


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
