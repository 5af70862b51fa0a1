"""The experts' choice among the tokens of a sequence and of many ranks, against sorting them all in one place; with ties, padding and nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.moe.choice import largest_of_group, largest_of_sequence, room_for
from tests.distributed import run


def plain(scores, valid, names, factor):
    """Per expert the first ceil(c N / E) tokens by falling score in float32, then by name."""
    E = scores.shape[1]
    tokens = [t for t in range(len(scores)) if valid[t]]
    room = -(-round(1e6 * factor * len(tokens)) // round(1e6 * E))
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    cut = torch.zeros(E, dtype=scores.dtype)
    for e in range(E):
        order = sorted(tokens, key=lambda t, e=e: (-scores[t, e].float().item(), int(names[t])))
        chosen[order[:room], e] = True
        cut[e] = max([scores[t, e].item() for t in order[room:]], default=0.0)
    return chosen, cut


def case(tokens: int, experts: int, levels: int, seed: int):
    draws = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=draws, dtype=torch.float64)
    if levels:
        scores = (scores * levels).floor() / levels  # many ties, zeros among them
    valid = torch.rand(tokens, generator=draws) < 0.8
    names = torch.randperm(tokens, generator=draws) * 3_000_000_007**2 % 2**62
    return scores, valid, torch.where(valid, names, -1)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40), experts=st.sampled_from([1, 2, 5, 256]), levels=st.sampled_from([0, 1, 2, 7]), seed=st.integers(0, 999),
    factor=st.sampled_from([0.3, 1.0, 1.7, 1e9]),
)  # fmt: skip
def test_group_of_one(tokens, experts, levels, seed, factor):
    scores, valid, names = case(tokens, experts, levels, seed)
    chosen, cut, count = largest_of_group(scores, valid, names, factor, None)
    wanted, wanted_cut = plain(scores, valid, names, factor)
    assert torch.equal(chosen, wanted) and torch.equal(cut, wanted_cut) and count == valid.sum()


def _rank(levels: int) -> list:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for seed in range(4):
        scores, valid, names = case(32, 6, levels, seed)
        if seed == 3:
            valid[: 32 // world] = False  # a rank without tokens
        mine = slice(rank * 32 // world, (rank + 1) * 32 // world)
        chosen, cut, count = largest_of_group(scores[mine], valid[mine], names[mine], 1.7, dist.group.WORLD)
        found.append((chosen.numpy(), cut.numpy(), int(count)))
    return found


@pytest.mark.parametrize("levels", [0, 2])
def test_ranks_choose_what_one_rank_chooses(levels):
    parts = run(_rank, 4, levels)
    for seed in range(4):
        scores, valid, names = case(32, 6, levels, seed)
        if seed == 3:
            valid[:8] = False
        wanted, wanted_cut = plain(scores, valid, names, 1.7)
        assert torch.equal(torch.cat([torch.from_numpy(part[seed][0]) for part in parts]), wanted)
        for part in parts:
            assert torch.equal(torch.from_numpy(part[seed][1]), wanted_cut) and part[seed][2] == valid.sum()


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_sequences(levels):
    """Each by itself, ties to the earlier token; one of them all padding."""
    scores, valid, _ = case(40, 5, levels, 1)
    valid[10:20] = False
    chosen, cuts, counts = largest_of_sequence(scores, valid, 1.3, 10)
    for b in range(4):
        part = slice(10 * b, 10 * b + 10)
        wanted, cut = plain(scores[part], valid[part], torch.arange(10), 1.3)
        assert torch.equal(chosen[part], wanted) and torch.equal(cuts[b], cut) and counts[b] == valid[part].sum()


def test_tokens_that_are_equal_but_for_rounding_are_equal():
    scores = torch.full((6, 2), 0.3, dtype=torch.float64)
    scores[4] += 1e-16 * 2
    chosen, _, _ = largest_of_sequence(scores, torch.ones(6, dtype=torch.bool), 1.0, 6)
    by_name, _, _ = largest_of_group(scores, torch.ones(6, dtype=torch.bool), torch.tensor([5, 4, 3, 2, 1, 0]), 1.0, None)
    assert scores[4, 0] > 0.3 and chosen[:, 0].tolist() == [True] * 3 + [False] * 3 and by_name[:, 0].tolist() == [False] * 3 + [True] * 3


def test_room_rounds_up_without_rounding_errors():
    tokens = torch.tensor([80, 10, 1, 0, 7])
    assert room_for(tokens, 1.1, 8).tolist() == [11, 2, 1, 0, 1] and room_for(tokens, 99.0, 8).tolist() == tokens.tolist()
    assert room_for(torch.tensor([50]), 1.1, 5).tolist() == [11]  # the product is 55.00000000000001
