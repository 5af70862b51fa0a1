"""How tests are run over the emulated kernels: pytest's words and the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.emulation.build import COMPILER, ROOT

TESTS = ["tests/emulation/emulated.py", "tests/test_ops.py", "tests/moe/test_experts.py", "tests/moe/test_layer.py"]
TESTS += [f"tests/moe/test_peers.py::{name}" for name in ("test_push", "test_pull", "test_what_does_not_fit_is_refused")]
NOT_EMULATED = {
    "tests/test_ops.py::test_cuda_sources_compile": "about nvcc",
    "tests/test_ops.py::test_demanding_cuda_without_it_is_one_clear_line": "about setup.py",
    "tests/test_ops.py::test_float16_is_refused_on_the_cpu": "the emulated build takes it",
    "tests/test_ops.py::test_bfloat16_rounds_to_nearest_even": "a warp for each of many numbers; tests/test_emulation.py looks at more of them",
    "tests/test_ops.py::test_threads_do_not_change_a_bit": "about the CPU's threads",
    "tests/test_ops.py::test_permute_and_combine_equal_reference[many experts-torch.float32-cpu]": "the reference is slow; two of the dtypes do",
    "tests/test_ops.py::test_permute_and_combine_equal_reference[many experts-torch.float64-cpu]": "the reference is slow; two of the dtypes do",
}
_ASAN = "detect_leaks=0:redzone=256:malloc_fill_byte=255:max_malloc_fill_size=1073741824:verify_asan_link_order=0"
_ASAN += ":malloc_context_size=1:quarantine_size_mb=32"  # who allocated isn't asked, and Python allocates much


def words(arguments: list[str]) -> list[str]:
    """Of pytest, for TESTS if the arguments name no file."""
    deselected = [f"--deselect={test}" for test in NOT_EMULATED]
    files = [] if any((ROOT / word.partition("::")[0]).exists() for word in arguments) else TESTS
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.emulation.plugin", *deselected, *arguments, *files]


def environment(library: Path) -> dict[str, str]:
    """With AddressSanitizer's library in the process, if GCC has one that starts."""
    found = {**os.environ, "MOETRAIN_EMULATED": str(library), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return found | sanitizer()


def sanitizer() -> dict[str, str]:
    """LD_PRELOAD and ASAN_OPTIONS, or nothing where AddressSanitizer's library can't be had."""
    # libstdc++ too: the sanitizer looks for its throw when the process starts, and Python brings none.
    ask = [[COMPILER, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    names = [subprocess.run(words, capture_output=True, text=True).stdout.strip() for words in ask]
    variables = {"LD_PRELOAD": ":".join(names), "ASAN_OPTIONS": _ASAN}
    works = all(Path(n).is_absolute() for n in names)
    works = works and subprocess.run([sys.executable, "-c", ""], env={**os.environ, **variables}, capture_output=True).returncode == 0
    return variables if works else {}
