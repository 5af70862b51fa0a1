"""XMoE's router: the threshold's meaning, capacity by the authors' priority, and the controller of the threshold; whole layers are held to a
loop in tests/moe/test_layer.py."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import XMoERouter
from moetrain.moe.routing import TokenContext
from moetrain.moe.target import OFFSETS, offset_to
from tests.moe.routers.test_topk import tokens
from tests.moe.test_layer import compare, model_config, pair


def layer_with(probabilities: list[list[float]], **options):
    """A layer and inputs whose softmax is exactly this."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    layer, _ = pair(model_config(XMoERouter(**options), num_experts=p.shape[1], hidden=p.shape[1]))
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(p.shape[1]))
    return layer, p.log()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(threshold=0.7), [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]),
        (dict(threshold=0.75), [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]),  # 0.4 + 0.3 is below
        (dict(threshold=0.0), [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]),
        (dict(threshold=1.0), [[1, 1, 1, 1]] * 3),
        (dict(threshold=1.0, max_experts=2), [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]),
    ],
)
def test_experts_until_the_threshold(options, wanted):
    layer, x = layer_with([[0.4, 0.31, 0.2, 0.09], [0.25, 0.35, 0.3, 0.1], [0.85, 0.05, 0.05, 0.05]], **options)
    routing = layer.router(x, TokenContext())
    assert routing.decision.active.int().tolist() == wanted
    torch.testing.assert_close(routing.weights.detach(), x.exp() * routing.decision.active, rtol=1e-12, atol=0)
    layer.router.options = layer.router.options.model_copy(update={"normalize": True})
    torch.testing.assert_close(layer.router(x, TokenContext()).weights.sum(-1), torch.ones(3, dtype=torch.float64))


def test_all_scores_equal():
    """The lower experts route, as many as the threshold asks for; t = 1 is all of 256, whatever the sum rounds to."""
    ours, _ = pair(model_config(XMoERouter(threshold=0.55), num_experts=8))
    ours.router.weight.data.zero_()
    assert ours.router(tokens(3), TokenContext()).decision.active.int().tolist() == [[1] * 5 + [0] * 3] * 3
    many, _ = pair(model_config(XMoERouter(threshold=1.0), num_experts=256, expert_dim=1))
    many.float()
    many.router.weight.data *= 20  # later probabilities vanish beside 1
    assert many.router(tokens(20).float(), TokenContext()).decision.active.all()


def test_256_experts_one_expert_and_padding():
    for E in (256, 1):
        for options in (dict(threshold=0.6, capacity_factor=1.5), dict(target_active=1.0, threshold=0.5)):
            ours, loop = pair(model_config(XMoERouter(**options), num_experts=E, expert_dim=2), scale=0.5)
            valid = torch.arange(12) % 5 != 0
            compare(ours, loop, tokens(12), TokenContext(valid=valid, num_tokens=30.0, sequence=6), tokens(12))


def test_capacity_prefers_first_choices_then_probability():
    p = [[0.6, 0.4], [0.45, 0.55], [0.7, 0.3], [0.52, 0.48]]
    layer, x = layer_with(p, threshold=1.0, capacity_factor=1.0)
    decision = layer.router(x, TokenContext()).decision  # room for 2 of 4 tokens at each expert
    # Expert 0: first choices of tokens 0, 2, 3, the likeliest two. Expert 1: first choice of token 1, then token 3's second of 0.48.
    assert decision.active.int().tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]] and decision.dropped == 4
    assert layer.eval().router(x, TokenContext()).decision.active.all()


def test_no_token_has_a_label():
    ours, _ = pair(model_config(XMoERouter(target_active=2.0, normalize=True, capacity_factor=1.0)))
    x = tokens(6).requires_grad_()
    y, report = ours(x, TokenContext(valid=torch.zeros(6, dtype=torch.bool), num_tokens=5.0, sequence=3), x)
    (y.sum() + report.losses["balance"]).backward()
    assert not y.any() and report.losses["balance"] == 0 and x.grad.isfinite().all()
    assert list(ours.router.after_step(torch.zeros(5), {k: v.reshape(-1) for k, v in report.sums.items()})) == []


# ------------------------------------------------------------------------------------------------------------------- the target


def test_counts_at_the_offsets_are_what_the_routes_would_be():
    ours, _ = pair(model_config(XMoERouter(target_active=3.0, max_experts=4), num_experts=8))
    x, valid = tokens(50), torch.arange(50) % 7 != 0
    sums = ours.router(x, TokenContext(valid=valid)).sums
    assert sums["tokens"] == valid.sum()
    start = ours.router.threshold.data.clone()
    for i, offset in enumerate(OFFSETS):
        ours.router.threshold.data = start + offset
        assert sums["routes"][i] == ours.router(x, TokenContext(valid=valid)).decision.active.sum()


def test_offset_to():
    line = [2.0 + offset for offset in OFFSETS]
    for target in (2.0, 2.002, 2.05, 1.2, 4.9, -0.9):
        assert offset_to(line, target) == pytest.approx(target - 2, abs=1e-12)
    assert offset_to(line, 9.0) == 3.0 and offset_to(line, -9.0) == -3.0
    stairs = [2.0] * OFFSETS.index(0.1) + [3.0] * (len(OFFSETS) - OFFSETS.index(0.1))
    assert offset_to(stairs, 2.0) == 0.0 and offset_to(stairs, 3.0) == pytest.approx(0.1) and 0.03 < offset_to(stairs, 2.5) < 0.1
    assert offset_to(stairs, 1.9) == -3.0


@pytest.mark.parametrize(("target", "scale"), [(2.4, 1.0), (1.0, 1.0), (8.0, 0.5), (3.0, 0.02), (2.5, 0.02)])
def test_the_threshold_finds_the_target(target, scale):
    """Tokens drawn anew in each of 60 steps, from a softmax far from uniform to one so near to it that routes come in steps of one for all
    tokens: over the last 30 steps the mean is within 2 %."""
    ours, _ = pair(model_config(XMoERouter(target_active=target), num_experts=8), scale=scale)
    ours.router.threshold.data.fill_(2.2)
    means = []
    for step in range(60):
        routing = ours.router(tokens(400, seed=step), TokenContext())
        means.append(routing.decision.active.sum().item() / 400)
        sums = {k: v.reshape(-1) for k, v in routing.sums.items()}
        for name, change in ours.router.after_step(routing.decision.active.sum(0).double(), sums):
            getattr(ours.router, name).data += change
    assert sum(means[30:]) / 30 == pytest.approx(target, rel=0.02), means


def test_evaluation_uses_the_threshold_and_moves_nothing():
    ours, _ = pair(model_config(XMoERouter(target_active=2.0)))
    x = tokens(9)
    y = ours(x, TokenContext(), x)[0]
    ours.eval()
    assert torch.equal(ours(x, TokenContext(), x)[0], y) and ours.router(x, TokenContext()).sums == {}
    # One token by itself has the routes that it has among the others.
    assert torch.equal(ours.router(x[4:5], TokenContext()).decision.active[0], ours.router(x, TokenContext()).decision.active[4])
