"""The experts of one rank: SwiGLU FFNs computed together over a list of routes sorted by expert.

Letters: N rows, R routes, Q probes, D model dim, F expert dim, E local experts here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain import ops
from moetrain.moe.dispatch import RouteList, Work

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, RouteList], Tensor]
"""(rows, gate_up, down, weights, routes) -> (N, D), differentiable; see `moetrain.moe.sonic.compute`."""


class GroupedExperts(nn.Module):
    """gate_up: (E, 2F, D), the gate's rows first. down: (E, D, F). No bias.

    backend: what computes routes in place of torch's products, where it is set from outside (moetrain.moe.sonic); probes stay here."""

    backend: Backend | None = None

    def __init__(self, num_experts: int, hidden_size: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, expert_dim))

    def forward(self, work: Work) -> Tensor:
        """-> (N, D): for each row, the weighted sum of its routes' outputs, added in float32; 0 for a row without routes."""
        gate_up, down = (_local(p).to(work.rows.dtype) for p in (self.gate_up, self.down))
        if self.backend is None or not work.routes.tokens.numel():
            return _Experts.apply(work.rows, gate_up, down, work.weights, work.probe_weights, work.routes, work.probes)
        output = self.backend(work.rows, gate_up, down, work.weights, work.routes)
        return _WithProbes.apply(output, work.rows, gate_up, down, work.probe_weights, work.probes)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Experts(torch.autograd.Function):
    """One node, so that what is kept between forward and backward is chosen by hand: the rows, the routes' pre-activations and the lists.

    The expert outputs o (R, D) are not kept. With a = swiglu(x W) and y = sum_r w_r a_r V, the weight's gradient <dy, a V> is <dy V^T, a>, and
    dy V^T is needed for a's gradient anyway (the observation of SonicMoE). A probe's number is the same inner product, computed wholly here in
    backward, expert by expert: forward does nothing for it and nothing is kept.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        probe_weights: Tensor | None,
        routes: RouteList,
        probes: RouteList | None,
    ) -> Tensor:
        ctx.routes, ctx.probes = routes, probes
        if ops.has_experts(rows.device, rows.dtype):
            output, pre = ops.experts(rows, gate_up, down, weights, routes.tokens, routes.counts)
            ctx.save_for_backward(rows, gate_up, down, weights, pre)
            return output
        index = routes.without_counts()
        pre = gemm_nt(ops.permute(rows, *index), gate_up, routes.counts)
        outputs = gemm_nt(ops.swiglu(pre, weights), down, routes.counts)
        ctx.save_for_backward(rows, gate_up, down, weights, pre)
        return ops.combine(outputs, *index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, gate_up, down, weights, pre = ctx.saved_tensors
        routes: RouteList = ctx.routes
        probes: RouteList | None = ctx.probes
        grad, index, counts = grad.contiguous(), routes.without_counts(), routes.counts
        grad_probes = None
        if probes is not None and ctx.needs_input_grad[4]:
            grad_probes = _probe_products(rows, grad, gate_up, down, probes).to(weights.dtype)
        if ops.has_experts(rows.device, rows.dtype):
            needs = ctx.needs_input_grad[:3]
            grads = ops.experts_backward(grad, rows, gate_up, down, weights, pre, routes.tokens, counts, needs)
            return *(g if needed else None for g, needed in zip(grads, needs)), grads[3], grad_probes, None, None
        grad_outputs = ops.permute(grad, *index)
        grad_pre, grad_weights, activation = ops.swiglu_backward(gemm_nn(grad_outputs, down, counts), pre, weights)
        grad_down = gemm_tn(grad_outputs, activation, counts) if ctx.needs_input_grad[2] else None
        del grad_outputs, activation
        grad_gate_up = gemm_tn(grad_pre, ops.permute(rows, *index), counts) if ctx.needs_input_grad[1] else None
        grad_rows = ops.combine(gemm_nn(grad_pre, gate_up, counts), *index) if ctx.needs_input_grad[0] else None
        return grad_rows, grad_gate_up, grad_down, grad_weights.to(weights.dtype), grad_probes, None, None


class _WithProbes(torch.autograd.Function):
    """The output of a back end, with the probes' numbers in backward; there the back end gets a gradient without gaps."""

    @staticmethod
    def forward(ctx, output: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, probe_weights: Tensor | None, probes: RouteList | None) -> Tensor:
        ctx.probes, ctx.wide = probes, None if probe_weights is None else probe_weights.dtype
        ctx.save_for_backward(rows, gate_up, down)
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        grad, grad_probes = grad.contiguous(), None
        if ctx.probes is not None and ctx.needs_input_grad[4]:
            rows, gate_up, down = ctx.saved_tensors
            grad_probes = _probe_products(rows, grad, gate_up, down, ctx.probes).to(ctx.wide)
        return grad, None, None, None, grad_probes, None


