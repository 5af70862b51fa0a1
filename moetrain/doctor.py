"""`moetrain doctor`: what this machine and this installation have, what a run would use, and the command for what is missing.

Each optional package is imported in a process of its own: one that is broken may do anything, an abort included, and is reported, not suffered.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain import __version__

_IMPORT_SECONDS = 120  # a package on a slow network disk, not one that hangs

# (distribution, module, what it is for, command that installs it, whether it needs a CUDA device)
_PACKAGES = (
    ("transformers", "transformers", "Hugging Face models and tokenizers, export", "pip install 'moetrain[hf]'", False),
    ("flash-attn", "flash_attn", "attention on CUDA", "pip install flash-attn --no-build-isolation", True),
    ("sonic-moe", "sonicmoe", "train.experts_backend: sonicmoe", "pip install 'moetrain[sonicmoe]'", True),
    ("deepspeed", "deepspeed", "launch/deepspeed.sh", "pip install 'moetrain[deepspeed]'", False),
    ("megatron-core", "megatron.core", "reading prepared data with Megatron", "pip install 'moetrain[megatron]'", False),
    ("zstandard", "zstandard", "jsonl.zst files", "pip install 'moetrain[data]'", False),
    ("pyarrow", "pyarrow", "parquet files", "pip install 'moetrain[data]'", False),
    ("wandb", "wandb", "log.wandb", "pip install 'moetrain[report]'", False),
    ("tensorboard", "tensorboard", "log.tensorboard", "pip install 'moetrain[report]'", False),
    ("matplotlib", "matplotlib", "plots in reports", "pip install 'moetrain[report]'", False),
)
_EXTENSION = "pip install -e . --no-build-isolation"


def inspect() -> dict[str, Any]:
    """Everything the report says, as plain JSON data. Never raises for something missing or broken: that is a field `problem`."""
    facts: dict[str, Any] = {
        "moetrain": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _guard(_torch),
        "gpus": _guard(_gpus),
        "extension": _guard(_extension),
        "packages": _packages(),
        "cpu": _guard(_cpu),
        "memory": _guard(_memory),
        "disk": _guard(_disk),
        "uses": {"attention": _guard(_attention), "experts": _guard(_experts), "communication": _guard(_communication)},
    }
    facts["warnings"] = _warnings(facts)
    facts["install"] = _install(facts)
    return facts


def report(facts: dict[str, Any] | None = None) -> str:
    """The facts (default: `inspect()`) for people."""
    facts = inspect() if facts is None else facts
    lines = [f"moetrain {facts['moetrain']}, Python {facts['python']}, {facts['platform']}", ""]

    def row(good: bool | None, name: str, text: str) -> None:
        lines.append(f"  {'-' if good is None else 'ok' if good else '!!':<3} {name:<16} {text}")

    lines.append("Core")
    found = facts["torch"]
    build = "" if "problem" in found else f"CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
    row("problem" not in found, "torch", found.get("problem") or f"{found['version']}, {build}")
    found = facts["extension"]
    row("problem" not in found, "moetrain._C", found.get("problem") or "kernels for " + ", ".join(found["devices"]))

    lines += ["", "Optional"]
    for name, entry in facts["packages"].items():
        state = "not installed" if entry["version"] is None else entry["problem"] or "works"
        mark = None if entry["version"] is None else entry["problem"] is None
        row(mark, name, f"{entry['version'] + ', ' if entry['version'] else ''}{state} ({entry['for']})")

    lines += ["", "Machine"]
    cpu, memory, disk = facts["cpu"], facts["memory"], facts["disk"]
    if "problem" not in cpu:
        threads = f"OMP_NUM_THREADS={cpu['omp_num_threads']}" if cpu["omp_num_threads"] else "OMP_NUM_THREADS not set"
        cores = f"{cpu['usable_cores']:g} usable cores of {cpu['cores']}"
        row(True, "CPU", f"{cores}, torch uses {cpu['torch_threads']} threads, {threads}, load {cpu['load']:.1f}")
    if "problem" not in memory:
        row(True, "memory", f"{memory['available'] / 2**30:.1f} GiB free of {memory['total'] / 2**30:.1f}")
    if "problem" not in disk:
        size = f"{disk['free'] / 2**30:.1f} GiB free of {disk['total'] / 2**30:.1f}"
        row(disk["writable"], "disk", f"{size} in {disk['folder']}" + ("" if disk["writable"] else ", not writable"))
    gpus = facts["gpus"]
    if isinstance(gpus, dict):
        row(False, "GPU", gpus["problem"])
    elif not gpus:
        row(None, "GPU", "none that torch can use")
    for i, gpu in enumerate(gpus if isinstance(gpus, list) else []):
        row(True, f"GPU {i}", f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, compute capability {gpu['capability']}")

    lines += ["", "What a run uses here"]
    for name, used in facts["uses"].items():
        if isinstance(used, dict):
            row(False, name, used["problem"])
        for text in used if isinstance(used, list) else []:
            lines.append(f"      {name:<16} {text}")
    for title, texts in (("Beware", facts["warnings"]), ("To get more", [f"{e['command']:<46} # {e['for']}" for e in facts["install"]])):
        if texts:
            lines += ["", title, *(f"  {text}" for text in texts)]
    lines += ["", "What to do about a symptom: docs/troubleshooting.md"]
    return "\n".join(lines)


def main(as_json: bool = False) -> int:
    """Print the report; returns the exit status: 1 if training can't start here."""
    if sys.stderr.isatty():
        print("importing what is installed, one by one ...", file=sys.stderr)
    facts = inspect()
    print(json.dumps(facts, indent=2) if as_json else report(facts))
    return int("problem" in facts["torch"] or "problem" in facts["extension"])


