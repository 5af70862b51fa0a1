"""The budget router against loops in float64: which pairs of a sequence route, their weights and gradients, the cut that evaluation uses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moetrain.config import BudgetRouter
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import TokenContext
from tests.moe.test_layer import model_config


def layer_of(experts: int = 5, seed: int = 0, **options) -> MoELayer:
    layer = MoELayer(model_config(BudgetRouter(**options), num_experts=experts), 1).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        layer.router.cut.zero_()
    return layer


def tokens(number: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(number, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chosen_by_hand(logits: list[list[float]], valid: list[bool], length: int, target: float) -> tuple[set[tuple[int, int]], list[float]]:
    """The pairs that route, and the cut of each sequence that has one."""
    routes, cuts = set(), []
    for start in range(0, len(logits), length):
        inside = [t for t in range(start, start + length) if valid[t]]
        pairs = sorted(((t, e) for t in inside for e in range(len(logits[0]))), key=lambda p: (-logits[p[0]][p[1]], p))
        budget = math.floor(len(inside) * min(target, len(logits[0])) + 0.5)
        routes |= set(pairs[:budget])
        if 0 < budget < len(pairs):
            (t, e), (u, f) = pairs[budget - 1 : budget + 1]
            cuts.append((logits[t][e] + logits[u][f]) / 2)
    return routes, cuts


def by_hand(layer: MoELayer, x: torch.Tensor, routes: set[tuple[int, int]]) -> torch.Tensor:
    logits, outputs = x @ layer.router.weight.T, []
    gate_up, down, scale = layer.experts.gate_up, layer.experts.down, layer.router.options.output_scale
    for t in range(len(x)):
        own = [e for e in range(logits.shape[1]) if (t, e) in routes]
        y = torch.zeros(8, dtype=torch.float64)
        for e in own:
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            others = own if layer.router.options.normalize else range(logits.shape[1])
            weight = torch.exp(logits[t, e]) / sum(torch.exp(logits[t, o]) for o in others)
            y = y + scale * weight * (down[e] @ (F.silu(gate) * up))
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("target", [0.3, 1.0, 2.5, 5.0])
@pytest.mark.parametrize("length", [5, 15])
@pytest.mark.parametrize(("normalize", "rank_by"), [(False, "probability"), (True, "logit"), (True, "probability")])
def test_matches_the_loop(target, length, normalize, rank_by):
    layer, x = layer_of(target_active=target, normalize=normalize, rank_by=rank_by, output_scale=1.7, balance_coef=0.1, z_coef=0.1), tokens(15)
    valid = torch.ones(15, dtype=torch.bool)
    valid[[3, 5, 6, 7, 8, 9]] = False  # the second of three sequences is all padding
    context = TokenContext(valid=valid, num_tokens=20.0, sequence=length)
    results = []
    for ours in (True, False):
        h = x.clone().requires_grad_()
        logits = h @ layer.router.weight.T
        ranking = (logits if rank_by == "logit" else logits.softmax(-1)).float()
        routes, cuts = chosen_by_hand(ranking.tolist(), valid.tolist(), length, target)
        if ours:
            y, report = layer(h, context, h)
            losses = report.losses
            found = layer.router(h, context).decision.active.nonzero().tolist()
            assert {tuple(p) for p in found} == routes and report.stats["load"].sum() == len(routes)
            torch.testing.assert_close(report.sums["cuts"], torch.tensor([sum(cuts), len(cuts)], dtype=torch.float64))
        else:
            y = by_hand(layer, h, routes)
            real = [t for t in range(15) if valid[t]]
            f = torch.tensor([sum(r[1] == e for r in routes) / max(1, len(routes)) for e in range(5)], dtype=torch.float64)
            P = sum(torch.exp(logits[t]) / torch.exp(logits[t]).sum() for t in real) / 20
            losses = {"balance": 5 * (f * P).sum(), "z": sum(torch.exp(logits[t]).sum().log() ** 2 for t in real) / 20}
        (y * torch.arange(8)).sum().add(losses["balance"] + 3 * losses["z"]).backward()
        results.append((y, losses["balance"], losses["z"], h.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
        layer.zero_grad()
    for got, want in zip(*results):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-11, atol=1e-11)


def test_the_budget_is_held_and_spent_unevenly():
    layer, x = layer_of(experts=8, target_active=3.0), tokens(64)
    counts = layer.router(x, TokenContext(sequence=16)).decision.active.view(4, 16, 8).sum(-1)
    assert counts.sum(-1).tolist() == [48] * 4 and counts.float().std() > 1


def test_evaluation_uses_the_mean_cut_of_training():
    layer, x = layer_of(experts=8, target_active=3.0, cut_rate=0.25), tokens(64)
    context = TokenContext(sequence=16)
    untrained = layer.eval().router(x, context).decision.active
    assert torch.equal(untrained, layer.train().router(x, context).decision.active)  # nothing is known yet: as in training
    seen = []
    for step in range(3):
        routing = layer.router(tokens(64, seed=step), context)
        seen.append((routing.sums["cuts"][0] / routing.sums["cuts"][1]).item())
        for name, change in layer.router.after_step(routing.decision.active.sum(0).double(), routing.sums):
            getattr(layer.router, name).data.add_(change)
    weights = [0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    cut = sum(w * c for w, c in zip(weights, seen)) / sum(weights)
    layer.eval()
    active = layer.router(x, context).decision.active
    assert torch.equal(active, (x @ layer.router.weight.T).softmax(-1).float() > cut)
    # It looks at no other token: one at a time gives the same.
    assert torch.equal(active, torch.cat([layer.router(row[None], TokenContext()).decision.active for row in x]))


def test_awkward_inputs():
    layer = layer_of(target_active=2.0)
    for length in (0, 1):  # no token; one token, whose sequence is itself
        routing = layer.router(tokens(length), TokenContext())
        assert routing.weights.shape == (length, 5) and routing.decision.active.sum() == 2 * length
    # All logits equal: the first tokens take all experts, the budget still holds, gradients are finite.
    layer.router.weight.data.zero_()
    x = tokens(10).requires_grad_()
    y, report = layer(x, TokenContext(), x)
    assert report.stats["load"].sum() == 20 and report.stats["empty"] == 6 and not y[4:].any()
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad) and torch.isfinite(x.grad).all()
    one = layer_of(experts=1, target_active=0.5)
    assert one.router(tokens(10), TokenContext()).decision.active.sum() == 5
    many = layer_of(experts=256, target_active=8.0)
    assert many.router(tokens(10), TokenContext()).decision.active.sum() == 80
    padding = layer.router(tokens(4), TokenContext(valid=torch.zeros(4, dtype=torch.bool)))
    assert not padding.decision.active.any() and padding.sums["cuts"].tolist() == [0, 0]
    assert not list(layer.router.after_step(torch.zeros(5), padding.sums))
