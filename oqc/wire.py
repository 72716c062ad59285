"""HTTP/1.1 as bytes: strict parsing of the head of a request, the head of a response. No sockets.

In place of http.server's parser, which lets through what a proxy in front may read differently
(RFC 9112, section 11.2).
"""
import functools
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

from oqc.messages import PHRASES, Problem, Response

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                    # RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(                                  # RFC 9112, section 3
    rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % TOKEN)
# The value keeps its blanks, which are stripped later: to match them apart would backtrack.
FIELD_LINE = re.compile(rb"(%s):([\t\x20-\x7e\x80-\xff]*)" % TOKEN)
HOST = re.compile(rb"[0-9A-Za-z\-._~!$&'()*+,;=%:\[\]]*")   # RFC 3986, section 3.2.2
ABSOLUTE = re.compile(                                      # RFC 9112, section 3.2.2: MUST be taken
    rb"(?i:https?)://(%s)(?=[/?]|\Z)" % HOST.pattern)
BEGIN = re.compile(rb"%s|\r?\Z|\r\n" % TOKEN)
HEAD_END = b"\r\n\r\n"
ONCE = ("host", "content-length", "transfer-encoding")      # decide where a request ends or goes
UNUSED_BODY = 1 << 16               # bytes of the body of anything but a POST: nobody reads it
KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
                 "QUERY")


class Limits(NamedTuple):
    """What a connection may cost."""

    line: int = 8 << 10             # bytes of the request line
    head: int = 32 << 10            # bytes of the whole head
    fields: int = 100               # header lines
    body: int = 4 << 20             # bytes
    connections: int = 512
    drain: int = 64 << 20           # bytes read after a refusal, so that the client gets to see it
    head_seconds: float = 10.0      # for the whole head
    idle_seconds: float = 30.0      # between two requests, and before the first
    leave_seconds: float = 5.0      # for the client to read a refusal
    pace: int = 16 << 10            # bytes a second: n of them get head_seconds + n / pace


class Head(NamedTuple):
    """The head of a request, parsed."""

    method: str
    path: str
    query: str
    headers: Dict[str, bytes]
    length: int                     # bytes of the body
    wants_keep: bool                # whether the client wants the connection to go on
    minor: int                      # the n of HTTP/1.n
    expects_continue: bool          # whether the client waits for a 100 to send the body


def split_head(buffer: bytes, limits: Limits) -> Tuple[Optional[bytes], bytes]:
    """Split off the head at the beginning of what a client sent: (the head without its last empty
    line, or None if it is not whole; the rest). Raise Problem."""
    if len(buffer) > 2 and buffer.startswith(b"\r\n"):
        buffer = buffer[2:]         # RFC 9112, section 2.2: an empty line may come before
    if not BEGIN.match(buffer):
        # Now: of what is not HTTP, TLS above all, the end of a line may never come.
        raise Problem(400, "this is not HTTP/1.1; HTTPS needs --tls-cert")
    line = buffer.find(b"\r\n")
    if line > limits.line or (line < 0 and len(buffer) > limits.line):
        raise Problem(414, f"the request line is longer than {limits.line} bytes")
    end = buffer.find(HEAD_END)
    if end > limits.head or (end < 0 and len(buffer) > limits.head):
        raise Problem(431, f"the head is longer than {limits.head} bytes")
    if end >= 0:
        return buffer[:end], buffer[end + len(HEAD_END):]
    lines = buffer.count(b"\r\n")
    returns = buffer.count(b"\r")
    if buffer.endswith(b"\r"):
        returns -= 1                # its line feed may follow
    if buffer.count(b"\n") > lines or returns > lines:
        raise Problem(400, "a line ends with something else than CR LF")
    return None, buffer


