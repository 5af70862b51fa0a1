"""Signals that ask a run to save and end: all ranks save at the same step, and `status.json` in the run's folder says how the run ended.

A handler only notes the signal. At each step boundary the ranks take the maximum of what they noted, so one rank that was told is enough and
none saves alone. Nothing here imports torch before it is needed: `listen` should come first in a process, when a signal would still end it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moetrain.files import read_json

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

STATUS = "status.json"
SIGNALS = ("TERM", "USR1", "USR2", "HUP")
"""What `listen` can be asked for, without SIG."""

_noted: list[int] = []


class _Run(Protocol):
    rank: int
    group: dist.ProcessGroup | None
    device: torch.device
    step: int
    stopped: str | None


def listen(names: Sequence[str]) -> None:
    """Note these signals from now on (names of `SIGNALS`); one that an earlier call asked for and this one does not gets its default back.

    To be called by the main thread. A signal that was ignored when the process started is noted too: launchers are told to ignore what is
    meant for their workers.
    """
    for name in SIGNALS:
        number = getattr(signal, f"SIG{name}")
        if name in names:
            signal.signal(number, _note)
        elif signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: object) -> None:
    # Once is enough: signals that come again, even during the save, change nothing.
    if number not in _noted:
        _noted.append(number)


def agreed(group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """Name of the signal that some rank has noted, the same answer on all ranks; None: go on. Collective over `group` (None: this process)."""
    number = max(_noted, default=0)
    if group is not None:
        import torch
        import torch.distributed as dist

        told = torch.tensor([number], dtype=torch.int32, device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        number = int(told.item())
    return signal.Signals(number).name.removeprefix("SIG") if number else None


@contextmanager
def reporting(run_dir: str | Path, run: _Run) -> Iterator[None]:
    """Rank 0 writes `status.json`: "running", then "finished", "preempted" or "failed". `run.stopped` is what `agreed` said last. Collective.

    Leaving it means that everything is saved; from then on the signals are ignored, so that one that comes while the interpreter ends can't turn
    a saved run into a failed one. Raises OSError where the file can't be written.
    """
    first = run.step

    def write(state: str, **fields: Any) -> None:
        if run.rank == 0:
            write_status(run_dir, state, step=run.step, steps_done=run.step - first, **fields)

    write("running")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk may be what failed
            write("failed", error=first_line(error))
        raise
    for name in SIGNALS:
        if signal.getsignal(getattr(signal, f"SIG{name}")) is _note:
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    if run.stopped is None:
        write("finished")
    else:
        write("preempted", signal=run.stopped)
    agreed(run.group, run.device)  # no rank ends before the file is there: what started it looks for it then


def first_line(error: BaseException) -> str:
    """Class and first line of an error."""
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def write_status(run_dir: str | Path, state: str, **fields: Any) -> None:
    """Replace `status.json`. Raises OSError."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = {"state": state, **fields, "host": socket.gethostname(), "time": now}
    path = Path(run_dir) / STATUS
    written = path.with_name(f"{STATUS}.{os.getpid()}.tmp")
    # One line with the state first: scripts look for it with grep.
    written.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    written.replace(path)


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """What `reporting` wrote last; None where there is nothing that can be read."""
    try:
        found = read_json(Path(run_dir) / STATUS)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
