"""submit, status, cancel, logs: what is handed over and remembered, with stand-ins for the schedulers' programs; and real runs on this machine and
on two hosts, whose ssh is a shell. (A real Slurm is in tests/cluster/test_slurm.py.)"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain import submit
from moetrain.checkpoint import find_steps
from moetrain.cli import main
from moetrain.config import load_config, to_yaml
from moetrain.metrics import deterministic_fields, read_records
from moetrain.preempt import read_status
from tests.test_train import make_config, write_data

ROOT = Path(__file__).resolve().parents[1]
POD = {"image": "i", "claims": [{"claim": "c", "path": "/data"}], "namespace": "team"}


class Place:
    """A folder with a config, and programs of schedulers that do as the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        write_data(folder / "a", seed=1)
        write_data(folder / "b", documents=20, seed=2)

    def config(self, layout: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> None:
        config = make_config(self.folder, "sampled", layout, run_dir="run", train__dtype="float32", **changes)
        (self.folder / "c.yaml").write_text(to_yaml(config).replace(f"{self.folder}/", ""))

    def cluster(self, **block: Any) -> None:
        (self.folder / "cluster.yaml").write_text(json.dumps({"cluster": block}))

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >>"{self.folder}/calls"\n{text}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{place.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return place


def fails(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    said = capfd.readouterr().err
    assert said.startswith("moetrain: error: ") and "Traceback" not in said
    return said


SUBMIT = ["submit", "c.yaml", "--cluster", "cluster.yaml"]


def test_wrong_words(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.config()
    place.cluster(slurm={})
    for words, problem in (
        (["submit"], "name a config: moetrain submit CONFIG --cluster FILE"),
        (["submit", "c.yaml"], "--cluster: name a file with a `cluster:` section"),
        ([*SUBMIT, "--cluster", "x"], "--cluster: the file is given twice"),
        ([*SUBMIT, "--config", "x"], "--config: the file is given twice"),
        ([*SUBMIT, "--train.stepz", "3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["submit", "none.yaml", "--cluster", "cluster.yaml"], "config none.yaml: can't be read"),
        (["submit", "c.yaml", "--cluster", "none.yaml"], "cluster file none.yaml: can't be read"),
        ([*SUBMIT, "--parallel.ep", "8"], "cluster: 1 nodes x 1 ranks do not fit c.yaml: parallel: dp_replicate (1) x dp_shard (1) x ep (8)"),
        ([*SUBMIT, "--checkpoint.signals", "[USR1, TERM]"], "cluster.slurm.signal (USR2) would end the run without a save"),
        (["status", "--rundir", "x"], "unexpected option --rundir; known: --run_dir"),
        (["status", "--run_dir", "run"], "run_dir run: no job was submitted for it from here"),
        (["logs", "run"], "unexpected argument 'run'"),
    ):  # fmt: skip
        assert problem in fails(words, capfd), words
    place.cluster(slurm={}, secrets=["MOETRAIN_NO_SUCH"])
    assert "cluster.secrets: MOETRAIN_NO_SUCH not set in the environment" in fails(SUBMIT, capfd)
    assert not (place.folder / "run.job").exists()


def test_slurm(place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From sbatch to the end, in words; a secret goes with the environment alone."""
    place.config(layout=(1, 1, 2))
    place.cluster(nodes=2, slurm={"partition": "gpu"}, secrets=["WANDB_API_KEY"])
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    place.program("sbatch", "echo '17;cluster'")
    place.program("scontrol", "echo 'JobId=17 JobState=PENDING Reason=Priority Restarts=0 NodeList= RunTime=00:00:00'")
    place.program("scancel", "")
    assert main([*SUBMIT, "--train.lr", "5e-3"]) == 0
    assert "submitted Slurm job 17: 2 nodes x 1 ranks, run_dir run" in capfd.readouterr().out
    assert place.calls() == [f"sbatch --parsable {place.folder}/run.job/job.sbatch"]
    assert load_config(place.folder / "run.job/config.yaml").train.lr == 5e-3
    assert all("very-secret" not in p.read_text() for p in (place.folder / "run.job").iterdir())
    assert sorted(p.name for p in (place.folder / "run.job").iterdir()) == ["config.yaml", "job.json", "job.sbatch"]

    assert main(["status", "--run_dir", "run/"]) == 0
    said = capfd.readouterr().out
    assert "Slurm job 17, submitted 20" in said and ": PENDING (Priority)\n" in said and f"log: {place.folder}/run.job/slurm-17.log" in said
    assert place.calls() == ["scontrol show job --oneliner 17"]
    assert "not there yet" in fails(["logs", "--run_dir", "run"], capfd)
    assert "its Slurm job 17 is PENDING (Priority); `moetrain cancel --run_dir run` first" in fails(SUBMIT, capfd)

    place.program("scontrol", "echo 'JobId=17 JobState=RUNNING Reason=None Restarts=2 NodeList=n[1-2] RunTime=00:03:00'")
    (place.folder / "run.job/slurm-17.log").write_text("one\ntwo\n")
    (place.folder / "run").mkdir()
    (place.folder / "run/metrics.jsonl").write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4.5}\n')
    (place.folder / "run/status.json").write_text('{"state": "running", "step": 0, "host": "n1", "time": "t"}\n')
    assert main(["status", "--run_dir", "run"]) == 0
    said = capfd.readouterr().out
    assert ": RUNNING on n[1-2] for 00:03:00, restarted 2 times\nrun: running (n1, t)\nprogress: step 2, loss 4.5000\n" in said
    assert main(["logs", "--run_dir", "run"]) == 0 and capfd.readouterr().out == "one\ntwo\n"
    place.calls()
    assert main(["cancel", "--run_dir", "run"]) == 0 and place.calls()[-1] == "scancel 17"
    capfd.readouterr()

    # Slurm is asked and does not answer: nothing is concluded from that.
    place.program("scontrol", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "not known: slurm_load_jobs error: Unable to contact" in fails(SUBMIT, capfd)
    assert "not known" in fails(["cancel", "--run_dir", "run"], capfd)
    # It has forgotten the job: the run's own word counts.
    place.program("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    for status, told in (
        ({"state": "finished", "step": 3}, "finished at step 3"),
        ({"state": "preempted", "step": 2, "signal": "TERM"}, "saved at step 2 after SIGTERM"),
        ({"state": "failed", "step": 2, "error": "ValueError: x"}, "failed after step 2: ValueError: x"),
        ({"state": "running", "step": 0}, "ended without a word: killed, or its machine is gone"),
    ):
        (place.folder / "run/status.json").write_text(json.dumps({**status, "host": "n1", "time": "t"}))
        assert main(["status", "--run_dir", "run"]) == 0
        said = capfd.readouterr().out
        assert "no longer known to Slurm\n" in said and f"run: {told} (n1, t)" in said
        assert ("submit the same config again" in said) == (status["state"] in ("preempted", "running"))
    (place.folder / "run/status.json").unlink()
    assert main(["status", "--run_dir", "run"]) == 0 and "run: never began" in capfd.readouterr().out
    assert main(["cancel", "--run_dir", "run"]) == 0 and "nothing to cancel" in capfd.readouterr().out
    assert main(SUBMIT) == 0

    place.program("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert "sbatch refuses: sbatch: error: invalid partition specified: gpu" in fails(SUBMIT, capfd)
    (place.bin / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(place.bin))
    assert "sbatch: not found on this machine" in fails(SUBMIT, capfd)
    (place.folder / "run.job/job.json").write_text("{")
    assert "job.json: is not JSON" in fails(["status", "--run_dir", "run"], capfd)
    (place.folder / "run.job/job.json").write_text('{"kind": "other"}')
    assert "not written by `moetrain submit`" in fails(["status", "--run_dir", "run"], capfd)


def test_kubernetes(place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """kubectl gets the manifest; the job's conditions in words; secrets need not be here."""
    place.config(layout=(1, 1, 2))
    place.cluster(nodes=2, secrets=["WANDB_API_KEY"], kubernetes={**POD, "secret": "s"})
    place.program("kubectl", "cat >/dev/null")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(SUBMIT) == 0 and "submitted Kubernetes jobset run: 2 nodes x 1 ranks" in capfd.readouterr().out
    manifest = f"{place.folder}/run.job/job.yaml"
    assert place.calls() == [
        "kubectl --namespace team delete --ignore-not-found jobset/run", f"kubectl --namespace team apply --filename {manifest}"
    ]  # fmt: skip
    condition = '{"type": "%s", "status": "True", "message": "why"}'
    for status, told in (
        ('{"replicatedJobsStatus": [{"active": 1}], "restarts": 2}', "1 active, restarted 2 times"),
        ('{"conditions": [%s]}' % (condition % "Completed"), "complete"),  # noqa: UP031
        ('{"conditions": [%s]}' % (condition % "Failed"), "failed: why"),  # noqa: UP031
    ):
        place.program("kubectl", f"echo '{{\"status\": {status}}}'")
        assert main(["status", "--run_dir", "run"]) == 0 and f": {told}\n" in capfd.readouterr().out
        assert place.calls() == ["kubectl --namespace team get jobset/run --output json"]
    place.program("kubectl", "echo '{}'")
    assert main(["cancel", "--run_dir", "run"]) == 0
    selector = "--selector app.kubernetes.io/instance=run"
    assert place.calls()[-1] == f"kubectl --namespace team delete --wait=false jobset,service,configmap {selector}"
    assert main(["logs", "--run_dir", "run", "--follow"]) == 0
    assert place.calls() == [f"kubectl --namespace team logs {selector} --prefix --tail=-1 --max-log-requests 2 --follow"]
    place.program("kubectl", "echo 'Error from server (NotFound): jobsets \"run\" not found' >&2; exit 1")
    capfd.readouterr()
    assert main(["status", "--run_dir", "run"]) == 0 and "no longer in the cluster" in capfd.readouterr().out
    assert "lies on none of cluster.kubernetes.claims" in fails([*SUBMIT, "--run_dir", "/elsewhere"], capfd)
    # The start weights lie on the cluster's volume: then the config says the whole model, and can be checked.
    place.program("kubectl", "")
    assert "not known: kubectl did not answer with JSON" in fails(SUBMIT, capfd)
    place.program("kubectl", "case \"$*\" in *get*) echo 'NotFound: not found' >&2; exit 1 ;; esac")
    assert main([*SUBMIT, "--init_from", "/data/dense"]) == 0
    assert load_config(place.folder / "run.job/config.yaml").init_from == "/data/dense"
    place.cluster(nodes=2, slurm={})
    assert "/data/dense" in fails([*SUBMIT, "--init_from", "/data/dense"], capfd)


def until(true: Any, what: str, log: Path) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end, f"no {what}\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.05)


def steps(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def test_this_machine(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """A real run in the background: cancelled, it has saved; submitted again, it goes on."""
    place.config(train__steps=100_000, checkpoint={"every": 50})
    place.cluster(local={}, preflight=False)
    log = place.folder / "run.job/job.log"
    assert main(SUBMIT) == 0 and "submitted process" in capfd.readouterr().out
    until(lambda: steps(place.folder / "run") > 5, "steps", log)
    assert main(["status", "--run_dir", "run"]) == 0
    assert ": running\nrun: running (" in capfd.readouterr().out
    assert "is running; `moetrain cancel --run_dir run` first" in fails(SUBMIT, capfd)
    assert main(["cancel", "--run_dir", "run"]) == 0
    record = json.loads((place.folder / "run.job/job.json").read_text())
    until(lambda: submit._ask_process(record)[0] is False, "end", log)
    capfd.readouterr()
    assert main(["status", "--run_dir", "run"]) == 0
    status, said = read_status(place.folder / "run"), capfd.readouterr().out
    assert f": ended\nrun: saved at step {status['step']} after SIGTERM" in said, said + log.read_text()
    assert find_steps(place.folder / "run/checkpoints")[-1] == status["step"] == steps(place.folder / "run")
    assert main(["logs", "--run_dir", "run"]) == 0 and f"TERM: saved at step {status['step']}" in capfd.readouterr().out
    # Another machine's process is not ours to judge.
    (place.folder / "run.job/job.json").write_text(json.dumps({**record, "host": "elsewhere"}))
    assert f"process {record['id']} of elsewhere: ask there" in fails(SUBMIT, capfd)
    # A number that somebody else's process has by now.
    (place.folder / "run.job/job.json").write_text(json.dumps({**record, "id": os.getpid()}))
    assert main([*SUBMIT, "--train.steps", str(status["step"] + 3)]) == 0
    until(lambda: (read_status(place.folder / "run") or {}).get("state") == "finished", "end", log)
    assert read_status(place.folder / "run")["steps_done"] == 3 and f"going on from step {status['step']}" in log.read_text()


_SSH = 'while [ "$1" != -- ]; do shift 2; done\nshift 2\nexec "$@"'


def test_two_hosts(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Experts spread over two hosts: both start, look at each other, train as one process would; `cancel` reaches both, though ssh hands no
    signal on; the run goes on from there with equal numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = 40
    place.config(layout=(1, 1, 2), train__steps=count)
    whole = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moetrain", "train", "--config", "c.yaml",
         "--run_dir", "whole"], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    place.program("ssh", _SSH)
    place.cluster(hosts={"hosts": ["127.0.0.1", "localhost"], "port": port})
    log = place.folder / "run.job/job.log"
    assert main(SUBMIT) == 0 and "2 nodes x 1 ranks" in capfd.readouterr().out
    until(lambda: steps(place.folder / "run") > 3, "steps", log)
    assert "preflight: good: 2 ranks on 2 nodes" in log.read_text()
    pids = [int((place.folder / f"run.job/node-{i}.pid").read_text()) for i in range(2)]
    assert main(["cancel", "--run_dir", "run"]) == 0
    record = json.loads((place.folder / "run.job/job.json").read_text())
    until(lambda: submit._ask_process(record)[0] is False, "end", log)
    until(lambda: not any(submit._began(pid) for pid in pids), "end of the launchers", log)
    status = read_status(place.folder / "run")
    assert status["state"] == "preempted" and status["signal"] == "TERM" and 3 < status["step"] < count, log.read_text()
    place.cluster(hosts={"hosts": ["127.0.0.1", "localhost"], "port": port}, preflight=False)
    assert main(SUBMIT) == 0
    until(lambda: (read_status(place.folder / "run") or {}).get("state") == "finished", "end", log)
    numbers = [[deterministic_fields(r) for r in read_records(place.folder / name)] for name in ("run", "whole")]
    assert numbers[0] == numbers[1] and len(numbers[0]) == count
    record = json.loads((place.folder / "run.job/job.json").read_text())
    until(lambda: submit._ask_process(record)[0] is False, "end", log)


@pytest.mark.parametrize("hosts", [["here", "gone"], ["gone", "here"]], ids="-".join)
def test_a_host_that_fails_ends_the_others(hosts: list[str], place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """One host is not reached; the launcher on the other is told to end and waited for, and the job says which host it was."""
    place.config(layout=(1, 1, 2))
    place.program("ssh", 'case "$*" in *" gone bash"*) echo "ssh: no route" >&2; exit 255 ;; esac\n' + _SSH)
    place.program("python", f"trap 'sleep 2; exit 1' TERM\n: >{place.folder}/up\nwhile :; do sleep 0.05; done")
    place.cluster(python="python", preflight=False, hosts={"hosts": hosts})
    assert main(SUBMIT) == 0
    record, log = json.loads((place.folder / "run.job/job.json").read_text()), place.folder / "run.job/job.log"
    try:
        until(lambda: submit._ask_process(record)[0] is False, "end", log)
    finally:
        try:
            os.killpg(record["id"], signal.SIGKILL)
        except ProcessLookupError:
            pass
    said = log.read_text()
    assert "ssh: no route" in said and said.count("moetrain: host gone ended with status 255") == 1
    assert said.count("moetrain: host here ended with status") == 1
