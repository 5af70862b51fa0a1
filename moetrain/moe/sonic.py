"""SonicMoE's kernels (Guo et al., arXiv 2512.14080; the package sonic-moe) in the place of grouped_mm, on Hopper and Blackwell.

What is used is `moe_general_routing_inputs`, which takes routes as lists and so any number per token. Read in its source (2025-12, and a later one
with `concat_layout`), and **never run here**: scores, int32 token and expert indices, one per route, by ascending token; weights as views of ours,
(2 F, D, E) and (D, F, E), with `concat_layout` the gate's rows before those of up; bfloat16 data, float32 scores; gradients of rows, both
matrices and scores. Each route's output is rounded to bfloat16 before a token's are added, which grouped_mm's are too.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moetrain.moe.dispatch import RouteList

DEVICES = (9, 10)
"""Compute capabilities, the first number: Hopper, Blackwell."""


def missing(device: torch.device) -> str | None:
    """What SonicMoE needs and does not find here; None: nothing."""
    if device.type != "cuda":
        return f"a CUDA device, and the experts are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in DEVICES:
        return f"compute capability {' or '.join(f'{c}.x' for c in DEVICES)}, and this device has {'.'.join(map(str, capability))}"
    try:
        entry, _ = _package()
    except (ImportError, AttributeError) as error:
        old = "" if sys.version_info >= (3, 12) else f", which wants Python 3.12 or later, and this is {sys.version_info[0]}.{sys.version_info[1]}"
        return f"the package sonic-moe{old} (pip install 'moetrain[sonicmoe]'): {error}"
    if "concat_layout" not in inspect.signature(entry).parameters:
        return "a newer sonic-moe, with concat_layout (pip install -U sonic-moe)"
    return None


@functools.cache
def _package() -> tuple[Callable[..., tuple[Tensor, Tensor]], Any]:
    """(moe_general_routing_inputs, what SwiGLU is called there)."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    return moe_general_routing_inputs, ActivationType.SWIGLU


def compute(rows: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, routes: RouteList) -> Tensor:
    """The experts' weighted sums, differentiable: rows (N, D) bfloat16, gate_up (E, 2F, D), down (E, D, F), weights (R,) float32 and R > 0 routes
    without padding, both by expert -> (N, D)."""
    entry, swiglu = _package()
    num_experts, order = down.shape[0], routes.positions.long()
    expert = torch.arange(num_experts, dtype=torch.int32, device=rows.device)
    expert = torch.repeat_interleave(expert, routes.counts.long(), output_size=order.numel())
    stream = torch.cuda.current_stream(rows.device).cuda_stream if rows.is_cuda else 0
    output, _ = entry(
        rows.contiguous(), weights[order], routes.tokens[order], expert[order], gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None,
        num_experts, stream, swiglu, is_inference_mode_enabled=not torch.is_grad_enabled(), concat_layout=True,
    )  # fmt: skip
    return output
