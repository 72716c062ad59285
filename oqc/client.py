"""The HTTP API of a server, for programs: its address and key, one connection, requests, retries.

Nothing here writes to a terminal: what goes wrong is raised as Failed. A Client belongs to one
thread.
"""
import contextlib
import json
import math
import os
import re
import threading
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Callable, Dict, Iterator, Optional, Tuple
from urllib.parse import urlsplit

from oqc.clock import Clock
from oqc.config import (
    DOCUMENTED_KEY, KEY, ConfigError, is_loopback, key_of_variable, split_key_line)
from oqc.keys import KEY_HEADERS

LOCAL = "http://127.0.0.1:12021"
CONNECT_TIMEOUT = 10.0              # seconds until there is a connection
ANSWER_TIMEOUT = 330.0              # seconds until there is an answer: longer than any wait
MOST_WAIT = 300                     # seconds that a server waits at most for a job
PAUSE = 0.5                         # seconds from one question to the next, at least
BROKEN = (OSError, HTTPException, UnicodeError)     # what http.client raises; UnicodeError: a host


class Failed(Exception):
    """A request that was not carried out; the text says why.

    `passing`: it may be possible a little later. `sent`: the server may have carried it out all the
    same.
    """

    exit_status = 1                 # of a command that ends with it; those below are of sysexits.h

    def __init__(self, reason: str, passing: bool = False, sent: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing
        self.sent = sent


class Unreachable(Failed):
    """There is no connection, or no answer came over it."""

    exit_status = 69


class KeyRefused(Failed):
    """The server does not know the key."""

    exit_status = 77


class Client:
    """A server at the other end of one connection, which is opened again whenever it was closed.

    `report` is called with a line of text when a server that is away is going to be asked again.
    """

    def __init__(self, connection: HTTPConnection, url: str, key: bytes,
                 report: Optional[Callable[[str], Any]] = None) -> None:
        self.connection = connection
        self.url = url
        self.key = key
        self._prefix = urlsplit(url).path.rstrip("/")
        self._report = report

    def ask(self, method: str, path: str, body: bytes = b"", **options: Any) -> bytes:
        """Return the answer to a request; options and exceptions are those of `stream`."""
        return b"".join(self.stream(method, path, body, **options))

    def stream(self, method: str, path: str, body: bytes = b"", *, text: bool = False,
               seconds: float = ANSWER_TIMEOUT, idempotency_key: str = "") -> Iterator[bytes]:
        """Yield the answer to a request, a listing in pieces as they come.

        `text`: as a table, not as JSON. `seconds`: until an answer comes; math.inf waits for ever.
        Raises Failed unless the status of the answer is 200 or 201.
        """
        headers: Dict[str, Any] = {
            "api_key": self.key, "accept": "text/plain" if text else "application/json"}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        try:
            response = self._send(method, self._prefix + path, body, headers, seconds)
            while response.status == 200 and response.length is None and not response.isclosed():
                yield response.read1(1 << 16)
            content = response.read()
        except BROKEN as error:
            raise self._unreachable(error, sent=True) from None
        if response.status not in (200, 201):
            raise self._refusal(path, response, content)
        yield content

    def _send(self, method: str, path: str, body: bytes, headers: Dict[str, Any],
              seconds: float) -> HTTPResponse:
        """Send a request and return the response, of which only the head is read."""
        if self.connection.sock is not None:
            try:
                return self._exchange(method, path, body, headers, seconds)
            except ConnectionError:     # it was closed since the last answer
                self.connection.close()
        self._connect(min(seconds, CONNECT_TIMEOUT))
        return self._exchange(method, path, body, headers, seconds)

    def _connect(self, seconds: float) -> None:
        self.connection.timeout = seconds
        try:
            self.connection.connect()
        except BROKEN as error:
            raise self._unreachable(error, sent=False) from None

    def _exchange(self, method: str, path: str, body: bytes, headers: Dict[str, Any],
                  seconds: float) -> HTTPResponse:
        self.connection.sock.settimeout(seconds if seconds < math.inf else None)
        self.connection.request(method, path, body or None, headers)
        return self.connection.getresponse()

    def _unreachable(self, error: Exception, sent: bool) -> Unreachable:
        """Close the connection; return Unreachable, with the reason."""
        self.connection.close()
        reason = (getattr(error, "verify_message", "")      # of a certificate that is not trusted
                  or getattr(error, "strerror", "")
                  or str(error))
        # A ValueError is an impossible name, or that certificate: waiting does not help.
        passing = not isinstance(error, ValueError)
        return Unreachable(f"{self.url}: {reason}", passing, sent)

    def _refusal(self, path: str, response: HTTPResponse, content: bytes) -> Failed:
        """Return what an answer with another status than 200 and 201 means."""
        if response.status == 401:
            return KeyRefused(f"{self.url}: does not know the key; "
                              "--key-file, OQC_KEY_FILE or OQC_API_KEY has another")
        try:
            problem = json.loads(content)
            if problem == 0:            # documented so, of /jobs/{id}/ and what is below it
                return Failed(f"no job has the id {path.split('/')[2]}")
            reason = problem["detail"]
        except (ValueError, TypeError, LookupError):
            reason = f"{self.url}: {response.status} {response.reason}"
        return Failed(reason, passing="Retry-After" in response.headers)

    @staticmethod
    def deadline(seconds: float) -> float:
        """Return the moment that many seconds from now, as `patiently` and `ended_job` take it."""
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

    def ended_job(self, number: int, deadline: float) -> Optional[Dict[str, Any]]:
        """Return a job as soon as it has ended, or None at the deadline. Raises Failed."""
        return self.patiently(lambda seconds: self._ended(number, seconds), deadline)

    def _ended(self, number: int, seconds: int) -> Optional[Dict[str, Any]]:
        job = decoded(self.ask("GET", f"/jobs/{number}/?wait={seconds}"))
        return job if job["end_time"] else None


def decoded(answer: bytes) -> Any:
    """Return the value in an answer; raise Failed."""
    try:
        return json.loads(answer)
    except ValueError:
        raise Failed("what answers there is not oqc") from None


def connect(url: Optional[str] = None, key_file: Optional[str] = None, ca: Optional[str] = None,
            report: Optional[Callable[[str], Any]] = None) -> Client:
    """Return the server at a URL, with its key; the connection opens with the first request.

    What is left out comes from OQC_SERVER, OQC_KEY_FILE, OQC_API_KEY and OQC_CA. Raises
    ConfigError.
    """
    url = url or os.environ.get("OQC_SERVER") or LOCAL
    host, port = _address(url)
    key = _key(url, host, key_file or os.environ.get("OQC_KEY_FILE"))
    if url.startswith("https"):
        connection = _https(host, port, ca or os.environ.get("OQC_CA"))
    else:
        connection = HTTPConnection(host, port)
    return Client(connection, url, key, report)


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
    key = _read_key_file(path) if path else own or DOCUMENTED_KEY
    if not KEY.fullmatch(key):
        raise ConfigError(f"{path or 'OQC_API_KEY'}: "
                          "expected a key in characters that a header can carry")
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


def _https(host: str, port: Optional[int], ca: Optional[str]) -> HTTPConnection:
    """Return a connection by TLS to a server whose certificate `ca` vouches for, or the system."""
    # A Python without them can still talk http.
    import ssl                                      # pylint: disable=import-outside-toplevel
    from http.client import HTTPSConnection         # pylint: disable=import-outside-toplevel
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(f"{ca}: {error.strerror or error}") from None
    return HTTPSConnection(host, port, context=context)
