"""The guard: silent where nothing is wrong, in every layout, with every router and kind of layer; and each error that it is for is found, under
the layer, rank and expert where it was planted. It changes no number and leaves nothing in the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.config import Config, config_from_dict
from moetrain.moe.dispatch import AllToAllDispatcher
from moetrain.parallel.parallelize import wholes
from moetrain.report import write as write_report
from moetrain.train import Trainer
from tests.distributed import run
from tests.test_ranks import config_of, data  # noqa: F401  (a fixture)
from tests.test_train import layout_id, make_config, plant


def _local(parameter: torch.nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _before_finish(trainer: Trainer, change: Callable[[], None]) -> None:
    """After the backward passes of every watched step."""
    finish = trainer.guard.finish

    def changed(loads):
        change()
        return finish(loads)

    trainer.guard.finish = changed


def _scale_gradients(trainer: Trainer, name: str, factor: float, rank: int | None = None, expert: int | None = None) -> None:
    def change() -> None:
        if rank is None or dist.get_rank() == rank:
            grad = trainer.parameters[name].grad
            grad = grad.to_local() if hasattr(grad, "to_local") else grad
            (grad if expert is None else grad[expert]).mul_(factor)

    _before_finish(trainer, change)


def _lose_a_route(trainer: Trainer) -> None:
    """Between router and dispatch of layer 1, on rank 1: the first route to expert 6."""

    class Losing(AllToAllDispatcher):
        def dispatch(self, x, routing):
            active = routing.decision.active.clone()
            active[active[:, 6].nonzero()[0], 6] = False
            return super().dispatch(x, replace(routing, decision=replace(routing.decision, active=active)))

    if dist.get_rank() == 1:
        layer = trainer.model.layers[1].ffn
        layer.dispatcher = Losing(layer.dispatcher.exchange)


def _decide_anew(trainer: Trainer) -> None:
    """In recomputation, on the last rank, the first token with a label goes to the next experts."""
    router, calls = trainer.model.layers[0].ffn.router, []
    forward = router.forward

    def other(x, context):
        routing = forward(x, context)
        calls.append(0)
        if len(calls) % 2 or dist.get_rank() != 1:
            return routing
        active = routing.decision.active.clone()
        token = int(context.valid.nonzero()[0])
        active[token] = active[token].roll(1)
        return replace(routing, decision=replace(routing.decision, active=active))

    router.forward = other


def _drift(trainer: Trainer, name: str, rank: int, expert: int | None = None) -> None:
    """A parameter moves on one rank alone."""
    if dist.get_rank() == rank:
        local = _local(trainer.parameters[name])
        (local if expert is None else local[expert]).add_(1e-3)


def _half_precision_router(trainer: Trainer) -> None:
    router = trainer.model.layers[1].ffn.router
    router.weight = torch.nn.Parameter(router.weight.detach().bfloat16())


UP, DOWN, NORM, ROUTER = "layers.1.ffn.experts.gate_up", "layers.1.ffn.experts.down", "layers.0.attn_norm.weight", "layers.1.ffn.router.weight"
# Name -> (layout, options, how to spoil, checks of the errors that follow, as (check, layer, expert, ranks)).
EP2, EP4, REPLICAS = (1, 1, 2), (1, 2, 2), (2, 1, 2)
SPOILT: dict[str, tuple[tuple[int, int, int], dict[str, Any], Callable[[Trainer], None], set[tuple]]] = {
    "times ep": (EP2, {}, lambda t: _scale_gradients(t, DOWN, 2.0), {("gradient", 1, e, (e // 4,)) for e in range(8)}),
    "over ep": (EP4, {}, lambda t: _scale_gradients(t, UP, 0.5), {("gradient", 1, e, (e // 4, 2 + e // 4)) for e in range(8)}),
    "one expert": (EP2, {}, lambda t: _scale_gradients(t, DOWN, 0.9, rank=1, expert=2), {("gradient", 1, 6, (1,))}),
    "one replica": (REPLICAS, {}, lambda t: _scale_gradients(t, DOWN, 2.0, rank=3, expert=0), {("gradient", 1, 4, (3,))}),
    "dense over ranks": (EP2, {}, lambda t: _scale_gradients(t, NORM, 0.5), {("gradient", 0, None, (0, 1))}),
    "lost route": (EP2, {}, _lose_a_route, {("routes", 1, 6, (1,)), ("rows", 1, None, (1,))}),
    "changed route": (EP2, {"train__activation_checkpointing": "block"}, _decide_anew, {("replay", 0, None, (1,))}),
    "router drifts": (REPLICAS, {}, lambda t: _drift(t, ROUTER, 2), {("replicas", 1, None, (2, 3))}),
    "expert drifts": (REPLICAS, {}, lambda t: _drift(t, DOWN, 3, expert=1), {("replicas", 1, 5, (3,))}),
}  # fmt: skip


def config_for(name: str, folder: Path, place: Path, **changes: Any) -> Config:
    layout, options, *_ = SPOILT[name]
    return make_config(folder, "topk", layout, run_dir=str(place / name.replace(" ", "_")), guard__every=1, **{**options, **changes})


def spoilt(configs: list[tuple[str, Config]]) -> list[str | None]:
    """One step of each; the error that ended it."""
    ends: list[str | None] = []
    for name, config in configs:
        trainer = Trainer(config, console=False)
        SPOILT[name][2](trainer)
        ends.append(None)
        with trainer._batches(trainer.dataset, config.train.global_batch_size, prefetch=0) as batches:
            try:
                trainer.train_step(next(batches))
            except RuntimeError as error:
                ends[-1] = str(error)
        trainer.close()
    return ends


def events(config: Config, kind: str = "guard") -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("layout", [EP2, EP4, REPLICAS], ids=layout_id)
def test_planted_errors_are_found_where_they_are(layout, data, tmp_path):  # noqa: F811
    configs = [(name, config_for(name, data, tmp_path)) for name in SPOILT if SPOILT[name][0] == layout]
    run(spoilt, layout[0] * layout[1] * layout[2], configs)
    for name, config in configs:
        found = events(config)
        where = {(e["check"], e["layer"], e.get("expert"), tuple(e["ranks"])) for e in found}
        wanted = SPOILT[name][3]
        if name == "changed route":
            assert {(c, layer, None, ranks) for c, layer, _, ranks in where} == wanted and len(where) >= 2, where  # lost here, won there
        else:
            assert wanted <= where, (name, where)
            # Replicas of an expert that differ say different things of their tokens too.
            assert {w[:3] for w in where} <= {w[:3] for w in wanted} | {("gradient", *w[1:3]) for w in wanted}, (name, where)
        if name == "times ep":
            assert all("its down projection is 2 times what its tokens say" in e["message"] for e in found)


def test_a_router_in_half_precision_is_found(data, tmp_path):  # noqa: F811
    config = make_config(data, "topk", run_dir=str(tmp_path / "run"), guard__every=1, train__dtype="bfloat16")
    trainer = Trainer(config, console=False)
    _half_precision_router(trainer)
    with trainer._batches(trainer.dataset, 16, prefetch=0) as batches:
        trainer.train_step(next(batches))
    trainer.close()
    (event,) = events(config)
    assert (event["check"], event["layer"], event["message"]) == ("dtype", 1, "the router computes in torch.bfloat16, not in torch.float32")


def test_stop_ends_all_ranks_with_one_line(data, tmp_path):  # noqa: F811
    """The same words on every rank, before anything is updated; the report has the event; `warn` went on above."""
    config = config_for("one expert", data, tmp_path, guard__action="stop")
    first, second = run(spoilt, 2, [("one expert", config)])
    assert first == second and "\n" not in first[0]
    assert first[0].startswith("step 1: guard gradient: layer 1, expert 6, rank 1: the gradient of its down projection is 0.9 times what its tokens")
    assert "guard.action: warn goes on" in first[0]
    (Path(config.run_dir) / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert "gradient of its down projection" in write_report(config.run_dir).read_text()


# Of tests/test_ranks.py, and of tests/test_train.py in each dtype: all kinds of layers and decisions. On several ranks a part of them.
KINDS = ["budget", "remoe", "xmoe", "dynmoe", "moepp", "base_layers", "expert_choice_batch", "hash", "task_branches", "some_sparse",
         "latent_and_shared", "unequal_and_residual", "strata", "finedeep_below"]  # fmt: skip
OLD = [(dtype, name) for dtype in ("float64", "float32", "bfloat16") for name in ("exact", "sampled", "topk", "gshard", "deepseek")]
HEALTHY = {
    (1, 1, 1): (KINDS, OLD),
    EP2: (["dynmoe", "expert_choice_batch", "hash", "unequal_and_residual", "strata"], OLD[::3]),
    REPLICAS: (["moepp"], [("bfloat16", "topk"), ("float64", "sampled")]),
}


def healthy(configs: list[Config], how: str = "mixed", steps: int = 2) -> list[Any]:
    """A few steps of each: the records, whether anything of the guard is left in the model, the last weights."""
    found = []
    for config in configs:
        trainer = Trainer(config, console=False)
        plant(trainer.model, how)
        with trainer._batches(trainer.dataset, config.train.global_batch_size, prefetch=0) as batches:
            records = [trainer.train_step(next(batches)) for _ in range(steps)]
        left = [name for name, m in trainer.model.named_modules() if "compute" in m.__dict__]
        weights = {n: w.numpy().copy() for n, w in wholes(iter(trainer.parameters.items()))}
        trainer.close()
        found.append((records, left, weights))
    return found


@pytest.mark.parametrize("layout", HEALTHY, ids=layout_id)
def test_nothing_is_found_where_nothing_is_wrong(layout, data, tmp_path):  # noqa: F811
    """All kinds of layers and decisions, with and without recomputation, in the three dtypes."""
    configs, (kinds, old) = [], HEALTHY[layout]
    for i, name in enumerate(kinds):
        tree = config_of(name, data, layout, tmp_path / name).model_dump(exclude_unset=True)
        train = {**tree["train"], "activation_checkpointing": ("none", "block")[i % 2]}
        configs.append(config_from_dict({**tree, "guard": {"every": 1}, "train": train}))
    for i, (dtype, name) in enumerate(old):
        changed = {"train__dtype": dtype, "train__activation_checkpointing": ("block", "none")[i % 2]}
        configs.append(make_config(data, name, layout, run_dir=str(tmp_path / f"{name}_{dtype}"), guard__every=1, **changed))
    world = layout[0] * layout[1] * layout[2]
    results = healthy(configs) if world == 1 else run(healthy, world, configs, "mixed", 1, timeout=200)[0]
    for config, (records, left, _) in zip(configs, results, strict=True):
        assert events(config) == [] and not any(r["guard"]["errors"] for r in records), config.run_dir
        assert not left
        if layout[2] > 1:
            assert all(0 < n for n in records[0]["guard"]["rows_max"]) and all(1 <= n <= 2 for n in records[0]["guard"]["rows_max_mean"])
            (note, *_) = [e for e in events(config, "guard_note") if e["check"] == "buffer"]
            assert f"{max(records[0]['guard']['rows_max'])} rows" in note["message"] and note["ranks"][0] < world
            # The expert named is one of that rank's.
            assert note["layer"] in config.model.moe_layers and 0 <= note["expert"] < config.model.moe.num_experts


def test_it_changes_no_number_and_is_gone_between_checks(data, tmp_path):  # noqa: F811
    """Weights after a watched and an unwatched step, bit by bit those of a run without the guard; every second step has no hook."""
    plain = make_config(data, "sampled", run_dir=str(tmp_path / "plain"))
    watched = make_config(data, "sampled", run_dir=str(tmp_path / "watched"), guard__every=2)
    (first, _, want), (second, left, got) = healthy([plain, watched])
    assert [r.pop("guard", None) for r in second] == [None, {"errors": 0}] and not left
    assert first == second
    assert all(np.array_equal(got[name], weight) for name, weight in want.items())
    trainer = Trainer(make_config(data, "sampled", run_dir=str(tmp_path / "third"), guard__every=2), console=False)
    for step, watching in ((1, False), (2, True)):
        assert trainer.guard.begin(step) is watching
        assert any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules()) is watching
    trainer.close()
    trainer = Trainer(make_config(data, "sampled", run_dir=str(tmp_path / "off")), console=False)
    assert trainer.guard is None
    trainer.close()


def test_experts_that_die_are_named_once_and_are_no_error(data, tmp_path):  # noqa: F811
    config = make_config(data, "exact", run_dir=str(tmp_path / "run"), guard__every=1, guard__dead_after=2, guard__action="stop")
    ((records, *_),) = healthy([config], "one expert")
    notes = events(config, "guard_note")
    assert {(e["check"], e["layer"], e["expert"], e["step"]) for e in notes if e["layer"] == 0} == {("dead", 0, e, 2) for e in range(8) if e != 5}
    assert [r["guard"]["errors"] for r in records] == [0, 0] and events(config) == []


def test_what_is_not_finite_is_left_to_the_step(data, tmp_path):  # noqa: F811
    """A step with NaN is skipped by the trainer; the guard does not end the run for it."""
    config = make_config(data, "topk", run_dir=str(tmp_path / "run"), guard__every=1, guard__action="stop")
    trainer = Trainer(config, console=False)
    forward = trainer.model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.loss_sum = output.loss_sum * float("nan")
        return output

    trainer.model.forward = broken
    with trainer._batches(trainer.dataset, 16, prefetch=0) as batches:
        record = trainer.train_step(next(batches))
    trainer.close()
    assert record["skipped"] and record["guard"]["errors"] == 0


def test_many_findings_are_counted(data, tmp_path):  # noqa: F811
    """All experts of both layers wrong, twice: 16 are written down, on the console too, and the rest is a number."""
    config = make_config(data, "exact", run_dir=str(tmp_path / "run"), guard__every=1)
    trainer, said = Trainer(config, console=False), []
    trainer.metrics.tell = said.append
    for layer in (0, 1):
        for name in ("gate_up", "down"):
            _scale_gradients(trainer, f"layers.{layer}.ffn.experts.{name}", 3.0)
    with trainer._batches(trainer.dataset, 16, prefetch=0) as batches:
        record = trainer.train_step(next(batches))
    trainer.close()
    assert record["guard"]["errors"] == 32 and len(events(config)) == 17 == len(said)
    assert events(config)[-1]["message"] == "and 16 more of this check" and said[-1] == "  guard: and 16 more of this check"
    assert said[0].startswith("  guard gradient: layer 0, expert 0, rank 0: the gradient of its up projection is 3 times")
