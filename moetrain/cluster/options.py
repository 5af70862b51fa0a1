"""The `cluster:` block of a cluster file: what there is to run on, read as strictly as a config.

Names and paths may hold any printable character: the renderers quote them. What must be a word of a smaller alphabet (hosts, Kubernetes names,
environment variables) is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from moetrain.config import Config, ConfigError, NonNegative, Positive, Section, read_yaml, short, validate


def _one_line(text: str) -> str:
    if not text or not text.isprintable():
        raise PydanticCustomError("one_line", "must be one line of printable text")
    return text


Text = Annotated[str, AfterValidator(_one_line)]
Host = Annotated[str, Field(pattern=r"^(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Duration = Annotated[str, Field(pattern=r"^(?:[0-9]+-[0-9]+(?::[0-9]+){0,2}|[0-9]+(?::[0-9]+){0,2})$")]
Label = Annotated[str, Field(pattern=r"^[a-z](?:[a-z0-9-]*[a-z0-9])?$", max_length=40)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(?:\.[0-9]+)?(?:m|[kMGTPE]i?)?$")]


class SlurmOptions(Section):
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    reservation: Text | None = None
    constraint: Text | None = None
    exclude: Text | None = None
    """Nodes to keep away from, as Slurm writes lists: n[3,7-9]."""
    time: Duration | None = None
    """Limit of one start, such as 24:00:00 or 2-00:00:00; the job requeues itself until the run is done. null: the partition's."""
    cpus_per_node: Positive | None = None
    """Without it most clusters give a task one core, which all ranks of the node then share."""
    memory_per_node: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    exclusive: bool = False
    signal: Literal["USR1", "USR2"] = "USR2"
    """What Slurm sends before the time limit; one of the config's checkpoint.signals. (NCCL has used USR1.)"""
    notice_seconds: Annotated[int, Field(gt=0, le=65535)] = 120
    """How long before the limit; Slurm may be up to a minute early. More than a step and a checkpoint take."""
    requeue: bool = True
    """Go on by itself after the time limit, a preemption or a dead node."""
    modules: list[Text] = []
    """For `module load`."""
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], Text] = {}
    """Any other option of sbatch, by its long name: {mail-type: END}."""


class Toleration(Section):
    key: Text | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: Text | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Claim(Section):
    claim: Label
    """PersistentVolumeClaim that all nodes can write (ReadWriteMany)."""
    path: Annotated[str, Field(pattern=r"^/"), AfterValidator(_one_line)]


class KubernetesOptions(Section):
    image: Text
    api: Literal["jobset", "job"] = "jobset"
    """JobSet (jobset.x-k8s.io, restarts all pods together), or an Indexed Job with a headless Service, which every cluster has."""
    namespace: Label | None = None
    claims: Annotated[list[Claim], Field(min_length=1)]
    workdir: Annotated[str, Field(pattern=r"^/"), AfterValidator(_one_line)] | None = None
    """Folder that relative paths of the config start from; null: the path of the first claim. run_dir must lie on a claim."""
    cpus_per_node: Positive | Quantity | None = None
    memory_per_node: Quantity | None = None
    shared_memory: Quantity = "16Gi"
    """Of /dev/shm, which NCCL uses between the processes of a node."""
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$")] = "nvidia.com/gpu"
    node_selector: dict[Text, Text] = {}
    tolerations: list[Toleration] = []
    priority_class: Label | None = None
    secret: Label | None = None
    """Secret whose keys are the names in cluster.secrets."""
    image_pull_secret: Label | None = None
    port: Annotated[int, Field(ge=1024, lt=65536)] = 29500


class HostsOptions(Section):
    """Machines without a scheduler, reached by ssh with keys; they share the folder of the submission under the same path."""

    hosts: Annotated[list[Host], Field(min_length=1)]
    address: Host | None = None
    """Of the first host, as the others reach it; null: its name in `hosts`."""
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    ssh_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    ssh_key: Text | None = None
    """File of the private key; null: as ssh's own configuration says."""
    port: Annotated[int, Field(ge=1024, lt=65536)] = 29500


class LocalOptions(Section):
    """This machine."""


class ClusterConfig(Section):
    """Exactly one of slurm, kubernetes, hosts, local."""

    name: Label | None = None
    """Of the job; null: the last part of run_dir."""
    nodes: Positive = 1
    """Not needed with hosts, which are counted."""
    gpus_per_node: NonNegative = 0
    processes_per_node: Positive | None = None
    """Ranks; null: one for each GPU, or 1."""
    python: Text | None = None
    """Interpreter that has moetrain; null: the one that submits (Kubernetes: the image's python)."""
    setup_script: Text | None = None
    """Shell file of yours that each node reads before it starts Python; not for Kubernetes."""
    environment: dict[Variable, Text] = {}
    secrets: list[Variable] = []
    """Environment variables whose values are written nowhere: they come from where `moetrain submit` runs, or from kubernetes.secret."""
    preflight: bool = True
    """Look at software, GPUs, network and disk on all ranks before the run (`moetrain doctor --ranks`)."""
    max_restarts: NonNegative = 3
    """Times that torchrun starts the ranks again after one has died; with hosts, also that a host starts a torchrun again that has died."""
    grace_seconds: Positive = 30
    """Time between SIGTERM and the end by force: a step and a checkpoint must fit in. For Slurm no more than its KillWait."""
    slurm: SlurmOptions | None = None
    kubernetes: KubernetesOptions | None = None
    hosts: HostsOptions | None = None
    local: LocalOptions | None = None

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def num_nodes(self) -> int:
        return self.nodes if self.hosts is None else len(self.hosts.hosts)

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or max(1, self.gpus_per_node)


