"""Random draws that any rank can repeat, statistics, and decisions that recomputation replays."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrain.config import SigmoidSteRouter
from moetrain.moe.routing import Decision, TokenContext, recorded, replay_contexts, statistics, uniform
from tests.moe.test_layer import ROUTERS, model_config, pair


def test_draws_depend_on_key_stream_and_column_alone():
    keys = torch.arange(1000) * 7 + 2**40
    whole = uniform(keys, 3, 16)
    assert torch.equal(uniform(keys[[5, 900]], 3, 16), whole[[5, 900]])
    assert torch.equal(uniform(keys, 3, 4), whole[:, :4])
    assert not torch.equal(uniform(keys, 4, 16), whole)


def test_draws_are_uniform_and_uncorrelated():
    """Mean, variance and neighbours' correlations within 5 standard errors of those of independent uniform numbers."""
    u = uniform(torch.arange(20000), 0, 8).double() - 0.5
    n = u.numel()
    assert 0 <= u.min() + 0.5 and u.max() + 0.5 < 1
    assert u.mean().abs() < 5 * (1 / 12 / n) ** 0.5
    assert (u.var() - 1 / 12).abs() < 5 * (1 / 180 / n) ** 0.5
    other = uniform(torch.arange(20000), 1, 8).double() - 0.5
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, other)):
        assert (a * b).mean().abs() < 5 * (1 / 144 / a.numel()) ** 0.5


def test_statistics():
    active = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    probes = torch.tensor([[0, 0, 2.0], [2.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    found = statistics(Decision(active, probes), TokenContext(valid=torch.tensor([True, True, True, False])))
    assert {k: v.tolist() for k, v in found.items()} == {
        "tokens": 3, "load": [1, 2, 0], "active_sq": 5, "empty": 1, "probes": 2, "dropped": 0,
    }  # fmt: skip
    apart = TokenContext(valid=torch.tensor([True, True, True, False]), classes=torch.tensor([2, 0, 2, 0]), num_classes=3)
    found = statistics(Decision(active, probes), apart)
    assert found["class_tokens"].tolist() == [1, 0, 2] and found["class_load"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 0]]
    assert found["load"].tolist() == [1, 2, 0]


def test_recomputation_replays_the_first_decision():
    """A decision that would come out otherwise the second time (here it counts its calls) is made once."""
    calls = []

    def block(x):
        for _ in range(2):
            x = x * recorded(lambda: calls.append(0) or len(calls))
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False, context_fn=replay_contexts).sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, torch.full((3,), 2 * torch.cos(torch.tensor(2.0)).item()))


def test_a_near_tie_that_falls_otherwise_is_replayed():
    """The router's weight is moved between forward and backward, so that a router that ran again would open other gates: the recomputation
    keeps the routes of the forward pass, and backward meets the shapes that it saved."""
    layer, _ = pair(model_config(SigmoidSteRouter()), seed=2)
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen: list[torch.Tensor] = []
    layer.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].routes.tokens))
    y = checkpoint(lambda x: layer(x, TokenContext(), x)[0], x, use_reentrant=False, context_fn=replay_contexts)
    with torch.no_grad():
        layer.router.weight.data.neg_()
    y.sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    again = layer(x, TokenContext(), x)[1].stats["load"]
    assert again.sum() != seen[0].numel(), "the case must be one where a second decision differs"


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_decides_once(name):
    """A block that is computed again takes the decision of the first time; what was decided anew would be counted twice, and could differ."""
    layer, _ = pair(model_config(ROUTERS[name]))
    calls, decide = [], layer.router.decide
    layer.router.decide = lambda *args: calls.append(0) or decide(*args)
    x = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    context = TokenContext(keys=torch.arange(10), num_tokens=10.0, sequence=5, tokens=torch.arange(10) % 11, tags=torch.arange(10) % 2)
    computed = []
    layer.router.register_forward_pre_hook(lambda *_: computed.append(0))
    checkpoint(lambda x: layer(x, context, x)[0], x, use_reentrant=False, context_fn=replay_contexts).sum().backward()
    assert len(computed) == 2 and len(calls) == 1
