"""A dense SwiGLU FFN -> experts that are copies of it: whole (Sparse Upcycling, arXiv 2212.05055), with a part drawn anew (Drop-Upcycling,
arXiv 2502.19261), or cut into slices (virtual groups, arXiv 2410.07524); and the factor that makes the mixture start as the dense model.

Letters: D model dim, F0 intermediate size of the dense FFN, E experts, G slices of a copy, F = F0 / G, A = E / G copies ("groups").
docs/upcycling.md derives the factors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config import ModelConfig, Router, SigmoidSteRouter, TopKRouter
from moetrain.convert.split import split_ffn
from moetrain.model import initial_tensor
from moetrain.moe.routers import build_router
from moetrain.moe.routing import TokenContext


def copy_ffn(gate: Tensor, up: Tensor, down: Tensor, num_experts: int, noise: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every expert a copy, plus normal noise of `noise` times each matrix's standard deviation.

    gate, up: (F0, D). down: (D, F0). Returns gate_up (E, 2 F0, D) and down (E, D, F0) in the inputs' dtype.
    """
    gate_up, down = torch.cat((gate, up)).repeat(num_experts, 1, 1), down.repeat(num_experts, 1, 1)
    if noise > 0:
        for part in (*gate_up.chunk(2, dim=1), down):
            wide = _wide(part[0]).clone()  # expert 0 is written below
            deviation = noise * wide.std(correction=0)
            for expert in part:
                drawn = torch.randn(expert.shape, generator=draws, dtype=wide.dtype)
                expert.copy_(wide + deviation * drawn)
    return gate_up, down


