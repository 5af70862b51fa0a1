"""Loss, perplexity and the cost of a token on held-out sets."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from moetrain.build import DTYPES, find_trained, load_trained
from moetrain.config import Config, ConfigError, ModelConfig, ParallelConfig, TrainConfig, check_world
from moetrain.data.dataset import BatchIterator, EvalSet
from moetrain.data.kinds import KINDS, TokenKinds
from moetrain.metrics import write_routing
from moetrain.microbatch import Sums, forward, source_tags
from moetrain.model import Transformer
from moetrain.parallel.mesh import build_meshes, start_processes


@torch.no_grad()
def evaluate(
    model: Transformer,
    sets: Mapping[str, EvalSet],
    *,
    batch_size: int,
    dtype: torch.dtype,
    isolate_documents: bool,
    device: torch.device,
    group: dist.ProcessGroup | None,
    tasks: Mapping[str, str] | None = None,
    kinds: TokenKinds | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """By set: loss (nats per predicted token), perplexity, tokens; of a mixture, active (mean experts per token) and active_by_layer (of each
    MoE layer); where experts differ in size, mean_sized, how many of the mean size cost as much; load_by_layer, routes per expert of each MoE
    layer; with `kinds`, kinds: kind of token -> tokens and active_by_layer.

    batch_size: sequences per rank and forward pass. tasks: set -> the source whose tag its tokens have; a set that is not there has that of its
    own name. progress: called before each batch. Collective over `group`; every rank gets the same answer. The model is left in evaluation
    mode.
    """
    model.eval()
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    results: dict[str, dict[str, Any]] = {}
    for name, dataset in sets.items():
        sums = Sums([], 1, device)
        tags = source_tags(model.config, [(tasks or {}).get(name, name)], device)
        with BatchIterator(
            dataset, global_batch_size=batch_size * world, micro_batch_size=batch_size, dp_rank=rank, dp_world=world, prefetch=0
        ) as batches:
            while batches.state()["consumed_samples"] < len(dataset):
                progress()
                for batch in next(batches):
                    batch = {k: v.to(device) for k, v in batch.items()}
                    classes = None if kinds is None else (kinds.of(batch["tokens"], batch["positions"]), len(KINDS))
                    sums.add(forward(model, batch, dtype, isolate_documents, tags=tags, classes=classes), batch)
        totals = sums.reduce(group)
        tokens = totals.sources[0]["tokens"]
        loss = totals.lm / max(1, tokens)
        results[name] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
        if totals.mean_active is not None:
            results[name] |= {"active": totals.mean_active, "active_by_layer": totals.moe["active"]}
            moe = model.config.moe
            if moe is not None and isinstance(moe.expert_dim, list):
                routes = [mean * moe.mean_sized(load) / max(1.0, sum(load)) for mean, load in zip(totals.moe["active"], totals.loads)]
                results[name]["mean_sized"] = sum(routes) / len(routes)
            results[name]["load_by_layer"] = [[int(count) for count in layer] for layer in totals.loads]
            if kinds is not None:
                results[name]["kinds"] = {
                    kind: {"tokens": count, "active_by_layer": [sum(layer) / count for layer in layers]}
                    for kind, count, layers in zip(KINDS, totals.class_tokens, totals.class_loads)
                    if count
                }
    return results


def routing_sets(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `metrics.write_routing` takes, from the answer of `evaluate`; empty for a dense model."""
    return {
        name: {"tokens": r["tokens"], "load": r["load_by_layer"], "kinds": r.get("kinds", {})}
        for name, r in results.items()
        if "load_by_layer" in r
    }


def cost(config: ModelConfig, active: float | None, seq_len: int) -> dict[str, float]:
    """Parameters, those a token uses, and forward FLOPs per token, with `active` experts (of the mean size) per token in the mean (None: a dense
    model)."""
    return {
        "params": config.num_params(),
        "active_params": config.num_active_params(active),
        "flops_per_token": config.flops_per_token(seq_len, active),
    }


def run(config: Config) -> None:
    """`moetrain eval`: the newest checkpoint of run_dir, or init_from, on every set of data.eval; on one rank or more."""
    if not config.data.eval:
        raise ConfigError("data.eval: no set to evaluate; give at least one name and path")
    if config.eval.output is not None:
        # Now, not after the work is done.
        Path(config.eval.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.eval.output).open("a").close()
    trained = find_trained(config)
    train = config.train or TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1)
    device = start_processes(config.parallel.timeout_seconds)
    world = dist.get_world_size() if dist.is_initialized() else 1
    # A model that was trained on many ranks is often looked at on one: then the layout of its training is of no account.
    layout = config.parallel if world > 1 else ParallelConfig()
    parallel = check_world(config.model_copy(update={"train": None, "model": trained.config, "parallel": layout}), world)
    data = config.data
    sets = {
        s.name: EvalSet(s.name, s.path, data.seq_len, data.isolate_documents, config.eval.sequences, vocab_size=trained.config.vocab_size)
        for s in data.eval
    }
    model = load_trained(trained, train, device, build_meshes(parallel, device))
    began = time.perf_counter()
    results = evaluate(
        model, sets, batch_size=config.eval.batch_size, dtype=DTYPES[train.dtype], isolate_documents=data.isolate_documents, device=device,
        group=dist.group.WORLD if world > 1 else None, tasks=data.eval_tasks,
        kinds=TokenKinds.of_tokenizer(trained.tokenizer, trained.config.vocab_size, device) if config.eval.routing else None,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    for result in results.values():
        result |= cost(trained.config, result.get("mean_sized", result.get("active")), data.seq_len)
    if world == 1 or dist.get_rank() == 0:
        answer = {"model": trained.source, "sets": results, "tokens_per_s": sum(r["tokens"] for r in results.values()) / seconds}
        if trained.config.moe is not None:
            answer["num_experts"] = trained.config.moe.num_experts
            answer["moe_layers"] = trained.config.moe_layers
        _show(answer)
        if config.eval.routing:
            write_routing(config.run_dir, "eval", None, routing_sets(results))
        if config.eval.output is not None:
            Path(config.eval.output).write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def _show(answer: dict[str, Any]) -> None:
    table = Table(title=answer["model"], box=box.SIMPLE, title_justify="left", pad_edge=False)
    experts = answer.get("num_experts")
    for column in ("set", "tokens", "loss", "perplexity", *(["experts"] if experts else []), "active params", "FLOPs/token"):
        table.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    for name, r in answer["sets"].items():
        cells = [name, f"{r['tokens']:,}", f"{r['loss']:.4f}", f"{r['perplexity']:.3f}"]
        cells += [f"{r['active']:.2f}/{experts}"] if experts else []
        table.add_row(*cells, f"{r['active_params'] / 1e6:.2f}M", f"{r['flops_per_token'] / 1e6:.2f}M")
    console = Console()
    console.print(table)
    for name, r in answer["sets"].items():
        if "active_by_layer" in r:
            by_layer = " ".join(f"{i}: {a:.2f}" for i, a in zip(answer["moe_layers"], r["active_by_layer"]))
            console.print(f"{name}: experts per token by layer, {by_layer}")
    console.print(f"{answer['tokens_per_s']:,.0f} tokens/s")
