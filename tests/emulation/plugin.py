"""For pytest (`-p tests.emulation.plugin`): MOETRAIN_EMULATED, a library of build.extension, takes the place of moetrain._C in this process.

Processes that a test starts have the real extension, so tests with ranks prove nothing here."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader

import torch  # noqa: F401  (the library's symbols)


def _load(path: str) -> None:
    assert "moetrain._C" not in sys.modules, "moetrain's own operators are registered already"
    loader = ExtensionFileLoader("moetrain._C", path)
    spec = importlib.util.spec_from_file_location("moetrain._C", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["moetrain._C"] = module


_load(os.environ["MOETRAIN_EMULATED"])
