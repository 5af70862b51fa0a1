"""The files of a run that tell what happened in it: their names, and how their lines are read. Without torch, so that reading them starts fast."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

METRICS, EVENTS, ROUTING = "metrics.jsonl", "events.jsonl", "routing.json"


def read_records(run_dir: Path | str) -> Iterator[dict[str, Any]]:
    """The records of a run, in order; a torn last line (the run is alive or was killed) is left out. Raises ValueError if there is no file."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is {run_dir} the folder of a run?")
    with open(path, "rb") as file:
        yield from (record for line in file if (record := parse(line)) is not None)


def parse(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None if it is torn (its newline is missing: a number may be cut) or no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def count_events(run_dir: Path | str) -> Counter[str]:
    """How often each kind of event stands in events.jsonl; nothing where there is no file."""
    try:
        with open(Path(run_dir) / EVENTS, "rb") as file:
            return Counter(str(event.get("event")) for line in file if (event := parse(line)) is not None)
    except OSError:
        return Counter()


def event_line(kind: str, **fields: Any) -> bytes:
    """A line of events.jsonl: something that happened, with the time."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return (json.dumps({"time": now, "event": kind, **fields}) + "\n").encode()


def append_event(run_dir: Path | str, kind: str, **fields: Any) -> None:
    """Add to events.jsonl from any rank, while rank 0 may have it open: the line goes out in one write at the end of the file. An event that
    can't be written is lost."""
    with suppress(OSError):
        handle = os.open(Path(run_dir) / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, event_line(kind, **fields))
        finally:
            os.close(handle)
