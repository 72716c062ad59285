"""The client commands: the HTTP API for people without curl, and one oqc as a runtime of another."""
import argparse
import functools
import json
import math
import os
import re
import secrets
import signal
import sys
import threading
from http.client import HTTPConnection, HTTPException
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple
from urllib.parse import quote, urlencode, urlsplit

from oqc import config
from oqc.clock import Clock
from oqc.config import ConfigError

# sysexits.h, timeout(1) and the shell
EX_FAILED, EX_UNAVAILABLE, EX_TEMPFAIL, EX_NOPERM, NOT_ENDED = 1, 69, 75, 77, 124
INTERRUPTED, BROKEN_PIPE, TERMINATED = 128 + 2, 128 + 13, 128 + 15
MOST_WAIT, PAUSE = 300, 0.5         # seconds that the server waits at most, and until it is asked again
CONNECT, ANSWER = 10.0, 330.0       # seconds until there is a connection, and an answer
LAST_WORDS = 1.0                    # seconds for a cancel after TERM: whoever sent that may send KILL after two
BATCH, BATCH_BYTES = 1000, 1 << 18  # jobs of standard input in one request
LOCAL = "http://127.0.0.1:12021"


class Failed(Exception):
    """A command that cannot be carried out: why, and the exit status. `passing`: it may be possible a little later;
    `sent`: the server may have done it all the same."""

    def __init__(self, reason: str, status: int = EX_FAILED, passing: bool = False, sent: bool = False) -> None:
        super().__init__(reason)
        self.status, self.passing, self.sent = status, passing, sent


class Terminated(BaseException):
    """SIGTERM came."""


def say(line: str, end: str = "\n") -> None:
    """A line on standard error, if it can be written. Without its end it stands on a terminal until another comes."""
    try:
        begin = "\r\x1b[K" if sys.stderr.isatty() else ""
        if begin or end:
            shown = "".join(one if one.isprintable() or one == "\t" else repr(one)[1:-1] for one in line)
            print(begin + shown, end=end, file=sys.stderr, flush=True)
    except OSError:
        pass


def put(data: bytes) -> int:
    """Write to standard output; 0. Raises Failed, without a reason if it is only that nobody reads on."""
    say("", end="")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # or what is left in the buffer fails again when Python ends
        if isinstance(error, BrokenPipeError):
            raise Failed("", BROKEN_PIPE) from None
        raise Failed(f"standard output: {error.strerror}") from None


class Server:
    """The server at the other end of one connection, which is opened again whenever it was closed."""

    def __init__(self, connection: HTTPConnection, url: str, key: bytes) -> None:
        self.connection, self.url, self.prefix, self.key = connection, url, urlsplit(url).path.rstrip("/"), key
        self.text = sys.stdout.isatty()

    def ask(self, method: str, path: str, body: bytes = b"", *, text: bool = False, seconds: float = ANSWER,
            **headers: Any) -> bytes:
        """The answer to a request; raises Failed. One whose length is not known, a listing, is put out as it comes."""
        headers.update(api_key=self.key, accept="text/plain" if text else "application/json")
        reused = sent = self.connection.sock is not None
        try:
            if not reused:
                self.connection.timeout = min(seconds, CONNECT)
                self.connection.connect()
                sent = True
            self.connection.sock.settimeout(seconds if seconds < math.inf else None)
            self.connection.request(method, self.prefix + path, body or None, headers)
            response = self.connection.getresponse()
            while response.status == 200 and response.length is None and not response.isclosed():
                put(response.read1(1 << 16))
            found = response.read()
        except (OSError, HTTPException, UnicodeError) as error:
            self.connection.close()
            if reused and isinstance(error, ConnectionError):       # closed since the last answer
                return self.ask(method, path, body, text=text, seconds=seconds, **headers)
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
            # A ValueError is a name that is none, or a certificate that is not trusted: that will not pass.
            raise Failed(f"{self.url}: {reason}", EX_UNAVAILABLE, not isinstance(error, ValueError), sent) from None
        if response.status in (200, 201):
            return found
        try:
            value = json.loads(found)
            reason = value["detail"] if value else f"no job has the id {path.split('/')[2]}"    # 0: documented so
        except (ValueError, TypeError, LookupError):
            reason = f"{self.url}: {response.status} {response.reason}"
        if response.status == 401:
            raise Failed(f"{self.url}: does not know the key; --key-file, OQC_KEY_FILE or OQC_API_KEY has another",
                         EX_NOPERM)
        raise Failed(reason, passing="Retry-After" in response.headers)

    def patiently(self, ask: Callable[[int], Any], deadline: float) -> Any:
        """What `ask(seconds to wait)` gives: asked again, until the deadline, while that is None or the server is away
        or too busy. Raises Failed."""
        told = False
        while True:
            began = Clock.monotonic()
            left = max(0.0, deadline - began)
            try:
                found = ask(round(min(MOST_WAIT, left)))
                if found is not None or not left:
                    return found
            except Failed as error:
                if not error.passing or not left:
                    raise
                if not told:
                    say(f"oqc: {error}; trying again")
                told = True
            # A server that is stopping, or has no room for another request that waits, answers at once.
            Clock.wait(threading.Event(), min(left, max(0.0, began + PAUSE - Clock.monotonic())))

    def show(self, path: str, answer: bytes = b"") -> int:
        """Put out what is at this path, on a terminal as text; or an answer that has it. Returns 0."""
        return put(answer if answer and not self.text else self.ask("GET", path, text=self.text))


