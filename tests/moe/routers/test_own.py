"""A router of a user's own, the one printed in docs/routers.md: it is short, it trains from the command line, and it is the same on two ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import run
from tests.test_train import make_config, rank_main, write_data

DOCS = Path(__file__).resolve().parents[3] / "docs/routers.md"


@pytest.fixture
def file(tmp_path) -> Path:
    (text,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "min_p.py"
    path.write_text(text)
    return path


def test_it_is_short(file):
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) < 40


def moetrain(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "moetrain", *arguments], capture_output=True, text=True, timeout=120)


def test_the_command_line_trains_it(file, tmp_path):
    write_data(tmp_path / "a")
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "vocab_size": 50, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64,
            "moe": {"num_experts": 4, "expert_dim": 6, "router": {"type": "min_p", "share": 0.3, "init_std": 0.7}},
        },
        "data": {"seq_len": 12, "train": [{"name": "a", "path": str(tmp_path / "a")}], "eval": [{"name": "a", "path": str(tmp_path / "a")}]},
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 4, "activation_checkpointing": "block"},
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree))
    refused = moetrain("train", "--config", str(config))
    assert refused.returncode == 2 and "model.moe.router.type: found 'min_p'; one of sigmoid_ste, " in refused.stderr
    done = moetrain("train", "--import", str(file), "--config", str(config))
    assert done.returncode == 0, done.stderr
    active = [json.loads(line)["moe"]["active"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(active) == 3 and all(1 <= a < 4 for a in active[0])
    done = moetrain("eval", f"--import={file}", "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    refused = moetrain("export", "--import", str(file), "--run_dir", str(tmp_path / "run"), "--export.output", str(tmp_path / "hf"))
    assert refused.returncode == 2 and "router min_p" in refused.stderr and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("given", "message"), [("nowhere.py", "is no file"), ("notes.txt", "is no Python file")])
def test_what_cannot_be_imported_is_said(given, message, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused = moetrain("config", "--import", str(tmp_path / given))
    assert refused.returncode == 2 and message in refused.stderr and len(refused.stderr.splitlines()) == 1


def _two_ranks(file: str, data: str, folder: str) -> dict:
    return rank_main(_config(file, data, folder, (1, 1, 2)), "mixed")


def _config(file: str, data: str, folder: str, layout: tuple[int, int, int]):
    from moetrain.cli import _import_files

    assert _import_files(["--import", file, "--x"]) == ["--x"]
    return make_config(Path(data), "topk", layout, run_dir=folder, model__moe__router={"type": "min_p", "share": 0.3, "init_std": 0.7})


def test_two_ranks_equal_one(file, tmp_path):
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", seed=2)
    # In processes of their own: a router that this one came to know would stay known to the tests that follow.
    (want,) = run(_one_rank, 1, str(file), str(tmp_path), str(tmp_path / "one"))
    got = run(_two_ranks, 2, str(file), str(tmp_path), str(tmp_path / "two"))[0]
    for mine, theirs in zip(got["records"], want["records"], strict=True):
        np.testing.assert_allclose([mine["loss"], mine["grad_norm"]], [theirs["loss"], theirs["grad_norm"]], rtol=1e-9)
    for name, weight in want["weights"].items():
        np.testing.assert_allclose(got["weights"][name], weight, rtol=1e-9, atol=1e-11, err_msg=name)


def _one_rank(file: str, data: str, folder: str) -> dict:
    return rank_main(_config(file, data, folder, (1, 1, 1)), "mixed")
