#!/usr/bin/env bash
# On a machine with a GPU: builds the operators with CUDA in place, runs the tests that need it, looks for errors of memory and races in the kernels, and
# measures. Takes what python has and installs nothing, for machines without a network; a part that fails does not stop the next.
# Usage: bash launch/gpu.sh FOLDER [build] [test] [sanitize] [kernels] [layer]      default: all parts; logs and figures go to FOLDER
# MINUTES=8 limits each part. TORCH_CUDA_ARCH_LIST defaults to the GPU's own architecture.
set -uo pipefail
folder=${1:?usage: bash launch/gpu.sh FOLDER [PART...]}
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=$(command -v python || command -v python3)
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(build test sanitize kernels layer)
status=0

# Prints the end of what a command says and how long it took; the whole goes to FOLDER/NAME.log.
part() {
    local name=$1 began=$SECONDS code=0
    shift
    timeout "$((${MINUTES:-8} * 60))" "$@" >"$folder/$name.log" 2>&1 || code=$?
    [[ $code -eq 0 ]] || status=1
    tail -n 12 "$folder/$name.log"
    echo "gpu: $name: exit $code after $((SECONDS - began)) s"
}

build() {
    if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
        TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + ("a" if a == 9 else ""))')
        export TORCH_CUDA_ARCH_LIST
    fi
    MOETRAIN_CUDA=1 MAX_JOBS=$(nproc) part build "$python" setup.py build_ext --inplace
}

run_tests() { part test "$python" -m pytest -q -p no:cacheprovider -m gpu -rs; }

# What the operators' tests launch, under both tools. Few examples of hypothesis: every launch is watched.
sanitize() {
    local tool
    for tool in memcheck racecheck; do
        part "sanitize_$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -x -p no:cacheprovider -m gpu tests/test_ops.py
    done
}

kernels() {
    part kernels "$python" -m moetrain bench kernels --device cuda --dtypes bfloat16 float32 --shapes 32768,4096,256,256,16 32768,4096,1024,64,4 \
        4096,1024,512,8,~3 --json "$folder/gpu_kernels.json"
}

# The five shapes of SonicMoE's table (arXiv 2512.14080), and DSMoE's.
layer() {
    part layer "$python" -m moetrain bench layer --device cuda --dtypes bfloat16 --routings balanced router --rounds 9 --json "$folder/gpu_layer.json" \
        --shapes 24576,1536,256,128,8 32768,4096,256,256,16 32768,4096,1024,64,4 32768,4096,1024,128,8 32768,4096,2048,64,4 32768,1024,512,8,~3
}

"$python" -c 'import sys, torch
torch.cuda.is_available() or sys.exit("gpu: torch finds no GPU")
print("torch", torch.__version__, "on", torch.cuda.get_device_name())' || exit 1
for name in "${parts[@]}"; do
    case $name in
        build) build ;;
        sanitize) sanitize ;;
        kernels) kernels ;;
        layer) layer ;;
        test) run_tests ;;
        *) echo "gpu: no part $name; there are build, test, sanitize, kernels, layer" >&2; exit 2 ;;
    esac
done
exit $status
