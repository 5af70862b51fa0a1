"""`moetrain submit`, `status`, `cancel`, `logs`: hand a run to a cluster and ask for it again.

What is known of a job lies beside its run_dir, in RUN_DIR.job/: the resolved config, the script as it was handed over, the log, and job.json.
Accounting of the scheduler is not needed: what it has forgotten is told by the run's own status.json.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moetrain import config as schema
from moetrain.checkpoint import find_steps
from moetrain.cluster import hosts, kubernetes, local, slurm
from moetrain.cluster.job import Job, job_name
from moetrain.cluster.options import ClusterConfig, check_config, load_cluster
from moetrain.config import Config, ConfigError, check_world, load_config, parse_overrides
from moetrain.files import read_json
from moetrain.metrics import METRICS
from moetrain.preempt import read_status

OPTIONS = {
    "submit": [
        "  CONFIG or --config FILE   what to train",
        "  --cluster FILE            where: a file with a `cluster:` section (docs/submit.md; examples in launch/clusters/)",
        "  --dry-run                 print what would be handed over, and do nothing",
        "  --section.key VALUE       overrides of the config, as for `moetrain train`",
    ],
    "status": ["  --run_dir DIR    the run, as in its config (default runs/default)"],
    "cancel": ["  --run_dir DIR    the run, as in its config (default runs/default)"],
    "logs": ["  --run_dir DIR    the run, as in its config (default runs/default)", "  --follow         go on printing until interrupted"],
}
_RENDER: dict[str, Callable[[ClusterConfig, Job], str]] = {
    "slurm": slurm.render, "kubernetes": kubernetes.render, "hosts": hosts.render, "local": local.render,
}  # fmt: skip
_FILES = {"slurm": "job.sbatch", "kubernetes": "job.yaml", "hosts": "job.sh", "local": "job.sh"}


def main(command: str, words: Sequence[str]) -> int:
    """Run one of the four commands; returns its exit status. Raises ConfigError for wrong input and for a scheduler that refuses."""
    rest = list(words)
    if command == "submit":
        return _submit(rest)
    follow = command == "logs" and "--follow" in rest
    if follow:
        rest.remove("--follow")
    overrides = dict(parse_overrides(rest))
    unknown = set(overrides) - {"run_dir"}
    if unknown:
        raise ConfigError(f"unexpected option --{sorted(unknown)[0]}; known: --run_dir{', --follow' if command == 'logs' else ''}")
    run_dir = overrides.get("run_dir", Config.model_fields["run_dir"].default)
    record = _read_record(run_dir)
    if command == "cancel":
        return _cancel(record, run_dir)
    if command == "logs":
        return _logs(record, follow)
    print("\n".join(describe(record, run_dir)))
    return 0


# -------------------------------------------------------------------------------------------------------------------- submit


def _submit(words: list[str]) -> int:
    dry_run = "--dry-run" in words
    words = [w for w in words if w != "--dry-run"]
    config_path = words.pop(0) if words and not words[0].startswith("--") else None
    named: dict[str, str] = {}
    overrides = []
    for key, value in parse_overrides(words):
        if key in ("cluster", "config"):
            if key in named or (key == "config" and config_path is not None):
                raise ConfigError(f"--{key}: the file is given twice")
            named[key] = value
        else:
            overrides.append((key, value))
    config_path = config_path or named.get("config")
    if config_path is None:
        raise ConfigError("submit: name a config: moetrain submit CONFIG --cluster FILE")
    if "cluster" not in named:
        raise ConfigError("--cluster: name a file with a `cluster:` section; launch/clusters/ has examples")
    cluster = load_cluster(named["cluster"])
    config = _read_config(config_path, overrides, cluster)
    job = make_job(config, cluster, os.getcwd())
    text = _RENDER[cluster.kind](cluster, job)
    if dry_run:
        print(text, end="")
        return 0
    missing = [name for name in cluster.secrets if cluster.kubernetes is None and name not in os.environ]
    if missing:
        raise ConfigError(f"cluster.secrets: {', '.join(missing)} not set in the environment; export it first")
    _refuse_second(job)
    try:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "; a run_dir relative to cluster.kubernetes.workdir would do" if cluster.kubernetes else ""
        raise ConfigError(f"folder {job.folder}: can't be made: {error.strerror}{hint}") from None
    _write(Path(job.config_file), job.config)
    script = Path(job.folder) / _FILES[cluster.kind]
    _write(script, text)
    record = {"kind": cluster.kind, "name": job.name, "run_dir": job.run_dir, "workdir": job.workdir, **_START[cluster.kind](cluster, job, script)}
    record["submitted"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(Path(job.folder) / "job.json", json.dumps(record, indent=1) + "\n")
    ranks = f"{cluster.num_nodes} nodes x {cluster.ranks_per_node} ranks"
    print(f"submitted {_title(record)}: {ranks}, run_dir {job.run_dir}\nsee: moetrain status --run_dir {job.run_dir}")
    return 0


def _read_config(path: str, overrides: list[tuple[str, str]], cluster: ClusterConfig) -> Config:
    from moetrain.build import model_from, need

    try:
        config = load_config(path, overrides, model_from=model_from)
    except (ValueError, OSError):
        if cluster.kubernetes is None:
            raise
        # The folder of init_from may lie on a volume that only pods see; then the config must say the whole model itself.
        config = load_config(path, overrides)
        if config.init_from is None or Path(config.init_from).exists():
            raise
    need(config, "model", "train")
    problems = check_config(cluster, config)
    if problems:
        raise ConfigError("; ".join(problems))
    try:
        check_world(config, cluster.num_nodes * cluster.ranks_per_node)
    except ConfigError as error:
        ranks = f"cluster: {cluster.num_nodes} nodes x {cluster.ranks_per_node} ranks do not fit {path}"
        raise ConfigError(f"{ranks}: {error}") from None
    return config


def make_job(config: Config, cluster: ClusterConfig, workdir: str) -> Job:
    """workdir: folder of the submission, absolute."""
    folder = os.path.abspath(os.path.join(workdir, config.run_dir.rstrip("/") + ".job"))
    python = cluster.python or ("python" if cluster.kubernetes else sys.executable)
    if cluster.kubernetes is not None:
        workdir = cluster.kubernetes.workdir or cluster.kubernetes.claims[0].path
    name = cluster.name or job_name(config.run_dir)
    return Job(name=name, workdir=workdir, run_dir=config.run_dir, folder=folder, config=schema.to_yaml(config), python=python)


def _refuse_second(job: Job) -> None:
    """Two jobs that write to one run_dir would ruin it."""
    path = Path(job.folder) / "job.json"
    if path.is_file():
        record = _read_record(job.run_dir)
        live, said = _ASK[record["kind"]](record)
        if live is not False:
            raise ConfigError(f"run_dir {job.run_dir}: its {_title(record)} is {said}; `moetrain cancel --run_dir {job.run_dir}` first")


def _start_slurm(cluster: ClusterConfig, job: Job, script: Path) -> dict[str, Any]:
    number = _call("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    return {"id": number, "log": f"{job.folder}/slurm-{number}.log"}


def _start_kubernetes(cluster: ClusterConfig, job: Job, script: Path) -> dict[str, Any]:
    options = cluster.kubernetes
    assert options is not None, "chosen by cluster.kind"
    record = {"id": job.name, "api": options.api, "namespace": options.namespace, "nodes": cluster.num_nodes}
    # A job that ended keeps its name until it is deleted, and can't be changed.
    _call(*_kubectl(record), "delete", "--ignore-not-found", f"{options.api}/{job.name}")
    _call(*_kubectl(record), "apply", "--filename", str(script))
    return record


def _start_process(cluster: ClusterConfig, job: Job, script: Path) -> dict[str, Any]:
    log = Path(job.folder) / "job.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            ["/bin/bash", str(script)], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=job.workdir
        )
    return {"id": process.pid, "began": _began(process.pid), "host": socket.gethostname(), "log": str(log)}


_START: dict[str, Callable[[ClusterConfig, Job, Path], dict[str, Any]]] = {
    "slurm": _start_slurm, "kubernetes": _start_kubernetes, "hosts": _start_process, "local": _start_process,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- status


def describe(record: dict[str, Any], run_dir: str) -> list[str]:
    """Lines for people: what the scheduler says, what the run says, where its log is."""
    live, said = _ASK[record["kind"]](record)
    lines = [f"{_title(record)}, submitted {record['submitted']}: {said}"]
    folder = Path(record["workdir"]) / record["run_dir"] if record["kind"] != "kubernetes" else Path(run_dir)
    status, progress = read_status(folder), _progress(folder)
    if status is not None:
        state, step = status.get("state"), status.get("step")
        told = {
            "finished": f"finished at step {step}",
            "preempted": f"saved at step {step} after SIG{status.get('signal')}",
            "failed": f"failed after step {step}: {status.get('error')}",
            "running": "running" if live is not False else "ended without a word: killed, or its machine is gone",
        }
        lines.append(f"run: {told.get(str(state), state)} ({status.get('host')}, {status.get('time')})")
        if live is False and state in ("preempted", "running"):
            lines.append("submit the same config again to go on from the last checkpoint")
    elif live is False:
        lines.append("run: never began, or its folder is not seen from here" + (": see the log" if "log" in record else ""))
    lines += [f"progress: {progress}"] if progress else []
    lines += [f"log: {record['log']}"] if "log" in record else []
    return lines


def _progress(folder: Path) -> str:
    try:
        last = json.loads((folder / METRICS).read_bytes().splitlines()[-1])
        text = f"step {last['step']}, loss {last['loss']:.4f}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        text = ""
    saved = find_steps(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
    return ", ".join(part for part in (text, f"last checkpoint {saved[-1]}" if saved else "") if part)


class _Refused(Exception):
    """A scheduler's program failed; `said` is the last line that it printed."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


