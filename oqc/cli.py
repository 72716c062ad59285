"""The command line: serve, and the exit statuses (sysexits: 2 usage, 78 configuration, 1 anything else)."""
import argparse
import os
import platform
import secrets
import sys
from typing import Any, List, Sequence

from oqc import __version__
from oqc.config import NAME, ConfigError, add_flags, settings

EX_FAILED, EX_USAGE, EX_CONFIG = 1, 2, 78

DESCRIPTION = """\
A job server for quantum-control pulses. Started without arguments it listens on 127.0.0.1:12021, keeps its jobs in
oqc.db in the current directory, and takes jobs by HTTP:

  curl -H "api_key: KEY" http://localhost:12021/jobs/add/ -d '{"job": "X(90), Y(180)", "mode": "simulation"}'
"""
EPILOG = """\
other commands:
  key NAME       print a line for --keys-file with a new key
  backup FILE    copy the database to a new file, also while a server uses it
  check          read the whole database and print what is wrong with it
  emulator       the bundled device emulator, a runtime over the protocol lines (emulator --help: its parameters)
  simulator      the bundled exact simulator, likewise
"""


def main(arguments: List[str]) -> int:
    """Run the command line; the exit status."""
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")     # closed: before 3.10 argparse fails on None
    try:
        from oqc import app     # pylint: disable=import-outside-toplevel # may miss sqlite3, which gets a line of its own
    except ImportError as error:
        return _fail(f"this Python lacks {error.name}; install it, or use another Python", EX_FAILED)
    if arguments[:1] in (["emulator"], ["simulator"]):
        return app.builtin(arguments)
    if arguments[:1] == ["key"]:
        return _key(arguments[1:])
    if arguments[:1] in (["backup"], ["check"]):
        return _offline(app, arguments)
    parser = argparse.ArgumentParser(prog="oqc", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version",
                        version=f"oqc {__version__}, Python {platform.python_version()}, SQLite {app.SQLITE_VERSION}")
    add_flags(parser, os.environ)
    try:
        return app.serve(settings(parser.parse_args(arguments), os.environ))
    except ConfigError as error:
        return _fail(str(error), EX_CONFIG)
    except app.StartError as error:
        return _fail(str(error), EX_FAILED)


def _fail(reason: str, status: int) -> int:
    print("oqc: " + reason.replace("\n", "\\n"), file=sys.stderr)
    return status


def _offline(app: Any, arguments: Sequence[str]) -> int:
    """`backup FILE` and `check`: what reads the database without asking the server."""
    parser = argparse.ArgumentParser(prog=f"oqc {arguments[0]}", description=(
        "Copy the database to a new file, also while a server uses it." if arguments[0] == "backup" else
        "Read the whole database and print what is wrong with it, a line each; exit status 1 if anything is."))
    if arguments[0] == "backup":
        parser.add_argument("file", metavar="FILE", help="where to; a file that is there is never replaced")
    parser.add_argument("--db", metavar="FILE", default=os.environ.get("OQC_DB", "oqc.db"),
                        help="database [OQC_DB; default: oqc.db]")
    options = parser.parse_args(arguments[1:])
    try:
        if arguments[0] == "backup":
            app.backup(options.db, options.file)
            return 0
        found = list(app.check(options.db))
    except app.StoreError as error:
        return _fail(str(error), EX_FAILED)
    print("\n".join(found) or f"{options.db}: ok")
    return EX_FAILED if found else 0


def _key(arguments: Sequence[str]) -> int:
    """`key NAME`: print a new line for the keys file."""
    parser = argparse.ArgumentParser(prog="oqc key", description="Print a line for --keys-file with a new key.")
    parser.add_argument("name", metavar="NAME", help="whose key it is; stands in the log and beside the jobs")
    name = parser.parse_args(arguments).name
    if not NAME.fullmatch(name):
        parser.error("NAME is made of letters, digits, '.', '_' and '-', 64 at most")
    print(f"{name}:{secrets.token_urlsafe(32)}")
    return 0
