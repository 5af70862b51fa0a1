"""Routers, one short file per family.

A router is a section of options (moetrain.config.routers.RouterOptions) and a module that `router_for` ties to it; docs/routers.md says how
to add one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moetrain.config import ModelConfig
from moetrain.moe.routers import (
    base_layers,
    budget,
    dynmoe,
    expert_choice,
    hash,
    language_family,
    moepp,
    nexus,
    remoe,
    sigmoid_ste,
    task,
    topk,
    xmoe,
)
from moetrain.moe.routers.base import MODULES, router_for

__all__ = [
    "base_layers",
    "budget",
    "build_router",
    "changes_after_step",
    "dynmoe",
    "expert_choice",
    "hash",
    "language_family",
    "moepp",
    "nexus",
    "remoe",
    "router_for",
    "sigmoid_ste",
    "start_value",
    "task",
    "topk",
    "xmoe",
]


def build_router(config: ModelConfig, layer: int) -> nn.Module:
    """The router of one MoE layer, from `config.moe.router`. ValueError if its type has options but no module."""
    assert config.moe is not None, "a dense model has no router"
    router = config.moe.router
    kind = type(router)
    if kind not in MODULES:
        raise ValueError(f"model.moe.router.type ({router.type}) has options but no module: decorate one with @router_for({kind.__name__})")
    return MODULES[kind](config, layer)


def start_value(config: ModelConfig, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor | None:
    """Start value, on the CPU, of a router's parameter, by its name in the model; None: drawn or constant like any other of its kind.

    A router says it by a static method start_value(config, layer, part, shape, generator), part the parameter's name in the router.
    """
    if config.moe is None or ".ffn.router." not in name:
        return None
    said = getattr(MODULES.get(type(config.moe.router)), "start_value", None)
    _, layer, _, _, part = name.split(".", 4)
    return None if said is None else said(config, int(layer), part, tuple(shape), generator)


def changes_after_step(model: nn.Module, loads: list[list[float]], sums: list[dict[str, list[float]]]) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, what to add to it) after an optimizer step, for routers with a method `after_step`.

    This is how a router has state that no gradient moves: a parameter with requires_grad=False, which the optimizer leaves alone and which is
    sharded, saved and loaded like all others. loads: for each MoE layer, in order, the routes of each expert in the step over all ranks. sums:
    likewise what the router itself summed up (`Routing.sums`), of which a router with `pools_sums` gets the sum over all layers. Every rank has
    the same, so every rank makes the same changes.
    """
    routers = [(name, module) for name, module in model.named_modules() if name.endswith(".ffn.router")]
    for (name, router), load, own in zip(routers, loads, sums, strict=True):
        if hasattr(router, "after_step"):
            if isinstance(router, FSDPModule):
                router.reshard()  # else a router's attributes may still be the weights of the last forward
            of = sums if getattr(router, "pools_sums", False) else [own]
            named = {key: torch.tensor([layer[key] for layer in of], dtype=torch.float64).sum(0) for key in own}
            for parameter, change in router.after_step(torch.tensor(load, dtype=torch.float64), named):
                yield f"{name}.{parameter}", change

