#!/usr/bin/env bash
# Kills the server N times at random moments while clients add and cancel jobs, and checks that
# nothing was lost: scripts/torture.sh N [SEED]
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python3}" "$root/scripts/torture.py" "$@"
