"""Runs that `moetrain submit` hands to a real Slurm of two nodes, with the experts spread over both, and what clusters do to them.

Cases: A the notice before the time limit; B `scontrol requeue`; C the same notice without the script's protection; D `scancel`; E the daemon of a
node dies; E2 the node dies with all that runs on it. What comes back must have, step by step and bit by bit, the numbers of the run that nobody
disturbed. All paths hold what a careless script would run as shell.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint import find_damage
from moetrain.config import to_yaml
from moetrain.metrics import deterministic_fields, read_records
from moetrain.preempt import read_status
from tests import slurm
from tests.test_train import make_config, write_data

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100
NOTICE = 150  # seconds

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))


def has_come(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process, or has ended it: Slurm may let it go on to see the signal."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", text, re.MULTILINE))


class Site:
    """The cluster, and a folder from which runs are submitted."""

    def __init__(self, cluster: slurm.Slurm, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(parents=True)
        write_data(folder / "a", seed=1)
        write_data(folder / "b", documents=20, seed=2)

    def moetrain(self, *words: str, status: int = 0) -> str:
        environment = {**os.environ, **self.cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "moetrain", *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, run: str, *words: str, ranks: int = 1, preflight: bool = False, **options: Any) -> int:
        """A run of so many ranks on each of the two nodes; returns the job's number."""
        self.write(run, ranks, preflight, options)
        said = self.moetrain("submit", f"{run}.yaml", "--cluster", f"{run}.cluster.yaml", *words)
        return int(re.search(r"Slurm job (\d+)", said)[1])

    def write(self, run: str, ranks: int, preflight: bool, options: dict[str, Any]) -> None:
        config = make_config(
            self.folder, "sampled", (1, 1, 2 * ranks), run_dir=run, train__steps=STEPS, train__dtype="float32", checkpoint={"every": 10},
            data__prefetch=2, model__moe__router__target_active=2.5,
        )  # fmt: skip
        # Relative paths: they start where the run is submitted.
        (self.folder / f"{run}.yaml").write_text(to_yaml(config).replace(f"{self.folder}/", ""))
        block = {"nodes": 2, "processes_per_node": ranks, "preflight": preflight, "slurm": {"cpus_per_node": 2, **options}}
        (self.folder / f"{run}.cluster.yaml").write_text(json.dumps({"cluster": block}))

    def steps(self, run: str) -> int:
        try:
            return (self.folder / run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def numbers(self, run: str) -> list[dict[str, Any]]:
        return [deterministic_fields(record) for record in read_records(self.folder / run)]

    def events(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "events.jsonl").read_text().splitlines()]

    def until(self, true: Callable[[], object], what: str, run: str, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"no {what} in {seconds} s\n{self.log(run)}\n{self.cluster.logs()}"
            time.sleep(0.1)

    def until_step(self, step: int, run: str) -> None:
        self.until(lambda: self.steps(run) >= step, f"step {step}", run)

    def until_state(self, job: int, states: set[str], run: str) -> None:
        self.until(lambda: self.cluster.job(job).get("JobState") in states, f"state {states}", run)

    def log(self, run: str) -> str:
        return "\n".join(p.read_text(errors="replace")[-6000:] for p in (self.folder / f"{run}.job").glob("slurm-*.log"))

    def checkpoints(self, run: str) -> list[Path]:
        return sorted((self.folder / run / "checkpoints").glob("step-????????"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    cluster = slurm.Slurm(tmp_path_factory.mktemp("slurm"), node_timeout=15)
    try:
        cluster.start()
        site = Site(cluster, tmp_path_factory.mktemp("site") / "it's $(touch HACKED) `touch HACKED` \"%j\" #; touch HACKED &")
        yield site
        hacked = [p for folder in (site.folder, ROOT, Path.home()) for p in folder.glob("*HACKED") if p.name == "HACKED"]
        assert not hacked, f"a name was run as shell: {hacked}"
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> list[dict[str, Any]]:
    """Numbers of every step of a run from beginning to end, after the look at all ranks."""
    job = site.submit("whole", preflight=True)
    site.until_state(job, {"COMPLETED", "FAILED"}, "whole")
    found = site.cluster.job(job)
    log = site.log("whole")
    assert found["JobState"] == "COMPLETED" and found["NumNodes"] == "2" and found["Restarts"] == "0", log
    assert "preflight: good: 2 ranks on 2 nodes" in log and "all-to-all of each pair of nodes" in log and "ep 2" in log, log
    numbers = site.numbers("whole")
    assert [r["step"] for r in numbers] == list(range(1, STEPS + 1))
    assert len({r["sparsity_coef"] for r in numbers}) > STEPS // 2, "the controller must move, or the comparison would not see its loss"
    return numbers


def test_one_run(site: Site, undisturbed: list[dict[str, Any]]) -> None:
    """What status and logs say of a job that is done; it can be submitted again, and has nothing to do."""
    said = site.moetrain("status", "--run_dir", "whole")
    assert "COMPLETED" in said and f"finished at step {STEPS}" in said and f"last checkpoint {STEPS}" in said
    assert "preflight: good" in site.moetrain("logs", "--run_dir", "whole") and "nothing to cancel" in site.moetrain("cancel", "--run_dir", "whole")
    assert read_status(site.folder / "whole")["state"] == "finished"


@pytest.mark.slow
def test_requeued_by_hand_and_by_the_time_limit(site: Site, undisturbed: list[dict[str, Any]]) -> None:
    """B, then A: `scontrol requeue` ends the ranks with SIGTERM; then USR2 comes to every process before the time limit, after which the script
    requeues itself. Preempted twice, the curve is that of the run that never was."""
    job = site.submit("twice", time="30", notice_seconds=NOTICE)
    site.until_step(20, "twice")
    site.cluster.run("scontrol", "requeue", str(job))
    site.until(lambda: (read_status(site.folder / "twice") or {}).get("state") == "preempted", "save", "twice")
    first = read_status(site.folder / "twice")
    assert first["signal"] == "TERM" and 20 <= first["step"] < STEPS and first["steps_done"] == first["step"]
    assert site.checkpoints("twice")[-1].name == f"step-{first['step']:08d}"
    refused = site.moetrain("submit", "twice.yaml", "--cluster", "twice.cluster.yaml", status=2)
    assert f"Slurm job {job} is" in refused and "moetrain cancel" in refused

    site.until(lambda: site.steps("twice") > first["step"] + 5, "step after the requeue", "twice")
    # The limit is lowered, now that the run is under way, so that the notice is due at once; Slurm looks twice a minute, and until then the ranks
    # are stopped, lest the run be over.
    workers = site.cluster.workers()
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    elapsed = site.cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip()
    site.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(elapsed.split(':')[0]) + 2}")
    site.until(lambda: all(has_come(pid, signal.SIGUSR2) for pid in workers), "notice", "twice")
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    site.until(lambda: f"requeueing job {job}" in site.log("twice"), "requeue", "twice")
    site.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    second = next(e for e in reversed(site.events("twice")) if e["event"] == "preempted")
    assert second["signal"] == "USR2" and first["step"] < second["step"] < STEPS

    site.until_state(job, {"COMPLETED", "FAILED", "TIMEOUT"}, "twice")
    assert site.cluster.job(job)["JobState"] == "COMPLETED" and site.cluster.job(job)["Restarts"] == "2", site.log("twice")
    resumed = [e["step"] for e in site.events("twice") if e["event"] == "resume"]
    assert resumed == [first["step"], second["step"]]
    assert site.numbers("twice") == undisturbed
    assert "User defined signal" not in site.log("twice")
    assert "restarted 2 times" in site.moetrain("status", "--run_dir", "twice")


@pytest.mark.slow
def test_notice_without_protection(site: Site) -> None:
    """C: the same script, but torchrun does not ignore USR2: it dies of it, on each node, and whether the ranks get to save is luck. So the
    protection is what A owes its clean end to. The job's options, too, arrive as they were written."""
    comment = "it's $(touch HACKED) \\ \"%j\" #x `id` é"
    site.write("bare", 1, False, {"options": {"comment": comment}})
    script = site.moetrain("submit", "bare.yaml", "--cluster", "bare.cluster.yaml", "--dry-run")
    assert script.count('trap "" USR2\n') == 1
    folder = site.folder / "bare.job"
    folder.mkdir()
    (folder / "config.yaml").write_text((site.folder / "bare.yaml").read_text())
    (folder / "job.sbatch").write_text(script.replace('trap "" USR2\n', ""))
    environment = {**os.environ, **site.cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["sbatch", "--parsable", str(folder / "job.sbatch")]
    job = int(subprocess.run(words, cwd=site.folder, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout)
    said = site.cluster.run("scontrol", "show", "job", str(job))
    assert re.search(r"^ +Comment=(.*)$", said, re.MULTILINE)[1].rstrip() == comment
    site.until_step(10, "bare")
    site.cluster.run("scancel", "--signal=USR2", str(job))
    site.until(lambda: site.log("bare").count("User defined signal 2") == 2, "end of torchrun", "bare")
    site.cluster.run("scancel", str(job))


@pytest.mark.slow
def test_dead_daemon_and_cancel(site: Site) -> None:
    """E, then D: a node's slurmd is killed and the run goes on without it; `moetrain cancel` saves and ends, and nothing comes back."""
    job = site.submit("ended")
    site.until_step(10, "ended")
    site.cluster.kill_daemon("n2")
    reached = site.steps("ended")
    site.until_step(min(reached + 20, STEPS), "ended")
    site.cluster.start_node("n2")
    assert site.cluster.job(job)["JobState"] == "RUNNING"
    assert "told to save and end" in site.moetrain("cancel", "--run_dir", "ended")
    site.until_state(job, {"CANCELLED", "COMPLETED", "FAILED", "PENDING"}, "ended")
    site.until(lambda: read_status(site.folder / "ended")["state"] != "running", "status", "ended")
    found, status = site.cluster.job(job), read_status(site.folder / "ended")
    assert found["JobState"] == "CANCELLED" and found["Restarts"] == "0", found
    assert status["state"] == "preempted" and status["signal"] == "TERM" and reached < status["step"] < STEPS
    last = site.checkpoints("ended")[-1]
    assert last.name == f"step-{status['step']:08d}" and find_damage(last) is None
    assert "submit the same config again" in site.moetrain("status", "--run_dir", "ended")


@pytest.mark.slow
def test_dead_node(site: Site, undisturbed: list[dict[str, Any]]) -> None:
    """E2: a node and all its processes die at once. Slurm requeues the job, which waits for the node and goes on from the last checkpoint."""
    job = site.submit("node")
    site.until(lambda: len(site.checkpoints("node")) >= 1 and site.steps("node") < STEPS, "checkpoint", "node")
    site.cluster.kill_node("n2")
    site.until(lambda: site.cluster.job(job).get("Restarts") == "1", "requeue", "node")
    site.cluster.start_node("n2")
    site.until_state(job, {"COMPLETED", "FAILED"}, "node")
    assert site.cluster.job(job)["JobState"] == "COMPLETED", site.log("node")
    (resumed,) = [e["step"] for e in site.events("node") if e["event"] == "resume"]
    assert resumed > 0 and resumed % 10 == 0
    assert site.numbers("node") == undisturbed
