"""Room for a fixed number of routes: the layer computes, bit for bit, what it does with exact sizes; what finds no room is the least; padding never
counts, whatever lies in it; and from the router to the gradients nothing waits for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moetrain import ops
from moetrain.config import ModelConfig
from moetrain.moe import experts, room
from moetrain.moe.layer import MoELayer
from moetrain.moe.room import largest_within, probe_rows_for, route_rows
from moetrain.moe.routing import Decision, Routing, TokenContext, replay_contexts
from moetrain.train import Trainer
from tests.moe.test_layer import ROUTERS, model_config, pair
from tests.test_ops import CUDA
from tests.test_train import assert_same, data, make_config, rank_main, start, wanted  # noqa: F401  (data is a fixture)

T = 15


def with_budget(config: ModelConfig, budget: float | None) -> ModelConfig:
    assert config.moe is not None
    return config.model_copy(update={"moe": config.moe.model_copy(update={"route_budget": budget})})


def inputs(dtype: torch.dtype, dim: int = 8, tokens: int = T, device: str = "cpu"):
    """x, the gradient of the output, and the context: padding, three sequences, keys, ids and tags."""
    x, grad = torch.randn(2, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    index = torch.arange(tokens, device=device)
    context = TokenContext(keys=index + 100, valid=index != 3, num_tokens=40.0, tokens=index % 11, tags=index % 2, sequence=tokens // 3)
    return x, grad, context


def results(layer: MoELayer, x: Tensor, grad: Tensor, context: TokenContext) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Output, losses, and the gradients of x and of every parameter; and the statistics."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, report = layer(x, context, x)
    ((y * grad).sum() + sum((i + 1) * v for i, v in enumerate(report.losses.values()))).backward()
    return [y.detach(), *(v.detach() for v in report.losses.values()), x.grad, *(p.grad for p in layer.parameters())], report.stats


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


# ------------------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["loop", "fused"])
@pytest.mark.parametrize("name", ROUTERS)
def test_room_changes_no_bit(name, dtype):
    """Room for every route there can be, and as little as the routes of this batch need: eights, so sometimes not one row is left."""
    config = model_config(ROUTERS[name])
    layer = pair(config)[0].to(dtype)
    expected, stats = results(layer, *inputs(dtype))
    for budget in (5.0, max(1.0, stats["load"].sum().item()) / T):
        layer.room = room.Room.of(with_budget(config, budget).moe)
        found, told = results(layer, *inputs(dtype))
        assert_equal(found, expected)
        assert told.pop("no_room") == 0
        assert all(torch.equal(told[key], stats[key]) for key in stats)


@pytest.mark.parametrize("name", ["exact", "sampled", "topk"])
def test_exactly_enough(name):
    """32 routes in 32 rows: no padding at all."""
    config = model_config(ROUTERS[name])
    layer, (x, grad, context) = pair(config)[0], inputs(torch.float64, tokens=16)
    context = dataclasses.replace(context, valid=None, sequence=None)
    if name != "topk":  # two gates of each token
        layer.router.decide = lambda gates, context, original=layer.router.decide: _two(original(gates, context))
    expected, stats = results(layer, x, grad, context)
    assert stats["load"].sum() == 32 == route_rows(2.0, 16)
    layer.room = room.Room.of(with_budget(config, 2.0).moe)
    found, told = results(layer, x, grad, context)
    assert_equal(found, expected)
    assert told["no_room"] == 0


def _two(decision: Decision) -> Decision:
    active = torch.zeros_like(decision.active)
    active[:, [1, 4]] = True
    assert decision.probes is not None
    return Decision(active, decision.probes.clamp(min=1) * ~active * (decision.probes + decision.active > 0))


@pytest.mark.parametrize("name", ["exact", "sampled"])
@pytest.mark.parametrize("shift", [-9.0, 9.0])
def test_no_route_and_every_route(name, shift):
    """Nothing but padding, forward and backward; and full lists."""
    config = model_config(ROUTERS[name])
    layer = pair(config, scale=0.1, shift=shift)[0]
    x, grad, context = inputs(torch.float64)
    x[:, 0] = 1.0
    expected, stats = results(layer, x, grad, context)
    assert stats["load"].sum() == (5 * (T - 1) if shift > 0 else 0)
    layer.room = room.Room.of(with_budget(config, 5.0).moe)
    assert_equal(results(layer, x, grad, context)[0], expected)


def test_probes_of_a_larger_batch():
    """So many pairs that the rows for sampled probes are far fewer than pairs."""
    config = model_config(ROUTERS["sampled"])
    layer, case = pair(config, shift=-9.0)[0], inputs(torch.float64, tokens=600)
    case[0][:, 0] = 1.0
    expected, stats = results(layer, *case)
    assert stats["probes"] < probe_rows_for(0.3, 3000) < 1200
    layer.room = room.Room.of(with_budget(config, 5.0).moe)
    assert_equal(results(layer, *case)[0], expected)


def test_no_tokens():
    layer = MoELayer(with_budget(model_config(ROUTERS["exact"]), 2.0), 1).double()
    x = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, TokenContext(), x)
    y.sum().backward()
    assert y.shape == (0, 8)


# --------------------------------------------------------------------------------------------------------------- padding


def _poison(rows: Tensor, used: int) -> Tensor:
    rows[used:] = math.nan
    return rows


@pytest.mark.parametrize("way, dtype", [("loop", torch.float64), ("fused", torch.float32), ("grouped_mm", torch.bfloat16)])
@pytest.mark.parametrize("name", ["exact", "sampled", "topk", "straight_through"])
def test_nothing_of_padding_gets_through(name, way, dtype, monkeypatch):
    """NaN in every row that a grouped product leaves unwritten, and in the numbers per route that come of them: no result changes. The third way is
    CUDA's, with the grouped_mm that torch has for the CPU."""
    if way == "grouped_mm":
        monkeypatch.setattr(experts, "_grouped", lambda a, b: True)
        monkeypatch.setattr(ops, "has_experts", lambda device, dtype: False)
    config = model_config(ROUTERS[name], hidden=16, expert_dim=8)
    layer = pair(config)[0].to(dtype)
    expected, _ = results(layer, *inputs(dtype, dim=16))
    layer.room = room.Room.of(with_budget(config, 4.5).moe)
    poisoned = []

    def after(original):
        def wrapped(x, weight, counts):
            used = int(counts.sum())
            poisoned.append(len(x) - used)
            return _poison(original(x, weight, counts), used)

        return wrapped

    for product in ("gemm_nt", "gemm_nn"):
        monkeypatch.setattr(experts, product, after(getattr(experts, product)))
    probe, fused, back = experts._probe_products, ops.experts, ops.experts_backward

    def probe_products(rows, grad, gate_up, down, probes):
        return _poison(probe(rows, grad, gate_up, down, probes), int(probes.counts.sum()))

    def fused_forward(*arguments):
        out, pre = fused(*arguments)
        poisoned.append(len(pre) - int(arguments[5].sum()))
        return out, _poison(pre, int(arguments[5].sum()))

    def fused_backward(grad, rows, gate_up, down, weights, pre, tokens, counts, needs):
        *grads, grad_weights = back(grad, rows, gate_up, down, weights, pre, tokens, counts, needs)
        return *grads, _poison(grad_weights, int(counts.sum()))

    monkeypatch.setattr(experts, "_probe_products", probe_products)
    monkeypatch.setattr(ops, "experts", fused_forward)
    monkeypatch.setattr(ops, "experts_backward", fused_backward)
    assert_equal(results(layer, *inputs(dtype, dim=16))[0], expected)
    assert poisoned and min(poisoned) > 0


