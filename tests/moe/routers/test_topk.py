"""The top-k family against formulas written out, on awkward inputs, and its randomness; the loop in reference_topk.py covers whole layers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moetrain.config import TopKRouter
from moetrain.moe.balance import smooth_load, squared_variations
from moetrain.moe.capacity import within_capacity, within_groups
from moetrain.moe.losses import coefficients
from moetrain.moe.routers import changes_after_step
from moetrain.moe.routing import StepCounts, TokenContext, normal
from tests.moe.test_layer import compare, model_config, pair

FAMILY = {
    "switch": dict(top_k=1, normalize=False, jitter=0.01, capacity_factor=1.25),
    "gshard": dict(top_k=2, second="random", capacity_factor=2.0, balance_count="first"),
    "llama_moe": dict(top_k=2, gate="mlp", noise=True, output_scale=4.0, balance_coef=0.0, cv_coef=0.01),
    "deepseek": dict(top_k=4, score="sigmoid", selection_bias=True, output_scale=2.5, num_groups=4, top_groups=2, balance_over="sequence"),
    "cosine": dict(top_k=2, gate="cosine", capacity_factor=1.0, drop="random", balance_over="global_batch"),
}


def tokens(count: int, hidden: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILY)
def test_256_experts(name):
    config = model_config(TopKRouter(**FAMILY[name]), num_experts=256, expert_dim=2)
    ours, loop = pair(config, scale=0.5)
    compare(ours, loop, tokens(24), TokenContext(keys=torch.arange(24) * 5, sequence=12), tokens(24))


@pytest.mark.parametrize("name", FAMILY)
def test_one_expert(name):
    options = FAMILY[name] | {"top_k": 1, "num_groups": 1, "top_groups": 1, "second": "always"}
    ours, loop = pair(model_config(TopKRouter(**options), num_experts=1))
    compare(ours, loop, tokens(6), TokenContext(keys=torch.arange(6), sequence=3), tokens(6))


@pytest.mark.parametrize("name", FAMILY)
def test_no_token_has_a_label(name):
    """All padding: no route, output 0, losses 0, gradients finite."""
    ours, _ = pair(model_config(TopKRouter(**FAMILY[name]), num_experts=8))
    x = tokens(6).requires_grad_()
    y, report = ours(x, TokenContext(keys=torch.arange(6), valid=torch.zeros(6, dtype=torch.bool), num_tokens=5.0, sequence=3), x)
    (y.sum() + sum(report.losses.values())).backward()
    assert not y.any() and not any(report.losses.values()) and report.stats["load"].sum() == 0
    assert all(not p.grad.any() for p in [x, *ours.parameters()] if p.requires_grad)


@pytest.mark.parametrize("name", FAMILY)
def test_all_scores_equal(name):
    """Experts 0..k-1 take every token (of the groups, the first ones); with capacity the first tokens of each sequence."""
    options = {k: v for k, v in FAMILY[name].items() if k not in ("jitter", "noise", "drop", "second")}
    config = model_config(TopKRouter(**options), num_experts=8)
    ours, loop = pair(config)
    with torch.no_grad():
        for layer in (ours, loop):
            for parameter in layer.router.parameters():
                parameter.zero_()
    context = TokenContext(keys=torch.arange(12), sequence=6)
    active = ours.router(tokens(12), context).decision.active
    room = 6 if config.moe.router.capacity_factor is None else math.ceil(options["capacity_factor"] * options["top_k"] * 6 / 8)
    wanted = torch.zeros(2, 6, 8, dtype=torch.bool)
    wanted[:, :room, : options["top_k"]] = True
    assert torch.equal(active, wanted.view(12, 8))
    if name != "cosine":  # at a weight of 0 a cosine has no derivative
        compare(ours, loop, tokens(12), context, tokens(12))


def test_top_1_of_a_softmax_learns_unless_it_is_normalised():
    """Switch keeps the softmax's value, else the weight would be 1 and the router would have no gradient from the output."""
    for normalize in (False, True):
        ours, _ = pair(model_config(TopKRouter(top_k=1, normalize=normalize)))
        y, _ = ours(tokens(9), TokenContext(), tokens(9))
        y.sum().backward()
        assert (ours.router.weight.grad.abs().max() > 1e-6) == (not normalize)


# ------------------------------------------------------------------------------------------------------------------ capacity


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        ([[0, 1], [0, 1], [1, 0], [0, 1]], [[1, 1], [1, 0], [0, 1], [0, 0]]),  # first choices first, then by position
        ([[-0.1, 0], [-0.9, 0], [-0.5, 0], [-0.5, 0]], [[0, 1], [1, 1], [1, 0], [0, 0]]),  # largest score, ties to the earlier
    ],
)
def test_capacity(priority, kept):
    active = torch.ones(4, 2, dtype=torch.bool)
    found = within_capacity(active, torch.tensor(priority, dtype=torch.float64), 0.5, 2, None)
    assert found.int().tolist() == kept


