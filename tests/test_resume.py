"""A run that is killed again and again ends with the same numbers as one that never was: every loss, gradient norm, route statistic and
controller state of every step, bit for bit.

SIGKILL falls at moments drawn from a fixed seed: while the program starts, within a step, within a save (one is under way nearly always: every
second step is saved, by a thread). It takes all processes at once or, of two ranks, one alone, after which the other and the launcher must end
by themselves. The router draws probes at random and a controller holds its budget, so lost state would show. MOETRAIN_KILLS=20 makes the
thorough run of it; the default is 2 kills for each kind of start.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moetrain.config import to_yaml
from moetrain.metrics import deterministic_fields, read_records
from tests.test_train import make_config, write_data

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("MOETRAIN_KILLS", 2))
STEPS = max(60, 5 * KILLS)
LAUNCH = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a launcher's processes through Linux's /proc")


class Run:
    """One start of `moetrain train`, with all processes that come of it."""

    def __init__(self, config: Path, ranks: int, command: Sequence[str] | None = None) -> None:
        """command: instead of `moetrain train` under LAUNCH."""
        # Workers have sessions of their own, so that no process group holds them all; what they do inherit is the environment.
        self.mark = f"MOETRAIN_TEST_RUN={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = open(config.with_suffix(".log"), "ab+")
        self.process = subprocess.Popen(
            [*(command or [*LAUNCH[ranks], "-m", "moetrain"]), "train", "--config", str(config)],
            env=environment, stdout=self.log, stderr=self.log, cwd=config.parent,
        )  # fmt: skip

    def processes(self, mark: str = "") -> list[int]:
        """Those of this start, or of these the ones that have `mark` in their environment too."""
        wanted = {self.mark.encode(), mark.encode() or self.mark.encode()}
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                        found.append(int(folder.name))
                except OSError:  # ended meanwhile, or somebody else's
                    pass
        return found

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one rank; the launcher must see it and end the others."""
        (pid,) = self.processes(f"RANK={rank}")
        os.kill(pid, signal.SIGKILL)
        try:
            assert self.process.wait(60) != 0
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to all of them, again for those that were being started."""
        while found := self.processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.process.poll()
        self.process.wait()
        self.log.close()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def finish(self, seconds: float = 120) -> None:
        try:
            assert self.process.wait(seconds) == 0, self.output()[-4000:]
        finally:
            self.kill()


def last_step(metrics: Path) -> int:
    """As many steps as there are whole lines."""
    try:
        return metrics.read_bytes().count(b"\n")
    except OSError:
        return 0


def inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [deterministic_fields(record) for record in read_records(run_dir)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_continues_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    changes = dict(
        train__steps=STEPS, train__dtype="float32", checkpoint={"every": 2}, data__prefetch=2,
        data__eval=[{"name": "a", "path": str(tmp_path / "a")}], train__eval_every=16, train__eval_sequences=8,
    )  # fmt: skip
    files = {}
    for name in ("whole", "killed"):
        config = make_config(tmp_path, "sampled", (1, 1, ranks), run_dir=str(tmp_path / name), model__moe__router__target_active=2.5, **changes)
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(to_yaml(config))

    began = time.monotonic()
    run = Run(files["whole"], ranks)
    while inode(tmp_path / "whole" / "metrics.jsonl") is None and not run.ended():
        time.sleep(0.005)
    start_seconds = time.monotonic() - began
    run.finish()
    want = numbers(tmp_path / "whole")
    assert [r["step"] for r in want] == list(range(1, STEPS + 1))
    coefficients = [r["sparsity_coef"] for r in want]
    assert len(set(coefficients)) > STEPS // 2, "the controller must move, or the test would not see its loss"
    assert any(r["moe"]["probe_share"][0] > 0 for r in want)
    step_seconds = sorted(r["step_s"] for r in read_records(tmp_path / "whole"))[STEPS // 2]

    generator = random.Random(ranks)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    # The steps at which kills fall, ascending; every fourth kill falls while the program starts.
    targets = sorted(generator.randrange(1, STEPS - 8) for _ in range(KILLS))
    moments = []
    for i, target in enumerate(targets):
        before = inode(metrics)
        run = Run(files["killed"], ranks)
        if i % 4 == 1:
            time.sleep(generator.uniform(0, start_seconds))
        else:
            # The file is replaced when a run goes on, which tells this start's lines from those of the one before.
            while (inode(metrics) == before or last_step(metrics) < target) and not run.ended():
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 2 * step_seconds))
        if run.ended():
            assert run.process.returncode == 0, run.output()[-4000:]
            break  # this machine is so busy that the run was over before the kill
        alone = ranks > 1 and i % 4 == 3
        if alone:
            run.kill_rank(generator.randrange(ranks))
        else:
            run.kill()
        torn = len(list((tmp_path / "killed").glob("checkpoints/*.tmp")))
        moments.append(f"{'start' if i % 4 == 1 else 'step'} {last_step(metrics)}{' (one rank)' if alone else ''}{' in a save' if torn else ''}")
    run = Run(files["killed"], ranks)
    run.finish()
    print(f"ranks {ranks}: killed at", "; ".join(moments))
    assert len(moments) >= KILLS / 2

    got = numbers(tmp_path / "killed")
    for a, b in zip(got, want):
        assert a == b, f"step {b['step']} differs; killed at {moments}"
    assert len(got) == len(want)
    # It did go on and not begin anew, and it left nothing behind.
    events = (tmp_path / "killed" / "events.jsonl").read_text()
    assert '"resume"' in events
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()) == [f"step-{STEPS - 2:08d}", f"step-{STEPS:08d}"]
