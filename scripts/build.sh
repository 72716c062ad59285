#!/usr/bin/env bash
# Writes dist/oqc.pyz, the whole server in one file, and dist/SHA256SUMS. Needs nothing but Python.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python3}" "$root/scripts/build.py" "$@"
