"""The sparse layers of other packages that `moetrain bench` compares with ours.

Every one gets the same input, output gradient, weights and, with forced routing, the same routes, and runs forward and backward including
every weight's gradient. Letters as in problem.py.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moetrain.bench.contestants import Contestant, Unavailable, contestant, ours
from moetrain.bench.measure import name_of
from moetrain.bench.problem import Problem
from moetrain.moe import sonic


def _need(*modules: str) -> None:
    """A package, then what else it needs; asking for a part of a package imports the package, so the whole comes first."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Unavailable("not installed" if module == modules[0] else f"lacks {module}")


def _gpu_only(problem: Problem, *dtypes: torch.dtype) -> None:
    """dtypes: those of its kernels, if not all."""
    if problem.x.device.type != "cuda":
        raise Unavailable("runs on GPUs only")
    if dtypes and problem.x.dtype not in dtypes:
        raise Unavailable(f"knows only {', '.join(name_of(dtype) for dtype in dtypes)}")


def _fixed_k(problem: Problem, which: str = "") -> str:
    return f"{problem.shape.k} routes for every token{which}" if problem.shape.variable else ""


def _group_of_one() -> Any:
    """The process group of this process alone, which packages ask for their ranks; nothing is sent over it."""
    if not torch.distributed.is_initialized():
        file = os.path.join(tempfile.mkdtemp(), "store")
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    return torch.distributed.group.WORLD


def hugging_face(problem: Problem, implementation: str) -> Contestant:
    """transformers' Qwen3-MoE block with one of its experts implementations."""
    _need("transformers")
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
    if problem.chosen is None:
        return contestant(lambda: block(x[None])[0], [x, *weights, block.gate.weight], problem.grad, _fixed_k(problem))
    factors = torch.full(problem.chosen.shape, 1 / shape.k, dtype=problem.x.dtype, device=x.device, requires_grad=True)
    return contestant(lambda: block.experts(x, problem.chosen, factors), [x, *weights, factors], problem.grad, _fixed_k(problem))


def deepspeed_moe(problem: Problem) -> Contestant:
    """deepspeed.moe.layer.MoE without dropped tokens. Its gate has no way to force routes, so it takes part with a real router only."""
    _need("deepspeed")
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

    _group_of_one()
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
    return contestant(lambda: layer(x[None])[0][0], [x, *layer.parameters()], problem.grad, _fixed_k(problem))


