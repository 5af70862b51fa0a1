"""The small modules that every part of the model is made of. Parameters are NaN until they are set, so that a forgotten one is seen at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T + b in the dtype of x, whatever the dtype the weight is kept in."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((out_features, in_features), math.nan))
        self.bias = nn.Parameter(torch.full((out_features,), math.nan)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def _norm_of_sum(x: Tensor, y: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, F.rms_norm(total, shape, weight, eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; the mean of squares is taken in float32 (float64 for float64)."""

    compute = staticmethod(F.rms_norm)
    compute_of_sum = staticmethod(_norm_of_sum)

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), math.nan))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, y: (..., dim). x + y and its norm, (..., dim) both: one function, so that torch.compile makes one pass of the two."""
        return self.compute_of_sum(x, y, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """(silu(x G) * x U) V, from `dim` through `inner` back to `dim`."""

    def __init__(self, dim: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, inner, bias)
        self.up_proj = Linear(dim, inner, bias)
        self.down_proj = Linear(inner, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
