"""Softmax top-k routing with load-balancing and z-loss (Mixtral; LLaMA-MoE, arXiv 2406.16554, without its noise)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, TopKRouter
from moetrain.moe.routing import Decision, Routing, TokenContext, global_load, recorded, token_count


class TopK(nn.Module):
    """p = softmax(x W); the k largest route, with weights p / (their sum) or p itself, times `output_scale`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, TopKRouter), "needs a topk config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses: `balance`, E sum_e f_e P_e with f_e the share of expert e in all routes of the micro-batch over all ranks (a
        constant) and P_e its mean probability: 1 when balanced (Switch, arXiv 2101.03961 Eq. 4, with f normalised over k); `z`, the mean of
        logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906 Eq. 5). Both per layer; layers are added."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = nn.functional.linear(x.to(dtype), self.weight.to(dtype))
        decision: Decision = recorded(lambda: self.decide(logits.detach(), context))
        probabilities = torch.softmax(logits, -1)
        weights = probabilities * decision.active
        if self.options.normalize:
            # A row without routes is padding: 0 / 1.
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1)
        weights = weights * self.options.output_scale
        log_partition = torch.logsumexp(logits, -1)
        if context.valid is not None:
            probabilities, log_partition = probabilities * context.valid[:, None], log_partition * context.valid
        tokens = token_count(context, x)
        assert decision.load is not None, "topk decides with the load"
        return Routing(
            decision,
            weights,
            {
                "balance": self.num_experts * (decision.load.to(dtype) * (probabilities.sum(0) / tokens)).sum(),
                "z": log_partition.square().sum() / tokens,
            },
        )

    def decide(self, logits: Tensor, context: TokenContext) -> Decision:
        # A stable sort, not topk: among equal scores the lower expert wins, on every device and for any batch shape.
        chosen = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self.options.top_k]
        active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        if context.valid is not None:
            active = active & context.valid[:, None]
        return Decision(active, load=global_load(active, context.group if torch.is_grad_enabled() else None))
