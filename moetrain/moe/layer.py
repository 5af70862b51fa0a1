"""The MoE layer: route, dispatch, experts, combine.

It is written for one device. `dispatcher` and the experts' weights are exchanged from outside (moetrain.parallel) to spread the experts over
ranks; the layer reads the same.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.config import ModelConfig
from moetrain.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.routers import build_router
from moetrain.moe.routing import LayerReport, TokenContext, statistics


class MoELayer(nn.Module):
    """Takes the place of a dense FFN. Every token is computed by as many experts as its router says, also by none."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """config: with `moe` set. layer: which one this is, from 0."""
        super().__init__()
        assert config.moe is not None, "a dense model has no MoE layer"
        router = config.moe.router
        self.routes_by_residual = getattr(router, "input", "normed") == "residual"
        self.router = build_router(config, layer)
        self.experts = GroupedExperts(config.moe.num_experts, config.hidden_size, config.moe.expert_dim)
        self.dispatcher: LocalDispatcher | AllToAllDispatcher = LocalDispatcher()

    def forward(self, x: Tensor, context: TokenContext, residual: Tensor) -> tuple[Tensor, LayerReport]:
        """x: (T, D), normed. residual: (T, D), the stream before the norm. -> (T, D) to add to the stream, and what happened."""
        routing = self.router(residual if self.routes_by_residual else x, context)
        work, plan = self.dispatcher.dispatch(x, routing)
        y = self.dispatcher.combine(self.experts(work), plan)
        if routing.local is not None:
            y = (y + routing.local).to(y.dtype)
        return y, LayerReport(routing.losses, statistics(routing.decision, context.valid), routing.sums, routing.scores)
