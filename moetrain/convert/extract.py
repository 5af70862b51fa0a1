"""One task's part of a mixture whose experts go by task, as a dense model: all its tokens use the same experts with the same weights, so that
their FFNs joined, each output scaled by its weight, are one FFN (Task-level MoE, arXiv 2110.03742, calls it the task's sub-network).

Letters: E experts, D model dim, F intermediate size of one expert, n experts of the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from moetrain.config import ModelConfig, TaskRouter
from moetrain.moe.routers.softmax import largest


def task_config(config: ModelConfig, task: str) -> ModelConfig:
    """Config of the task's dense model: intermediate_size n F. ValueError if the experts don't go by task, or not by this one."""
    moe = config.moe
    if moe is None or not isinstance(moe.router, TaskRouter):
        raise ValueError("export.task: only a model with router.type: task has tasks to extract; leave it out")
    names = moe.router.tag_names()
    if task not in names:
        raise ValueError(f"export.task ({task}): is no task of the model; one of {', '.join(names)}")
    count = moe.router.top_k if moe.router.tasks else len(moe.router.branches[task])
    return config.model_copy(update={"moe": None, "intermediate_size": count * moe.expert_dim})


def task_tensors(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], task: str) -> Iterator[tuple[str, Tensor]]:
    """The dense model's parameters from those of the mixture, in any order; one layer's FFN is held at a time."""
    assert config.moe is not None and isinstance(config.moe.router, TaskRouter), "task_config refuses this"
    router = config.moe.router
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, _, part = name.partition(".ffn.")
        if not part:
            yield name, tensor
            continue
        parts = held.setdefault(layer, {})
        parts[part] = tensor
        if len(parts) == (3 if router.tasks else 2):
            del held[layer]
            for kind, joined in _joined(router, parts, task).items():
                yield f"{layer}.ffn.{kind}.weight", joined


def _joined(router: TaskRouter, parts: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    if router.tasks:
        logits = parts["router.weight"][router.tasks.index(task)].double()
        experts = sorted(largest(logits, router.top_k).tolist())
        weights = logits.softmax(-1)[experts]
        weights = weights / weights.sum() if router.normalize else weights
    else:
        experts = router.branches[task]
        weights = torch.full((len(experts),), 1 / len(experts), dtype=torch.float64)
    gate, up = (torch.cat(list(part)) for part in parts["experts.gate_up"][experts].chunk(2, dim=1))
    down = parts["experts.down"][experts]
    wide = down.to(torch.promote_types(down.dtype, torch.float32))
    scaled = (wide * weights[:, None, None].to(wide)).to(down.dtype)
    return {"gate_proj": gate, "up_proj": up, "down_proj": torch.cat(list(scaled), dim=1)}
