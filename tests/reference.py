"""The sparse layer as a loop that a reader can check by eye. Slow on purpose; everything in `moetrain` is held against it.

One token at a time, one expert at a time, plain tensors, autograd for the gradients. Names of parameters as in `moetrain.moe.layer.MoELayer`,
so that weights can be copied over.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, SigmoidSteRouter, TopKRouter
from moetrain.moe.routers import build_router
from moetrain.moe.routing import LayerReport, TokenContext, uniform
from tests.reference_assigned import ASSIGNED, assigned_layer
from tests.reference_topk import topk_layer
from tests.reference_variable import variable_layer


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """(act(x W) . x U) V of one expert (DSMoE Eq. 7). x (D,), gate_up (2F, D), down (D, F)."""
    gate, up = (gate_up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


class ReferenceMoE(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe
        self.config, self.layer, self.options = config, layer, moe.router
        self.router = nn.Module()
        if not isinstance(moe.router, (SigmoidSteRouter, TopKRouter)):
            for name, p in build_router(config, layer).named_parameters():
                self.router.register_parameter(name, nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad))
        else:
            self.router.weight = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size))
        if isinstance(moe.router, SigmoidSteRouter) and moe.router.bias:
            self.router.bias = nn.Parameter(torch.empty(moe.num_experts))
        if isinstance(moe.router, TopKRouter):
            E, D = moe.num_experts, config.hidden_size
            self.router.output = nn.Parameter(torch.empty(E, E)) if moe.router.gate == "mlp" else None
            self.router.noise = nn.Parameter(torch.empty(E, D)) if moe.router.noise else None
            self.router.selection_bias = nn.Parameter(torch.empty(E), requires_grad=False) if moe.router.selection_bias else None
        if not isinstance(moe.router, (SigmoidSteRouter, TopKRouter)):
            self.router = nn.Module()
            for name, p in build_router(config, layer).named_parameters():  # for the names and shapes alone
                self.router.register_parameter(name, nn.Parameter(torch.empty_like(p), requires_grad=p.requires_grad))
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.expert_dim, config.hidden_size))
        self.experts.down = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size, moe.expert_dim))

    def forward(self, x: Tensor, context: TokenContext, residual: Tensor) -> tuple[Tensor, LayerReport]:
        if isinstance(self.options, TopKRouter):
            return topk_layer(self, x, context)
        if type(self.options) in ASSIGNED:
            return assigned_layer(self, x, context)
        if not isinstance(self.options, SigmoidSteRouter):
            return variable_layer(self, x, context)
        valid = [True] * len(x) if context.valid is None else context.valid.tolist()
        num_tokens = context.num_tokens if context.num_tokens is not None else sum(valid)
        outputs, losses, counts = [], [], torch.zeros(self.config.moe.num_experts, dtype=torch.float64)
        for t in range(len(x)):
            if not valid[t]:
                outputs.append(torch.zeros_like(x[t]))
                continue
            seen = residual[t] if self.options.input == "residual" else x[t]
            y, loss, routes = self.sigmoid(x[t], seen, None if context.keys is None else context.keys[t])
            outputs.append(y)
            losses.append(loss)
            counts[routes] += 1
        y = torch.stack(outputs) if outputs else x * 0
        total = sum(losses) / (num_tokens * self.config.moe.num_experts * self.config.num_moe_layers)
        return y, LayerReport({"sparsity": total}, {"load": counts})

    def sigmoid(self, x: Tensor, seen: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor, list[int]]:
        """DSMoE, Eqs. 7, 8, 10, 18."""
        o = self.options
        n = self.config.moe.num_experts
        logits = self.router.weight @ seen + (self.router.bias if o.bias else 0)
        g = torch.sigmoid(logits)
        routes = [i for i in range(n) if g[i] > o.threshold]
        if not routes and o.zero_routes == "top1":
            routes = [int(g.argmax())]
        y = torch.zeros_like(x)
        for i in range(n):
            importance = 1.0 if i in routes or o.ste == "exact" else 0.0
            if i not in routes and o.ste == "sampled" and uniform(key[None], self.layer, n)[0, i] < o.probe_rate:
                importance = 1 / o.probe_rate
            value = g[i].detach() if i in routes else 0.0
            s = value + importance * (g[i] - g[i].detach())  # Eq. 10, with the importance of a probe
            y = y + expert(x, self.experts.gate_up[i], self.experts.down[i]) * s
        if o.rescale == "count":
            count = torch.tensor(float(max(1, len(routes))), dtype=x.dtype)
            if o.rescale_gradient == "straight_through":
                count = count + (g - g.detach()).sum()
            y = y * n / count
        pushed = g.sum() if o.sparsity_on == "all" else sum((g[i] for i in range(n) if g[i] > o.threshold), g.sum() * 0)
        return y, pushed, routes
