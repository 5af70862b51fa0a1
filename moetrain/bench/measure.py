"""How the benchmarks measure: contestants in turn, ratios within a round, memory from the allocator's own record, the machine's limits first.

The machine is shared and its clock moves, so times of different runs don't compare. In each round every contestant runs once, the first one's
place moving on from round to round, and what is reported is the median over rounds of a ratio within a round. With one thread the clock is
the processor time of this process, which does not count the time that others had the core; with more it is wall time. On a GPU it is wall
time that begins and ends with nothing left to do there.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import __version__

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """seconds: of each round. ratio: median over rounds of baseline / own time (above 1 is faster); the baseline's is 1."""

    seconds: list[float]
    ratio: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def keep_memory() -> None:
    """Let the C library (glibc) keep what contestants free for those that come next.

    A layer in a model takes the memory that the layer before it freed. Alone between contestants of other sizes it would get fresh pages in
    every step, which the system must clear and on a virtual machine its host must find: of one shape that was a tenth of our layer's time.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1), mallopt(mmap_max, 0)


CPU = torch.device("cpu")


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def clock_of(device: torch.device) -> Callable[[], float]:
    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished if device.type == "cuda" else clock


def interleave(steps: dict[str, Step], baseline: str, rounds: int, now: Callable[[], float] = clock) -> dict[str, Timing]:
    """Every step once per round, after one warm-up each. now: seconds."""
    names = list(steps)
    for name in names:
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            gc.collect()
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                start = now()
                steps[name]()
                seconds[name].append(now() - start)
    finally:
        if collecting:
            gc.enable()
    return {n: Timing(s, statistics.median(b / own for b, own in zip(seconds[baseline], s))) for n, s in seconds.items()}


def best_of(step: Step, seconds: float = 0.2, at_least: int = 5, device: torch.device = CPU) -> float:
    """The shortest of repeated runs: for limits of the machine, where whatever disturbs only adds. On a GPU a run is of ten steps between two of its
    events, so that neither the host nor a launch counts where the device is the slower."""
    step()
    if device.type == "cuda":
        return _best_on_gpu(step, seconds, at_least, device)
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < at_least or time.perf_counter() < end or best == float("inf"):
        start = clock()
        step()
        spent = clock() - start
        # The processor's clock may stand still over a step of a microsecond.
        best, count = min(best, spent) if spent > 0 else best, count + 1
    return best


def _best_on_gpu(step: Step, seconds: float, at_least: int, device: torch.device, steps: int = 10) -> float:
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    with torch.cuda.device(device):
        while count < at_least or time.perf_counter() < end:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(steps):
                step()
            stop.record()
            stop.synchronize()
            best, count = min(best, start.elapsed_time(stop) / 1e3 / steps), count + 1
    return best


def memory(forward: Callable[[], Tensor], device: torch.device = CPU) -> tuple[int, int]:
    """(bytes that a forward leaves held for backward, the most it held at once), its output not counted, from the profiler's record of what
    torch's CPU allocator gave and took, or the CUDA allocator's counters. Tensors that were there before, such as the input, don't appear in it."""
    forward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = forward()
        held, peak = torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
        size = output.untyped_storage().nbytes()
        return held - size, peak - size
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = forward()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    size = output.untyped_storage().nbytes()
    return held - size, peak - size


@dataclass(frozen=True)
class Roofline:
    """gemm: GFLOP/s per dtype of torch's matrix product at a size where it is fastest. copy: GB/s read + written of a copy out of cache."""

    gemm: dict[str, float]
    copy: float


def roofline(dtypes: Sequence[torch.dtype], seconds: float = 0.3, device: torch.device = CPU) -> Roofline:
    on_gpu, gemm = device.type == "cuda", {}
    sizes = ((4096, 4096, 4096), (8192, 8192, 8192)) if on_gpu else ((256, 512, 512), (512, 1024, 1024), (1024, 1024, 1024))
    for dtype in dtypes:
        rates = []
        for m, k, n in sizes:
            # Random: of equal numbers a GPU computes faster, since less switches.
            a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
            out = torch.empty(m, n, dtype=dtype, device=device)
            rates.append(2 * m * k * n / best_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds / 3, device=device) / 1e9)
        gemm[name_of(dtype)] = max(rates)
    source = torch.ones(1 << (29 if on_gpu else 26), device=device)
    target = torch.empty_like(source)
    return Roofline(gemm, 2 * source.nbytes / best_of(lambda: target.copy_(source), seconds, device=device) / 1e9)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------------- results


@dataclass
class Table:
    """Rows of one benchmark, and what was left out with the reason."""

    title: str
    columns: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        cells = [self.columns] + [[_cell(row.get(c)) for c in self.columns] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        numeric = [all(isinstance(row.get(c), int | float | None) for row in self.rows) for c in self.columns]
        lines = []
        for line in cells:
            lines.append("  ".join(c.rjust(w) if number else c.ljust(w) for c, w, number in zip(line, widths, numeric)).rstrip())
        return [self.title, "", lines[0], "  ".join("-" * w for w in widths), *lines[1:], *(["", *self.notes] if self.notes else [])]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{found[0]}, {len(found)} CPUs" if found else name
    packages = {}
    for package in ("torch", "transformers", "deepspeed", "megatron-core", "megablocks", "scattermoe", "sonic-moe", "tutel"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "moetrain": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "cpu": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
    }


def where(device: torch.device) -> str:
    """What computes, for a title."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"


def save(path: str, tables: Sequence[Table], words: Sequence[str], **more: Any) -> None:
    """Tables and machine as JSON."""
    data = {"command": " ".join(["moetrain bench", *words]), "machine": machine(), **more}
    data["tables"] = [{"title": t.title, "rows": t.rows, "notes": t.notes} for t in tables]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def progress(text: str) -> None:
    """A line that the next one overwrites, for people; nothing where nobody looks."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
