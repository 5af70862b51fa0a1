"""A thread on each rank that ends a run which hangs, and says where it hung: which rank, in which part of which step, in which collective.

Every rank watches itself against three limits: the start (until the first step is done), a step (an evaluation counts batch by batch), and a
checkpoint. On a breach it writes all Python stacks (RUN/watchdog/rankNNNNN.stacks.txt and standard error) and an event, has the other ranks do the
same, and ends its process with `ENDED`, so that the launcher starts the ranks again. A collective that fails, because a peer died or was silent for
longer than parallel.timeout_seconds, ends the rank with the same words.

Beside its stacks each rank keeps RUN/watchdog/rankNNNNN.json, what it is doing, renewed all the time. A rank that waits for another reads there
which one is silent (stopped, or its machine is gone) and which is elsewhere. Nothing here is a collective, and no file is needed to end a rank.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from moetrain.config import WatchdogConfig
from moetrain.preempt import write_status
from moetrain.records import append_event

ENDED = 70
"""Exit status of a rank that was ended here."""

FOLDER = "watchdog"
_SHOWN = 4  # ranks that a message names
_LONGEST_TICK, _TICKS = 15.0, 20  # seconds; ticks in the shortest limit

Kind = Literal["start", "step", "checkpoint"]


class Watchdog:
    """What the rank is doing, and the thread that looks at it. Without `start` it only remembers."""

    def __init__(self, config: WatchdogConfig, run_dir: Path | str, *, rank: int = 0, world: int = 1, collective_seconds: float = 0.0) -> None:
        """collective_seconds: parallel.timeout_seconds; a rank's word must be newer than that when its peers look for it."""
        self.limits: dict[Kind, float] = {"start": config.start_seconds, "step": config.step_seconds, "checkpoint": config.checkpoint_seconds}
        self.run_dir, self.rank, self.world = Path(run_dir), rank, world
        self.loads: list[list[float]] = []
        """Routes per expert of each MoE layer in the last step that was done, over all ranks."""
        self.saving: Callable[[], int | None] = lambda: None
        """Step of the checkpoint that a thread is writing; None: of none."""
        self._tick = min([_LONGEST_TICK] + [s / _TICKS for s in (*self.limits.values(), collective_seconds) if s])
        self._doing: tuple[int, Kind, int, str] = (0, "start", 0, "")
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident
        self._host = socket.gethostname()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # After SIGTERM torchrun waits so long, then kills; 30 s if it is because another rank has failed.
        self._grace = min(30.0, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))) if self._parent is not None else None
        self._ending = threading.Lock()

    # --------------------------------------------------------------------------------------------- told by the training thread

    def enter(self, kind: Kind, step: int, part: str = "") -> None:
        """The clock of `kind` begins anew. step: the one in work, from 1."""
        self._doing = (self._doing[0] + 1, kind, step, part)

    def part(self, part: str) -> None:
        """What the step has come to; its clock goes on."""
        self._doing = (*self._doing[:3], part)

    @property
    def doing(self) -> str:
        """In words."""
        _, kind, step, part = self._doing
        if kind == "start":
            return "start" + (f", {part}" if part else "")
        return f"step {step}, {part or kind}"

    # ------------------------------------------------------------------------------------------------------------------ thread

    def start(self) -> None:
        """Begin to watch. To be called by the main thread, after the signals have their handlers. A run_dir that can't be written costs the
        stacks in files, no more."""
        assert self._thread is None, "started twice"
        if not faulthandler.is_enabled():
            with suppress(ValueError, OSError, AttributeError):  # standard error is no file
                faulthandler.enable()  # a stack for SIGSEGV, SIGBUS (a mapped data file was cut) and SIGABRT too
        with suppress(OSError):
            (self.run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._began = time.time()
        # Signals reach Python code when the main thread comes back to it; this one must see them while that hangs in a collective.
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._old_wakeup: int | None = None
        if threading.current_thread() is threading.main_thread():  # Python's own rule
            self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._beat(0.0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        if self._thread is None:
            return
        if self._old_wakeup is not None:
            signal.set_wakeup_fd(self._old_wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._read)
        os.close(self._write)
        self._thread = None
        with suppress(OSError):
            self._path("json").unlink(missing_ok=True)

    def _watch(self) -> None:
        # Seconds are added up by ticks, so that the time in which this process itself was stopped does not count.
        serial, seconds, step_saved, saving = self._doing[0], 0.0, None, 0.0
        asked: tuple[int, float] | None = None  # (serial, time) when a signal came
        before = time.monotonic()
        while True:
            self._arm()
            ready, _, _ = select.select([self._read], [], [], self._tick)
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._tick), now
            if ready:
                numbers = os.read(self._read, 4096)
                if 0 in numbers:
                    return
                asked = asked or (self._doing[0], now)
            number, kind, *_ = self._doing
            serial, seconds = (number, 0.0) if number != serial else (serial, seconds + passed)
            writing = self.saving()
            step_saved, saving = (writing, 0.0) if writing != step_saved or writing is None else (writing, saving + passed)
            self._beat(seconds)
            if 0 < self.limits[kind] <= seconds:
                self._breach(kind, seconds, self.doing)
            if 0 < self.limits["checkpoint"] <= saving:
                self._breach("checkpoint", saving, f"step {writing}, writing the checkpoint")
            if asked is not None and self._grace is not None and asked[0] == number and now - asked[1] > 0.6 * self._grace:
                # Not ended here: what it waits for may still come; else the launcher ends it, and this is the last word.
                self._say(f"{self.doing}: asked to end {now - asked[1]:.1f} s ago, but still in {self.where()}; {self.others()}")
                self.dump("asked to end, and has not")
                asked = None
            if self._peer_ended() and self._ending.acquire(blocking=False):
                # Without that rank this one could only wait until its own limit, or until the launcher's patience is at its end.
                place = self.where()
                self._say(f"error: {self.doing}: another rank has ended the run; ending as well, in {place}")
                self.dump("another rank has ended the run")
                self._event("peer_ended", doing=self.doing, where=place)
                os._exit(ENDED)
            if self._parent is not None and os.getppid() != self._parent:
                # Nobody would see how this rank ends nor start it again, and a new launcher may start another in its place.
                self._parent = None
                self._event("launcher_gone")
                self._say(f"{self.doing}: the launcher is gone; saving and ending")
                os.kill(os.getpid(), signal.SIGTERM)

    def _arm(self) -> None:
        # Where C code hangs with the interpreter's lock no thread of Python's runs; this timer is one of C's. It prints stacks, then exits.
        limits = [s for s in self.limits.values() if s]
        if limits:
            with suppress(ValueError, OSError, AttributeError):
                faulthandler.dump_traceback_later(2 * max(limits) + 60, exit=True)

    # -------------------------------------------------------------------------------------------------------------- the end

    def failed(self, error: BaseException) -> None:
        """End the process if a collective failed (its peer is gone or silent), naming it; return for any other error."""
        place = collective_of(error)
        if place is None or self._thread is None:
            return
        with self._ending:
            text = (str(error).splitlines() or [""])[0]
            message = f"{self.doing}: {place} failed: {text[:300]}; {self.others()}"
            self._end("collective_failed", message, collective=place, error=text[:300])

    def _breach(self, kind: Kind, seconds: float, doing: str) -> NoReturn:
        with self._ending:
            # Should a write hang as well, on a file system that is gone, this one ends the process.
            with suppress(ValueError, OSError, AttributeError):
                faulthandler.dump_traceback_later(60 + 4 * self._tick, exit=True)
            place = self.where()
            message = f"{doing}: {seconds:.1f} s, over watchdog.{kind}_seconds ({self.limits[kind]:g}), in {place}; {self.others()}"
            self._end("watchdog", message, limit=kind, seconds=round(seconds, 1), doing=doing, where=place)

    def _end(self, event: str, message: str, **fields: Any) -> NoReturn:
        self._say(f"error: {message}")
        self.dump(message)
        self._event(event, **fields)
        with suppress(OSError):
            write_status(self.run_dir, "failed", step=max(0, self._doing[2] - 1), retry=True, error=message, rank=self.rank)
        with suppress(OSError):
            (self.run_dir / FOLDER / "ended").write_text(message + "\n", encoding="utf-8")
        if self.world > 1:
            time.sleep(min(2.5 * self._tick, 30))  # for the other ranks' stacks: once this one has ended the launcher ends them
        sys.stderr.flush()
        os._exit(ENDED)

    def dump(self, reason: str) -> None:
        """Write every thread's Python stack and the last route counts to this rank's file, and the stacks to standard error."""
        try:
            with open(self._path("stacks.txt"), "a", encoding="utf-8") as file:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                file.write(f"{stamp} rank {self.rank} of {self.world}, host {self._host}, process {os.getpid()}\n{reason}\n{self.doing}\n")
                for layer, load in enumerate(self.loads):
                    file.write(f"routes per expert in the last step, MoE layer {layer}: {' '.join(f'{n:.0f}' for n in load)}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            self._say(f"{self._path('stacks.txt')} can't be written: {error.strerror}")
        with suppress(ValueError, OSError, AttributeError):
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    # ------------------------------------------------------------------------------------------------------------- who is where

    def where(self) -> str:
        """The collective, or else our own function, in which the main thread is."""
        frame = sys._current_frames().get(self._main or -1)
        return "an unknown place" if frame is None else _place(_stack(frame)) or "code of no module of moetrain"

    def others(self) -> str:
        """Which other ranks are silent or elsewhere, by what they have written; relative times are those of the file system."""
        if self.world == 1:
            return "the only rank"
        silent, elsewhere, unknown, mine = [], [], [], None
        self._beat(0.0)
        with suppress(OSError):
            mine = self._path("json").stat().st_mtime
        if mine is None:
            return "where the other ranks are is not known (no file in run_dir/watchdog)"
        for rank in range(self.world):
            if rank == self.rank:
                continue
            path = self._path("json", rank)
            try:
                age, told = mine - path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))
                line = f"rank {rank} ({told['host']}, process {told['pid']}): {told['doing']}, {told['where']}"
            except (OSError, ValueError, KeyError, TypeError):
                unknown.append(f"rank {rank}")
                continue
            if age > 3 * self._tick + 1:
                silent.append(f"{line}, silent for {age:.1f} s")
            elif told["doing"] != self.doing:
                elsewhere.append(line)
        parts = [f"{what}: {_some(found)}" for what, found in (("silent", silent), ("elsewhere", elsewhere), ("no word of", unknown)) if found]
        if parts:
            return "; ".join(parts)
        return f"the other {self.world - 1} wait in the same place, so look at the network between them"

    def _beat(self, seconds: float) -> None:
        if self.world == 1:
            return
        told = {"rank": self.rank, "host": self._host, "pid": os.getpid(), "doing": self.doing, "where": self.where(), "seconds": round(seconds, 1)}
        path = self._path("json")
        with suppress(OSError):
            written = path.with_name(path.name + ".tmp")
            written.write_text(json.dumps(told) + "\n", encoding="utf-8")
            written.replace(path)

    def _peer_ended(self) -> bool:
        try:
            when = (self.run_dir / FOLDER / "ended").stat().st_mtime
        except OSError:
            return False
        return when > self._began

    def _path(self, suffix: str, rank: int | None = None) -> Path:
        return self.run_dir / FOLDER / f"rank{self.rank if rank is None else rank:05d}.{suffix}"

    def _event(self, kind: str, **fields: Any) -> None:
        append_event(self.run_dir, kind, step=max(0, self._doing[2] - 1), rank=self.rank, host=self._host, **fields)

    def _say(self, text: str) -> None:
        name = f"moetrain rank {self.rank}" if self.world > 1 else "moetrain"
        with suppress(OSError, ValueError):
            print(f"{name}: {text}", file=sys.stderr, flush=True)


