"""Flags, environment variables, the runtimes' INI file and the keys, read into frozen values.

A flag wins over its environment variable, and that over the default. Whatever is wrong is a
ConfigError in one line.
"""
import argparse
import configparser
import errno
import functools
import os
import re
import shlex
import shutil
import stat
import sys
from typing import (
    Any, BinaryIO, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple)

from oqc.jobs import NAME, RuntimeSpec, whole_number
from oqc.keys import ALLOWED, OPERATOR, READER, RESERVED, ROLES, Key, is_loopback

DOCUMENTED_KEY = b"$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
KEY = re.compile(rb"[\t\x20-\x7e\x80-\xff]+")     # what a header can carry (RFC 9110, section 5.5)
HEADER = re.compile(r"\[[^][;]+\]\s*(\s;.*)?")
DECIMAL = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")   # float() also takes 1_0, nan and ٣
BUILT_IN = {"verbatim": "emulator", "simulation": "simulator", "echo": "echo"}      # by their modes
LEVELS = ("debug", "info", "warning", "error")


def program_name(source: str, started: str) -> str:
    """Return what a reader types to start this program: from a folder, or from the .pyz that a
    module's source is in, by the name that it was started with."""
    archive = os.path.dirname(os.path.dirname(source))
    return f"python3 {shlex.quote(started)}" if os.path.isfile(archive) else "python3 -m oqc"


PROGRAM = program_name(__file__, sys.argv[0])


class ConfigError(Exception):
    """An invalid setting; the text is one line: where, what is wrong, and what is allowed.

    `topic`: of the manual, which says more.
    """

    def __init__(self, reason: str, topic: str = "") -> None:
        if topic:
            reason += f"; {PROGRAM} help {topic} says more"
        super().__init__(reason)


class Settings(NamedTuple):
    """Everything that can be set about a server."""

    host: str
    port: int
    db: str
    config: Optional[str]
    runtime: Tuple[str, ...]
    kill_grace: float
    drain: float
    max_body: int
    max_connections: int
    max_waiting: int
    keys_file: Optional[str]
    tls_cert: Optional[str]
    tls_key: Optional[str]
    keep_days: int
    log_level: str
    runtimes: Tuple[RuntimeSpec, ...] = ()
    keys: Tuple[Key, ...] = ()


class Command(NamedTuple):
    """A command as the command line has it."""

    arguments: str                  # as the list of commands in `oqc --help` shows them
    help: str                       # there: in lower case, without a full stop
    run: Callable[..., int]
    takes: str = ""                 # its arguments, by their names in commands.ARGUMENTS
    notes: str = ""                 # what its own --help says beside that
    role: str = READER              # that its key needs

    @property
    def description(self) -> str:
        """Its help as a sentence, and who may."""
        text = f"{self.help[0].upper()}{self.help[1:]}."
        if self.role in ALLOWED:
            text += f" {ALLOWED[self.role].capitalize()}."
        return text


# The values of flags: argparse calls these with the text of a flag or of its environment variable.

def whole(least: int, most: int, text: str) -> int:
    """Return the whole number from `least` to `most` that a text is; raise ArgumentTypeError."""
    try:
        return whole_number(text, least, most)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, found {text[:40]!r}") from None


def decimal(least: float, most: float, text: str) -> float:
    """Return the number from `least` to `most` that a text is; raise ArgumentTypeError."""
    if not DECIMAL.fullmatch(text) or not least <= float(text) <= most:
        raise argparse.ArgumentTypeError(
            f"expected a number from {least:g} to {most:g}, found {text[:40]!r}")
    return float(text)


def level(text: str) -> str:
    """Return a log level; raise ArgumentTypeError.

    argparse's `choices` would let anything from the environment through.
    """
    if text not in LEVELS:
        raise argparse.ArgumentTypeError(f"expected {', '.join(LEVELS)}, found {text[:40]!r}")
    return text