class ClusterFile(Section):
    cluster: ClusterConfig


KINDS = ("slurm", "kubernetes", "hosts", "local")
_OURS = {  # sbatch options that the template sets, by its own fields
    "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "partition", "account", "qos", "reservation", "constraint", "exclude", "time",
    "cpus-per-task", "mem", "exclusive", "signal", "requeue", "no-requeue", "output", "error", "open-mode", "job-name", "chdir", "export", "array",
    "wrap", "wait", "parsable", "test-only",
}  # fmt: skip
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a cluster file. Raises ConfigError with every reason."""
    where = f"cluster file {path}"
    try:
        tree = read_yaml(path, where)
    except OSError as error:
        raise ConfigError(f"{where}: can't be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must have one section, cluster, found {'nothing' if tree is None else short(tree)}")
    return validate(ClusterFile, tree, where, check).cluster


def check(file: ClusterFile) -> list[str]:
    """Cross-field rules; every broken one as a line."""
    cluster, bad = file.cluster, []
    given = [name for name in KINDS if getattr(cluster, name) is not None]
    if len(given) != 1:
        return [f"cluster: exactly one of {', '.join(KINDS)} says where to run; found {', '.join(given) or 'none'}"]
    ranks = cluster.ranks_per_node
    if cluster.gpus_per_node and ranks > cluster.gpus_per_node:
        bad.append(f"cluster.processes_per_node ({ranks}) is more than cluster.gpus_per_node ({cluster.gpus_per_node}); each rank needs a GPU")
    for name in cluster.environment:
        if any(word in name.upper() for word in _SECRET_WORDS):
            bad.append(f"cluster.environment.{name}: a value written here lands in scripts and logs; name it in cluster.secrets instead")
        if name in cluster.secrets:
            bad.append(f"cluster.secrets: {name} is in cluster.environment too; keep one")
    if cluster.slurm is not None:
        for name in sorted(set(cluster.slurm.options) & _OURS):
            bad.append(f"cluster.slurm.options.{name}: moetrain sets it itself; use its own field, or leave it out")
    if cluster.kubernetes is not None:
        _check_kubernetes(cluster, bad)
    if cluster.hosts is not None:
        _check_hosts(cluster, bad)
    if cluster.local is not None and cluster.nodes != 1:
        bad.append(f"cluster.nodes ({cluster.nodes}): cluster.local is one machine; use 1, or slurm, kubernetes or hosts")
    return bad


def _check_kubernetes(cluster: ClusterConfig, bad: list[str]) -> None:
    options = cluster.kubernetes
    assert options is not None
    if cluster.setup_script is not None:
        bad.append(f"cluster.setup_script ({cluster.setup_script}) has no effect with cluster.kubernetes: build it into the image")
    if cluster.secrets and options.secret is None:
        bad.append("cluster.kubernetes.secret: missing; name the Secret that holds " + ", ".join(cluster.secrets))
    if options.secret is not None and not cluster.secrets:
        bad.append(f"cluster.kubernetes.secret ({options.secret}) has an effect only with names in cluster.secrets")
    paths = [claim.path for claim in options.claims]
    for path in sorted({p for p in paths if paths.count(p) > 1}):
        bad.append(f"cluster.kubernetes.claims: {path} is given twice")
    for i, toleration in enumerate(options.tolerations):
        if toleration.operator == "Equal" and toleration.key is None:
            bad.append(f"cluster.kubernetes.tolerations.{i}.key: missing; operator Equal needs it")
        if toleration.operator == "Exists" and toleration.value is not None:
            bad.append(f"cluster.kubernetes.tolerations.{i}.value ({toleration.value}) has no effect with operator: Exists")


def _check_hosts(cluster: ClusterConfig, bad: list[str]) -> None:
    options = cluster.hosts
    assert options is not None
    if "nodes" in cluster.model_fields_set and cluster.nodes != len(options.hosts):
        bad.append(f"cluster.nodes ({cluster.nodes}) but cluster.hosts.hosts names {len(options.hosts)}; leave nodes out, or make them agree")
    if options.launcher == "deepspeed":
        # Its launcher puts what it is given into shell commands of its own making.
        for name in ("environment", "secrets", "setup_script"):
            if getattr(cluster, name):
                bad.append(f"cluster.{name}: the deepspeed launcher does not carry it safely; use cluster.hosts.launcher: torchrun")
        for name in ("preflight", "max_restarts", "grace_seconds"):
            if name in cluster.model_fields_set and getattr(cluster, name):
                bad.append(f"cluster.{name} ({getattr(cluster, name)}) is for torchrun; the deepspeed launcher has nothing like it")
        if options.ssh_key is not None:
            bad.append(f"cluster.hosts.ssh_key ({options.ssh_key}): the deepspeed launcher takes none; name the key in ssh's own configuration")


def check_config(cluster: ClusterConfig, config: Config) -> list[str]:
    """What of a training config does not fit the cluster file; every mismatch as a line."""
    bad = []
    if cluster.slurm is not None and cluster.slurm.signal not in config.checkpoint.signals:
        known = ", ".join(config.checkpoint.signals) or "none"
        bad.append(f"cluster.slurm.signal ({cluster.slurm.signal}) would end the run without a save: the config's checkpoint.signals has {known}")
    if "TERM" not in config.checkpoint.signals:
        bad.append("checkpoint.signals: TERM is missing, which schedulers and `moetrain cancel` send before they kill")
    return bad
