#!/usr/bin/env bash
# Compiles every CUDA source for every architecture, and the operators with CUDA on, without linking. Needs nvcc and any torch
# (the CPU wheel will do: the sources use torch's stable ABI only), but no GPU. One line per file with its architectures; one
# compiler run takes them all, which halves the time.
# Usage: bash csrc/compile_cuda.sh [ARCH...]      default: sm_80 sm_90a sm_100
set -uo pipefail

if ! command -v nvcc >/dev/null; then
  echo "compile_cuda.sh: nvcc not found, nothing compiled"
  exit 0
fi

archs=("$@")
[[ ${#archs[@]} -gt 0 ]] || archs=(sm_80 sm_90a sm_100)
csrc=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
status=0

# Prints "FILE WHAT ok", or the compiler's messages and "FILE WHAT FAILED".
compile() {
  local file=$1 what=$2
  shift 2
  if "$@" "$csrc/$file" -o "$temp/out.o" >"$temp/log" 2>&1; then
    echo "$file $what ok"
  else
    cat "$temp/log"
    echo "$file $what FAILED"
    status=1
  fi
}

# The flags are those that torch.utils.cpp_extension gives nvcc, and warnings are errors.
flags=(-c -std=c++17 -O3 --expt-relaxed-constexpr -Werror all-warnings -Xcompiler -Wall
  -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__
  -D__CUDA_NO_BFLOAT16_CONVERSIONS__)
for arch in "${archs[@]}"; do
  flags+=(-gencode "arch=compute_${arch#sm_},code=$arch")
done
for path in "$csrc"/cuda/*.cu; do
  compile "cuda/$(basename "$path")" "${archs[*]}" nvcc "${flags[@]}"
done

read -r -d '' query <<'PYTHON'
import sysconfig
from torch.utils.cpp_extension import include_paths
print(" ".join("-I" + path for path in [*include_paths(), sysconfig.get_path("include")]))
PYTHON
if includes=$(python -c "$query"); then
  # shellcheck disable=SC2086  # several flags
  compile ops.cpp host "${CXX:-c++}" -c -std=c++20 -O1 -Wall -Werror -DUSE_CUDA \
    -DTORCH_TARGET_VERSION=0x020A000000000000 -DPy_LIMITED_API=0x030A0000 $includes
else
  echo "ops.cpp host FAILED: torch can't be imported by python"
  status=1
fi
exit $status