def decoded(answer: bytes) -> Any:
    """The value in an answer; raises Failed."""
    try:
        return json.loads(answer)
    except ValueError:
        raise Failed("what answers there is not oqc") from None


# add

def add(server: Server, options: argparse.Namespace) -> int:
    """Add a job, or those on standard input; with --wait end as they do."""
    def terminate(*_: Any) -> None:
        raise Terminated

    options.ids = ids = []
    waits, many = options.wait is not None, options.job == "-"
    deadline = Clock.monotonic() + (options.wait or 0.0)
    if waits:
        signal.signal(signal.SIGTERM, terminate)
    try:
        for batch in batches() if many else [[(0, options.job)]]:
            answer = add_batch(server, options, batch)
            if not waits and not many:
                return server.show(f"/jobs/{ids[0]}/", answer)
            if not waits and not server.text:       # a job a line, so that batches do not show
                put("".join(json.dumps(job) + "\n" for job in decoded(answer)).encode())
            say(f"{len(ids)} jobs added", end="")
        if not waits:
            return put(f"added {named(ids)}\n".encode() if server.text else b"")
        options.seconds = deadline - Clock.monotonic()
        return each(lambda *job: outcome(*job, True, f"job {job[1].split('/')[2]}: " * (len(ids) > 1)), server, options)
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.connection.close()       # in the middle of something
        for number in reversed(ids):    # so that none begins because another was cancelled
            try:
                server.ask("DELETE", f"/jobs/{number}/", seconds=LAST_WORDS)
            except Failed:              # it has ended, or ends after this program
                pass
        return TERMINATED
    except KeyboardInterrupt:
        say(f"oqc: interrupted; {named(ids)} not cancelled" if ids else "oqc: interrupted")
        return INTERRUPTED


