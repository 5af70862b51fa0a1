"""What a run tells: one JSON line per step (the source of truth), events, a console line, and the sinks wandb and TensorBoard.

`metrics.jsonl` of a run that was killed and resumed is line by line that of one that never was, but for the fields that measure time
(`deterministic_fields` drops those). What did happen on the way (restarts, checkpoints, skipped steps) is in `events.jsonl`, which only grows.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import uuid
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.config import LogConfig
from moetrain.files import check_own, read_json
from moetrain.records import EVENTS, METRICS, ROUTING, count_events, event_line, parse, read_records

_MEASURED = frozenset(
    {"step_s", "data_s", "forward_backward_s", "optimizer_s", "eval_s", "tokens_per_s", "memory_bytes", "host_memory_bytes", "ranks"}
)  # differ between two runs of the same computation
_WINDOW = 50  # steps over which the console averages speed


class Metrics:
    """Writes the metrics of a run. Every rank makes one; only rank 0 writes."""

    def __init__(
        self, run_dir: Path | str, config: LogConfig, *, resolved: dict[str, Any], resume_step: int = 0, rank: int = 0, console: bool = True
    ) -> None:
        """resolved: the whole config as plain data. resume_step: last step that the run continued from has done; later lines are dropped.

        Raises ValueError, on every rank, if a sink that is asked for is not installed.
        """
        for package, wanted in (("wandb", config.wandb), ("tensorboard", config.tensorboard)):
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(f"log.{package}: true, but {package} is not installed: pip install 'moetrain[report]', or set log.{package}: false")
        self.config = config
        self._steps = (resolved.get("train") or {}).get("steps")
        self._devices = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=_WINDOW)
        self._first = True
        self._files: list[_Lines] = []
        self._sinks: dict[str, Any] = {}
        self._print = _printer() if console and rank == 0 else None
        self._active = rank == 0
        if not self._active:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        last = _cut(run_dir / METRICS, resume_step)
        # Of earlier starts too: what ended a rank could not be told to a sink by the process that it ended.
        self._happened = count_events(run_dir)
        self._metrics, self._events = _Lines(run_dir / METRICS), _Lines(run_dir / EVENTS)
        self._files = [self._metrics, self._events]
        if last < resume_step:
            self.event("metrics_lost", step=resume_step, first=last + 1, last=resume_step)
        for name, wanted, make in (("wandb", config.wandb, _Wandb), ("tensorboard", config.tensorboard, _TensorBoard)):
            if wanted:
                sink = self._guarded(name, make, run_dir, config, resolved, resume_step)
                if sink is not None:
                    self._sinks[name] = sink

    def log(self, record: dict[str, Any]) -> None:
        """Write the record of one step; `record["step"]` counts from 1. Tensors with one element count as numbers."""
        if not self._active:
            return
        record = _plain(record)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            record["memory_bytes"] = torch.cuda.max_memory_reserved()
        self._metrics.append((json.dumps(record) + "\n").encode())  # repr of a float reads back to the same float; else NaN or Infinity
        if self._print is not None:
            self._to_console(record)
        if self._sinks:
            step, scalars = record["step"], flatten(record) | {f"events/{kind}": count for kind, count in self._happened.items()}
            for name, sink in list(self._sinks.items()):
                self._guarded(name, sink.log, step, scalars)

    def event(self, kind: str, **fields: Any) -> None:
        """Write something that happened (restart, skipped step, checkpoint, ...) with the time, to events.jsonl."""
        if self._active:
            self._events.append(event_line(kind, **_plain(fields)))
            self._happened[kind] += 1

    def tell(self, line: str) -> None:
        """A line for people, beside those of the steps."""
        if self._print is not None:
            self._print(line)

    def close(self) -> None:
        """Flush and close all outputs."""
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.close)
        self._sinks = {}
        for file in self._files:
            file.close()
        self._active, self._files = False, []

    def _guarded(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        # A sink is somebody else's network and disk: losing it must not cost the run, and the JSONL has everything.
        try:
            return work(*arguments)
        except Exception as error:
            self._sinks.pop(name, None)
            first = (str(error).splitlines() or [""])[0]
            warnings.warn(f"{name} is off for the rest of this run: {type(error).__name__}: {first}", stacklevel=3)
            if self._active:
                self.event("sink_off", sink=name, error=f"{type(error).__name__}: {first}")

    def _to_console(self, record: dict[str, Any]) -> None:
        self._recent.append(tuple(record.get(k, math.nan) for k in ("step_s", "data_s", "tokens_per_s")))
        step = record["step"]
        if step % self.config.every == 0 or self._first or step == self._steps or record.get("skipped"):
            means = [sum(column) / len(column) for column in zip(*self._recent, strict=True)]
            self._print(console_line(record, steps=self._steps, devices=self._devices, step_s=means[0], data_s=means[1], tokens_per_s=means[2]))
            self._first = False
        for name, result in (record.get("eval") or {}).items():
            self._print(f"  eval {name}: loss {result['loss']:.4f} perplexity {result['perplexity']:.2f}")


def deterministic_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what measures time or memory: two runs that compute the same have these equal, bit for bit."""
    return {k: v for k, v in record.items() if k not in _MEASURED}


