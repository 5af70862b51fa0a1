"""`moetrain bench train`: a config's own steps, taken apart; nothing is left where its run would be. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetrain.bench.train import KINDS, kind_of
from moetrain.cli import main
from moetrain.config import to_yaml
from moetrain.moe import dispatch
from tests.test_train import make_config, write_data


def test_a_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    config = make_config(tmp_path, "sampled", (1, 1, 1), train__steps=9)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    words = ["bench", "train", "--config", str(tmp_path / "c.yaml"), "--rounds", "2"]
    assert main([*words, "--train.lr", "1e-4", "--json", str(tmp_path / "t.json")]) == 0
    first, second, third = (t["rows"] for t in json.loads((tmp_path / "t.json").read_text())["tables"])
    assert [r["part"] for r in first] == ["data", "forward, backward, gradient norm", "optimizer, records", "step"]
    assert [r["kind"] for r in second] == [*KINDS, "rest"] and abs(sum(r["share"] for r in second) - 1) < 1e-9
    assert second[0]["ms"] > 0 and second[1]["ms"] > 0 and third
    assert not Path(config.run_dir).exists()
    capfd.readouterr()
    assert main([*words, "--train.steps", "4"]) == 2 and "train.steps (4): --rounds 2 takes 5 steps" in capfd.readouterr().err
    assert main([*words, "--train.stepz", "4"]) == 2 and "did you mean train.steps?" in capfd.readouterr().err


def test_kinds() -> None:
    names = {"aten::mm": "GEMM", "moetrain::experts_backward": "GEMM", "gloo:all_reduce": "communication", "aten::mul": "rest"}
    names["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] = "attention"
    # The dispatcher's own functions, by their classes, in which a rank waits for others.
    exchanges = (dispatch._SendRows, dispatch._ReturnRows, dispatch._SendWeights, dispatch._SendProbes)
    names |= {f"{function.__name__}Backward": "communication" for function in exchanges}
    assert {name: kind_of(name) for name in names} == names
