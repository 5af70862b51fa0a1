"""Cluster files: what can't work is refused with the field, the value and the way out, as in configs; every field is read by a renderer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.cluster.options import ClusterConfig, check_config, load_cluster
from moetrain.config import ConfigError, config_from_dict, inner_sections

ROOT = Path(__file__).resolve().parents[2]
POD = {"image": "i", "claims": [{"claim": "c", "path": "/d"}]}


def read(tmp_path: Path, cluster: Any) -> ClusterConfig:
    (tmp_path / "cluster.yaml").write_text(json.dumps({"cluster": cluster}))
    return load_cluster(tmp_path / "cluster.yaml")


def test_defaults(tmp_path: Path) -> None:
    cluster = read(tmp_path, {"local": {}})
    assert (cluster.kind, cluster.num_nodes, cluster.ranks_per_node, cluster.preflight) == ("local", 1, 1, True)
    assert read(tmp_path, {"gpus_per_node": 8, "slurm": {}}).ranks_per_node == 8
    assert read(tmp_path, {"gpus_per_node": 8, "processes_per_node": 4, "slurm": {}}).ranks_per_node == 4
    assert read(tmp_path, {"hosts": {"hosts": ["a", "b", "c"]}}).num_nodes == 3
    assert read(tmp_path, {"slurm": {}}).slurm.signal == "USR2" and read(tmp_path, {"slurm": {}}).slurm.requeue


@pytest.mark.parametrize(
    ("cluster", "problem"),
    [
        ({}, "cluster: exactly one of slurm, kubernetes, hosts, local says where to run; found none"),
        ({"slurm": {}, "local": {}}, "cluster: exactly one of slurm, kubernetes, hosts, local says where to run; found slurm, local"),
        ({"slurmm": {}}, "cluster.slurmm: unknown key; did you mean cluster.slurm?"),
        ({"slurm": {"partiton": "x"}}, "cluster.slurm.partiton: unknown key; did you mean cluster.slurm.partition?"),
        ({"slurm": {"partition": "a\nb"}}, "cluster.slurm.partition: must be one line of printable text, found 'a\\nb'"),
        ({"slurm": {"partition": ""}}, "cluster.slurm.partition: must be one line of printable text, found ''"),
        ({"slurm": {"time": "1 day"}}, "cluster.slurm.time: string should match pattern"),
        ({"slurm": {"time": 60}}, "cluster.slurm.time: input should be a valid string, found 60"),
        ({"slurm": {"signal": "TERM"}}, "cluster.slurm.signal: input should be 'USR1' or 'USR2', found 'TERM'"),
        ({"slurm": {"options": {"nodes": "3"}}}, "cluster.slurm.options.nodes: moetrain sets it itself"),
        ({"slurm": {"options": {"a b": "3"}}}, "cluster.slurm.options.a b.[key]: string should match pattern"),
        ({"nodes": 0, "slurm": {}}, "cluster.nodes: input should be greater than 0, found 0"),
        ({"nodes": 2, "local": {}}, "cluster.nodes (2): cluster.local is one machine; use 1, or slurm, kubernetes or hosts"),
        ({"gpus_per_node": 4, "processes_per_node": 8, "slurm": {}}, "cluster.processes_per_node (8) is more than cluster.gpus_per_node (4)"),
        ({"name": "My Job", "slurm": {}}, "cluster.name: string should match pattern"),
        ({"environment": {"A B": "x"}, "slurm": {}}, "cluster.environment.A B.[key]: string should match pattern"),
        ({"environment": {"WANDB_API_KEY": "x"}, "slurm": {}}, "cluster.environment.WANDB_API_KEY: a value written here lands in scripts and logs"),
        ({"environment": {"X": "x"}, "secrets": ["X"], "slurm": {}}, "cluster.secrets: X is in cluster.environment too; keep one"),
        ({"secrets": ["$(id)"], "slurm": {}}, "cluster.secrets.0: string should match pattern"),
        ({"hosts": {"hosts": []}}, "cluster.hosts.hosts: list should have at least 1 item"),
        ({"hosts": {"hosts": ["-oProxyCommand=x"]}}, "cluster.hosts.hosts.0: string should match pattern"),
        ({"hosts": {"hosts": ["a b"]}}, "cluster.hosts.hosts.0: string should match pattern"),
        ({"nodes": 3, "hosts": {"hosts": ["a"]}}, "cluster.nodes (3) but cluster.hosts.hosts names 1; leave nodes out, or make them agree"),
        ({"secrets": ["X"], "hosts": {"hosts": ["a"], "launcher": "deepspeed"}}, "cluster.secrets: the deepspeed launcher does not carry it safely"),
        ({"preflight": True, "hosts": {"hosts": ["a"], "launcher": "deepspeed"}}, "cluster.preflight (True) is for torchrun"),
        ({"hosts": {"hosts": ["a"], "launcher": "deepspeed", "ssh_key": "k"}}, "cluster.hosts.ssh_key (k): the deepspeed launcher takes none"),
        ({"kubernetes": {"image": "i", "claims": []}}, "cluster.kubernetes.claims: list should have at least 1 item"),
        ({"kubernetes": {"claims": POD["claims"]}}, "cluster.kubernetes.image: missing; it has no default"),
        ({"kubernetes": {**POD, "claims": POD["claims"] * 2}}, "cluster.kubernetes.claims: /d is given twice"),
        ({"secrets": ["X"], "kubernetes": POD}, "cluster.kubernetes.secret: missing; name the Secret that holds X"),
        ({"kubernetes": {**POD, "secret": "s"}}, "cluster.kubernetes.secret (s) has an effect only with names in cluster.secrets"),
        ({"setup_script": "x", "kubernetes": POD}, "cluster.setup_script (x) has no effect with cluster.kubernetes: build it into the image"),
        ({"kubernetes": {**POD, "tolerations": [{}]}}, "cluster.kubernetes.tolerations.0.key: missing; operator Equal needs it"),
        ({"kubernetes": {**POD, "tolerations": [{"operator": "Exists", "value": "x"}]}}, "cluster.kubernetes.tolerations.0.value (x) has no effect"),
        ({"kubernetes": {**POD, "namespace": "a/b"}}, "cluster.kubernetes.namespace: string should match pattern"),
        ({"kubernetes": {**POD, "workdir": "data"}}, "cluster.kubernetes.workdir: string should match pattern"),
        ({"kubernetes": {**POD, "memory_per_node": "5 GB"}}, "cluster.kubernetes.memory_per_node: string should match pattern"),
    ],
)  # fmt: skip
def test_refused(cluster: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, cluster)
    assert str(caught.value).startswith(f"cluster file {tmp_path}/cluster.yaml: {problem}"), caught.value
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: can't be read: No such file"):
        load_cluster(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"must have one section, cluster, found \[1\]"):
        load_cluster(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="must have one section, cluster, found nothing"):
        load_cluster(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("slurm: {}\n")
    with pytest.raises(ConfigError, match="(?s)2 errors.*cluster: missing; it has no default.*slurm: unknown key; did you mean cluster"):
        load_cluster(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("cluster: !!python/object/apply:os.system [id]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_cluster(tmp_path / "c.yaml")


def test_signals_must_be_those_of_the_run(tmp_path: Path) -> None:
    slurm = read(tmp_path, {"slurm": {"signal": "USR1"}})
    assert check_config(slurm, config_from_dict({"checkpoint": {"signals": ["TERM", "USR1"]}})) == []
    (line,) = check_config(slurm, config_from_dict({}))
    assert line == "cluster.slurm.signal (USR1) would end the run without a save: the config's checkpoint.signals has TERM, USR2"
    (line,) = check_config(read(tmp_path, {"local": {}}), config_from_dict({"checkpoint": {"signals": ["USR2"]}}))
    assert line.startswith("checkpoint.signals: TERM is missing")


def test_every_option_is_read() -> None:
    """Each field of the schema is named by the code that renders or submits."""
    code = "\n".join(p.read_text() for p in [*(ROOT / "moetrain/cluster").glob("*.py"), ROOT / "moetrain/submit.py"])
    code = code.replace((ROOT / "moetrain/cluster/options.py").read_text().split("KINDS = ")[0], "")
    todo, seen = [ClusterConfig], []
    while todo:
        section = todo.pop()
        seen.append(section.__name__)
        for name, field in section.model_fields.items():
            assert f".{name}" in code or section.__name__ == "Toleration", f"{section.__name__}.{name}"
            todo += [cls for cls, _ in inner_sections(field.annotation)]
    assert set(seen) == {"ClusterConfig", "SlurmOptions", "KubernetesOptions", "HostsOptions", "LocalOptions", "Claim", "Toleration"}
