"""The look at all ranks: what is found names host and rank, what is sound is silent, and every pair of nodes is timed once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moetrain.cluster import preflight
from moetrain.config import config_from_dict, to_yaml
from moetrain.train import Trainer
from tests.distributed import run
from tests.test_train import make_config, write_data

ROOT = Path(__file__).resolve().parents[2]


def fact(host: str, node: int, **software: str) -> dict[str, Any]:
    return {"host": host, "node": node, "software": {"torch": "2.13.0", "extension": "abc", **software}, "gpu": None, "cores": 4}


def test_software_that_differs() -> None:
    """Few against many; every value is one line, with all its ranks."""
    facts = [fact("a", 0), fact("a", 0), fact("b", 1, torch="2.12.0"), fact("b", 1, torch="2.12.0", extension="none"), *[fact("c", 2)] * 3]
    assert preflight.software_problems(facts[:2]) == []
    assert preflight.software_problems(facts) == [
        "host b ranks 2-3: torch is 2.12.0, but 2.13.0 on 5 of 7 ranks",
        "host b rank 3: extension is none, but abc on 6 of 7 ranks",
    ]


def test_this_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source shows although the version is the same."""
    here = preflight.software()
    assert here["torch"] == torch.__version__ and len(here["extension"]) == len(here["moetrain's sources"]) == 12
    shutil.copytree(ROOT / "moetrain", tmp_path / "moetrain", ignore=shutil.ignore_patterns("__pycache__", "hf"))
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "moetrain/cluster/preflight.py"))
    copy = preflight.software()["moetrain's sources"]
    (tmp_path / "moetrain/train.py").write_text("# other\n")
    assert preflight.software()["moetrain's sources"] != copy
    (tmp_path / "moetrain/_C.abi3.so").unlink()
    assert preflight.software()["extension"] == "none"


def test_ranks_by_text() -> None:
    facts = [fact("a", 0), fact("a", 0), fact("b", 1), fact("b", 1), fact("b", 1)]
    assert preflight.by_text(facts, [None] * 5) == []
    assert preflight.by_text(facts, ["x", None, "x", None, "x"]) == ["host a rank 0, host b ranks 2,4: x"]
    assert preflight.by_text(facts, [None, "y", "x", "x", "x"]) == ["host a rank 1: y", "host b ranks 2-4: x"]


def test_cores() -> None:
    """More ranks than cores on a node is what Slurm's default of one core per task makes."""
    facts = [{**fact("a", 0), "cores": 1}, {**fact("a", 0), "cores": 1}, {**fact("b", 1), "cores": 2}, {**fact("b", 1), "cores": 2}]
    (line,) = preflight.core_warnings(facts)
    assert line.startswith("host a ranks 0-1: 2 ranks share 1 core; ask for more")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_pair_once(count: int) -> None:
    """In rounds in which no node is in two pairs."""
    rounds = preflight.rounds([n for n in range(count) for _ in range(2)])
    pairs = [pair for found in rounds for pair in found]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all(len({n for pair in found for n in pair}) == 2 * len(found) for found in rounds)
    assert len(rounds) <= count


def test_slow_pairs() -> None:
    """A node that is slow to most others is named instead of its pairs; one pair alone can't be slow."""
    hosts = {n: f"h{n}" for n in range(5)}
    even = {(a, b): 1.0 for a in range(5) for b in range(a + 1, 5)}
    assert preflight.slow_pairs(even, hosts) == [] == preflight.slow_pairs({(0, 1): 9.0}, hosts)
    assert preflight.slow_pairs({**even, (1, 3): 7.0}, hosts) == [
        "host h1 (node 1) and host h3 (node 3): their exchange takes 7.0 times the median of all pairs"
    ]
    assert preflight.slow_pairs({pair: 4.0 if 2 in pair else 1.0 for pair in even}, hosts) == [
        "host h2 (node 2): exchanges with 4 of 4 nodes take over 3 times the median"
    ]
    assert preflight.merge([{(0, 1): 1.0}, {(0, 1): 3.0, (0, 2): 2.0}, {}]) == {(0, 1): 3.0, (0, 2): 2.0}


def _exchange(nodes: list[int]) -> list[tuple[int, int]]:
    rank = torch.distributed.get_rank()
    times = preflight.exchange_times(nodes, rank, torch.device("cpu"))
    assert all(0 < seconds < 60 for seconds in times.values())
    return sorted(times)


