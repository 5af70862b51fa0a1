"""Hybrid routing of Post-MoE, by the family of a sample's language (Apollo-MoE, arXiv 2410.10626; as its authors' code does it)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import LanguageFamilyRouter, ModelConfig
from moetrain.moe.balance import product_of_shares
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, global_load, recorded, token_count


@router_for(LanguageFamilyRouter)
class LanguageFamily(nn.Module):
    """s = softmax(x W); the k largest route with weight s, not normalised. In training a token whose language's expert is not among them sends
    its last route there instead. Evaluation and inference are plain top-k and need no language.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, LanguageFamilyRouter), "needs a language_family config"
        self.options = config.moe.router
        self.experts = [self.options.languages[name] for name in self.options.tag_names()]
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D); context.tags: places in `tag_names`, -1 or None where the language is not known. Losses: `balance`, E sum_e f_e P_e."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = nn.functional.linear(x.to(dtype), self.weight.to(dtype))
        scores = torch.softmax(logits, -1)
        decision: Decision = recorded(lambda: self.decide(logits.detach(), context))
        assert decision.load is not None, "decided with the load"
        shares = scores if context.valid is None else scores * context.valid[:, None]
        balance = product_of_shares(decision.load, shares, token_count(context, x))
        return Routing(decision, scores * decision.active, {"balance": balance})

    def decide(self, logits: Tensor, context: TokenContext) -> Decision:
        # A stable sort: among equal scores the lower expert wins.
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self.options.top_k]
        if self.training and context.tags is not None:
            own = torch.tensor(self.experts, device=logits.device)[context.tags.clamp(min=0)]
            missing = (context.tags >= 0) & (order != own[:, None]).all(-1)
            order = torch.cat((order[:, :-1], torch.where(missing, own, order[:, -1])[:, None]), -1)
        active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)
        if context.valid is not None:
            active = active & context.valid[:, None]
        return Decision(active, load=global_load(active, context.group if torch.is_grad_enabled() else None))
