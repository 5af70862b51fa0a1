"""Which scores are the largest."""

from __future__ import annotations

import pytest
import torch

from moetrain.moe.routers.softmax import _largest_by_keys, largest


@pytest.mark.parametrize("experts, k", [(1, 1), (6, 3), (6, 5), (64, 8), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_as_a_stable_sort_has_them(experts, k, dtype):
    """Random scores, few distinct ones, both zeros, both infinities: the order of a stable sort, so that the lower expert wins a tie."""
    generator = torch.Generator().manual_seed(experts)
    random = torch.randn(40, experts, generator=generator)
    ties = torch.randint(-2, 3, (40, experts), generator=generator) / 4
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-42, -1e-42, 3e38, -3e38])
    for scores in (random, ties, torch.zeros(3, experts), ends[torch.randint(8, (60, experts), generator=generator)]):
        scores = scores.to(dtype)
        expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(largest(scores, k), expected)
        assert torch.equal(largest(scores[0], k), expected[0])
        if dtype == torch.float32:  # as on a GPU
            assert torch.equal(_largest_by_keys(scores, k), expected)
