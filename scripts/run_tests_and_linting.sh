#!/usr/bin/env bash
# Runs pylint, then the tests, also where pylint complains: one run shows everything. Arguments go
# to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
export PYTHON
status=0
scripts/lint.sh || status=$?
scripts/test.sh "$@" || status=$?
exit "$status"
