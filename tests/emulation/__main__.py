"""`python -m tests.emulation [PYTEST'S ARGUMENTS]`; see the package."""

from __future__ import annotations

import os
import sys

from tests.emulation import build, run

if problem := build.why_not():
    sys.exit(f"emulation: {problem}")
folder = build.ROOT / "build" / "emulation"
library = build.extension(folder / "_C.abi3.so", folder)
variables = run.environment(library)
if "ASAN_OPTIONS" not in variables:
    print("emulation: without AddressSanitizer: accesses out of bounds may go unseen", flush=True)
os.chdir(build.ROOT)
os.execve(sys.executable, run.words(sys.argv[1:]), variables)
