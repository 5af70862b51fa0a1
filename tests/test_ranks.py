"""Every router, loss and kind of layer on 2 and 4 ranks does what it does on one rank: loss, each gradient, norm, weights after three steps
(state that no gradient moves included), in float64. What one rank does is held to plain formulas in tests/moe; tests/test_train.py holds the
oldest routers to a loop reference in more layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moetrain.config import Config
from tests.test_train import layout_id, make_config, start, write_data

# Each entry: options below `model.moe` ({"router": {...}, ...}), and with keys such as `model__num_layers` options of other sections.
BUDGETS: dict[str, dict[str, Any]] = {
    "dsmoe_by_layer": {"router": {"type": "sigmoid_ste", "target_active": 3.0, "sparsity_coef": 0.1, "target_over": "layer", "trim": False}},
    "dsmoe_threshold": {"router": {"type": "sigmoid_ste", "target_active": 3.0}},
    "budget": {
        "router": {"type": "budget", "target_active": 2.5, "normalize": False, "output_scale": 2.0, "balance_coef": 0.1,
            "z_coef": 0.01, "cut_rate": 0.3},
    },
    "budget_normalized": {"router": {"type": "budget", "target_active": 2.5, "rank_by": "logit"}},
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
ASSIGNED: dict[str, dict[str, Any]] = {
    "base_layers": {"router": {"type": "base_layers"}},
    "expert_choice": {"router": {"type": "expert_choice", "capacity_factor": 1.7}},
    "expert_choice_batch": {"router": {"type": "expert_choice", "over": "micro_batch", "cut_rate": 0.4}},
    "language_family": {"router": {"type": "language_family", "languages": {"b": 6, "a": 1}, "balance_coef": 0.1}},
    "nexus": {"router": {"type": "nexus", "domain_dim": 5, "projection_dim": 6}},
    "hash": {"router": {"type": "hash", "num_hashes": 2, "init_std": None}},
    "task": {"router": {"type": "task", "tasks": ["b", "a"], "balance_coef": 0.1}},
    "task_branches": {"router": {"type": "task", "branches": {"b": [6], "a": [0, 1, 5]}, "init_std": None}},
    "expert_threshold": {"router": {"type": "expert_choice", "training": "threshold", "warmup_steps": 1, "score": "sigmoid"}},
}
"""Chosen by experts, by assignment, by token id, by task, by domain."""
LAYERS: dict[str, dict[str, Any]] = {
    "some_sparse": {
        "router": {"type": "sigmoid_ste", "target_active": 3.0, "sparsity_coef": 0.1, "target_over": "layer"}, "layers": {"first": 1, "every": 2},
        "model__num_layers": 4,
    },
    "latent_and_shared": {
        "router": {"type": "topk", "top_k": 2}, "shared": {"dim": 10, "combine": "gate"}, "layers": [1], "model__num_kv_heads": None,
        "model__mla": {"q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3},
    },
    "unequal_and_residual": {
        "router": {"type": "sigmoid_ste", "ste": "sampled", "probe_rate": 0.5}, "num_experts": 12, "expert_dim": [6, 3, 0] * 4,
        "shared": {"dim": 5, "combine": "coefficient"},
    },
    "strata": {
        "router": {"type": "topk", "top_k": 2, "balance_over": "global_batch", "jitter": 0.1}, "strata": {"sizes": [4, 2, 2], "norm": True},
        "layers": [1],
    },
    "finedeep_below": {
        "router": {"type": "topk", "top_k": 2, "score": "sigmoid", "selection_bias": True, "balance_over": "global_batch"}, "layers": [1],
        "model__finedeep": {"sublayers": 2, "experts": 4},
    },
}  # fmt: skip
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
    if moe["router"]["type"] == "nexus":
        moe["router"]["embeddings"] = str(folder / "domains.safetensors")
    return make_config(folder, "exact", layout, run_dir=str(run_dir), model__moe=moe, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "a", seed=1)
    write_data(folder / "b", documents=20, seed=2)
    save_file({"domains": torch.randn(8, 5, generator=torch.Generator().manual_seed(0))}, folder / "domains.safetensors")
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


def test_layers_resume_under_another_layout(data, alone, tmp_path):
    """Every kind of layer: two steps under one layout, the third under another, equal three steps on one rank."""
    first, second = (1, 1, 2), (1, 2, 1)
    start([config_of(name, data, first, tmp_path / name) for name in LAYERS], "mixed", steps=2, save=True)
    found = start([config_of(name, data, second, tmp_path / name) for name in LAYERS], "mixed")
    for name, got in zip(LAYERS, found):
        (record,) = got["records"]
        np.testing.assert_allclose(record["loss"], alone[name]["records"][2]["loss"], rtol=1e-9, err_msg=name)
        for parameter, weight in alone[name]["weights"].items():
            np.testing.assert_allclose(got["weights"][parameter], weight, rtol=1e-9, atol=1e-11, err_msg=f"{name}: weight {parameter}")
