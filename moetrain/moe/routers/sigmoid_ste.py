"""DSMoE's router: sigmoid gates, a threshold, a straight-through estimator, an L1 sparsity loss (arXiv 2502.12455, Eqs. 7-19).

Where the paper leaves a choice open (Eq. 8 with no open gate, reductions, inference), the option's default is the plain reading; see
docs/dsmoe.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, SigmoidSteRouter
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, filled, recorded, token_count, uniform
from moetrain.moe.target import OFFSETS, log_odds, step_to
from moetrain.moe.wide import wide_linear


@router_for(SigmoidSteRouter)
class SigmoidSte(nn.Module):
    """g = sigmoid(x Y) (Eq. 7, no bias); routes where g > tau; weight n / #routes * g (Eqs. 7-8).

    The weight's derivative with respect to g is n / #routes everywhere (Eqs. 10-11, the count held constant), so that the gradient of a gate
    whose expert did not fire is <dL/dy, o> n / #routes. `ste` says for which closed gates that inner product is computed: all of them (exact),
    each with probability q and importance 1/q (sampled: unbiased), none (off: the paper's ablation "no S(x)").
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, SigmoidSteRouter), "needs a sigmoid_ste config"
        self.options, self.layer, self.num_layers = config.moe.router, layer, config.num_moe_layers
        self.num_experts = config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(self.num_experts)) if self.options.bias else None
        # The threshold's log-odds, where it is moved to hold `target_active`.
        self.threshold = nn.Parameter(torch.empty(1), requires_grad=False) if self.options.moves_threshold else None
        # A target of the model leaves layers their own means: all thresholds move together.
        self.pools_sums = self.threshold is not None and self.options.target_over == "model"

    @staticmethod
    def start_value(config: ModelConfig, layer: int, part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The threshold's log-odds as the options have it."""
        assert config.moe is not None and isinstance(config.moe.router, SigmoidSteRouter), "needs a sigmoid_ste config"
        options = config.moe.router
        return torch.tensor([log_odds(options.threshold)], device="cpu") if part == "threshold" else None

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses: `sparsity`, Eq. 19: the mean over tokens, experts and layers of the open gates."""
        gates = torch.sigmoid(wide_linear(x, self.weight, self.bias))
        decision: Decision = recorded(lambda: self.decide(gates.detach(), context))
        return self.weigh(gates, decision, context)

    def cut(self, gates: Tensor) -> Tensor | float:
        """tau: a gate routes when it is strictly above."""
        return self.options.threshold if self.threshold is None else torch.sigmoid(self.threshold.detach().to(gates.dtype))

    def trials(self, gates: Tensor, context: TokenContext) -> dict[str, Tensor]:
        """Routes that there would be with the threshold moved by each of OFFSETS, for `after_step`, and with it where the options have it
        (`nominal`), for the controller of the coefficient; tokens."""
        if self.threshold is None or not self.training:
            return {}
        real = torch.ones_like(gates[:, 0], dtype=torch.bool) if context.valid is None else context.valid
        cuts = torch.sigmoid(self.threshold.detach().to(gates.dtype) + filled(OFFSETS, gates))
        # A gate of padding is above no cut.
        real_gates = torch.where(real[:, None], gates.detach(), 0)
        # A CPU adds up truth values after making whole numbers of 64 bits of them, so there they are numbers from the start; a GPU would only hold
        # four times the memory. Sums over tokens alone are exact.
        numbers = gates.new_empty(len(OFFSETS), *gates.shape) if gates.device.type == "cpu" else None
        above = torch.gt(real_gates, cuts[:, None, None], out=numbers)
        routes = above.sum(1).double().sum(-1)
        nominal = torch.count_nonzero(real_gates > self.options.threshold).double()
        return {"routes": routes, "nominal": nominal, "tokens": real.sum(dtype=torch.float64)}

    def after_step(self, load: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """sums: as `trials` made them, over the step and all ranks; with `target_over: model` over all layers too."""
        if self.threshold is not None and sums["tokens"] > 0:
            assert self.options.target_active is not None, "a threshold is moved for a target"
            yield "threshold", step_to((sums["routes"] / sums["tokens"]).tolist(), self.options.target_active)

    def decide(self, gates: Tensor, context: TokenContext) -> Decision:
        active = gates > self.cut(gates)
        if self.options.zero_routes == "top1":
            largest = gates.argmax(-1, keepdim=True)
            active = active.scatter(-1, largest, active.gather(-1, largest) | ~active.any(-1, keepdim=True))
        if context.valid is not None:
            active = active & context.valid[:, None]
        if self.options.ste == "off" or not (self.training and torch.is_grad_enabled()):
            return Decision(active)
        closed = ~active if context.valid is None else ~active & context.valid[:, None]
        if self.options.ste == "exact":
            return Decision(active, closed.to(gates.dtype))
        assert context.keys is not None, "ste: sampled draws from TokenContext.keys"
        rate = self.options.probe_rate
        drawn = closed & (uniform(context.keys, self.layer, self.num_experts) < rate)
        return Decision(active, drawn.to(gates.dtype) / rate)

    def weigh(self, gates: Tensor, decision: Decision, context: TokenContext) -> Routing:
        options, active = self.options, decision.active
        # S(g) of Eq. 10: the value of G(g), the derivative of g. `gates - gates.detach()` is exactly 0, so closed gates weigh exactly 0.
        straight = gates - gates.detach()
        weights = torch.where(active, gates.detach(), 0) + straight
        if options.rescale == "count" and (self.training or options.rescale_in_eval):
            # Eq. 8 divides by 0 for a token without routes; its output is 0 whatever stands here, 1 keeps its probes' gradients bounded.
            count = active.sum(-1, keepdim=True).clamp(min=1).to(gates.dtype)
            if options.rescale_gradient == "straight_through":
                count = count + straight.sum(-1, keepdim=True)
            weights = weights * (self.num_experts / count)
        # Those that `nominal` counts: the loss would not close a gate between the threshold and a cut above it, and push those above without end.
        pushed = gates if options.sparsity_on == "all" else gates * (gates.detach() > options.threshold)
        if context.valid is not None:
            pushed = pushed * context.valid[:, None]
        sparsity = pushed.sum() / (token_count(context, gates) * self.num_experts * self.num_layers)
        return Routing(decision, weights, {"sparsity": sparsity}, self.trials(gates, context))
