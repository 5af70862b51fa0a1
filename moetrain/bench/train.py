"""`moetrain bench train`: where the time of a config's training step goes, on each rank that a launcher started."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import DeviceType

from moetrain.bench.measure import Table
from moetrain.config import Config, ConfigError
from moetrain.train import Trainer

DISPATCHER = ("_Dispatch", "_Combine")
"""Beginnings of the names of `moe.dispatch`'s functions, forward and backward."""
COPY = "moetrain::exchange copy"
"""What `account` calls a copy that a dispatcher's function makes itself: into or out of the memory through which ranks exchange rows."""

KINDS = {
    "GEMM": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "moetrain::experts", "moetrain::wide_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention", "flash_attn"),
    "communication": (
        "gloo:", "nccl:", "c10d::", "record_param_comms", *DISPATCHER, COPY, "moetrain::push", "moetrain::pull", "FSDP::",
    ),
}  # fmt: skip
"""Kind -> beginnings of the operators' names. `moetrain::experts` is the whole experts' block on the CPU, activation and gather included. The
dispatcher's functions and FSDP's hooks have the wait for other ranks as time of their own."""


REST = "other operators"
EXCHANGES = ("nccl", "push_rows", "pull_rows", "barrier")
"""What names of kernels that exchange something between GPUs have in them."""
WAIT = "c10d::wait"
"""What `account` calls the time in which the step's thread waited for a collective."""
HIDDEN = "communication beside these"
"""Of the collectives, what ran while something else was computed."""
STEP = "moetrain::step"
"""The event that the profiled step is in. What it has as time of its own was spent in no operator."""

Span = tuple[float, float]


def kind_of(operator: str) -> str:
    return next((kind for kind, starts in KINDS.items() if operator.startswith(starts)), REST)


@dataclass(frozen=True)
class Account:
    """Where the time of the event STEP went, in microseconds. own: each operator's. outside: in none. hidden: of collectives, while something else
    was computed. whole: the step's."""

    own: Counter[str]
    outside: float
    hidden: float
    whole: float


def account(events: EventList, on_device: bool) -> Account:
    """on_device: False: time of the thread that runs the step, backward included, as it is on the CPU. Operators and outside add up to the whole,
    and hidden is beside them. A thread that waits for another one's collective is in no operator; that is WAIT's. True: time of the device's
    kernels, each of the operator that launched it, hidden communication included; outside is the time in which none ran.
    """
    step = next(e for e in events if e.name == STEP and e.device_type == DeviceType.CPU)
    whole: Span = (step.time_range.start, step.time_range.end)
    own: Counter[str] = Counter()
    if on_device:
        kernels, collectives = [], []
        for event in events:
            if event.device_type == DeviceType.CPU:
                # A named range has a shadow of its name on the device, which is no kernel.
                own[event.name] += sum(k.duration for k in event.kernels if k.name != event.name)
            elif not event.is_user_annotation:
                (collectives if any(word in event.name for word in EXCHANGES) else kernels).append(_span(event))
        return Account(own, _length(_gaps(whole, kernels + collectives)), _shared(collectives, kernels), whole[1] - whole[0])
    collectives, communicating = [], []
    for event in events:
        communicates = kind_of(event.name) == "communication"
        if event.is_async and communicates:
            collectives.append(_span(event))
        elif event.thread == step.thread and event is not step and event.time_range.start >= whole[0]:  # not the profiler's own name of it
            own[COPY if _copies_for_exchange(event) else event.name] += event.self_cpu_time_total
            if communicates:
                communicating.append(_span(event))
    gaps = _gaps(whole, map(_span, step.cpu_children))
    waited = _shared(gaps, collectives)
    own[WAIT] = waited
    in_step = [(max(a, whole[0]), min(b, whole[1])) for a, b in collectives if b > whole[0] and a < whole[1]]
    hidden = _length(_merged(in_step)) - _shared(in_step, gaps + communicating)
    return Account(own, _length(gaps) - waited, hidden, whole[1] - whole[0])


def _copies_for_exchange(event: FunctionEvent) -> bool:
    called = None
    while event is not None and event.name.startswith("aten::"):
        called, event = event.name, event.cpu_parent
    return called in ("aten::copy_", "aten::clone") and event is not None and event.name.startswith(DISPATCHER)


