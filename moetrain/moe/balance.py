"""Losses that spread tokens over experts: Switch's product of shares, and LLaMA-MoE's squared coefficients of variation.

They are sums over the tokens of all ranks in which some factors are no sums; these are added over ranks first and are constants in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.routing import TokenContext, group_sum, recorded, token_count


def product_of_shares(load: Tensor, probabilities: Tensor, tokens: float | Tensor) -> Tensor:
    """E sum_e f_e P_e (Switch, arXiv 2101.03961 Eq. 4, f normalised over k): 1 when balanced.

    load: f, (E,), or (B, E) for each of B sequences (DeepSeek-V3's sequence-wise loss, averaged over sequences by their tokens). probabilities:
    (T, E), 0 on padding. tokens: what the sum over tokens is divided by.
    """
    T, E = probabilities.shape
    sums = probabilities.sum(0) if load.ndim == 1 else probabilities.view(load.shape[0], T // max(1, load.shape[0]), E).sum(1)
    return E * (load.to(sums.dtype) * (sums / tokens)).sum()


def smooth_load(clean: Tensor, noisy: Tensor, std: Tensor, top_k: int) -> Tensor:
    """(T, E): probability that an expert is among the k best if its noise alone is drawn again (Shazeer, arXiv 1701.06538 Eqs. 8-9):
    Phi((clean - the k-th largest of the other noisy logits) / std). 1 when all experts route."""
    if top_k == clean.shape[1]:
        return torch.ones_like(clean)
    best = torch.sort(noisy, dim=-1, descending=True).values
    last_in, first_out = best[:, top_k - 1, None], best[:, top_k, None]
    # Without an expert that is in, the k-th of the others is the first that is out.
    rival = torch.where(noisy > first_out, first_out, last_in)
    return torch.special.ndtr((clean - rival) / std)


def squared_variations(context: TokenContext, x: Tensor, *amounts: Tensor) -> Tensor:
    """This rank's part of the sum over `amounts` of CV^2 = variance / mean^2 over experts, over the micro-batch on all ranks and averaged over
    the micro-batches of a step by their tokens (LLaMA-MoE, arXiv 2406.16554; variance divided by E).

    amounts: (E,) each, summed over this rank's tokens. x: (T, D), for the number of tokens. The parts add up to the value over ranks; each
    one's gradient is that of the whole with respect to this rank's tokens.
    """
    stacked = torch.stack(amounts)
    group = context.group if torch.is_grad_enabled() else None
    counted = x.new_full((1,), x.shape[0], dtype=torch.float64) if context.valid is None else context.valid.sum(dtype=torch.float64).reshape(1)
    sums = recorded(lambda: group_sum(torch.cat([stacked.detach().double().flatten(), counted]), group))
    E, whole = stacked.shape[1], sums[:-1].view(stacked.shape)
    total = whole.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1)
    squares = whole.square().sum(-1, keepdim=True)
    # CV^2 = E sum I^2 / (sum I)^2 - 1. It does not change when all amounts do alike, so that slope . amounts adds up to 0 over ranks.
    value = (E * squares / total.square() - 1).clamp(min=0).sum()
    slope = 2 * E * (whole * total - squares) / total**3
    tokens = token_count(context, x)
    straight = (slope.to(stacked.dtype) * (stacked - stacked.detach())).sum()
    return (value * counted[0] / tokens).to(stacked.dtype) + straight * (sums[-1] / tokens).to(stacked.dtype)
