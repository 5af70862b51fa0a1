"""What is read from a run's files: means and ranges of long runs are right, the heat map's frames are bounded, broken parts are named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moetrain.report import read
from moetrain.report.read import encode_load, read_run, relative_share
from tests.report.runs import record, write_run


def test_down_sampling_keeps_every_step(tmp_path):
    """2,500 steps in at most 800 points: each point is the mean, least and greatest of its steps, and the last point ends with the last step."""
    steps = range(1, 2501)
    lines = [{"step": s, "loss": math.nan if s % 7 == 0 else math.sin(s)} for s in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    width = 4  # ceil(2500 / 800)
    buckets = [[math.sin(s) for s in steps[i : i + width] if s % 7] for i in range(0, 2500, width)]
    curve = run.curves["loss"]
    np.testing.assert_allclose(curve.mean, [sum(b) / len(b) for b in buckets], rtol=1e-12)
    np.testing.assert_array_equal(curve.low, [min(b) for b in buckets])
    np.testing.assert_array_equal(curve.high, [max(b) for b in buckets])
    assert run.steps == [steps[min(i + width, 2500) - 1] for i in range(0, 2500, width)] and run.not_finite[:3] == [7, 14, 21]


@pytest.mark.parametrize("count", [1, 2, 59, 60, 61, 120, 121, 1000])
def test_frames_are_bounded_and_hold_the_newest(count):
    """Never more than 60, evenly spaced within a factor of two, the first and the newest among them; of large layers fewer."""
    frames, large, wide = read._Frames(), read._Frames(), np.full((50, 500), 100)
    for step in range(1, count + 1):
        frames.add(step, [[100, step % 200]])
        large.add(step, wide)
    steps = [f.step for f in frames.chosen()]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == count and len(steps) <= 60 and len(steps) >= min(count, 30)
    gaps = np.diff(steps)[:-1]
    assert not len(gaps) or gaps.max() <= 2 * gaps.min()
    assert len(large.chosen()) <= 48 and large.chosen()[-1].step == count


def test_codes_of_loads():
    """The even share is 128, no route 0, and the code's inverse is within 1.5 % of the load."""
    loads = np.array([[0, 1e-9, 12.5, 50, 100, 200, 800, 1e9]])
    codes = encode_load(loads)[0]
    assert codes[0] == 0 and codes[1] == 1 and codes[4] == 128 and codes[7] == 255
    np.testing.assert_allclose(100 * 2 ** ((codes[2:7].astype(float) - 128) / 25.4), loads[0, 2:7], rtol=0.015)
    np.testing.assert_array_equal(relative_share(np.array([[3.0, 1, 0, 0], [0, 0, 0, 0]])), [[300, 100, 0, 0], [0, 0, 0, 0]])


def test_layers_have_the_numbers_of_the_model(tmp_path):
    """Sparse layers 1 to 3 of 4 are called so; where the config has gone they are counted."""
    run = read_run(write_run(tmp_path / "run"))
    assert run.layer_names == ["1", "2", "3"] and [f.step for f in run.frames] == [5, 10, 15, 20, 25, 30] and not run.missing
    np.testing.assert_allclose(run.curves["sparsity_coef"].mean, 0.2)  # a coefficient for each layer
    assert len(run.events) == 5 and run.routing["eval"]["step"] is None and set(run.routing["train"]["sets"]) == {"code", "prose"}
    (tmp_path / "run" / "config.yaml").write_text("model: [")
    run = read_run(tmp_path / "run")
    assert run.layer_names == ["0", "1", "2"] and "config.yaml can't be read" in run.missing[0]


def test_broken_lines(tmp_path):
    """Torn, foreign and odd lines: left out, counted, and never an error."""
    folder = write_run(tmp_path / "run", steps=4)
    odd = record(5, 3, 4, load=True, loss="high", moe={"active": "x", "dead": [None, 10**400, {}]}, eval=[1], sources={"code": 3})
    odd["load"] = [[1, 2], [3]]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("nonsense\n[1]\n" + json.dumps(odd) + "\n" + '{"step": 6, "loss": 1')
    (folder / "events.jsonl").write_text('{"event": 1}\n[]\nx\n{"event": "resume"}\n')
    (folder / "routing.json").write_text('{"train": {"sets": {"a": {"load": [[1], [1, 2]]}, "b": {"load": [[1, 2]]}}}, "eval": 3}')
    run = read_run(folder)
    assert run.records == 5 and run.steps == [1, 2, 3, 4, 5] and run.events == [{"event": "resume"}] and not run.routing
    assert any(m.startswith("3 broken lines of metrics.jsonl") for m in run.missing) and any("no picture of this model's 3" in m for m in run.missing)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl does not exist; name the run_dir of a training run"):
        read_run(tmp_path)
