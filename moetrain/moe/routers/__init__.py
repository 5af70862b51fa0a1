"""Routers, one short file per family.

A router is a section of options (moetrain.config.routers.RouterOptions) and a module that `router_for` ties to it; docs/routers.md says how
to add one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moetrain.config import ModelConfig
from moetrain.moe.routers import dynmoe, moepp, remoe, sigmoid_ste, topk, xmoe
from moetrain.moe.routers.base import MODULES, router_for

__all__ = ["build_router", "changes_after_step", "dynmoe", "moepp", "remoe", "router_for", "sigmoid_ste", "topk", "xmoe"]


def build_router(config: ModelConfig, layer: int) -> nn.Module:
    """The router of one MoE layer, from `config.moe.router`. ValueError if its type has options but no module."""
    assert config.moe is not None, "a dense model has no router"
    router = config.moe.router
    kind = type(router)
    if kind not in MODULES:
        raise ValueError(f"model.moe.router.type ({router.type}) has options but no module: decorate one with @router_for({kind.__name__})")
    return MODULES[kind](config, layer)


def changes_after_step(model: nn.Module, loads: list[list[float]], sums: list[dict[str, list[float]]]) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, what to add to it) after an optimizer step, for routers with a method `after_step`.

    This is how a router has state that no gradient moves: a parameter with requires_grad=False, which the optimizer leaves alone and which is
    sharded, saved and loaded like all others. loads: for each MoE layer, in order, the routes of each expert in the step over all ranks. sums:
    likewise what the router itself summed up (`Routing.sums`). Every rank has the same, so every rank makes the same changes.
    """
    routers = [(name, module) for name, module in model.named_modules() if name.endswith(".ffn.router")]
    for (name, router), load, own in zip(routers, loads, sums, strict=True):
        if hasattr(router, "after_step"):
            if isinstance(router, FSDPModule):
                router.reshard()  # else a router's attributes may still be the weights of the last forward
            named = {key: torch.tensor(values, dtype=torch.float64) for key, values in own.items()}
            for parameter, change in router.after_step(torch.tensor(load, dtype=torch.float64), named):
                yield f"{name}.{parameter}", change

