"""Proves moetrain.moe.weights: values and gradients are those of the plain formulas, and nothing but the arguments is kept for backward."""

import math

import pytest
import torch

from moetrain import ops
from moetrain.moe.weights import pick, share


def problem(tokens: int = 13, experts: int = 7):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(tokens, experts, dtype=torch.float64, generator=generator).sigmoid()
    active = torch.rand(tokens, experts, generator=generator) < 0.4
    if tokens:
        active[2] = False  # a token without routes
        active[3] = True
        scores[4] = 0.0  # active scores that add up to 0
    return scores.requires_grad_(), active, torch.randn(tokens, experts, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("tokens", [13, 0])
def test_share(tokens):
    scores, active, grad = problem(tokens)
    plain = scores * active
    total = plain.sum(-1, keepdim=True)
    want = plain / torch.where(total > 0, total, 1)
    got = share(scores, active)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y, scores, grad)[0] for y in (got, want)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("tokens", [13, 0])
def test_pick(tokens):
    scores, active, _ = problem(tokens)
    listed, counts, _, _ = ops.route(active, int(active.sum()))
    want = scores.T[active.T]  # by expert, then token
    got = pick(scores, listed, counts)
    assert torch.equal(got, want)
    grad = torch.randn(got.shape, dtype=torch.float64)
    assert torch.equal(*(torch.autograd.grad(y, scores, grad)[0] for y in (got, want)))


def test_weights_of_padding_are_zero_and_send_no_gradient():
    active = torch.tensor([[True, False], [True, True], [False, False]])
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, math.nan]], requires_grad=True)
    tokens, counts, _, _ = ops.route(active, 8, padded=True)
    picked = pick(weights, tokens, counts, padded=True)
    assert picked.tolist() == [1, 3, 4, 0, 0, 0, 0, 0]
    picked.backward(torch.tensor([1.0, 2.0, 3.0, math.nan, math.inf, -math.inf, math.nan, 7.0]))
    assert weights.grad is not None and weights.grad.tolist() == [[1, 0], [2, 3], [0, 0]]


def test_kept():
    scores, active, _ = problem()
    listed, counts, _, _ = ops.route(active, int(active.sum()))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        pick(share(scores, active), listed, counts)
    assert set(kept) <= {t.data_ptr() for t in (scores, active, listed, counts)}
