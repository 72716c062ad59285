#!/usr/bin/env bash
# Starts the server; arguments go to `python -m oqc`. The caller's directory stays the current one:
# oqc.db belongs there. No PYTHONPATH, which runtimes would inherit.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/.." && pwd)
start='import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module("oqc", None, "__main__", True)'
exec "${PYTHON:-python3}" -c "$start" "$root" "$@"
