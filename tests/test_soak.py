"""One fault of each kind falls on a run, and nothing is lost or different: the short form of `python -m tests.soak --faults 100`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import soak


def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (soak.NANS, soak.FRESH_STORE):
        monkeypatch.setenv(name, "")  # set by the soak; taken back after the test
    run = soak.Soak(tmp_path, len(soak.KINDS), seed=1)
    run.go()
    print(run.table())
    assert sum(len(rows) for rows in run.rows.values()) == len(run.kinds) == len(soak.KINDS)