def file_name(text: str) -> str:
    """Return a file's name; raise ArgumentTypeError if it is empty: a shell's unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file, found nothing")
    return text


class Flag(NamedTuple):
    """A setting as the command line has it; its environment variable is OQC_ and its name."""

    name: str
    default: Any
    metavar: str
    meaning: str
    read: Callable[[str], Any] = str


FLAGS = (
    Flag("host", "127.0.0.1", "ADDRESS", "address to listen on"),
    Flag("port", 12021, "PORT", "port to listen on; 0 takes a free one",
         functools.partial(whole, 0, 65535)),
    Flag("db", "oqc.db", "FILE", "database; created if it does not exist", file_name),
    Flag("config", None, "FILE", "INI file that describes the runtimes", file_name),
    Flag("kill-grace", 5, "SECONDS",
         "time between SIGTERM, which asks a runtime to end, and SIGKILL",
         functools.partial(decimal, 0, 3600)),
    Flag("drain", 30, "SECONDS", "time that running jobs have to end when the server is stopped",
         functools.partial(decimal, 0, 86400)),
    Flag("max-body", 4 << 20, "BYTES", "size of the largest request body",
         functools.partial(whole, 1024, 1 << 30)),
    Flag("max-connections", 512, "N", "most connections at a time",
         functools.partial(whole, 1, 100_000)),
    Flag("max-waiting", 1_000_000, "N", "most jobs that may wait; more are refused",
         functools.partial(whole, 1, 10 ** 9)),
    Flag("keys-file", None, "FILE", "file with API keys, one name:role:key a line, mode 0600",
         file_name),
    Flag("tls-cert", None, "FILE", "file with a certificate (PEM); the server then serves HTTPS",
         file_name),
    Flag("tls-key", None, "FILE", "file with its private key (PEM), if it is not in the same file",
         file_name),
    Flag("keep-days", 0, "DAYS", "time that a job is kept after its end; 0 keeps it for ever",
         functools.partial(whole, 0, 100_000)),
    Flag("log-level", "info", "LEVEL", "least severe level that is logged: " + ", ".join(LEVELS),
         level),
)


def add_flags(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the server's flags to a parser, with their environment variables as defaults."""
    for flag in FLAGS:
        variable = "OQC_" + flag.name.replace("-", "_").upper()
        default = "none" if flag.default is None else flag.default
        parser.add_argument("--" + flag.name, metavar=flag.metavar, type=flag.read,
                            default=environment.get(variable, flag.default),
                            help=f"{flag.meaning} [{variable}; default: {default}]")
    parser.add_argument("--runtime", metavar="NAME=COMMAND", action="append", default=[],
                        help="a program that runs verbatim jobs; can be given several times "
                             "[OQC_RUNTIME, one; default: the bundled emulator]")


