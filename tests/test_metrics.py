"""Proves that a killed and resumed run's metrics are line by line an uninterrupted run's, that floats survive, that a sink that breaks is
switched off and nothing else, and that the real wandb (offline), TensorBoard and matplotlib take what is logged."""

from __future__ import annotations

import json
import math
import struct
import warnings

import pytest
import torch

import moetrain.metrics as metrics
from moetrain.config import LogConfig
from moetrain.metrics import Metrics, console_line, deterministic_fields, flatten, plots, read_records, relative_load, write_routing
from moetrain.records import append_event

RESOLVED = {"train": {"steps": 20, "lr": 3e-4}}


def _record(step: int, **more) -> dict:
    """As the trainer makes it, two MoE layers; step_s depends on nothing that repeats."""
    return {
        "step": step, "loss": 1 / 3 + step, "lm": math.pi / step, "sparsity": 0.25, "sparsity_coef": 1e-3, "grad_norm": 0.5, "lr": 3e-4 / step,
        "tokens": 1000 * step, "tokens_per_s": 41234.5, "step_s": 0.5, "data_s": 0.01, "skipped": False,
        "moe": {
            "active": [2.5, 1.5], "active_std": [0.1, 0.2], "load_max_mean": [1.5, 1.25],
            "dead": [0, 2], "probe_share": [0.2, 0.2], "empty": [0.0, 0.02],
        },  # fmt: skip
        "sources": {"code": {"loss": 2.0, "tokens": 600}, "prose": {"loss": 3.0, "tokens": 400}},
    } | more  # fmt: skip


def _lines(run) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def _write(run, steps, **options) -> None:
    sink = Metrics(run, LogConfig(), resolved=RESOLVED, console=False, **options)
    for step in steps:
        sink.log(_record(step))
    sink.close()


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path):
    """Killed in the middle of a line after step 9, resumed from the checkpoint of step 6; events are never dropped."""
    _write(tmp_path / "whole", range(1, 13))
    killed = Metrics(tmp_path / "killed", LogConfig(), resolved=RESOLVED, console=False)
    for step in range(1, 10):
        killed.log(_record(step))
    killed.event("checkpoint", step=6)  # never closed: each line must be on disk already
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "loss": 1')
    again = Metrics(tmp_path / "killed", LogConfig(), resolved=RESOLVED, console=False, resume_step=6)
    again.event("restart", step=6)
    assert len(_lines(tmp_path / "killed")) == 6
    for step in range(7, 13):
        again.log(_record(step))
    again.close()
    assert _lines(tmp_path / "killed") == _lines(tmp_path / "whole")
    events = [json.loads(line) for line in (tmp_path / "killed" / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("checkpoint", 6), ("restart", 6)] and all("time" in e for e in events)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_a_torn_line_and_a_fresh_start(tmp_path):
    """A torn last line goes even if its step would stay; a run started anew (resume_step 0) in the same folder starts an empty file."""
    _write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}')  # whole JSON, but its newline is missing: a number may be cut
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2]
    _write(tmp_path, [], resume_step=5)
    assert [json.loads(x)["step"] for x in _lines(tmp_path)] == [1, 2]
    _write(tmp_path, [1])
    assert len(_lines(tmp_path)) == 1


def test_floats_survive_bit_for_bit(tmp_path):
    """What is read back has the same 64 bits, not-a-number and infinity included; tensors and arrays count as numbers."""
    values = [0.1, 1 / 3, 1e-310, 5e-324, -0.0, 1.7976931348623157e308, math.inf, -math.inf, math.nan]
    sink = Metrics(tmp_path, LogConfig(), resolved=RESOLVED, console=False)
    for step, value in enumerate(values, 1):
        sink.log(
            {
                "step": step,
                "loss": value,
                "t": torch.tensor(value, dtype=torch.float64),
                "moe": {"active": torch.tensor([value, 1.0], dtype=torch.float64)},
            }
        )
    sink.close()
    for value, record in zip(values, read_records(tmp_path), strict=True):
        for found in (record["loss"], record["t"], record["moe"]["active"][0]):
            assert struct.pack("d", found) == struct.pack("d", value)


def test_only_rank_0_writes(tmp_path, capsys):
    """Another rank logs, marks events and closes, and leaves no trace."""
    sink = Metrics(tmp_path / "run", LogConfig(tensorboard=True), resolved=RESOLVED, rank=1)
    sink.log(_record(1))
    sink.event("restart")
    sink.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_deterministic_fields_are_those_that_repeat():
    """Timing goes, all else stays."""
    one = _record(3)
    other = _record(3, step_s=9.0, data_s=8.0, tokens_per_s=7.0) | {"memory_bytes": 5}
    assert one != other and deterministic_fields(one) == deterministic_fields(other)
    assert set(one) - set(deterministic_fields(one)) == {"step_s", "data_s", "tokens_per_s"}


