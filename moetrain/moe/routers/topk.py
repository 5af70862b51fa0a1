"""The top-k family: Switch (arXiv 2101.03961), GShard (2006.16668), noisy top-k as in LLaMA-MoE (2406.16554), Mixtral, DeepSeek-V3 (2412.19437).

One router with the family's choices as options; the recipes in configs/ name the papers' combinations. Switch, GShard and DeepSeek-V3 are
written from background knowledge of the papers (DeepSeek-V3's bias rule was checked against Megatron-Core's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, one_hot, softplus

from moetrain.config import ModelConfig, TopKRouter
from moetrain.moe.balance import product_of_shares, smooth_load, squared_variations
from moetrain.moe.capacity import within_capacity, within_groups
from moetrain.moe.routers.base import router_for
from moetrain.moe.routers.softmax import largest
from moetrain.moe.routing import Decision, Routing, TokenContext, group_sum, normal, recorded, route_counts, shares, token_count, uniform
from moetrain.moe.weights import share
from moetrain.moe.wide import wide_linear

JITTER, NOISE, SECOND, DROP = range(1, 5)
"""Uses of randomness."""


def stream(layer: int, use: int) -> int:
    """Of the draws for one use in one layer."""
    return layer + (use << 20)


@router_for(TopKRouter)
class TopK(nn.Module):
    """s = softmax or sigmoid of the gate's logits; the k largest route, with weights s / (their sum) or s itself, times `output_scale`.

    What acts in training alone: jitter, noise, GShard's random second expert and capacity; evaluation and inference draw and drop nothing.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, TopKRouter), "needs a topk config"
        self.options, self.layer, self.num_experts = config.moe.router, layer, config.moe.num_experts
        options, E, D = self.options, self.num_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, D))
        self.output = nn.Parameter(torch.empty(E, E)) if options.gate == "mlp" else None
        self.noise = nn.Parameter(torch.empty(E, D)) if options.noise else None
        # A parameter, to be sharded, saved and loaded like any other; no gradient reaches it and the optimizer does not have it.
        self.selection_bias = nn.Parameter(torch.empty(E), requires_grad=False) if options.selection_bias else None

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses, per layer, layers are added: `balance`, E sum_e f_e P_e (see `balance.product_of_shares`) with P the share of an
        expert in a token's scores; `z`, the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906 Eq. 5); with `cv_coef` `cv`, CV^2 of the sums
        of weights and CV^2 of the load, which has a gradient with `noise` only."""
        options, training = self.options, self.training
        if training and options.jitter:
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.to(wide) * (1 + options.jitter * (2 * self.draw(uniform, context, JITTER, x.shape[1]).to(wide) - 1))
        clean = logits = self.logits(x)
        if training and self.noise is not None:
            # LLaMA-MoE 4.1: N(0, 1) (softplus(x W_noise) + 0.01), W_noise starts at 0.
            std = softplus(wide_linear(x, self.noise)) + 1e-2
            logits = clean + self.draw(normal, context, NOISE, self.num_experts).to(clean.dtype) * std
        scores = torch.sigmoid(logits) if options.score == "sigmoid" else torch.softmax(logits, -1)
        decision: Decision = recorded(lambda: self.decide(logits.detach(), scores.detach(), context))
        chosen = decision.active if decision.chosen is None else decision.chosen
        weights = share(scores, chosen) if options.normalize else scores * chosen
        if options.z_coef > 0:
            log_partition = torch.logsumexp(logits, -1)
        else:
            # A figure to look at, for which nothing is kept. The largest score is exp(the largest logit - logsumexp).
            with torch.no_grad():
                softmaxed = options.score == "softmax"
                log_partition = logits.amax(-1) - scores.amax(-1).log() if softmaxed else torch.logsumexp(logits, -1)
        if context.valid is not None:
            log_partition = log_partition * context.valid
        tokens = token_count(context, x)
        assert decision.load is not None, "topk decides with the load"
        losses = {"balance": product_of_shares(decision.load, self.score_shares(scores, context), tokens), "z": log_partition.square().sum() / tokens}
        if options.cv_coef:
            load = chosen.to(clean.dtype)
            if training and self.noise is not None:
                load = smooth_load(clean, logits, std, options.top_k)
                load = load if context.valid is None else load * context.valid[:, None]
            losses["cv"] = squared_variations(context, clean, weights.sum(0), load.sum(0))
        # A dropped route is none; its weight does not go to the others.
        weights = weights if decision.chosen is None else weights * decision.active
        return Routing(decision, weights if options.output_scale == 1 else weights * options.output_scale, losses)

    def logits(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E). The cosine gate is the plain one, without X-MoE's (arXiv 2204.09179) projection and learned temperature."""
        if self.options.gate == "cosine":
            wide = torch.promote_types(x.dtype, torch.float32)
            rows = normalize(self.weight.to(wide), dim=-1)
            return linear(normalize(x.to(wide), dim=-1), rows) / self.options.cosine_temperature
        hidden = wide_linear(x, self.weight)
        return hidden if self.output is None else linear(torch.tanh(hidden), self.output.to(hidden.dtype))

    def score_shares(self, scores: Tensor, context: TokenContext) -> Tensor:
        """(T, E), rows with sum 1, padding 0."""
        if self.options.score == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        return scores if context.valid is None else scores * context.valid[:, None]

    def draw(self, kind: Callable[[Tensor, int, int], Tensor], context: TokenContext, use: int, n: int) -> Tensor:
        assert context.keys is not None, "routers draw from TokenContext.keys"
        return kind(context.keys, stream(self.layer, use), n)

    def decide(self, logits: Tensor, scores: Tensor, context: TokenContext) -> Decision:
        options = self.options
        # Logits order the experts as their softmax does, with fewer ties.
        ranking = logits if options.score == "softmax" else scores
        if self.selection_bias is not None:
            ranking = ranking + self.selection_bias.to(ranking.dtype)
        if options.num_groups > 1:
            ranking = within_groups(ranking, options.num_groups, options.top_groups, options.top_k)
        order = largest(ranking, options.top_k)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)
        if context.valid is not None:
            chosen = chosen & context.valid[:, None]
        load = self.load(chosen, order, context)
        if not self.training:
            return Decision(chosen, load=load)
        active, dropped = chosen, None
        if options.second == "random":
            best = scores.gather(-1, order)
            sent = self.draw(uniform, context, SECOND, 1) < 2 * best[:, 1:] / best.sum(-1, keepdim=True)
            active = active & ~torch.zeros_like(active).scatter(-1, order[:, 1:], ~sent)
        if options.capacity_factor is not None:
            if options.drop == "position":
                choice = torch.arange(options.top_k, device=order.device, dtype=scores.dtype).expand_as(order)
                priority = torch.zeros_like(scores).scatter(-1, order, choice)
            else:
                priority = -scores if options.drop == "probability" else self.draw(uniform, context, DROP, self.num_experts)
            kept = within_capacity(active, priority, options.capacity_factor, options.top_k, context.sequence)
            active, dropped = kept, (active & ~kept).sum()
        return Decision(active, load=load, chosen=None if active is chosen else chosen, dropped=dropped)

    def load(self, chosen: Tensor, order: Tensor, context: TokenContext) -> Tensor:
        """f of the balance loss: (E,), or (B, E) with `balance_over: sequence`. Only E counts travel (arXiv 2501.11873)."""
        options = self.options
        counted = chosen & one_hot(order[:, 0], self.num_experts).bool() if options.balance_count == "first" else chosen
        if options.balance_over == "sequence":
            T, E = counted.shape
            length = T if context.sequence is None else context.sequence
            return shares(counted.view(T // max(1, length), length, E).sum(1, dtype=torch.float64))
        learning = torch.is_grad_enabled()
        counts = group_sum(route_counts(counted)[0], context.group if learning else None)
        if options.balance_over == "global_batch" and learning and context.counts is not None:
            counts = context.counts.add(self.layer, counts)
        return shares(counts)

    def after_step(self, load: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """load: (E,) float64, routes of the whole step over all ranks. Changes of parameters that no gradient makes: the bias rises by
        `bias_rate` where the load was below the mean and falls where it was above (DeepSeek-V3; once per optimizer step)."""
        if self.selection_bias is not None:
            yield "selection_bias", self.options.bias_rate * torch.sign(load.mean() - load)
