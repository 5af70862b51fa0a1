"""DynMoE's router (arXiv 2405.14297, the authors' code): top-any gating, and experts that come and go; see docs/variable_k.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, one_hot

from moetrain.config import DynMoERouter, ModelConfig
from moetrain.moe.balance import product_of_shares
from moetrain.moe.routers.base import router_for, whole
from moetrain.moe.routing import Decision, Routing, TokenContext, group_sum, recorded, route_counts, token_count


@router_for(DynMoERouter)
class DynMoE(nn.Module):
    """s_e = sigmoid(cos(x, w_e)), t_e = sigmoid(G_e) with G learned; routes where s_e > t_e, with weight 1 / number of routes. In evaluation a
    token without a route takes the expert of the largest s.

    A gate's value is 1; in backward it has the derivative of s_e - t_e (the code's straight-through sign of a ReLU, so a closed gate has no
    gradient, other than DSMoE's), and the number of routes is a constant.

    With `adapt_every` the experts are slots: `mask` says which exist. In the last `record_steps` of every period the routes of each are
    counted in `used`, and inputs that no expert took are added up in `unrouted`. At its end a slot without a route is freed, and if there was
    such an input, the first free slot (be it one just freed) gets w = unrouted / ||unrouted||, G = 0 and keeps the expert that lies there.
    Where nobody used any expert all stay (ours; the code would remove all). The four are parameters without gradient, like `clock`, the steps
    done: they are sharded, saved and resumed.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, DynMoERouter), "needs a dynmoe config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        E, D = self.num_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, D))
        self.threshold = nn.Parameter(torch.empty(E))
        if self.options.adapt_every is not None:
            self.mask, self.used, self.unrouted, self.clock = (nn.Parameter(torch.empty(n), requires_grad=False) for n in (E, E, D, 1))

    @staticmethod
    def start_value(config: ModelConfig, layer: int, part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Rows orthogonal to each other, of norm 1; thresholds and records 0; the first `start_experts` slots are in use."""
        assert config.moe is not None and isinstance(config.moe.router, DynMoERouter), "needs a dynmoe config"
        options = config.moe.router
        if part == "weight":
            return nn.init.orthogonal_(torch.empty(shape, device="cpu"), generator=generator)
        value = torch.zeros(shape, device="cpu")
        if part == "mask":
            value[: options.start_experts] = 1  # None: all
        return value

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses, layers are added (the first two are in the code and were not looked up in the paper, the last two are its
        diversity and simplicity losses): `balance`, E sum_e P_e f_e over the tokens with a route, P the mean of gate / number of routes, f the
        share of these tokens that use e, a constant; `efficiency`, the mean gate; `orthogonality`, the Frobenius norm of the cosines between
        the experts less the unit matrix; `norm`, the mean of ||w_e||. Both take the experts that exist."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        mask = torch.ones_like(weight[:, 0]) if self.options.adapt_every is None else self.mask.to(dtype)
        rows = normalize(weight, dim=-1)
        scores = torch.sigmoid(linear(normalize(x, dim=-1), rows))
        margin = scores - torch.sigmoid(self.threshold.to(dtype))
        decision: Decision = recorded(lambda: self.decide(margin.detach(), scores.detach() * mask, mask > 0, context))
        active, tokens = decision.active.to(dtype), token_count(context, x)
        gates = active + (margin - margin.detach()) * active
        count = active.sum(-1, keepdim=True).clamp(min=1)
        total = gates.sum(-1, keepdim=True)
        own = x.shape[0] if context.valid is None else context.valid.sum(dtype=dtype)
        assert decision.load is not None, "dynmoe decides with the load"
        cosines = (rows @ rows.T - torch.eye(self.num_experts, dtype=dtype, device=x.device)) * mask * mask[:, None]
        losses = {
            "balance": product_of_shares(decision.load, gates / torch.where(total > 0, total, 1), tokens),
            "efficiency": gates.sum() / (tokens * self.num_experts),
            # No sums over tokens: each rank and micro-batch has its tokens' share of them.
            "orthogonality": torch.linalg.vector_norm(cosines) * (own / tokens),
            "norm": (weight.norm(dim=-1) * mask).sum() / mask.sum() * (own / tokens),
        }
        sums = {}
        if self.options.adapt_every is not None:
            lost = ~decision.active.any(-1)
            lost = lost if context.valid is None else lost & context.valid
            sums["unrouted"] = (x.detach() * lost[:, None]).sum(0, dtype=torch.float64)
        return Routing(decision, gates / count, losses, sums)

    def decide(self, margin: Tensor, scores: Tensor, mask: Tensor, context: TokenContext) -> Decision:
        active = (margin > 0) & mask
        if not self.training:
            largest = one_hot(scores.argmax(-1), self.num_experts).bool()
            active = active | (largest & ~active.any(-1, keepdim=True))
        routed, valid = active.any(-1), context.valid
        if valid is not None:
            active, routed = active & valid[:, None], routed & valid
        tokens = torch.ones_like(routed).sum(dtype=torch.float64) if valid is None else valid.sum(dtype=torch.float64)
        own = torch.cat([route_counts(active)[0], torch.stack([routed.sum(dtype=torch.float64), tokens])])
        counts = group_sum(own, context.group if torch.is_grad_enabled() else None)
        # f over the routed tokens, times what makes the sum of P, divided by all tokens, a mean over them.
        return Decision(active, load=counts[:-2] * counts[-1] / counts[-2].clamp(min=1).square())

    def after_step(self, load: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """load: (E,) float64, routes of the whole step over all ranks. sums: `unrouted` (D,)."""
        every = self.options.adapt_every
        if every is None:
            return
        place = (int(whole(self.clock)) + 1) % every
        yield "clock", torch.ones(1, dtype=torch.float64)
        if 0 < place <= every - self.options.recorded_steps:
            return
        if place:
            yield "used", load
            yield "unrouted", sums["unrouted"]
            return
        used, unrouted = whole(self.used), whole(self.unrouted)
        yield "used", -used
        yield "unrouted", -unrouted
        seen, lost = used + load, unrouted + sums["unrouted"]
        mask, weight, threshold = whole(self.mask), whole(self.weight), whole(self.threshold)
        wanted = mask * (seen > 0) if seen.any() else mask.clone()
        free = (wanted == 0).nonzero().flatten().tolist()
        if free and lost.any():
            slot = free[0]
            wanted[slot] = 1
            row, level = torch.zeros_like(weight), torch.zeros_like(threshold)
            row[slot], level[slot] = lost / lost.norm() - weight[slot], -threshold[slot]
            yield "weight", row
            yield "threshold", level
        yield "mask", wanted - mask