def test_flatten():
    """Nested names, layers with two digits, booleans as numbers; no step, no text."""
    flat = flatten(_record(1, skipped=True, eval={"val": {"loss": 2.0, "perplexity": 7.4}}, note="text"))
    assert flat["moe/active/layer_00"] == 2.5 and flat["moe/dead/layer_01"] == 2 and flat["sources/code/loss"] == 2.0
    assert flat["eval/val/perplexity"] == 7.4 and flat["skipped"] == 1 and "step" not in flat and "note" not in flat


def test_load_of_each_expert():
    """Per cent of the even share: 0 only for none, whatever rounds to it is 1; an empty layer is all 0; and no curve for wandb."""
    assert relative_load([[300, 100, 0, 0], [99999, 1, 0, 0], [0, 0]]) == [[300, 100, 0, 0], [400, 1, 0, 0], [0, 0]]
    assert flatten({"step": 1, "load": [[100, 100]], "loss": 1.0}) == {"loss": 1.0}


def test_routing_file(tmp_path):
    """The newest picture of each part stays; a torn file is replaced."""
    write_routing(tmp_path, "train", 4, {"a": {"tokens": 3, "load": [[1, 2]]}})
    write_routing(tmp_path, "eval", 4, {"b": {"tokens": 5, "load": [[5, 0]]}})
    write_routing(tmp_path, "train", 8, {"a": {"tokens": 2, "load": [[2, 0]]}})
    found = json.loads((tmp_path / "routing.json").read_text())
    assert found == {
        "train": {"step": 8, "sets": {"a": {"tokens": 2, "load": [[2, 0]]}}},
        "eval": {"step": 4, "sets": {"b": {"tokens": 5, "load": [[5, 0]]}}},
    }
    (tmp_path / "routing.json").write_text('{"train": {')
    write_routing(tmp_path, "eval", 9, {})
    assert json.loads((tmp_path / "routing.json").read_text()) == {"eval": {"step": 9, "sets": {}}}


def test_console_every_n_steps(tmp_path, capsys):
    """The first step, every n-th, the last, skipped ones and evaluations have a line; on a pipe it is plain text."""
    sink = Metrics(tmp_path, LogConfig(every=10), resolved={"train": {"steps": 25}})
    for step in range(1, 26):
        sink.log(_record(step, skipped=step == 13, **({"eval": {"val": {"loss": 2.0, "perplexity": 7.389}}} if step == 15 else {})))
    sink.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == [
        "step 1/25",
        "step 10/25",
        "step 13/25 SKIPPED (not finite)",
        "  eval val: loss 2.0000 perplexity 7.39",
        "step 20/25",
        "step 25/25",
    ]
    Metrics(tmp_path, LogConfig(every=1), resolved=RESOLVED, console=False).log(_record(1))
    assert capsys.readouterr().out == ""


def test_console_line():
    """Every part, and a dense model's line without the parts it has not."""
    line = console_line(_record(4), steps=20, devices=4, step_s=0.5, data_s=0.01, tokens_per_s=41234.5)
    assert line == (
        "step 4/20 | loss 4.3333 (lm 0.7854 sparsity 0.25) | coef 0.001 | gnorm 0.5 | lr 7.5e-05 | 10.3k tok/s/dev | "
        "moe active 2.00 max/mean 1.50 dead 2 empty 1.0% probes 20.0% | data 2.0% | 0.5 s | eta 8s"
    )
    dense = {"step": 4, "loss": 2.0, "lm": 2.0, "grad_norm": 1.0, "lr": 1e-3}
    nan = math.nan
    assert (
        console_line(dense, steps=None, devices=1, step_s=nan, data_s=nan, tokens_per_s=nan)
        == "step 4 | loss 2.0000 (lm 2) | gnorm 1 | lr 0.001 | ? tok/s"
    )


@pytest.mark.parametrize("seconds, text", [(0.2, "0s"), (59.6, "1m"), (3600, "1h"), (3725, "1h2m"), (86400 * 2 + 3600 * 5, "2d5h")])
def test_duration(seconds, text):
    """Two units are enough."""
    assert metrics._duration(seconds) == text


