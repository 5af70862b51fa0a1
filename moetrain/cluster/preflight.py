"""A look at all ranks before a run: the same software, GPUs that compute rightly, the network between each pair of nodes, a shared folder with room.

`moetrain doctor --ranks` under the launcher; a submitted job does it first. Problems end the job before it costs anything, each as one line that
names host and ranks; warnings do not. Times are measured, and a pair of nodes counts as slow only beside the other pairs of the same look.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain import __version__
from moetrain.config import Config, ModelConfig, TrainConfig
from moetrain.parallel.mesh import start_processes

_ROUND_BYTES = 1 << 23  # that a rank sends to the other node's ranks together, each time (less, if that node has fewer ranks)
_REPEATS = 3
_SLOW = 3.0  # a pair that takes so many times the median of all pairs is named
_SEEN_SECONDS = 60.0  # network file systems may hide a new file for as long as they keep a folder's listing
_MISSING = "none"


def main(config: Config) -> int:
    """Look, print on rank 0 what was found; returns the exit status, the same on all ranks: 1 if there is a problem."""
    device = start_processes(config.parallel.timeout_seconds)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    # Objects go through the CPU: a GPU may be what is broken.
    group = dist.new_group(backend="gloo") if world > 1 else None
    gather = _gatherer(group)
    facts = gather({**identity(), "software": software(), "gpu": gpu_problem(device), "cores": len(os.sched_getaffinity(0))})
    problems = software_problems(facts) + by_text(facts, [f["gpu"] for f in facts])
    apart = by_text(facts, gather(folder_problem(Path(config.run_dir), rank, gather)))
    problems += apart or by_text(facts, gather(disk_problem(config) if rank == 0 else None))
    warnings = core_warnings(facts)
    summary = [f"{world} ranks on {len({f['node'] for f in facts})} nodes", describe_software(facts[0]["software"])]
    if not problems and len({f["node"] for f in facts}) > 1:
        seconds = merge(gather(exchange_times([f["node"] for f in facts], rank, device)))
        warnings += slow_pairs(seconds, {f["node"]: f["host"] for f in facts})
        summary.append(describe_times(seconds, facts))
    if rank == 0:
        for problem in problems:
            print(f"preflight: problem: {problem}", file=sys.stderr, flush=True)
        for line in [*(f"warning: {w}" for w in warnings), *([] if problems else ["good: " + "; ".join(summary)])]:
            print(f"preflight: {line}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(bool(problems))


def _gatherer(group: dist.ProcessGroup | None) -> Callable[[Any], list[Any]]:
    def gather(value: Any) -> list[Any]:
        if group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, value, group=group)
        return found

    return gather


def _who(facts: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> str:
    """`host a rank 3`, or `host a ranks 0-7` for ranks of one host, or all hosts with their ranks."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[facts[rank]["host"]].append(rank)
    return ", ".join(f"host {host} {_ranks(found)}" for host, found in by_host.items())


def by_text(facts: Sequence[Mapping[str, Any]], found: Sequence[str | None]) -> list[str]:
    """found: each rank's problem or None. A line for each text, with all ranks that have it."""
    texts = dict.fromkeys(text for text in found if text is not None)
    return [f"{_who(facts, [i for i, other in enumerate(found) if other == text])}: {text}" for text in texts]


def _ranks(ranks: list[int]) -> str:
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


# ------------------------------------------------------------------------------------------------------------------ software