@functools.lru_cache(maxsize=128)
def parse_head(head: bytes, limits: Limits = Limits()) -> Head:
    """Parse the head of a request, given without its last empty line; raise Problem.

    Pure, and cached: a client that keeps asking sends the same head each time, and parsing it is
    a fifth of the cost of an answer.
    """
    first, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise Problem(400, "the request line is not METHOD /path HTTP/1.1")
    if match[3] != b"1":
        raise Problem(505, "this server speaks HTTP/1.1")
    if len(lines) > limits.fields:
        raise Problem(431, f"more than {limits.fields} header lines")
    method = match[1].decode()
    minor = int(match[4])
    if method not in KNOWN_METHODS:
        raise Problem(501, "unknown method")
    headers = _fields(lines)
    if not HOST.fullmatch(headers.get("host", b"")) or (minor and "host" not in headers):
        raise Problem(400, "HTTP/1.1 needs one Host header")
    path, _, query = _target(method, match[2], headers).decode().partition("?")
    expects_continue = minor > 0 and _expects_continue(headers)
    most_body = limits.body if method == "POST" else min(limits.body, UNUSED_BODY)
    return Head(method, path, query, headers, length=_length(headers, most_body),
                wants_keep=_wants_keep(minor, headers), minor=minor,
                expects_continue=expects_continue)


def _fields(lines: List[bytes]) -> Dict[str, bytes]:
    """Return {name in lower case: value} of the header lines; raise Problem. Values of a name that
    is there twice are joined by a comma (RFC 9110, section 5.3), but for the names of ONCE."""
    headers: Dict[str, bytes] = {}
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise Problem(
                400, "a header line is not name: value, on one line, in printable characters")
        name = match[1].decode().lower()
        value = match[2].strip(b" \t")
        if name in headers:
            if name in ONCE:
                raise Problem(400, f"{name} is there twice")
            value = headers[name] + b", " + value
        headers[name] = value
    return headers


def _target(method: str, target: bytes, headers: Dict[str, bytes]) -> bytes:
    """Return the path and query of a request target; raise Problem. The host of an absolute one
    counts in place of the Host header."""
    absolute = ABSOLUTE.match(target)
    if absolute and absolute[1]:
        headers["host"] = absolute[1]
        target = target[absolute.end():]
        if not target.startswith(b"/"):
            target = b"/" + target
    elif not target.startswith(b"/") and (method, target) != ("OPTIONS", b"*"):
        raise Problem(400, "the request target is no path")
    return target


def _expects_continue(headers: Dict[str, bytes]) -> bool:
    """Return whether the client waits for a 100 (RFC 9110, section 10.1.1); raise Problem."""
    expectation = headers.get("expect", b"").lower()
    if expectation not in (b"", b"100-continue"):
        raise Problem(417, "the only known expectation is 100-continue")
    return bool(expectation)


def _wants_keep(minor: int, headers: Dict[str, bytes]) -> bool:
    """Return whether the client wants the connection to go on (RFC 9112, section 9.3)."""
    connection = headers.get("connection", b"").lower()
    if b"close" in connection:
        return False
    return minor > 0 or b"keep-alive" in connection


def _length(headers: Dict[str, bytes], most: int) -> int:
    """Return the bytes of the body (RFC 9112, section 6.3); raise Problem."""
    text = headers.get("content-length")
    if "transfer-encoding" in headers:
        if text is not None:
            raise Problem(400, "Content-Length and Transfer-Encoding exclude each other")
        raise Problem(
            411, "send the body with a Content-Length; Transfer-Encoding is not understood")
    if text is None:
        return 0
    if not re.fullmatch(rb"[0-9]+", text):
        raise Problem(400, "Content-Length is not a number")
    # int() takes no more than 4,300 digits, zeros included; 18 of them are over every limit.
    length = int(text.lstrip(b"0")[:18] or b"0")
    if length > most:
        raise Problem(
            413, f"the body is larger than {most} bytes (--max-body, if it is of a POST)")
    return length


def response_head(response: Response, date: str, keep: bool, minor: int = 1) -> bytes:
    """Return the head of a response, its last empty line included, to a client that speaks
    HTTP/1.`minor`."""
    status, body, content_type, headers = response
    text = [f"HTTP/1.1 {status} {PHRASES[status]}\r\nDate: {date}\r\n"]
    if status != 204:
        text.append(f"Content-Type: {content_type}\r\n")
        if isinstance(body, bytes):
            text.append(f"Content-Length: {len(body)}\r\n")
        elif minor:
            text.append("Transfer-Encoding: chunked\r\n")
    for name, value in headers:
        text.append(f"{name}: {value}\r\n")
    if not keep:
        text.append("Connection: close\r\n")
    elif not minor:
        text.append("Connection: keep-alive\r\n")
    text.append("\r\n")
    return "".join(text).encode("latin-1")
