"""What every test leaves as it found it, and how random examples are drawn."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# CI draws the same examples each time: what it says is about the change. `--hypothesis-profile random` looks for what nobody has thought of.
settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile("same")


_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)}


def _restore() -> None:
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A run inside the test's own process listens to signals, and ignores them once it has ended, as processes that are about to exit should;
    what the next test starts would inherit that, and a shell can't trap what was ignored when it began. Before each test too: a fixture of a
    wider scope may have trained."""
    _restore()
    yield
    _restore()
