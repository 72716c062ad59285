"""The command line: serve, the other commands, and the exit statuses.

These are 2 for wrong usage, 78 for an invalid configuration, 130 after Ctrl-C, and 1 else.
"""
import argparse
import os
import secrets
import signal
import sys
from typing import Any, Dict, List, NoReturn, Sequence

from oqc import __version__
from oqc.config import NAME, Command, ConfigError, add_flags, settings
from oqc.keys import RESERVED, ROLES, USER

EX_FAILED, EX_USAGE, EX_CONFIG, EX_INTERRUPTED = 1, 2, 78, 130
BROKEN_PIPE, TERMINATED = 128 + 13, 128 + 15        # the shell

DESCRIPTION = """\
A job server for quantum-control pulses. Started without arguments it listens on 127.0.0.1:12021, \
keeps its jobs in
oqc.db in the current directory, and takes jobs by HTTP:

  curl -H "api_key: KEY" http://localhost:12021/jobs/add/ \
-d '{"job": "X(90), Y(180)", "mode": "simulation"}'
"""


def main(arguments: List[str]) -> int:
    """Run the command line; return the exit status."""
    # Where it is closed, argparse before Python 3.10 fails.
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    try:
        return _run(arguments)
    except SystemExit as ended:         # argparse, which has printed help or an error
        if ended.code:          # pylint: disable=using-constant-test # not always None
            raise
        return _write("")
    except MemoryError:
        return _fail("too little memory (ulimit -v)", EX_FAILED)
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return _fail("no thread can be started (ulimit -u), or too little memory (ulimit -v)",
                     EX_FAILED)


def _run(arguments: List[str]) -> int:
    """Run the command line; return the exit status."""
    try:
        if not arguments or arguments[0].startswith("-"):
            return _serve(arguments)
        if arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]].run(arguments)
        # pylint: disable-next=import-outside-toplevel # a server needs nothing of it
        from oqc import commands
        if arguments[0] in commands.COMMANDS:
            return int(commands.run(arguments))
        return _fail(f"no command is called {arguments[0]}; "
                     "without a command the server starts; --help lists the commands", EX_USAGE)
    except ConfigError as error:
        return _fail(str(error), EX_CONFIG)
    except KeyboardInterrupt:
        return EX_INTERRUPTED


def _fail(reason: str, status: int) -> int:
    print("oqc: " + reason.replace("\n", "\\n"), file=sys.stderr)
    return status


def _write(text: str) -> int:
    """Write to standard output all that there is to write; return the exit status."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE          # who does not read on has seen enough
        return _fail(f"standard output: {error.strerror}", EX_FAILED)
    return 0


def _terminate(*_: Any) -> NoReturn:
    """End by SIGTERM as by Ctrl-C: what has begun is cleared away."""
    raise SystemExit(TERMINATED)


def _app() -> Any:
    """Return the server side, which takes long to import and may miss sqlite3."""
    try:
        from oqc import app                 # pylint: disable=import-outside-toplevel # as said
        return app
    except ImportError as error:
        if not error.name or isinstance(error.__context__, MemoryError):
            raise MemoryError from None     # a part of Python that could not be loaded
        raise SystemExit(_fail(f"this Python lacks {error.name}; install it, or use another Python",
                               EX_FAILED)) from None


# Serving

class ServerParser(argparse.ArgumentParser):
    """The parser of the server's flags."""

    def format_help(self) -> str:
        """Return the help, with all commands at its end."""
        from oqc import commands    # pylint: disable=import-outside-toplevel # as in main
        self.epilog = "\n".join([
            "commands for a server that runs, each with a --help of its own:",
            *_help_lines(commands.COMMANDS),
            "",
            "other commands:",
            *_help_lines(COMMANDS)])
        return super().format_help()


def _help_lines(commands: Dict[str, Command]) -> List[str]:
    """Return a line for each command."""
    return [f"  {name + ' ' + command.arguments:13}  {command.help}"
            for name, command in commands.items()]


def _serve(arguments: Sequence[str]) -> int:
    """Serve: what is done without a command."""
    app = _app()
    parser = ServerParser(prog="oqc", description=DESCRIPTION, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    version = f"oqc {__version__}, Python {sys.version.split()[0]}, SQLite {app.SQLITE_VERSION}"
    parser.add_argument("--version", action="version", version=version)
    add_flags(parser, os.environ)
    try:
        return int(app.serve(settings(parser.parse_args(arguments), os.environ)))
    except app.StartError as error:
        return _fail(str(error), EX_FAILED)


# The other commands that ask no server

def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"oqc {name}", description=COMMANDS[name].description)


def _add_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", metavar="FILE", default=os.environ.get("OQC_DB", "oqc.db"),
                        help="database [OQC_DB; default: oqc.db]")


