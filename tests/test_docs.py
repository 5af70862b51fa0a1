"""The documentation says what is so: links lead somewhere, quoted messages and named options and files exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from moetrain import config as schema
from moetrain.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "csrc" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLE = ROOT / "docs" / "troubleshooting.md"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index]
    assert not missing
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def texts() -> str:
    """Every string of the sources, each on a line; in f-strings a zero byte stands for a value."""
    found = []
    for path in [*(ROOT / "moetrain").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quotes() -> list[str]:
    """What the page says that the program prints: code in the lines after "You see"."""
    return [q for line in re.findall(r"^\*\*You see\*\* (.*)$", TROUBLE.read_text(encoding="utf-8"), re.M) for q in re.findall(r"`([^`]+)`", line)]


@pytest.mark.parametrize("quote", quotes())
def test_quoted_messages_exist(quote: str) -> None:
    """Each part between values, in one string and in this order."""
    pattern = r"[^\n]*".join(re.escape(part.strip()) for part in quote.split("..."))
    assert re.search(pattern, texts()) or quote in COMMANDS or quote.removeprefix("moetrain ") in COMMANDS, quote


def test_there_are_enough_symptoms() -> None:
    text = TROUBLE.read_text(encoding="utf-8")
    symptoms = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(symptoms) >= 25 and len(quotes()) >= 25
    for symptom in symptoms:
        assert "**Do** " in symptom and ("**You see** " in symptom or "**Why** " in symptom), symptom


def test_options_exist() -> None:
    """Dotted options on the pages for a user's first steps: `--prepare.inputs`, `data.prefetch`."""
    known = {re.sub(r"\.\*", "", key) for key in schema.keys(schema.Config)}
    sections = {key.split(".")[0] for key in known if "." in key} - {"model"}
    for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for option in re.findall(r"--([a-z]+(?:\.[a-z_]+)+)", text) + re.findall(r"`([a-z]+\.[a-z_]+(?:\.[a-z_]+)*)`", text):
            if option.split(".")[0] in sections and not option.endswith((".md", ".py", ".yaml", ".jsonl", ".json", ".bin")):
                assert option in known, f"{page.name}: {option}"


def test_files_named_by_the_security_page_exist() -> None:
    for name in re.findall(r"`(tests/[\w./]+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
