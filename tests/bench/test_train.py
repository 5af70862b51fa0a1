"""`moetrain bench train`: a config's own steps, taken apart; nothing is left where its run would be. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.profiler import DeviceType

from moetrain.bench.train import COPY, HIDDEN, KINDS, REST, STEP, WAIT, account, kind_of
from moetrain.cli import main
from moetrain.config import to_yaml
from moetrain.moe import dispatch
from tests.test_train import make_config, write_data


def test_a_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    config = make_config(tmp_path, "sampled", (1, 1, 1), train__steps=9)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    words = ["bench", "train", "--config", str(tmp_path / "c.yaml"), "--rounds", "2"]
    assert main([*words, "--train.lr", "1e-4", "--json", str(tmp_path / "t.json")]) == 0
    first, second, third = (t["rows"] for t in json.loads((tmp_path / "t.json").read_text())["tables"])
    assert [r["part"] for r in first] == ["data", "forward, backward, gradient norm", "optimizer, records", "step"]
    assert [r["kind"] for r in second] == [*KINDS, REST, "outside operators", HIDDEN]
    assert abs(sum(r["share"] for r in second[:-1]) - 1) < 1e-6 and second[-1]["ms"] == 0
    assert all(second[i]["ms"] > 0 for i in (0, 1, 3, 4)) and third and all(r["operator"] != STEP for r in third)
    assert not Path(config.run_dir).exists()
    capfd.readouterr()
    assert main([*words, "--train.steps", "4"]) == 2 and "train.steps (4): --rounds 2 takes 6 steps" in capfd.readouterr().err
    assert main([*words, "--train.stepz", "4"]) == 2 and "did you mean train.steps?" in capfd.readouterr().err


def test_kinds() -> None:
    names = {"aten::mm": "GEMM", "moetrain::experts_backward": "GEMM", "gloo:all_reduce": "communication", "aten::mul": REST, WAIT: "communication"}
    names["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] = "attention"
    # The dispatcher's own functions, by their classes, in which a rank waits for others.
    exchanges = (dispatch._Dispatch, dispatch._Combine)
    names |= {f"{function.__name__}Backward": "communication" for function in exchanges}
    assert {name: kind_of(name) for name in names} == names


def event(name: str, start: float, end: float, own: float = 0, *, thread: int = 1, device: DeviceType = DeviceType.CPU, **more: Any) -> Any:
    """As much of torch's FunctionEvent as `account` reads; own: what its children leave of its time."""
    fields = {"is_async": False, "is_user_annotation": False, "cpu_children": [], "cpu_parent": None, "kernels": [], **more}
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, thread=thread, device_type=device, self_cpu_time_total=own, **fields)


def test_time_of_the_host() -> None:
    """The step is [100, 200]. Its thread has operators in [105, 130] and [150, 180], and waits for a collective from 140 on; another thread's
    operators don't count, and a collective where the thread was not waiting is hidden."""
    first, inner, second = event("aten::linear", 105, 130, 5), event("aten::mm", 110, 130, 20), event("aten::add", 150, 180, 30)
    step = event(STEP, 100, 200, 45, cpu_children=[first, second])
    others = [
        event("gloo:all_reduce", 135, 145, is_async=True), event("gloo:all_reduce", 140, 155, is_async=True),
        event("gloo:all_gather", 160, 170, is_async=True), event("aten::copy_", 135, 150, 15, thread=2),
    ]  # fmt: skip
    found = account([step, first, inner, second, *others], on_device=False)  # type: ignore[arg-type]
    assert {k: v for k, v in found.own.items() if v} == {"aten::linear": 5, "aten::mm": 20, "aten::add": 30, WAIT: 15}
    # Hidden: [150, 155] and [160, 170].
    assert (found.outside, found.hidden, found.whole) == (30, 15, 100) and sum(found.own.values()) + found.outside == found.whole


def test_copies_of_the_exchange_are_communication() -> None:
    """Those that the dispatcher makes itself; not those within its other operators, nor another function's."""
    dispatch, other = event("_DispatchBackward", 100, 150, 1), event("_ExpertsBackward", 150, 200, 1)
    clone, listing = event("aten::clone", 100, 120, 2, cpu_parent=dispatch), event("aten::nonzero_static", 120, 150, 3, cpu_parent=dispatch)
    copies = [event("aten::copy_", 100, 110, own, cpu_parent=parent) for own, parent in ((5, clone), (7, listing), (11, other), (13, dispatch))]
    step = event(STEP, 100, 200, cpu_children=[dispatch, other])
    found = account([step, dispatch, other, clone, listing, *copies], on_device=False)  # type: ignore[arg-type]
    assert found.own[COPY] == 2 + 5 + 13 and found.own["aten::copy_"] == 7 + 11 and kind_of(COPY) == "communication"


def test_waiting_in_an_operator_is_not_hidden() -> None:
    """A collective from 110 to 190, over an operator that waits for it, [120, 150], one that computes, [150, 170], and nothing."""
    waiting, second = event("c10d::allreduce_", 120, 150, 30), event("aten::add", 150, 170, 20)
    step = event(STEP, 100, 200, 50, cpu_children=[waiting, second])
    found = account([step, waiting, second, event("gloo:all_reduce", 110, 190, is_async=True)], on_device=False)  # type: ignore[arg-type]
    assert found.hidden == 20 and found.own[WAIT] == 30 and found.outside == 20


def test_time_of_the_device() -> None:
    """A kernel counts once, for the operator that launched it, also from another thread; the device is idle where no kernel runs, and a named range
    is no kernel."""
    kernel = {"thread": 7, "device": DeviceType.CUDA}
    kernels = [event("gemm", 110, 150, **kernel), event("ncclDevKernel_AllGather", 140, 160, **kernel), event("relu", 165, 170, **kernel)]
    shadow = event("FSDP::forward", 100, 190, **kernel, is_user_annotation=True)
    named = event("FSDP::forward", 100, 102, 2, kernels=[SimpleNamespace(name="FSDP::forward", duration=90)])
    launched = [
        event(name, 100, 101, 1, thread=thread, kernels=[SimpleNamespace(name=k.name, duration=k.time_range.end - k.time_range.start)])
        for name, thread, k in zip(("aten::mm", "c10d::allgather_", "aten::relu"), (1, 1, 2), kernels, strict=True)
    ]
    found = account([event(STEP, 100, 200), named, shadow, *launched, *kernels], on_device=True)  # type: ignore[arg-type]
    assert {k: v for k, v in found.own.items() if v} == {"aten::mm": 40, "c10d::allgather_": 20, "aten::relu": 5}
    assert (found.outside, found.hidden, found.whole) == (45, 10, 100)
