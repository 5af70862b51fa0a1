"""Routers, one short file per family. `build_router` is the only place that knows them all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, SigmoidSteRouter
from moetrain.moe.routers.sigmoid_ste import SigmoidSte
from moetrain.moe.routers.topk import TopK


def build_router(config: ModelConfig, layer: int) -> nn.Module:
    """The router of one MoE layer, from `config.moe.router`."""
    assert config.moe is not None, "a dense model has no router"
    return (SigmoidSte if isinstance(config.moe.router, SigmoidSteRouter) else TopK)(config, layer)


def changes_after_step(model: nn.Module, loads: list[list[float]]) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, what to add to it) after an optimizer step, for routers with a method `after_step`.

    This is how a router has state that no gradient moves: a parameter with requires_grad=False, which the optimizer leaves alone and which is
    sharded, saved and loaded like all others. loads: for each MoE layer, in order, the routes of each expert in the step over all ranks; every
    rank has the same, so every rank makes the same changes.
    """
    routers = [(name, module) for name, module in model.named_modules() if name.endswith(".ffn.router")]
    for (name, router), load in zip(routers, loads, strict=True):
        if hasattr(router, "after_step"):
            for parameter, change in router.after_step(torch.tensor(load, dtype=torch.float64)):
                yield f"{name}.{parameter}", change
