#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest, such as `bash launch/test.sh tests/moe -k dispatch`.
set -euo pipefail
EXTRAS=dev
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# The browser that opens the report in a test, which is skipped without it.
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! command -v chromium > /dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 \
        || echo "chromium could not be installed: the tests in a browser are skipped"
fi
ruff check .
exec python -m pytest "$@"