def drop_ffn(
    gate: Tensor, up: Tensor, down: Tensor, num_experts: int, ratio: float, shared: bool, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Copies in which floor(ratio * F0) neurons are drawn anew, others in each expert (Drop-Upcycling, section 3; shapes as `copy_ffn`).

    The new weights are normal with the mean and standard deviation of the weights that they replace, matrix by matrix. shared: gate, up and
    down lose the same neurons, as the paper says; False: each its own, as its released script does.
    """
    size = gate.shape[0]
    gate_up, copies = copy_ffn(gate, up, down, num_experts, 0.0, draws)
    count = math.floor(ratio * size)
    if count == 0:
        return gate_up, copies
    for expert in range(num_experts):
        # All as (F0, D): a neuron is a row of gate and up and a column of down.
        parts = (gate_up[expert, :size], gate_up[expert, size:], copies[expert].T)
        chosen = torch.randperm(size, generator=draws)[:count]
        for i, part in enumerate(parts):
            if i and not shared:
                chosen = torch.randperm(size, generator=draws)[:count]
            old = _wide(part[chosen])
            new = torch.randn(old.shape, generator=draws, dtype=old.dtype) * old.std(correction=0) + old.mean()
            part[chosen] = new.to(part.dtype)
    return gate_up, copies


def virtual_groups(gate: Tensor, up: Tensor, down: Tensor, num_experts: int, granularity: int) -> tuple[Tensor, Tensor]:
    """[slice 0 .. slice G-1] repeated A times: experts a G .. a G + G - 1 are group a, one whole copy (section 3.2 of the paper).

    gate, up: (F0, D). down: (D, F0). Returns gate_up (E, 2F, D) and down (E, D, F). ValueError if G does not divide F0.
    """
    gate_up, down = split_ffn(gate, up, down, granularity)
    repeats = num_experts // granularity
    return gate_up.repeat(repeats, 1, 1), down.repeat(repeats, 1, 1)


def group_rows(rows: Tensor, granularity: int) -> Tensor:
    """(A, D) router rows, one per group -> (E, D): the experts of a group share one, so that top-k takes them together."""
    return rows.repeat_interleave(granularity, 0)


def scale_experts(gate_up: Tensor, down: Tensor, factor: float) -> None:
    """Multiply every expert's output by `factor`, in place: the up and down projections by its square root each.

    SwiGLU is linear in up and in down, not in gate, so this is exact. (The paper spreads the factor over all three as its cube root, exact for
    squared ReLU; for E8G8T8 the factor is 64: here 8 and 8.)
    """
    assert factor > 0, "a weight is positive"
    root = math.sqrt(factor)
    for part in (*gate_up.chunk(2, dim=1)[1], *down):  # one expert at a time: the product is in float32
        part.copy_(_wide(part) * root)


def step_0_factor(router: Router, num_copies: int, granularity: int, norm_weight: Tensor) -> float:
    """Factor of the experts' outputs with which the mixture's output is that of the dense FFN before any training.

    num_copies: A; 1 for the slices of one FFN. norm_weight: (D,) of the FFN's norm, which says how large the router's input is.

    top-k, T routes: G with normalised weights, which are 1 / T each; else A G^2 / T, since they are 1 / (A G) each as long as the router is
    about uniform (the paper's rule). sigmoid_ste: 1 / (A m) with Eq. 8's rescaling, 1 / (A p m) without, where m is the mean of a gate that
    is open and p the share of gates that are (ours; exact up to the spread of open gates).
    """
    if isinstance(router, TopKRouter):
        share = granularity if router.normalize else num_copies * granularity**2 / router.top_k
        return share / router.output_scale
    if not isinstance(router, SigmoidSteRouter):
        raise ValueError(f"upcycle.weight_scaling: no rule for router {router.type}; set weight_scaling: false")
    std = router.init_std * float(_wide(norm_weight).norm())
    open_share, mean = open_gates(router.bias_init if router.bias else 0.0, std, router.threshold)
    if open_share < 1e-6:
        raise ValueError(
            f"upcycle.weight_scaling: with bias_init {router.bias_init} and init_std {router.init_std} no gate opens above threshold "
            f"{router.threshold}; raise one of them, lower the threshold, or set weight_scaling: false"
        )
    return 1 / (num_copies * mean * (1.0 if router.rescale == "count" else open_share))


@torch.no_grad()
def slice_factor(target: ModelConfig, prefix: str, shapes: dict[str, tuple[int, ...]], norm_weight: Tensor, seed: int) -> float:
    """Factor of the slices' outputs with which an active slice weighs 1 in the mean, as all do in the dense FFN: 1 / the mean weight of a route.

    Measured, since routers differ in what their weights mean: the router's start weights on normal inputs as large as the norm's output is,
    4 sequences of 256 tokens. prefix: of the layer's parameters, `layers.N.ffn`. shapes: of the target's parameters. norm_weight: (D,).
    """
    router = build_router(target, int(prefix.split(".")[1])).double().eval()
    for name, parameter in router.named_parameters():
        whole = f"{prefix}.router.{name}"
        parameter.copy_(initial_tensor(whole, shapes[whole], target, seed))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, target.hidden_size, generator=generator, dtype=torch.float64) * norm_weight.double()
    ids = torch.randint(0, target.vocab_size, (1024,), generator=generator)
    routing = router(x, TokenContext(keys=torch.arange(1024), sequence=256, tokens=ids, tags=torch.zeros_like(ids)))
    weights = routing.weights[routing.decision.active]
    if not weights.numel() or not weights.mean() > 1e-9:
        raise ValueError(f"upcycle.weight_scaling: at the start router {target.moe.router.type} gives no expert a weight; set weight_scaling: false")
    return 1 / weights.mean().item()


def open_gates(bias: float, std: float, threshold: float) -> tuple[float, float]:
    """(probability that sigmoid(z) > threshold, mean of sigmoid(z) given that), z normal with mean `bias`, standard deviation `std` > 0."""
    cut = (math.log(threshold / (1 - threshold)) - bias) / std
    share = 0.5 * math.erfc(cut / math.sqrt(2))
    # Trapezoid over the 24 standard deviations above the cut: far below float32's rounding.
    start = max(cut, -12.0)
    u = torch.linspace(start, start + 24.0, 20001, dtype=torch.float64)
    density = torch.exp(0.5 * (max(start, 0.0) ** 2 - u.square()))
    mean = torch.trapezoid(density * torch.sigmoid(bias + std * u), u) / torch.trapezoid(density, u)
    return share, float(mean)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
