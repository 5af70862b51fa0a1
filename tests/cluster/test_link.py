"""The only link between two hosts is cut in the middle of an all-to-all of a run that `moetrain submit` started on both: within the configured limit
both sides end with a message that names rank and collective; when the link is back the launchers start the ranks again from the last checkpoint, and
the numbers are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moetrain import submit
from moetrain.checkpoint import find_steps, read_full
from moetrain.cli import main
from moetrain.metrics import deterministic_fields, read_records
from moetrain.preempt import read_status
from tests import netns
from tests.test_submit import SUBMIT, Place, steps, until

ROOT = Path(__file__).resolve().parents[2]
STEPS, TIMEOUT = 36, 6
COLLECTIVES = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")

pytestmark = pytest.mark.skipif(netns.missing() is not None, reason=str(netns.missing()))


def doing(place: Place, rank: int) -> dict[str, object]:
    try:
        return json.loads((place.folder / f"run/watchdog/rank{rank:05d}.json").read_text())
    except (OSError, ValueError):
        return {}


def test_cut_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{place.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place.config(
        layout=(1, 1, 2), train__steps=STEPS, checkpoint={"every": 10}, parallel__timeout_seconds=TIMEOUT, parallel__exchange="collective",
        watchdog={"start_seconds": 200.0, "step_seconds": 60.0, "checkpoint_seconds": 60.0},
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moetrain"]
    whole = subprocess.run([*command, "train", "--config", "c.yaml", "--run_dir", "whole"], capture_output=True, text=True, timeout=400)
    assert whole.returncode == 0, whole.stderr
    with netns.Hosts() as hosts:
        place.program("ssh", hosts.ssh())
        place.cluster(
            hosts={"hosts": ["n0", "n1"], "port": 29511}, preflight=False, environment={"GLOO_SOCKET_IFNAME": netns.INTERFACE}, grace_seconds=5,
        )  # fmt: skip
        log = tmp_path / "run.job/job.log"
        assert main(SUBMIT) == 0
        until(lambda: steps(tmp_path / "run") > 13, "steps", log)
        # One rank is stopped until the other is known to wait for it in an all-to-all.
        pid = int(str(doing(place, 1)["pid"]))
        for _ in range(200):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(4 * TIMEOUT / 20)
            if str(doing(place, 0).get("where")).startswith("all_to_all"):
                break
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
        hosts.cut()
        cut = time.monotonic()
        os.kill(pid, signal.SIGCONT)
        step, saved = steps(tmp_path / "run"), find_steps(tmp_path / "run/checkpoints")[-1]

        def told(rank: int) -> list[str]:
            return [line for line in log.read_text().splitlines() if line.startswith(f"moetrain rank {rank}: error: step ")]

        until(lambda: told(0) and told(1), "message of both sides", log)
        # A collective may begin anew once after the cut: what was sent already counts as done.
        assert time.monotonic() - cut < 60, "far beyond the limit of a collective"
        assert re.search(r"all_to_all_single \(moe/exchange.py:|moe/exchange.py:[0-9]+, all_to_all\b", told(0)[0]), told(0)
        for rank in range(2):
            # By its own limit, or by the word of the other, which was first by a moment.
            assert f"step {step + 1}, forward and backward: " in told(rank)[0] and any(x in told(rank)[0] for x in COLLECTIVES), told(rank)
            assert " failed: " in told(rank)[0] or "another rank has ended the run" in told(rank)[0], told(rank)
        hosts.mend()
        until(lambda: (read_status(tmp_path / "run") or {}).get("state") == "finished", "end", log)
        record = json.loads((tmp_path / "run.job/job.json").read_text())
        until(lambda: submit._ask_process(record)[0] is False, "end of the job", log)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert {e["rank"] for e in events if e["event"] in ("collective_failed", "peer_ended")} == {0, 1}
    assert saved <= min(e["step"] for e in events if e["event"] == "resume") <= step
    numbers = [[deterministic_fields(r) for r in read_records(tmp_path / name)] for name in ("run", "whole")]
    assert numbers[0] == numbers[1] and len(numbers[0]) == STEPS
    weights = [dict(read_full(tmp_path / name / f"checkpoints/step-{STEPS:08d}")) for name in ("run", "whole")]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