# -------------------------------------------------------------------------------------------------------------- overflow


def kept_by_hand(mask: Tensor, size: Tensor, rows: int) -> Tensor:
    """By sorting all routes: the largest weights, among equals by a scramble of the place in the batch."""
    routes = [(size[t, e].item(), (t * mask.shape[1] + e) * 0x9E3779B1 % 2**32, t, e) for t, e in mask.nonzero().tolist()]
    kept = torch.zeros_like(mask)
    for *_, t, e in sorted(routes, reverse=True)[:rows]:
        kept[t, e] = True
    return kept


@pytest.mark.parametrize("equal", [False, True])
def test_the_largest_find_room(equal):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 7, generator=generator) < 0.5
    size = torch.ones(40, 7) if equal else torch.rand(40, 7, generator=generator).mul(20).round()  # with ties
    for rows in (0, 1, 8, 64, int(mask.sum()), int(mask.sum()) + 1, 279):
        assert torch.equal(largest_within(mask, size, rows), kept_by_hand(mask, size, rows))


def test_equal_routes_lose_evenly_over_the_batch():
    """Of 1024 equal routes 256 find no room: 64 of each quarter of the batch and 32 of each of 8 experts, but for a few."""
    mask = torch.ones(128, 8, dtype=torch.bool)
    lost = ~largest_within(mask, torch.ones(128, 8), 768)
    assert (lost.view(4, -1).sum(-1) - 64).abs().max() <= 3 and (lost.sum(0) - 32).abs().max() <= 6


