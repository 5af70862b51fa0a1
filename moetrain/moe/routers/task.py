"""Experts by task: Task-level MoE (arXiv 2110.03742) and Lego-MT's branches (2212.10551), both from background knowledge of the papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, TaskRouter
from moetrain.moe.routers.base import router_for
from moetrain.moe.routers.softmax import as_mask, decision_of, largest, with_balance
from moetrain.moe.routing import Decision, Routing, TokenContext, filled, recorded


@router_for(TaskRouter)
class Task(nn.Module):
    """All tokens of a task use the same experts of a layer.

    tasks: s = softmax of the task's own logits (E); the k largest route with weight s, divided by their sum or not. branches: the experts that the
    config names, n of them with weight 1 / n.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, TaskRouter), "needs a task config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(len(self.options.tasks), self.num_experts)) if self.options.tasks else None

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D), only counted. context.tags: places in `tag_names`. Losses, with `tasks`: `balance`, E sum_e f_e P_e. ValueError without
        tags."""
        options, dtype = self.options, torch.promote_types(x.dtype, torch.float32)
        if context.tags is None:
            raise ValueError(f"router task: which task the text is of is not known; name one of {', '.join(options.tag_names())}")
        tags = context.tags.clamp(min=0)  # -1 is padding here: data.train and data.eval are checked
        if self.weight is None:
            branches = [options.branches[name] for name in options.tag_names()]
            like = x.new_empty((), dtype=dtype)
            table = torch.stack([filled([(e in branch) / len(branch) for e in range(self.num_experts)], like) for branch in branches])
            decision: Decision = recorded(lambda: self.decide(table > 0, tags, context))
            return Routing(decision, table[tags] * decision.active)
        logits = self.weight.to(dtype)
        scores = torch.softmax(logits, -1)
        chosen = as_mask(largest(logits.detach(), options.top_k), self.num_experts)
        decision = recorded(lambda: self.decide(chosen, tags, context))
        table = scores * chosen
        if options.normalize:
            table = table / table.sum(-1, keepdim=True)
        return with_balance(table[tags], scores[tags], decision, context)

    def decide(self, table: Tensor, tags: Tensor, context: TokenContext) -> Decision:
        return decision_of(table[tags], context)
