#!/usr/bin/env bash
# Runs the tests; arguments go to pytest. A fresh machine needs nothing but Python: see
# environment.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m pytest "$@"
