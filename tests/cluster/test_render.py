"""What is handed to a cluster: as the goldens have it, clean for the linters, and with every name of a user as a word and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moetrain.cluster import hosts, kubernetes, local, slurm
from moetrain.cluster.job import LINT, Job, job_name
from moetrain.cluster.options import ClusterConfig, ClusterFile, check, load_cluster
from moetrain.config import ConfigError
from tests.cluster.shell import RECORD, Stage, shellcheck

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(__file__).parent / "goldens"
RENDER = {"slurm": slurm.render, "kubernetes": kubernetes.render, "hosts": hosts.render, "local": local.render}
JOB = Job(
    name="moe", workdir="/home/me/project", run_dir="runs/moe", folder="/home/me/project/runs/moe.job",
    config="run_dir: runs/moe\ntrain:\n  lr: 0.1\n", python="/opt/venv/bin/python",
)  # fmt: skip
POD_JOB = dataclasses.replace(JOB, workdir="/data/me", python="python")

COMMON = {"secrets": ["WANDB_API_KEY"], "environment": {"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME"}}
KUBERNETES = {
    "image": "registry.example.com/moetrain:0.1.0", "claims": [{"claim": "training", "path": "/data"}, {"claim": "scratch", "path": "/scratch"}],
    "secret": "moetrain-secrets",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "slurm": {"nodes": 4, "gpus_per_node": 8, **COMMON, "setup_script": "env.sh", "slurm": {
        "partition": "gpu", "account": "my lab", "time": "24:00:00", "cpus_per_node": 64, "exclusive": True, "modules": ["cuda/13.0", "gcc"],
        "options": {"mail-type": "END"}}},
    "slurm_plain": {"nodes": 2, "preflight": False, "slurm": {"requeue": False}},
    "kubernetes": {"nodes": 4, "gpus_per_node": 8, "grace_seconds": 120, **COMMON, "kubernetes": {
        **KUBERNETES, "namespace": "research", "cpus_per_node": 64, "memory_per_node": "512Gi", "image_pull_secret": "registry",
        "priority_class": "high", "node_selector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}},
    "kubernetes_job": {"nodes": 2, **COMMON, "kubernetes": {**KUBERNETES, "api": "job", "workdir": "/data/me"}},
    "hosts": {"gpus_per_node": 8, **COMMON, "hosts": {"hosts": ["me@node1", "node2"], "ssh_port": 2222, "ssh_key": "/home/me/.ssh/a key"}},
    "hosts_deepspeed": {"processes_per_node": 4, "hosts": {"hosts": ["node1", "node2"], "launcher": "deepspeed"}},
    "local": {"processes_per_node": 2, **COMMON, "setup_script": "/opt/env.sh", "local": {}},
}  # fmt: skip


def cluster_of(tree: dict[str, Any]) -> ClusterConfig:
    file = ClusterFile.model_validate({"cluster": tree})
    assert check(file) == []
    return file.cluster


def render(tree: dict[str, Any], job: Job | None = None) -> str:
    cluster = cluster_of(tree)
    return RENDER[cluster.kind](cluster, job or (POD_JOB if cluster.kubernetes else JOB))


# ------------------------------------------------------------------------------------------------------------------- as it is


@pytest.mark.parametrize("name", CASES)
def test_goldens(name: str) -> None:
    """MOETRAIN_WRITE_GOLDENS=1 writes them anew; look at the difference before you commit it."""
    path, text = GOLDENS / f"{name}.txt", render(CASES[name])
    if os.environ.get("MOETRAIN_WRITE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()


def inner_scripts(name: str, text: str) -> list[str]:
    """Scripts within a rendering that run elsewhere, as data to the outer one."""
    if name.startswith("kubernetes"):
        container = pod_spec(list(yaml.safe_load_all(text))[-1])["containers"][0]
        return [container["command"][2].replace("$$", "$")]
    found = re.findall(r"<<'END_OF_NODE'\n(.*?)\nEND_OF_NODE\n", text, re.DOTALL) if name == "hosts" else []
    return found + re.findall(r"^node='(.*?)'$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", CASES)
def test_shellcheck(name: str, tmp_path: Path) -> None:
    text = render(CASES[name])
    outer = [] if name.startswith("kubernetes") else [text]
    inner = inner_scripts(name, text)
    assert len(inner) == (0 if name in ("local", "hosts_deepspeed") else 1)
    for script in outer + inner:
        # `node` comes from the line before, by printf.
        known = f"{LINT}\n# shellcheck disable=SC2154\n" if script in inner else ""
        assert shellcheck(known + script, tmp_path / "script.sh") == ""


def test_examples_read() -> None:
    """The files in launch/clusters/ read and render."""
    kinds = set()
    for path in sorted((ROOT / "launch/clusters").glob("*.yaml")):
        cluster = load_cluster(path)
        kinds.add(cluster.kind)
        assert RENDER[cluster.kind](cluster, POD_JOB if cluster.kubernetes else JOB)
        assert path.stem == cluster.kind
    assert kinds == set(RENDER)


def test_job_names() -> None:
    """A DNS label of 40 characters at most from any path."""
    cases = {"runs/moe": "moe", "runs/My_Run.v2/": "my-run-v2", "/data/2024": "run-2024", "x/--": "run", "a" * 60: "a" * 40, "é": "run"}
    for path, name in cases.items():
        assert job_name(path) == name and re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name)


# ------------------------------------------------------------------------------------------------------------------ kubernetes


def pod_spec(document: dict[str, Any]) -> dict[str, Any]:
    return job_spec(document)["template"]["spec"]


def job_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"] if document["kind"] == "JobSet" else document["spec"]


@pytest.mark.parametrize("name", ["kubernetes", "kubernetes_job"])
def test_kubernetes_schemas(name: str, tmp_path: Path) -> None:
    """ConfigMap, Service and Job by the strict schemas of Kubernetes; a JobSet's Job too, and the rest of it by the fields that its CRD has
    (kubernetes-sigs/jobset, config/components/crd, v1alpha2)."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="one of the dev extras: pip install kubernetes-validate")
    documents = list(yaml.safe_load_all(render(CASES[name])))
    assert [d["kind"] for d in documents] == (["ConfigMap", "JobSet"] if name == "kubernetes" else ["ConfigMap", "Service", "Job"])
    for document in documents:
        if document["kind"] == "JobSet":
            assert set(document) == {"apiVersion", "kind", "metadata", "spec"} and document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
            spec = document["spec"]
            fields = {"coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy", "suspend"}
            assert set(spec) <= fields and isinstance(spec["failurePolicy"]["maxRestarts"], int)
            assert set(spec["network"]) <= {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"}
            (group,) = spec["replicatedJobs"]
            assert set(group) <= {"name", "replicas", "template", "dependsOn", "groupName"} and set(group["template"]) <= {"metadata", "spec"}
            document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(document, "1.34", strict=True)
        if document["kind"] == "Job":
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate({**document, "spec": {**document["spec"], "paralellism": 2}}, "1.34", strict=True)


def test_pods_find_each_other() -> None:
    """The name that they look for is the one that Kubernetes gives pod 0: JOBSET-GROUP-JOB-POD.SUBDOMAIN, or JOB-POD.SUBDOMAIN."""
    for name, host in (("kubernetes", "moe-node-0-0.moe"), ("kubernetes_job", "moe-0.moe")):
        documents = list(yaml.safe_load_all(render(CASES[name])))
        words = pod_spec(documents[-1])["containers"][0]["args"]
        assert words[words.index("--rdzv-endpoint") + 1] == f"{host}:29500"
        if name == "kubernetes_job":
            assert documents[1]["spec"]["selector"] == {"job-name": "moe"} and documents[1]["metadata"]["name"] == "moe"
            assert pod_spec(documents[-1])["subdomain"] == "moe"
    # A run_dir that is on no volume would go with the pod.
    with pytest.raises(ConfigError, match=r"run_dir /home/me/runs/moe: lies on none of cluster.kubernetes.claims \(/data, /scratch\)"):
        render(CASES["kubernetes"], dataclasses.replace(JOB, workdir="/home/me"))


def expand(text: str, variables: dict[str, str]) -> str:
    """As the kubelet does with command, args and env: $(NAME) is a variable, $$ a dollar sign, all else stands for itself."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


def play_pod(stage: Stage, text: str, index: int, **environment: str) -> tuple[Any, dict[str, Any]]:
    """Run a pod's command as the kubelet would."""
    container = pod_spec(list(yaml.safe_load_all(text))[-1])["containers"][0]
    variables: dict[str, str] = {"JOB_COMPLETION_INDEX": str(index)}
    for entry in container["env"]:
        variables[entry["name"]] = expand(entry["value"], variables) if "value" in entry else "from the secret"
    words = [expand(w, variables) for w in container["command"] + container["args"]]
    return stage.play(words, **{**variables, **environment}), container


@pytest.mark.parametrize("name", ["kubernetes", "kubernetes_job"])
def test_pod(name: str, tmp_path: Path) -> None:
    """Preflight, then the run; status 75, which the failure policy does not count, after a run that was asked to save and end."""
    stage = Stage(tmp_path / "stage")
    python = tmp_path / "python"
    stage.program(python)
    job = dataclasses.replace(POD_JOB, python=str(python), run_dir=f"/data/{tmp_path.name}")
    text = render(CASES[name], job).replace(f"/data/{tmp_path.name}/status.json", f"{tmp_path}/status.json")
    (tmp_path / "status.json").write_text('{"state": "preempted", "steps_done": 3}')
    played, container = play_pod(stage, text, 0, STATUS="")
    assert played.code == 0, "the status of an earlier start must not count"
    first, second = played.of("python")
    assert first[-6:] == ["-m", "moetrain", "doctor", "--ranks", "--config", "/etc/moetrain/config.yaml"] and "is_host=1" in first
    assert second[-5:] == ["-m", "moetrain", "train", "--config", "/etc/moetrain/config.yaml"]
    assert second[second.index("--max-restarts") + 1] == "3" and first[first.index("--max-restarts") + 1] == "0"
    assert all(call[call.index("--nnodes") + 1] == str(CASES[name]["nodes"]) for call in (first, second))
    played, _ = play_pod(stage, text, 1, STATUS=str(tmp_path / "status.json"))
    assert played.code == 75 and "is_host=0" in played.of("python")[0]
    rules = job_spec(list(yaml.safe_load_all(text))[-1])["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "Ignore" and rules[0]["onExitCodes"]["values"] == [75]
    assert {e["name"]: e.get("valueFrom") for e in container["env"]}["WANDB_API_KEY"] == {
        "secretKeyRef": {"name": "moetrain-secrets", "key": "WANDB_API_KEY"}
    }


def test_pod_hands_sigterm_on(tmp_path: Path) -> None:
    """The kubelet tells process 1 alone; torchrun must hear of it, and the shell must wait until it has ended."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\nsave() { sleep 0.3; echo '{\"state\": \"preempted\"}' >\"$MOETRAIN_STATUS\"; exit 1; }\n"
        "trap save TERM\necho ready\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    script = pod_spec(list(yaml.safe_load_all(render(CASES["kubernetes"])))[-1])["containers"][0]["command"][2].replace("$$", "$")
    environment = {**os.environ, "JOB_COMPLETION_INDEX": "0", "MOETRAIN_STATUS": str(tmp_path / "status.json"), "MOETRAIN_PREFLIGHT": "0"}
    words = ["bash", "-c", script, "moetrain", str(python)]
    process = subprocess.Popen(words, env={**environment, "MOETRAIN_MAX_RESTARTS": "3"}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(30) == 75


# --------------------------------------------------------------------------------------------------------------- hostile names

FRAGMENTS = [
    "$(touch HACKED)", "`touch HACKED`", "'", '"', "\\", ";touch HACKED;", "& touch HACKED &", "| touch HACKED", "> HACKED", "\\'", '\\"', "$HOME",
    "${IFS}", "$$", "$(HOME)", "*", "?", "~", "!", "#", "%j", "%", "-rf", "--", " ", "  ", "(", ")", "{a,b}", "[x]", "<", "é", "日本", ": ", "- ",
    "&x", "yes", "1e3", "END_OF_NODE", "EOF", "=", ",", "@", "null", "{}",
    "/bin/touch HACKED",
]  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=6).map("".join)
hostile_name = hostile.map(lambda s: s.replace("/", "_")).filter(lambda s: s.strip(".") and len(s.encode()) < 100)
# Not made smaller: each try starts a dozen processes.
drawn = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate))


class Names:
    """A hostile text for each field, with the folders and files that scripts expect under such names."""

    def __init__(self, place: Path, number: int, texts: list[str], names: list[str]) -> None:
        self.place = place / str(number)
        self.stage = Stage(self.place / "stage")
        self.texts = texts
        self.workdir, self.python, self.setup = self.place / f"w{names[0]}", self.place / "bin" / names[1], self.place / f"s{names[2]}"
        self.run_dir = names[3]
        for folder in (self.workdir / self.run_dir, self.python.parent):
            folder.mkdir(parents=True)
        self.stage.program(self.python)
        self.setup.write_text('[ -z "$PLACE" ] || : >"$PLACE/setup-ran"\n')
        folder = self.workdir / f"{self.run_dir}.job"
        folder.mkdir()
        self.job = Job("moe", str(self.workdir), self.run_dir, str(folder), f"a: {json.dumps(texts[0])}\n", str(self.python))
        self.common = {"environment": {"VALUE": texts[0]}, "setup_script": str(self.setup)}
        self.status = str(self.workdir / self.run_dir / "status.json")

    def files(self) -> set[str]:
        return {str(p.relative_to(self.place)) for p in self.place.rglob("*") if "stage" not in p.relative_to(self.place).parts[:1]}

    def lint(self, text: str) -> None:
        assert shellcheck(text, self.stage.place / "lint.sh") == ""

    def check(self, played: Any, before: set[str], *, made: set[str], programs: set[str]) -> None:
        """Nothing ran but the stand-ins, no file came into being, and python was called with the run's own config file."""
        assert not played.of("UNKNOWN"), played.calls
        assert {call[0] for call in played.calls} <= programs | {self.python.name}, played.calls
        new = {str(Path(name)) for name in self.files() - before}
        assert new == {str(Path(name).relative_to(self.place)) for name in made}
        assert not [p for p in self.stage.place.rglob("*HACKED*") if p.is_file()]
        calls = played.of(self.python.name)
        assert [c[-1] for c in calls] == [self.job.config_file] * len(calls) and calls, played.said
        assert played.value == self.texts[0]


@pytest.fixture
def counter() -> Any:
    numbers = iter(range(10**6))
    return lambda: next(numbers)


@drawn
@given(texts=st.lists(hostile, min_size=8, max_size=8), names=st.lists(hostile_name, min_size=4, max_size=4))
def test_slurm_runs_no_name(tmp_path: Path, counter: Any, texts: list[str], names: list[str]) -> None:
    given = Names(tmp_path, counter(), texts, names)
    fields = dict(zip(("partition", "account", "qos", "reservation", "constraint", "exclude"), texts[1:7]))
    tree = {**given.common, "nodes": 2, "slurm": {**fields, "modules": texts[6:8], "options": {"comment": texts[7]}}}
    if "\\" in given.job.folder:
        with pytest.raises(ConfigError, match="backslash"):
            render(tree, given.job)
        return
    text = render(tree, given.job)
    given.lint(text)
    script = given.place / "stage" / "job.sbatch"
    script.write_text(text)
    before = given.files()
    played = given.stage.play(["bash", str(script)], STATUS=given.status)
    given.check(played, before, made={given.status}, programs={"srun", "scontrol", "module"})
    assert played.of("module") == [["load", *texts[6:8]]] and (given.stage.place / "setup-ran").exists()
    assert played.of("scontrol")[-1] == ["requeue", "20005"], "preempted: it comes back"
    assert sbatch_options(text)["comment"] == texts[7] and [sbatch_options(text)[name] for name in fields] == list(fields.values())
    assert sbatch_options(text)["output"].replace("%%", "%") == given.job.folder + "/slurm-%j.log"
    preflight, train = played.of(given.python.name)
    assert preflight[-4:-1] == ["doctor", "--ranks", "--config"] and train[-3:-1] == ["train", "--config"]
    # 20000 + 20005 % 20000, and the first IPv4 address of the head node.
    assert train[train.index("--rdzv-endpoint") + 1] == "10.0.0.7:20005" and train[train.index("--rdzv-id") + 1] == "20005-0"
    assert "is_host=1" in train


def sbatch_options(text: str) -> dict[str, str]:
    """#SBATCH lines as sbatch reads them (22.05, src/sbatch/opt.c): quotes group, a backslash takes the next character as it is, also between
    single quotes, and a bare `#` starts a comment."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#SBATCH "):
            continue
        rest, argument, quote = iter(line[len("#SBATCH ") :]), "", ""
        for c in rest:
            if c == "\\":
                argument += next(rest)
            elif quote and c == quote:
                quote = ""
            elif not quote and c in "'\"":
                quote = c
            elif not quote and (c == "#" or c.isspace()):
                raise AssertionError(f"{line!r}: what follows is lost")
            else:
                argument += c
        assert not quote
        name, _, value = argument.removeprefix("--").partition("=")
        found[name] = value
    return found


def test_slurm_restarts_have_names_of_their_own(tmp_path: Path) -> None:
    """The rendezvous of a requeued job is not the one before; a run that made no step is not requeued for ever; a failed one not at all."""
    stage = Stage(tmp_path / "stage")
    stage.program(tmp_path / "python")
    (tmp_path / "run").mkdir()
    status = tmp_path / "run/status.json"
    job = Job("moe", str(tmp_path), "run", str(tmp_path / "run.job"), "", str(tmp_path / "python"))
    script = tmp_path / "job.sbatch"
    script.write_text(render({"nodes": 2, "preflight": False, "slurm": {}}, job))
    status.write_text('{"state": "preempted", "steps_done": 3}')
    stage.program(tmp_path / "python", stage_python(status, '{"state": "finished"}'))
    played = stage.play(["bash", str(script)], SLURM_RESTART_COUNT="2")
    (call,) = played.of("python")
    assert call[call.index("--rdzv-id") + 1] == "20005-2" and played.code == 0 and not played.of("scontrol")[1:]
    stage.program(tmp_path / "python", stage_python(status, '{"state": "preempted", "step": 0, "steps_done": 0, "signal": "USR2"}'))
    played = stage.play(["bash", str(script)])
    assert played.code == 1 and "not requeued" in played.said and not played.of("scontrol")[1:]
    stage.program(tmp_path / "python", stage_python(status, '{"state": "failed", "step": 5, "steps_done": 5}') + "exit 3\n")
    played = stage.play(["bash", str(script)])
    assert played.code == 3 and not played.of("scontrol")[1:]
    script.write_text(render({"nodes": 2, "slurm": {"requeue": False}}, job))
    stage.program(tmp_path / "python", "#!/bin/bash\nexit 9\n")
    assert stage.play(["bash", str(script)]).code == 9, "a preflight that finds a problem ends the job"


def stage_python(status: Path, text: str) -> str:
    return f"{RECORD}printf '%s\\n' '{text}' >'{status}'\n"


@drawn
@given(texts=st.lists(hostile, min_size=2, max_size=2), names=st.lists(hostile_name, min_size=4, max_size=4))
def test_local_runs_no_name(tmp_path: Path, counter: Any, texts: list[str], names: list[str]) -> None:
    given = Names(tmp_path, counter(), texts, names)
    script = given.place / "stage" / "job.sh"
    script.write_text(render({**given.common, "local": {}}, given.job))
    given.lint(script.read_text())
    before = given.files()
    given.check(given.stage.play(["bash", str(script)]), before, made=set(), programs=set())
    assert (given.stage.place / "setup-ran").exists()


@drawn
@given(texts=st.lists(hostile, min_size=3, max_size=3), names=st.lists(hostile_name, min_size=4, max_size=4))
def test_hosts_run_no_name(tmp_path: Path, counter: Any, texts: list[str], names: list[str]) -> None:
    """Nor is the value of a secret anywhere but in the environment."""
    given = Names(tmp_path, counter(), texts, names)
    tree = {**given.common, "environment": {}, "secrets": ["VALUE"], "hosts": {"hosts": ["me@n1", "n2"], "ssh_key": texts[1]}}
    text = render(tree, given.job)
    given.lint(text)
    script = given.place / "stage" / "job.sh"
    script.write_text(text)
    before = given.files()
    played = given.stage.play(["bash", str(script)], VALUE=texts[0])
    pids = {f"{given.job.folder}/node-{i}.pid" for i in range(2)}
    given.check(played, before, made=pids, programs={"ssh"})
    assert sorted(call[-3] for call in played.of("ssh")) == ["me@n1", "n2"]
    assert all(call[call.index("-i") + 1] == texts[1] and call[-2:] == ["bash", "-s"] for call in played.of("ssh"))
    trains = [call for call in played.of(given.python.name) if call[-3] == "train"]
    assert sorted(call[call.index("--rdzv-conf") + 1] for call in trains) == ["is_host=0", "is_host=1"] and played.code == 0
    assert all(call[call.index("--rdzv-endpoint") + 1] == "n1:29500" for call in trains)
    secret = "secret-" + "x" * 20
    played = given.stage.play(["bash", str(script)], VALUE=secret)
    assert played.value == secret and secret not in text + played.said + json.dumps(played.calls)


@pytest.mark.parametrize(
    ("status", "starts"),
    [
        (None, 3),  # the launcher itself was lost
        ('{"state": "running", "step": 3, "steps_done": 3}', 3),
        ('{"state": "failed", "step": 3, "retry": true, "error": "x"}', 3),
        ('{"state": "failed", "step": 3, "steps_done": 3, "error": "ValueError: x"}', 1),
        ('{"state": "failed", "step": 0, "steps_done": 0, "retry": false}', 1),
        ('{"state": "preempted", "step": 3, "steps_done": 3}', 1),
    ],
)  # fmt: skip
def test_a_host_starts_its_launcher_again(status: str | None, starts: int, tmp_path: Path) -> None:
    """At most max_restarts times, and not where another start would end like this one."""
    stage = Stage(tmp_path / "stage")
    folder = tmp_path / "folder"
    folder.mkdir()
    job = dataclasses.replace(JOB, workdir=str(folder), run_dir=str(folder), folder=str(folder), python=str(stage.bin / "python3"))
    write = "" if status is None else f"printf '%s\\n' '{status}' >{folder}/status.json\n"
    stage.program(stage.bin / "python3", f"#!/bin/bash\necho start >>{folder}/starts\n{write}exit 1\n")
    script = tmp_path / "job.sh"
    script.write_text(render({"preflight": False, "max_restarts": 2, "hosts": {"hosts": ["n1"]}}, job))
    played = stage.play(["bash", str(script)])
    assert (folder / "starts").read_text().count("start") == starts and played.code == 1
    assert played.said.count("its launcher has ended with status 1; starting another") == starts - 1


@drawn
@given(texts=st.lists(hostile, min_size=6, max_size=6), names=st.lists(hostile_name, min_size=1, max_size=1))
def test_kubernetes_runs_no_name(tmp_path: Path, counter: Any, texts: list[str], names: list[str]) -> None:
    """Every text arrives as it was written, through YAML and through the kubelet's expansion."""
    place = tmp_path / str(counter())
    stage = Stage(place / "stage")
    (place / "bin").mkdir()
    python = place / "bin" / names[0]
    stage.program(python)
    options = {
        "image": texts[1], "claims": [{"claim": "training", "path": f"/data/{texts[2]}"}], "workdir": f"/data/{texts[2]}",
        "node_selector": {"a": texts[3]}, "tolerations": [{"key": texts[4], "value": texts[5]}], "cpus_per_node": 4,
    }  # fmt: skip
    job = Job("moe", options["workdir"], f"runs/{texts[0]}", "/x", f"a: {json.dumps(texts[0])}\n", str(python))
    text = render({"environment": {"VALUE": texts[0]}, "kubernetes": options}, job)
    documents = list(yaml.safe_load_all(text))
    assert documents[0]["data"]["config.yaml"] == job.config
    before = {p for p in place.rglob("*")}
    played, container = play_pod(stage, text, 1, HOME="/root")
    assert not played.of("UNKNOWN") and {c[0] for c in played.calls} == {python.name} and played.value == texts[0], played.said
    assert {p.name for p in place.rglob("*") if p not in before} == {"value"}
    spec = pod_spec(documents[-1])
    assert container["image"] == texts[1] and container["workingDir"] == options["workdir"] == container["volumeMounts"][-1]["mountPath"]
    assert spec["nodeSelector"] == {"a": texts[3]} and spec["tolerations"] == [{"key": texts[4], "operator": "Equal", "value": texts[5]}]
    status = next(e["value"] for e in container["env"] if e["name"] == "MOETRAIN_STATUS")
    assert expand(status, {}) == f"runs/{texts[0]}/status.json"


@pytest.mark.parametrize("kind", RENDER)
def test_no_line_break_gets_through(kind: str) -> None:
    """In a path, which the schema of clusters does not see."""
    for name in ("workdir", "run_dir", "folder", "python"):
        with pytest.raises(ConfigError, match=f"^{name} .*holds a line break"):
            render(CASES[kind], dataclasses.replace(JOB, **{name: "/data/x\ntouch HACKED"}))


def test_deepspeed_gets_plain_paths_alone() -> None:
    """Its launcher builds shell commands from what it is given."""
    for name in ("workdir", "folder", "python"):
        with pytest.raises(ConfigError, match="the deepspeed launcher quotes poorly"):
            render(CASES["hosts_deepspeed"], dataclasses.replace(JOB, **{name: "/home/me/a b"}))


def test_dry_run_prints_it(tmp_path: Path) -> None:
    """`moetrain submit --dry-run`: the same text, and nothing is written."""
    config = "model: {vocab_size: 9, hidden_size: 8, num_layers: 1, num_heads: 2, intermediate_size: 8}\nrun_dir: runs/moe\n"
    (tmp_path / "c.yaml").write_text(config + "train: {steps: 1, global_batch_size: 8, micro_batch_size: 1}\n")
    (tmp_path / "cluster.yaml").write_text(json.dumps({"cluster": {**CASES["slurm_plain"], "python": "/opt/venv/bin/python"}}))
    words = [sys.executable, "-m", "moetrain", "submit", "c.yaml", "--cluster", "cluster.yaml", "--dry-run", "--train.steps", "2"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.stdout.replace(str(tmp_path), "/home/me/project") == (GOLDENS / "slurm_plain.txt").read_text(), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml", "cluster.yaml"]