@pytest.mark.parametrize("name", ["exact", "sampled", "off", "remoe", "xmoe_capacity"])
def test_too_little_room(name):
    """What is left computes what a router that decided so would: same output, same gradients; what is lost is counted. By hand: the decision with
    the least routes closed, and weights as they were."""
    config = model_config(ROUTERS[name])
    layer, (x, grad, context) = pair(config)[0], inputs(torch.float64)
    whole = layer.router(x, context)
    rows = route_rows(0.5, T)
    kept = kept_by_hand(whole.decision.active, whole.weights.detach().abs(), rows)
    lost = int(whole.decision.active.sum()) - rows
    assert lost > 0
    layer.room = room.Room.of(with_budget(config, 0.5).moe)
    found, stats = results(layer, x, grad, context)
    assert stats["no_room"] == lost and stats["load"].tolist() == kept.sum(0).tolist()
    dropped = 0 if whole.decision.dropped is None else whole.decision.dropped
    assert stats["dropped"] == lost + dropped
    layer.room = None
    forward = layer.router.forward
    layer.router.forward = lambda x, context: _closed(forward(x, context), kept)
    expected, _ = results(layer, x, grad, context)
    assert_equal(found, expected)


def _closed(routing: Routing, kept: Tensor) -> Routing:
    return dataclasses.replace(routing, decision=dataclasses.replace(routing.decision, active=kept))


def test_too_many_probes(monkeypatch):
    """Happens by no test's chance: with less room than the bound leaves, some of the probes are made, and nothing fails."""
    monkeypatch.setattr(room, "probe_rows_for", lambda rate, pairs: 8)
    config = model_config(ROUTERS["sampled"])
    layer = pair(config)[0]
    layer.room = room.Room.of(with_budget(config, 5.0).moe)
    found, stats = results(layer, *inputs(torch.float64))
    assert stats["probes"] == 8 and all(a is None or a.isfinite().all() for a in found)


@pytest.mark.parametrize("rate, pairs", [(0.25, 40), (0.25, 4000), (0.01, 3000), (0.9, 500), (0.5, 100)])
def test_probes_find_room(rate, pairs):
    """The exact binomial tail beyond the rows for probes is below 10^-12, and the rows are not many more than the mean."""
    rows = probe_rows_for(rate, pairs)
    log = lambda k: math.lgamma(pairs + 1) - math.lgamma(k + 1) - math.lgamma(pairs - k + 1) + k * math.log(rate) + (pairs - k) * math.log(1 - rate)  # noqa: E731
    assert sum(math.exp(log(k)) for k in range(rows + 1, pairs + 1)) < 1e-12
    assert rows <= pairs and rows <= pairs * rate + 8 * math.sqrt(pairs * rate * (1 - rate)) + 20
    assert probe_rows_for(1.0, pairs) == pairs


