"""ReMoE's router: the paper's loss written out, its gradients, awkward inputs; whole layers are held to a loop in tests/moe/test_layer.py."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import ReMoERouter
from moetrain.moe.losses import build_controller, coefficients
from moetrain.moe.routing import TokenContext
from tests.moe.routers.test_topk import tokens
from tests.moe.test_layer import compare, model_config, pair


def test_loss_and_gradient_written_out():
    """L_reg,lb = 1 / (L T) sum_t,e f_e R_te with f_e = E / (k T) #{t: R_te > 0}: matrices instead of the layer's ways; dW by hand."""
    ours, _ = pair(model_config(ReMoERouter(target_active=1.5), num_experts=8))
    x = tokens(30)
    routing = ours.router(x, TokenContext())
    W = ours.router.weight.detach()
    R = torch.clamp(x @ W.T, min=0)
    f = 8 / (1.5 * 30) * (R > 0).double().sum(0)
    torch.testing.assert_close(routing.weights.detach(), R, rtol=1e-13, atol=0)
    torch.testing.assert_close(routing.losses["sparsity"].detach(), (f * R).sum() / 30 / 3, rtol=1e-12, atol=0)
    routing.losses["sparsity"].backward()
    torch.testing.assert_close(ours.router.weight.grad, (f * (R > 0)).T @ x / 30 / 3, rtol=1e-12, atol=1e-14)


def test_load_weighting_pushes_loaded_experts_more():
    x = tokens(200)
    x[:, 0] = 1
    weighted, _ = pair(model_config(ReMoERouter(), num_experts=4), scale=0.3)
    plain, _ = pair(model_config(ReMoERouter(load_weighted=False), num_experts=4), scale=0.3)
    slopes = []
    for layer in (weighted, plain):
        with torch.no_grad():
            layer.router.weight[:, 0] = torch.tensor([1.0, 0.3, -0.3, -1.0])
        routing = layer.router(x, TokenContext())
        (grad,) = torch.autograd.grad(routing.losses["sparsity"], routing.weights)
        slopes.append(grad[0])
    load = (routing.weights > 0).sum(0)
    assert (load.diff() < 0).all()
    torch.testing.assert_close(slopes[0] / slopes[1], 4 * load / load.sum(), check_dtype=False)


def test_256_experts_one_expert_and_padding():
    for E in (256, 1):
        ours, loop = pair(model_config(ReMoERouter(target_active=1.0), num_experts=E, expert_dim=2), scale=0.5)
        valid = torch.arange(12) % 5 != 0
        compare(ours, loop, tokens(12), TokenContext(valid=valid, num_tokens=30.0), tokens(12))


def test_a_token_without_an_open_gate_has_output_0():
    """All scores negative, and all scores equal to 0 (a ReLU routes above 0 only): no route, output and gradients 0."""
    for value in (-1.0, 0.0):
        ours, _ = pair(model_config(ReMoERouter(target_active=2.0)))
        with torch.no_grad():
            ours.router.weight.fill_(0)
            ours.router.weight[:, 0] = value
        x = tokens(5)
        x[:, 0] = 1
        y, report = ours(x, TokenContext(), x)
        (y.sum() + report.losses["sparsity"]).backward()
        assert not y.any() and report.stats["empty"] == 5 and not ours.router.weight.grad.any()


def test_padding_alone_and_evaluation():
    ours, _ = pair(model_config(ReMoERouter(target_active=2.0)))
    x = tokens(6)
    _, report = ours(x, TokenContext(valid=torch.zeros(6, dtype=torch.bool), num_tokens=4.0), x)
    assert report.losses["sparsity"] == 0 and report.stats["load"].sum() == 0
    assert torch.equal(ours(x, TokenContext(), x)[0], ours.eval()(x, TokenContext(), x)[0])


def test_it_brings_its_controller():
    """The paper's start and factor are the defaults."""
    config = model_config(ReMoERouter(target_active=2.0))
    controller = build_controller(config)
    assert controller is not None and controller.coefficients == [1e-8] and controller.factor == 1.2
    controller.update([5.0] * 3)
    assert coefficients(config, controller) == {"sparsity": [pytest.approx(1.2e-8)] * 3}