def megatron_core(problem: Problem) -> Contestant:
    """Megatron-Core's MoELayer (read in 0.16.1): its top-k router with logits in float32 and softmax over the k best, the all-gather dispatcher,
    and one expert's MLP after the other; on GPUs with Transformer Engine its grouped GEMM and fused permutation, which have not run here.

    The dispatcher takes any (T, E) map of routes, so forced ones go through the whole layer, with a variable number of experts too. On one rank it
    moves no more than the all-to-all dispatcher would, and makes no CUDA stream. Two lines keep the layer from a CPU, and neither computes: the
    router moves its weight to the current CUDA device before it multiplies, and a name is read that only an import of Transformer Engine defines.
    """
    _need("megatron", "megatron.core")
    shape, on_gpu = problem.shape, problem.x.device.type == "cuda"
    grouped = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many of its modules say that Apex or Transformer Engine are not there, and its defaults are deprecated
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1, num_attention_heads=1, hidden_size=shape.hidden, ffn_hidden_size=shape.expert_dim, moe_ffn_hidden_size=shape.expert_dim,
            num_moe_experts=shape.experts, moe_router_topk=shape.k, moe_router_load_balancing_type="none", moe_router_dtype="fp32",
            moe_token_dispatcher_type="allgather", moe_permute_fusion=grouped, add_bias_linear=False, gated_linear_unit=True, activation_func=silu,
            bias_activation_fusion=on_gpu,  # torch.compile of the activation: on a CPU it keeps less and is slower
            params_dtype=problem.x.dtype, use_cpu_initialization=True, perform_initialization=False,
        )  # fmt: skip
    vars(moe_utils).setdefault("te_general_gemm", None)

    class Router(TopKRouter):
        def gating(self, input: Tensor) -> Tensor:
            return moe_utils.router_gating_linear(input, self.weight, self.bias, torch.float32)

    class Forced(nn.Module):
        def __init__(self, config: Any, pg_collection: Any) -> None:
            super().__init__()
            assert problem.weights is not None
            self.weight = problem.leaf(problem.weights)

        def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            return self.weight, problem.active

    groups = ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep")
    spec = get_moe_module_spec(use_te=grouped, num_experts=shape.experts, moe_grouped_gemm=grouped)
    spec.submodules.router = Router if problem.active is None else Forced
    layer: Any = build_module(spec, config=config, pg_collection=ProcessGroupCollection(**dict.fromkeys(groups, _group_of_one())))
    layer.to(problem.x.device)
    if grouped:
        pairs = [[getattr(linear, f"weight{e}") for e in range(shape.experts)] for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2)]
    else:
        pairs = [[e.linear_fc1.weight for e in layer.experts.local_experts], [e.linear_fc2.weight for e in layer.experts.local_experts]]
    with torch.no_grad():
        for own, given in zip(pairs, (problem.gate_up, problem.down)):
            for weight, value in zip(own, given):
                weight.copy_(value)
        if problem.active is None:
            layer.router.weight.copy_(problem.router)
    x = problem.x.clone().requires_grad_()
    fixed_k = _fixed_k(problem, " of its own router") if problem.active is None else ""
    return contestant(lambda: layer(x[:, None])[0][:, 0], [x, *pairs[0], *pairs[1], layer.router.weight], problem.grad, fixed_k)


def megablocks_dmoe(problem: Problem) -> Contestant:
    """MegaBlocks' dMoE (0.11.0.dev) with gated experts by grouped GEMM, for GPUs. Written from its source; its Python has run over plain
    stand-ins of its kernels, and these have not run here."""
    _need("megablocks", "grouped_gemm")
    _gpu_only(problem, torch.bfloat16)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    shape = problem.shape
    arguments = Arguments(
        hidden_size=shape.hidden, ffn_hidden_size=shape.expert_dim, bias=False, activation_fn=silu, moe_num_experts=shape.experts,
        moe_top_k=shape.k, moe_normalize_expert_weights=1, moe_loss_weight=0.0, memory_optimized_mlp=True, mlp_type="glu", mlp_impl="grouped",
        fp16=False, bf16=True, device=problem.x.device,
    )  # fmt: skip
    layer: Any = dMoE(arguments)
    gate, up = problem.gate_up.chunk(2, 1)
    experts = layer.experts.mlp  # all three (E F, D)
    experts.w1, experts.v1, experts.w2 = (problem.leaf(weight.flatten(0, 1).contiguous()) for weight in (gate, up, problem.down.mT))
    x, weights = problem.x.clone().requires_grad_(), [experts.w1, experts.v1, experts.w2]
    if problem.chosen is None:
        layer.router.layer.weight = problem.leaf(problem.router)
        return contestant(lambda: layer(x), [x, *weights, layer.router.layer.weight], problem.grad, _fixed_k(problem))
    factors = torch.full(problem.chosen.shape, 1 / shape.k, dtype=x.dtype, device=x.device, requires_grad=True)
    # Its scores, the second argument, are for the balance loss alone.
    return contestant(lambda: layer.experts(x, None, factors, problem.chosen), [x, *weights, factors], problem.grad, _fixed_k(problem))


