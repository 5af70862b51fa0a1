"""A mixture back to a dense FFN, where that is exact: the slices of one FFN joined, or copies of one FFN.

Letters: E experts, D model dim, F intermediate size of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.config import ModelConfig, TopKRouter


def dense_config(mixture: ModelConfig, join: str, where: str) -> ModelConfig:
    """Config of the dense model. ValueError where no dense FFN computes what the mixture does."""
    moe = mixture.moe
    if moe is None:
        raise ValueError(f"upcycle.dense ({where}) is dense already; method to_dense wants a mixture")
    if isinstance(moe.expert_dim, list) or moe.strata is not None:
        raise ValueError(f"upcycle.dense ({where}): its experts differ in size or lie in strata; to_dense joins equal experts side by side")
    size = moe.num_experts * moe.expert_dim if join == "slices" else moe.expert_dim
    if moe.shared is not None:
        if moe.shared.combine != "sum":
            raise ValueError(
                f"upcycle.dense ({where}): its shared FFN is weighted token by token (combine: {moe.shared.combine}), so no dense FFN computes the "
                f"same; exact for combine: sum"
            )
        size += moe.shared.dim
    if mixture.num_moe_layers < mixture.num_layers and size != mixture.intermediate_size:
        raise ValueError(
            f"upcycle.dense ({where}): its sparse layers join to FFNs of {size} neurons, but its dense layers have {mixture.intermediate_size}, "
            f"and one model has FFNs of one size"
        )
    dense = mixture.model_copy(update={"moe": None, "intermediate_size": size})
    if join == "slices":
        return dense
    router = moe.router
    if not isinstance(router, TopKRouter) or not (router.normalize or router.top_k == moe.num_experts):
        raise ValueError(
            f"upcycle.dense ({where}): its router's weights have no fixed sum, so equal experts are not one dense FFN; exact for topk with "
            f"normalize: true, or top_k equal to num_experts"
        )
    return dense


def collapse(gate_up: Tensor, down: Tensor, mixture: ModelConfig, join: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up (F0, D) and down (D, F0) of one layer. gate_up: (E, 2F, D), down: (E, D, F). where: the layer, for errors.

    slices: the sum of all experts' outputs, that is the mixture with every gate at 1. A top-k mixture's slices are E / k times the dense
    FFN's, as `llama_moe` writes them; that is divided out. copies: the first expert; ValueError if another one differs.
    """
    assert mixture.moe is not None, "dense_config refuses this"
    experts, router = mixture.moe.num_experts, mixture.moe.router
    scale = router.output_scale if isinstance(router, TopKRouter) else 1.0
    if join == "copies":
        for e in range(1, experts):
            if not (torch.equal(gate_up[e], gate_up[0]) and torch.equal(down[e], down[0])):
                raise ValueError(f"{where}: expert {e} differs from expert 0, so they are not copies of one FFN; use join: slices for slices")
        gate, up = gate_up[0].chunk(2)
        return gate, up, _times(down[0], scale)
    if isinstance(router, TopKRouter):
        scale *= router.top_k / experts
    gate, up = (part.reshape(-1, part.shape[-1]) for part in gate_up.chunk(2, dim=1))
    return gate, up, _times(down.transpose(0, 1).reshape(down.shape[1], -1), scale)


def _times(x: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return x.contiguous()
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(x.dtype)
