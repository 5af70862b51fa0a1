"""The fixed FFN beside the experts: shared experts (DeepSeekMoE, arXiv 2401.06066; Qwen2-MoE), residual MoE (DeepSpeed-MoE, arXiv 2201.05596).

Every token passes it, whatever its routes. It is one FFN of the shared experts' total width, which computes what several of them side by side
do. Its parameters are dense ones: on every rank, sharded like attention's, and no row of it travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.config import SharedConfig
from moetrain.modules import Linear, SwiGLU


class SharedExpert(SwiGLU):
    """s = FFN(x), joined with y, the sum of the routed experts:

    sum: y + s. gate: y + sigmoid(w x) s, as transformers' Qwen2-MoE. coefficient: c_0 y + c_1 s with c = softmax(W x + b), DeepSpeed's residual
    MoE (from memory of its code). Gates and coefficients are computed in float32, as a router's weights are.
    """

    def __init__(self, hidden_size: int, options: SharedConfig) -> None:
        super().__init__(hidden_size, options.dim)
        self.combine = options.combine
        outputs = {"sum": 0, "gate": 1, "coefficient": 2}[options.combine]
        self.mix = Linear(hidden_size, outputs, bias=options.combine == "coefficient") if outputs else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """x: (T, D), the layer's input. y: (T, D), the routed experts' sum. Returns (T, D) in the dtype of x."""
        shared = super().forward(x)
        if self.mix is None:
            return y + shared
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = self.mix(x.to(wide))
        if self.combine == "gate":
            return y + (torch.sigmoid(logits) * shared).to(x.dtype)
        share = torch.softmax(logits, -1)
        return (share[:, :1] * y + share[:, 1:] * shared).to(x.dtype)
