#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest, such as `bash launch/test.sh tests/moe -k dispatch`.
set -euo pipefail
EXTRAS=dev
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# A real Slurm for tests/cluster/test_slurm.py, which are skipped without one. Daemons are started by the tests alone.
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && ! [ -x /usr/sbin/slurmctld ]; then
    echo "test: installing Debian's slurm-wlm and munge, for the tests with a real Slurm"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get install -y -q --no-install-recommends slurm-wlm munge || { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge; }; } \
        >/dev/null 2>&1 || echo "test: they can't be installed here; those tests will be skipped"
fi
ruff check .
exec python -m pytest "$@"