def test_capacity_rounds_up_without_rounding_errors():
    for factor, top_k, length, experts, room in ((1.1, 1, 50, 5, 11), (1.25, 1, 10, 8, 2), (0.01, 1, 4, 8, 1), (9.0, 2, 4, 2, 4)):
        active = torch.ones(2 * length, experts, dtype=torch.bool)
        kept = within_capacity(active, torch.zeros(2 * length, experts), factor, top_k, length)
        assert (kept.view(2, length, experts).sum(1) == room).all()


def test_random_drop_does_not_look_at_the_position():
    """100 draws of 3 of 12 tokens: each position is kept 25 times in the mean; no drop and no randomness in evaluation."""
    ours, _ = pair(model_config(TopKRouter(top_k=5, capacity_factor=0.25, drop="random")))
    x, kept = tokens(12), torch.zeros(12)
    for i in range(100):
        decision = ours.router(x, TokenContext(keys=torch.arange(12) + 1000 * i)).decision
        assert (decision.active.sum(0) == 3).all() and decision.dropped == 45
        kept += decision.active[:, 0]
    assert ((kept - 25).abs() < 5 * (100 * 0.25 * 0.75) ** 0.5).all()
    assert ours.eval().router(x, TokenContext()).decision.active.all()


def test_a_dropped_route_leaves_its_weight_to_nobody():
    ours, _ = pair(model_config(TopKRouter(top_k=2, capacity_factor=0.5)))
    x = tokens(20)
    _, report = ours(x, TokenContext(keys=torch.arange(20), sequence=10), x)
    routing, free = ours.router(x, TokenContext(keys=torch.arange(20), sequence=10)), ours.eval().router(x, TokenContext(sequence=10))
    assert 0 < report.stats["dropped"] == 40 - report.stats["load"].sum()
    torch.testing.assert_close(routing.weights, free.weights * routing.decision.active, rtol=0, atol=0)
    # The balance loss counts what was chosen, dropped or not.
    torch.testing.assert_close(routing.losses["balance"], free.losses["balance"], rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------------------- randomness


def test_normal_draws():
    z = normal(torch.arange(20000), 3, 8).double()
    n = z.numel()
    assert torch.equal(normal(torch.arange(20000)[[7]], 3, 8).double(), z[[7]])
    assert z.mean().abs() < 5 / n**0.5 and (z.var() - 1).abs() < 5 * (2 / n) ** 0.5 and (z**4).mean().sub(3).abs() < 5 * (96 / n) ** 0.5
    assert (z[:, 1:] * z[:, :-1]).mean().abs() < 5 / n**0.5 and z.isfinite().all()


def test_gshard_sends_the_second_with_probability_2_g2():
    ours, _ = pair(model_config(TopKRouter(top_k=2, second="random")), scale=0.4)
    x = tokens(6)
    sent = sum(ours.router(x, TokenContext(keys=torch.arange(6) + 6 * i)).decision.active.sum(-1) - 1 for i in range(2000)) / 2000
    best = torch.softmax(x @ ours.router.weight.detach().T, -1).sort(descending=True).values[:, :2]
    wanted = (2 * best[:, 1] / best.sum(-1)).clamp(max=1)
    assert 0.1 < wanted.min() < 0.9 and ((sent - wanted).abs() < 5 * (wanted * (1 - wanted) / 2000).sqrt() + 1e-9).all()


def test_noise_and_jitter_are_drawn_anew_for_each_token_and_only_in_training():
    for options in (dict(noise=True), dict(jitter=0.5)):
        ours, _ = pair(model_config(TopKRouter(top_k=5, **options)))
        x = tokens(1).expand(3, 8)
        first = ours.router(x, TokenContext(keys=torch.tensor([5, 6, 5]))).weights
        assert torch.equal(first[0], first[2]) and not torch.allclose(first[0], first[1], rtol=1e-3)
        plain = ours.eval().router(x, TokenContext()).weights
        torch.testing.assert_close(plain[0], torch.softmax(x[0] @ ours.router.weight.T, -1), rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------------------------- losses


def test_smooth_load_is_the_probability_of_being_chosen_again():
    """Shazeer's formula against what happens when one expert's noise is drawn 20000 times and the others' stays."""
    generator = torch.Generator().manual_seed(0)
    clean, std = torch.randn(1, 5, dtype=torch.float64, generator=generator), torch.rand(1, 5, dtype=torch.float64, generator=generator) + 0.3
    noisy = clean + std * torch.randn(1, 5, dtype=torch.float64, generator=generator)
    found = smooth_load(clean, noisy, std, 2)
    for e in range(5):
        again = noisy.expand(20000, 5).clone()
        again[:, e] = clean[0, e] + std[0, e] * torch.randn(20000, dtype=torch.float64, generator=generator)
        share = (again.topk(2).indices == e).any(-1).double().mean()
        assert abs(share - found[0, e]) < 5 * (0.25 / 20000) ** 0.5


def test_squared_variations():
    """The formula, its gradient, and the awkward sums: balanced, all on one, none."""
    x = torch.zeros(4, 1)
    importance = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    value = squared_variations(TokenContext(), x, importance)
    torch.testing.assert_close(value, importance.var(unbiased=False) / importance.mean() ** 2)
    (grad,) = torch.autograd.grad(value, importance)
    (wanted,) = torch.autograd.grad(importance.var(unbiased=False) / importance.mean() ** 2, importance)
    torch.testing.assert_close(grad, wanted)
    for amounts, cv in (([2.0, 2.0, 2.0], 0.0), ([0.0, 7.0, 0.0], 2.0), ([0.0, 0.0, 0.0], 0.0)):
        assert squared_variations(TokenContext(), x, torch.tensor(amounts)).item() == pytest.approx(cv, abs=1e-6)
    assert coefficients(model_config(TopKRouter(top_k=2, cv_coef=0.3)), None) == {"balance": [0.01] * 3, "z": [0.0] * 3, "cv": [0.3] * 3}


def test_the_global_batch_counts_what_came_before():
    """Alg. 1: the second micro-batch is weighed with the shares of both, the first with its own; a new step starts from nothing, and
    evaluation neither counts nor is counted."""
    ours, _ = pair(model_config(TopKRouter(top_k=2, balance_over="global_batch")))
    x, counts = tokens(20), StepCounts()
    context = TokenContext(counts=counts)
    halves = [ours.router(part, context) for part in x.split(10)]
    with torch.no_grad():
        ours.router(x, context)
    probabilities = torch.softmax(x @ ours.router.weight.detach().T, -1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2).indices, 1)
    for i, half in enumerate(halves):
        f = chosen[: 10 * (i + 1)].sum(0) / (20 * (i + 1))
        torch.testing.assert_close(half.losses["balance"].detach(), 5 * (f * probabilities[10 * i : 10 * i + 10].mean(0)).sum())
    fresh = ours.router(x[:10], dataclasses.replace(context, counts=StepCounts()))
    assert torch.equal(fresh.losses["balance"], halves[0].losses["balance"])


# -------------------------------------------------------------------------------------------------------------------- DeepSeek-V3


def test_the_bias_chooses_but_does_not_weigh():
    """Written out: top-k of s + b, weights s over their sum times the scale; the bias has no gradient."""
    ours, _ = pair(model_config(TopKRouter(top_k=2, score="sigmoid", selection_bias=True, output_scale=2.5)))
    x = tokens(40)
    s = torch.sigmoid(x @ ours.router.weight.detach().T)
    chosen = (s + ours.router.selection_bias).topk(2).indices
    assert not torch.equal(chosen.sort().values, s.topk(2).indices.sort().values), "the bias must matter here"
    wanted = torch.zeros_like(s).scatter(-1, chosen, 2.5 * s.gather(-1, chosen) / s.gather(-1, chosen).sum(-1, keepdim=True))
    routing = ours.router(x, TokenContext())
    torch.testing.assert_close(routing.weights.detach(), wanted, rtol=1e-12, atol=0)
    routing.weights.sum().backward()
    assert ours.router.selection_bias.grad is None and not ours.router.selection_bias.requires_grad


def test_the_bias_steps_against_the_load():
    model = torch.nn.Module()
    model.ffn = torch.nn.Module()
    layer, _ = pair(model_config(TopKRouter(top_k=2, score="sigmoid", selection_bias=True, bias_rate=0.01)))
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"ffn": layer})])
    (found,) = changes_after_step(model, [[5.0, 4.0, 3.0, 6.0, 2.0]], [{}])
    assert found[0] == "layers.0.ffn.router.selection_bias" and found[1].tolist() == [-0.01, 0.0, 0.01, -0.01, 0.01]
    assert not next(iter(changes_after_step(model, [[0.0] * 5], [{}])))[1].any()


