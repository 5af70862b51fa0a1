"""One run at a time in a folder, and no endless restarts: what is checked before a run begins.

Launchers and schedulers start a failed run again, which is right as long as it comes further each time. torchrun restarts after every status but 0,
so no status can stop it; but each start is counted here, and one too many ends in seconds, with a line that says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from moetrain.config import ConfigError
from moetrain.records import append_event

STARTS, LOCK = "starts.json", "lock"
# What launchers and schedulers that start a run by themselves leave in its environment.
_AGAIN = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "JOB_COMPLETION_INDEX")
_PATIENCE = 60.0  # seconds that ranks whose launcher was killed may take to save and end


def count_start(run_dir: Path | str, step: int) -> int:
    """This start's number among those from the same checkpoint (0: from none), in a row; kept in RUN/starts.json. A start that nothing but a person
    can have made is not counted: 0."""
    if not any(name in os.environ for name in _AGAIN):
        return 0
    path = Path(run_dir) / STARTS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        starts = before["starts"] + 1 if before["step"] == step else 1
    except (OSError, ValueError, KeyError, TypeError):
        starts = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{STARTS}.tmp")
    written.write_text(json.dumps({"step": step, "starts": starts}) + "\n", encoding="utf-8")
    written.replace(path)
    return starts


class NoProgress(ConfigError):
    """A run that was started too often without coming further; status.json says `"retry": false` for scripts that would start it again."""


def refuse(run_dir: Path | str, step: int, limit: int, rank: int) -> NoReturn:
    """End a run that does not come further. Raises NoProgress on every rank; rank 0 tells events.jsonl."""
    text = (
        f"run_dir {run_dir}: started {limit} times in a row from step {step} without a new checkpoint (watchdog.max_starts); events.jsonl and the "
        f"log say what ended it. To start again, remove {Path(run_dir) / STARTS}"
    )
    if rank == 0:
        append_event(run_dir, "no_progress", step=step, starts=limit)
    raise NoProgress(text)


@contextlib.contextmanager
def alone(run_dir: Path | str) -> Iterator[None]:
    """Hold RUN/lock, which the system takes back from a process that ends in whatever way. Waits for a run that is about to end.

    Raises ConfigError if another process keeps it. On a file system without locks nothing is held.
    """
    path = Path(run_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir}: can't be made a folder: {error.strerror}; choose another run_dir") from None
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir}: can't be written: {error.strerror}; choose another run_dir") from None
    try:
        _take(handle, run_dir)
        yield
    finally:
        os.close(handle)


def _take(handle: int, run_dir: Path | str) -> None:
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() - began > _PATIENCE:
                raise ConfigError(f"run_dir {run_dir}: in use by {holder}; wait for its end or stop it, or choose another run_dir") from None
            if not told:
                print(f"moetrain: run_dir {run_dir} is in use by {holder}; waiting for its end", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
            continue
        except OSError:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} of {socket.gethostname()}\n".encode(), 0)
        return
