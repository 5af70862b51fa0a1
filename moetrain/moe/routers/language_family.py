"""Hybrid routing of Post-MoE, by the family of a sample's language (Apollo-MoE, arXiv 2410.10626; as its authors' code does it)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import LanguageFamilyRouter, ModelConfig
from moetrain.moe.routers.base import router_for
from moetrain.moe.routers.softmax import as_mask, decision_of, largest, with_balance
from moetrain.moe.routing import Decision, Routing, TokenContext, filled, recorded
from moetrain.moe.wide import wide_linear


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
        logits = wide_linear(x, self.weight)
        scores = torch.softmax(logits, -1)
        decision: Decision = recorded(lambda: self.decide(logits.detach(), context))
        return with_balance(scores, scores, decision, context)

    def decide(self, logits: Tensor, context: TokenContext) -> Decision:
        order = largest(logits, self.options.top_k)
        if self.training and context.tags is not None:
            own = filled(self.experts, context.tags)[context.tags.clamp(min=0)]
            missing = (context.tags >= 0) & (order != own[:, None]).all(-1)
            order = torch.cat((order[:, :-1], torch.where(missing, own, order[:, -1])[:, None]), -1)
        return decision_of(as_mask(order, logits.shape[1]), context)