def relative_load(loads: list[list[float]]) -> list[list[int]]:
    """Routes per expert of each layer -> per cent of the even share (100: as many as the mean expert has), rounded but for 0, which means none."""
    return [[math.ceil(n * len(layer) * 100 / sum(layer) - 0.5) or 1 if n else 0 for n in layer] for layer in loads]


def write_routing(run_dir: Path | str, part: str, step: int | None, sets: dict[str, dict[str, Any]]) -> None:
    """Put a picture of the routing in RUN/routing.json, in the place of the last one of the same part (`train` by source, `eval` by evaluation set).

    sets: name -> tokens; load, routes per expert of each MoE layer; kinds (where known): kind of token -> tokens and active_by_layer.
    """
    path = Path(run_dir) / ROUTING
    try:
        whole = read_json(path)
    except (OSError, ValueError):
        whole = None  # none yet, or torn: the other part comes again
    whole = {**whole, part: {"step": step, "sets": sets}} if isinstance(whole, dict) else {part: {"step": step, "sets": sets}}
    check_own(run_dir, (ROUTING,))
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    fresh.replace(path)


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a record under flat names: `{"moe": {"dead": [0, 2]}}` -> `{"moe/dead/layer_00": 0, "moe/dead/layer_01": 2}`."""
    flat: dict[str, float] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}" if name else str(key), inner)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(f"{name}/layer_{i:02d}", inner)
        elif isinstance(value, (int, float)):  # bool too: a skipped step is 1
            flat[name] = value

    # The load of each expert and the times of each rank would be thousands of curves.
    walk("", {k: v for k, v in record.items() if k not in ("step", "load", "ranks")})
    return flat


def console_line(record: dict[str, Any], *, steps: int | None, devices: int, step_s: float, data_s: float, tokens_per_s: float) -> str:
    """One line for people. steps: of the whole run; step_s, data_s (seconds per step) and tokens_per_s (of all devices): recent means."""
    parts = [f"step {record['step']}" + (f"/{steps}" if steps else "")]
    if record.get("skipped"):
        parts[0] += " SKIPPED (not finite)"
    losses = " ".join(f"{k} {record[k]:.4g}" for k in ("lm", "sparsity", "balance", "cv", "z") if record.get(k) is not None)
    parts.append(f"loss {record['loss']:.4f}" + (f" ({losses})" if losses else ""))
    if record.get("sparsity_coef") is not None:
        used = record["sparsity_coef"] if isinstance(record["sparsity_coef"], list) else [record["sparsity_coef"]]
        parts.append(f"coef {sum(used) / len(used):.3g}")
    parts.append(f"gnorm {record['grad_norm']:.3g}")
    parts.append(f"lr {record['lr']:.3g}")
    parts.append(f"{_short(tokens_per_s / devices)} tok/s" + ("/dev" if devices > 1 else ""))
    if "memory_bytes" in record:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        parts.append(f"mem {record['memory_bytes'] / 2**30:.1f}G {record['memory_bytes'] / total:.0%}")
    moe = record.get("moe")
    if moe:
        shown = []
        if moe.get("active"):
            shown.append(f"active {_mean(moe['active']):.2f}")
        if moe.get("load_max_mean"):
            shown.append(f"max/mean {max(moe['load_max_mean']):.2f}")
        if moe.get("dead"):
            shown.append(f"dead {sum(moe['dead'])}")
        if moe.get("empty"):
            shown.append(f"empty {_mean(moe['empty']):.1%}")
        if any(moe.get("probe_share") or []):
            shown.append(f"probes {_mean(moe['probe_share']):.1%}")
        if any(moe.get("dropped") or []):
            shown.append(f"dropped {_mean(moe['dropped']):.1%}")
        if shown:
            parts.append("moe " + " ".join(shown))
    if step_s > 0:
        parts.append(f"data {data_s / step_s:.1%}")
        parts.append(f"{step_s:.3g} s")
        if steps and steps > record["step"]:
            parts.append(f"eta {_duration((steps - record['step']) * step_s)}")
    return " | ".join(parts)


def plots(run_dir: Path | str, out_dir: Path | str) -> list[Path]:
    """PNGs of a run: loss.png (training and evaluation) and, for a mixture, active_experts.png (layer by step). Returns their paths.

    Raises ValueError if the run has no records or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        raise ValueError("plots need matplotlib, which is not installed: pip install 'moetrain[report]'") from None
    records = list(read_records(run_dir))
    if not records:
        raise ValueError(f"{Path(run_dir) / METRICS} has no records yet")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    steps = [r["step"] for r in records]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # lm, not loss: it is what evaluation reports, without the router's losses.
    axes.plot(steps, [r.get("lm", r["loss"]) for r in records], linewidth=0.8, label="train")
    for name in sorted({name for r in records for name in r.get("eval") or {}}):
        points = [(r["step"], r["eval"][name]["loss"]) for r in records if name in (r.get("eval") or {})]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"eval {name}")
    for i, step in enumerate(r["step"] for r in records if r.get("skipped")):
        axes.axvline(step, color="red", alpha=0.3, linewidth=1, label=None if i else "skipped")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    paths = [out_dir / "loss.png"]
    figure.savefig(paths[0], dpi=150)

    routed = [r for r in records if (r.get("moe") or {}).get("active")]
    if routed:
        active = [list(column) for column in zip(*(r["moe"]["active"] for r in routed), strict=True)]  # one row per layer
        figure = Figure(figsize=(8, 7), layout="constrained")
        lines, heat = figure.subplots(2, 1, sharex=True)
        for i, row in enumerate(active):
            lines.plot([r["step"] for r in routed], row, linewidth=0.8, color=_layer_color(i, len(active)), label=f"MoE layer {i}")
        lines.set(ylabel="active experts per token")
        lines.grid(alpha=0.3)
        if len(active) <= 12:
            lines.legend(fontsize="small", ncols=2)
        first, last = routed[0]["step"], routed[-1]["step"]
        extent = (first - 0.5, last + 0.5, -0.5, len(active) - 0.5)
        image = heat.imshow(active, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
        heat.set(xlabel="step", ylabel="MoE layer")
        heat.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=heat, label="active experts per token")
        paths.append(out_dir / "active_experts.png")
        figure.savefig(paths[1], dpi=150)
    return paths


