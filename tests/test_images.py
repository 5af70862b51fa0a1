"""The images: what the compose file allows, and (slow) that the CPU image builds without a network, trains, and trains the same on two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker" / "compose.yaml"
BASE, IMAGE = "moetrain-base:local", "moetrain:cpu-test"
CONFIG = """run_dir: run
model:
  {vocab_size: 259, hidden_size: 32, num_layers: 2, num_heads: 4, intermediate_size: 64, max_position_embeddings: 64,
   moe: {num_experts: 4, expert_dim: 16, router: {type: sigmoid_ste, target_active: 2.0}}}
data: {seq_len: 32, train: [{name: d, path: d}]}
train: {steps: 5, global_batch_size: 8, micro_batch_size: 4, dtype: float64}
"""


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def test_nodes_have_no_rights() -> None:
    """Neither container can write to its image, gain rights or reach another network; both see the same folder."""
    nodes, networks = services(), yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["networks"]
    assert set(nodes) == {"node0", "node1"} and all(n["internal"] for n in networks.values())
    for node in nodes.values():
        assert node["read_only"] and node["cap_drop"] == ["ALL"] and node["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "network_mode", "ports", "devices", "pid"} & set(node)
        assert "10001" in node["user"] and node["networks"] == ["nodes"] and node["volumes"] == nodes["node0"]["volumes"]


def test_nodes_start_the_same_run() -> None:
    """Word for word, but for which of them holds the rendezvous."""
    first, second = (services()[name]["command"] for name in ("node0", "node1"))
    assert [w for w in first if w not in second] == ["--rdzv-conf=is_host=1"]
    assert [w for w in second if w not in first] == ["--rdzv-conf=is_host=0"]
    assert "--parallel.ep=2" in first and "--nnodes=2" in first


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_are_pinned_and_not_root(name: str) -> None:
    lines = (ROOT / "docker" / name).read_text(encoding="utf-8").splitlines()
    base = next(line for line in lines if line.startswith("ARG BASE="))
    assert any(c.isdigit() for c in base.partition(":")[2]) and "latest" not in base
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001"


def test_base_has_what_the_image_pins() -> None:
    """docker/base.sh fetches the very versions that the recipe installs, and every package that moetrain asks for has one."""
    recipe, script, pins = ((ROOT / "docker" / n).read_text(encoding="utf-8") for n in ("Dockerfile.cpu", "base.sh", "constraints.txt"))
    assert "docker/constraints.txt" in script and "PIP_CONSTRAINT=/wheels/constraints.txt" in recipe
    pinned = dict(line.split("==") for line in pins.splitlines() if not line.startswith("#"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = project.split("dependencies = [")[1].split("]\n")[0] + project.split("\nhf = ")[1].splitlines()[0]
    for name in re.findall(r'"([a-z]+)', dependencies + project.split("\ndata = ")[1].splitlines()[0]):
        assert name in pinned or name == "torch", name
    assert recipe.split("ARG TORCH=")[1].split()[0] == script.split("${TORCH:-")[1].split("}")[0]


def docker(*words: str, **options: Any) -> str:
    done = subprocess.run(["docker", *words], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def image() -> str:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon answers")
    if not list((ROOT / "docker").glob("wheels/*.whl")) or not docker("images", "--quiet", BASE).strip():
        pytest.skip(f"no {BASE} or no docker/wheels: bash docker/base.sh makes both")
    arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", "PIP_NO_INDEX=1"]
    docker("build", "--file", "docker/Dockerfile.cpu", "--tag", IMAGE, "--network", "none", *arguments, ".", timeout=1800)
    return IMAGE


@pytest.mark.slow
def test_cpu_image_builds_without_a_network_and_trains(image: str, tmp_path: Path) -> None:
    """One container, then the compose file's two: five steps in float64, loss for loss."""
    (tmp_path / "my.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("def mean(values):\n    return sum(values) / len(values)\n" * 200)
    user = 10001 if os.getuid() == 0 else os.getuid()
    if os.getuid() == 0:
        for path in (tmp_path, *tmp_path.iterdir()):
            os.chown(path, user, user)
    tmp_path.chmod(0o755)
    run = ["run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp", "--user", str(user)]
    run += ["--volume", f"{tmp_path}:/work", image]
    docker(*run, "prepare", "--prepare.inputs", "[text.txt]", "--prepare.output", "d", timeout=300)
    docker(*run, "train", "--config", "my.yaml", "--run_dir", "one", timeout=300)
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    if not has_plugin and shutil.which("docker-compose") is None:
        pytest.skip("no docker compose")
    compose = [*(["docker", "compose"] if has_plugin else ["docker-compose"]), "--file", str(COMPOSE), "--project-name", "moetrain-test"]
    environment = {**os.environ, "WORK": str(tmp_path), "CONFIG": "my.yaml", "IMAGE": image, "USER_ID": str(user)}
    try:
        done = subprocess.run([*compose, "up"], env=environment, capture_output=True, text=True, timeout=300)
    finally:
        subprocess.run([*compose, "down", "--timeout", "5"], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = {}
    for name in ("one", "run"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["one"]) == 5 and losses["run"] == pytest.approx(losses["one"], rel=1e-12)
    assert "ep 2" in done.stdout
