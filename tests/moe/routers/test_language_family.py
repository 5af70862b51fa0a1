"""Post-MoE's hybrid routing: the language's expert takes the last slot in training, plain top-k else; awkward inputs and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moetrain.config import LanguageFamilyRouter
from moetrain.moe.losses import coefficients
from moetrain.moe.routing import TokenContext, replay_contexts
from tests.moe.test_layer import compare, model_config, pair

LANGUAGES = {"sw": 4, "de": 0, "en": 0, "zh": 2}  # in the order of names: de 0, en 0, sw 4, zh 2


def tokens(count: int, hidden: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_last_slot():
    """A router whose scores fall with the expert's number: top 2 are 0 and 1."""
    config = model_config(LanguageFamilyRouter(languages=LANGUAGES))
    ours, _ = pair(config)
    with torch.no_grad():
        ours.router.weight.zero_()
        ours.router.weight[:, 0] = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    x = torch.ones(6, 8, dtype=torch.float64)
    context = TokenContext(tags=torch.tensor([0, 1, 2, 3, -1, 2]), valid=torch.tensor([True] * 5 + [False]))
    s = torch.softmax(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64), 0)
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    for t, routes in enumerate([(0, 1), (0, 1), (0, 4), (0, 2), (0, 1), ()]):
        wanted[t, list(routes)] = s[list(routes)]  # not normalised
    torch.testing.assert_close(ours.router(x, context).weights, wanted, rtol=1e-14, atol=0)
    # Without a language, and in evaluation with one, plain top-2.
    plain = torch.where(torch.arange(5) < 2, s, 0)
    for routing in (ours.router(x, TokenContext()), ours.eval().router(x, dataclasses.replace(context, valid=None))):
        torch.testing.assert_close(routing.weights, plain.expand(6, 5), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (256, 2), (5, 5)])
def test_one_and_256_and_all_experts(experts, top_k):
    languages = {"a": 0, "b": experts - 1}
    ours, loop = pair(model_config(LanguageFamilyRouter(languages=languages, top_k=top_k), num_experts=experts, expert_dim=2), scale=0.5)
    tags = torch.arange(24) % 3 - 1
    compare(ours, loop, tokens(24), TokenContext(tags=tags), tokens(24))


def test_all_scores_equal():
    ours, loop = pair(model_config(LanguageFamilyRouter(languages=LANGUAGES)))
    with torch.no_grad():
        for layer in (ours, loop):
            layer.router.weight.zero_()
    context = TokenContext(tags=torch.tensor([0, 3, -1]))
    active = ours.router(tokens(3), context).decision.active
    assert [row.nonzero().flatten().tolist() for row in active] == [[0, 1], [0, 2], [0, 1]]
    compare(ours, loop, tokens(3), context, tokens(3))


def test_the_paper_has_no_balance_loss_and_decisions_are_replayed():
    config = model_config(LanguageFamilyRouter(languages=LANGUAGES))
    assert coefficients(config, None) == {"balance": [0.0] * 3}
    ours, _ = pair(config)
    first, again = replay_contexts()
    with first:
        a = ours.router(tokens(10), TokenContext())
    with again:
        b = ours.router(tokens(10, seed=2), TokenContext())
    assert a.decision is b.decision
