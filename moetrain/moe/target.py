"""Moving a threshold so that a mean number of routes is held (ours).

A router counts in each step how many routes there would have been with its threshold moved by each of OFFSETS; from these the threshold is known
that would have met the target on the step's tokens, and it goes a part of the way there. No gain depends on the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
OFFSETS = (*(-step for step in reversed(_STEPS)), 0.0, *_STEPS)
"""Log-odds around those of the threshold at which routes are counted: close by for a fine step, far off for a start elsewhere."""
RATE = 0.3
"""Share of the way to the threshold that would have met the target which the controller goes in a step."""


def log_odds(share: float) -> float:
    """log(p / (1 - p)), of 0 < p < 1."""
    return math.log(share / (1 - share))


def step_to(means: list[float], target: float) -> Tensor:
    """(1,) float64, what to add to the threshold's log-odds. means: routes per token with the threshold moved by each of OFFSETS; rising or
    falling."""
    return torch.tensor([RATE * offset_to(means, target)], dtype=torch.float64)


def offset_to(means: list[float], target: float) -> float:
    """The offset at which the mean number of routes is `target`, by straight lines between those of OFFSETS; the smallest in size where several
    are, the last one where none is. means: rising or falling."""
    here = OFFSETS.index(0.0)
    up = 1 if means[-1] >= means[0] else -1
    step = up if means[here] < target else -up
    i = here
    while means[i] != target and 0 <= i + step < len(OFFSETS):
        i, past = i + step, i
        if (means[i] - target) * step * up >= 0:
            return OFFSETS[past] + (OFFSETS[i] - OFFSETS[past]) * (target - means[past]) / (means[i] - means[past])
    return OFFSETS[i]
