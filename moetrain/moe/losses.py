"""What routers' losses count for, and the controller that holds a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moetrain.config import ModelConfig, SigmoidSteRouter


@dataclass
class BudgetController:
    """Holds the mean number of routes per token and layer at `target` by adapting the coefficient of the sparsity loss.

    ReMoE (arXiv 2412.14711, Eq. 9) multiplies or divides the coefficient by alpha each step. Here the exponent is the relative error over
    `BAND`, limited to [-1, 1]: far from the target that is ReMoE's rule, near it the coefficient settles instead of swinging around it.
    """

    BAND = 0.3
    LIMITS = (1e-12, 1e6)

    target: float
    factor: float
    coefficient: float

    def update(self, mean_active: float) -> None:
        """After a step, with the mean over tokens, layers and ranks."""
        error = (mean_active - self.target) / (self.BAND * self.target)
        low, high = self.LIMITS
        self.coefficient = min(high, max(low, self.coefficient * self.factor ** max(-1.0, min(1.0, error))))

    def state(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def load(self, state: dict[str, Any]) -> None:
        value = state["coefficient"]
        if not (isinstance(value, float) and math.isfinite(value) and value > 0):
            raise ValueError(f"controller state: coefficient {value!r} is no positive number")
        self.coefficient = value


def build_controller(config: ModelConfig) -> BudgetController | None:
    router = None if config.moe is None else config.moe.router
    if not isinstance(router, SigmoidSteRouter) or router.target_active is None:
        return None
    return BudgetController(router.target_active, router.controller_factor, router.sparsity_coef)


def coefficients(config: ModelConfig, controller: BudgetController | None) -> dict[str, float]:
    """Loss name -> coefficient, for the losses that a router of this config reports."""
    if config.moe is None:
        return {}
    router = config.moe.router
    if isinstance(router, SigmoidSteRouter):
        return {"sparsity": router.sparsity_coef if controller is None else controller.coefficient}
    return {"balance": router.balance_coef, "z": router.z_coef} | ({"cv": router.cv_coef} if router.cv_coef else {})
