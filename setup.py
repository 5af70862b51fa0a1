"""Builds `moetrain._C` from csrc/: the CPU kernels always, the CUDA kernels if torch and nvcc can.

MOETRAIN_CUDA=1 demands the CUDA kernels, MOETRAIN_CUDA=0 leaves them out. No GPU is looked for: a container
without one builds what the machine it will run on needs. TORCH_CUDA_ARCH_LIST says for which GPUs (default
below). The extension uses torch's stable ABI and Python's limited API, so one build serves torch >= 2.10 and
Python >= 3.10.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020A000000000000"  # 2.10

# pip's build isolation hides the installed torch, and a copy of its own could be another version or lack
# CUDA. The extension has to fit the torch it will run with, so that one is looked up where it is installed.
for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
    if path not in sys.path:
        sys.path.append(path)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    torch = None
    TORCH_ERROR = error


def find_cuda_home() -> Path | None:
    """The toolkit's directory: CUDA_HOME, CUDA_PATH, where nvcc on PATH lies, or /usr/local/cuda."""
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append(Path("/usr/local/cuda"))
    for home in candidates:
        # The header too: nvcc on PATH can be a wrapper that lies elsewhere.
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def use_cuda() -> bool:
    """Whether to build the CUDA kernels; exits with one line if they are demanded and can't be built."""
    choice = os.environ.get("MOETRAIN_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"moetrain: MOETRAIN_CUDA={choice!r}: expected 0, 1 or unset")
    if choice == "0":
        return False
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA (install a CUDA build of torch)")
    if find_cuda_home() is None:
        missing.append("nvcc was not found (install the CUDA toolkit or set CUDA_HOME)")
    if missing and choice == "1":
        sys.exit("moetrain: MOETRAIN_CUDA=1, but " + " and ".join(missing))
    return not missing


def default_cuda_archs() -> str:
    """A100, with PTX that any newer GPU can translate; H100 and H200; B200, which CUDA knows from 12.8 on."""
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return "8.0+PTX;9.0a;10.0" if version >= (12, 8) else "8.0+PTX;9.0a"


def files(pattern: str) -> list[str]:
    """Relative to the project, as setuptools demands."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def extension() -> Extension:
    """The extension as torch's build helper wants it."""
    sources = [*files("csrc/*.cpp"), *files("csrc/cpu/*.cpp")]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    cxx_flags = ["-O3", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    if use_cuda():
        home = find_cuda_home()
        os.environ.setdefault("CUDA_HOME", str(home))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_cuda_archs())
        cpp_extension.CUDA_HOME = str(home)
        sources += files("csrc/cuda/*.cu")
        macros.append(("USE_CUDA", None))
        make = cpp_extension.CUDAExtension
        flags = {"cxx": cxx_flags, "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"]}
    else:
        make = cpp_extension.CppExtension
        flags = {"cxx": cxx_flags}
    return make(
        "moetrain._C",
        sources,
        depends=[*files("csrc/*.h"), *files("csrc/*/*.h"), *files("csrc/*/*.cuh")],
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,
    )


class BuildWithoutTorch(build_ext):
    """Lets metadata be read without torch; only a build needs it."""

    def run(self):
        sys.exit(
            f"moetrain: torch can't be imported ({TORCH_ERROR}): install torch >= 2.10 first, then run\n"
            "    pip install -e . --no-build-isolation"
        )


if torch is None:
    ext_modules = [Extension("moetrain._C", ["csrc/ops.cpp"])]
    commands = {"build_ext": BuildWithoutTorch}
else:
    ext_modules = [extension()]
    commands = {"build_ext": cpp_extension.BuildExtension}

setup(
    ext_modules=ext_modules,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
