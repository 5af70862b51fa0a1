"""The MoE layer: route, dispatch, experts, combine; and beside the experts a fixed FFN, where there is one.

It is written for one device. `dispatcher` and the experts' weights are exchanged from outside (moetrain.parallel) to spread the experts over
ranks; the layer reads the same.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.config import ModelConfig
from moetrain.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.room import Room
from moetrain.moe.routers import build_router
from moetrain.moe.routing import Decision, LayerReport, Routing, TokenContext, statistics
from moetrain.moe.shared import SharedExpert


class MoELayer(nn.Module):
    """Takes the place of a dense FFN. Every token is computed by as many experts as its router says, also by none."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """config: with `moe` set. layer: which one this is, from 0."""
        super().__init__()
        assert config.moe is not None, "a dense model has no MoE layer"
        router = config.moe.router
        self.routes_by_residual = getattr(router, "input", "normed") == "residual"
        self.router = build_router(config, layer)
        self.room = Room.of(config.moe)
        # Experts of one size are computed together. Of several sizes, each is a group of its own, with a dispatch of its own, so that every rank
        # holds as many experts of each size as any other; experts of size 0 are in none.
        groups, D = config.moe.groups, config.hidden_size
        self.members: list[list[int]] | None = None
        self.experts: nn.Module
        if [e for members in groups.values() for e in members] == list(range(config.moe.num_experts)) and len(groups) == 1:
            self.experts = GroupedExperts(config.moe.num_experts, D, *groups)
        else:
            self.members = list(groups.values())
            self.experts = nn.ModuleList(GroupedExperts(len(members), D, size) for size, members in groups.items())
        self.shared = None if config.moe.shared is None else SharedExpert(config.hidden_size, config.moe.shared)
        self.dispatcher: LocalDispatcher | AllToAllDispatcher = LocalDispatcher()

    def forward(self, x: Tensor, context: TokenContext, residual: Tensor) -> tuple[Tensor, LayerReport]:
        """x: (T, D), normed. residual: (T, D), the stream before the norm. -> (T, D) to add to the stream, and what happened."""
        routing = self.router(residual if self.routes_by_residual else x, context)
        lost = {}
        if self.room is not None and self.training:
            routing, no_room = self.room.fit(routing)
            lost = {"no_room": no_room.double()}
        report = LayerReport(routing.losses, statistics(routing.decision, context) | lost, routing.sums, routing.scores)
        local, parts = routing.local, self.parts(routing)
        del routing
        y = self.compute(x, parts)
        if local is not None:
            y = (y + local).to(y.dtype)
        if self.shared is not None:
            y = self.shared(x, y)
        return y, report

    def routers(self) -> list[nn.Module]:
        """One, or of strata one each."""
        return list(self.router) if isinstance(self.router, nn.ModuleList) else [self.router]

    def expert_groups(self) -> list[GroupedExperts]:
        """One for each size of expert."""
        return [self.experts] if self.members is None else list(self.experts)  # type: ignore[arg-type, list-item]

    def compute(self, x: Tensor, parts: list[Routing]) -> Tensor:
        """x: (T, D) -> (T, D): the weighted sum of each token's experts, 0 for a token without routes. parts: of `parts`; it is emptied, since
        matrices of size T x E are not needed any more once dispatch has made lists of routes of them."""
        outputs = []
        for experts in self.expert_groups():
            work, plan = self.dispatcher.dispatch(x, parts.pop(0))
            outputs.append(self.dispatcher.combine(experts(work), plan))
        return sum(outputs[1:], outputs[0])

    def parts(self, routing: Routing) -> list[Routing]:
        """The routes to each group of experts."""
        if self.members is None:
            return [routing]
        decision, parts = routing.decision, []
        for members in self.members:
            probes = None if decision.probes is None else decision.probes[:, members]
            parts.append(Routing(Decision(decision.active[:, members], probes), routing.weights[:, members]))
        return parts