def scattermoe(problem: Problem) -> Contestant:
    """ScatterMoE's GLUMLP (2025-10), for GPUs, behind a softmax router in torch. Written from its source; it has not run here."""
    _need("scattermoe")
    _gpu_only(problem)
    from scattermoe.mlp import GLUMLP

    shape = problem.shape
    block = GLUMLP(shape.hidden, shape.expert_dim, shape.experts, shape.k)
    gate, up = problem.gate_up.chunk(2, 1)
    block.experts.weight = problem.leaf(torch.cat([up, gate], 1))  # it applies SiLU to the second half
    block.output_experts.weight = problem.leaf(problem.down)
    x, router = problem.x.clone().requires_grad_(), problem.leaf(problem.router)
    weights = [block.experts.weight, block.output_experts.weight]
    if problem.chosen is None:

        def forward() -> Tensor:
            best, chosen = torch.softmax(linear(x, router).float(), -1).topk(shape.k, -1)
            return block(x, (best / best.sum(-1, keepdim=True)).to(x.dtype), chosen)

        return contestant(forward, [x, *weights, router], problem.grad, _fixed_k(problem))
    factors = torch.full(problem.chosen.shape, 1 / shape.k, dtype=x.dtype, device=x.device, requires_grad=True)
    return contestant(lambda: block(x, factors, problem.chosen), [x, *weights, factors], problem.grad, _fixed_k(problem))


def by_sonicmoe(problem: Problem) -> Contestant:
    """Ours with SonicMoE's kernels for the experts (`train.experts_backend`), its router and dispatch ours."""
    lacking = sonic.missing(problem.x.device)
    if lacking is not None:
        raise Unavailable(f"needs {lacking}")
    return ours(problem, backend=sonic.compute)


def tutel_moe(problem: Problem) -> Contestant:
    """Tutel's moe_layer (0.4) without dropped tokens, its gate in float32: each expert gets as many rows as the fullest, the rest of them zeros.
    Forced routes go through its encode, experts and decode as in the layer. Its CPU kernels know float32 and float64, so it casts there itself."""
    _need("tutel", "tutel_custom_kernel")
    shape = problem.shape
    if problem.chosen is None and shape.k == 1:
        raise Unavailable("does not normalise the weight of a single route")
    from tutel import moe

    gate = {"type": "top", "k": shape.k, "fp32_gate": True, "capacity_factor": 0}
    kind = {"type": "llama_ffn", "count_per_node": shape.experts, "hidden_size_per_expert": shape.expert_dim}
    layer: Any = moe.moe_layer(gate_type=gate, model_dim=shape.hidden, experts=kind)
    first, second = problem.gate_up.chunk(2, 1)
    experts = layer.experts  # all three flat, of (E, D, F), (E, D, F) and (E, F, D)
    experts.W_fc1, experts.W_fc2, experts.W_fc3 = (problem.leaf(weight.mT.flatten()) for weight in (first, second, problem.down))
    layer.to(problem.x.device)
    x, weights = problem.x.clone().requires_grad_(), [experts.W_fc1, experts.W_fc2, experts.W_fc3]
    if problem.chosen is None:
        router = layer.gates[0].wg.weight
        with torch.no_grad():
            router.copy_(problem.router)
        return contestant(lambda: layer(x), [x, *weights, router], problem.grad, _fixed_k(problem))
    scores = torch.zeros(shape.tokens, shape.experts, device=x.device).scatter(1, problem.chosen, 1 / shape.k).requires_grad_()

    def forward() -> Tensor:
        routes, _ = moe.top_k_routing(scores, shape.k, loss_fn=None, capacity_factor=0, normalize_gate=False)
        rows = moe.fast_encode(x.to(scores.dtype), routes).to(x.dtype)
        return moe.fast_decode(experts(rows, layer).to(scores.dtype), routes).to(x.dtype)

    return contestant(forward, [x, *weights, scores], problem.grad, _fixed_k(problem))


RIVALS: dict[str, Callable[[Problem], Contestant]] = {
    "HF eager": lambda p: hugging_face(p, "eager"),
    "HF grouped_mm": lambda p: hugging_face(p, "grouped_mm"),
    "DeepSpeed": deepspeed_moe,
    "Megatron-Core": megatron_core,
    "MegaBlocks": megablocks_dmoe,
    "ScatterMoE": scattermoe,
    "SonicMoE": by_sonicmoe,
    "Tutel": tutel_moe,
}