def _ask_slurm(record: dict[str, Any]) -> tuple[bool | None, str]:
    """(whether the job still waits or runs; None: can't be told, what to print)."""
    try:
        said = _run("scontrol", "show", "job", "--oneliner", str(record["id"]))
    except _Refused as error:
        # Slurm forgets a job minutes after its end (MinJobAge).
        gone = "invalid job id" in error.said.lower()
        return (False, "no longer known to Slurm") if gone else (None, f"not known: {error.said}")
    found = dict(re.findall(r"\b(JobState|Reason|NodeList|Restarts|RunTime|ExitCode)=(\S+)", said))
    state = found.get("JobState", "unknown")
    reason = "" if found.get("Reason", "None") == "None" else f" ({found['Reason']})"
    where = f" on {found['NodeList']} for {found.get('RunTime')}" if state == "RUNNING" else ""
    restarts = f", restarted {found['Restarts']} times" if found.get("Restarts", "0") != "0" else ""
    ended = state in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
    status = f", exit code {found.get('ExitCode')}" if state == "FAILED" else ""
    return not ended, f"{state}{reason}{where}{status}{restarts}"


def _ask_kubernetes(record: dict[str, Any]) -> tuple[bool | None, str]:
    try:
        found = json.loads(_run(*_kubectl(record), "get", f"{record['api']}/{record['id']}", "--output", "json")).get("status") or {}
    except _Refused as error:
        gone = "not found" in error.said.lower()
        return (False, "no longer in the cluster") if gone else (None, f"not known: {error.said}")
    except ValueError:
        return None, "not known: kubectl did not answer with JSON"
    true = {c["type"]: c.get("message", "") for c in found.get("conditions") or [] if c.get("status") == "True"}
    for name in ("Completed", "Complete"):
        if name in true:
            return False, "complete"
    if "Failed" in true:
        return False, f"failed: {true['Failed']}"
    restarts = f", restarted {found['restarts']} times" if found.get("restarts") else ""
    pods = found.get("active", sum(j.get("active", 0) for j in found.get("replicatedJobsStatus") or []))
    return True, f"{pods} active{restarts}"


