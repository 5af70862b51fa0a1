"""A gate's logits in float32 from narrower hidden states, without a float32 copy of these."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from moetrain import ops

_ROWS = 512
"""Of x at a time on a CPU without our operator: the float32 copy of a piece stays in cache. On a GPU the whole of it is one piece, freed at once."""


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, D), weight (E, D), bias (E,) -> (T, E) x W^T + b, computed in float32 (in float64 for float64 x). What backward keeps is x itself.

    A router's logits decide, so they are not rounded to bfloat16; but x in float32 kept for backward would be twice x, and often more than all
    else that the layer keeps."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if x.dtype == wide:
        return linear(x, weight, bias)
    logits = _WideLinear.apply(x, weight)
    return logits if bias is None else logits + bias


def _has_operator(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and ops.has_experts(x.device, torch.float32)


def _pieces(x: Tensor) -> list[slice]:
    rows = _ROWS if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _has_operator(x):
            return ops.wide_linear(x, weight)
        logits = weight.new_empty(x.shape[0], weight.shape[0])
        for rows in _pieces(x):
            torch.mm(x[rows].to(weight.dtype), weight.T, out=logits[rows])
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        if _has_operator(x):
            grads = ops.wide_linear_backward(grad, x, weight, (needs_x, needs_weight))
            return grads[0] if needs_x else None, grads[1] if needs_weight else None
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        for rows in _pieces(x):
            if grad_x is not None:
                grad_x[rows] = grad[rows] @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad[rows].T, x[rows].to(weight.dtype))
        return grad_x, grad_weight
