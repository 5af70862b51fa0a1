"""Folders of runs for the tests, written as the trainer writes them but without one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = """run_dir: {folder}
model:
  vocab_size: 259
  hidden_size: 64
  num_layers: {layers}
  num_heads: 4
  num_kv_heads: 2
  intermediate_size: 128
  max_position_embeddings: 128
  moe: {{num_experts: {experts}, expert_dim: 32, layers: {{first: 1}}, router: {{type: topk, top_k: 2}}}}
data: {{seq_len: 128, train: [{{name: a, path: a}}]}}
train: {{steps: 100, global_batch_size: 16, micro_batch_size: 16}}
"""


def record(step: int, layers: int, experts: int, *, load: bool = False, sources: tuple[str, ...] = ("code", "prose"), **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl of a mixture."""
    draw = random.Random(step)
    loss = 6 / math.sqrt(step) + draw.random() / 10
    found = {
        "step": step, "loss": loss + 0.1, "lm": loss, "sparsity": 0.2, "grad_norm": 1 / step, "lr": 1e-3, "tokens": 2048 * step, "skipped": False,
        "sparsity_coef": [0.1, 0.3],
        "moe": {
            "active": [2 + draw.random() for _ in range(layers)], "active_std": [0.5] * layers, "load_max_mean": [1.5] * layers,
            "dead": [int(i == 2) for i in range(layers)], "probe_share": [0.0] * layers, "empty": [0.0] * layers, "dropped": [0.0] * layers,
        },
        "sources": {name: {"loss": loss, "tokens": 100} for name in sources},
        "step_s": 0.5, "data_s": 0.1, "forward_backward_s": 0.3, "optimizer_s": 0.05, "tokens_per_s": 4096.0, "host_memory_bytes": 2**30,
    }  # fmt: skip
    if load:
        found["load"] = [[0 if i == 2 and e == 0 else 100 + 10 * e for e in range(experts)] for i in range(layers)]
    return found | more


def picture(step: int | None, names: tuple[str, ...], layers: int, experts: int) -> dict[str, Any]:
    """A part of routing.json: every set has its own preferred expert."""
    sets = {}
    for n, name in enumerate(names):
        load = [[90 if e == n % experts else 10 for e in range(experts)] for _ in range(layers)]
        kinds = {"beginning of a word": {"tokens": 40, "active_by_layer": [2.5] * layers}, "space": {"tokens": 60, "active_by_layer": [0.5] * layers}}
        sets[name] = {"tokens": 100, "load": load, "kinds": kinds}
    return {"step": step, "sets": sets}


def write_run(folder: Path, *, steps: int = 30, layers: int = 3, experts: int = 4, names: tuple[str, ...] = ("code", "prose")) -> Path:
    """A whole run: evaluations, loads, two resumes, a skipped step, a fallback, checkpoints, the routing."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        more: dict[str, Any] = {"eval": {n: {"loss": 3 / step, "perplexity": 20.0} for n in names}, "eval_s": 0.2} if step % 10 == 0 else {}
        lines.append(record(step, layers, experts, load=step % 5 == 0, sources=names, **more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"event": "checkpoint", "step": 10, "seconds": 0.5}, {"event": "fallback", "step": 10, "reason": f"model.bin of {names[0]} is damaged"},
        {"event": "resume", "step": 5, "ranks": 2}, {"event": "skipped", "step": 12, "loss": math.nan, "grad_norm": math.inf},
        {"event": "resume", "step": 10, "ranks": 4},
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": "2026-01-01T00:00:00.000+00:00", **e}) + "\n" for e in events))
    whole = {"train": picture(steps, names, layers, experts), "eval": picture(None, names, layers, experts)}
    (folder / "routing.json").write_text(json.dumps(whole))
    (folder / "config.yaml").write_text(CONFIG.format(folder="runs/x", layers=layers + 1, experts=experts))
    return folder
