"""Finedeep (arXiv 2502.12928): a dense FFN as a stack of sub-layers of small experts, all of which run, each gated by its own output.

A reconstruction from the paper's abstract and notes on it; no code is published. That sub-layers follow one another, that every expert runs, that
a sigmoid of the expert's output weighs it, and that norm and residual are around each sub-layer, is from there. The gate as an inner product with
one vector per expert, without normalisation, is ours, and so is the start scale (`initial_tensor`).

Letters: T tokens, D model dim, M sub-layers, K experts of a sub-layer, F = intermediate_size / (M K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moetrain.config import ModelConfig
from moetrain.modules import RMSNorm
from moetrain.moe.routing import LayerReport, TokenContext


class Sublayer(nn.Module):
    """sum_k r_k y_k with y_k = SwiGLU_k(x) and r_k = sigmoid(<y_k, w_k>). gate_up: (K, 2F, D), the gate's rows first; down: (K, D, F); output_gate:
    (K, D), the w_k."""

    def __init__(self, hidden_size: int, num_experts: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.full((num_experts, 2 * expert_dim, hidden_size), math.nan))
        self.down = nn.Parameter(torch.full((num_experts, hidden_size, expert_dim), math.nan))
        self.output_gate = nn.Parameter(torch.full((num_experts, hidden_size), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, D), normed. Returns (T, D). The K outputs exist one by one only as (K, T, D), since each gate must see its own."""
        gate_up, down, output_gate = (p.to(x.dtype) for p in (self.gate_up, self.down, self.output_gate))
        K, _, F = down.shape
        gate, up = linear(x, gate_up.flatten(0, 1)).view(-1, K, 2 * F).transpose(0, 1).chunk(2, -1)
        outputs = torch.bmm(silu(gate) * up, down.transpose(1, 2))
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = torch.sigmoid(torch.bmm(outputs.to(wide), output_gate[:, :, None].to(wide)))
        return (gates * outputs).sum(0).to(x.dtype)


class Finedeep(nn.Module):
    """h_m = h_(m-1) + sublayer_m(norm_m(h_(m-1))), m = 1 .. M, with h_0 the residual stream; the layer's output is h_M - h_0. norm_1 is the block's
    own norm before its FFN. No routes: `model.moe` is not involved."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.finedeep is not None, "needs a finedeep config"
        M, K, D = config.finedeep.sublayers, config.finedeep.experts, config.hidden_size
        self.sublayers = nn.ModuleList(Sublayer(D, K, config.intermediate_size // (M * K)) for _ in range(M))
        self.norms = nn.ModuleList(RMSNorm(D, config.norm_eps) for _ in range(M - 1))

    def forward(self, x: Tensor, context: TokenContext, residual: Tensor) -> tuple[Tensor, LayerReport]:
        """x: (T, D), normed. residual: (T, D), the stream before the norm. Returns (T, D) to add to the stream, and an empty report."""
        y = self.sublayers[0](x)
        for sublayer, norm in zip(self.sublayers[1:], self.norms, strict=True):
            y = y + sublayer(norm(residual + y))
        return y, LayerReport({}, {})