def _guard(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:
        return {"problem": _first_line(error)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _torch() -> dict[str, Any]:
    return {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": dist.is_available() and dist.is_nccl_available()}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"} for p in properties]


def _extension() -> dict[str, Any]:
    from moetrain import ops  # noqa: F401  (registers the operators)

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = [d for d in ("CPU", "CUDA") if has("moetrain::route", d)]
    if not devices:
        return {"problem": "loaded, but it registers no kernels", "devices": []}
    if "CUDA" not in devices and torch.cuda.is_available():
        return {"problem": "built without CUDA kernels, but torch has a CUDA device", "devices": devices}
    return {"devices": devices}


def _packages() -> dict[str, dict[str, Any]]:
    def look(package: tuple[str, str, str, str, bool]) -> dict[str, Any]:
        name, module, use, _, _ = package
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return {"version": None, "problem": None, "for": use}
        return {"version": version, "problem": _import_problem(module), "for": use}

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return {package[0]: found for package, found in zip(_PACKAGES, pool.map(look, _PACKAGES), strict=True)}


def _import_problem(module: str) -> str | None:
    """Why a module can't be imported, or None."""
    try:
        command = [sys.executable, "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_IMPORT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"import fails: {_first_line(error)}"
    if done.returncode == 0:
        return None
    # The exception's line is the first that is not indented after the last traceback; text may follow it.
    lines = done.stderr[done.stderr.rfind("Traceback (most recent call last)") :].splitlines()[1:]
    line = next((text for text in lines if text and not text[0].isspace()), "")
    if done.returncode < 0:
        line = f"ended by signal {-done.returncode}"
    return f"import fails: {line or f'exit status {done.returncode}'}"


def _cpu() -> dict[str, Any]:
    cores = os.cpu_count() or 1
    usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().strip().partition(" ")
        if limit != "max":
            usable = min(usable, int(limit) / int(period))
    return {
        "cores": cores,
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
    }


def _memory() -> dict[str, int]:
    sizes = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {key: int(sizes[field].split()[0]) * 1024 for key, field in (("total", "MemTotal"), ("available", "MemAvailable"))}


def _disk() -> dict[str, Any]:
    usage = shutil.disk_usage(".")
    return {"folder": os.getcwd(), "total": usage.total, "free": usage.free, "writable": os.access(".", os.W_OK)}


def _attention() -> list[str]:
    from moetrain.attention import describe_backends

    return [f"{name}: {use}" for name, use in describe_backends()]


def _experts() -> list[str]:
    if not torch.cuda.is_available():
        return ["a GEMM per expert (torch.mm)"]
    return ["bfloat16 on CUDA: torch.nn.functional.grouped_mm", "other dtypes: a GEMM per expert (torch.mm)"]


def _communication() -> list[str]:
    if not dist.is_available():
        return ["none: this torch is built without distributed; one process only"]
    if torch.cuda.is_available() and dist.is_nccl_available():
        return ["NCCL between GPUs, gloo for checkpoints"]
    return ["gloo"]


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = []
    cpu, disk, gpus = facts["cpu"], facts["disk"], facts["gpus"]
    if "problem" not in cpu:
        if cpu["torch_threads"] > cpu["usable_cores"]:
            found.append(
                f"torch uses {cpu['torch_threads']} threads on {cpu['usable_cores']:g} cores, which can be many times slower than one: "
                f"set OMP_NUM_THREADS={max(1, int(cpu['usable_cores']))} or less"
            )
        if cpu["omp_num_threads"] is None and not gpus and cpu["usable_cores"] > 1:
            found.append("OMP_NUM_THREADS is not set: with several processes here set it to cores / processes, or they share cores and crawl")
        if cpu["load"] > cpu["usable_cores"]:
            load = f"the load is {cpu['load']:.1f} on {cpu['usable_cores']:g} cores"
            found.append(f"{load}: others compute here too, and threads that share a core wait for each other")
    if "problem" not in disk:
        if disk["free"] < 10 * 2**30:
            free = f"only {disk['free'] / 2**30:.1f} GiB of disk are free"
            found.append(f"{free}; a checkpoint takes 12 bytes per parameter, and two are kept by default")
        if not disk["writable"]:
            found.append(f"{disk['folder']} is not writable")
    if shutil.which("nvidia-smi") and gpus == [] and "problem" not in facts["torch"]:
        without = facts["torch"]["cuda"] is None
        reason = "is built without CUDA" if without else "can't use a GPU (driver older than its CUDA, or CUDA_VISIBLE_DEVICES)"
        found.append(f"nvidia-smi is here, but torch {reason}")
    return found


def _install(facts: dict[str, Any]) -> list[dict[str, str]]:
    wanted = []
    if "problem" in facts["extension"]:
        wanted.append({"command": _EXTENSION, "for": "moetrain's kernels, run in the project's folder"})
    for name, _, use, command, needs_gpu in _PACKAGES:
        entry = facts["packages"][name]
        if entry["version"] is None and (not needs_gpu or facts["gpus"]):
            wanted.append({"command": command, "for": f"{name}: {use}"})
        elif entry["problem"] is not None:
            wanted.append({"command": f"pip install --force-reinstall --no-deps {name}", "for": f"repair {name}"})
    return wanted