def _ask_process(record: dict[str, Any]) -> tuple[bool | None, str]:
    if record["host"] != socket.gethostname():
        return None, f"process {record['id']} of {record['host']}: ask there"
    live = _began(record["id"]) is not None and _began(record["id"]) == record["began"]
    return live, "running" if live else "ended"


_ASK: dict[str, Callable[[dict[str, Any]], tuple[bool | None, str]]] = {
    "slurm": _ask_slurm, "kubernetes": _ask_kubernetes, "hosts": _ask_process, "local": _ask_process,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- cancel and logs


def _cancel(record: dict[str, Any], run_dir: str) -> int:
    live, said = _ASK[record["kind"]](record)
    if live is False:
        print(f"{_title(record)} is {said}; nothing to cancel")
        return 0
    if live is None:
        raise ConfigError(f"{_title(record)}: {said}")
    if record["kind"] == "slurm":
        _call("scancel", str(record["id"]))
    elif record["kind"] == "kubernetes":
        # All that was made for it: the objects bear the job's name.
        kinds = f"{record['api']},service,configmap"
        _call(*_kubectl(record), "delete", "--wait=false", kinds, "--selector", f"app.kubernetes.io/instance={record['id']}")
    else:
        os.killpg(record["id"], signal.SIGTERM)
    print(f"{_title(record)}: told to save and end; see: moetrain status --run_dir {run_dir}")
    return 0


def _logs(record: dict[str, Any], follow: bool) -> int:
    if record["kind"] == "kubernetes":
        words = [*_kubectl(record), "logs", "--selector", f"app.kubernetes.io/instance={record['id']}", "--prefix", "--tail=-1"]
        words += ["--max-log-requests", str(record["nodes"]), *(["--follow"] if follow else [])]
    else:
        if not Path(record["log"]).exists():
            raise ConfigError(f"{record['log']}: not there yet: the job has not begun, or its folder is not seen from here")
        words = ["tail", "-n", "+1", *(["-F"] if follow else []), "--", record["log"]]
    try:
        return subprocess.run(words).returncode
    except FileNotFoundError:
        raise ConfigError(f"{words[0]}: not found on this machine") from None


# -------------------------------------------------------------------------------------------------------------------- pieces


def _title(record: dict[str, Any]) -> str:
    kind = {"slurm": "Slurm job", "kubernetes": f"Kubernetes {record.get('api')}", "hosts": "ssh job, process", "local": "process"}[record["kind"]]
    return f"{kind} {record['id']}"


def _read_record(run_dir: str) -> dict[str, Any]:
    path = Path(run_dir.rstrip("/") + ".job") / "job.json"
    try:
        record = read_json(path)
    except OSError:
        raise ConfigError(f"run_dir {run_dir}: no job was submitted for it from here ({path} is not there)") from None
    except ValueError:
        raise ConfigError(f"{path}: is not JSON; remove it if no job runs for {run_dir}") from None
    needed = {"kind", "id", "run_dir", "workdir", "submitted"}
    if not isinstance(record, dict) or not needed <= set(record) or record["kind"] not in _ASK:
        raise ConfigError(f"{path}: not written by `moetrain submit`; remove it if no job runs for {run_dir}")
    return record


def _kubectl(record: dict[str, Any]) -> list[str]:
    return ["kubectl", *(["--namespace", record["namespace"]] if record["namespace"] else [])]


def _run(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]}: not found on this machine; submit where the cluster's programs are") from None
    except subprocess.TimeoutExpired:
        raise _Refused("no answer in 120 seconds") from None
    if done.returncode != 0:
        raise _Refused((done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return done.stdout


def _call(*words: str) -> str:
    try:
        return _run(*words)
    except _Refused as error:
        raise ConfigError(f"{words[0]} refuses: {error.said}") from None


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's clock ticks: with the number it names the process for good. None: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _write(path: Path, text: str) -> None:
    written = path.with_name(path.name + ".tmp")
    written.write_text(text, encoding="utf-8")
    written.replace(path)
