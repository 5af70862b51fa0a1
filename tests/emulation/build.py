"""Compiles CUDA sources for the CPU: the emulator under them, checks in every access, objects kept by the hash of what they are made of."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulation.rewrite import rewrite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
_COMMON = ["-fPIC", "-fvisibility=hidden", "-g1"]
# Loads and stores call hooks.cpp: -fsanitize=thread gives the calls, its library is never linked. No -ftree-sra: it would split a load of 16 bytes.
# Products and sums are fused where the processor can, as nvcc fuses them.
_KERNEL = [
    "-O1", "-std=c++17", "-x", "c++", "-Wall", "-Wno-unknown-pragmas", "-Wno-subobject-linkage", "-fno-tree-sra", "-ffp-contract=fast",
    "-fsanitize=thread", "--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero", "-fno-sanitize-recover=all", f"-I{HERE / 'include'}",
]  # fmt: skip
_HALF_CHECK = "dtype == ScalarType::Half && tensor.is_cuda()"


def why_not() -> str | None:
    """Why nothing can be emulated here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler: {COMPILER} is not installed"
    if "Free Software Foundation" not in subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout:
        return f"{COMPILER} is not GCC, whose instrumentation the emulator uses"
    return None


def library(sources: list[Path], target: Path, cache: Path) -> Path:
    """A shared library of .cu files and the emulator, for ctypes. target and cache as of `extension`."""
    return _link([*(_kernels(s) for s in sources), *_emulator()], target, cache)


def extension(target: Path, cache: Path) -> Path:
    """moetrain._C of csrc/*.cpp, with every csrc/cuda/*.cu under its CPU operators. In tensors.h one check is changed: float16 may be on the CPU.

    target: the library to write. cache: a folder for the objects. Raises RuntimeError with the compiler's messages."""
    from torch.utils.cpp_extension import include_paths, library_paths

    shared = (CSRC / "tensors.h").read_text(encoding="utf-8")
    assert shared.count(_HALF_CHECK) == 1, f"csrc/tensors.h no longer says {_HALF_CHECK!r}: say here what it says instead"
    shared = shared.replace(_HALF_CHECK, "dtype == ScalarType::Half")
    include = '#include "tensors.h"'
    includes = [f"-I{path}" for path in [str(CSRC), *include_paths(), sysconfig.get_path("include")]]
    macros = ["-DTORCH_TARGET_VERSION=0x020A000000000000", "-DPy_LIMITED_API=0x030A0000"]
    flags = ["-x", "c++", "-O0", "-std=c++20", *macros, *includes]
    operators = []
    for path in sorted(CSRC.glob("*.cpp")):
        text = path.read_text(encoding="utf-8")
        assert text.count(include) == 1, f"{path} does not say {include}"
        after = text[: text.index(include)].count("\n") + 2
        text = f'#line 1 "{path}"\n' + text.replace(include, f'#line 1 "{CSRC / "tensors.h"}"\n{shared}\n#line {after} "{path}"')
        operators.append((path.name, text, flags, [CSRC / "checks.h", CSRC / "kernels.h"]))
    # What CUDA has no kernel for is computed by the CPU's.
    for path in (CSRC / "cpu" / "choose.cpp", CSRC / "cpu" / "parallel.cpp"):
        operators.append((path.name, f'#include "{path}"\n', flags, [path, CSRC / "kernels.h", *(CSRC / "cpu").glob("*.h")]))
    objects = [
        *operators,
        _plain(HERE / "forward.cpp", [CSRC / "kernels.h"]),
        *(_kernels(path) for path in sorted((CSRC / "cuda").glob("*.cu"))),
        *_emulator(),
    ]
    torch_libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return _link(objects, target, cache, [*torch_libraries, "-ltorch", "-ltorch_cpu", "-lc10"])


Object = tuple[str, str, list[str], list[Path]]
"""(name, text, flags, headers that it depends on)"""


def _kernels(path: Path) -> Object:
    # -I: the text is compiled elsewhere and still finds the headers beside it.
    text = rewrite(path.read_text(encoding="utf-8"), str(path))
    headers = [*path.parent.glob("*.cuh"), *path.parent.parent.glob("*.h"), *(HERE / "include").rglob("*.*"), HERE / "emulator.h"]
    fma = ["-mfma"] if "fma" in _processor() else []
    return path.name, text, [*_KERNEL, *fma, f"-I{path.parent}"], headers


def _plain(path: Path, headers: list[Path]) -> Object:
    return path.name, f'#include "{path}"\n', ["-x", "c++", "-O2", "-std=c++17", "-Wall"], [path, *headers]


def _emulator() -> list[Object]:
    return [_plain(HERE / name, list(HERE.glob("*.h"))) for name in ("machine.cpp", "hooks.cpp")]


def _processor() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def _link(objects: list[Object], target: Path, cache: Path, flags: list[str] = []) -> Path:  # noqa: B006  (never changed)
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda o: _compile(o, cache), objects))
    _run([COMPILER, "-shared", "-o", str(target), *map(str, compiled), *flags, "-lpthread", "-ldl"], "linking")
    return target


def _compile(what: Object, cache: Path) -> Path:
    name, text, flags, headers = what
    words = [COMPILER, *_COMMON, *flags]
    digest = hashlib.sha256("\0".join([*words, text]).encode())
    for header in sorted(headers):
        digest.update(header.read_bytes())
    target = cache / f"{name}-{digest.hexdigest()[:24]}.o"
    if not target.exists():
        source, unfinished = target.with_suffix(f".{os.getpid()}.cpp"), target.with_suffix(f".{os.getpid()}.o")
        source.write_text(text, encoding="utf-8")
        _run([*words, f"-fdebug-prefix-map={source}={name}", "-c", str(source), "-o", str(unfinished)], name)
        unfinished.rename(target)  # whole, also if two runs of the tests build at once
        source.unlink()
    return target


def _run(words: list[str], what: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{what} did not compile for the emulator:\n{done.stderr[-6000:]}")
