"""One fault of each kind falls on a run, and nothing is lost or different: the short form of `python -m tests.soak --faults 100`."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.metrics import read_records
from tests import soak


@pytest.mark.slow
def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (soak.NANS, soak.FRESH_STORE):
        monkeypatch.setenv(name, "")  # set by the soak; taken back after the test
    run = soak.Soak(tmp_path, len(soak.KINDS), seed=1)
    run.go()
    print(run.table())
    *_, last = read_records(run.run_dir)
    assert {len(times) for times in last["ranks"].values()} == {2}, "a line of the last step compares the ranks"
    assert sum(len(rows) for rows in run.rows.values()) == len(run.kinds) == len(soak.KINDS)
