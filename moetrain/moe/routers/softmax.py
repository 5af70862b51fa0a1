"""What routers share that take the largest of softmax's scores and have Switch's balance loss: nexus, language_family, task."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain import ops
from moetrain.moe.balance import product_of_shares
from moetrain.moe.routing import Decision, Routing, TokenContext, global_load, token_count


def largest(scores: Tensor, k: int) -> Tensor:
    """(..., E) -> (..., k) int64: the k largest, the largest first; among equals the lower expert, on every device and for any batch shape."""
    E = scores.shape[-1]
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return ops.largest(scores.detach().reshape(-1, E), k).view(*scores.shape[:-1], k)
    if scores.dtype == torch.float32 and 2 * k <= E:
        return _largest_by_keys(scores, k)
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def _largest_by_keys(scores: Tensor, k: int) -> Tensor:
    """No two keys are equal, so topk, which is faster than a sort but has no order among equals, finds the same. As whole numbers the bits of
    floats of one sign are in the floats' order; -0.0 becomes 0.0."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    return ((ordered << 24) | torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)).topk(k, dim=-1).indices


def as_mask(experts: Tensor, num_experts: int) -> Tensor:
    """(..., k) -> (..., E) bool."""
    return torch.zeros(*experts.shape[:-1], num_experts, dtype=torch.bool, device=experts.device).scatter(-1, experts, True)


def decision_of(active: Tensor, context: TokenContext) -> Decision:
    """active: (T, E) bool, padding not yet taken out. The load is that of all ranks. Collective over `context.group`, in training."""
    if context.valid is not None:
        active = active & context.valid[:, None]
    return Decision(active, load=global_load(active, context.group if torch.is_grad_enabled() else None))


def with_balance(weights: Tensor, scores: Tensor, decision: Decision, context: TokenContext) -> Routing:
    """weights: (T, E), of which the active ones count. scores: (T, E), of which P_e is the mean. Losses: `balance`, E sum_e f_e P_e (Switch)."""
    assert decision.load is not None, "decided with the load"
    shares = scores if context.valid is None else scores * context.valid[:, None]
    balance = product_of_shares(decision.load, shares, token_count(context, scores))
    return Routing(decision, weights * decision.active, {"balance": balance})
