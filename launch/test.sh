#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest, such as `bash launch/test.sh tests/moe -k dispatch`.
set -euo pipefail
EXTRAS=dev
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# A real Slurm, a browser and network namespaces for the tests that use them, which are skipped without. Daemons are started by the tests alone.
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && ! {
    [ -x /usr/sbin/slurmctld ] && command -v chromium >/dev/null && command -v ip >/dev/null
}; then
    echo "test: installing Debian's slurm-wlm, munge, chromium and iproute2"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge chromium iproute2; } >/dev/null 2>&1 \
        || echo "test: they can't be installed here; the tests with a real Slurm, in a browser and with network namespaces will be skipped"
fi
ruff check .
exec python -m pytest "$@"
