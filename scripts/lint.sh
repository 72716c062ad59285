#!/usr/bin/env bash
# Runs pylint; any message fails. A fresh machine needs nothing but Python: see environment.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m pylint --rcfile=setup.cfg oqc tests scripts
