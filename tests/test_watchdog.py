"""A rank that hangs ends with a word on where, whatever it hangs in, and only then; it names the rank that it waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain.config import WatchdogConfig
from moetrain.preempt import read_status
from moetrain.watchdog import ENDED, Watchdog, collective_of

ROOT = Path(__file__).resolve().parents[1]
NO_LIMITS = {"start_seconds": 0.0, "step_seconds": 0.0, "checkpoint_seconds": 0.0}


def child(folder: Path, limits: dict[str, float], code: str, **environment: str) -> subprocess.Popen[str]:
    """A process with a watchdog `w`, that has read its own code; it prints "up" first."""
    text = (
        "import os, sys, time\nfrom moetrain.config import WatchdogConfig\nfrom moetrain.watchdog import Watchdog\n"
        f"w = Watchdog(WatchdogConfig(**{({**NO_LIMITS, **limits})!r}), {str(folder)!r}, rank=int(os.environ.get('RANK', 0)), "
        f"world=int(os.environ.get('WORLD_SIZE', 1)), collective_seconds=2)\nw.loads = [[3.0, 5.0]]\nw.start()\nprint('up', flush=True)\n{code}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "code", "doing"),
    [
        ("start", "w.part('weights')\nlong_sleep()", "start, weights"),
        ("step", "w.enter('step', 8, 'data')\nw.part('optimizer')\nlong_sleep()", "step 8, optimizer"),
        ("checkpoint", "w.enter('checkpoint', 8)\nlong_sleep()", "step 8, checkpoint"),
        # A thread writes; training goes on beside it.
        ("checkpoint", "w.saving = lambda: 6\nwhile True:\n    w.enter('step', 9)\n    time.sleep(0.01)", "step 6, writing the checkpoint"),
    ],
)  # fmt: skip
def test_limits(kind: str, code: str, doing: str, tmp_path: Path) -> None:
    """Each has its own limit; the stacks, the routes of the last step, an event and status.json tell of it; the others' limits do nothing."""
    long_sleep = "def long_sleep():\n    while True:\n        time.sleep(60)\n"
    process = child(tmp_path, {f"{kind}_seconds": 0.3}, long_sleep + code)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == ENDED, said
    assert f"moetrain: error: {doing}: 0." in said and f"over watchdog.{kind}_seconds (0.3)" in said and "the only rank" in said
    stacks = (tmp_path / "watchdog/rank00000.stacks.txt").read_text()
    assert "rank 0 of 1" in stacks and "routes per expert in the last step, MoE layer 0: 3 5\n" in stacks
    for text in (stacks, said):
        assert 'File "<string>"' in text and ("long_sleep" in text or "writing" in doing)
    (event,) = events(tmp_path)
    assert (event["event"], event["rank"], event["limit"], event["doing"]) == ("watchdog", 0, kind, doing)
    assert read_status(tmp_path)["state"] == "failed" and doing in read_status(tmp_path)["error"]


def test_a_run_that_moves_lives(tmp_path: Path) -> None:
    """Many steps, each under the limit, together over it; time in which the process itself was stopped, longer than the limit, does not count."""
    code = "for i in range(7):\n    w.enter('step', i)\n    for _ in range(25):\n        time.sleep(0.02)\n        print(i, flush=True)\nw.close()"
    process = child(tmp_path, {"step_seconds": 2.0}, code)
    assert process.stdout is not None
    for _ in range(15):  # in the middle of a step that the watchdog has seen
        assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert not (tmp_path / "events.jsonl").exists()


def test_peers_follow(tmp_path: Path) -> None:
    """One rank breaches its limit; the other, which would hang for ever, leaves its stacks and ends too, and both name who is where."""
    shared = {"WORLD_SIZE": "2"}
    waiting = child(tmp_path, {"start_seconds": 0.0}, "w.enter('step', 8, 'optimizer')\ntime.sleep(600)", RANK="1", **shared)
    hanging = child(tmp_path, {"step_seconds": 1.0}, "w.enter('step', 9, 'data')\ntime.sleep(600)", RANK="0", **shared)
    said = [p.communicate(timeout=120)[1] for p in (hanging, waiting)]
    assert (hanging.returncode, waiting.returncode) == (ENDED, ENDED), said
    assert "moetrain rank 0: error: step 9, data: 1." in said[0] and "elsewhere: rank 1 (" in said[0] and ": step 8, optimizer, code of no" in said[0]
    assert "moetrain rank 1: error: step 8, optimizer: another rank has ended the run" in said[1]
    assert [(e["event"], e["rank"]) for e in events(tmp_path)] == [("watchdog", 0), ("peer_ended", 1)]
    assert "step 8, optimizer" in (tmp_path / "watchdog/rank00001.stacks.txt").read_text()


