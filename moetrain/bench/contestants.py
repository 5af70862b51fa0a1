"""What takes part in the comparison of `moetrain bench layer`, and our part of it: our layer, its loop, and the dense limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from moetrain import ops
from moetrain.bench.measure import Step
from moetrain.bench.problem import Problem, Shape
from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter
from moetrain.moe.dispatch import LocalDispatcher
from moetrain.moe.experts import Backend, GroupedExperts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import Decision, Routing, TokenContext


class Unavailable(Exception):
    """Why a contestant can't run here, in a few words."""


@dataclass(frozen=True)
class Contestant:
    """forward: () -> (T, D). step: forward and backward. leaves: the input, then all weights in the package's own layout; a step gives each its
    gradient. fixed_k: in words that every token has k routes here, where the problem has a variable number of them; else empty."""

    forward: Callable[[], Tensor]
    step: Step
    leaves: list[Tensor]
    fixed_k: str = ""


def contestant(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, fixed_k: str = "") -> Contestant:
    """One whose step is `forward` and the backward of `grad`, (T, D)."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(grad)

    return Contestant(forward, step, leaves, fixed_k)


def ours(problem: Problem, ste: str = "off", probe_rate: float = 0.25, backend: Backend | None = None) -> Contestant:
    """The layer with its router, or its dispatch and experts under forced routes. backend: what computes the experts, in place of torch."""
    shape = problem.shape
    x = problem.x.clone().requires_grad_()
    if problem.active is None:
        layer = MoELayer(_config(shape, ste, probe_rate), 0)
        with torch.no_grad():
            layer.to(problem.x.device)
            layer.experts.to(problem.x.dtype)  # the router's weights are float32 in training too
            layer.router.weight.copy_(problem.router)
            layer.experts.gate_up.copy_(problem.gate_up)
            layer.experts.down.copy_(problem.down)
        layer.experts.backend = backend
        context = TokenContext(keys=torch.arange(shape.tokens, device=x.device))
        return contestant(lambda: layer(x, context, x)[0], [x, *layer.parameters()], problem.grad)
    experts, dispatcher = GroupedExperts(shape.experts, shape.hidden, shape.expert_dim), LocalDispatcher()
    experts.backend = backend
    experts.gate_up, experts.down = problem.leaf(problem.gate_up), problem.leaf(problem.down)
    assert problem.weights is not None
    weights, decision = problem.weights.clone().requires_grad_(), Decision(problem.active)

    def forward() -> Tensor:
        work, plan = dispatcher.dispatch(x, Routing(decision, weights))
        return dispatcher.combine(experts(work), plan)

    return contestant(forward, [x, experts.gate_up, experts.down, weights], problem.grad)


def loop(problem: Problem) -> Contestant:
    """Ours as it is where the CPU's fused block does not exist: rows gathered, a GEMM per expert, rows added up."""
    if not ops.has_experts(problem.x.device, problem.x.dtype):
        raise Unavailable("is what ours does here")
    fused, whole = ops.has_experts, ours(problem)

    def without_block(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            ops.has_experts = lambda device, dtype: False
            try:
                return call()
            finally:
                ops.has_experts = fused

        return run

    return Contestant(without_block(whole.forward), without_block(whole.step), whole.leaves)


def _config(shape: Shape, ste: str, probe_rate: float) -> ModelConfig:
    router: SigmoidSteRouter | TopKRouter = TopKRouter(top_k=shape.k, balance_coef=0.0)
    if shape.variable:
        # The logits are about N(0, 1); this threshold lets k of E through.
        open_share = torch.tensor(1 - shape.k / shape.experts, dtype=torch.float64)
        threshold = torch.sigmoid(torch.special.ndtri(open_share)).item()
        router = SigmoidSteRouter(ste=ste, probe_rate=probe_rate, threshold=threshold)  # type: ignore[arg-type]
    return ModelConfig(
        vocab_size=1, hidden_size=shape.hidden, num_layers=1, num_heads=1, intermediate_size=1,
        moe=MoEConfig(num_experts=shape.experts, expert_dim=shape.expert_dim, router=router),
    )  # fmt: skip


def dense(problem: Problem, width: int) -> Contestant:
    """The limit: a dense SwiGLU FFN of intermediate size `width` on the same tokens, as torch and Hugging Face write it."""
    generator = torch.Generator().manual_seed(1)
    D = problem.shape.hidden
    x = problem.x.clone().requires_grad_()
    gate, up = (problem.leaf((torch.randn(width, D, generator=generator) * D**-0.5).to(x)) for _ in range(2))
    down = problem.leaf((torch.randn(D, width, generator=generator) * width**-0.5).to(x))
    return contestant(lambda: linear(silu(linear(x, gate)) * linear(x, up), down), [x, gate, up, down], problem.grad)
