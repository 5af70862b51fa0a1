"""The balanced assignment is exact: against every assignment for few tokens, against networkx's minimum-cost flow for more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.moe.assignment import balanced_assignment
from tests.reference_assigned import best_assignment


def check_counts(owner: np.ndarray, tokens: int, experts: int) -> None:
    counts = np.bincount(owner, minlength=experts)
    assert len(owner) == tokens and counts.min() >= tokens // experts and counts.max() <= -(-tokens // experts)


def total(scores: np.ndarray, owner) -> float:
    return sum(scores[t, e] for t, e in enumerate(owner))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 6), experts=st.integers(1, 4), levels=st.sampled_from([1, 2, 1000]), skew=st.sampled_from([0, 3]),
    seed=st.integers(0, 9999),
)  # fmt: skip
def test_against_every_assignment(tokens, experts, levels, skew, seed):
    scores = np.random.default_rng(seed).integers(-levels, levels, (tokens, experts)) / 8.0
    scores[:, 0] += skew * levels
    owner = balanced_assignment(scores)
    check_counts(owner, tokens, experts)
    allowed = []
    for any_owner in itertools.product(range(experts), repeat=tokens):
        counts = np.bincount(np.array(any_owner, dtype=np.int64), minlength=experts)
        if counts.min() >= tokens // experts and counts.max() <= -(-tokens // experts):
            allowed.append(total(scores, any_owner))
    assert total(scores, owner) == max(allowed)


@pytest.mark.parametrize(("tokens", "experts"), [(40, 8), (37, 8), (61, 3), (30, 1), (20, 64)])
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_against_a_minimum_cost_flow(tokens, experts, skew):
    for seed in range(3):
        scores = np.random.default_rng(seed).normal(size=(tokens, experts))
        scores[:, : max(1, experts // 4)] += skew
        owner = balanced_assignment(scores)
        check_counts(owner, tokens, experts)
        assert total(scores, owner) == pytest.approx(total(scores, best_assignment(scores.tolist())), abs=1e-5)


def test_awkward_scores():
    """All equal, all for one expert, enormous, not numbers: balanced all the same, and it ends."""
    for scores in (
        np.zeros((10, 4)), np.eye(4)[[0] * 10], np.full((10, 4), 1e30), np.full((10, 4), np.nan), np.zeros((24, 256)), np.zeros((0, 3)),
        np.array([[np.inf, -np.inf, np.nan, 0.0]] * 9),
    ):  # fmt: skip
        check_counts(balanced_assignment(scores), *scores.shape)


def test_rounding_changes_nothing():
    """Equal tokens are shared out in the same way when their scores were rounded differently."""
    scores = np.repeat(np.random.default_rng(0).normal(size=(4, 6)), 5, axis=0)
    noisy = scores * (1 + 1e-15 * np.random.default_rng(1).normal(size=scores.shape))
    assert (scores != noisy).any() and (balanced_assignment(scores) == balanced_assignment(noisy)).all()
