"""Every router, loss and kind of layer on 2 and 4 ranks does what it does on one rank: loss, each gradient, norm, weights after three steps
(state that no gradient moves included), in float64. What one rank does is held to plain formulas in tests/moe; tests/test_train.py holds the
oldest routers to a loop reference in more layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.config import Config
from tests.test_train import layout_id, make_config, start, write_data

# Each entry: options below `model.moe` ({"router": {...}, ...}), and with keys such as `model__num_layers` options of other sections.
BUDGETS: dict[str, dict[str, Any]] = {
    "dsmoe_by_layer": {"router": {"type": "sigmoid_ste", "target_active": 3.0, "sparsity_coef": 0.1, "target_over": "layer"}},
}
VARIABLE: dict[str, dict[str, Any]] = {
    "remoe": {"router": {"type": "remoe", "target_active": 2.0, "sparsity_coef": 0.05}},
    "remoe_plain": {"router": {"type": "remoe", "load_weighted": False, "sparsity_coef": 0.05}},
    "xmoe": {"router": {"type": "xmoe", "threshold": 0.6, "target_active": 2.0, "capacity_factor": 2.0, "balance_coef": 0.1}},
    "xmoe_normalized": {"router": {"type": "xmoe", "threshold": 0.8, "normalize": True, "max_experts": 4, "balance_coef": 0.1}},
    # In the third and last step slots without a route are freed and one is used anew.
    "dynmoe": {
        "router": {
            "type": "dynmoe", "adapt_every": 3, "record_steps": 2, "start_experts": 6, "balance_coef": 0.1, "efficiency_coef": 0.1,
            "orthogonality_coef": 0.1, "norm_coef": 0.1, "init_std": None,
        },
    },
    "moepp": {"router": {"type": "moepp", "top_k": 3, "capacity_factor": 0.8, "balance_coef": 0.1}},
    "moepp_normalized": {"router": {"type": "moepp", "normalize": True, "num_constant": 1, "gating_residual": False, "balance_coef": 0.1}},
}
"""Variable numbers of experts: ReMoE, XMoE, DynMoE, MoE++."""
ASSIGNED: dict[str, dict[str, Any]] = {}
"""Chosen by experts, by assignment, by token id, by task, by domain."""
LAYERS: dict[str, dict[str, Any]] = {}
"""Shared, residual and unequal experts, strata, sub-layers, dense layers between."""
VARIANTS = BUDGETS | VARIABLE | ASSIGNED | LAYERS


def config_of(name: str, folder: Path, layout: tuple[int, int, int], run_dir: Path) -> Config:
    variant = VARIANTS[name]
    changes = {key: value for key, value in variant.items() if "__" in key}
    moe = {"num_experts": 8, "expert_dim": 6} | {key: value for key, value in variant.items() if "__" not in key}
    # Large start weights, so that routes differ between tokens; a router without weights of its own has no init_std.
    moe["router"] = {"init_std": 0.7, **moe["router"]}
    if moe["router"]["init_std"] is None:
        del moe["router"]["init_std"]
    return make_config(folder, "exact", layout, run_dir=str(run_dir), model__moe=moe, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "a", seed=1)
    write_data(folder / "b", documents=20, seed=2)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    configs = [config_of(name, data, (1, 1, 1), folder / name) for name in VARIANTS]
    return dict(zip(VARIANTS, start(configs, "mixed")))


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 1, 4), (1, 2, 2)], ids=layout_id)
def test_ranks_equal_one_rank(layout, data, alone, tmp_path):
    configs = [config_of(name, data, layout, tmp_path / name) for name in VARIANTS]
    for name, got in zip(VARIANTS, start(configs, "mixed")):
        want, tolerance = alone[name], dict(rtol=1e-9, atol=1e-11)
        for i, (mine, theirs) in enumerate(zip(got["records"], want["records"], strict=True)):
            assert mine.keys() == theirs.keys()
            for key in ("loss", "grad_norm", "lm"):
                np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-9, err_msg=f"{name}: {key} of step {i}")
            assert mine["moe"]["active"] == theirs["moe"]["active"], f"{name}: routes of step {i}"
            assert got["grads"][i].keys() == want["grads"][i].keys()
            for parameter, grad in want["grads"][i].items():
                np.testing.assert_allclose(got["grads"][i][parameter], grad, **tolerance, err_msg=f"{name}: gradient of {parameter} in step {i}")
        assert got["weights"].keys() == want["weights"].keys()
        for parameter, weight in want["weights"].items():
            np.testing.assert_allclose(got["weights"][parameter], weight, **tolerance, err_msg=f"{name}: weight {parameter}")
