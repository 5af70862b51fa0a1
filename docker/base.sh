#!/usr/bin/env bash
# Fetches what docker/Dockerfile.cpu needs to build without a network: a base image and wheels.
#
#   bash docker/base.sh                      # as root, on Debian or Ubuntu with debootstrap; Docker or $DOCKER (podman, buildah)
#   docker build -f docker/Dockerfile.cpu -t moetrain:cpu --network none --build-arg BASE=moetrain-base:local --build-arg PIP_NO_INDEX=1 .
#
# The base is Debian bookworm with Python 3.11 and g++, from MIRROR. The wheels go to docker/wheels/, by PYTHON (3.11, as in the base)
# from the indexes that its pip knows; TORCH and EXTRAS as in the Dockerfile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${BASE:-moetrain-base:local}
python=${PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "base: PYTHON ($python) must be 3.11, as in the base" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "base: debootstrap is missing: apt-get install debootstrap" >&2; exit 2; }

mkdir -p docker/wheels
# The packages of the extras, and of the build, from pyproject.toml: pip reads them from the project itself only where it can build it.
mapfile -t packages < <("$python" - "${EXTRAS:-hf,data}" <<'PYTHON'
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
names = [d for d in project["dependencies"] if not d.startswith("torch")]
print("\n".join(names + [d for extra in sys.argv[1].split(",") for d in project["optional-dependencies"][extra]]))
PYTHON
)
"$python" -m pip download --quiet --dest docker/wheels --only-binary :all: \
    --constraint docker/constraints.txt "torch==${TORCH:-2.13.0}" setuptools wheel ninja "${packages[@]}"

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-dev,python3-venv,g++,ca-certificates bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}" >/dev/null
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" --numeric-owner -c . | "${DOCKER:-docker}" import - "$name"
echo "base: $name, and $(find docker/wheels -name '*.whl' | wc -l) wheels in docker/wheels"
