"""A signal to one rank or all makes every rank save at the same step and end well, twice sent or not, and the run goes on with equal numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain import preempt
from moetrain.checkpoint import find_damage, find_steps
from moetrain.config import to_yaml
from moetrain.metrics import deterministic_fields, read_records
from tests.distributed import run
from tests.test_train import make_config, write_data

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tests note signals of their own, and leave this process as it was."""
    monkeypatch.setattr(preempt, "_noted", [])
    before = {name: signal.getsignal(getattr(signal, f"SIG{name}")) for name in preempt.SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, f"SIG{name}"), handler)


def test_listen() -> None:
    """A signal asked for is noted and does nothing else; one no longer asked for has its default again; strangers' handlers stay."""
    mine = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGHUP, mine)
    preempt.listen(["TERM", "USR2"])
    assert preempt.agreed(None, CPU) is None
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGUSR2)
    assert preempt.agreed(None, CPU) == "USR2"
    preempt.listen(["USR1"])
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL and signal.getsignal(signal.SIGHUP) is mine
    # Launchers ignore what is meant for their workers, who inherit that.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    preempt.listen(["USR1"])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert preempt.agreed(None, CPU) == "USR2" and preempt._noted == [signal.SIGUSR2, signal.SIGUSR1]


def _one_is_told(told: int) -> list[str | None]:
    preempt._noted.clear()
    preempt.listen(["TERM"])
    before = preempt.agreed(dist.group.WORLD, CPU)
    if dist.get_rank() == told:
        os.kill(os.getpid(), signal.SIGTERM)
    return [before, preempt.agreed(dist.group.WORLD, CPU)]


def test_all_ranks_agree() -> None:
    """One rank is told, all know; before, none does."""
    assert run(_one_is_told, 3, 1) == [[None, "TERM"]] * 3


def test_reporting(tmp_path: Path) -> None:
    """status.json says how a run ended; afterwards a signal can't undo it; only rank 0 writes."""
    trainer = SimpleNamespace(rank=0, step=7, stopped=None, group=None, device=CPU)
    preempt.listen(["TERM"])
    with preempt.reporting(tmp_path, trainer):
        assert preempt.read_status(tmp_path)["state"] == "running"
        trainer.step = 9
    found = preempt.read_status(tmp_path)
    assert (found["state"], found["step"], found["steps_done"]) == ("finished", 9, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN

    with preempt.reporting(tmp_path, trainer):
        trainer.stopped = "USR2"
    assert (tmp_path / "status.json").read_text().startswith('{"state": "preempted", "step": 9, "steps_done": 0, "signal": "USR2", ')
    with pytest.raises(ValueError, match="bad"), preempt.reporting(tmp_path, trainer):
        raise ValueError("bad\nand worse")
    assert preempt.read_status(tmp_path)["state"] == "failed" and preempt.read_status(tmp_path)["error"] == "ValueError: bad"
    trainer.rank = 1
    with preempt.reporting(tmp_path, trainer):
        pass
    assert preempt.read_status(tmp_path)["state"] == "failed" and [p.name for p in tmp_path.iterdir()] == ["status.json"]

    assert preempt.read_status(tmp_path / "none") is None
    (tmp_path / "status.json").write_text("{")
    assert preempt.read_status(tmp_path) is None


def start(config: Path, ranks: int) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, "-m", "moetrain", "train", "--config", str(config)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def steps(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def until_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    while steps(run_dir) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.mark.parametrize("ranks", [1, 2])
def test_signalled_run_goes_on_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    """USR1, as configured, to one process; SIGTERM to torchrun, which hands it on. Signals go on coming all through the save. The checkpoint is of
    the step that status.json says and whole, nothing else is lost, and the run that goes on has the numbers of one that nobody disturbed."""
    count = 60
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    sent = signal.SIGUSR1 if ranks == 1 else signal.SIGTERM
    files = {}
    for name in ("whole", "told"):
        config = make_config(
            tmp_path, "sampled", (1, 1, ranks), run_dir=str(tmp_path / name), train__steps=count, train__dtype="float32",
            checkpoint={"every": 7, "signals": ["USR1", "TERM"]},
        )  # fmt: skip
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(to_yaml(config))
    process = start(files["whole"], ranks)
    assert process.wait(600) == 0, process.communicate()[0]

    process = start(files["told"], ranks)
    until_step(process, tmp_path / "told", 12)
    while process.poll() is None and (ranks == 1 or (preempt.read_status(tmp_path / "told") or {}).get("state") == "running"):
        process.send_signal(sent)
        time.sleep(0.002 if ranks == 1 else 0.05)
    said = process.communicate(timeout=600)[0]
    status = preempt.read_status(tmp_path / "told")
    # torchrun that was told to end says so by its own status, or dies of a signal that comes while it ends; the ranks ended well.
    assert process.returncode in ((0,) if ranks == 1 else (1, -signal.SIGTERM)), said
    assert status["state"] == "preempted" and status["signal"] == sent.name[3:] and 12 <= status["step"] < count, said
    assert f"{sent.name[3:]}: saved at step {status['step']} of {count}" in said
    checkpoints = tmp_path / "told" / "checkpoints"
    assert find_steps(checkpoints)[-1] == status["step"] and find_damage(checkpoints / f"step-{status['step']:08d}") is None
    assert steps(tmp_path / "told") == status["step"]

    process = start(files["told"], ranks)
    assert process.wait(600) == 0, process.communicate()[0]
    numbers = {name: [deterministic_fields(r) for r in read_records(tmp_path / name)] for name in files}
    assert numbers["told"] == numbers["whole"] and len(numbers["whole"]) == count
    events = [json.loads(line) for line in (tmp_path / "told" / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e.get("signal")) for e in events if e["event"] == "preempted"] == [(status["step"], sent.name[3:])]
    # The step at which the run ended was not saved a second time, should it have been one of the seventh.
    saved = [e["step"] for e in events if e["event"] == "checkpoint"]
    assert len(saved) == len(set(saved))
    assert preempt.read_status(tmp_path / "told")["state"] == "finished"


def test_told_before_the_first_step(tmp_path: Path) -> None:
    """A signal while the program starts is not lost: no step is made and no checkpoint written, and status.json says so."""
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    config = make_config(tmp_path, "sampled", run_dir=str(tmp_path / "run"), train__steps=100_000)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    process = start(tmp_path / "c.yaml", 1)
    # Its handler is there when the signal is caught (SigCgt), long before torch is imported.
    caught = 0
    while not caught >> (signal.SIGUSR2 - 1) & 1:
        assert process.poll() is None, process.communicate()[0]
        text = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(text.split("SigCgt:")[1].split()[0], 16)
    process.send_signal(signal.SIGUSR2)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    status = preempt.read_status(tmp_path / "run")
    assert (status["state"], status["step"], status["steps_done"], status["signal"]) == ("preempted", 0, 0, "USR2")
    assert not (tmp_path / "run/checkpoints").exists()