def _key(arguments: Sequence[str]) -> int:
    """Print a new line for the keys file."""
    parser = _parser("key")
    parser.add_argument("name", metavar="NAME",
                        help="name of the key's owner, shown in the log and stored with the jobs")
    parser.add_argument("--role", metavar="ROLE", choices=ROLES, default=USER,
                        help=f"what its owner may do: {', '.join(ROLES)} [default: {USER}]")
    options = parser.parse_args(arguments[1:])
    if not NAME.fullmatch(options.name):
        parser.error("NAME is made of letters, digits, '.', '_' and '-', 64 at most")
    if options.name in RESERVED:
        parser.error(f"{options.name} is no name for a key, it says something else")
    return _write(f"{options.name}:{options.role}:{secrets.token_urlsafe(32)}\n")


def _backup(arguments: Sequence[str]) -> int:
    """Copy the database."""
    app = _app()
    parser = _parser("backup")
    parser.add_argument("file", metavar="FILE",
                        help="the new file; an existing file is never replaced")
    _add_database(parser)
    options = parser.parse_args(arguments[1:])
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app.backup(options.db, options.file)
    except app.StoreError as error:
        return _fail(str(error), EX_FAILED)
    return 0


def _check(arguments: Sequence[str]) -> int:
    """Print what is wrong with the database."""
    app = _app()
    parser = _parser("check")
    _add_database(parser)
    options = parser.parse_args(arguments[1:])
    try:
        faults = list(app.check(options.db))
    except app.StoreError as error:
        return _fail(str(error), EX_FAILED)
    status = _write(("\n".join(faults) or f"{options.db}: ok") + "\n")
    if faults:
        return EX_FAILED
    return status


def _restore(arguments: Sequence[str]) -> int:
    """Put a backup in the place of the database."""
    app = _app()
    parser = _parser("restore")
    parser.add_argument("file", metavar="BACKUP", help="what backup wrote; it stays as it is")
    _add_database(parser)
    options = parser.parse_args(arguments[1:])
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _write(app.restore(options.db, options.file) + "\n")
    except app.StoreError as error:
        return _fail(str(error), EX_FAILED)


def _compact(arguments: Sequence[str]) -> int:
    """Make the database smaller."""
    app = _app()
    parser = _parser("compact")
    _add_database(parser)
    options = parser.parse_args(arguments[1:])
    try:
        return _write(app.compact(options.db) + "\n")
    except app.StoreError as error:
        return _fail(str(error), EX_FAILED)


def _builtin(arguments: Sequence[str]) -> int:
    """Be a bundled runtime, over standard input and output."""
    from oqc import builtin     # pylint: disable=import-outside-toplevel # no other needs it
    return builtin.main(arguments)


def _relay(arguments: Sequence[str]) -> int:
    """Run a program for a server on another machine."""
    from oqc import relay       # pylint: disable=import-outside-toplevel # no other needs it
    return relay.main(arguments[1:])


def _help(arguments: Sequence[str]) -> int:
    """Print the manual, or where a word stands in it."""
    # pylint: disable-next=import-outside-toplevel # no other command needs them
    from oqc import manual
    parser = _parser("help")
    parser.add_argument("word", nargs="?", metavar="TOPIC|WORD",
                        help="a topic; or a word, to see where it stands; "
                             "without one the topics are listed")
    word = parser.parse_args(arguments[1:]).word
    topics = manual.read()
    if word is None:
        text = manual.contents(topics)
    elif word in topics:
        text = topics[word]
    else:
        text = "".join(f"{place}\n" for place in manual.places(topics, word))
        if not text:
            return _fail(f"no topic is called {word}, and no topic has this word; "
                         "help lists the topics", EX_FAILED)
    if sys.stdout.isatty():
        import pydoc    # pylint: disable=import-outside-toplevel # it takes long
        pydoc.pager(text)
        return 0
    sys.stdout.reconfigure(encoding="utf-8")
    return _write(text)


COMMANDS = {
    "help": Command("TOPIC", "the manual: its topics, a topic, or where a word stands", _help),
    "key": Command("NAME", "print a line for --keys-file with a new key", _key),
    "backup": Command(
        "FILE", "copy the database to a new file, also while a server uses it", _backup),
    "restore": Command(
        "BACKUP", "put a copy of a backup in the database's place, which is kept; with the server "
                  "stopped", _restore),
    "compact": Command(
        "", "make the database smaller, with the server stopped; needs up to twice its size as "
            "free space", _compact),
    "check": Command(
        "", "read the whole database and print what is wrong with it; "
            "exit status 1 if it finds anything", _check),
    "emulator": Command(
        "", "the bundled device emulator, a runtime over the protocol lines "
            "(emulator --help: its parameters)", _builtin),
    "simulator": Command(
        "", "the bundled exact simulator, a runtime over the protocol lines", _builtin),
    "relay": Command(
        "COMMAND", "run a program for a server on another machine, as its runtime behind ssh",
        _relay),
}
