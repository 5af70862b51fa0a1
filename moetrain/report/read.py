"""A run's folder -> what the page shows, at a size that does not grow with the run: at most so many points per curve and frames of a heat map."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moetrain import config as schema
from moetrain.config import Config
from moetrain.files import read_json
from moetrain.records import EVENTS, METRICS, ROUTING, read_records

POINTS = 800  # of a curve
LAYER_POINTS = 200  # of a curve that each layer has
LAYER_RECORDS = 2000  # records whose figures by layer are looked at
FRAMES = 60  # of the load of every expert
FRAME_BYTES = 1_200_000  # of all frames together
_NO_CURVE = frozenset({"step", "tokens", "skipped"})


@dataclass
class Curve:
    """One figure over the steps: mean, least and greatest of each bucket; NaN where the bucket has no finite value."""

    total: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def empty(cls, points: int) -> Curve:
        return cls(np.zeros(points), np.zeros(points), np.full(points, np.inf), np.full(points, -np.inf))

    def add(self, place: int, value: float) -> None:
        if math.isfinite(value):
            self.total[place] += value
            self.count[place] += 1
            self.low[place] = min(self.low[place], value)
            self.high[place] = max(self.high[place], value)

    @property
    def mean(self) -> np.ndarray:
        return np.divide(self.total, self.count, out=np.full_like(self.total, np.nan), where=self.count > 0)

    @property
    def sum(self) -> float:
        return float(self.total.sum())


@dataclass
class Frame:
    """Load of each expert at a step: (L, E) uint8, see `encode_load`."""

    step: int
    load: np.ndarray


@dataclass
class Run:
    """All that is known of a run. Curves have one value for each of `steps`, layer curves (L, points) one for each of `layer_steps`."""

    folder: Path
    config_text: str = ""
    config: Config | None = None
    lines: int = 0
    records: int = 0
    steps: list[int] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    sources: dict[str, Curve] = field(default_factory=dict)
    evals: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    layer_steps: list[int] = field(default_factory=list)
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    num_layers: int = 0
    frames: list[Frame] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`train` and `eval` of routing.json, checked: step, and sets: name -> tokens, load (L, E) array, kinds."""
    last: dict[str, Any] = field(default_factory=dict)
    not_finite: list[int] = field(default_factory=list)
    """The first steps whose loss is not a finite number."""
    missing: list[str] = field(default_factory=list)
    """What is not there, and how it would be."""

    @property
    def layer_names(self) -> list[str]:
        """Numbers of the sparse layers in the model, or among each other where the config does not fit."""
        model = None if self.config is None else self.config.model
        numbers = [] if model is None else model.moe_layers
        return [str(n) for n in (numbers if len(numbers) == self.num_layers else range(self.num_layers))]


def read_run(folder: str | Path) -> Run:
    """Raises ValueError if the folder is no run's. Anything else that is missing or broken is named in `missing`."""
    run = Run(Path(folder))
    path = run.folder / METRICS
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the run_dir of a training run")
    _read_config(run)
    _read_metrics(run, path)
    _read_events(run)
    _read_routing(run)
    return run


def encode_load(relative: np.ndarray) -> np.ndarray:
    """Per cent of the even share -> uint8: 0 none; else 128 + 25.4 log2(share / even), so that 128 is the even share and 1..255 spans 1/32 to 32."""
    with np.errstate(divide="ignore"):
        code = np.clip(np.round(128 + 25.4 * np.log2(relative / 100)), 1, 255)
    return np.where(relative > 0, code, 0).astype(np.uint8)


def relative_share(load: np.ndarray) -> np.ndarray:
    """(L, E) routes -> per cent of the even share of each layer, 0 where a layer has no route."""
    total = load.sum(-1, keepdims=True)
    return np.divide(load * 100.0 * load.shape[-1], total, out=np.zeros(load.shape), where=total > 0)


def number(value: Any) -> float:
    """A float; NaN for whatever is none. A list, such as one coefficient per layer, counts with its mean."""
    if isinstance(value, list):
        values = [number(v) for v in value]
        return sum(values) / len(values) if values else math.nan
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _read_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    try:
        run.config_text = path.read_text(encoding="utf-8", errors="replace")
        run.config = schema.load_config(path)
    except (OSError, ValueError) as error:
        said = "is not there" if isinstance(error, FileNotFoundError) else f"can't be read: {str(error).splitlines()[0]}"
        run.missing.append(f"config.yaml {said}. Layers are numbered among the sparse ones, and the planned number of steps is not known.")


