# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment with moetrain and the extras named in EXTRAS, in the project's root.
# Uses the active environment if there is one, else makes .venv. Does nothing when nothing changed since the last time.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

stamp="$(python -c 'import sys; print(sys.prefix)')/.moetrain-$(cat pyproject.toml setup.py launch/setup.sh csrc/*.* csrc/*/* | cksum | cut -d' ' -f1)-${EXTRAS//,/-}"
if [ ! -e "$stamp" ] || ! python -c 'import moetrain._C' 2>/dev/null; then
    echo "setup: installing moetrain[$EXTRAS] into $(python -c 'import sys; print(sys.prefix)')"
    # torch first and on its own, then held where it is: a package that asks for torch must not bring another build of it.
    python -c 'import torch' 2>/dev/null || pip install --quiet --disable-pip-version-check "torch==${TORCH_VERSION:-2.13.0}"
    held="$(mktemp)"
    python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >"$held"
    pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja
    # DS_BUILD_OPS=0: deepspeed's own operators are not used, and building them takes minutes.
    DS_BUILD_OPS=0 pip install --quiet --disable-pip-version-check --no-build-isolation -c "$held" -e ".[$EXTRAS]"
    rm -f "$held"
    touch "$stamp"
fi
# One thread per process: ranks share the cores, and OpenMP threads that wait for a busy core cost many times what they bring.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