def _probe_products(rows: Tensor, grad: Tensor, gate_up: Tensor, down: Tensor, probes: RouteList) -> Tensor:
    """(Q,): <dy_t, o_te> of each probe. On the CPU one expert at a time, so that no tensor of size Q x D ever exists."""
    if ops.has_experts(rows.device, rows.dtype):
        return ops.experts_probe(grad, rows, gate_up, down, probes.tokens, probes.counts)
    if rows.device.type != "cpu":
        index = probes.without_counts()
        pre = gemm_nt(ops.permute(rows, *index), gate_up, probes.counts)
        return ops.swiglu_dot(gemm_nn(ops.permute(grad, *index), down, probes.counts), pre)
    # 0 for padding.
    products, start = rows.new_zeros(probes.tokens.numel(), dtype=ops.acc_dtype(rows.dtype)), 0
    for expert, count in enumerate(probes.counts.tolist()):
        if count:
            tokens = probes.tokens[start : start + count]
            pre = rows.index_select(0, tokens) @ gate_up[expert].T
            products[start : start + count] = ops.swiglu_dot(grad.index_select(0, tokens) @ down[expert], pre)
        start += count
    return products


# The three grouped products. CUDA: one kernel (grouped_mm) that reads the counts on the device. CPU, where `ops.experts` can't be used (float64, a
# processor or torch without the micro-kernels): a loop, which is faster than grouped_mm there for every shape tried and needs no alignment. Where
# the counts add up to less than R, rows of padding are neither read nor written: whatever lies there comes through the operators beside.


def gemm_nt(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (R, K) by expert, weight (E, M, K), counts (E,) int32 -> (R, M): x_e @ weight_e^T."""
    if _grouped(x, weight):
        return nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=_offsets(counts))
    output = x.new_empty(x.shape[0], weight.shape[1])
    for e, part in _slices(counts):
        torch.mm(x[part], weight[e].T, out=output[part])
    return output


def gemm_nn(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (R, M) by expert, weight (E, M, K), counts (E,) int32 -> (R, K): x_e @ weight_e."""
    if _grouped(x, weight):
        return nn.functional.grouped_mm(x, weight, offs=_offsets(counts))
    output = x.new_empty(x.shape[0], weight.shape[2])
    for e, part in _slices(counts):
        torch.mm(x[part], weight[e], out=output[part])
    return output


def gemm_tn(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """a (R, M), b (R, K) by expert, counts (E,) int32 -> (E, M, K): a_e^T @ b_e, 0 for an expert without routes."""
    if _grouped(a, b):
        return nn.functional.grouped_mm(a.T, b, offs=_offsets(counts))
    output = a.new_zeros(counts.shape[0], a.shape[1], b.shape[1])
    for e, part in _slices(counts):
        torch.mm(a[part].T, b[part], out=output[e])
    return output


def _grouped(a: Tensor, b: Tensor) -> bool:
    # grouped_mm on CUDA takes bfloat16 with rows of whole 16 bytes.
    return a.device.type == "cuda" and a.dtype == torch.bfloat16 and a.shape[-1] % 8 == 0 and all(n % 8 == 0 for n in b.shape[-2:])


def _offsets(counts: Tensor) -> Tensor:
    return torch.cumsum(counts, 0, dtype=torch.int32)


def _slices(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, its routes), experts without routes left out. On CUDA this waits for the device."""
    found, start = [], 0
    for e, count in enumerate(counts.tolist()):
        if count:
            found.append((e, slice(start, start + count)))
        start += count
    return found
