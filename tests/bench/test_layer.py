"""`moetrain bench`: the tables have their rows and columns, and wrong words are refused in one line. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moetrain.bench import layer, measure
from moetrain.bench.contestants import dense, ours
from moetrain.bench.problem import Shape, make
from moetrain.bench.rivals import RIVALS
from moetrain.cli import main
from moetrain.moe.dispatch import LocalDispatcher

TINY, VARIABLE = Shape(48, 32, 16, 8, 2), Shape(48, 32, 16, 8, 3, variable=True)


@pytest.mark.parametrize("subject", ["layer", "kernels"])
def test_a_quick_run(subject: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Tiny shapes through the program: rows for each layer that runs, a reason for each that does not, the same in the file."""
    words = ["bench", subject, "--shapes", "48,32,16,8,2", "48,32,16,8,~3", "--dtypes", "bfloat16", "--rounds", "2"]
    words += ["--json", str(tmp_path / "a/b.json")]
    assert main([*words, *(["--plot", str(tmp_path / "b.png")] if subject == "layer" else [])]) == 0
    said = capfd.readouterr().out
    data = json.loads((tmp_path / "a/b.json").read_text())
    assert data["machine"]["packages"]["torch"] == torch.__version__ and data["command"].startswith(f"moetrain bench {subject} --shapes")
    rows = data["tables"][0]["rows"]
    if subject == "kernels":
        operators = {"route", "permute", "combine", "swiglu", "swiglu_backward", "swiglu_dot"}
        assert operators <= {r["operator"] for r in rows} and all(r["ms"] > 0 for r in rows)
        return
    assert (tmp_path / "b.png").stat().st_size > 1000
    assert {(r["shape T,D,F,E,k"], r["routing"]) for r in rows} == {(s, r) for s in ("48,32,16,8,2", "48,32,16,8,~3") for r in layer.ROUTINGS}
    for name in (layer.OURS, layer.DENSE):
        assert sum(r["layer"] == name for r in rows) == 6 and name in said
    for name in RIVALS:
        assert any(r["layer"] == name for r in rows) or any(note.startswith(f"{name}: ") for note in data["tables"][0]["notes"]), name
    assert all(r["of dense"] == 1 for r in rows if r["layer"] == layer.DENSE) and all(r["ms"] > 0 and r["GFLOP/s"] > 0 for r in rows)
    routes = {(r["layer"], r["routing"]): r["GFLOP/s"] * r["ms"] * 1e6 / (18 * 32 * 16) for r in rows if r["shape T,D,F,E,k"] == "48,32,16,8,~3"}
    for (name, routing), found in routes.items():
        own = layer.count_routes(make(VARIABLE, torch.bfloat16, routing))
        fixed = name.startswith("HF") or (name, routing) == ("Megatron-Core", "router")
        assert name == layer.DENSE or found == pytest.approx(48 * 3 if fixed else own), f"a rate is that of the layer's own routes: {name}, {routing}"
    assert [r["ste"] for r in data["tables"][1]["rows"]] == ["off", "sampled, 0.25", "exact"]


def test_count_of_the_real_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of a row are those of the routes that the layer's own router makes."""
    problem = make(Shape(512, 64, 8, 8, 3, variable=True), torch.float32, "router")
    seen: list[int] = []
    original = LocalDispatcher.dispatch
    monkeypatch.setattr(
        LocalDispatcher, "dispatch", lambda self, x, routing: (seen.append(int(routing.decision.active.sum())), original(self, x, routing))[1]
    )
    ours(problem).forward()
    assert seen == [layer.count_routes(problem)] and 2 < seen[0] / 512 < 4


def test_a_clock_that_stands_still_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four short steps seem to take no time: none of them is the shortest."""
    times = iter([0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(measure, "clock", lambda: next(times))
    assert measure.best_of(lambda: None, seconds=0.0, at_least=4) == 2.0


def test_memory_is_what_a_forward_allocates() -> None:
    """A dense FFN keeps gate, up, silu(gate) and their product; the output is not counted."""
    problem = make(TINY, torch.float32, "balanced")
    kept, peak = measure.memory(dense(problem, 64).forward)
    assert kept == 4 * 48 * 64 * 4 and peak >= kept


def test_the_layer_keeps_its_bound() -> None:
    """At 8 routes per token: input, pre-activations and the route list, and at most 15 % more."""
    shape = Shape(512, 64, 64, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(shape, dtype, "balanced")
        kept, _ = measure.memory(ours(problem).forward)
        assert 1 <= (kept + problem.x.nbytes) / layer.bound_bytes(problem, 512 * 8) <= 1.15


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "subject"),
        (["layers"], "layers"),
        (["layer", "--shapes", "1,2,3"], "'1,2,3' is neither"),
        (["layer", "--shapes", "8,8,8,2,3"], "wants 3 routes per token of 2 experts"),
        (["layer", "--rounds", "0"], "rounds"),
        (["layer", "--dtypes", "float64"], "float64"),
        (["kernels", "--plot", "x.png"], "--plot draws the subject layer"),
        (["dispatch", "--device", "cuda"], "--device cuda goes with layer and kernels, not dispatch"),
        *([] if torch.cuda.is_available() else [(["layer", "--device", "cuda"], "torch finds no CUDA device")]),
    ],
)
def test_wrong_words(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    error = capfd.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
