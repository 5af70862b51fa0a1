"""Kubernetes objects: the config as a ConfigMap, and the pods as a JobSet, or as an Indexed Job with a headless Service.

One pod is one node. Pods have stable names, so the others find pod 0 by its own. A run that was asked to save and end leaves with status 75,
which the pod failure policy does not count: the pods are made anew and go on; one that does not come further leaves with 78, which ends the job.
Any other failure is torchrun's to restart, then (JobSet) all pods together, then the end. Kubernetes expands `$(NAME)` in arguments and values; a
dollar sign in a user's text is doubled against that.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from moetrain.cluster.job import ENDED, FRESH_STORE, HOPELESS, PREEMPTED, Job, preflight_words, train_words
from moetrain.cluster.options import ClusterConfig
from moetrain.config import ConfigError

CONFIG_FILE = "/etc/moetrain/config.yaml"
PREEMPTED_STATUS = 75  # EX_TEMPFAIL
HOPELESS_STATUS = 78  # EX_CONFIG

# $@ is torchrun without its restarts; everything that a user named comes in as arguments or environment. The shell is process 1, which alone gets
# the kubelet's SIGTERM.
_NODE = f"""set -u
trap '' USR1 USR2
run() {{
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null' TERM
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || return "$code"
    done
}}
is_host=$((JOB_COMPLETION_INDEX == 0))
[ "$is_host" -eq 0 ] || rm -f -- "$MOETRAIN_STATUS"
if [ "$MOETRAIN_PREFLIGHT" -eq 1 ]; then
    run "$@" --rdzv-id preflight --rdzv-conf "is_host=$is_host" --max-restarts 0 {" ".join(preflight_words(CONFIG_FILE))} || exit
fi
run "$@" --rdzv-id train --rdzv-conf "is_host=$is_host" --max-restarts "$MOETRAIN_MAX_RESTARTS" {" ".join(train_words(CONFIG_FILE))}
code=$?
for _ in 1 2 3 4 5 6 7 8 9 10; do  # a network file system may be late to show how it ended
    if grep -qsE -- '{ENDED}' "$MOETRAIN_STATUS"; then break; fi
    sleep 1
done
if grep -qs -- '{PREEMPTED}' "$MOETRAIN_STATUS"; then exit {PREEMPTED_STATUS}; fi
if grep -qs -- '{HOPELESS}' "$MOETRAIN_STATUS"; then exit {HOPELESS_STATUS}; fi
exit "$code"
"""


def render(cluster: ClusterConfig, job: Job) -> str:
    """Text for `kubectl apply -f -`. Raises ConfigError for a run_dir that no volume holds."""
    options = cluster.kubernetes
    assert options is not None, "the caller chose by cluster.kind"
    run_dir = job.run_dir if job.run_dir.startswith("/") else f"{job.workdir.rstrip('/')}/{job.run_dir}"
    if not any(f"{run_dir}/".startswith(f"{claim.path.rstrip('/')}/") for claim in options.claims):
        paths = ", ".join(claim.path for claim in options.claims)
        raise ConfigError(f"run_dir {run_dir}: lies on none of cluster.kubernetes.claims ({paths}) and would be lost with the pod")
    metadata = {"name": job.name, "labels": {"app.kubernetes.io/name": "moetrain", "app.kubernetes.io/instance": job.name}}
    metadata |= {"namespace": options.namespace} if options.namespace else {}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": job.config}}
    if options.api == "job":
        job_spec = _job_spec(cluster, job, host=f"{job.name}-0.{job.name}", failures=cluster.max_restarts)
        job_spec["template"]["spec"]["subdomain"] = job.name
        service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": job.name}}
        documents = [
            config,
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_spec},
        ]
    else:
        job_spec = _job_spec(cluster, job, host=f"{job.name}-node-0-0.{job.name}", failures=0)
        spec = {
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": cluster.max_restarts,
                "rules": [{"name": "no-progress", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job_spec}}],
        }
        documents = [config, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]
    return "---\n".join(yaml.dump(d, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20) for d in documents)


def _job_spec(cluster: ClusterConfig, job: Job, *, host: str, failures: int) -> dict[str, Any]:
    ignored = [
        {"action": "Ignore", "onExitCodes": {"containerName": "moetrain", "operator": "In", "values": [PREEMPTED_STATUS]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "moetrain", "operator": "In", "values": [HOPELESS_STATUS]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    labels = {"app.kubernetes.io/name": "moetrain", "app.kubernetes.io/instance": job.name}
    return {
        "completionMode": "Indexed",
        "completions": cluster.num_nodes,
        "parallelism": cluster.num_nodes,
        "backoffLimit": failures,
        "podFailurePolicy": {"rules": ignored},
        "template": {"metadata": {"labels": labels}, "spec": _pod_spec(cluster, job, host)},
    }


def _pod_spec(cluster: ClusterConfig, job: Job, host: str) -> dict[str, Any]:
    options = cluster.kubernetes
    assert options is not None, "the caller chose by cluster.kind"
    torchrun = [
        job.python, "-m", "torch.distributed.run", "--nnodes", str(cluster.num_nodes), "--nproc-per-node", str(cluster.ranks_per_node),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{options.port}",
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": "1",
        **cluster.environment,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.grace_seconds),
        FRESH_STORE: "1",
        "MOETRAIN_STATUS": job.status_file,
        "MOETRAIN_PREFLIGHT": str(int(cluster.preflight)),
        "MOETRAIN_MAX_RESTARTS": str(cluster.max_restarts),
    }
    env: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in environment.items()]
    env += [{"name": name, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": name}}} for name in cluster.secrets]
    resources = {"cpu": options.cpus_per_node, "memory": options.memory_per_node}
    resources |= {options.gpu_resource: str(cluster.gpus_per_node)} if cluster.gpus_per_node else {}
    resources = {name: str(value) for name, value in resources.items() if value is not None}
    container: dict[str, Any] = {
        "name": "moetrain",
        "image": options.image,
        "workingDir": job.workdir,
        "command": ["/bin/bash", "-c", _literal(_NODE), "moetrain"],
        "args": [_literal(word) for word in torchrun],
        "env": env,
        **({"resources": {"requests": resources, "limits": dict(resources)}} if resources else {}),
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FILE.rpartition("/")[0], "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": f"claim-{i}", "mountPath": claim.path} for i, claim in enumerate(options.claims)),
        ],
    }
    tolerations = [{k: v for k, v in t.model_dump().items() if v is not None} for t in options.tolerations]
    return {
        "restartPolicy": "Never",
        # The ranks save while this lasts; torchrun needs a little of it for itself.
        "terminationGracePeriodSeconds": cluster.grace_seconds + 15,
        "automountServiceAccountToken": False,
        **({"imagePullSecrets": [{"name": options.image_pull_secret}]} if options.image_pull_secret else {}),
        **({"priorityClassName": options.priority_class} if options.priority_class else {}),
        **({"nodeSelector": dict(options.node_selector)} if options.node_selector else {}),
        **({"tolerations": tolerations} if tolerations else {}),
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": job.name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
            *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim.claim}} for i, claim in enumerate(options.claims)),
        ],
    }


def _literal(text: str) -> str:
    """Kubernetes makes `$(NAME)` the value of a variable and `$$` a dollar sign."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """No anchors, blocks for text of several lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # As a block a script stays readable. Else only what no reader takes for a number or a truth value is bare: they differ in `y` and `1e3`.
    style = "|" if "\n" in value else None if re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]{2,}", value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