def test_exchange() -> None:
    """Real ranks, of two nodes with two and of one with one: each is in its own node's pairs, none waits for another."""
    assert run(_exchange, 5, [0, 0, 1, 1, 2]) == [[(0, 1), (0, 2)]] * 2 + [[(0, 1), (1, 2)]] * 2 + [[(0, 2), (1, 2)]]


def test_checkpoint_size_is_what_is_written(tmp_path: Path) -> None:
    """The estimate against a checkpoint on disk, in both precisions, within the files' headers."""
    write_data(tmp_path / "a")
    write_data(tmp_path / "b")
    for dtype in ("float32", "float64"):
        config = make_config(tmp_path, run_dir=str(tmp_path / dtype), train__dtype=dtype, train__schedule__warmup_steps=0, train__steps=1)
        trainer = Trainer(config, console=False)
        trainer.train()
        trainer.close()
        (folder,) = (tmp_path / dtype / "checkpoints").iterdir()
        written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        estimate = preflight.checkpoint_bytes(config.model, config.train)
        assert 0 <= written - estimate < 20_000, (written, estimate)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1), ({"every": 10}, 3), ({"every": 10, "keep_last": 5}, 6), ({"every": 10, "keep_every": 20}, 3 + 5), ({"keep_last": 5}, 1)],
)
def test_room_for_all_checkpoints(options: dict[str, int], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those kept and the one being written; what is there already counts; the line says how much is missing and what would help."""
    config = make_config(tmp_path, train__steps=100, run_dir=str(tmp_path), checkpoint=options)
    size = preflight.checkpoint_bytes(config.model, config.train)
    assert preflight.needed_bytes(config) == count * size
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(count * size))
    assert preflight.disk_problem(config) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(count * size - 100))
    assert "GiB free, the checkpoints need" in preflight.disk_problem(config) and "checkpoint.keep_last" in preflight.disk_problem(config)
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000010/x").write_bytes(b"x" * 100)
    assert preflight.disk_problem(config) is None


def test_gpu_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi counts; a machine without it has nothing to say, and a CPU has no GPU that could be broken."""
    assert preflight.gpu_problem(torch.device("cpu")) is None
    gpu = SimpleNamespace(uuid="1234")
    for said, problem in (("0\n", None), ("[N/A]\n", None), ("3\n", "GPU GPU-1234 has 3 uncorrected memory errors; reset or replace it")):
        monkeypatch.setattr(subprocess, "run", lambda *_, said=said, **__: SimpleNamespace(stdout=said))
        assert preflight.ecc_problem(gpu) == problem
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert preflight.ecc_problem(gpu) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sound_gpu() -> None:
    assert preflight.gpu_problem(torch.device("cuda", 0)) is None


def torchrun(place: Path, ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=180)


def test_command(tmp_path: Path) -> None:
    """`moetrain doctor --ranks`, alone and under torchrun; a run_dir that can't be written ends it with one line, not one for each rank."""
    (tmp_path / "c.yaml").write_text(to_yaml(make_config(tmp_path, run_dir="run")))
    done = torchrun(tmp_path, 1, "-m", "moetrain", "doctor", "--ranks", "--config", "c.yaml")
    assert done.returncode == 0 and "preflight: good: 1 ranks on 1 nodes; all have moetrain" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run").is_dir() and not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    done = torchrun(tmp_path, 2, "-m", "moetrain", "doctor", "--ranks", "--config", "c.yaml", "--run_dir", "file/run")
    problems = [line for line in done.stderr.splitlines() if "preflight" in line]
    assert done.returncode == 1 and len(problems) == 1, done.stdout + done.stderr
    assert problems[0].startswith("preflight: problem: host ") and "rank 0: run_dir file/run can't be written: Not a directory" in problems[0]


# Each rank changes into a folder of its own before it looks, as if nothing were shared.
_APART = """
import os, sys
os.chdir(os.environ["RANK"])
from moetrain.cluster import preflight
from moetrain.config import load_config
preflight.folder_problem.__defaults__ = (0.5,)  # patience
sys.exit(preflight.main(load_config(None, [("run_dir", "run")])))
"""


def test_folders_that_are_not_shared(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (tmp_path / "apart.py").write_text(_APART)
    done = torchrun(tmp_path, 2, "apart.py")
    problems = [line for line in done.stderr.splitlines() if "preflight" in line]
    assert done.returncode == 1 and len(problems) == 1 and "rank 1: run_dir run is not the folder that rank 0 sees" in problems[0], done.stderr
    assert not list((tmp_path / "0/run").iterdir())


def test_config_without_a_model_has_no_checkpoints(tmp_path: Path) -> None:
    assert preflight.disk_problem(config_from_dict({"run_dir": str(tmp_path)})) is None
