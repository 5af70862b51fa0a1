"""`moetrain bench train`: where the time of a config's training step goes, on each rank that a launcher started."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from moetrain.bench.measure import Table
from moetrain.config import Config, ConfigError
from moetrain.train import Trainer

KINDS = {
    "GEMM": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "moetrain::experts"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention", "flash_attn"),
    "communication": (
        "gloo:", "nccl:", "c10d::", "record_param_comms", "_SendRows", "_ReturnRows", "_SendWeights", "_SendProbes", "moetrain::push",
        "moetrain::pull", "FSDP::",
    ),
}  # fmt: skip
"""Kind -> beginnings of the operators' names. `moetrain::experts` is the whole experts' block on the CPU, activation and gather included. The
dispatcher's functions and FSDP's hooks have the wait for other ranks as time of their own."""


def kind_of(operator: str) -> str:
    return next((kind for kind, starts in KINDS.items() if operator.startswith(starts)), "rest")


def run(config: Config, rounds: int) -> list[Table]:
    """One table by part of the step, one by kind of operator, one of the largest of the rest; on rank 0, empty elsewhere. Two steps warm up.

    Nothing is written where the config's run would be. Raises what `Trainer` raises, and ConfigError if the run has too few steps."""
    if config.train is not None and config.train.steps < rounds + 3:
        raise ConfigError(f"train.steps ({config.train.steps}): --rounds {rounds} takes {rounds + 3} steps with those that warm up; use fewer rounds")
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
        with torch.profiler.profile() as profile:
            trainer.train_step(next(batches))
    if trainer.rank:
        return []
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    step = statistics.median(p["step"] for p in parts)
    title = f"{ranks} rank(s) of {torch.get_num_threads()} thread(s), {train.dtype}, median of {rounds} steps; this is rank 0"
    first = Table(title, ["part", "ms", "of the step"])
    for name in parts[0]:
        spent = statistics.median(p[name] for p in parts)
        first.rows.append({"part": name, "ms": spent * 1e3, "of the step": spent / step})
    own: Counter[str] = Counter()
    for event in profile.key_averages():
        own[event.key] += event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
    total = sum(own.values())
    second = Table("One step by kind of operator (own time; the profiler makes small operators look larger than they are)", ["kind", "ms", "share"])
    by_kind: Counter[str] = Counter()
    for name, spent in own.items():
        by_kind[kind_of(name)] += spent
    second.rows = [{"kind": kind, "ms": by_kind[kind] / 1e3, "share": by_kind[kind] / total} for kind in (*KINDS, "rest")]
    third = Table("The largest of the rest", ["operator", "ms", "share"])
    rest: list[tuple[str, Any]] = [(name, spent) for name, spent in own.most_common() if kind_of(name) == "rest"][:12]
    third.rows = [{"operator": name[:60], "ms": spent / 1e3, "share": spent / total} for name, spent in rest]
    return [first, second, third]
