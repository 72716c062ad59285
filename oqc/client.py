"""A client of a server: what the HTTP API offers, as methods, for Python programs and for the
commands.

    from oqc import Client

    with Client() as lab:
        lab.wait(lab.add_all((f"X({angle})" for angle in range(181)), "verbatim", tag="rabi-7"))
        table = [(record.job, record.p1, record.p1_error) for record in lab.results(tag="rabi-7")]

Nothing here writes to a terminal: what goes wrong is raised as Failed.
"""
import codecs
import collections.abc
import contextlib
import copy
import functools
import json
import math
import operator
import os
import re
import threading
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import quote, urlencode, urlsplit

from oqc.clock import Clock
from oqc.config import (
    DOCUMENTED_KEY, KEY, ConfigError, is_loopback, key_of_variable, split_key_line)
from oqc.jobs import Attempt, Job, Record, refuse_constant
from oqc.keys import KEY_HEADERS

LOCAL = "http://127.0.0.1:12021"
JSON = "application/json"
CONNECT_TIMEOUT = 10.0              # seconds until there is a connection
ANSWER_TIMEOUT = 330.0              # seconds until there is an answer: longer than any wait
MOST_WAIT = 300                     # seconds that a server waits at most for a job
PAUSE = 0.5                         # seconds from one question to the next, at least
RETRIED_FOR = 10.0                  # seconds in which a request is sent again that broke off
SHOWN_EVERY = 1                     # seconds from one progress of many jobs to the next
BATCH = 1000                        # jobs in one request, or in its answer
BATCH_BYTES = 1 << 18               # and bytes of those that are added together
SEEDS = 2 ** 63                     # how many there are: 0 to 2**63 - 1
BROKEN = (OSError, HTTPException, UnicodeError)     # what http.client raises; UnicodeError: a host
SINCE_EVER = {"since": "1970-01"}   # a filter that selects all jobs


class Failed(Exception):
    """A request that was not carried out; the text says why.

    `status`: of the answer, None without one. `passing`: it may be possible a little later. `sent`:
    the server may have carried it out all the same. `added`: jobs that add_all had added before.
    """

    exit_status = 1                 # of a command that ends with it; those below are of sysexits.h

    def __init__(self, reason: str, passing: bool = False, sent: bool = False,
                 status: Optional[int] = None) -> None:
        super().__init__(reason)
        self.detail = reason
        self.passing = passing
        self.sent = sent
        self.status = status
        self.added: List[Job] = []


class Unreachable(Failed):
    """There is no connection, or no answer came over it."""

    exit_status = 69


class Broken(Unreachable):
    """The connection ended before the answer was whole."""


class KeyRefused(Failed):
    """The server does not know the key."""

    exit_status = 77


class NotEnded(Failed):
    """A job has not ended in the time that was given; it goes on."""

    exit_status = 124               # timeout(1)


class Counts(NamedTuple):
    """How many jobs there are of some, by what they do."""

    waiting: int
    running: int
    retrying: int
    succeeded: int
    failed: int

    @property
    def left(self) -> int:
        """How many have not ended."""
        return self.waiting + self.running + self.retrying

    @property
    def done(self) -> int:
        """How many have ended."""
        return self.succeeded + self.failed


class Details(NamedTuple):
    """What the members of a Job do not hold."""

    id: int
    submitter: str                  # the name of the key that it came with
    tag: Optional[str]
    note: Optional[Dict[str, Any]]
    priority: int
    asked_runtime: Optional[str]
    shots: int
    seed: int
    sha256: str                     # of the job string
    state: str                      # waiting, running or ended
    due_time: Optional[str]         # not before this is it tried again
    ahead: Optional[int]            # how many jobs would be started before it
    waits_for: Optional[str]
    attempts: List[Attempt]


class Runtime(NamedTuple):
    """A runtime and its state."""

    name: str
    modes: List[str]
    protocol: str
    slots: int
    state: str                      # idle, busy, paused or failing
    reason: Optional[str]           # why it is paused or failing
    paused_by: Optional[str]
    running: List[int]              # the ids of the jobs that run on it
    ended: int                      # jobs, since the server began
    failures: int
    since: str                      # when its state began
    device: Any                     # what it said of itself


