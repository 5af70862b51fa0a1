"""Several models into one: dense models of one origin become experts (Branch-Train-MiX, arXiv 2403.07816), the rest merged by average, TIES or
DARE (MergeME, arXiv 2502.00997); mixtures side by side (aggregation of experts, Z-code M3, arXiv 2109.10465; the last from memory of the paper).

All of it one parameter at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.config import ModelConfig, SigmoidSteRouter


def merge(base: Tensor, others: list[Tensor], how: str, density: float, scale: float | None, draws: torch.Generator) -> Tensor:
    """One parameter of the merged model, in base's dtype. base: (...), others: each of base's shape.

    how: `average` of the others; `base` alone; `ties` or `dare`: base + lambda * sum of the trimmed differences theta_i - theta_base. MergeME
    prints the difference the other way round, which with its `+ lambda` would move away from the models. scale: lambda; None: 1 / number.
    """
    if how == "base":
        return base
    wide = torch.promote_types(base.dtype, torch.float32)
    models = torch.stack([o.to(wide) for o in others])
    if how == "average":
        # From the first one, so that equal models give themselves to the last bit.
        return (models[0] + (models - models[0]).mean(0)).to(base.dtype)
    start = base.to(wide)
    differences = models - start
    merged = ties(differences, density) if how == "ties" else dare(differences, density, draws)
    return (start + (1 / len(others) if scale is None else scale) * merged).to(base.dtype)


def ties(differences: Tensor, density: float) -> Tensor:
    """differences (N, ...) -> (...): keep the `density` largest entries of each, elect the sign of the sum at each place, add those that agree
    (TIES, arXiv 2306.01708, with MergeME's sum in place of the mean; trimmed per parameter, not over the whole model)."""
    trimmed = torch.zeros_like(differences)
    for difference, kept in zip(differences.flatten(1), trimmed.flatten(1)):
        # A stable sort, not topk: among equal sizes the earlier place is kept, on every machine. One model at a time, for the memory.
        places = torch.sort(difference.abs(), descending=True, stable=True).indices[: max(1, round(density * difference.numel()))]
        kept[places] = difference[places]
    sign = trimmed.sum(0).sign()
    return (trimmed * (trimmed.sign() == sign)).sum(0)


def dare(differences: Tensor, density: float, draws: torch.Generator) -> Tensor:
    """differences (N, ...) -> (...): each entry is kept with probability `density` and then divided by it; the sum (DARE, arXiv 2311.03099)."""
    merged = torch.zeros_like(differences[0])
    for difference in differences:
        merged += difference * (torch.rand(difference.shape, generator=draws) < density)
    return merged / density


def aggregate(name: str, tensors: list[Tensor], model: ModelConfig, how: str, draws: torch.Generator) -> Tensor:
    """One parameter of a mixture with the experts and router rows of all of `tensors`' mixtures; the rest by `how`: average, base (the first).

    With sigmoid gates every output is divided by the number of mixtures (in down), so that equal mixtures give themselves: each route has its
    doubles, and neither Eq. 8 nor plain gates divide by them. With top-k it takes a top_k that counts the doubles.
    """
    if not (".ffn.router." in name or ".ffn.experts." in name):
        return merge(tensors[0], tensors, how, 1.0, None, draws)
    assert model.moe is not None, "a mixture"
    if isinstance(model.moe.router, SigmoidSteRouter) and name.endswith("experts.down"):
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        tensors = [(t.to(wide) / len(tensors)).to(t.dtype) for t in tensors]
    return torch.cat(tensors)
