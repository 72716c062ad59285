"""Flags, environment variables and the runtimes' INI file, made into one frozen settings object.

A flag wins over its environment variable, and that over the default. Whatever is wrong is a ConfigError in one line.
"""
import argparse
import configparser
import ipaddress
import itertools
import os
import re
import shlex
import shutil
import stat
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple

from oqc.jobs import RuntimeSpec

DOCUMENTED_KEY = b"$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(rb"[\t\x20-\x7e\x80-\xff]+")      # what a header can carry (RFC 9110, section 5.5)
WHOLE, DECIMAL = re.compile("[0-9]{1,19}"), re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")  # int, float take 1_0 and ٣ as well
BUILT_IN = {"verbatim": "emulator", "simulation": "simulator", "echo": "echo"}      # and the modes they serve
LEVELS = ("debug", "info", "warning", "error")


class ConfigError(Exception):
    """A setting that cannot be meant; the text is one line that says where, what, and what is allowed."""


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
    keys: Mapping[str, bytes] = {}      # pylint: disable=dangerous-default-value # nobody changes a Mapping


def number(least: float, most: float, convert: Callable[[str], float] = int) -> Callable[[str], float]:
    """What argparse calls to read a number from `least` to `most`."""
    pattern, kind = (WHOLE, "whole number") if convert is int else (DECIMAL, "number")

    def read(text: str) -> float:
        if not pattern.fullmatch(text) or not least <= convert(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a {kind} from {least:g} to {most:g}, found {text[:40]!r}")
        return convert(text)
    return read


def level(text: str) -> str:
    """What argparse calls to read a log level: `choices` would let anything from the environment through."""
    if text not in LEVELS:
        raise argparse.ArgumentTypeError(f"expected {', '.join(LEVELS)}, found {text[:40]!r}")
    return text


def file_name(text: str) -> str:
    """What argparse calls to read a file's name; an empty one is a shell's variable that was never set."""
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
    Flag("port", 12021, "PORT", "port to listen on; 0 takes a free one", number(0, 65535)),
    Flag("db", "oqc.db", "FILE", "database, created if it is not there", file_name),
    Flag("config", None, "FILE", "INI file that describes the runtimes", file_name),
    Flag("kill-grace", 5.0, "SECONDS", "from asking a runtime to end (TERM) to ending it (KILL)",
         number(0, 3600, float)),
    Flag("drain", 30.0, "SECONDS", "that running jobs get to end when the server is stopped", number(0, 86400, float)),
    Flag("max-body", 4 << 20, "BYTES", "largest request body", number(1024, 1 << 30)),
    Flag("max-connections", 512, "N", "connections at once", number(1, 100_000)),
    Flag("max-waiting", 1_000_000, "N", "jobs that may wait before new ones are refused", number(1, 10 ** 9)),
    Flag("keys-file", None, "FILE", "API keys, one name:key a line, mode 0600", file_name),
    Flag("tls-cert", None, "FILE", "certificate (PEM), to serve HTTPS", file_name),
    Flag("tls-key", None, "FILE", "its private key (PEM), if it is not in the same file", file_name),
    Flag("keep-days", 0, "DAYS", "that a job is kept after its end; 0 keeps it for ever", number(0, 100_000)),
    Flag("log-level", "info", "LEVEL", "least severe lines to log: " + ", ".join(LEVELS), level),
)


