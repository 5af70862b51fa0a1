"""What every test of `moetrain bench` needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from moetrain.bench.rivals import RIVALS


@pytest.fixture(autouse=True)
def no_process_group_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron-Core needs a process group, which no later test should find. DeepSpeed keeps one of its own besides, so it has a process of its
    own in test_rivals.py."""
    monkeypatch.delitem(RIVALS, "DeepSpeed")
    found = dist.is_initialized()
    yield
    if dist.is_initialized() and not found:
        dist.destroy_process_group()
