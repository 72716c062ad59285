"""The command line: serve, the other commands, the exit statuses (2 usage, 78 configuration, 130 Ctrl-C, 1 else)."""
import argparse
import os
import secrets
import sys
from typing import Any, Callable, Dict, List, Sequence

from oqc import __version__
from oqc.config import NAME, ConfigError, add_flags, settings

EX_FAILED, EX_USAGE, EX_CONFIG, EX_INTERRUPTED = 1, 2, 78, 130

DESCRIPTION = """\
A job server for quantum-control pulses. Started without arguments it listens on 127.0.0.1:12021, keeps its jobs in
oqc.db in the current directory, and takes jobs by HTTP:

  curl -H "api_key: KEY" http://localhost:12021/jobs/add/ -d '{"job": "X(90), Y(180)", "mode": "simulation"}'
"""
EPILOG = """\
commands for a server that runs, each with a --help of its own:
  add JOB        add a job; from standard input with -, and with --wait until it has ended
  get ID         show a job
  list           show all jobs, or a page of them
  wait ID        show a job as soon as it has ended
  cancel ID      cancel a job
  result ID      show what its runtime put out
  prune --older-than AGE  forget the jobs that ended longer ago
  runtimes       show the runtimes; also: pause NAME, resume NAME
  status         show how much waits, runs and has ended

other commands:
  key NAME       print a line for --keys-file with a new key
  backup FILE    copy the database to a new file, also while a server uses it
  check          read the whole database and print what is wrong with it
  emulator       the bundled device emulator, a runtime over the protocol lines (emulator --help: its parameters)
  simulator      the bundled exact simulator, likewise
"""
CLIENT = ("add", "get", "list", "wait", "cancel", "result", "prune", "runtimes", "pause", "resume", "status")


def main(arguments: List[str]) -> int:
    """Run the command line; the exit status."""
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")     # closed: before 3.10 argparse fails on None
    try:
        if not arguments or arguments[0].startswith("-"):
            return _serve(arguments)
        if arguments[0] not in COMMANDS:
            return _fail(f"no command is called {arguments[0]}; without one it serves, and --help names all", EX_USAGE)
        return COMMANDS[arguments[0]](arguments)
    except ConfigError as error:
        return _fail(str(error), EX_CONFIG)
    except KeyboardInterrupt:
        return EX_INTERRUPTED


def _app() -> Any:
    """The server side, which takes long to import."""
    try:
        from oqc import app     # pylint: disable=import-outside-toplevel # may miss sqlite3, which gets a line of its own
        return app
    except ImportError as error:
        raise SystemExit(_fail(f"this Python lacks {error.name}; install it, or use another Python",
                               EX_FAILED)) from None


def _serve(arguments: Sequence[str]) -> int:
    """No command: serve."""
    app = _app()
    parser = argparse.ArgumentParser(prog="oqc", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version",
                        version=f"oqc {__version__}, Python {sys.version.split()[0]}, SQLite {app.SQLITE_VERSION}")
    add_flags(parser, os.environ)
    try:
        return int(app.serve(settings(parser.parse_args(arguments), os.environ)))
    except app.StartError as error:
        return _fail(str(error), EX_FAILED)


def _client(arguments: Sequence[str]) -> int:
    """A command that asks a server."""
    from oqc import client      # pylint: disable=import-outside-toplevel # a server needs nothing of it
    return client.run(arguments)


def _builtin(arguments: Sequence[str]) -> int:
    """A bundled runtime, over standard input and output."""
    from oqc import builtin     # pylint: disable=import-outside-toplevel # no other command needs it
    return builtin.main(arguments)


def _fail(reason: str, status: int) -> int:
    print("oqc: " + reason.replace("\n", "\\n"), file=sys.stderr)
    return status


def _offline(arguments: Sequence[str]) -> int:
    """`backup FILE` and `check`: what reads the database without asking the server."""
    app = _app()
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
    name = parser.parse_args(arguments[1:]).name
    if not NAME.fullmatch(name):
        parser.error("NAME is made of letters, digits, '.', '_' and '-', 64 at most")
    print(f"{name}:{secrets.token_urlsafe(32)}")
    return 0


# What the first argument may be, and who gets all of them then.
COMMANDS: Dict[str, Callable[[Sequence[str]], int]] = {
    **dict.fromkeys(CLIENT, _client),
    "key": _key,
    "backup": _offline,
    "check": _offline,
    "emulator": _builtin,
    "simulator": _builtin,
}
