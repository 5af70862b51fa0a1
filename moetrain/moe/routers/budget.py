"""A threshold that holds a budget: the best (token, expert) pairs of a sequence route, as many as the budget says; ours.

Choosing over tokens is the BatchTopK of sparse autoencoders (arXiv 2412.06410, from memory) with experts for latents. docs/variable_k.md and
docs/recipe.md say what was measured and what did not help.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig
from moetrain.config.routers import BudgetRouter
from moetrain.moe.balance import product_of_shares
from moetrain.moe.routers.base import router_for, whole
from moetrain.moe.routing import Decision, Routing, TokenContext, group_sum, recorded, route_counts, shares, token_count
from moetrain.moe.weights import share
from moetrain.moe.wide import wide_linear


@router_for(BudgetRouter)
class Budget(nn.Module):
    """p = softmax(x W^T) (T, E). In training the round(k S) largest p of a sequence of S tokens route, k = `target_active`: a token whose
    probability lies on few experts has few. Weights are p divided by its sum over the token's routes (or p itself) times `output_scale`.

    In evaluation a token must not wait for the rest of its sequence: what routes is p > c, with c the mean over past training steps of the
    cut, halfway between the last p that routed and the first that did not. It is a parameter without gradient, (2,): the decayed sum of
    cuts and of their weights. Training itself looks at the whole sequence, so its routes depend on later tokens; its outputs are what
    evaluation computes as far as the cut is steady from sequence to sequence. Before any training step evaluation chooses as training does.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, BudgetRouter), "needs a budget config"
        self.options, self.layer, self.num_experts = config.moe.router, layer, config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.cut = nn.Parameter(torch.empty(2), requires_grad=False)

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses: `balance`, E sum_e f_e P_e with P the mean softmax; `z`, the mean of logsumexp(z)^2."""
        logits = wide_linear(x, self.weight)
        probabilities = torch.softmax(logits, -1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.options.z_coef > 0):  # without it, the logits need not be kept
            log_partition = torch.logsumexp(logits, -1)
        # Compared in float32: equal tokens, such as the first of documents, then tie, whatever a GEMM of another batch shape rounds them to.
        ranking = (probabilities if self.options.rank_by == "probability" else logits).detach().float()
        decision, cuts = recorded(lambda: self.decide(ranking, context))
        weights = share(probabilities, decision.active) if self.options.normalize else probabilities * decision.active
        if self.options.output_scale != 1:
            weights = weights * self.options.output_scale
        if context.valid is not None:
            probabilities, log_partition = probabilities * context.valid[:, None], log_partition * context.valid
        tokens = token_count(context, x)
        assert decision.load is not None, "decided with the load"
        losses = {"balance": product_of_shares(decision.load, probabilities, tokens), "z": log_partition.square().sum() / tokens}
        return Routing(decision, weights, losses, {"cuts": cuts} if self.training else {})

    def decide(self, ranking: Tensor, context: TokenContext) -> tuple[Decision, Tensor]:
        """The routes, and (2,) float64: the sum of the sequences' cuts and how many there are."""
        T, E = ranking.shape
        valid = torch.ones(T, dtype=torch.bool, device=ranking.device) if context.valid is None else context.valid
        length = max(1, T if context.sequence is None else context.sequence)
        flat = ranking.masked_fill(~valid[:, None], -torch.inf).view(-1, length * E) if T else ranking.view(0, E)
        budget = (valid.view(-1, length).sum(-1) * min(self.options.target_active, E) + 0.5).long() if T else valid.long()
        # A stable sort: of equal ranking the earlier token's lower expert routes.
        ranked, order = torch.sort(flat, dim=-1, descending=True, stable=True)
        places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
        active = torch.empty_like(order).scatter_(-1, order, places).lt(budget[:, None]).view(T, E)
        if T:
            # No cut where all pairs route or none does: beyond the last valid pair ranked is -inf.
            ends = torch.nn.functional.pad(ranked, (1, 1), value=-torch.inf)
            cut = (ends.gather(-1, budget[:, None]) + ends.gather(-1, budget[:, None] + 1)).div(2).flatten().double()
        else:
            cut = ranking.new_empty(0, dtype=torch.float64)
        known = torch.isfinite(cut)
        cuts = torch.stack([torch.where(known, cut, 0).sum(), known.sum(dtype=torch.float64)])
        if not self.training:
            total, weight = self.cut.double()
            steady = ranking > (total / weight.clamp(min=1e-30)).to(ranking.dtype)
            active = torch.where(weight > 0, steady & valid[:, None], active)
        load = shares(group_sum(route_counts(active)[0], context.group if torch.is_grad_enabled() else None))
        return Decision(active, load=load), cuts

    def after_step(self, load: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The mean cut of the step goes into the decayed sums with weight `cut_rate`."""
        total, number = sums["cuts"]
        if number > 0:
            new = torch.stack([total / number, torch.ones_like(number)])
            yield "cut", self.options.cut_rate * (new - whole(self.cut))
