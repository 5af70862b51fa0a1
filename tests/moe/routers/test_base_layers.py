"""BASE layers: the equation and its gradients, awkward inputs, and who sees later tokens."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import BaseLayersRouter
from moetrain.moe.routing import TokenContext, replay_contexts
from tests.moe.test_layer import compare, model_config, pair
from tests.reference_assigned import best_assignment


def tokens(count: int, hidden: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False])
def test_the_equation_and_its_gradients(training):
    """y = sigmoid(x . w_a) E_a(x), the router's gradient through the sigmoid alone."""
    ours, _ = pair(model_config(BaseLayersRouter()), scale=0.5)
    ours.train(training)
    x, grad = tokens(10), tokens(10, seed=2)
    (ours(x, TokenContext(), x)[0] * grad).sum().backward()
    W, gate_up, down = (p.detach() for p in (ours.router.weight, ours.experts.gate_up, ours.experts.down))
    logits = x @ W.T
    owner = torch.tensor(best_assignment(logits.tolist())) if training else logits.argmax(-1)
    assert training == (owner.bincount(minlength=5).tolist() == [2] * 5)
    g = torch.sigmoid(logits.gather(1, owner[:, None]))
    gate, up = (gate_up[owner] @ x[:, :, None])[..., 0].chunk(2, -1)
    out = (down[owner] @ (torch.nn.functional.silu(gate) * up)[..., None])[..., 0]
    torch.testing.assert_close(ours(x, TokenContext(), x)[0], g * out, rtol=1e-12, atol=1e-12)
    dW = torch.zeros_like(W).index_add(0, owner, (grad * out).sum(-1, keepdim=True) * g * (1 - g) * x)
    torch.testing.assert_close(ours.router.weight.grad, dW, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("experts", [1, 256])
def test_one_and_256_experts(experts):
    ours, loop = pair(model_config(BaseLayersRouter(), num_experts=experts, expert_dim=2), scale=0.5)
    compare(ours, loop, tokens(24), TokenContext(sequence=12), tokens(24))


def test_all_scores_equal_and_padding():
    ours, _ = pair(model_config(BaseLayersRouter()))
    with torch.no_grad():
        ours.router.weight.zero_()
    valid = torch.ones(20, dtype=torch.bool)
    valid[[0, 4, 5]] = valid[10:] = False
    _, report = ours(tokens(20), TokenContext(valid=valid, sequence=10), tokens(20))
    assert sorted(report.stats["load"].tolist()) == [1, 1, 1, 2, 2]
    assert not ours.router(tokens(20), TokenContext(valid=valid, sequence=10)).decision.active[~valid].any()


def test_a_decision_is_replayed_when_a_block_is_computed_again():
    ours, _ = pair(model_config(BaseLayersRouter()))
    first, again = replay_contexts()
    with first:
        a = ours.router(tokens(10), TokenContext())
    with again:
        b = ours.router(tokens(10, seed=2), TokenContext())
    assert a.decision is b.decision


def test_what_sees_later_tokens():
    ours, _ = pair(model_config(BaseLayersRouter()))
    x = tokens(20)
    other = x.clone()
    other[10:] = tokens(10, seed=5) * 3
    for training in (True, False):
        a, b = (ours.train(training).router(v, TokenContext()).decision.active[:10] for v in (x, other))
        assert torch.equal(a, b) == (not training)
    assert "not causal" in BaseLayersRouter().caution()
