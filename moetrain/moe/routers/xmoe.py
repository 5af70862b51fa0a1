"""XMoE's router (arXiv 2403.18926, the authors' code): experts until a share of the probability; see docs/variable_k.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from moetrain.config import ModelConfig, XMoERouter
from moetrain.moe.balance import product_of_shares
from moetrain.moe.capacity import within_capacity
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, filled, group_sum, recorded, shares, token_count
from moetrain.moe.target import OFFSETS, log_odds, step_to
from moetrain.moe.weights import share
from moetrain.moe.wide import wide_linear


@router_for(XMoERouter)
class XMoE(nn.Module):
    """p = softmax(x W). By falling p, an expert routes while the probabilities before it add up to less than t; the first one always.
    Weights are p itself, or with `normalize` p over its sum.

    With `target_active` t is a parameter of the layer that no gradient moves (its log-odds; inference uses it as it stands, so that a token's
    routes depend on nothing but the token). After each step it goes towards the t that would have given this step's tokens the target, which
    the counts at OFFSETS tell (ours; XMoE has a fixed t).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, XMoERouter), "needs an xmoe config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.threshold = nn.Parameter(torch.empty(1), requires_grad=False) if self.options.target_active is not None else None

    @staticmethod
    def start_value(config: ModelConfig, layer: int, part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The threshold's log-odds as the options have it."""
        assert config.moe is not None and isinstance(config.moe.router, XMoERouter), "needs an xmoe config"
        options = config.moe.router
        return torch.tensor([log_odds(options.threshold)], device="cpu") if part == "threshold" else None

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses, layers are added: `balance`, E sum_e f_e P_e, f the share of the first choices (the authors' code). Capacity acts
        in training alone."""
        logits = wide_linear(x, self.weight)
        scores = torch.softmax(logits, -1)
        decision, sums = recorded(lambda: self.decide(logits.detach(), scores.detach(), context))
        chosen = decision.active if decision.chosen is None else decision.chosen
        weights = share(scores, chosen) if self.options.normalize else scores * chosen
        # A dropped route is none; its weight does not go to the others.
        weights = weights if decision.chosen is None else weights * decision.active
        counted = scores if context.valid is None else scores * context.valid[:, None]
        return Routing(decision, weights, {"balance": product_of_shares(decision.load, counted, token_count(context, x))}, sums)

    def decide(self, logits: Tensor, scores: Tensor, context: TokenContext) -> tuple[Decision, dict[str, Tensor]]:
        options = self.options
        # By logits, which have fewer ties; stable: among equals the lower expert comes first.
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
        # (T, E), in that order: the probability of the experts before this one. Beyond `max_experts` no threshold reaches.
        before = pad(torch.cumsum(scores.gather(-1, order), -1)[:, :-1], (1, 0))
        before = before[:, : options.max_experts]
        real = torch.ones_like(before[:, 0], dtype=torch.bool) if context.valid is None else context.valid
        odds = None if self.threshold is None else self.threshold.to(scores.dtype)
        threshold = scores.new_full((1,), options.threshold) if odds is None else torch.sigmoid(odds)
        taken = opened(before, threshold) & real[:, None]
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[:, : before.shape[1]], taken)
        first = one_hot(order[:, 0], self.num_experts).double() * real[:, None]
        load = shares(group_sum(first.sum(0), context.group if torch.is_grad_enabled() else None))
        if not self.training:
            return Decision(chosen, load=load), {}
        sums = {}
        if odds is not None:
            trials = torch.sigmoid(odds + filled(OFFSETS, odds))
            counts = (opened(before[..., None], trials) & real[:, None, None]).sum((0, 1), dtype=torch.float64)
            sums = {"routes": counts, "tokens": real.sum(dtype=torch.float64)}
        if options.capacity_factor is None:
            return Decision(chosen, load=load), sums
        rank = torch.empty_like(order).scatter(-1, order, torch.arange(self.num_experts, device=order.device).expand_as(order))
        # The rank (from 0) counts first: the score of rank r is 1 / (r + 1) at most, so r less it rises with r.
        active = within_capacity(chosen, rank - scores, options.capacity_factor, 1, context.sequence)
        return Decision(active, load=load, chosen=chosen, dropped=(chosen & ~active).sum()), sums

    def after_step(self, load: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """sums: `routes` (len(OFFSETS),), chosen with the threshold moved by each offset, before any drop; `tokens` (1,)."""
        if self.threshold is not None and sums["tokens"] > 0:
            assert self.options.target_active is not None, "a threshold is moved for a target"
            means = (sums["routes"] / sums["tokens"]).tolist()
            yield "threshold", step_to(means, self.options.target_active)


def opened(before: Tensor, threshold: Tensor) -> Tensor:
    """Whether an expert routes. At t = 1 all do, though the sum before the last may have been rounded to 1; at t = 0 the first does."""
    return (before < threshold) | (before == 0) | (threshold >= 1)