def test_the_bias_balances():
    """A router that prefers some experts, no loss: 300 steps of the rule bring the largest load from over twice the mean to near it."""
    layer, _ = pair(model_config(TopKRouter(top_k=2, score="sigmoid", selection_bias=True, bias_rate=0.01), num_experts=8), scale=0.3)
    layer.router.selection_bias.data.zero_()
    x = tokens(400) + 1.0
    loads = []
    for _ in range(300):
        load = layer.router(x, TokenContext()).decision.active.sum(0).double()
        loads.append((load.max() / load.mean()).item())
        for name, change in layer.router.after_step(load, {}):
            getattr(layer.router, name).data += change
    assert loads[0] > 2 and loads[-1] < 1.2


def test_groups():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.6, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    # Best single scores 0.9, 0.6, 0.2: one group for one expert; sums of two 1.0, 1.1, 0.4.
    assert (within_groups(scores, 3, 1, 1) > 0).int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert (within_groups(scores, 3, 1, 2) > 0).int().tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert (within_groups(scores, 3, 2, 2) > 0).int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    ours, _ = pair(model_config(TopKRouter(top_k=4, score="sigmoid", num_groups=4, top_groups=2), num_experts=8))
    active = ours.router(tokens(50), TokenContext()).decision.active
    assert (active.sum(-1) == 4).all() and (active.view(50, 4, 2).any(-1).sum(-1) == 2).all()
