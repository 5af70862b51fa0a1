"""Every method's folder trains, on any number of ranks as on one, and exports to what transformers computes alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from moetrain.build import find_trained
from moetrain.config import Config, UpcycleConfig, config_from_dict, parse_yaml, to_dict, to_yaml
from moetrain.convert.huggingface import architecture, read_config, write_model
from moetrain.convert.upcycle import upcycle
from tests.convert.test_huggingface import load_ours, logits, random_tokens, save_stock
from tests.convert.test_merge import perturbed
from tests.test_train import start, write_data

SIGMOID = {"type": "sigmoid_ste", "init_std": 0.3}
# Name -> options; every one has 8 experts, or 4, so that four ranks can share them. (Eight slices of 48 have rows that transformers' own
# grouped product does not take: 6 numbers are no whole 16 bytes.)
METHODS = {
    "dsmoe_random": dict(method="dsmoe", split="random", router=SIGMOID),
    "dsmoe_scaled": dict(method="dsmoe", split="cluster", cluster_on="up", cluster_metric="cosine", weight_scaling=True, router=SIGMOID),
    "dsmoe_coactivation": dict(method="dsmoe", split="coactivation", calibration="a", calibration_seq_len=12, router=SIGMOID),
    "llama_moe_importance": dict(
        method="llama_moe", num_experts=4, split="importance", calibration="a", calibration_seq_len=12, calibration_sequences=16
    ),
    "copy": dict(method="copy", noise=0.05),
    "copy_sigmoid": dict(method="copy", noise=0.05, router={**SIGMOID, "rescale": "none"}),
    "drop": dict(method="drop", drop_shared=False),
    "virtual_groups": dict(method="virtual_groups", granularity=4),
    "virtual_groups_sigmoid": dict(method="virtual_groups", granularity=2, router=SIGMOID),
    "btx_ties": dict(method="btx", models=["m0", "m1", "m2", "m3"], merge="ties"),
    "dsmoe_shared": dict(method="dsmoe", shared_dim=16, calibration="a", calibration_seq_len=12, calibration_sequences=8, router=SIGMOID),
    "dsmoe_some": dict(method="dsmoe", layers=[1], router=SIGMOID),
    "btx_some": dict(method="btx", models=["m0", "m1", "m2", "m3"], layers={"first": -1}),
    "aggregate": dict(method="aggregate", dense="mixture", models=["mixture2"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Converted folders, beside the data that they are trained on."""
    place = tmp_path_factory.mktemp("methods")
    save_stock("llama", place / "dense")
    write_data(place / "a", seed=1)
    for i in range(4):
        perturbed(place / f"m{i}", i, place / "dense")
    save_stock("mixtral", place / "mixture")
    perturbed(place / "mixture2", 1, place / "mixture")
    for name, options in METHODS.items():
        options = {"dense": "dense", **options}
        for key in ("dense", "calibration"):
            options[key] = str(place / options[key]) if key in options else None
        options = {k: v for k, v in options.items() if v is not None}
        if "models" in options:
            options["models"] = [str(place / m) for m in options["models"]]
        tree = {"upcycle": {**options, "output": str(place / name), "seed": 3}}
        config = config_from_dict(tree)
        assert config_from_dict(parse_yaml(to_yaml(config), "resolved")) == config
        report = upcycle(config.upcycle)
        assert np.isfinite(report.receipt.logits) and np.isfinite(report.receipt.loss[1]), name
    return place


def training(place: Path, name: str, layout: tuple[int, int, int], run: Path) -> Config:
    world = layout[0] * layout[1] * layout[2]
    return config_from_dict(
        {
            "run_dir": str(run / name),
            "init_from": str(place / name),
            "model": to_dict(read_config(place / name)),
            "data": {"seq_len": 12, "train": [{"name": "a", "path": str(place / "a")}], "prefetch": 0},
            "parallel": dict(zip(("dp_replicate", "dp_shard", "ep"), layout)),
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4 // world, "lr": 1e-2, "dtype": "float64", "seed": 3},
            "log": {"every": 1000},
        }
    )


_single: dict[str, dict] = {}


def single(place: Path) -> dict[str, dict]:
    if not _single:
        configs = [training(place, name, (1, 1, 1), place / "runs") for name in METHODS]
        _single.update(zip(METHODS, start(configs, "mixed", steps=2, save=True)))
    return _single


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 1, 4), (1, 2, 2)], ids=str)
def test_ranks_train_it_as_one_rank(layout, place, tmp_path):
    """Losses and weights after two steps, float64."""
    want = single(place)
    found = start([training(place, name, layout, tmp_path) for name in METHODS], "mixed", steps=2)
    for name, got in zip(METHODS, found):
        for a, b in zip(got["records"], want[name]["records"]):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-9, err_msg=name)
            assert np.isfinite(a["loss"]) and a["grad_norm"] > 0 and not a["skipped"]
        for key, weight in want[name]["weights"].items():
            np.testing.assert_allclose(got["weights"][key], weight, rtol=1e-9, atol=1e-9, err_msg=f"{name} {key}")


@pytest.mark.parametrize("name", METHODS)
def test_trained_exports(name, place, tmp_path):
    """Trained two steps, exported, read by transformers and by us: the same logits."""
    single(place)
    trained = find_trained(training(place, name, (1, 1, 1), place / "runs"))
    assert "step-00000002" in trained.source
    write_model(tmp_path / "out", trained.config, trained.tensors, dtype=torch.float32)
    kind = architecture(trained.config)
    stock = trained.config.moe.router.type == "topk" and trained.config.moe.router.normalize and trained.config.num_moe_layers == 2
    assert (kind != "moetrain") == stock
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ours = logits(load_ours(tmp_path / "out"), random_tokens())
    assert (logits(exported, random_tokens()) - ours).abs().max() <= 1e-4 * ours.abs().max()


def test_dense_again_trains(place, tmp_path):
    folder = tmp_path / "again"
    upcycle(UpcycleConfig(dense=str(place / "dsmoe_random"), output=str(folder), method="to_dense"))
    write_data(tmp_path / "a", seed=1)
    (got,) = start([training(tmp_path, "again", (1, 1, 1), tmp_path / "runs")], "mixed", steps=1)
    assert np.isfinite(got["records"][0]["loss"]) and read_config(folder).moe is None
