"""The sparse layers that `moetrain bench` compares: ours, the dense limit, and whatever else is installed.

Every contestant gets the same input, output gradient, weights and, with forced routing, the same routes, and runs forward and backward
including every weight's gradient. Letters: T tokens, D model dim, F expert dim, E experts, k routes per token.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moetrain import ops
from moetrain.bench.measure import Step
from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter
from moetrain.moe import sonic
from moetrain.moe.dispatch import LocalDispatcher
from moetrain.moe.experts import Backend, GroupedExperts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import Decision, Routing, TokenContext


class Unavailable(Exception):
    """Why a contestant can't run here, in a few words."""


@dataclass(frozen=True)
class Shape:
    """variable: k is a mean, each (token, expert) pair is a route with probability k / E; else every token has k routes."""

    tokens: int
    hidden: int
    expert_dim: int
    experts: int
    k: int
    variable: bool = False

    def __str__(self) -> str:
        return f"{self.tokens},{self.hidden},{self.expert_dim},{self.experts},{'~' if self.variable else ''}{self.k}"


@dataclass(frozen=True)
class Problem:
    """x, grad: (T, D). gate_up: (E, 2F, D). down: (E, D, F). router: (E, D).

    active: (T, E) bool, the forced routes, or None where the contestant's router decides. chosen: (T, k) int64, k forced routes per token for
    layers that know no other; as many as `active` has on average, by the same shares. weights: (T, E) float32, 1 / k on every route.
    """

    shape: Shape
    x: Tensor
    grad: Tensor
    gate_up: Tensor
    down: Tensor
    router: Tensor
    active: Tensor | None
    chosen: Tensor | None
    weights: Tensor | None

    def leaf(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.clone())