def test_wandb_offline(tmp_path, monkeypatch):
    """The real wandb writes its offline file, under one id for a run and its resumption; WANDB_MODE wins over the config."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identities = []
    for resume in (0, 2):
        sink = Metrics(tmp_path, LogConfig(wandb=True, wandb_mode="online"), resolved=RESOLVED, resume_step=resume, console=False)
        assert set(sink._sinks) == {"wandb"}
        sink.log(_record(resume + 1))
        sink.close()
        identities.append((tmp_path / "wandb_id.txt").read_text())
    assert identities[0] == identities[1] != ""
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files and all(p.name == f"run-{identities[0]}.wandb" and p.stat().st_size > 0 for p in files)
    assert any(b"moe/active/layer_01" in p.read_bytes() for p in files)


def test_tensorboard(tmp_path):
    """TensorBoard's own reader finds the scalars; those after the step resumed from are hidden."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps in ((0, range(1, 6)), (3, range(4, 8))):
        sink = Metrics(tmp_path, LogConfig(tensorboard=True), resolved=RESOLVED, resume_step=resume, console=False)
        for step in steps:
            sink.log(_record(step, lr=float(step + 100 * resume)))
        sink.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("lr")] == [(1, 1), (2, 2), (3, 3), (4, 304), (5, 305), (6, 306), (7, 307)]
    assert accumulator.Scalars("moe/dead/layer_01")[0].value == 2


def test_sinks_count_events(tmp_path):
    """As curves: a restart or a skipped step shows where people look, also one that an earlier start or another rank has written."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    append_event(tmp_path, "watchdog", step=0, rank=1)
    sink = Metrics(tmp_path, LogConfig(tensorboard=True), resolved=RESOLVED, console=False)
    for step in (1, 2):
        sink.event("skipped", step=step)
        sink.log(_record(step))
    sink.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [e.value for e in accumulator.Scalars("events/skipped")] == [1, 2]
    assert [e.value for e in accumulator.Scalars("events/watchdog")] == [1, 1]
    assert not any("events" in key for record in read_records(tmp_path) for key in record)


def test_a_sink_that_breaks_is_switched_off(tmp_path, monkeypatch):
    """While it starts or while it logs: one warning, an event, and the JSONL goes on."""
    pytest.importorskip("tensorboard")

    def refuse(*args):
        raise ConnectionError("no route to host\nsecond line")

    for name in ("__init__", "log"):
        run = tmp_path / name
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(metrics._TensorBoard, name, refuse)
            sink = Metrics(run, LogConfig(tensorboard=True), resolved=RESOLVED, console=False)
            for step in (1, 2, 3):
                sink.log(_record(step))
            sink.close()
        assert [str(w.message) for w in caught] == ["tensorboard is off for the rest of this run: ConnectionError: no route to host"]
        assert len(_lines(run)) == 3 and "no route to host" in (run / "events.jsonl").read_text()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_sink_that_is_not_installed(tmp_path, monkeypatch, name):
    """Refused at the start, on every rank, with the extra to install; not asked for, it is not even looked at."""
    real = metrics.importlib.util.find_spec
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda n: None if n == name else real(n))
    for rank in (0, 1):
        with pytest.raises(ValueError, match=rf"log.{name}: true, but {name} is not installed: pip install 'moetrain\[report\]'"):
            Metrics(tmp_path, LogConfig(**{name: True}), resolved=RESOLVED, rank=rank)
    Metrics(tmp_path, LogConfig(), resolved=RESOLVED, console=False).close()


def test_plots(tmp_path):
    """Two PNGs for a mixture, one for a dense run; a run without records is refused."""
    pytest.importorskip("matplotlib")
    sink = Metrics(tmp_path, LogConfig(), resolved=RESOLVED, console=False)
    with pytest.raises(ValueError, match="has no records yet"):
        plots(tmp_path, tmp_path / "out")
    for step in range(1, 6):
        sink.log(
            _record(
                step,
                skipped=step == 2,
                loss=math.nan if step == 2 else 1.0,
                **({"eval": {"val": {"loss": 2.0, "perplexity": 7.4}}} if step in (2, 4) else {}),
            )
        )
    sink.close()
    paths = plots(tmp_path, tmp_path / "out")
    assert [p.name for p in paths] == ["loss.png", "active_experts.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size > 5000 for p in paths)
    dense = Metrics(tmp_path / "dense", LogConfig(), resolved=RESOLVED, console=False)
    dense.log({"step": 1, "loss": 2.0, "lm": 2.0})
    dense.close()
    assert [p.name for p in plots(tmp_path / "dense", tmp_path / "out2")] == ["loss.png"]


def test_plots_of_nothing(tmp_path):
    """A folder that is no run's is named."""
    with pytest.raises(ValueError, match="metrics.jsonl does not exist"):
        plots(tmp_path, tmp_path)
