"""Stratified MoE (Xu et al., arXiv 2305.02176): the experts of one layer lie in strata, and a token passes 1 to all of them.

Written from notes on the paper and on its code. Letters: T tokens, D model dim, E experts, L strata.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moetrain.config import ModelConfig
from moetrain.modules import RMSNorm
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import build_router
from moetrain.moe.routing import Decision, LayerReport, Routing, TokenContext, recorded, statistics, token_count


class StratifiedMoELayer(MoELayer):
    """A token starts at stratum 0. At stratum i router i scores the experts of strata i and later alone; the token's experts are computed, and
    the stratum j of the best of them sends it on to stratum j + 1, past those between. After the last one it is done.

    Pass i computes s + y_0 + ... + y_(i-1), s the layer's input, through `norm` (RMSNorm) from the second on where that is set, and the layer's
    output is the sum of the passes' outputs y (the residual between strata; the block adds the stream, as for any FFN). Each pass is a dispatch
    of its own, in which tokens that are elsewhere have no routes, so every rank makes L of them and needs to ask nobody when to stop. Losses
    are means over the L passes of sums over each pass's tokens, divided by all tokens.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        moe = config.moe
        assert moe is not None and moe.strata is not None, "a layer without strata is an MoELayer"
        self.num_experts = moe.num_experts
        self.stratum = [i for i, size in enumerate(moe.strata.sizes) for _ in range(size)]
        """Of each expert."""
        routers = []
        for i, start in enumerate(moe.strata.starts):
            seen = moe.model_copy(update={"num_experts": moe.num_experts - start, "strata": None})
            # A number of its own for each router, for its draws and its counts.
            routers.append(build_router(config.model_copy(update={"moe": seen}), layer + i * config.num_layers))
        self.router = nn.ModuleList(routers)
        self.norms = nn.ModuleList(RMSNorm(config.hidden_size, config.norm_eps) for _ in routers[1:] if moe.strata.norm)

    def forward(self, x: Tensor, context: TokenContext, residual: Tensor) -> tuple[Tensor, LayerReport]:
        """x: (T, D), normed. Returns (T, D), and a report in which a token's routes are those of all its passes."""
        T, E = x.shape[0], self.num_experts
        valid = torch.ones(T, dtype=torch.bool, device=x.device) if context.valid is None else context.valid
        tokens, stratum = token_count(context, x), torch.tensor(self.stratum, device=x.device)
        state = torch.zeros(T, dtype=torch.int64, device=x.device)
        y, counts, losses = torch.zeros_like(x), torch.zeros(T, E, dtype=torch.int64, device=x.device), {}
        for i, router in enumerate(self.router):
            here = valid & (state == i)
            seen = x if i == 0 else x + y
            seen = self.norms[i - 1](seen) if i and len(self.norms) else seen
            routing = router(seen, dataclasses.replace(context, valid=here, num_tokens=tokens))
            first = E - routing.weights.shape[1]
            active = pad(routing.decision.active, (first, 0))
            weights = pad(routing.weights, (first, 0))
            y = y + self.compute(seen, self.parts(Routing(Decision(active), weights)))
            best = weights.detach().argmax(-1)
            # Kept for recomputation, which could fall on the other side of a near tie.
            state = recorded(lambda best=best, here=here, state=state: torch.where(here, stratum[best] + 1, state))
            counts = counts + active
            for name, value in routing.losses.items():
                losses[name] = losses.get(name, 0) + value / len(self.router)
        stats = statistics(Decision(counts), context)
        return (y if self.shared is None else self.shared(x, y)), LayerReport(losses, stats)
