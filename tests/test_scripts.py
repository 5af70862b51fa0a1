"""The scripts and the image's recipe are clean for their linters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lint(program: str, *words: str) -> str:
    path = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path, f"{program} is one of the dev extras: pip install -e '.[dev]'"
    done = subprocess.run([path, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_shellcheck() -> None:
    scripts = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("launch/*.sh"), *ROOT.glob("docker/*.sh"), ROOT / ".ci/run"])
    assert lint("shellcheck", "--external-sources", *scripts) == ""


def test_hadolint() -> None:
    recipes = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docker/Dockerfile*"))
    assert recipes and lint("hadolint", *recipes) == ""
