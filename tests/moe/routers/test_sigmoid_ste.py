"""DSMoE's router against the paper's equations, and the sampled estimator against the exact one."""

from __future__ import annotations

import math

import torch

from moetrain.config import SigmoidSteRouter
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import changes_after_step
from moetrain.moe.routing import TokenContext
from moetrain.moe.target import OFFSETS, RATE
from tests.moe.test_layer import model_config, pair


def layer_and_input(router: SigmoidSteRouter, tokens: int = 13):
    ours, _ = pair(model_config(router), seed=3)
    x = torch.randn(tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    grad = torch.randn(tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return ours, x, grad


def test_gradients_are_equations_12_to_16():
    """Each gradient written out by hand, with matrices named as in the paper: W, U (d x f), V (f x d), Y (d x n)."""
    ours, h, grad = layer_and_input(SigmoidSteRouter())
    hs = h.clone().requires_grad_()
    (ours(hs, TokenContext(), hs)[0] * grad).sum().backward()

    Y = ours.router.weight.detach().T
    g = torch.sigmoid(h @ Y)
    fired = (g > 0.5).double()
    scale = 5 / fired.sum(-1, keepdim=True).clamp(min=1)  # Eq. 8, a constant
    dh, dY = torch.zeros_like(h), torch.zeros_like(Y)
    for i in range(5):
        W, U = (m.T for m in ours.experts.gate_up[i].detach().chunk(2))
        V = ours.experts.down[i].detach().T
        p, u = h @ W, h @ U
        s = torch.sigmoid(p)
        a, da = p * s, s * (1 + p * (1 - s))  # act = silu, and its derivative
        o = (a * u) @ V
        upstream = grad * scale
        weight = (g * fired)[:, i, None]
        dV = (a * u).T @ (upstream * weight)
        inner = (upstream * weight) @ V.T
        dW, dU = h.T @ (inner * u * da), h.T @ (inner * a)
        got_W, got_U = (m.T for m in ours.experts.gate_up.grad[i].chunk(2))
        torch.testing.assert_close(ours.experts.down.grad[i].T, dV, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_W, dW, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_U, dU, rtol=1e-12, atol=1e-12)
        product = (upstream * o).sum(-1) * g[:, i] * (1 - g[:, i])  # Eq. 16, for every i, fired or not
        dY[:, i] = h.T @ product
        dh += (inner * u * da) @ W.T + (inner * a) @ U.T + product[:, None] * Y[:, i]
    torch.testing.assert_close(ours.router.weight.grad.T, dY, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hs.grad, dh, rtol=1e-12, atol=1e-12)
    assert 0.1 < fired.mean() < 0.9, "the case must have both kinds of gates"


def test_expert_that_never_fires_teaches_the_router_but_learns_nothing():
    ours, x, grad = layer_and_input(SigmoidSteRouter())
    with torch.no_grad():
        x[:, 0] = x[:, 0].abs() + 1
        ours.router.weight[2] = 0
        ours.router.weight[2, 0] = -1
    (ours(x, TokenContext(), x)[0] * grad).sum().backward()
    assert ours.router.weight.grad[2].abs().max() > 1e-3
    assert not ours.experts.gate_up.grad[2].any() and not ours.experts.down.grad[2].any()


def router_gradient(ours: MoELayer, x: torch.Tensor, grad: torch.Tensor, draw: int) -> torch.Tensor:
    ours.zero_grad()
    (ours(x, TokenContext(keys=torch.arange(len(x)) + 1000 * draw), x)[0] * grad).sum().backward()
    return ours.router.weight.grad.clone()


def test_sampled_estimator_is_unbiased():
    """Over 400 draws the mean router gradient lies within 4 of its standard errors of the exact one in every component (mean square under 2;
    components are correlated). Importance 1/q is what makes it so: with importance 1 the mean is more than 8 errors off."""
    exact, x, grad = layer_and_input(SigmoidSteRouter())
    sampled, _, _ = layer_and_input(SigmoidSteRouter(ste="sampled", probe_rate=0.25))
    want = router_gradient(exact, x, grad, 0)
    draws = torch.stack([router_gradient(sampled, x, grad, i) for i in range(400)])
    mean, error = draws.mean(0), draws.std(0) / 20
    z = ((mean - want) / error)[error > 0]
    assert z.numel() > 30 and z.abs().max() < 4 and z.square().mean() < 2, z
    off, _, _ = layer_and_input(SigmoidSteRouter(ste="off"))
    biased = router_gradient(off, x, grad, 0)
    wrong = (0.25 * (draws - biased)).mean(0) + biased
    assert (((wrong - want) / error)[error > 0]).abs().max() > 8


def test_gates_at_the_threshold_stay_closed():
    """Eq. 7 is strict: a router of zeros opens nothing."""
    ours, x, _ = layer_and_input(SigmoidSteRouter())
    with torch.no_grad():
        ours.router.weight.zero_()
    y, report = ours(x, TokenContext(), x)
    assert not y.any() and report.stats["empty"] == len(x)


def test_evaluation_has_no_probes_and_the_same_output():
    ours, x, _ = layer_and_input(SigmoidSteRouter())
    y, report = ours(x, TokenContext(), x)
    assert report.stats["probes"] > 0
    ours.eval()
    y_eval, report_eval = ours(x, TokenContext(), x)
    assert report_eval.stats["probes"] == 0 and torch.equal(y, y_eval)
    plain, _, _ = layer_and_input(SigmoidSteRouter(rescale_in_eval=False))
    assert not torch.equal(plain.eval()(x, TokenContext(), x)[0], y)


def test_the_moved_threshold():
    """What is counted at it and at the options' own, which gates the sparsity loss presses, and that evaluation keeps it."""
    router = SigmoidSteRouter(target_active=2.0, threshold=0.4)
    _, x, _ = layer_and_input(SigmoidSteRouter(), 50)
    ours = MoELayer(model_config(router), 1).double()
    ours.router.weight.data = torch.randn(ours.router.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    ours.router.threshold.data.fill_(0.3)  # log-odds
    gates = torch.sigmoid(x @ ours.router.weight.T)
    valid = torch.arange(50) % 7 != 0
    routing = ours.router(x, TokenContext(valid=valid))
    assert torch.equal(routing.decision.active, (gates > 1 / (1 + math.exp(-0.3))) & valid[:, None])
    nominal = (gates > 0.4) & valid[:, None]
    assert routing.sums["tokens"] == valid.sum() and routing.sums["nominal"] == nominal.sum() > routing.decision.active.sum()
    torch.testing.assert_close(routing.losses["sparsity"], (gates * nominal).sum() / (valid.sum() * gates.shape[1] * ours.router.num_layers))
    for i, offset in enumerate(OFFSETS):
        ours.router.threshold.data.fill_(0.3 + offset)
        assert routing.sums["routes"][i] == ours.router(x, TokenContext(valid=valid)).decision.active.sum()
    ours.eval()
    quiet = ours.router(x, TokenContext(valid=valid))
    assert quiet.sums == {} and torch.equal(quiet.decision.active, (gates > torch.sigmoid(ours.router.threshold)) & valid[:, None])


def test_thresholds_move_together_for_a_target_of_the_model():
    """By the mean over layers, so that layers keep means of their own; with `target_over: layer` each by its own. Routes fall by 10 in a step."""
    here = [30.0, 10.0]  # routes of 10 tokens where the thresholds are; the target is 20
    sums = [{"routes": [n - 10.0 * i for i in range(-7, 8)], "nominal": [n], "tokens": [10.0]} for n in here]
    moves = {}
    for over in ("model", "layer"):
        config = model_config(SigmoidSteRouter(target_active=2.0, target_over=over))
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"ffn": MoELayer(config, i)}) for i in range(2))
        moves[over] = {name: change.item() for name, change in changes_after_step(model, [[1.0] * config.moe.num_experts] * 2, sums)}
    names = [f"layers.{i}.ffn.router.threshold" for i in range(2)]
    assert moves["model"] == dict.fromkeys(names, 0.0)
    assert moves["layer"] == dict(zip(names, (RATE * OFFSETS[8], RATE * OFFSETS[6])))
