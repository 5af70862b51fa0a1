"""A file system that refuses costs checkpoints, not the run, and never the last whole one; too many in a row end it. (A real full tmpfs is in
tests/soak.py.)"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moetrain import checkpoint, metrics, train
from moetrain.checkpoint import find_damage, find_steps
from moetrain.config import LogConfig
from moetrain.metrics import Metrics, deterministic_fields, read_records
from tests.test_train import make_config, write_data


def events(folder: Path) -> list[tuple[Any, Any]]:
    return [(e["event"], e["step"]) for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines())]


class Disk:
    """Stands before the writing of tensors, and fails at the chosen calls, the first part of the file written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: set[int], number: int = errno.ENOSPC) -> None:
        self.calls, self.bad, self.number, self.write = 0, bad, number, checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self)
        monkeypatch.setattr(train.time, "sleep", lambda _: None)

    def __call__(self, tensors: Any, path: Path, metadata: Any) -> None:
        self.calls += 1
        if self.calls in self.bad:
            path.write_bytes(b"part")
            raise OSError(self.number, os.strerror(self.number), str(path))
        self.write(tensors, path, metadata=metadata)


@pytest.fixture
def make(tmp_path: Path) -> Any:
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    return lambda name, **more: make_config(
        tmp_path, "sampled", run_dir=str(tmp_path / name), train__steps=8, checkpoint={"every": 2, "keep_last": 9, **more}
    )


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_run_goes_on(asynchronous: bool, number: int, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third of four checkpoints fail, and the last at its first try: what was there stays, nothing half is left, each failure is told
    once, and the numbers are those of a run without."""
    train.run(make("whole"))
    Disk(monkeypatch, {2, 3, 4}, number)
    with pytest.warns(UserWarning, match=f"the checkpoint of step 4 could not be written: .*{os.strerror(number)}.*older ones are untouched"):
        train.run(make("run", asynchronous=asynchronous, max_failures=4))
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000008"]
    assert all(find_damage(p) is None for p in folder.iterdir())
    assert [step for kind, step in events(tmp_path / "run") if kind == "checkpoint_failed"] == [4, 6, 8]
    got, want = ([deterministic_fields(r) for r in read_records(tmp_path / name)] for name in ("run", "whole"))
    assert got == want


def test_too_many_in_a_row(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with one line and can go on from the last whole checkpoint."""
    Disk(monkeypatch, {2, 3})
    reason = r"2 checkpoints in a row .* \(checkpoint.max_failures\), the last .*No space"
    with pytest.warns(UserWarning), pytest.raises(OSError, match=reason) as caught:
        train.run(make("run", max_failures=2))
    assert "\n" not in str(caught.value) and find_steps(tmp_path / "run/checkpoints") == [2]
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))
    train.run(make("run", max_failures=2))
    assert ("resume", 2) in events(tmp_path / "run") and find_steps(tmp_path / "run/checkpoints")[-1] == 8
    # A good one in between: never two in a row.
    Disk(monkeypatch, {1, 3})
    with pytest.warns(UserWarning):
        train.run(make("other", max_failures=2))
    assert find_steps(tmp_path / "other/checkpoints") == [4, 8]


def test_metrics_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that can't be written, or in part, wait; none is lost or doubled. What a killed run lost is told by the next."""
    sink, write = Metrics(tmp_path, LogConfig(), resolved={}, console=False), os.write
    full = False

    def limited(handle: int, data: Any) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, bytes(data)[:7])

    monkeypatch.setattr(metrics.os, "write", limited)
    sink.log({"step": 1, "loss": 1.0})
    full = True
    with pytest.warns(UserWarning, match="metrics.jsonl: No space left on device; its lines wait in memory"):
        sink.log({"step": 2, "loss": 2.0})
    sink.log({"step": 3, "loss": 3.0})
    assert [r["step"] for r in read_records(tmp_path)] == [1]
    full = False
    sink.log({"step": 4, "loss": 4.0})
    sink.close()
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3, 4]
    monkeypatch.undo()
    Metrics(tmp_path, LogConfig(), resolved={}, resume_step=6, console=False).close()
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["first"], event["last"]) == ("metrics_lost", 5, 6)
