"""Route weights from scores (T, E) to routes (R,), keeping for backward no more than they need.

Letters: T tokens, E experts, R routes. A (T, E) float32 matrix of fine experts is several percent of all that a layer keeps, and what autograd keeps
of a chain of small operators is one such matrix for each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share(scores: Tensor, active: Tensor) -> Tensor:
    """scores (T, E), active (T, E) bool -> (T, E): each active score over the sum of its row's active scores; 0 elsewhere and in rows whose sum is
    not positive. Keeps the two arguments."""
    return _Share.apply(scores, active)


def pick(weights: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """weights (T, E), the routes' tokens (R,) int32 by expert, counts (E,) int32 -> (R,) weights[token, expert] of each route. Keeps the list, which
    the layer keeps anyway."""
    return _Pick.apply(weights, tokens, counts)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(scores, active)
        weights = scores * active
        return weights.div_(_totals(weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        scores, active = ctx.saved_tensors
        weights = scores * active
        total = _totals(weights)
        mean = weights.mul_(grad).sum(-1, keepdim=True).div_(total)
        return (grad - mean).mul_(active).div_(total), None


def _totals(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, total, 1)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        ctx.shape = weights.shape
        ctx.save_for_backward(tokens, counts)
        return weights.reshape(-1)[_places(tokens, counts)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        # No place occurs twice.
        flat = grad.new_zeros(ctx.shape[0] * ctx.shape[1])
        return flat.index_copy_(0, _places(*ctx.saved_tensors), grad).view(ctx.shape), None, None


def _places(tokens: Tensor, counts: Tensor) -> Tensor:
    """(R,) int64: in the flat (T, E) matrix."""
    expert = torch.repeat_interleave(counts.long(), output_size=tokens.numel())
    return tokens.long() * counts.numel() + expert
