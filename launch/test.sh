#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest, such as `bash launch/test.sh tests/moe -k dispatch`.
set -euo pipefail
EXTRAS=dev
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
exec python -m pytest "$@"
