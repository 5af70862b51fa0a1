"""Routers, one short file per family. `build_router` is the only place that knows them all."""

from __future__ import annotations

from torch import nn

from moetrain.config import ModelConfig, SigmoidSteRouter
from moetrain.moe.routers.sigmoid_ste import SigmoidSte
from moetrain.moe.routers.topk import TopK


def build_router(config: ModelConfig, layer: int) -> nn.Module:
    """The router of one MoE layer, from `config.moe.router`."""
    assert config.moe is not None, "a dense model has no router"
    return (SigmoidSte if isinstance(config.moe.router, SigmoidSteRouter) else TopK)(config, layer)