def _read_metrics(run: Run, path: Path) -> None:
    with open(path, "rb") as file:
        run.lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        if torn := file.tell() > 0:
            file.seek(-1, 2)
            torn = file.read(1) != b"\n"
    width, layer_width = -(-run.lines // POINTS) or 1, -(-run.lines // LAYER_POINTS) or 1
    points, layer_points = -(-run.lines // width), -(-run.lines // layer_width)
    stride = -(-run.lines // LAYER_RECORDS) or 1
    layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    frames = _Frames()
    for place, record in enumerate(read_records(run.folder)):
        if place >= run.lines:
            break  # the run is alive and has gone on
        run.records, run.last = place + 1, record
        step, bucket = record["step"], place // width
        if bucket == len(run.steps):
            run.steps.append(step)
        run.steps[bucket] = step
        for name, value in record.items():
            if name not in _NO_CURVE and isinstance(value, (int, float, list)) and name != "load":
                run.curves.setdefault(name, Curve.empty(points)).add(bucket, number(value))
        for name, source in _items(record.get("sources")):
            run.sources.setdefault(name, Curve.empty(points)).add(bucket, number(source.get("loss")))
        for name, result in _items(record.get("eval")):
            run.evals.setdefault(name, []).append((step, number(result.get("loss"))))
        if not math.isfinite(number(record.get("loss"))) and len(run.not_finite) < 20:
            run.not_finite.append(step)
        bucket = place // layer_width
        if bucket == len(run.layer_steps):
            run.layer_steps.append(step)
        run.layer_steps[bucket] = step
        if place % stride == 0 and isinstance(record.get("moe"), dict):
            for name, values in record["moe"].items():
                _add_layers(layers, str(name), values, bucket, layer_points)
        if "load" in record:
            frames.add(step, record["load"])
    # Fewer records than lines, where some are broken: the last places stay empty.
    whole = {name: np.divide(s, n, out=np.full_like(s, np.nan), where=n > 0) for name, (s, n) in layers.items()}
    run.layers = {name: values[:, : len(run.layer_steps)] for name, values in whole.items()}
    run.num_layers = len(run.layers["active"]) if "active" in run.layers else 0
    run.frames = frames.chosen()
    if not run.records:
        run.missing.append(f"{METRICS} has no whole line: no step has been done yet.")
    broken = run.lines - run.records + torn
    if broken > 0:
        run.missing.append(f"{broken} broken line{'s' * (broken > 1)} of {METRICS} left out (a run that was killed while it wrote has one).")


def _kinds(value: Any, layers: int) -> dict[str, tuple[float, list[float]]]:
    """Kind of token -> tokens, experts per token of each layer."""
    found = {}
    for kind, figures in _items(value):
        active = figures.get("active_by_layer")
        if isinstance(active, list) and len(active) == layers:
            found[kind] = number(figures.get("tokens")), [number(v) for v in active]
    return found


def _items(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield str(name), inner


def _add_layers(layers: dict[str, tuple[np.ndarray, np.ndarray]], name: str, values: Any, bucket: int, points: int) -> None:
    if not isinstance(values, list) or not values:
        return
    found = np.array([number(v) for v in values])
    total, count = layers.setdefault(name, (np.zeros((len(found), points)), np.zeros((len(found), points))))
    if len(total) == len(found):
        good = np.isfinite(found)
        total[good, bucket] += found[good]
        count[good, bucket] += 1


class _Frames:
    """Evenly spaced frames out of any number: when there are twice too many, every second one goes."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.stride, self.seen = 1, 0
        self.newest: tuple[int, np.ndarray] | None = None

    def add(self, step: int, load: Any) -> None:
        try:
            relative = np.array(load, dtype=np.float64)
        except (ValueError, TypeError):
            return
        if relative.ndim != 2 or not relative.size or not np.isfinite(relative).all():
            return
        if self.newest is not None and relative.shape != self.newest[1].shape:
            return
        self.newest = step, relative
        if self.seen % self.stride == 0:
            self.frames.append(Frame(step, encode_load(relative)))
            if len(self.frames) >= 2 * self._most():
                self.frames, self.stride = self.frames[::2], self.stride * 2
        self.seen += 1

    def chosen(self) -> list[Frame]:
        if self.newest is None:
            return []
        step, relative = self.newest
        frames = self.frames if self.frames[-1].step == step else [*self.frames, Frame(step, encode_load(relative))]
        if len(frames) <= self._most():
            return frames
        return [frames[i] for i in sorted({round(k) for k in np.linspace(0, len(frames) - 1, self._most())})]

    def _most(self) -> int:
        assert self.newest is not None, "add() has been called"
        return max(2, min(FRAMES, FRAME_BYTES // self.newest[1].size))


def _read_events(run: Run) -> None:
    try:
        lines = (run.folder / EVENTS).read_bytes().splitlines()
    except OSError:
        run.missing.append(f"{EVENTS} is not there: restarts, skipped steps and checkpoints are not known.")
        return
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            run.events.append(event)


def _read_routing(run: Run) -> None:
    if not run.num_layers:
        return
    hint = f"`moetrain eval --run_dir {run.folder} --eval.routing true` writes it"
    try:
        whole = read_json(run.folder / ROUTING)
    except FileNotFoundError:
        run.missing.append(f"{ROUTING} is not there: no routing by source and by kind of token. {hint}; runs with log.routing: true keep it.")
        return
    except (OSError, ValueError) as error:
        run.missing.append(f"{ROUTING} can't be read ({str(error).splitlines()[0]}); {hint} anew.")
        return
    for part, picture in _items(whole):
        sets = {}
        for name, found in _items(picture.get("sets")):
            try:
                load = np.array(found.get("load"), dtype=np.float64)
            except (ValueError, TypeError):
                continue
            if load.ndim == 2 and len(load) == run.num_layers and np.isfinite(load).all() and (load >= 0).all():
                sets[name] = {"tokens": number(found.get("tokens")), "load": load, "kinds": _kinds(found.get("kinds"), run.num_layers)}
        if sets:
            run.routing[part] = {"step": picture.get("step"), "sets": sets}
    for part in set(run.routing):
        # Sets of different models in one file, after a change of the experts: only those that are alike can be compared.
        shape = next(iter(run.routing[part]["sets"].values()))["load"].shape
        run.routing[part]["sets"] = {n: s for n, s in run.routing[part]["sets"].items() if s["load"].shape == shape}
    if not run.routing:
        run.missing.append(f"{ROUTING} has no picture of this model's {run.num_layers} sparse layers; {hint}.")
