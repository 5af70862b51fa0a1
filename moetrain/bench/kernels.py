"""`moetrain bench kernels`: each operator alone, as a share of the limit that bounds it: the copy bandwidth for what moves rows, torch's GEMM rate
for the experts' block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moetrain import ops
from moetrain.bench import measure
from moetrain.bench.measure import Table
from moetrain.bench.problem import Problem, Shape, make

_COLUMNS = ["shape T,D,F,E,k", "dtype", "operator", "ms", "GB/s", "of copy", "GFLOP/s", "of GEMM peak"]


def run(shapes: list[Shape], dtypes: list[torch.dtype], seconds: float = 0.3, device: torch.device = measure.CPU) -> list[Table]:
    """seconds: how long each operator is repeated at least; the shortest run counts."""
    roof = measure.roofline(dtypes, device=device)
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in roof.gemm.items())
    table = Table(f"Operators, {measure.where(device)}. This machine: GEMM {rates}, copy {roof.copy:.0f} GB/s", _COLUMNS)
    for shape in shapes:
        for dtype in dtypes:
            name = measure.name_of(dtype)
            for operator, (call, bytes_moved, flops) in _operators(make(shape, dtype, "balanced", device=device)).items():
                measure.progress(f"{shape} {name} {operator}")
                spent = measure.best_of(call, seconds, 3, device)
                row = {"shape T,D,F,E,k": str(shape), "dtype": name, "operator": operator, "ms": spent * 1e3}
                if bytes_moved:
                    row |= {"GB/s": bytes_moved / spent / 1e9, "of copy": bytes_moved / spent / 1e9 / roof.copy}
                if flops:
                    row |= {"GFLOP/s": flops / spent / 1e9, "of GEMM peak": flops / spent / 1e9 / roof.gemm[name]}
                table.rows.append(row)
    measure.progress("")
    table.notes = ["GB/s: what must be read and written at least once, over the time; above the copy's where it stays in cache."]
    return [table]


def _operators(problem: Problem) -> dict[str, tuple[Callable[[], object], int, int]]:
    """Operator -> (call, bytes it must move, FLOPs); 0 where that is not its limit."""
    assert problem.active is not None and problem.weights is not None
    T, D, F = problem.shape.tokens, problem.shape.hidden, problem.shape.expert_dim
    mask, x, grad = problem.active, problem.x, problem.grad
    R, size = int(mask.sum()), x.element_size()
    tokens, counts, row_offsets, positions = ops.route(mask, R)
    index = (tokens, row_offsets, positions)
    weights = torch.full((R,), 1 / problem.shape.k, device=x.device)
    rows, pre, act = (torch.randn(R, n, device=x.device).to(x.dtype) for n in (D, 2 * F, F))
    found: dict[str, tuple[Callable[[], object], int, int]] = {
        "route": (lambda: ops.route(mask, R), mask.nbytes + 8 * R, 0),
        "permute": (lambda: ops.permute(x, *index), 2 * R * D * size, 0),
        "combine": (lambda: ops.combine(rows, *index, weights), (R + T) * D * size, 0),
        "swiglu": (lambda: ops.swiglu(pre, weights), 3 * R * F * size, 0),
        "swiglu_backward": (lambda: ops.swiglu_backward(act, pre, weights), 6 * R * F * size, 0),
        "swiglu_dot": (lambda: ops.swiglu_dot(act, pre), 3 * R * F * size, 0),
    }
    if ops.has_experts(x.device, x.dtype):
        weight = (problem.gate_up, problem.down)
        routes = (tokens, counts)
        kept = ops.experts(x, *weight, weights, *routes)[1]
        found["experts"] = (lambda: ops.experts(x, *weight, weights, *routes), 0, 6 * R * D * F)
        found["experts_backward"] = (lambda: ops.experts_backward(grad, x, *weight, weights, kept, *routes), 0, 12 * R * D * F)
        found["experts_probe"] = (lambda: ops.experts_probe(grad, x, *weight, *routes), 0, 6 * R * D * F)
    return found
