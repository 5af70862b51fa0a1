"""`moetrain bench`: the tables have their rows and columns, every contestant computes the same layer, and wrong words are refused in one line.
No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.bench import layer, measure
from moetrain.bench.rivals import RIVALS, Shape, Unavailable, dense, make, ours
from moetrain.cli import main
from moetrain.moe.dispatch import LocalDispatcher

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(48, 32, 16, 8, 2)


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts a process group, which would stay for every later test; it has a process of its own below."""
    monkeypatch.delitem(RIVALS, "DeepSpeed")


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
    assert [r["ste"] for r in data["tables"][1]["rows"]] == ["off", "sampled, 0.25", "exact"]


@pytest.mark.parametrize("routing", ["balanced", "skew", "router"])
def test_contestants_compute_the_same_layer(routing: str) -> None:
    """On the same weights and routes: else the comparison is of different things."""
    problem = make(TINY, torch.float32, routing)
    expected = ours(problem).forward()
    compared = 0
    for name, build in RIVALS.items():
        try:
            found = build(problem).forward()
        except Unavailable:
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    if compared == 0:
        pytest.skip("no rival is installed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("routing", ["balanced", "router"])
def test_contestants_compute_the_same_layer_on_a_gpu(routing: str) -> None:
    """As on the CPU, in the dtype of their kernels; and what a forward holds is counted there too."""
    device, shape = torch.device("cuda", 0), Shape(256, 128, 64, 8, 2)
    problem, alike = make(shape, torch.bfloat16, routing, device=device), make(shape, torch.bfloat16, routing)
    expected = ours(alike).forward().float()
    for name, build in {"ours": ours, **RIVALS}.items():
        try:
            contestant = build(problem)
        except Unavailable:
            continue
        found = contestant.forward().float().cpu()
        assert (found - expected).abs().max() < 0.05 * expected.abs().max(), name
        contestant.step()
        kept, peak = measure.memory(contestant.forward, device)
        assert peak >= kept > 0, name


def test_deepspeed_computes_the_same_layer() -> None:
    pytest.importorskip("deepspeed")
    program = """
import torch
from moetrain.bench.rivals import Shape, deepspeed_moe, make, ours
for k in (2, 3):
    problem = make(Shape(48, 32, 16, 8, k), torch.float32, "router")
    torch.testing.assert_close(deepspeed_moe(problem).forward(), ours(problem).forward(), rtol=1e-4, atol=1e-5)
torch.distributed.destroy_process_group()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_routes_are_what_they_are_called() -> None:
    shape = Shape(4096, 8, 8, 16, 4)
    for routing, ratio in (("balanced", 1.0), ("skew", 8.0)):
        problem = make(shape, torch.float32, routing)
        assert (problem.active.sum(1) == 4).all() and torch.equal(torch.zeros_like(problem.active).scatter(1, problem.chosen, True), problem.active)
        load = problem.active.sum(0).double()
        assert load[:8].mean() / load[8:].mean() == pytest.approx(ratio, rel=0.05)
        assert load[:8].std() / load[:8].mean() < 0.1
    variable = make(Shape(4096, 8, 8, 8, 3, variable=True), torch.float32, "balanced").active.sum(1)
    assert variable.double().mean() == pytest.approx(3, rel=0.03) and variable.min() == 0 and variable.max() >= 7


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
