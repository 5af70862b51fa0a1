"""Stratified MoE against a loop in which one token at a time walks from stratum to stratum, in float64; and that it can be computed again."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrain.config import ModelConfig, MoEConfig, SharedConfig, StrataConfig, TopKRouter
from moetrain.moe.routing import TokenContext, replay_contexts
from moetrain.moe.strata import StratifiedMoELayer
from tests.reference import expert

CASES = {
    "top1": dict(router=TopKRouter(top_k=1, normalize=False), strata=StrataConfig(sizes=[3, 3])),
    "top2_norm": dict(router=TopKRouter(top_k=2, z_coef=1e-3), strata=StrataConfig(sizes=[2, 2, 2], norm=True)),
    "uneven": dict(router=TopKRouter(top_k=1, normalize=False, jitter=0.1), strata=StrataConfig(sizes=[1, 4, 1])),
    "sigmoid": dict(
        router=TopKRouter(top_k=2, score="sigmoid", balance_over="sequence"), strata=StrataConfig(sizes=[4, 2], norm=True),
        shared=SharedConfig(dim=5),
    ),
    "unequal": dict(router=TopKRouter(top_k=2), strata=StrataConfig(sizes=[2, 4]), expert_dim=[7, 3, 7, 0, 3, 3]),
}  # fmt: skip


def make(name, spread: float = 1.0) -> StratifiedMoELayer:
    moe = MoEConfig(**{"num_experts": 6, "expert_dim": 7, **CASES[name]})
    config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=16, moe=moe)
    layer, generator = StratifiedMoELayer(config, 1).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * spread)
    return layer


def matrices(layer, dims):
    """Expert -> (gate_up, down), where it has any."""
    order, found = list(dict.fromkeys(d for d in dims if d)), {}
    for e, size in enumerate(dims):
        if size:
            group = layer.expert_groups()[order.index(size)]
            found[e] = group.gate_up[dims[:e].count(size)], group.down[dims[:e].count(size)]
    return found


def walk(layer, name, x):
    """(outputs, routes per expert, passes per token): without jitter, by the definition."""
    case = CASES[name]
    router, sizes = case["router"], case["strata"].sizes
    dims = case.get("expert_dim", [7] * 6)
    experts = matrices(layer, dims)
    outputs, load, passes = [], [0] * 6, []
    for token in x:
        y, state, count = torch.zeros_like(token), 0, 0
        while state < len(sizes):
            s = token + y
            if count and case["strata"].norm:
                s = s / (s.square().mean() + 1e-5).sqrt() * layer.norms[state - 1].weight
            first = sum(sizes[:state])
            logits = layer.router[state].weight @ s
            scores = 1 / (1 + torch.exp(-logits)) if router.score == "sigmoid" else torch.softmax(logits, 0)
            chosen = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[: router.top_k]  # noqa: B023
            total = sum(scores[e] for e in chosen) if router.normalize else 1.0
            step = torch.zeros_like(token)
            for e in chosen:
                load[first + e] += 1
                if first + e in experts:
                    step = step + scores[e] / total * expert(s, *experts[first + e])
            y, count = y + step, count + 1
            best = first + chosen[0]
            state = next(j for j in range(len(sizes)) if best < sum(sizes[: j + 1])) + 1
        passes.append(count)
        if layer.shared is not None:
            y = layer.shared(token[None], y[None])[0]
        outputs.append(y)
    return torch.stack(outputs), load, passes


@pytest.mark.parametrize("name", CASES)
def test_matches_the_walk(name):
    layer = make(name).eval()
    x, grad = torch.randn(2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [x.requires_grad_(), *layer.parameters()]
    y, report = layer(x, TokenContext(), x)
    want, load, passes = walk(layer, name, x)
    assert len(set(passes)) == len(CASES[name]["strata"].sizes), f"tokens pass one to all strata: {passes}"
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    assert report.stats["load"].tolist() == load and report.stats["active_sq"] == sum((n * CASES[name]["router"].top_k) ** 2 for n in passes)
    found, wanted = (torch.autograd.grad(out, parameters, grad, allow_unused=True) for out in (y, want))
    for (key, p), a, b in zip([("x", x), *layer.named_parameters()], found, wanted, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_losses_are_means_over_passes():
    """Each pass's balance loss over its own tokens and the experts it can see, weighted by the tokens' share; then the mean over passes."""
    layer = make("top1").eval()
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, report = layer(x, TokenContext(), x)
    routed, total, here, s = [], 0.0, torch.ones(40, dtype=torch.bool), x
    for i, first in enumerate((0, 3)):
        p = torch.softmax(s @ layer.router[i].weight.T, -1)[here]
        best = p.argmax(-1)
        shares = torch.bincount(best, minlength=6 - first).double() / len(best)
        total = total + (6 - first) * (shares * p.sum(0) / 40).sum()
        routed.append(len(best))
        if i == 0:
            _, _, passes = walk(layer, "top1", x)
            here = torch.tensor(passes) == 2
            one, _ = layer.router[0](x, TokenContext()), None
            s = x + layer.compute(x, layer.parts(one))
    assert 0 < routed[1] < routed[0]
    torch.testing.assert_close(report.losses["balance"], total / 2, rtol=1e-12, atol=1e-12)


def test_padding_and_no_tokens():
    layer = make("top2_norm")
    x = torch.randn(6, 8, dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, False, True])
    y, report = layer(x, TokenContext(valid=valid), x)
    alone, same = layer(x[valid], TokenContext(), x[valid])
    torch.testing.assert_close(y[valid], alone, rtol=1e-12, atol=1e-12)
    assert not y[~valid].any() and report.stats["tokens"] == 4 and report.stats["empty"] == 0
    torch.testing.assert_close(report.losses["balance"], same.losses["balance"])
    y, _ = layer(x[:0], TokenContext(), x[:0])
    y.sum().backward()
    assert y.shape == (0, 8) and all(p.grad is None or not p.grad.any() for p in layer.parameters())


def test_computed_again_it_repeats_its_way():
    """Under checkpointing the routes and the ways of the first forward are replayed, though the weights have changed meanwhile."""
    layer = make("top2_norm")
    x = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routes, here, compute = [], [], layer.compute

    def noted(x, parts):
        routes.append(parts[0].decision.active)
        return compute(x, parts)

    layer.compute = noted
    for router in layer.router:
        router.register_forward_pre_hook(lambda _, inputs: here.append(inputs[1].valid))
    y = checkpoint(lambda x: layer(x, TokenContext(), x)[0], x, use_reentrant=False, context_fn=replay_contexts, preserve_rng_state=False)
    with torch.no_grad():
        for router in layer.router:
            router.weight.neg_()
    y.sum().backward()
    assert len(routes) == len(here) == 6
    for i in range(3):
        assert here[i].any() and torch.equal(here[i], here[i + 3]) and torch.equal(routes[i], routes[i + 3])