_GLOO = re.compile("gloo|caused pair closure")


def collective_of(error: BaseException) -> str | None:
    """Name of the collective that failed and the place that called it, such as `all_to_all_single (moe/exchange.py:64, all_to_all)`; None: the
    error is another one. gloo has no error class of its own; its name stands in the text, but not in that of the collectives under way beside one
    that has timed out."""
    import torch.distributed as dist

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError) or (isinstance(found, RuntimeError) and _GLOO.search(str(found)[:200])):
            stack = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(found.__traceback__)]
            return _place(stack) or "a collective"
        found = found.__cause__
    return None


_HERE = str(Path(__file__).parent)
_DISTRIBUTED = os.path.join("torch", "distributed", "")


def _stack(frame: FrameType) -> list[tuple[str, int, str]]:
    """(file, line, function), the innermost last."""
    return [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame)][::-1]


def _place(stack: list[tuple[str, int, str]]) -> str | None:
    """The innermost of our own functions in a stack; before it, if the stack goes on into torch.distributed, what it called there."""
    ours = next((i for i in reversed(range(len(stack))) if stack[i][0].startswith(_HERE)), None)
    if ours is None:
        return None
    file, line, name = stack[ours]
    place = f"{Path(file).relative_to(_HERE).as_posix()}:{line}, {name}"
    inside = [function for file, _, function in stack[ours + 1 :] if _DISTRIBUTED in file]
    named = [f for f in inside if not f.startswith("_") and f not in ("wrapper", "wait")]
    return f"{named[-1] if named else inside[-1]} ({place})" if inside else place


def _some(found: Iterable[str]) -> str:
    found = list(found)
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
