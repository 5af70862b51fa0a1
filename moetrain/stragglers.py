"""Which rank the others wait for: step times of every rank, gathered at the steps that are logged.

Ranks that exchange tokens go in lockstep, so a slow one slows all and their step times are alike. What tells it from the others is its own part:
the time in which it read its data, and how long it waited in the step's first collective, where a late rank waits least.
"""

from __future__ import annotations

from statistics import median

import torch
import torch.distributed as dist

_FIELDS = ("median_s", "worst_s", "data_s", "wait_s")


class StepTimes:
    """Times of this rank's steps since the last report. A step costs the appending of three numbers."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """group: the ranks to compare; None: this one alone, which has no report."""
        self._group, self._device = group, device
        self._steps: list[tuple[float, float, float]] = []

    def add(self, step_s: float, data_s: float, wait_s: float) -> None:
        """step_s: seconds of the whole step. data_s: of them, until its data was there. wait_s: of them, in the step's first collective (0 on a GPU,
        where the host does not wait in it)."""
        if self._group is not None:
            self._steps.append((step_s, data_s, wait_s))

    def report(self) -> dict[str, list[float]]:
        """By field, a number for each rank: median_s and worst_s of a step, median data_s and wait_s; empty without other ranks or steps. Collective:
        every rank has added as many steps."""
        if self._group is None or not self._steps:
            return {}
        steps, data, wait = zip(*self._steps)
        self._steps = []
        mine = torch.tensor([median(steps), max(steps), median(data), median(wait)], dtype=torch.float64, device=self._device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(every, mine, group=self._group)
        return dict(zip(_FIELDS, torch.stack(every, 1).tolist()))