class Status(NamedTuple):
    """How much waits and runs on a server, by mode; what else it says of itself."""

    idle: bool
    waiting: Dict[str, int]
    running: Dict[str, int]
    retrying: Dict[str, int]
    oldest_waiting_seconds: Optional[float]
    ended_last_minute: int
    ended_last_hour: int
    database_bytes: int
    paused: List[str]               # names of runtimes
    version: str
    uptime: float                   # seconds
    change: int                     # grows with everything that happens
    you: Dict[str, str]             # name and role of the key


class Client:                       # pylint: disable=too-many-public-methods # one a request
    """A server. Any number of threads may use it at once; `close`, or the end of a with statement,
    closes its connections.

    A job is meant by its id, or by a record that has one. Filters are keyword arguments: status,
    mode, state (waiting, running, ended), runtime, tag, by (`me`: you), since and until (a UTC
    time, its beginning, or an age such as "12h"); one that is None counts as left out. Every method
    raises Failed, and subclasses of it. A request whose connection breaks off is sent again, if
    that cannot do it twice; an iterator of `raw` or `follow` raises Unreachable then.
    """

    def __init__(self, server: Optional[str] = None, key: Optional[str] = None, *,
                 key_file: Optional[str] = None, ca: Optional[str] = None,
                 report: Optional[Callable[[str], Any]] = None) -> None:
        """`server`: its URL. `key_file`: a file with the key. `ca`: one with certificates (PEM) to
        trust. What is left out comes from OQC_SERVER, OQC_API_KEY, OQC_KEY_FILE and OQC_CA.
        `report` is called with a line of text when a server that is away is going to be asked
        again. Raises ConfigError. The first request opens a connection.
        """
        self.url = server or os.environ.get("OQC_SERVER") or LOCAL
        host, port = _address(self.url)
        if key is not None:
            self._key = _checked_key(key.encode("utf-8"), "key")
        else:
            self._key = _key(self.url, host, key_file or os.environ.get("OQC_KEY_FILE"))
        self._connect_to = _connection(host, port, self.url.startswith("https"),
                                       ca or os.environ.get("OQC_CA"))
        self._prefix = urlsplit(self.url).path.rstrip("/")
        self._report = report
        self._accept = ""               # the media type of answers that are not read, see `raw`
        self._idle: List[HTTPConnection] = []       # connections that no request uses now

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that no request uses. Another request opens a new one."""
        while self._idle:
            self._idle.pop().close()

    def raw(self, accept: str = JSON) -> Any:
        """Return a Client on the same connections whose methods return an iterator of bytes in
        place of records: what the server answers, in the format that `accept` names. So
        `raw("text/csv").results(tag="rabi-7")` gives a table as CSV."""
        other = copy.copy(self)
        other._accept = accept      # pylint: disable=protected-access # its own class
        return other

    # Jobs

    def add(self, job: str, mode: str, **members: Any) -> Job:
        """Add a job and return it. `members`: shots, seed, return_code, tag, note (a dict), runtime
        and priority; one that is None counts as left out."""
        body = json.dumps(_members(job, {"mode": mode, **members})).encode()
        return _parsed(_job, self.ask("POST", "/jobs/add/", body, once=True))

    def add_all(self, jobs: Iterable[Any], mode: Optional[str] = None, **members: Any) -> List[Job]:
        """Add jobs, each a job string or a dict of members, and return them. `members` as of `add`,
        for each that has none of its own; but the n-th job, counted from 0, gets `seed` + n.

        They are sent BATCH at a time, and of these all are added or none. `added` of a Failed has
        those of the batches before; a place such as `[3]` in its text is counted behind those.
        """
        members["mode"] = mode
        added: List[Job] = []
        try:
            for batch in batches(_numbered(jobs, members)):
                answer = self.ask("POST", "/jobs/add/", b"[" + b",".join(batch) + b"]", once=True)
                added += _parsed(_jobs, answer)
        except Failed as error:
            error.added = added
            raise
        return added

    def get(self, job: Any) -> Job:
        """Return a job as it is now."""
        return self._read(_job, "GET", f"/jobs/{_id(job)}/")

    def list(self, **filters: Any) -> List[Job]:
        """Return the jobs that filters select. `limit`, `after` and `order` ("desc") ask for a page
        of them."""
        return self._read(_jobs, "GET", "/jobs/list/" + _query(filters))

    def count(self, **filters: Any) -> Counts:
        """Return how many jobs filters select, by what they do."""
        query = _query(_given(filters) or SINCE_EVER)
        return _parsed(_counts, self.ask("GET", "/status/" + query))

    def wait(self, jobs: Any = None, timeout: Optional[float] = None,
             progress: Optional[Callable[[Counts], Any]] = None, **filters: Any) -> Any:
        """Return a job as soon as it has ended; a list of them if `jobs` is several; or the Counts
        of all that filters select. A server that is away meanwhile is asked again.

        `progress` is called with Counts now and then. Raises NotEnded after `timeout` seconds.
        """
        deadline = self.deadline(math.inf if timeout is None else timeout)
        if jobs is None:
            return self._wait_for_all(_given(filters) or SINCE_EVER, deadline, progress)
        if hasattr(jobs, "id") or not isinstance(jobs, collections.abc.Iterable):
            return self._wait_for(_id(jobs), deadline)
        numbers = [_id(job) for job in jobs]
        ended: List[Job] = []
        for number in numbers:
            ended.append(self._wait_for(number, deadline))
            if progress:
                failed = sum(job.return_code != 0 for job in ended)
                progress(Counts(len(numbers) - len(ended), 0, 0, len(ended) - failed, failed))
        return ended

    def result(self, job: Any) -> Any:
        """Return what the runtime of a job put out: the value of its JSON, or a text; None if it
        put out nothing."""
        return self._read(_value_or_text, "GET", f"/jobs/{_id(job)}/result/")

    def results(self, **filters: Any) -> Iterator[Record]:
        """Return an iterator of the jobs that filters select with their results. They are asked for
        BATCH at a time, so that neither a slow reader nor a restart of the server ends it.
        `cut`: characters of a job string at most, and a result of more than 65536 is None;
        `limit`, `after` and `order` as of `list`."""
        if self._accept:
            return self.stream("GET", "/jobs/results/" + _query(filters), accept=self._accept)
        return self._pages(_given(filters))

    def _pages(self, filters: Dict[str, Any]) -> Iterator[Record]:
        """Yield the records that filters select; with a limit among them those of one page."""
        query = {"limit": BATCH, **filters}
        while True:
            before = query.get("after")
            path = "/jobs/results/" + _query(query)
            answer = self.ask("GET", path, accept="application/x-ndjson")
            for line in answer.splitlines():
                record = _parsed(_record, line)
                query["after"] = record.id
                yield record
            if query.get("after") == before or "limit" in filters:
                return

    def cancel(self, job: Any = None, **filters: Any) -> Any:
        """Cancel a job and return it when it has ended; or all that filters select and that have
        not ended, and return how many."""
        if job is not None:
            return self._read(_job, "DELETE", f"/jobs/{_id(job)}/")
        path = "/jobs/cancel/" + _query(filters)
        return self._read(_cancelled, "POST", path, seconds=math.inf)

    def rerun(self, job: Any) -> Job:
        """Add a job again, as a new one, and return that."""
        return self._read(_job, "POST", f"/jobs/{_id(job)}/rerun/", once=True)

    def details(self, job: Any) -> Details:
        """Return what the members of a job do not hold: its attempts, what it waits for."""
        return self._read(_details, "GET", f"/jobs/{_id(job)}/details/")

    def log(self, job: Any) -> str:
        """Return what the runtimes of a job wrote on standard error."""
        return self._read(_text, "GET", f"/jobs/{_id(job)}/log/")

    def follow(self, job: Any) -> Iterator[Any]:
        """Return an iterator of the same in pieces as they are written, until the job has
        ended."""
        pieces = self.stream("GET", f"/jobs/{_id(job)}/log/?follow=1", seconds=math.inf)
        return pieces if self._accept else codecs.iterdecode(pieces, "utf-8", "replace")

    def prune(self, age: str) -> int:
        """Forget the jobs that ended longer ago than an age such as "90d"; return how many."""
        path = "/jobs/list/" + _query({"older-than": age})
        return self._read(_deleted, "DELETE", path, seconds=math.inf)

    # The server

    def runtimes(self) -> List[Runtime]:
        """Return the runtimes and their states."""
        return self._read(_runtimes, "GET", "/runtimes/")

    def pause(self, runtime: str, reason: Optional[str] = None) -> Runtime:
        """Have a runtime start no more jobs, and return it."""
        body = json.dumps({"reason": reason}).encode() if reason else b""
        return self._read(_runtime, "POST", f"/runtimes/{quote(runtime, safe='')}/pause/", body)

    def resume(self, runtime: str) -> Runtime:
        """Have a runtime start jobs again, and return it."""
        return self._read(_runtime, "POST", f"/runtimes/{quote(runtime, safe='')}/resume/")

    def status(self) -> Status:
        """Return how much waits, runs and has ended."""
        return self._read(_status, "GET", "/status/")

    # Requests

    def _read(self, parse: Callable[[bytes], Any], method: str, path: str, body: bytes = b"",
              **options: Any) -> Any:
        """Return what `parse` makes of the answer to a request; or, see `raw`, that itself."""
        if not self._accept:
            return _parsed(parse, self.ask(method, path, body, **options))
        options["accept"] = self._accept
        if method == "GET":
            return self.stream(method, path, body, **options)
        return iter([self.ask(method, path, body, **options)])

    def ask(self, method: str, path: str, body: bytes = b"", *, once: bool = False,
            **options: Any) -> bytes:
        """Return the answer to a request; options and exceptions are those of `stream`.

        One that asks for something, or that the server shall carry out `once` however often it
        comes, is sent again when its connection breaks off.
        """
        if once:
            options["idempotency_key"] = os.urandom(16).hex()
        try:
            return b"".join(self.stream(method, path, body, **options))
        except Broken:
            if method != "GET" and not once:
                raise
        try:
            return self.patiently(lambda _: b"".join(self.stream(method, path, body, **options)),
                                  self.deadline(RETRIED_FOR))
        except Failed as error:
            error.sent = True
            raise

    def stream(self, method: str, path: str, body: bytes = b"", *, accept: str = JSON,
               seconds: float = ANSWER_TIMEOUT, idempotency_key: str = "") -> Iterator[bytes]:
        """Yield the answer to a request, a listing in pieces as they come.

        `accept`: its media type. `seconds`: until an answer comes; math.inf waits for ever. Raises
        Failed unless the status of the answer is 200 or 201.
        """
        headers: Dict[str, Any] = {"api_key": self._key, "accept": accept}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect_to()
        try:
            path_here = self._prefix + path
            with self._send(connection, method, path_here, body, headers, seconds) as response:
                if response.length is None and not response.chunked:
                    raise HTTPException("the answer is cut short")  # its head: it says no length
                while (response.status == 200 and response.length is None
                       and not response.isclosed()):
                    yield response.read1(1 << 16)
                content = response.read()
        except BROKEN as error:
            connection.close()
            raise self._unreachable(error, sent=True) from None
        except BaseException:           # the answer is not read to its end
            connection.close()
            raise
        self._idle.append(connection)
        if response.status not in (200, 201):
            raise self._refusal(path, response, content)
        yield content

    def _send(self, connection: HTTPConnection, method: str, path: str, body: bytes,
              headers: Dict[str, Any], seconds: float) -> HTTPResponse:
        """Send a request and return the response, of which only the head is read."""
        if connection.sock is not None:
            try:
                return _exchange(connection, method, path, body, headers, seconds)
            except ConnectionError:     # it was closed since the last answer
                connection.close()
        connection.timeout = min(seconds, CONNECT_TIMEOUT)
        try:
            connection.connect()
        except BROKEN as error:
            raise self._unreachable(error, sent=False) from None
        return _exchange(connection, method, path, body, headers, seconds)

    def _unreachable(self, error: Exception, sent: bool) -> Unreachable:
        """Return what an exception of http.client means."""
        reason = (getattr(error, "verify_message", "")      # of a certificate that is not trusted
                  or getattr(error, "strerror", "")
                  or str(error))
        # A ValueError is an impossible name, or that certificate: waiting does not help.
        passing = not isinstance(error, ValueError)
        if sent and isinstance(error, (ConnectionError, HTTPException)):
            return Broken(f"{self.url}: {reason}", passing, sent)
        return Unreachable(f"{self.url}: {reason}", passing, sent)

    def _refusal(self, path: str, response: HTTPResponse, content: bytes) -> Failed:
        """Return what an answer with another status than 200 and 201 means."""
        status = response.status
        if status == 401:
            return KeyRefused(f"{self.url}: does not know the key; "
                              "--key-file, OQC_KEY_FILE or OQC_API_KEY has another", status=status)
        try:
            problem = json.loads(content)
            if problem == 0:            # documented so, of /jobs/{id}/ and what is below it
                return Failed(f"no job has the id {path.split('/')[2]}", status=status)
            reason = problem["detail"]
        except (ValueError, TypeError, LookupError):
            reason = f"{self.url}: {status} {response.reason}"
        return Failed(reason, passing="Retry-After" in response.headers, status=status)

    # Waiting

    @staticmethod
    def deadline(seconds: float) -> float:
        """Return the moment that many seconds from now, as `patiently` takes it."""
        return Clock.monotonic() + seconds

    def patiently(self, question: Callable[[int], Any], deadline: float) -> Any:
        """Return what `question(seconds to wait)` returns, however often it has to be asked.

        It is asked again, until the deadline, while it returns None and while the server is away or
        too busy: so the result is None if the time is over. Raises Failed.
        """
        reported = False
        while True:
            began = Clock.monotonic()
            left = max(0.0, deadline - began)
            try:
                answer = question(round(min(MOST_WAIT, left)))
                if answer is not None or not left:
                    return answer
            except Failed as error:
                if not error.passing or not left:
                    raise
                if self._report and not reported:
                    self._report(f"{error}; trying again")
                reported = True
            # A server that is stopping, or has no room for another wait, answers at once.
            pause = max(0.0, began + PAUSE - Clock.monotonic())
            Clock.wait(threading.Event(), min(left, pause))

    def _wait_for(self, number: int, deadline: float) -> Job:
        """Return a job as soon as it has ended; raise NotEnded at the deadline."""
        job = self.patiently(functools.partial(self._ended, number), deadline)
        if job is None:
            raise NotEnded(f"job {number} has not ended yet; it goes on")
        return job

    def _ended(self, number: int, seconds: int) -> Optional[Job]:
        """Return a job if it ends within so many seconds."""
        answer = b"".join(self.stream("GET", f"/jobs/{number}/?wait={seconds}"))
        job = _parsed(_job, answer)
        return job if job.end_time else None

    def _wait_for_all(self, filters: Dict[str, Any], deadline: float,
                      progress: Optional[Callable[[Counts], Any]]) -> Counts:
        """Return the counts of jobs as soon as all have ended; raise NotEnded at the deadline."""
        counts = self.patiently(functools.partial(self._all_ended, filters, progress), deadline)
        if counts is None:
            counts = self.count(**filters)
        if counts.left:
            raise NotEnded(f"{counts.left} jobs have not ended yet; they go on")
        return counts

    def _all_ended(self, filters: Dict[str, Any], progress: Optional[Callable[[Counts], Any]],
                   seconds: int) -> Optional[Counts]:
        """Return the counts of jobs if all end within so many seconds; raise Failed if there are
        none at all."""
        if progress:
            seconds = min(seconds, SHOWN_EVERY)
        counts = self.count(**filters, wait=seconds)
        if not any(counts):
            raise Failed("no job matches")
        if progress:
            progress(counts)
        return None if counts.left else counts


def _exchange(connection: HTTPConnection, method: str, path: str, body: bytes,
              headers: Dict[str, Any], seconds: float) -> HTTPResponse:
    """Send a request over a connection and return the response, of which only the head is read."""
    connection.sock.settimeout(seconds if seconds < math.inf else None)
    connection.request(method, path, body or None, headers)
    return connection.getresponse()


# What is sent

def _id(job: Any) -> int:
    """Return the id of a job that is given as one, or as a record; raise TypeError."""
    return operator.index(getattr(job, "id", job))


def _given(members: Dict[str, Any]) -> Dict[str, Any]:
    """Return those that are not None, which counts as left out."""
    return {name: value for name, value in members.items() if value is not None}


def _query(parameters: Dict[str, Any]) -> str:
    """Return the query of a path, empty without parameters."""
    given = _given(parameters)
    return "?" + urlencode(given) if given else ""


def _members(job: Any, members: Dict[str, Any]) -> Dict[str, Any]:
    """Return the members of a job that is a job string or a dict of members, which win."""
    given = _given(members)
    return {**given, **job} if isinstance(job, dict) else {"job": job, **given}


def _numbered(jobs: Iterable[Any], members: Dict[str, Any]) -> Iterator[bytes]:
    """Yield the members of each job as JSON, with a seed of its own.

    With one seed for all of them their random numbers would be the same, and so their errors. A
    seed that is out of range is left to the server to refuse.
    """
    seed = members.get("seed")
    for place, job in enumerate(jobs):
        if isinstance(seed, int) and 0 <= seed < SEEDS:
            members["seed"] = (seed + place) % SEEDS
        yield json.dumps(_members(job, members)).encode()


def batches(jobs: Iterable[Any], size_of: Callable[[Any], int] = len) -> Iterator[List[Any]]:
    """Yield as many jobs at a time as are sent together."""
    batch: List[Any] = []
    size = 0
    for job in jobs:
        more = size_of(job)
        if batch and (len(batch) == BATCH or size + more > BATCH_BYTES):
            yield batch
            batch = []
            size = 0
        batch.append(job)
        size += more
    if batch:
        yield batch


# What is received

def _parsed(parse: Callable[[bytes], Any], answer: bytes) -> Any:
    """Return what one of the functions below makes of an answer; raise Failed."""
    try:
        return parse(answer)
    except RecursionError:
        raise Failed("the answer is nested too deeply for this Python to read") from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise Failed("what answers there is not oqc") from None


def _made(kind: Any, members: Any) -> Any:
    """Return a record of this kind; a newer server may send more members, an older one fewer."""
    return kind(*[members.get(name) for name in kind._fields])


def _job(answer: bytes) -> Job:
    return _made(Job, json.loads(answer))


def _jobs(answer: bytes) -> List[Job]:
    return [_made(Job, members) for members in json.loads(answer)]


def _counts(answer: bytes) -> Counts:
    return _made(Counts, json.loads(answer)["jobs"])


def _record(line: bytes) -> Record:
    return _made(Record, json.loads(line))


def _details(answer: bytes) -> Details:
    members = json.loads(answer)
    members["attempts"] = [_made(Attempt, attempt) for attempt in members["attempts"]]
    return _made(Details, members)


def _runtime(answer: bytes) -> Runtime:
    return _made(Runtime, json.loads(answer))


def _runtimes(answer: bytes) -> List[Runtime]:
    return [_made(Runtime, members) for members in json.loads(answer)]


def _status(answer: bytes) -> Status:
    return _made(Status, json.loads(answer))


def _cancelled(answer: bytes) -> int:
    return int(json.loads(answer)["cancelled"])


def _deleted(answer: bytes) -> int:
    return int(json.loads(answer)["deleted"])


def _text(answer: bytes) -> str:
    return answer.decode("utf-8", "replace")


def _value_or_text(answer: bytes) -> Any:
    """Return the value of a JSON text, or else the text."""
    try:
        return json.loads(answer, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return _text(answer)


# Settings

def _address(url: str) -> Tuple[str, Optional[int]]:
    """Return the host and the port of a URL; raise ConfigError."""
    host = port = None
    if re.fullmatch("https?://[!-~]+", url) and not {"@", "?", "#"} & set(url):
        with contextlib.suppress(ValueError):
            port = urlsplit(url).port           # first: it raises for one that is no number
            host = urlsplit(url).hostname
    if not host:
        raise ConfigError("--server: expected http://HOST:PORT or https://HOST:PORT")
    return host, port


def _key(url: str, host: str, path: Optional[str]) -> bytes:
    """Return the key for a server, of the file if one is named; raise ConfigError."""
    own = key_of_variable(os.environ)
    if not path and not own and not is_loopback(host):
        raise ConfigError(f"{url}: needs a key, in --key-file or OQC_API_KEY")
    return _checked_key(_read_key_file(path) if path else own or DOCUMENTED_KEY,
                        path or "OQC_API_KEY")


def _checked_key(key: bytes, place: str) -> bytes:
    """Return a key; raise ConfigError, with the place that it comes from, if it can be none."""
    if not KEY.fullmatch(key):
        raise ConfigError(f"{place}: expected a key in characters that a header can carry")
    return key


def _read_key_file(path: str) -> bytes:
    """Return the one key in a file; raise ConfigError.

    It stands alone, or behind a name and a role, as `oqc key` prints it, or as `curl -H @FILE`
    wants it.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read(1 << 16).split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"#")]
    if len(keys) != 1:
        raise ConfigError(f"{path}: expected one line with a key, found {len(keys)}")
    header, colon, key = keys[0].partition(b":")
    if colon and header.decode("latin-1").lower() in KEY_HEADERS:
        return key.strip()
    return split_key_line(keys[0])[2]


def _connection(host: str, port: Optional[int], is_secure: bool,
                ca: Optional[str]) -> Callable[[], Any]:
    """Return what makes a connection to a server, by TLS if its certificate must be one that `ca`
    vouches for, or the system. Raise ConfigError."""
    if not is_secure:
        return functools.partial(HTTPConnection, host, port)
    # A Python without them can still talk http.
    import ssl                                      # pylint: disable=import-outside-toplevel
    from http.client import HTTPSConnection         # pylint: disable=import-outside-toplevel
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(f"{ca}: {error.strerror or error}") from None
    return functools.partial(HTTPSConnection, host, port, context=context)
