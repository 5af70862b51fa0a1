"""The list of planted errors stays true: each text is still there once, each named test exists, and a few are really planted (all of them by
`python -m tests.mutations`)."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations import ROOT, Copy, Mutation, _judge, occurrences, read_mutations

MUTATIONS = read_mutations()
# The quickest: one process, no transformers.
PLANTED = ["open_at_the_threshold", "padding_divided_by_zero", "decided_again_in_backward"]


def test_there_are_forty_for_every_complaint() -> None:
    """Items 1 to 32 of the list, and enough of ours; some are caught by the guard."""
    assert len(MUTATIONS) >= 40
    assert {m.item for m in MUTATIONS if m.item} == set(range(1, 33))
    assert sum(any("test_guard" in t for t in m.tests) for m in MUTATIONS) >= 5
    assert all(m.like and m.why and m.tests and m.find != m.replace for m in MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_its_text_is_there_once(mutation: Mutation) -> None:
    assert occurrences(mutation) == 1, f"{mutation.file} was changed: say in mutations.yaml what {mutation.name} replaces now"
    if mutation.file.endswith(".py"):
        mutated = (ROOT / mutation.file).read_text(encoding="utf-8").replace(mutation.find, mutation.replace)
        compile(mutated, mutation.file, "exec")


def test_the_named_tests_exist() -> None:
    """pytest collects each, down to its parameters."""
    names = sorted({t for m in MUTATIONS for t in m.tests})
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *names]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = set(done.stdout.splitlines())
    assert [n for n in names if n not in found and not any(f.startswith(f"{n}[") for f in found)] == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.mark.parametrize("name", PLANTED)
def test_some_are_caught(name: str, copy: Copy) -> None:
    (mutation,) = (m for m in MUTATIONS if m.name == name)
    before = (copy.folder / mutation.file).read_text(encoding="utf-8")
    outcome = copy.plant(mutation, 120)
    assert outcome.caught, outcome.said
    assert (copy.folder / mutation.file).read_text(encoding="utf-8") == before


def test_what_does_not_count_as_caught(copy: Copy) -> None:
    """A mutation that changes nothing; one whose text is gone; one that is no assertion's."""
    (mutation,) = (m for m in MUTATIONS if m.name == "open_at_the_threshold")
    harmless = copy.plant(replace(mutation, replace=mutation.find + "        # a comment\n"), 120)
    assert not harmless.caught and harmless.said == "no test failed"
    assert copy.plant(replace(mutation, find="no such text"), 120).said == "the text to replace is there 0 times"
    nonsense = ["AssertionError: rank 1 of 2 failed:\nNameError: name 'x' is not defined"]
    assert _judge(mutation, 1, nonsense, "") == (False, "not by an assertion but NameError")
    assert _judge(mutation, 1, ["ValueError: no"], "") == (False, "by another exception: ValueError: no")
    assert _judge(mutation, 2, [], "collected 0 items") == (False, "no test failed, and pytest ended with status 2: collected 0 items")
    assert _judge(mutation, None, [], "") == (False, "the time was over")
    assert _judge(replace(mutation, raises="ValueError"), 1, ["ValueError: no"], "") == (True, "ValueError: no")


def test_paths_stay_in_the_project() -> None:
    for mutation in MUTATIONS:
        assert re.fullmatch(r"(moetrain|csrc)/[\w/]+\.(py|cpp|cu|cuh)", mutation.file) and (ROOT / mutation.file).is_file()
        assert all(Path(t.partition("::")[0]).parts[0] == "tests" for t in mutation.tests)