def batches() -> Iterator[List[Tuple[int, str]]]:
    """The (line, job)s of standard input, as many at a time as are sent together; raises Failed."""
    batch: List[Tuple[int, str]] = []
    size = 0
    for place, line in enumerate(open(0, "rb", closefd=False), 1):
        if batch and (len(batch) == BATCH or size + len(line) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        if line.strip():
            batch.append((place, line.decode("utf-8", "replace").rstrip("\r\n")))
            size += len(line)
    if not batch:
        raise Failed("standard input: no job in it")
    yield batch


def add_batch(server: Server, options: argparse.Namespace, batch: List[Tuple[int, str]]) -> bytes:
    """Add jobs, all or none, and enter their ids in `options`; the answer. Raises Failed."""
    names = ("mode", "shots", "seed", "return_code")        # the server tells its runtimes the first three
    given = [(name, getattr(options, name) or os.environ.get(f"OQC_{name.upper()}")) for name in names]
    members = {name: int(text) if re.fullmatch("[0-9]{1,19}", text) else text for name, text in given if text}
    values = [{"job": job, **members} for _, job in batch]
    body = json.dumps(values if options.job == "-" else values[0]).encode()
    held = [] if options.wait is None else [signal.SIGTERM]     # until the ids are known, so that it can cancel them
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        # With a key, since a request on a connection that was closed meanwhile is sent again.
        answer = server.ask("POST", "/jobs/add/", body, **{"Idempotency-Key": secrets.token_hex(16)})
        added = decoded(answer)
        options.ids += [job["id"] for job in (added if options.job == "-" else [added])]
        return answer
    except Failed as error:
        reason, status, index = str(error), error.status, re.match(r"\[([0-9]+)\]: ", str(error))
        if index:
            reason = f"line {batch[int(index[1])][0]}: {reason[index.end():]}"
        if error.sent:
            reason += "; whether it was added is not known"
        if options.ids:
            reason += f"; added {named(options.ids)}, before line {batch[0][0]}"
        elif held and error.passing and not error.sent:
            status = EX_TEMPFAIL
        raise Failed(reason, status) from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def named(ids: Sequence[int]) -> str:
    """What to call these jobs."""
    return f"{len(ids)} jobs, {ids[0]} to {ids[-1]}" if len(ids) > 1 else f"job {ids[0]}"


def outcome(server: Server, path: str, deadline: float, result: bool = False, name: str = "") -> int:
    """Show a job as soon as it has ended, or its result and its error under a name; its return code."""
    def ended(seconds: int) -> Any:
        job = decoded(server.ask("GET", f"{path}?wait={seconds}"))
        return job if job["end_time"] else None

    job = server.patiently(ended, deadline)
    if job is None:
        say(f"oqc: job {path.split('/')[2]} has not ended")
        return NOT_ENDED
    where = path + "result/" if result else path
    put(server.patiently(lambda _: server.ask("GET", where, text=server.text), deadline))
    if result and job["runtime_error"]:
        say(name + job["runtime_error"])
    return int(job["return_code"])


# The other commands

def each(do: Callable[[Server, str, float], int], server: Server, options: argparse.Namespace) -> int:
    """Do something about each job; the first status that is not 0. One that is refused keeps no other back."""
    status, deadline = 0, Clock.monotonic() + getattr(options, "seconds", 0.0)
    for place, number in enumerate(options.ids):
        say(f"{place} of {len(options.ids)} jobs", end="")
        try:
            found = do(server, f"/jobs/{number}/", deadline)
        except Failed as error:
            if error.status != EX_FAILED:
                raise
            say(f"oqc: {error}")
            found = EX_FAILED
        status = status or found
    return status


def listing(server: Server, options: argparse.Namespace) -> int:
    """Show all jobs, or a page of them."""
    query = {name: getattr(options, name) for name in ("status", "mode", "limit", "after", "order")}
    return server.show("/jobs/list/?" + urlencode({name: value for name, value in query.items() if value}))


def switch(what: str, server: Server, options: argparse.Namespace) -> int:
    """Pause a runtime, or resume it."""
    body = json.dumps({"reason": options.reason}).encode() if getattr(options, "reason", None) else b""
    return server.show("/runtimes/", server.ask("POST", f"/runtimes/{quote(options.name, safe='')}/{what}/", body))


# The command line

HELP = """\
The key comes from --key-file, else from OQC_API_KEY; for a server on this machine it may be the documented one. On a
terminal the answer is a table, else JSON. Exit status: 0; 1 refused by the server; 2 wrong usage; 69 the server cannot
be reached; 77 no key or a wrong one; 78 settings that cannot be meant; 130 Ctrl-C. A command that waits ends with the
first return code that is not 0, in the order of the jobs, or with 124 if one has not ended when the time is over;
a server that is away meanwhile, such as one that is restarted, is asked again.
"""
ADD = """\
With --wait it is as if the job ran here: its result goes to standard output, its runtime_error to standard error. So it
is a command for --runtime of another oqc: far=python3 -m oqc add - --wait --server http://far:12021 --key-file far.key
It ends with 75 if nothing was added since the server is away, stops or is full: try again. TERM cancels the jobs that
have not ended; after Ctrl-C they go on.
"""


def duration(text: str) -> float:
    """What argparse calls to read the SECONDS of --wait=SECONDS; of a bare --wait they are without end."""
    return config.number(0, 10 ** 9, float)(text) if text else math.inf


ARGUMENTS: Dict[str, Dict[str, Any]] = {
    "ids": {"metavar": "ID", "nargs": "+", "type": config.number(1, 2 ** 63 - 1)},
    "job": {"metavar": "JOB", "help": 'such as "X(90), Y(180)"; - reads a job a line from standard input'},
    "name": {"metavar": "NAME", "help": "of a runtime"},
    "--mode": {"help": "verbatim, simulation or echo; for add also from OQC_MODE"},
    "--shots": {"help": "how often to measure [OQC_SHOTS]"},
    "--seed": {"help": "of the random numbers [OQC_SEED]"},
    "--return-code": {"help": "that an echo shall end with"},
    "--wait": {"metavar": "SECONDS", "nargs": "?", "type": duration, "help": "until it has ended; =SECONDS: at most"},
    "--seconds": {"type": duration, "default": math.inf, "help": "to wait at most"},
    "--after": {"help": "only jobs that follow this id in the list"},
    "--order": {"help": "asc or desc"},
    "--older-than": {"metavar": "AGE", "required": True, "help": "such as 90d, 12h or 30m"},
    "--server": {"metavar": "URL", "help": f"[OQC_SERVER; default: {LOCAL}]"},
    "--key-file": {"metavar": "FILE", "help": "holds a key, or a line name:key; for you alone to read [OQC_KEY_FILE]"},
    "--ca": {"metavar": "FILE", "help": "certificates (PEM) to trust in place of the system's [OQC_CA]"},
}
COMMANDS: Tuple[Tuple[str, Callable[[Server, argparse.Namespace], int], str, str], ...] = (
    ("add", add, "Add a job.", "job --mode --shots --seed --return-code --wait"),
    ("get", functools.partial(each, lambda server, path, _: server.show(path)), "Show jobs.", "ids"),
    ("list", listing, "Show all jobs, or a page of them.", "--status --mode --limit --after --order"),
    ("wait", functools.partial(each, outcome), "Show jobs in this order, each as soon as it has ended.",
     "ids --seconds"),
    ("cancel", functools.partial(each, lambda server, path, _: server.show(path, server.ask("DELETE", path))),
     "Cancel jobs.", "ids"),
    ("result", functools.partial(each, lambda server, path, _: server.show(path + "result/")),
     "Show what the runtimes of jobs put out.", "ids"),
    ("prune", lambda server, options: put(server.ask("DELETE", f"/jobs/list/?older-than={quote(options.older_than)}",
                                                     seconds=math.inf)),
     "Forget the jobs that ended longer ago.", "--older-than"),
    ("runtimes", lambda server, _: server.show("/runtimes/"), "Show the runtimes and how they fare.", ""),
    ("pause", functools.partial(switch, "pause"), "Let a runtime start no more jobs.", "name --reason"),
    ("resume", functools.partial(switch, "resume"), "Let a runtime run jobs again.", "name"),
    ("status", lambda server, _: server.show("/status/"), "Show how much waits, runs and has ended.", ""),
)


def connect(options: argparse.Namespace) -> Server:
    """The server that is meant, with its key; raises ConfigError."""
    url = options.server or os.environ.get("OQC_SERVER") or LOCAL
    path, ca = options.key_file or os.environ.get("OQC_KEY_FILE"), options.ca or os.environ.get("OQC_CA")
    try:
        host, port = urlsplit(url).hostname, urlsplit(url).port
    except ValueError:
        host = port = None
    if not host or not re.fullmatch("https?://[!-~]+", url) or {"@", "?", "#"} & set(url):
        raise ConfigError("--server: expected http://HOST:PORT or https://HOST:PORT")
    own = os.fsencode(os.environ.get("OQC_API_KEY", "")).strip(b" \t")
    if not path and not own and not config.is_loopback(host):
        raise ConfigError(f"{url}: needs a key, in --key-file or OQC_API_KEY")
    key = read_key(path) if path else own or config.DOCUMENTED_KEY
    if not config.KEY.fullmatch(key):
        raise ConfigError(f"{path or 'OQC_API_KEY'}: expected a key in characters that a header can carry")
    connection = HTTPConnection(host, port)
    if url.startswith("https"):
        # pylint: disable-next=import-outside-toplevel # a Python without them can still talk http
        import ssl
        from http.client import HTTPSConnection     # pylint: disable=import-outside-toplevel
        try:
            connection = HTTPSConnection(host, port, context=ssl.create_default_context(cafile=ca))
        except OSError as error:
            raise ConfigError(f"{ca}: {error.strerror or error}") from None
    return Server(connection, url, key)


def read_key(path: str) -> bytes:
    """The one key in a file: alone or behind a name, as `oqc key` prints it and `curl -H @FILE` wants it."""
    try:
        with open(path, "rb") as file:
            lines = [line.strip() for line in file.read(1 << 16).split(b"\n") if line.strip() and line[:1] != b"#"]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(lines) != 1:
        raise ConfigError(f"{path}: expected one line with a key, found {len(lines)}")
    return re.sub(rb"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}:\s*", b"", lines[0])


def run(arguments: Sequence[str]) -> int:
    """Carry out a client command; the exit status. Raises ConfigError."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    parser = argparse.ArgumentParser(prog="oqc", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    for name, do, meaning, wants in COMMANDS:
        command = commands.add_parser(name, description=meaning, epilog=ADD * (do is add) + HELP, allow_abbrev=False,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(do=do)
        for wanted in [*wants.split(), "--server", "--key-file", "--ca"]:
            command.add_argument(wanted, **ARGUMENTS.get(wanted, {}))
    # A bare --wait must not take the job that stands behind it for its seconds.
    options = parser.parse_args(["--wait=" if one == "--wait" else one for one in arguments])
    try:
        return options.do(connect(options), options)
    except Failed as error:
        if str(error):
            say(f"oqc: {error}")
        return error.status
    except OSError as error:        # only standard input is left
        say(f"oqc: standard input: {error.strerror}")
        return EX_FAILED
    finally:
        say("", end="")
