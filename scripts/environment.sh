# Sourced by the scripts beside it: goes to the root of the checkout and sets PYTHON to a Python
# that has pytest and pylint. That is the one at hand ($PYTHON, else python3) if it has them, else
# one in .venv, made here.
# shellcheck shell=bash
set -euo pipefail

asked=${PYTHON:-python3}
new_enough='import sys; print(sys.executable); sys.exit(sys.version_info < (3, 9))'
if ! PYTHON=$("$asked" -c "$new_enough" 2>/dev/null); then
    echo "oqc needs Python 3.9 or later, which $asked is not: set PYTHON to one" >&2
    exit 2
fi
# Only now, since $asked may be a path from where the caller is. CDPATH would send cd elsewhere.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Prints the version of a Python that can run the tests. One with older tools than requirements.txt
# asks for cannot.
ready() {
    "$1" -c 'import sys, pylint, pytest
def version(tool):
    return [int(part) for part in tool.__version__.split(".")[:2]]
if version(pylint) < [3, 3] or version(pytest) < [8, 0]:
    sys.exit(1)
print(sys.version)' 2>/dev/null
}

if ! ready "$PYTHON" >/dev/null; then
    # A .venv that was left half made, or that another Python made, is made again.
    if [ "$(ready .venv/bin/python)" != "$("$PYTHON" -c 'import sys; print(sys.version)')" ]; then
        if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
            if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
                echo "$PYTHON cannot make .venv: on Debian or Ubuntu type:" \
                    "sudo apt-get install python3-venv" >&2
                exit 1
            fi
            apt-get update -qq >&2
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >&2
        fi
        echo "making .venv with what requirements.txt names" >&2
        "$PYTHON" -m venv --clear .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    PYTHON=$PWD/.venv/bin/python
fi
