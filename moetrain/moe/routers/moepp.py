"""MoE++'s router (arXiv 2410.07348) with its zero-cost experts; see docs/variable_k.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.config import ModelConfig, MoEppRouter
from moetrain.moe.balance import product_of_shares
from moetrain.moe.capacity import within_capacities
from moetrain.moe.routers.base import router_for
from moetrain.moe.routers.softmax import largest
from moetrain.moe.routing import Decision, Routing, TokenContext, group_sum, recorded, route_counts, token_count


@router_for(MoEppRouter)
class MoEpp(nn.Module):
    """G = x W + G' W_g with G' the logits of the MoE layer before (0 in the first); the top_k of all experts' softmax route, with the softmax
    as weight. Experts are numbered: FFN, zero, copy, constant.

    A zero-cost expert is computed where its token is, with no dispatch: zero gives 0, copy x, constant a1 x + a2 v with
    [a1, a2] = softmax(x W_c). Their weighted sum is `Routing.local`; the routes that a layer reports, dispatches and counts are those to FFN
    experts.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, MoEppRouter), "needs a moepp config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        self.total = self.num_experts + self.options.num_light
        D, constants = config.hidden_size, self.options.num_constant
        self.weight = nn.Parameter(torch.empty(self.total, D))
        self.residual = nn.Parameter(torch.empty(self.total, self.total)) if self.options.gating_residual else None
        self.mix = nn.Parameter(torch.empty(constants, 2, D)) if constants else None
        self.constant = nn.Parameter(torch.empty(constants, D)) if constants else None

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses, layers are added: `balance`, sum_i eta_i f_i P_i over experts of both kinds, f the share of the tokens that choose
        i, over the micro-batch on all ranks, P the mean softmax, eta 1 for FFN experts and tau for the others. Capacity acts in training
        alone."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        logits = linear(x, self.weight.to(dtype))
        if self.residual is not None:
            # In the first layer of zeros, so that the matrix has a gradient, 0, like every parameter.
            previous = torch.zeros_like(logits) if context.previous is None else context.previous
            logits = logits + linear(previous, self.residual.to(dtype))
        scores = torch.softmax(logits, -1)
        decision, taken, chosen = recorded(lambda: self.decide(logits.detach(), context))
        weights = scores * chosen
        E, zeros = self.num_experts, self.options.num_zero
        if self.options.normalize:
            total = weights.sum(-1, keepdim=True) - weights[:, E : E + zeros].sum(-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1)
        weights = weights * taken
        counted = scores if context.valid is None else scores * context.valid[:, None]
        # product_of_shares has a factor of the number of experts, which the paper's sum has not.
        balance = product_of_shares(decision.load, counted, token_count(context, x)) / self.total
        # No view: FSDP hangs a hook on what a module returns.
        return Routing(decision, weights[:, :E].clone(), {"balance": balance}, scores=logits, local=self.local(x, weights[:, E + zeros :]))

    def local(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: (T, D). weights: (T, copy and constant experts). (T, D), their weighted sum."""
        copies = self.options.num_copy
        share = weights[:, :copies].sum(-1, keepdim=True)
        if self.mix is None or self.constant is None:
            return share * x
        parts = torch.softmax(linear(x, self.mix.to(x.dtype).flatten(0, 1)).unflatten(-1, (-1, 2)), -1) * weights[:, copies:, None]
        return (share + parts[..., 0].sum(-1, keepdim=True)) * x + parts[..., 1] @ self.constant.to(x.dtype)

    def decide(self, logits: Tensor, context: TokenContext) -> tuple[Decision, Tensor, Tensor]:
        """The decision on the FFN experts, and of experts of both kinds the routes kept and those chosen, (T, total)."""
        options, E = self.options, self.num_experts
        # Stable: among equal logits the lower expert wins, on every device and for any batch shape.
        order = largest(logits, options.top_k)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)
        tokens = torch.full((1,), chosen.shape[0], dtype=torch.float64, device=logits.device)
        if context.valid is not None:
            chosen, tokens = chosen & context.valid[:, None], context.valid.sum(dtype=torch.float64)[None]
        counts = group_sum(torch.cat([route_counts(chosen)[0], tokens]), context.group if torch.is_grad_enabled() else None)
        eta = torch.ones(self.total, dtype=torch.float64, device=logits.device)
        eta[E:] = options.tau
        load = eta * counts[:-1] / counts[-1].clamp(min=1)
        if not self.training or options.capacity_factor is None:
            return Decision(chosen[:, :E], load=load), chosen, chosen
        length = logits.shape[0] if context.sequence is None else context.sequence
        share = options.capacity_factor * options.top_k * length / (options.tau * E + options.num_light)
        room = [math.ceil(share * (options.tau if e < E else 1) - 1e-9) for e in range(self.total)]
        choice = torch.arange(options.top_k, device=order.device, dtype=logits.dtype).expand_as(order)
        kept = within_capacities(chosen, torch.zeros_like(logits).scatter(-1, order, choice), room, context.sequence)
        return Decision(kept[:, :E], load=load, dropped=(chosen & ~kept)[:, :E].sum()), kept, chosen