def identity() -> dict[str, Any]:
    """host: name for people. node: the launcher's number of this machine, for two may share a name."""
    return {"host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "node": int(os.environ.get("GROUP_RANK", 0))}


def software() -> dict[str, str]:
    """What must be the same on all ranks: versions, and hashes of what has none."""
    package = Path(__file__).resolve().parents[1]
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    extension = sorted(package.glob("_C*.so"))
    return {
        "moetrain": __version__,
        "moetrain's sources": sources.hexdigest()[:12],
        "extension": hashlib.sha256(extension[0].read_bytes()).hexdigest()[:12] if extension else _MISSING,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or _MISSING,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else _MISSING,
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else _MISSING,
    }


def software_problems(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each thing and value that differs from most ranks'."""
    problems = []
    for name in facts[0]["software"]:
        values = [f["software"][name] for f in facts]
        usual = Counter(values).most_common(1)[0][0]
        for value in sorted(set(values) - {usual}):
            ranks = [i for i, v in enumerate(values) if v == value]
            problems.append(f"{_who(facts, ranks)}: {name} is {value}, but {usual} on {values.count(usual)} of {len(values)} ranks")
    return problems


def describe_software(found: Mapping[str, str]) -> str:
    return "all have " + ", ".join(f"{name} {value}" for name, value in found.items() if value != _MISSING)


def core_warnings(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Nodes on which the ranks have fewer cores than there are of them (Slurm gives a task one, if it is not told otherwise)."""
    warnings = []
    nodes: dict[int, list[int]] = defaultdict(list)
    for rank, fact in enumerate(facts):
        nodes[fact["node"]].append(rank)
    for ranks in nodes.values():
        cores = min(facts[r]["cores"] for r in ranks)
        if cores < len(ranks):
            who = _who(facts, ranks)
            warnings.append(f"{who}: {len(ranks)} ranks share {cores} core{'s' * (cores > 1)}; ask for more (cluster.slurm.cpus_per_node)")
    return warnings


# ---------------------------------------------------------------------------------------------------------------------- GPUs


def gpu_problem(device: torch.device) -> str | None:
    """What is wrong with this rank's GPU, or None: it multiplies exactly, its memory is free, it has no uncorrected memory errors."""
    if device.type != "cuda":
        return None
    try:
        # Small integers: every product and sum is exact in float32, so one wrong bit shows.
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randint(-8, 9, (2048, 2048), generator=generator).float() for _ in range(2))
        for _ in range(3):
            if not torch.equal((a.to(device) @ b.to(device)).cpu()[:64], a[:64] @ b):
                return f"GPU {device.index} computes wrong products"
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"GPU {device.index} fails: {str(error).splitlines()[0]}"
    if free < 0.8 * total:
        return f"GPU {device.index} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: another process uses it"
    return ecc_problem(torch.cuda.get_device_properties(device))


def ecc_problem(properties: Any) -> str | None:
    """Uncorrected memory errors since the driver was loaded, by nvidia-smi; None where it can't say."""
    try:
        words = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        errors = int(done.stdout.strip())
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired):
        return None
    return f"GPU GPU-{properties.uuid} has {errors} uncorrected memory errors; reset or replace it" if errors else None


# ---------------------------------------------------------------------------------------------------------------------- disk


def checkpoint_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """Size of one checkpoint: the parameters and AdamW's two moments, 4 bytes each (8 in float64)."""
    return model.num_params() * 3 * (8 if train.dtype == "float64" else 4)


def needed_bytes(config: Config) -> int:
    """Of all checkpoints that the run keeps, and the one that is being written."""
    assert config.model is not None and config.train is not None, "checked by the command"
    kept, options = config.checkpoint.keep_last, config.checkpoint
    if options.keep_every is not None and options.every is not None:
        kept += config.train.steps // options.keep_every
    elif options.every is None:
        kept = 1
    return checkpoint_bytes(config.model, config.train) * (kept + (options.every is not None))


def disk_problem(config: Config) -> str | None:
    """Whether the checkpoints fit on the disk of run_dir, which exists; those that are there already are counted."""
    if config.model is None or config.train is None:
        return None
    folder = Path(config.run_dir)
    present = sum(p.stat().st_size for p in folder.glob("checkpoints/*/*") if p.is_file())
    needed, free = needed_bytes(config) - present, shutil.disk_usage(folder).free
    if needed <= free:
        return None
    size = checkpoint_bytes(config.model, config.train)
    return (
        f"run_dir {folder} has {free / 2**30:.1f} GiB free, the checkpoints need {needed / 2**30:.1f} more ({size / 2**30:.1f} each); "
        f"free some, or lower checkpoint.keep_last or raise checkpoint.keep_every"
    )


def folder_problem(folder: Path, rank: int, gather: Callable[[Any], list[Any]], patience: float = _SEEN_SECONDS) -> str | None:
    """Whether run_dir can be written, and is the same folder for this rank as for rank 0. Collective."""
    name, problem = f".preflight-{os.getpid()}", None
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        except OSError as error:
            problem = f"run_dir {folder} can't be written: {error.strerror}"
    name, failed = gather((name, problem))[0]
    if not failed:
        end = time.monotonic() + patience
        # By listing: that a file was absent when it was first looked for may be remembered longer.
        while not _lists(folder, name):
            if time.monotonic() > end:
                problem = f"run_dir {folder} is not the folder that rank 0 sees; it must be on storage that all nodes share"
                break
            time.sleep(0.2)
    gather(None)
    if rank == 0 and not failed:
        (folder / name).unlink(missing_ok=True)
    return problem


def _lists(folder: Path, name: str) -> bool:
    try:
        return name in os.listdir(folder)
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------------- network


def rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair of nodes once, in rounds whose pairs are disjoint (the circle method of tournaments)."""
    circle: list[int | None] = sorted(set(nodes))
    circle += [None] * (len(circle) % 2)
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]))
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def exchange_times(nodes: Sequence[int], rank: int, device: torch.device) -> dict[tuple[int, int], float]:
    """Pair of nodes -> seconds of the best of a few all-to-alls between their ranks alone, for the pairs this rank is in. Collective.

    nodes: the node of each rank.
    """
    times = {}
    # The same on all ranks, should nodes have different numbers of them.
    size = _ROUND_BYTES // 4 // max(Counter(nodes).values())
    for pairs in rounds(nodes):
        partner = next((sum(pair) - nodes[rank] for pair in pairs if nodes[rank] in pair), None)
        others = [] if partner is None else [r for r, node in enumerate(nodes) if node == partner]
        sent = torch.zeros(size, device=device)
        received = [torch.empty(size, device=device) for _ in others]
        best = float("inf")
        for _ in range(1 + _REPEATS):  # the first one makes the connections
            dist.all_reduce(torch.zeros(1, device=device))
            began = time.perf_counter()
            # Ordered by the other rank, and the lower of two ranks sends first: so the operations of both sides pair up.
            operations = []
            for other, place in zip(others, received):
                send, receive = dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, place, other)
                operations += [send, receive] if rank < other else [receive, send]
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        if partner is not None:
            times[min(partner, nodes[rank]), max(partner, nodes[rank])] = best
    return times


def merge(times: Sequence[Mapping[tuple[int, int], float]]) -> dict[tuple[int, int], float]:
    """The slowest rank's time of each pair."""
    found: dict[tuple[int, int], float] = {}
    for one in times:
        for pair, seconds in one.items():
            found[pair] = max(found.get(pair, 0.0), seconds)
    return found


def slow_pairs(times: Mapping[tuple[int, int], float], hosts: Mapping[int, str]) -> list[str]:
    """A line for each pair far slower than the median pair, and instead of its pairs for a node that is slow to most others."""
    usual = statistics.median(times.values())
    slow = {pair for pair, seconds in times.items() if seconds > _SLOW * usual}
    others = len({node for pair in times for node in pair}) - 1
    counts = Counter(node for pair in slow for node in pair)
    bad = {node for node, count in counts.items() if others > 1 and 2 * count > others}
    lines = [f"host {hosts[n]} (node {n}): exchanges with {counts[n]} of {others} nodes take over {_SLOW:g} times the median" for n in sorted(bad)]
    for a, b in sorted(pair for pair in slow if not bad & set(pair)):
        factor = times[a, b] / usual
        lines.append(f"host {hosts[a]} (node {a}) and host {hosts[b]} (node {b}): their exchange takes {factor:.1f} times the median of all pairs")
    return lines


def describe_times(times: Mapping[tuple[int, int], float], facts: Sequence[Mapping[str, Any]]) -> str:
    ranks = Counter(f["node"] for f in facts)
    # Bytes that leave a node of the pair in one all-to-all, over its seconds.
    speeds = sorted(_ROUND_BYTES * ranks[a] / seconds / 1e9 for (a, b), seconds in times.items())
    return f"all-to-all of each pair of nodes: {statistics.median(speeds):.2f} GB/s each way at the median, {speeds[0]:.2f} at the slowest"
