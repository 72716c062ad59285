#!/usr/bin/env bash
# Starts the server; arguments go to `python -m oqc`. The caller's directory stays the current one:
# oqc.db belongs there.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m oqc "$@"
