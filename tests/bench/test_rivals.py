"""The layers of other packages compute what ours does, forward and backward: else the comparison is of different things."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moetrain.bench import measure, rivals
from moetrain.bench.contestants import Contestant, Unavailable, ours
from moetrain.bench.problem import Shape, make
from moetrain.bench.rivals import RIVALS

ROOT = Path(__file__).resolve().parents[2]
TINY, VARIABLE = Shape(48, 32, 16, 8, 2), Shape(48, 32, 16, 8, 3, variable=True)


def assert_same(found: Contestant, expected: Contestant, name: str) -> None:
    """Output, the input's gradient, and the norm of all weights' gradients, which every layout of the weights has in common."""
    pairs = [(found.forward(), expected.forward())]
    found.step()
    expected.step()
    pairs.append((found.leaves[0].grad, expected.leaves[0].grad))
    norms = [torch.stack([w.grad.double().norm() for w in c.leaves[1:]]).norm() for c in (found, expected)]
    pairs.append((norms[0], norms[1]))
    for what, (a, b) in zip(("output", "input's gradient", "weights' gradient"), pairs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, what=what: f"{name}, {what}: {m}")


@pytest.mark.parametrize("routing", ["balanced", "skew", "router"])
@pytest.mark.parametrize("shape", [TINY, VARIABLE], ids=str)
def test_contestants_compute_the_same_layer(shape: Shape, routing: str) -> None:
    """On the same weights and routes."""
    problem = make(shape, torch.float32, routing)
    compared = 0
    for name, build in RIVALS.items():
        try:
            found = build(problem)
        except Unavailable:
            continue
        if not found.fixed_k:
            assert_same(found, ours(problem), name)
            compared += 1
    if compared == 0:
        pytest.skip("no rival that can do this is installed")


@pytest.mark.parametrize(("shape", "routing"), [(TINY, "router"), (TINY, "skew"), (VARIABLE, "balanced")], ids=str)
def test_megatron_core(shape: Shape, routing: str) -> None:
    """Every weight's gradient is that of ours, for its own router and for forced routes, any number per token; in bfloat16 too it runs."""
    pytest.importorskip("megatron.core")
    problem = make(shape, torch.float32, routing)
    theirs, expected = rivals.megatron_core(problem), ours(problem)
    assert not theirs.fixed_k
    theirs.step()
    expected.step()
    E = shape.experts
    _, *weights, router = (leaf.grad for leaf in theirs.leaves)
    if routing == "router":
        _, own_router, gate_up, down = (leaf.grad for leaf in expected.leaves)
    else:
        _, gate_up, down, own_router = (leaf.grad for leaf in expected.leaves)
    for a, b in ((torch.stack(weights[:E]), gate_up), (torch.stack(weights[E:]), down), (router, own_router)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    low = rivals.megatron_core(make(shape, torch.bfloat16, routing))
    low.step()
    assert low.forward().dtype == torch.bfloat16 and all(leaf.grad.isfinite().all() for leaf in low.leaves)


def test_megatron_core_with_its_router_has_k_routes() -> None:
    """Where ours has a variable number, it is told apart, so that its rate is that of its own FLOPs."""
    pytest.importorskip("megatron.core")
    assert rivals.megatron_core(make(VARIABLE, torch.float32, "router")).fixed_k == "3 routes for every token of its own router"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("routing", ["balanced", "router"])
def test_contestants_compute_the_same_layer_on_a_gpu(routing: str) -> None:
    """As on the CPU, in the dtype of their kernels; and what a forward holds is counted there too."""
    device, shape = torch.device("cuda", 0), Shape(256, 128, 64, 8, 2)
    problem, alike = make(shape, torch.bfloat16, routing, device=device), make(shape, torch.bfloat16, routing)
    expected = ours(alike).forward().float()
    for name, build in {"ours": ours, **RIVALS}.items():
        try:
            contestant = build(problem)
        except Unavailable:
            continue
        found = contestant.forward().float().cpu()
        wrong = ((found - expected).abs().amax(1) > 0.05 * expected.abs().max()).float().mean()
        # A router in bfloat16 takes another expert where two are all but equal: Hugging Face's for one of these tokens on a CPU.
        assert wrong <= (0.05 if routing == "router" else 0), name
        contestant.step()
        kept, peak = measure.memory(contestant.forward, device)
        assert peak >= kept > 0, name


def test_deepspeed_computes_the_same_layer() -> None:
    pytest.importorskip("deepspeed")
    program = """
import torch
from tests.bench.test_rivals import assert_same
from moetrain.bench.contestants import ours
from moetrain.bench.problem import Shape, make
from moetrain.bench.rivals import deepspeed_moe
for k in (2, 3):
    problem = make(Shape(48, 32, 16, 8, k), torch.float32, "router")
    assert_same(deepspeed_moe(problem), ours(problem), f"DeepSpeed, k = {k}")
torch.distributed.destroy_process_group()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


class _Router(nn.Module):
    """As megablocks/layers/router.py: a softmax over all experts, the k best, and their norm divided out."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        super().__init__()
        self.arguments = arguments
        self.layer = nn.Linear(arguments.hidden_size, arguments.moe_num_experts, bias=False, device=arguments.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.layer(x).softmax(-1)
        best, chosen = scores.topk(self.arguments.moe_top_k, -1)
        return scores, best / torch.norm(best, p=self.arguments.moe_normalize_expert_weights, dim=-1, keepdim=True), chosen


class _Experts(nn.Module):
    """As layers/dmoe.py and GroupedGLU of layers/glu.py: act(x w1') * (x v1') w2 with all three of shape (E F, D)."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        super().__init__()
        self.arguments, self.mlp = arguments, nn.Module()
        size = (arguments.moe_num_experts * arguments.ffn_hidden_size, arguments.hidden_size)
        for name in ("w1", "v1", "w2"):
            setattr(self.mlp, name, nn.Parameter(torch.empty(size)))

    def forward(self, x: Tensor, scores: Tensor | None, factors: Tensor, chosen: Tensor) -> Tensor:
        w1, v1, w2 = (w.view(self.arguments.moe_num_experts, -1, x.shape[1]) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        act = self.arguments.activation_fn
        return torch.stack([sum(f * (act(t @ w1[e].T) * (t @ v1[e].T) @ w2[e]) for f, e in zip(*row)) for t, *row in zip(x, factors, chosen)])


class _Layer(nn.Module):
    def __init__(self, arguments: SimpleNamespace) -> None:
        super().__init__()
        assert arguments.mlp_type == "glu" and arguments.bf16 and not arguments.fp16 and not arguments.bias and arguments.moe_loss_weight == 0
        self.router, self.experts = _Router(arguments), _Experts(arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.router(x))


@pytest.mark.parametrize("routing", ["skew", "router"])
def test_megablocks_gets_its_weights_as_its_source_has_them(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which half is the gate, what is transposed, how weights are normalised: against a slow layer written from a reading of its source."""
    modules = {name: ModuleType(name) for name in ("megablocks", "megablocks.layers", "megablocks.layers.arguments", "megablocks.layers.dmoe")}
    modules["megablocks.layers.arguments"].Arguments = SimpleNamespace  # type: ignore[attr-defined]
    modules["megablocks.layers.dmoe"].dMoE = _Layer  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rivals, "_need", lambda *modules: None)
    monkeypatch.setattr(rivals, "_gpu_only", lambda problem, *dtypes: None)
    problem = make(TINY, torch.float32, routing)
    assert_same(rivals.megablocks_dmoe(problem), ours(problem), "MegaBlocks")


def test_each_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not there, and one whose kernels want a GPU or another dtype."""
    problem = make(TINY, torch.float32, "router")
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    for name in ("HF eager", "Megatron-Core", "MegaBlocks", "ScatterMoE", "Tutel"):
        with pytest.raises(Unavailable, match="not installed"):
            RIVALS[name](problem)
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object())
    for name in ("MegaBlocks", "ScatterMoE"):
        with pytest.raises(Unavailable, match="runs on GPUs only"):
            RIVALS[name](problem)
