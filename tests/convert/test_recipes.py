"""The recipes of upcycled setups: they load, build on the meta device, and their `model` is what their `upcycle` makes of the dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain.config import check_world, load_config
from moetrain.convert.copy import step_0_factor
from moetrain.convert.upcycle import target_config
from moetrain.model import Transformer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Parameters in billions: of the dense model, of the mixture, and activated with so many experts, from the papers where they say it.
RECIPES = {
    "dsmoe_1b": (1.24, 1.24, 3.01, 0.735),
    "dsmoe_7b": (6.74, 6.74, 2.83, 3.93),
    "nvidia_e8g8t8": (6.74, 37.05, 8, 6.75),
    "drop_upcycling": (1.87, 9.27, 2, 2.92),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    model, (dense_size, size, active, active_size) = config.model, RECIPES[name]
    with torch.device("meta"):
        built = Transformer(model)
    assert sum(p.numel() for p in built.parameters()) == model.num_params() == pytest.approx(size * 1e9, rel=5e-3)
    dense = model.model_copy(update={"moe": None})
    assert dense.num_params() == pytest.approx(dense_size * 1e9, rel=5e-3)
    assert model.num_active_params(active) == pytest.approx(active_size * 1e9, rel=5e-3)
    assert target_config(dense, config.upcycle) == model
    world = 8
    check_world(config, world)
    assert config.train.steps * config.train.global_batch_size * config.data.seq_len == pytest.approx(
        {"dsmoe_1b": 10e9, "dsmoe_7b": 10e9, "nvidia_e8g8t8": 1e12, "drop_upcycling": 500e9}[name], rel=1e-3
    )


def test_scaling_of_e8g8t8():
    config = load_config(CONFIGS / "nvidia_e8g8t8.yaml")
    assert step_0_factor(config.upcycle.router, 8, config.upcycle.granularity, torch.ones(8)) == 64
