"""Cut a dense SwiGLU FFN into experts whose outputs add up to it (DSMoE, arXiv 2502.12455, Eq. 6; LLaMA-MoE, arXiv 2406.16554)."""

from __future__ import annotations

import torch
from torch import Tensor


def check_split(intermediate_size: int, num_experts: int) -> int:
    """Intermediate size of one expert. ValueError if the cut is uneven, with the nearest number of experts that would do."""
    if intermediate_size % num_experts:
        divisors = [n for n in range(1, intermediate_size + 1) if intermediate_size % n == 0]
        near = min(divisors, key=lambda n: (abs(n - num_experts), n))
        raise ValueError(
            f"num_experts ({num_experts}) does not divide intermediate_size ({intermediate_size}) into equal slices; "
            f"nearest that does: {near}"
        )
    return intermediate_size // num_experts


def split_ffn(gate: Tensor, up: Tensor, down: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Contiguous equal slices along the intermediate dim.

    gate, up: (F0, D). down: (D, F0). Returns gate_up (E, 2F, D), each expert's gate rows first, and down (E, D, F), with F = F0 / E, in the
    inputs' dtype. ValueError if E does not divide F0.
    """
    hidden_size = gate.shape[1]
    expert_dim = check_split(gate.shape[0], num_experts)
    slices = (num_experts, expert_dim, hidden_size)
    gate_up = torch.cat((gate.reshape(slices), up.reshape(slices)), dim=1)
    return gate_up, down.reshape(hidden_size, num_experts, expert_dim).transpose(0, 1).contiguous()
