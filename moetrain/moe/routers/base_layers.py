"""BASE layers (arXiv 2103.16716, from background knowledge of the paper): one expert per token, assigned so that all are equally full."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.config import BaseLayersRouter, ModelConfig
from moetrain.moe.assignment import balanced_assignment
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, recorded
from moetrain.moe.wide import wide_linear


@router_for(BaseLayersRouter)
class BaseLayers(nn.Module):
    """y = sigmoid(x . w_a) E_a(x). In training a is the balanced assignment of the sequence's tokens that maximises sum_t x_t . w_{a_t}; in
    evaluation and inference argmax_e x . w_e. No loss.

    The paper assigns over shuffled tokens of all ranks; over a sequence the assignment depends on no layout and moves nothing. It is made on the
    CPU, exactly, whatever device the scores are on.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, BaseLayersRouter), "needs a base_layers config"
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D)."""
        scores = wide_linear(x, self.weight)
        decision: Decision = recorded(lambda: self.decide(scores.detach(), context))
        return Routing(decision, torch.sigmoid(scores) * decision.active)

    def decide(self, scores: Tensor, context: TokenContext) -> Decision:
        T, E = scores.shape
        if not self.training:
            owner = scores.argmax(-1)
        else:
            sequence = max(1, T if context.sequence is None else context.sequence)
            valid = np.ones(T, dtype=bool) if context.valid is None else context.valid.cpu().numpy()
            table = scores.cpu().numpy()  # a host synchronisation, one per layer
            found = np.zeros(T, dtype=np.int64)
            for start in range(0, T, sequence):
                inside = start + np.flatnonzero(valid[start : start + sequence])
                found[inside] = balanced_assignment(table[inside])
            owner = torch.from_numpy(found).to(scores.device)
        active = nn.functional.one_hot(owner, E).bool()
        return Decision(active if context.valid is None else active & context.valid[:, None])