def make(shape: Shape, dtype: torch.dtype, routing: str, seed: int = 0, device: torch.device | None = None) -> Problem:
    """routing: `router` (each contestant's own router decides), `balanced` (all experts alike) or `skew` (half of the experts get 8 times as
    many routes as the others). The numbers are the same on every device (None: the CPU)."""
    generator = torch.Generator().manual_seed(seed)
    T, D, F, E, k = shape.tokens, shape.hidden, shape.expert_dim, shape.experts, shape.k

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * std).to(dtype)

    x, grad = normal(T, D), normal(T, D)
    gate_up, down, router = normal(E, 2 * F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5), normal(E, D, std=D**-0.5)
    active = chosen = weights = None
    if routing != "router":
        share = torch.ones(E, dtype=torch.float64)
        if routing == "skew":
            share[: E // 2] = 8.0
        share = (k * share / share.sum()).clamp(max=1.0)
        chosen = _systematic(share, T, k, generator)
        if shape.variable:
            active = torch.rand(T, E, generator=generator) < share
        else:
            active = torch.zeros(T, E, dtype=torch.bool).scatter(1, chosen, True)
        weights = active.float() / k
    tensors = (x, grad, gate_up, down, router, active, chosen, weights)
    return Problem(shape, *(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]


def _systematic(share: Tensor, rows: int, k: int, generator: torch.Generator) -> Tensor:
    """(rows, k): k different experts per row, expert e with probability share[e]: marks at distance 1 on a line of the shares, which sum to k,
    in an order of the experts that is drawn for each row."""
    order = torch.rand(rows, len(share), generator=generator, dtype=torch.float64).argsort(1)
    ends = share[order].cumsum(1)
    ends[:, -1] = k  # rounding must not lose the last mark
    marks = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + torch.arange(k)
    return order.gather(1, torch.searchsorted(ends, marks, right=True).clamp(max=len(share) - 1))


@dataclass(frozen=True)
class Contestant:
    """forward: () -> (T, D). step: forward and backward. note: what differs from the others."""

    forward: Callable[[], Tensor]
    step: Step
    note: str = ""


def _contestant(forward: Callable[[], Tensor], x: Tensor, weights: list[Tensor], grad: Tensor, note: str = "") -> Contestant:
    """x, weights: what gets a gradient."""

    def step() -> None:
        for leaf in (x, *weights):
            leaf.grad = None
        forward().backward(grad)

    return Contestant(forward, step, note)


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
        return _contestant(lambda: layer(x, context, x)[0], x, list(layer.parameters()), problem.grad)
    experts, dispatcher = GroupedExperts(shape.experts, shape.hidden, shape.expert_dim), LocalDispatcher()
    experts.backend = backend
    experts.gate_up, experts.down = problem.leaf(problem.gate_up), problem.leaf(problem.down)
    assert problem.weights is not None
    weights, decision = problem.weights.clone().requires_grad_(), Decision(problem.active)

    def forward() -> Tensor:
        work, plan = dispatcher.dispatch(x, Routing(decision, weights))
        return dispatcher.combine(experts(work), plan)

    return _contestant(forward, x, [experts.gate_up, experts.down, weights], problem.grad)


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

    return Contestant(without_block(whole.forward), without_block(whole.step))


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
    return _contestant(lambda: linear(silu(linear(x, gate)) * linear(x, up), down), x, [gate, up, down], problem.grad)


def hugging_face(problem: Problem, implementation: str) -> Contestant:
    """transformers' Qwen3-MoE block with one of its experts implementations."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("not installed")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.expert_dim, num_experts=shape.experts, num_experts_per_tok=shape.k,
        norm_topk_prob=True, num_hidden_layers=1,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    block.experts.gate_up_proj, block.experts.down_proj = problem.leaf(problem.gate_up), problem.leaf(problem.down)
    block.gate.weight = problem.leaf(problem.router)
    block.to(problem.x.device)
    x = problem.x.clone().requires_grad_()
    weights = [block.experts.gate_up_proj, block.experts.down_proj]
    note = f"{shape.k} routes for every token" if shape.variable else ""
    if problem.chosen is None:
        return _contestant(lambda: block(x[None])[0], x, [*weights, block.gate.weight], problem.grad, note)
    factors = torch.full(problem.chosen.shape, 1 / shape.k, dtype=problem.x.dtype, device=x.device, requires_grad=True)
    return _contestant(lambda: block.experts(x, problem.chosen, factors), x, [*weights, factors], problem.grad, note)


def deepspeed_moe(problem: Problem) -> Contestant:
    """deepspeed.moe.layer.MoE without dropped tokens. Its gate has no way to force routes, so it takes part with a real router only."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Unavailable("not installed")
    if problem.x.device.type != "cpu":
        raise Unavailable("set up for the CPU only")
    if problem.chosen is not None:
        raise Unavailable("its routes can't be forced")
    shape = problem.shape
    # It builds float32 masks (T, E, capacity), several of them at a time; the capacity is that of the fullest expert, T k / E at least.
    mask = 4 * shape.tokens**2 * shape.k
    if mask > 2**30:
        raise Unavailable(f"each of its (T, E, capacity) masks takes {mask / 2**30:.1f} GiB")
    import deepspeed
    from deepspeed.moe.layer import MoE

    if not torch.distributed.is_initialized():
        file = os.path.join(tempfile.mkdtemp(), "store")
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed("gloo", verbose=False)

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Linear(shape.hidden, 2 * shape.expert_dim, bias=False)
            self.down = nn.Linear(shape.expert_dim, shape.hidden, bias=False)

        def forward(self, rows: Tensor) -> Tensor:
            gate, up = self.gate_up(rows).chunk(2, -1)
            return self.down(silu(gate) * up)

    layer: Any = MoE(shape.hidden, Expert(), num_experts=shape.experts, k=shape.k, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False)
    layer.set_deepspeed_parallelism()
    layer.to(problem.x.dtype)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(problem.router)
        for e, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(problem.gate_up[e])
            expert.down.weight.copy_(problem.down[e])
    x = problem.x.clone().requires_grad_()
    note = f"{shape.k} routes for every token" if shape.variable else ""
    return _contestant(lambda: layer(x[None])[0][0], x, list(layer.parameters()), problem.grad, note)


def scattermoe(problem: Problem) -> Contestant:
    """ScatterMoE's GLUMLP (2025-10), for GPUs, behind a softmax router in torch. Written from its source; it has not run here."""
    if importlib.util.find_spec("scattermoe") is None:
        raise Unavailable("not installed")
    if problem.x.device.type != "cuda":
        raise Unavailable("runs on GPUs only")
    from scattermoe.mlp import GLUMLP

    shape = problem.shape
    block = GLUMLP(shape.hidden, shape.expert_dim, shape.experts, shape.k)
    gate, up = problem.gate_up.chunk(2, 1)
    block.experts.weight = problem.leaf(torch.cat([up, gate], 1))  # it applies SiLU to the second half
    block.output_experts.weight = problem.leaf(problem.down)
    x, router = problem.x.clone().requires_grad_(), problem.leaf(problem.router)
    weights = [block.experts.weight, block.output_experts.weight]
    note = f"{shape.k} routes for every token" if shape.variable else ""
    if problem.chosen is None:

        def forward() -> Tensor:
            best, chosen = torch.softmax(linear(x, router).float(), -1).topk(shape.k, -1)
            return block(x, (best / best.sum(-1, keepdim=True)).to(x.dtype), chosen)

        return _contestant(forward, x, [*weights, router], problem.grad, note)
    factors = torch.full(problem.chosen.shape, 1 / shape.k, dtype=x.dtype, device=x.device, requires_grad=True)
    return _contestant(lambda: block(x, factors, problem.chosen), x, [*weights, factors], problem.grad, note)


def by_sonicmoe(problem: Problem) -> Contestant:
    """Ours with SonicMoE's kernels for the experts (`train.experts_backend`), its router and dispatch ours."""
    lacking = sonic.missing(problem.x.device)
    if lacking is not None:
        raise Unavailable(f"needs {lacking}")
    return ours(problem, backend=sonic.compute)


def elsewhere(module: str) -> Callable[[Problem], Contestant]:
    """A rival whose kernels exist for GPUs only, or (Megatron-Core 0.16) whose router and dispatcher call torch.cuda whatever the device."""

    def build(problem: Problem) -> Contestant:
        parts = module.split(".")
        found = all(importlib.util.find_spec(".".join(parts[: i + 1])) for i in range(len(parts)))
        raise Unavailable("runs on GPUs only" if found else "not installed")

    return build


RIVALS: dict[str, Callable[[Problem], Contestant]] = {
    "HF eager": lambda p: hugging_face(p, "eager"),
    "HF grouped_mm": lambda p: hugging_face(p, "grouped_mm"),
    "DeepSpeed": deepspeed_moe,
    "Megatron-Core": elsewhere("megatron.core"),
    "MegaBlocks": elsewhere("megablocks"),
    "ScatterMoE": scattermoe,
    "SonicMoE": by_sonicmoe,
    "Tutel": elsewhere("tutel"),
}
