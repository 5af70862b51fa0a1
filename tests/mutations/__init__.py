"""Planted errors: each of mutations.yaml is written into a copy of the package, and the tests named there must fail by an assertion.

    python -m tests.mutations                  all of them, and first that the named tests pass without
    python -m tests.mutations NAME ...         some
    python -m tests.mutations --jobs 2 --table FILE

It ends with status 1 if one was not caught. `tests/test_mutations.py` keeps the list true in CI and runs a few.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240.0
"""Seconds for the tests of one mutation: some mutations make ranks wait for each other."""
_BUILD_LIMIT = 1200.0
_NOT_CAUGHT_BY = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")
"""A test that fails so has met a mutation that is no program."""


@dataclass(frozen=True)
class Mutation:
    name: str
    item: int | None
    like: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    why: str
    raises: str = "AssertionError"

    @property
    def is_native(self) -> bool:
        """Whether the package's extension must be built anew; tests of the CUDA kernels compile those by themselves."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


@dataclass(frozen=True)
class Outcome:
    """caught: by the named exception. said: its first line, or what happened instead."""

    caught: bool
    said: str
    seconds: float


def read_mutations() -> list[Mutation]:
    """Raises TypeError for an entry with unknown or missing fields, AssertionError for a name that is there twice."""
    entries = yaml.safe_load((Path(__file__).parent / "mutations.yaml").read_text(encoding="utf-8"))
    found = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    assert len({m.name for m in found}) == len(found), "names are unique"
    return found


def occurrences(mutation: Mutation, root: Path = ROOT) -> int:
    """Of the text to replace in its file."""
    return (root / mutation.file).read_text(encoding="utf-8").count(mutation.find)


class Copy:
    """A copy of what the tests need, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("moetrain", "tests", "csrc", "configs", "docs", "launch", "setup.py", "pyproject.toml", "README.md"):
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "images"))
            else:
                shutil.copy(path, folder / name)

    def run(self, tests: list[str], limit: float) -> tuple[int | None, list[str], str]:
        """(pytest's exit status or None where the time was over, what failed in a test with its text, the end of the output)."""
        result = self.folder / "result.xml"
        result.unlink(missing_ok=True)
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--tb=short", f"--junitxml={result}", *tests]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = _run(words, self.folder, environment, limit)
        failures = []
        if result.is_file():
            for node in ElementTree.parse(result).iter("failure"):
                failures.append(f"{node.get('message') or ''}\n{node.text or ''}")
        return *done[:1], failures, done[1][-2000:]

    def build(self) -> None:
        words = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, output = _run(words, self.folder, dict(os.environ), _BUILD_LIMIT)
        assert status == 0, f"the extension did not build: {output[-2000:]}"

    def plant(self, mutation: Mutation, limit: float = LIMIT) -> Outcome:
        """Write it in, run its tests, take it out again."""
        path = self.folder / mutation.file
        text = path.read_text(encoding="utf-8")
        if (number := text.count(mutation.find)) != 1:
            return Outcome(False, f"the text to replace is there {number} times", 0.0)
        began = time.monotonic()
        mutated = text.replace(mutation.find, mutation.replace)
        if path.suffix == ".py":
            compile(mutated, str(path), "exec")
        path.write_text(mutated, encoding="utf-8")
        try:
            if mutation.is_native:
                self.build()
            status, failures, output = self.run(list(mutation.tests), limit)
        finally:
            path.write_text(text, encoding="utf-8")
            if mutation.is_native:
                for library in (ROOT / "moetrain").glob("_C*"):
                    shutil.copy(library, self.folder / "moetrain" / library.name)
        return Outcome(*_judge(mutation, status, failures, output), time.monotonic() - began)


def _judge(mutation: Mutation, status: int | None, failures: list[str], output: str) -> tuple[bool, str]:
    if status is None:
        return False, "the time was over"
    if status == 0:
        return False, "no test failed"
    if not failures:
        return False, f"no test failed, and pytest ended with status {status}: {' '.join(output.split())[-300:]}"
    message = failures[0]
    if wrong := next((kind for kind in _NOT_CAUGHT_BY if kind in message), None):
        return False, f"not by an assertion but {wrong}"
    # pytest writes `assert a == b` for a plain assert, and the exception's name for others; `Failed` is of pytest.raises.
    first = message.strip().splitlines()[0] if message.strip() else ""
    by_name = first.startswith((mutation.raises, *(("assert ", "Failed:") if mutation.raises == "AssertionError" else ())))
    return by_name, first[:160] if by_name else f"by another exception: {first[:160]}"


def _run(words: list[str], folder: Path, environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """(exit status or None, output). After `limit` the process and all that it has started end."""
    with open(folder / "output.txt", "wb") as file:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    return status, (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
