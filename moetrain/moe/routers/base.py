"""Which module is the router of which options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.config import RouterOptions

_M = TypeVar("_M", bound=type[nn.Module])

MODULES: dict[type[RouterOptions], type[nn.Module]] = {}


def router_for(options: type[RouterOptions]) -> Callable[[_M], _M]:
    """Decorator: this module is the router of these options.

    It is made with (ModelConfig, layer: int) and called with (x: (T, D), context: TokenContext) for a `moetrain.moe.routing.Routing`. A method
    `after_step(load, sums)`, where it has one, yields (name of one of its parameters, what to add to it) after each optimizer step. Where
    it changes an entry of a parameter that the optimizer has, AdamW's moments of that entry are cleared. An attribute `pools_sums` that is true
    asks for `sums` over all layers, where all move alike. A static method
    `start_value(config, layer, part, shape, generator)`, where it has one, gives a parameter's start value (float32 on the CPU; what it draws is
    of the generator), or None for the common rule.
    """

    def tie(module: _M) -> _M:
        MODULES[options] = module
        return module

    return tie


def whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter on the CPU in float64, outside forward, where it may be sharded. Collective over its mesh."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).to("cpu", torch.float64, copy=True)