def test_rows_are_eights():
    assert [route_rows(budget, tokens) for budget, tokens in ((1.1, 10), (2, 16), (2.01, 16), (0.1, 1), (3.0, 0))] == [16, 32, 40, 8, 0]


def test_evaluation_drops_nothing():
    config = model_config(ROUTERS["off"])
    layer = pair(config)[0].eval()
    expected, stats = results(layer, *inputs(torch.float64))
    layer.room = room.Room.of(with_budget(config, 0.5).moe)
    found, told = results(layer, *inputs(torch.float64))
    assert_equal(found, expected)
    assert told.keys() == stats.keys()


def test_recomputation_drops_the_same(monkeypatch):
    """A block that is computed again does not choose again what is dropped: its weights may come out a little differently."""
    config = with_budget(model_config(ROUTERS["sampled"]), 1.2)
    layer, (x, grad, context) = pair(config)[0], inputs(torch.float64)
    expected, _ = results(layer, x, grad, context)
    original, calls, routed = room.largest_within, [], []
    monkeypatch.setattr(room, "largest_within", lambda *arguments: (calls.append(1), original(*arguments))[1])
    layer.router.register_forward_hook(lambda *_: routed.append(1))
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, report = checkpoint(lambda x: layer(x, context, x), x, use_reentrant=False, context_fn=replay_contexts)
    ((y * grad).sum() + report.losses["sparsity"]).backward()
    assert len(routed) == 2 and len(calls) == 2, "routed twice, but routes and probes were chosen once each"
    assert_equal([y.detach(), report.losses["sparsity"].detach(), x.grad, *(p.grad for p in layer.parameters())], expected)


# ---------------------------------------------------------------------------------------------------------------- no waits

WAITS = {
    "base_layers": "solves its assignment on the host",
    "expert_choice_batch": "asks whether ties fit, over all ranks",
}
"""Routers that wait whatever the room."""


class HostCopy(RuntimeError):
    pass


class NoHostData(TorchFunctionMode):
    """Refuses to make tensors of the device from numbers of the host, which is a copy that waits: torch.tensor and its kin, and lists as indices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor", "new_tensor") and isinstance(out, Tensor) and out.device.type != "cpu":
            raise HostCopy(f"{name}: host data")
        if name in ("__getitem__", "__setitem__") and any(isinstance(i, list) for i in tree_leaves(args[1], is_leaf=lambda i: isinstance(i, list))):
            raise HostCopy(f"{name}: a list as index")
        return out


class NoCopies(TorchDispatchMode):
    """Refuses copies between the host and the device, forward and backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        if len(given | made) > 1:
            raise HostCopy(f"{func}: between {given} and {made}")
        return out


