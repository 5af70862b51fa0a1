"""DynMoE's router: gates and their straight-through gradient by hand, losses, slots that come and go; whole layers are held to a loop in
tests/moe/test_layer.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moetrain.config import DynMoERouter
from moetrain.model import initial_tensor
from moetrain.moe.routing import TokenContext
from tests.moe.routers.test_topk import tokens
from tests.moe.test_layer import compare, model_config, pair


def build(experts: int = 5, mask: list[int] | None = None, **options: Any):
    layer, loop = pair(model_config(DynMoERouter(**options), num_experts=experts))
    if layer.router.options.adapt_every is not None:
        for one in (layer, loop):
            for name in ("used", "unrouted", "clock"):
                getattr(one.router, name).data.zero_()
            one.router.mask.data = torch.ones(experts).double() if mask is None else torch.tensor(mask).double()
    for one in (layer, loop):
        one.router.threshold.data = torch.linspace(0.1, 0.5, experts, dtype=torch.float64)  # some tokens have no expert
    return layer, loop


def test_gates_and_gradient_by_hand():
    """w = [s > t] / k; dw_e = d(s_e - t_e) / k where the gate is open, 0 where it is closed."""
    layer, _ = build()
    x, upstream = tokens(40), tokens(40, 5, seed=2)
    W, G = layer.router.weight.detach(), layer.router.threshold.detach()
    cosine = (x / x.norm(dim=1, keepdim=True)) @ (W / W.norm(dim=1, keepdim=True)).T
    s, t = torch.sigmoid(cosine), torch.sigmoid(G)
    open_ = (s > t).double()
    k = open_.sum(1, keepdim=True).clamp(min=1)
    weights = layer.router(x, TokenContext()).weights
    torch.testing.assert_close(weights.detach(), open_ / k, rtol=1e-12, atol=0)
    (weights * upstream).sum().backward()
    torch.testing.assert_close(layer.router.threshold.grad, -(upstream * open_ / k).sum(0) * t * (1 - t), rtol=1e-11, atol=1e-14)
    ds = upstream * open_ / k * s * (1 - s)
    rows = torch.zeros_like(W)
    for e in range(5):
        unit = W[e] / W[e].norm()
        along = (ds[:, e, None] * x / x.norm(dim=1, keepdim=True)).sum(0)
        rows[e] = (along - unit * (unit @ along)) / W[e].norm()  # derivative of a cosine
    torch.testing.assert_close(layer.router.weight.grad, rows, rtol=1e-10, atol=1e-13)
    assert 0.1 < open_.mean() < 0.9 and (open_.sum(1) == 0).any(), "the case must have tokens without an expert"


def test_losses_written_out():
    """The code's four terms over the experts that exist."""
    layer, _ = build(6, [1, 0, 1, 1, 1, 0], adapt_every=9)
    x = tokens(50)
    routing = layer.router(x, TokenContext())
    active = routing.decision.active.double()
    assert not active[:, [1, 5]].any()
    kept = active[active.sum(1) > 0]
    shares = kept / kept.sum(1, keepdim=True)
    W = layer.router.weight.detach()[[0, 2, 3, 4]]
    unit = W / W.norm(dim=1, keepdim=True)
    wanted = {
        "balance": 36 * (shares.mean(0) * kept.mean(0)).mean(),
        "efficiency": active.mean(),
        "orthogonality": (unit @ unit.T - torch.eye(4)).norm(),
        "norm": W.norm(dim=1).mean(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(routing.losses[name].detach(), value, rtol=1e-12, atol=0)
    # Of no token's: a rank with a fifth of the step's tokens has a fifth.
    part = layer.router(x, TokenContext(num_tokens=250.0)).losses
    torch.testing.assert_close(part["norm"], routing.losses["norm"] / 5)
    torch.testing.assert_close(part["orthogonality"], routing.losses["orthogonality"] / 5)


def test_evaluation_takes_the_best_where_training_takes_none():
    layer, loop = build(6, [1, 1, 0, 1, 1, 1], adapt_every=5)
    for one in (layer, loop):
        one.router.threshold.data.fill_(3.0)  # above every sigmoid of a cosine
    x = tokens(8)
    y, report = layer(x, TokenContext(), x)
    assert not y.any() and report.stats["empty"] == 8
    layer.eval(), loop.eval()
    _, report = layer(x, TokenContext(), x)
    assert report.stats["load"].sum() == 8 and report.stats["load"][2] == 0
    compare(layer, loop, x, TokenContext(), x)


def test_awkward_inputs():
    valid = torch.arange(12) % 5 != 0
    layer, loop = build(256)
    compare(layer, loop, tokens(12), TokenContext(valid=valid, num_tokens=30.0), tokens(12))
    # The cosines of one expert less the unit matrix are 0, where a norm has no derivative.
    layer, _ = build(1)
    y, report = layer(tokens(12), TokenContext(valid=valid), tokens(12))
    (y.sum() + sum(report.losses.values())).backward()
    assert layer.router.weight.grad.isfinite().all() and report.losses["orthogonality"] < 1e-12
    layer, _ = build()
    layer.router.threshold.data.zero_()
    layer.router.weight.data[:] = 0
    layer.router.weight.data[:, 0] = 1
    x = tokens(4)
    x[:, 0] = 0  # cosines 0 and thresholds 0: equal, and a gate wants more
    assert not layer.router(x, TokenContext()).decision.active.any()
    y, report = layer(x, TokenContext(valid=torch.zeros(4, dtype=torch.bool), num_tokens=3.0), x)
    (y.sum() + sum(report.losses.values())).backward()
    assert not y.any() and not any(report.losses.values()) and layer.router.weight.grad.isfinite().all()


def test_start_values():
    config = model_config(DynMoERouter(adapt_every=4, start_experts=3))
    rows = initial_tensor("layers.0.ffn.router.weight", (5, 8), config, 0)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=1e-6, rtol=0)
    assert initial_tensor("layers.0.ffn.router.mask", (5,), config, 0).tolist() == [1, 1, 1, 0, 0]
    assert not initial_tensor("layers.0.ffn.router.clock", (1,), config, 0).any()


# ------------------------------------------------------------------------------------------------------- experts come and go


def step(layer, load: list[float], unrouted: list[float]) -> dict[str, torch.Tensor]:
    """One step's changes, added."""
    found = {}
    for name, change in layer.router.after_step(torch.tensor(load, dtype=torch.float64), {"unrouted": torch.tensor(unrouted, dtype=torch.float64)}):
        assert name not in found
        found[name] = change
        getattr(layer.router, name).data += change
    return found


def test_slots_are_freed_and_used_anew():
    layer, _ = build(5, [1, 1, 1, 0, 0], adapt_every=4, record_steps=2)
    before = layer.router.weight.detach().clone()
    lost = [3.0, 0, 0, 0, 0, 0, 0, 4.0]
    step(layer, [9, 9, 9, 0, 0], lost)  # not recorded
    step(layer, [9, 9, 9, 0, 0], lost)
    assert not layer.router.used.any() and not layer.router.unrouted.any() and layer.router.clock == 2
    step(layer, [5, 0, 0, 0, 0], lost)
    assert layer.router.used.tolist() == [5, 0, 0, 0, 0] and layer.router.unrouted[7] == 4
    step(layer, [5, 0, 2, 0, 0], lost)
    # Expert 1 was not used; its slot is the first free one, and takes what nobody wanted: (6, ..., 8) of norm 10.
    assert layer.router.mask.tolist() == [1, 1, 1, 0, 0] and layer.router.threshold[1] == 0
    torch.testing.assert_close(layer.router.weight[1], torch.tensor([0.6, 0, 0, 0, 0, 0, 0, 0.8], dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert torch.equal(layer.router.weight[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    assert not layer.router.used.any() and not layer.router.unrouted.any() and layer.router.clock == 4
    # The next period: the new expert is not used, every input has an expert: there is one less.
    for load in ([9, 9, 9, 9, 9], [9, 9, 9, 9, 9], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]):
        step(layer, load, [0.0] * 8)
    assert layer.router.mask.tolist() == [1, 0, 1, 0, 0]


def test_nothing_is_added_without_a_free_slot_and_nothing_removed_when_nothing_was_used():
    layer, _ = build(3, adapt_every=1)
    changes = step(layer, [1, 1, 1], [1.0] * 8)
    assert layer.router.mask.all() and "weight" not in changes
    step(layer, [0, 0, 0], [1.0] * 8)
    assert layer.router.mask.all()


def test_unrouted_inputs_are_added_up():
    layer, _ = build(5, adapt_every=2)
    x, valid = tokens(40), torch.arange(40) % 3 != 0
    routing = layer.router(x, TokenContext(valid=valid))
    lost = x[valid & ~routing.decision.active.any(1)]
    assert len(lost) > 2
    torch.testing.assert_close(routing.sums["unrouted"], lost.sum(0), rtol=1e-12, atol=1e-12)
    assert build(5)[0].router(x, TokenContext()).sums == {}


def test_without_adaptation_there_is_no_state():
    layer, _ = build(5)
    assert [n for n, _ in layer.router.named_parameters()] == ["weight", "threshold"]
    assert list(layer.router.after_step(torch.zeros(5), {})) == []
    with pytest.raises(AttributeError):
        layer.router.mask  # noqa: B018
