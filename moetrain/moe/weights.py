"""Route weights from scores (T, E) to routes (R,), keeping for backward no more than they need.

Letters: T tokens, E experts, R routes. A (T, E) float32 matrix of fine experts is several percent of all that a layer keeps, and what autograd keeps
of a chain of small operators is one such matrix for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain import ops


def share(scores: Tensor, active: Tensor) -> Tensor:
    """scores (T, E), active (T, E) bool -> (T, E): each active score over the sum of its row's active scores; 0 elsewhere and in rows whose sum is
    not positive. Keeps the two arguments."""
    return _Share.apply(scores, active)


def pick(weights: Tensor, tokens: Tensor, counts: Tensor, padded: bool = False) -> Tensor:
    """weights (T, E), the routes' tokens (R,) int32 by expert, counts (E,) int32 -> (R,) weights[token, expert] of each route. Keeps the list, which
    the layer keeps anyway. padded: the counts may add up to less than R; the rest is 0, whatever gradient comes back for it."""
    return _Pick.apply(weights, tokens, counts, padded)


def _has_operator(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype == torch.float32


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(scores, active)
        if _has_operator(scores):
            return ops.share(scores, active)
        weights = scores * active
        return weights.div_(_totals(weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        scores, active = ctx.saved_tensors
        if _has_operator(scores):
            return ops.share_backward(grad, scores, active), None
        weights = scores * active
        total = _totals(weights)
        mean = weights.mul_(grad).sum(-1, keepdim=True).div_(total)
        return (grad - mean).mul_(active).div_(total), None


def _totals(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, total, 1)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, tokens: Tensor, counts: Tensor, padded: bool) -> Tensor:
        ctx.shape, ctx.padded = weights.shape, padded
        ctx.save_for_backward(tokens, counts)
        places, real = _places(tokens, counts, padded, weights.numel())
        picked = weights.reshape(-1)[places]
        return picked if real is None else torch.where(real, picked, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        places, real = _places(*ctx.saved_tensors, ctx.padded, ctx.shape[0] * ctx.shape[1])
        flat = grad.new_zeros(ctx.shape[0] * ctx.shape[1])
        # No place of a route occurs twice; padding adds nothing.
        flat = flat.index_copy_(0, places, grad) if real is None else flat.index_add_(0, places, torch.where(real, grad, 0))
        return flat.view(ctx.shape), None, None, None


def _places(tokens: Tensor, counts: Tensor, padded: bool, size: int) -> tuple[Tensor, Tensor | None]:
    """(R,) int64: in the flat (T, E) matrix of `size` elements; and which routes are no padding, None: all."""
    if not padded:
        expert = torch.repeat_interleave(counts.long(), output_size=tokens.numel())
        return tokens.long() * counts.numel() + expert, None
    row = torch.arange(tokens.numel(), device=tokens.device)
    expert = torch.searchsorted(counts.cumsum(0), row, right=True)
    real = expert < counts.numel()
    # Padding has places of its own, as far as there are: adding zeros at one and the same would be a queue on a GPU.
    return torch.where(real, tokens.long() * counts.numel() + expert, row % max(1, size)), real