def _span(event: FunctionEvent) -> Span:
    return event.time_range.start, event.time_range.end


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _shared(spans: Iterable[Span], others: list[Span]) -> float:
    """For how long both have something."""
    return sum(end - start - _length(_gaps((start, end), others)) for start, end in _merged(spans))


def _gaps(whole: Span, parts: Iterable[Span]) -> list[Span]:
    """What of a span is in none of the parts."""
    gaps, at = [], whole[0]
    for start, end in sorted(parts):
        if min(start, whole[1]) > at:
            gaps.append((at, min(start, whole[1])))
        at = max(at, end)
    return gaps if at >= whole[1] else [*gaps, (at, whole[1])]


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def run(config: Config, rounds: int) -> list[Table]:
    """One table by part of the step, one by kind of operator, one of the largest of the rest; on rank 0, empty elsewhere. Two steps warm up, and one
    with the profiler, whose beginning costs the step that it is in.

    Nothing is written where the config's run would be. Raises what `Trainer` raises, and ConfigError if the run has too few steps."""
    if config.train is not None and config.train.steps < rounds + 4:
        raise ConfigError(f"train.steps ({config.train.steps}): --rounds {rounds} takes {rounds + 4} steps with those that warm up; use fewer rounds")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config.model_copy(update={"run_dir": folder, "resume": False}), console=False)
        try:
            return _measure(trainer, rounds)
        finally:
            trainer.close()


def _measure(trainer: Trainer, rounds: int) -> list[Table]:
    config, train = trainer.config, trainer.train_config
    assert train is not None
    parts: list[dict[str, float]] = []
    with trainer._batches(trainer.dataset, train.global_batch_size, start_sample=0, prefetch=config.data.prefetch) as batches:
        for _ in range(2):
            trainer.train_step(next(batches))
        for _ in range(rounds):
            began = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            trainer.train_step(batch)
            whole = time.perf_counter() - began
            forward_backward, optimizer = trainer.seconds["forward_backward_s"], trainer.seconds["optimizer_s"]
            parts.append({
                "data": loaded - began, "forward, backward, gradient norm": forward_backward, "optimizer, records": optimizer, "step": whole,
            })  # fmt: skip
        profiled = [next(batches), next(batches)]
        with torch.profiler.profile(schedule=torch.profiler.schedule(wait=0, warmup=1, active=1)) as profile:
            trainer.train_step(profiled[0])
            profile.step()
            with torch.profiler.record_function(STEP):
                trainer.train_step(profiled[1])
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize()
    if trainer.rank:
        return []
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    step = statistics.median(p["step"] for p in parts)
    title = f"{ranks} rank(s) of {torch.get_num_threads()} thread(s), {train.dtype}, median of {rounds} steps; this is rank 0"
    first = Table(title, ["part", "ms", "of the step"])
    for name in parts[0]:
        spent = statistics.median(p[name] for p in parts)
        first.rows.append({"part": name, "ms": spent * 1e3, "of the step": spent / step})
    on_device = trainer.device.type == "cuda"
    found = account(profile.events(), on_device)
    second = Table(
        f"One more step, {found.whole / 1e3:,.0f} ms, by kind of operator: own time (the profiler makes small operators look larger than they are)",
        ["kind", "ms", "share"],
    )
    by_kind: Counter[str] = Counter()
    for name, spent in found.own.items():
        by_kind[kind_of(name)] += spent
    by_kind["communication"] -= found.hidden if on_device else 0
    by_kind[HIDDEN] = found.hidden
    by_kind[left := "device idle" if on_device else "outside operators"] = found.outside
    second.rows = [{"kind": kind, "ms": by_kind[kind] / 1e3, "share": by_kind[kind] / found.whole} for kind in (*KINDS, REST, left, HIDDEN)]
    third = Table(f"The largest of the {REST}", ["operator", "ms", "share"])
    rest = [(name, spent) for name, spent in found.own.most_common() if kind_of(name) == REST][:12]
    third.rows = [{"operator": name[:60], "ms": spent / 1e3, "share": spent / found.whole} for name, spent in rest]
    return [first, second, third]
