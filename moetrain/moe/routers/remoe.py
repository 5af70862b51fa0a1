"""ReMoE's router (arXiv 2412.14711): ReLU gates under an L1 loss whose coefficient holds a budget; see docs/variable_k.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, ReMoERouter
from moetrain.moe.balance import product_of_shares
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, group_sum, recorded, route_counts, token_count
from moetrain.moe.wide import wide_linear


@router_for(ReMoERouter)
class ReMoE(nn.Module):
    """R = ReLU(x W); routes where R > 0, with weight R, neither softmax nor normalisation. Everything is differentiable: no estimator.

    The same in training and evaluation, token by token.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, ReMoERouter), "needs a remoe config"
        self.options, self.num_layers, self.num_experts = config.moe.router, config.num_moe_layers, config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses: `sparsity`, L_reg,lb: the mean over tokens and layers of sum_e f_e R_e, f_e = E / (k T) #{t : R_te > 0} over the
        micro-batch on all ranks, a constant; with `load_weighted: false` f is 1. k is `target_active`; without one it is the micro-batch's own
        mean number of routes (ours: the paper always has a target)."""
        logits = wide_linear(x, self.weight)
        decision: Decision = recorded(lambda: self.decide(logits.detach(), context))
        # The ReLU, with the routes that were decided: a recomputation may not find others.
        gates = logits * decision.active
        load = decision.load if self.options.load_weighted else gates.new_full((self.num_experts,), 1 / self.num_experts)
        assert load is not None, "remoe decides with the load"
        return Routing(decision, gates, {"sparsity": product_of_shares(load, gates, token_count(context, x)) / self.num_layers})

    def decide(self, logits: Tensor, context: TokenContext) -> Decision:
        active = logits > 0
        tokens = torch.full((1,), active.shape[0], dtype=torch.float64, device=logits.device)
        if context.valid is not None:
            active, tokens = active & context.valid[:, None], context.valid.sum(dtype=torch.float64)[None]
        own = torch.cat([route_counts(active)[0], tokens])
        counts = group_sum(own, context.group if torch.is_grad_enabled() else None)
        target = self.options.target_active
        routes = counts[:-1].sum() if target is None else target * counts[-1]
        return Decision(active, load=counts[:-1] / routes.clamp(min=1))
