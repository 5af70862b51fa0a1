"""One run at a time in a folder; starts from the same checkpoint are counted, and one too many is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import restarts, train
from moetrain.config import ConfigError
from moetrain.preempt import read_status
from tests.test_train import make_config, write_data


def test_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only starts that a launcher or scheduler may have made; anew from each new checkpoint; a torn file begins anew."""
    for name in restarts._AGAIN:
        monkeypatch.delenv(name, raising=False)
    assert restarts.count_start(tmp_path, 0) == 0 and not (tmp_path / "starts.json").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [restarts.count_start(tmp_path, step) for step in (0, 0, 0, 20, 20, 10, 20)] == [1, 2, 3, 1, 2, 1, 1]
    (tmp_path / "starts.json").write_text("{")
    assert restarts.count_start(tmp_path, 20) == 1


def test_a_run_that_does_not_come_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails in each start (its data is cut), and after max_starts of them it says so in one line, an event and status.json; a run that
    is done may be started as often as one likes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    config = make_config(tmp_path, "exact", watchdog={"max_starts": 2})
    monkeypatch.setattr(train, "build_model", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            train.run(config)
        assert read_status(tmp_path / "run")["error"] == "ValueError: broken" and "retry" not in read_status(tmp_path / "run")
    with pytest.raises(ConfigError, match="started 2 times in a row from step 0 without a new checkpoint") as caught:
        train.run(config)
    assert "\n" not in str(caught.value) and read_status(tmp_path / "run")["retry"] is False
    (event,) = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["starts"]) == ("no_progress", 0, 2)
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    (tmp_path / "run/starts.json").unlink()
    for _ in range(4):
        train.run(config)
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A second run waits for the first one's end, says for whom, and gives up; a process that was killed holds nothing."""
    code = f"import sys, time\nfrom moetrain.restarts import alone\nwith alone({str(tmp_path)!r}):\n    print(1, flush=True)\n    time.sleep(600)"
    root = str(Path(__file__).resolve().parents[1])
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    monkeypatch.setattr(restarts, "_PATIENCE", 0.3)
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} of "), restarts.alone(tmp_path):
        pass
    assert f"is in use by process {holder.pid} of " in capfd.readouterr().err
    holder.kill()
    holder.communicate()
    with restarts.alone(tmp_path):
        pass
    with pytest.raises(ConfigError, match="can't be made a folder"), restarts.alone(tmp_path / "lock" / "inside"):
        pass