def run_without_a_device(name: str, budget: float | None) -> None:
    """Forward and backward as on CUDA in bfloat16 on tensors that have shapes and no data (`meta`): whatever wants to know a number, or a size that
    depends on one, fails."""
    config = with_budget(model_config(ROUTERS[name], hidden=16, expert_dim=8), budget)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            layer = MoELayer(config, 1)
    finally:
        torch.set_default_dtype(default)
    index = torch.arange(T, device="meta")
    context = TokenContext(
        keys=index, valid=index > 0, num_tokens=torch.ones((), device="meta"), tokens=index, tags=index, sequence=5, classes=index, num_classes=2
    )
    x = torch.empty(T, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with pytest.MonkeyPatch.context() as patch, NoHostData(), NoCopies():
        patch.setattr(experts, "_grouped", lambda a, b: True)
        y, report = layer(x, context, x)
        (y.sum() + sum(report.losses.values())).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.experts.parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_waits_for_the_device(name):
    """Also of the statistics. The same layer without room does wait, so the test would see it."""
    with pytest.raises((NotImplementedError, RuntimeError)) if name in WAITS else contextlib.nullcontext():
        run_without_a_device(name, 2.5)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        run_without_a_device("off" if name in WAITS else name, None)


@pytest.mark.parametrize("name", ["exact", "sampled", "off", "topk"])
def test_one_graph(name):
    """torch.compile takes the whole layer, forward and backward, in one graph, and the same graph serves other numbers of routes."""
    if not ops.has_experts(torch.device("cpu"), torch.float32):
        pytest.skip("the loop of products asks for the counts; the fused block needs oneDNN's brgemm")
    torch._dynamo.reset()
    layer = pair(with_budget(model_config(ROUTERS[name]), 2.5))[0].float()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    _, grad, context = inputs(torch.float32)
    run = lambda x: layer(x, context, x)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    loads = []
    first = inputs(torch.float32)[0]
    for x in (first, -first, first.roll(1, 1)):
        found = []
        for forward in (run, compiled):
            layer.zero_grad()
            x = x.detach().requires_grad_()
            y, report = forward(x)
            ((y * grad).sum() + sum(report.losses.values())).backward()
            found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), report.stats["load"]])
        assert_equal(*found)
        loads.append(tuple(found[0][-1].tolist()))
    assert len(graphs) == 1 and len(set(loads)) == 3


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["exact", "sampled", "off", "topk"])
def test_cuda_graph(name, device):
    """Forward and backward captured once and replayed with other inputs, that have other numbers of routes, equal what runs without a graph."""
    torch.manual_seed(0)
    config = with_budget(model_config(ROUTERS[name], num_experts=8, hidden=64, expert_dim=32), 4.0)
    layer = pair(config, scale=0.2)[0].to(device, torch.bfloat16)
    x, grad, context = inputs(torch.bfloat16, dim=64, tokens=96, device=device)
    static = x.clone().requires_grad_()

    def step() -> list[Tensor]:
        y, report = layer(static, context, static)
        loss = (y * grad).sum() + sum(report.losses.values())
        wanted = [static, *(p for p in layer.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True), report.stats["load"]]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    loads = set()
    for seed in range(4):
        with torch.no_grad():
            static.copy_(torch.randn(96, 64, generator=torch.Generator().manual_seed(seed)) * (1 + seed))
        graph.replay()
        replayed = [t.clone() for t in captured]
        for a, b in zip(replayed, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        loads.add(tuple(replayed[-1].tolist()))
    assert len(loads) == 4 or name == "topk"


# ---------------------------------------------------------------------------------------------------------------- training


def test_training_equals_the_loop(data, tmp_path):  # noqa: F811
    """Three steps on one and two ranks, with blocks computed again in backward, against the loop that knows of no room."""
    changes = dict(model__moe__route_budget=8.0, train__activation_checkpointing="block")
    for layout in ((1, 1, 1), (1, 2, 1)):
        routers = ["exact", "sampled", "topk"]
        configs = [make_config(data, router, layout, run_dir=str(tmp_path / f"{layout[1]}{router}"), **changes) for router in routers]
        for router, config, got in zip(routers, configs, start(configs, "mixed")):
            assert_same(got, wanted(config, router, "mixed"), config.train.grad_clip)
            assert all(record["moe"]["no_room"] == [0.0, 0.0] for record in got["records"])


def test_the_trainer_says_what_had_no_room_and_takes_another_budget(data, tmp_path):  # noqa: F811
    """One warning a run, and no alarm of the guard, which counts routes where they are sent and where they arrive; the run may go on with another."""
    config = functools.partial(make_config, data, "exact", (1, 1, 1), run_dir=str(tmp_path / "run"), guard__every=1, guard__action="stop")
    with pytest.warns(UserWarning, match=r"step 1: .*% of the routes of layer [01] had no room in model.moe.route_budget \(2.0\)") as told:
        found = rank_main(config(model__moe__route_budget=2.0), "mixed", steps=2, save=True)
    assert len([w for w in told if "had no room" in str(w.message)]) == 1
    for record in found["records"]:
        assert 0 < min(record["moe"]["no_room"]) and record["moe"]["no_room"] == record["moe"]["dropped"]
        assert max(record["moe"]["active"]) <= 2.1 and record["guard"]["errors"] == 0
    trainer = Trainer(config(model__moe__route_budget=8.0), console=False)
    assert trainer.step == 2
    trainer.close()
