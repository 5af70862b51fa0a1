"""One gradient norm for all parameters, whatever mesh each is on, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all gradients as if on one rank, a float64 scalar, the same on every rank.

    Local squares are added per mesh and placement, then over the axes that shard (a replica counts once), then over meshes. torch's
    clip_grad_norm_ refuses parameters on two meshes.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    meshes = {}
    device = torch.device("cpu")
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if isinstance(grad, DTensor):
            axes = tuple(i for i, p in enumerate(grad.placements) if p.is_shard())
            assert all(p.is_shard() or p.is_replicate() for p in grad.placements), f"a gradient with placements {grad.placements}"
            key = (grad.device_mesh, axes)
            meshes[key] = grad.device_mesh
            grad = grad.to_local()
        else:
            key = (None, ())
        device = grad.device
        groups[key].append(grad)
    total = torch.zeros((), dtype=torch.float64, device=device)
    # Every rank must meet the collectives in the same order: that of the parameters, which is the dict's.
    for key, grads in groups.items():
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        for axis in key[1]:
            dist.all_reduce(squares, group=meshes[key].get_group(axis))
        total += squares
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by a scalar."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    for dtype in {g.dtype for g in grads}:
        torch._foreach_mul_([g for g in grads if g.dtype == dtype], factor.to(dtype))
