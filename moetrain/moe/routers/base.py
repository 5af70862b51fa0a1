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
    `after_step(load, sums)`, where it has one, yields (name of a parameter without gradient, what to add to it) after each optimizer step. A
    static method `start_value(config, layer, part, shape)`, where it has one, gives a parameter's start value, or None for the common rule.
    """

    def tie(module: _M) -> _M:
        MODULES[options] = module
        return module

    return tie


def whole(parameter: Tensor) -> Tensor:
    """The value of a parameter, sharded or not, float64 on the CPU, for `after_step`. Collective over its mesh."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().to("cpu", torch.float64)
