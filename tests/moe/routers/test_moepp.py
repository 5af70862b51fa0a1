"""MoE++'s router and its zero-cost experts: written out, the gating residual, capacity; whole layers are held to a loop in
tests/moe/test_layer.py."""

from __future__ import annotations

import math

import torch

from moetrain.config import ModelConfig, MoEConfig, MoEppRouter
from moetrain.model import Transformer, init_weights
from moetrain.moe.routing import TokenContext
from tests.moe.routers.test_topk import tokens
from tests.moe.test_layer import compare, model_config, pair


def test_light_experts_written_out():
    """Logits planted so that each token takes one kind of expert: its output is p 0, p x, p (a1 x + a2 v), or the FFN's."""
    layer, _ = pair(model_config(MoEppRouter(top_k=1, num_zero=1, num_copy=1, num_constant=1, capacity_factor=None), num_experts=2))
    x = torch.cat([tokens(5, 3), torch.eye(5, dtype=torch.float64) * 9], 1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 3:] = torch.eye(5)
    y, report = layer(x, TokenContext(), x)
    p = math.exp(9) / (math.exp(9) + 4)
    a = torch.softmax(layer.router.mix[0] @ x[4], 0)
    assert not y[2].any()
    torch.testing.assert_close(y[3], p * x[3])
    torch.testing.assert_close(y[4], p * (a[0] * x[4] + a[1] * layer.router.constant[0]))
    assert report.stats["load"].tolist() == [1, 1] and report.stats["empty"] == 3 and y[:2].abs().sum() > 0


def test_balance_written_out():
    """sum eta f P as printed: no factor of the number of experts."""
    layer, _ = pair(model_config(MoEppRouter(tau=0.6, capacity_factor=0.5), num_experts=3))
    x = tokens(30)
    routing = layer.router(x, TokenContext(sequence=10))
    p = torch.softmax(x @ layer.router.weight.detach().T, -1)
    f = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1).mean(0)
    eta = torch.tensor([1.0] * 3 + [0.6] * 4, dtype=torch.float64)
    torch.testing.assert_close(routing.losses["balance"].detach(), (eta * f * p.mean(0)).sum(), rtol=1e-12, atol=0)
    assert routing.decision.dropped > 0


def test_gating_residual():
    """Logits get those of the layer before through W_g, with gradient into it and into W_g; against the loop, on a layer with a past."""
    ours, loop = pair(model_config(MoEppRouter()))
    x, past, grads = tokens(12), tokens(12, 9, seed=3), []
    compare(ours, loop, x, TokenContext(previous=past, sequence=6), x)
    for layer in (ours, loop):
        previous = past.clone().requires_grad_()
        y, report = layer(x, TokenContext(previous=previous, sequence=6), x)
        (y.square().sum() + report.losses["balance"]).backward()
        grads.append((previous.grad, layer.router.residual.grad))
    for mine, theirs in zip(*grads):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    scores = ours.router(x, TokenContext(previous=past)).scores
    torch.testing.assert_close(scores, x @ ours.router.weight.T + past @ ours.router.residual.T, rtol=1e-12, atol=1e-12)


def test_layers_hand_their_logits_on():
    """In a model, the second layer routes by the first one's logits: with W_g of the second layer at 0 its routes change."""
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, init_std=0.5,
        moe=MoEConfig(num_experts=4, expert_dim=6, router=MoEppRouter(init_std=1.0)),
    )  # fmt: skip
    model = Transformer(config).double()
    init_weights(model, 0)
    text = torch.arange(40).view(2, 20) % 11
    before = model(text)
    (before.logits.square().sum()).backward()
    assert model.layers[1].ffn.router.residual.grad.any() and not model.layers[0].ffn.router.residual.grad.any()
    model.layers[1].ffn.router.residual.data.zero_()
    after = model(text)
    assert torch.equal(before.reports[0].stats["load"], after.reports[0].stats["load"])
    assert not torch.equal(before.reports[1].scores, after.reports[1].scores)


def test_awkward_inputs():
    for E in (256, 1):
        ours, loop = pair(model_config(MoEppRouter(capacity_factor=0.9), num_experts=E, expert_dim=2), scale=0.5)
        valid = torch.arange(12) % 5 != 0
        compare(ours, loop, tokens(12), TokenContext(valid=valid, num_tokens=30.0, sequence=6), tokens(12))
    # All scores equal: the lower experts, which are FFNs; of each sequence of 6 as many as there is room for.
    ours, loop = pair(model_config(MoEppRouter(), num_experts=4))
    for layer in (ours, loop):
        layer.router.weight.data.zero_()
    compare(ours, loop, tokens(12), TokenContext(sequence=6), tokens(12))
    room = math.ceil(1.1 * 2 * 6 * 0.75 / (0.75 * 4 + 4))
    assert ours.router(tokens(12), TokenContext(sequence=6)).decision.active.sum(0).tolist() == [2 * room, 2 * room, 0, 0]
    # Padding alone; and both choices on zero experts with normalised weights, which is 0 / 0 avoided.
    x = tokens(6).requires_grad_()
    y, report = ours(x, TokenContext(valid=torch.zeros(6, dtype=torch.bool), num_tokens=5.0, sequence=3), x)
    (y.sum() + report.losses["balance"]).backward()
    assert not y.any() and report.losses["balance"] == 0 and x.grad.isfinite().all()
    zeros, _ = pair(model_config(MoEppRouter(num_zero=2, normalize=True), num_experts=2))
    zeros.router.weight.data[:, 0] = torch.tensor([0, 0, 99, 98, 0, 0, 0.0])
    x = torch.cat([torch.ones(6, 1), tokens(6, 7)], 1).requires_grad_()
    y, _ = zeros(x, TokenContext(), x)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


def test_capacity_acts_in_training_alone():
    layer, _ = pair(model_config(MoEppRouter(capacity_factor=0.3)))
    x = tokens(30)
    assert (layer.router(x, TokenContext()).decision.dropped > 0) and layer.eval().router(x, TokenContext()).decision.dropped is None