def settings(options: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Return the settings of a server; raise ConfigError."""
    program = environment.get("OQC_RUNTIME")
    programs = options.runtime or ([program] if program else [])
    values = Settings(**{**vars(options), "runtime": tuple(programs)})
    if values.tls_key and not values.tls_cert:
        raise ConfigError("--tls-key: needs --tls-cert beside it")
    return values._replace(runtimes=read_runtimes(values), keys=read_keys(values, environment))


# Runtimes

def read_runtimes(values: Settings) -> Tuple[RuntimeSpec, ...]:
    """Return the configured runtimes, and built-in ones for the modes that these do not serve.

    Raises ConfigError.
    """
    specs: List[RuntimeSpec] = []
    for text in values.runtime:
        name, equals, command = text.partition("=")
        try:
            if not equals:
                raise ValueError("expected NAME=COMMAND")
            _check_name(name, specs)
            specs.append(RuntimeSpec(name, _command(command)))
        except ValueError as error:
            raise ConfigError(f"--runtime {name}: {error}", "configuration") from None
    if values.config:
        _read_ini(values.config, specs)
    served = {mode for spec in specs for mode in spec.modes}
    if specs and "verbatim" not in served:
        raise ConfigError(f"{values.config}: no runtime serves the mode verbatim; "
                          "give one of them modes = verbatim", "configuration")
    for mode, name in BUILT_IN.items():
        if mode not in served:
            protocol = "echo" if mode == "echo" else "lines"
            specs.append(RuntimeSpec(name, None, (mode,), protocol))
    return tuple(specs)


class Section(NamedTuple):
    """A section of an INI file, as errors point at it."""

    path: str
    name: str
    lines: Sequence[str]            # of the whole file

    def line(self, key: str) -> int:
        """Return the number of the line of a key, or of the header for a key that is missing."""
        header = next(number for number, line in enumerate(self.lines, 1)
                      if line.strip().startswith(f"[{self.name}]"))
        setting = re.compile(rf"{re.escape(key)}\s*[=:]", re.IGNORECASE)
        for number, line in enumerate(self.lines[header:], header + 1):
            if line.startswith("["):
                break
            if key and setting.match(line.strip()):
                return number
        return header

    def error(self, reason: object, key: str = "") -> ConfigError:
        """Return the error about the section, or about one of its keys."""
        parts = [self.path, f"line {self.line(key)}", f"[{self.name}]", key, str(reason)]
        return ConfigError(": ".join(filter(None, parts)), "configuration")


def _read_ini(path: str, specs: List[RuntimeSpec]) -> None:
    """Append the runtimes of an INI file to others; raise ConfigError."""
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";",),
                                       default_section="\0")
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8-sig")      # Windows begins it with a BOM
        _check_headers(path, text)
        parser.read_string(text, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text", "configuration") from None
    except configparser.MissingSectionHeaderError as error:
        reason = "expected a section [runtime NAME]"
        where = f"{path}: line {error.lineno}"
        raise ConfigError(f"{where}: {reason}", "configuration") from None
    except configparser.ParsingError as error:
        where = f"{path}: line {error.errors[0][0]}"
        raise ConfigError(f"{where}: expected key = value", "configuration") from None
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        reason = f"{getattr(error, 'option', '')} is there twice".lstrip()
        where = f"{path}: line {error.lineno}: [{error.section}]"
        raise ConfigError(f"{where}: {reason}", "configuration") from None
    for name in parser.sections():
        section = Section(path, name, text.split("\n"))
        specs.append(_read_section(section, dict(parser[name]), specs))


def _check_headers(path: str, text: str) -> None:
    """Raise ConfigError for a line that looks like a section's header and is none to configparser,
    which would skip what stands behind it, or take an indented one for a part of a value."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip().startswith("[") and not HEADER.fullmatch(line):
            raise ConfigError(f"{path}: line {number}: expected [runtime NAME] alone on its line, "
                              "from its beginning", "configuration")


def _read_section(section: Section, texts: Dict[str, str],
                  others: Sequence[RuntimeSpec]) -> RuntimeSpec:
    """Return the runtime that a section describes; raise ConfigError."""
    kind, _, name = section.name.partition(" ")
    values: Dict[str, Any] = {}
    key = ""                        # the one that is read, for the error
    try:
        if kind != "runtime":
            raise ValueError("expected a section [runtime NAME]")
        _check_name(name.strip(), others)
        for key in texts:
            if key not in READERS:
                raise ValueError(f"unknown key; known are {', '.join(READERS)}")
        readers = _readers_beside(section.path)
        for key, text in {"command": "", **texts}.items():
            values[key] = readers[key](text)
        for key in ONLY_LINES:
            if key in values and values.get("protocol") != "lines":
                raise ValueError("only with protocol = lines")
    except ValueError as error:
        raise section.error(error, key) from None
    return RuntimeSpec(name.strip(), **values)


def _check_name(name: str, others: Sequence[RuntimeSpec]) -> None:
    """Raise ValueError if a runtime may not have this name."""
    if not NAME.fullmatch(name):
        raise ValueError("a runtime's name is made of letters, digits, '.', '_' and '-', "
                         "64 at most")
    if name in BUILT_IN.values() or any(name == spec.name for spec in others):
        raise ValueError(f"the name {name} is taken")


# The values of a section's keys: each reader takes a text and raises ValueError.

def _command(text: str, folder: str = "") -> Tuple[str, ...]:
    """Return a command, its program looked for in a folder and, a mere name, on PATH."""
    words = tuple(shlex.split(text))        # raises ValueError: No closing quotation
    if not words:
        raise ValueError("expected a program and its arguments")
    program, *arguments = words
    beside = os.path.abspath(os.path.join(folder, program))
    if (folder or "/" in program) and shutil.which(beside):
        return (beside, *arguments)
    if "/" in program or not shutil.which(program):
        raise ValueError(f"{program}: no such program, or it is not executable")
    return words


def _directory(text: str, folder: str = "") -> str:
    path = os.path.abspath(os.path.join(folder, text))
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such directory")
    return path


def _one_of(allowed: Sequence[str], text: str) -> str:
    if text not in allowed:
        raise ValueError(f"expected {' or '.join(allowed)}, found {text!r}")
    return text


def _whole(least: int, most: int, text: str) -> int:
    try:
        return whole_number(text, least, most)
    except ValueError as error:
        raise ValueError(f"{error}, found {text!r}") from None


def _seconds(text: str) -> float:
    if not DECIMAL.fullmatch(text) or not 0 < float(text) <= 1e7:
        raise ValueError(f"expected a number of seconds above 0, found {text!r}")
    return float(text)


def _yes_or_no(text: str) -> bool:
    return _one_of(("yes", "no"), text) == "yes"


def _modes(text: str) -> Tuple[str, ...]:
    modes = [_one_of(("verbatim", "simulation"), mode.strip()) for mode in text.split(",")]
    return tuple(dict.fromkeys(modes))      # each of them once


def _return_codes(text: str) -> Tuple[int, ...]:
    return tuple(_whole(1, 255, code.strip()) for code in text.split(","))


READERS: Dict[str, Callable[[str], Any]] = {
    "command": _command,
    "modes": _modes,
    "protocol": functools.partial(_one_of, ("exec", "lines")),
    "slots": functools.partial(_whole, 1, 1000),
    "timeout": _seconds,
    "start_timeout": _seconds,
    "warm": _yes_or_no,
    "attempts": functools.partial(_whole, 1, 1000),
    "retry_codes": _return_codes,
    "pause_after": functools.partial(_whole, 0, 1_000_000),
    "interrupted": functools.partial(_one_of, ("retry", "fail")),
    "cwd": _directory,
    "result_bytes": functools.partial(_whole, 1024, 8 << 20),
    "log_bytes": functools.partial(_whole, 1024, 8 << 20),
}

ONLY_LINES = ("start_timeout", "warm")      # of READERS: exec would ignore them


def _readers_beside(path: str) -> Dict[str, Callable[[str], Any]]:
    """Return the readers of an INI file, by whose folder its relative paths go."""
    folder = os.path.dirname(os.path.abspath(path))
    return {
        **READERS,
        "command": functools.partial(_command, folder=folder),
        "cwd": functools.partial(_directory, folder=folder),
    }


# Keys

def read_keys(values: Settings, environment: Mapping[str, str]) -> Tuple[Key, ...]:
    """Return the keys; raise ConfigError.

    Without keys of its own a server on a loopback address has the documented one, which is printed
    in public and so no secret.
    """
    keys: Tuple[Key, ...] = ()
    # systemd.exec(5), LoadCredential=
    credential = os.path.join(environment.get("CREDENTIALS_DIRECTORY", ""), "oqc-keys")
    if values.keys_file:
        keys = _read_keys_file(values.keys_file, secret=True)
    elif environment.get("CREDENTIALS_DIRECTORY") and os.path.exists(credential):
        keys = _read_keys_file(credential, secret=False)
    own = key_of_variable(environment)
    if environment.get("OQC_API_KEY"):
        if not KEY.fullmatch(own):
            raise ConfigError("OQC_API_KEY: expected a key in characters that a header can carry")
        if not any(own == key.secret for key in keys):      # else it is what the file says
            keys += (Key("OQC_API_KEY", OPERATOR, own),)
    if not keys and not is_loopback(values.host):
        raise ConfigError(
            f"--host {values.host}: the documented key is public, so on this address the server "
            f"needs keys of its own: {PROGRAM} key NAME --role operator >keys; chmod 600 keys; "
            "then --keys-file keys", "keys")
    return keys or (Key("documented", OPERATOR, DOCUMENTED_KEY),)


def open_file(path: str) -> BinaryIO:
    """Open a file to read it; raise OSError, also for a pipe, where that might wait for ever."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is a pipe; expected a file")
    return file


def key_of_variable(environment: Mapping[str, str]) -> bytes:
    """Return the key in OQC_API_KEY, b"" without one."""
    return os.fsencode(environment.get("OQC_API_KEY", "")).strip(b" \t")


def split_key_line(line: bytes) -> Tuple[str, str, bytes]:
    """Return the name, the role and the key of a line name:role:key; the name is "" if none is
    before the key, and the role if there is none of that name."""
    name, colon, rest = line.partition(b":")
    if not colon or not NAME.fullmatch(name.decode("latin-1")):
        return "", "", line.strip()
    role, colon, key = rest.partition(b":")
    if not colon or role.strip().decode("latin-1") not in ROLES:
        return name.decode(), "", rest.strip()
    return name.decode(), role.strip().decode(), key.strip()


def _read_keys_file(path: str, secret: bool) -> Tuple[Key, ...]:
    """Return the keys of a file with one name:role:key a line; raise ConfigError.

    `secret`: nobody but its owner may be able to read it.
    """
    try:
        with open_file(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(1 << 20).splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if secret and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others may read it; chmod 600 {path}")
    keys: List[Key] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            keys.append(_key(line, keys))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number}: {error}", "keys") from None
    if not keys:
        raise ConfigError(f"{path}: holds no key; {PROGRAM} key NAME prints a line for it",
                          "keys")
    return tuple(keys)


def _key(line: bytes, others: Sequence[Key]) -> Key:
    """Return the key that a line is; raise ValueError, with nothing of the key in it."""
    name, role, secret = split_key_line(line)
    if not name or not KEY.fullmatch(secret):
        raise ValueError("expected name:role:key, the key in characters that a header can carry")
    if name in RESERVED:
        raise ValueError(f"{name} is no name for a key, it says something else")
    if not role and b":" in secret:
        raise ValueError(f"expected one of the roles {', '.join(ROLES)} behind the name {name}, "
                         "also before a key that holds a colon")
    key = Key(name, role or OPERATOR, secret)
    for other in others:
        if other.name == name and other.role != key.role:
            raise ValueError(f"the name {name} has the role {other.role} in a line before")
        if other.secret == secret and other.role != key.role:
            raise ValueError(f"the key of {name} is that of {other.name}, who has another role")
    return key