def test_asked_to_end_in_a_hang(tmp_path: Path) -> None:
    """torchrun asks a rank to end which hangs in C code, so that no handler of Python's runs: it says where it hangs before it is killed."""
    # Without the handler's return to Python a collective of gloo hangs just so.
    code = "import ctypes, signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\nw.enter('step', 3, 'data')\nprint('ready', flush=True)\n"
    code += "while True:\n    ctypes.CDLL(None).sleep(600)"
    process = child(tmp_path, {}, code, TORCHELASTIC_RUN_ID="x", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    stacks = tmp_path / "watchdog/rank00000.stacks.txt"
    while not stacks.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    said = process.communicate(timeout=120)[1]
    assert "step 3, data: asked to end" in said and "but still in" in said


def test_the_launcher_is_gone(tmp_path: Path) -> None:
    """A rank whose launcher was killed asks itself to save and end."""
    code = (
        "import signal, subprocess, sys\n"
        f"inner = '''import os, signal, sys, time\\nsys.path.insert(0, {str(ROOT)!r})\\n"
        "from moetrain.config import WatchdogConfig\\nfrom moetrain.watchdog import Watchdog\\n"
        "came = []\\nsignal.signal(signal.SIGTERM, lambda *_: came.append(1))\\n"
        f"w = Watchdog(WatchdogConfig(), {str(tmp_path)!r}, rank=1, world=2, collective_seconds=1)\\nw.start()\\nprint(1, flush=True)\\n"
        f"while not came:\\n    time.sleep(0.01)\\nopen({str(tmp_path / 'told')!r}, 'w').close()'''\n"
        "p = subprocess.Popen([sys.executable, '-c', inner], stdout=subprocess.PIPE)\np.stdout.readline()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    process = child(tmp_path, {}, code, TORCHELASTIC_RUN_ID="x")
    assert process.wait(120) == -signal.SIGKILL
    while not (tmp_path / "told").exists():
        time.sleep(0.02)
    assert [(e["event"], e["rank"]) for e in events(tmp_path)] == [("launcher_gone", 1)]
    process.communicate()


def test_who_is_silent(tmp_path: Path) -> None:
    """By the files of the others: silent by the age of the file, elsewhere by what it says, or no file at all; else it is the network."""
    watchdog = Watchdog(WatchdogConfig(**NO_LIMITS), tmp_path, rank=1, world=8, collective_seconds=20)
    assert "not known" in watchdog.others()
    (tmp_path / "watchdog").mkdir()
    watchdog.enter("step", 5, "data")
    assert watchdog.others() == "no word of: rank 0; rank 2; rank 3; rank 4; and 3 more"
    for rank in range(8):
        told = {"host": "h", "pid": 7, "doing": "step 5, data", "where": "here"}
        path = tmp_path / f"watchdog/rank{rank:05d}.json"
        path.write_text(json.dumps(told))
    assert "the other 7 wait in the same place, so look at the network" in watchdog.others()
    path.write_text(json.dumps({**told, "doing": "step 4, optimizer"}))
    past = time.time() - 100
    os.utime(tmp_path / "watchdog/rank00002.json", (past, past))
    said = watchdog.others()
    assert said.startswith("silent: rank 2 (h, process 7): step 5, data, here, silent for 100.") and said.endswith(
        "s; elsewhere: rank 7 (h, process 7): step 4, optimizer, here"
    )


def test_collective_of() -> None:
    """Who called which collective, out of a traceback; other errors, also from within torch.distributed, are none."""

    def raised(error: Exception, file: str) -> BaseException:
        scope: dict[str, Any] = {"error": error}
        exec(compile("def wait():\n    raise error\ndef all_reduce():\n    wait()", "/x/torch/distributed/distributed_c10d.py", "exec"), scope)
        exec(compile("def step():\n    all_reduce()", file, "exec"), scope)
        try:
            scope["step"]()
        except Exception as found:
            return found
        raise AssertionError

    ours = str(ROOT / "moetrain/moe/x.py")
    assert collective_of(raised(RuntimeError("[/gloo/pair.cc:5] Connection closed by peer"), ours)) == "all_reduce (moe/x.py:2, step)"
    assert collective_of(raised(RuntimeError("Application timeout caused pair closure"), ours)) == "all_reduce (moe/x.py:2, step)"
    wrapped = ValueError("y")
    wrapped.__cause__ = raised(RuntimeError("[/gloo/pair.cc:5] closed"), ours)
    assert collective_of(wrapped) == "all_reduce (moe/x.py:2, step)"
    assert collective_of(raised(RuntimeError("gloo"), "/elsewhere.py")) == "a collective"
    assert collective_of(raised(ValueError("Split sizes doesn't match"), ours)) is None
    # Without a thread (a library's user) nothing ends.
    Watchdog(WatchdogConfig(), "nowhere").failed(raised(RuntimeError("gloo"), ours))