class _Wandb:
    def __init__(self, run_dir: Path, config: LogConfig, resolved: dict[str, Any], resume_step: int) -> None:
        import wandb

        identity = run_dir / "wandb_id.txt"
        if not identity.is_file():
            identity.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        mode = os.environ.get("WANDB_MODE") or config.wandb_mode
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or run_dir.resolve().name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",  # a requeued job goes on in the same curve
            mode=mode,
            dir=str(run_dir),
            config=resolved,
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, run_dir: Path, config: LogConfig, resolved: dict[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: what a killed run wrote after its last checkpoint is hidden.
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _printer() -> Any:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            console = Console()
            return lambda line: console.print(line, markup=False, soft_wrap=True)
    return lambda line: print(line, flush=True)


def _cut(path: Path, step: int) -> int:
    """Drop the lines after `step` and torn ones, at once or not at all. Returns the step of the last one kept, or 0."""
    last = 0
    if not path.is_file():
        return last
    part = path.with_name(path.name + ".tmp")
    with open(path, "rb") as old, open(part, "wb") as new:
        for line in old:
            record = parse(line)
            if record is not None and record["step"] <= step:
                new.write(line)
                last = record["step"]
        new.flush()
        os.fsync(new.fileno())
    part.replace(path)
    return last


class _Lines:
    """Lines at the end of a file, each there when `append` returns. On a full disk they wait in memory for room: that costs no run."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._warned = path, bytearray(), False
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, line: bytes) -> None:
        self._waiting += line
        try:
            while self._waiting:
                del self._waiting[: os.write(self._handle, self._waiting)]
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self._path}: {error.strerror}; its lines wait in memory", stacklevel=3)
            self._warned = True

    def close(self) -> None:
        self.append(b"")
        os.close(self._handle)
        if self._waiting:
            warnings.warn(f"{self._path}: its last {len(self._waiting)} bytes could not be written", stacklevel=2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _short(number: float) -> str:
    if not math.isfinite(number):
        return "?"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    start = next((i for i, (n, _) in enumerate(units) if n), 3)
    return "".join(f"{n}{u}" for n, u in units[start : start + 2] if n) or "0s"


def _layer_color(layer: int, layers: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](layer / max(1, layers - 1))