def add_flags(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Give a parser the server's flags, with their environment variables as defaults."""
    for name, default, metavar, meaning, read in FLAGS:
        variable = "OQC_" + name.replace("-", "_").upper()
        shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else default
        parser.add_argument("--" + name, metavar=metavar, type=read, default=environment.get(variable, default),
                            help=f"{meaning} [{variable}; default: {shown}]")
    parser.add_argument("--runtime", metavar="NAME=COMMAND", action="append", default=[],
                        help="a program that runs verbatim jobs; may be given several times [OQC_RUNTIME, one; "
                             "default: the bundled emulator]")


def settings(options: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """The settings of a server; raises ConfigError."""
    commands = tuple(options.runtime or filter(None, [environment.get("OQC_RUNTIME")]))
    made = Settings(**{**vars(options), "runtime": commands})
    if made.tls_key and not made.tls_cert:
        raise ConfigError("--tls-key: needs --tls-cert beside it")
    return made._replace(runtimes=_runtimes(made), keys=read_keys(made, environment))


# Runtimes

def _runtimes(made: Settings) -> Tuple[RuntimeSpec, ...]:
    """The configured runtimes, and built-in ones for the modes that they leave over; raises ConfigError."""
    found: List[RuntimeSpec] = []
    for text in made.runtime:
        name, equals, command = text.partition("=")
        fail = _failing(f"--runtime {name}")
        if not equals:
            fail(None, "expected NAME=COMMAND")
        found.append(RuntimeSpec(_name(name, found, fail), _command(command, fail)))
    if made.config:
        found += _read_ini(made.config, found)
    if found and not any("verbatim" in spec.modes for spec in found):
        raise ConfigError(f"{made.config}: no runtime serves the mode verbatim; give one of them modes = verbatim")
    for mode, name in BUILT_IN.items():
        if not any(mode in spec.modes for spec in found):
            found.append(RuntimeSpec(name, None, (mode,), "lines" if mode != "echo" else "echo"))
    return tuple(found)


def _read_ini(path: str, others: Sequence[RuntimeSpec]) -> List[RuntimeSpec]:
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";",), default_section="\0")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        parser.read_string(text, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except configparser.MissingSectionHeaderError as error:
        raise ConfigError(f"{path}: line {error.lineno}: expected a section [runtime NAME]") from None
    except configparser.ParsingError as error:
        raise ConfigError(f"{path}: line {error.errors[0][0]}: expected key = value") from None
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        option = getattr(error, "option", None)
        raise ConfigError(f"{path}: line {error.lineno}: [{error.section}]: {option + ' ' if option else ''}"
                          "is there twice") from None
    found: List[RuntimeSpec] = []
    for section in parser.sections():
        fail = _failing(path, section, text.split("\n"))
        kind, _, name = section.partition(" ")
        if kind != "runtime":
            fail(None, "expected a section [runtime NAME]")
        found.append(_spec(_name(name.strip(), [*others, *found], fail), dict(parser[section]), fail))
    return found


Fail = Callable[[Optional[str], str], NoReturn]


def _failing(source: str, section: str = "", lines: Sequence[str] = ()) -> Fail:
    """What raises a ConfigError about a key of a section, with the number of its line."""
    def fail(key: Optional[str], what: str) -> NoReturn:
        where = [source]
        if lines:
            begin = next(i for i, line in enumerate(lines) if line.strip().startswith(f"[{section}]"))
            body = itertools.takewhile(lambda line: not line.startswith("["), lines[begin + 1:])
            place = next((i for i, line in enumerate(body, begin + 1)
                          if key and re.match(rf"{re.escape(key)}\s*[=:]", line.strip(), re.IGNORECASE)), begin)
            where += [f"line {place + 1}", f"[{section}]"]
        raise ConfigError(": ".join([*where, *([key] if key and lines else []), what]))
    return fail


def _name(name: str, others: Sequence[RuntimeSpec], fail: Fail) -> str:
    if not NAME.fullmatch(name):
        fail(None, "a runtime's name is made of letters, digits, '.', '_' and '-', 64 at most")
    if name in BUILT_IN.values() or any(name == spec.name for spec in others):
        fail(None, f"the name {name} is taken")
    return name


def _command(text: str, fail: Fail) -> Tuple[str, ...]:
    try:
        command = tuple(shlex.split(text))
    except ValueError as error:
        fail("command", f"{error}")
    if not command:
        fail("command", "names no program")
    if not shutil.which(command[0]):
        fail("command", f"{command[0]}: no such program, or it may not be executed")
    return command


def _spec(name: str, keys: Dict[str, str], fail: Fail) -> RuntimeSpec:
    """A runtime from the keys of its section."""
    def whole(key: str, text: str, most: int) -> int:
        if not WHOLE.fullmatch(text) or not 1 <= int(text) <= most:
            fail(key, f"expected a whole number from 1 to {most}, found {text!r}")
        return int(text)

    def one_of(key: str, text: str, allowed: Sequence[str]) -> str:
        if text not in allowed:
            fail(key, f"expected {' or '.join(allowed)}, found {text!r}")
        return text

    def seconds(key: str, text: str) -> float:
        if not DECIMAL.fullmatch(text) or not 0 < float(text) <= 1e7:
            fail(key, f"expected seconds, more than 0, found {text!r}")
        return float(text)

    read: Dict[str, Callable[[str, str], Any]] = {
        "command": lambda _, text: _command(text, fail),
        "modes": lambda key, text: tuple(dict.fromkeys(one_of(key, mode.strip(), ("verbatim", "simulation"))
                                                       for mode in text.split(","))),
        "protocol": lambda key, text: one_of(key, text, ("exec", "lines")),
        "slots": lambda key, text: whole(key, text, 1000),
        "timeout": seconds,
        "retry_codes": lambda key, text: tuple(whole(key, code.strip(), 255) for code in text.split(",")),
        "interrupted": lambda key, text: one_of(key, text, ("retry", "fail")),
    }
    for key in keys:
        if key not in read:
            fail(key, f"unknown key; known are {', '.join(read)}")
    return RuntimeSpec(name, **{key: read[key](key, text) for key, text in {"command": "", **keys}.items()})


# Keys

def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(made: Settings, environment: Mapping[str, str]) -> Dict[str, bytes]:
    """{name: key}: the lab's own, or on a loopback address the documented one, which is printed in public and no
    secret; raises ConfigError."""
    keys: Dict[str, bytes] = {}
    directory = environment.get("CREDENTIALS_DIRECTORY")        # systemd.exec(5), LoadCredential=
    credential = os.path.join(directory, "oqc-keys") if directory else ""
    if made.keys_file:
        keys.update(_read_keys_file(made.keys_file, secret=True))
    elif credential and os.path.exists(credential):
        keys.update(_read_keys_file(credential, secret=False))
    if environment.get("OQC_API_KEY"):
        keys["OQC_API_KEY"] = key = os.fsencode(environment["OQC_API_KEY"]).strip(b" \t")
        if not KEY.fullmatch(key):
            raise ConfigError("OQC_API_KEY: expected a key in characters that a header can carry")
    if not keys and not is_loopback(made.host):
        raise ConfigError(f"--host {made.host}: the documented key is public, so on this address the server needs keys "
                          "of its own: python -m oqc key NAME >keys; chmod 600 keys; then --keys-file keys")
    return keys or {"documented": DOCUMENTED_KEY}


def _read_keys_file(path: str, secret: bool) -> Dict[str, bytes]:
    """The keys in a file with one name:key a line; with `secret`, only if nobody else may read it."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(1 << 20).splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if secret and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others may read it; chmod 600 {path}")
    keys: Dict[str, bytes] = {}
    for place, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        name, _, key = line.partition(b":")
        key = key.strip()
        if not NAME.fullmatch(name.decode("latin-1")) or not KEY.fullmatch(key):
            raise ConfigError(f"{path}: line {place}: expected name:key, the key in characters that a header can carry")
        if name.decode() in keys:
            raise ConfigError(f"{path}: line {place}: the name {name.decode()} is there twice")
        keys[name.decode()] = key
    if not keys:
        raise ConfigError(f"{path}: holds no key; python -m oqc key NAME prints a line for it")
    return keys
