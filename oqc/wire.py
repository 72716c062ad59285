"""HTTP/1.1 as bytes: the strict parsing of a request's head, the head of an answer, and what has arrived on a
connection. No sockets.

In place of http.server's parser, which lets through what a proxy in front may read differently (RFC 9112,
section 11.2).
"""
import functools
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from oqc.messages import PHRASES, Problem, Request, Response

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                                # RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % TOKEN)      # RFC 9112, section 3
FIELD_LINE = re.compile(rb"(%s):([\t\x20-\x7e\x80-\xff]*)" % TOKEN)       # one way to match: blanks cost no time
HOST = re.compile(rb"[0-9A-Za-z\-._~!$&'()*+,;=%:\[\]]*")               # RFC 3986, section 3.2.2
ABSOLUTE = re.compile(rb"(?i:https?)://(%s)(?=[/?]|\Z)" % HOST.pattern)  # RFC 9112, section 3.2.2: MUST be taken
UNUSED_BODY = 1 << 16               # bytes of a body that nobody looks at, also of a request without a key
KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY")


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
    pace: int = 16 << 10            # bytes a second that a body and an answer may take beyond head_seconds


class Head(NamedTuple):
    """The head of a request, parsed."""

    method: str
    path: str
    query: str
    headers: Dict[str, bytes]
    length: int                     # bytes of the body
    keep: bool                      # whether the connection goes on afterwards
    minor: int                      # the n of HTTP/1.n
    expects: bool                   # whether the client waits for a 100 before it sends the body


def split_head(buffer: bytes, limits: Limits) -> Tuple[Optional[bytes], bytes]:
    """(the head at the begin of what a client sent, without its last empty line, or None; the rest). Raises Problem."""
    if len(buffer) > 2 and buffer.startswith(b"\r\n"):     # RFC 9112, section 2.2: an empty line may come before
        buffer = buffer[2:]
    end, line = buffer.find(b"\r\n\r\n"), buffer.find(b"\r\n")
    if line > limits.line or (line < 0 and len(buffer) > limits.line):
        raise Problem(414, f"the request line is longer than {limits.line} bytes")
    if end > limits.head or (end < 0 and len(buffer) > limits.head):
        raise Problem(431, f"the head is longer than {limits.head} bytes")
    if end >= 0:
        return buffer[:end], buffer[end + 4:]
    lines = buffer.count(b"\r\n")
    if buffer.count(b"\n") > lines or buffer.count(b"\r") - buffer.endswith(b"\r") > lines:
        raise Problem(400, "a line ends with something else than CR LF")
    return None, buffer


@functools.lru_cache(maxsize=128)
def parse_head(head: bytes, most_fields: int = 100, most_body: int = 4 << 20) -> Head:
    """The head of a request, given without its last empty line; raises Problem.

    Pure, and cached: a client that keeps asking sends the same head each time, and parsing it is a fifth of the cost
    of an answer.
    """
    first, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise Problem(400, "the request line is not METHOD /path HTTP/1.1")
    if match[3] != b"1":
        raise Problem(505, "this server speaks HTTP/1.1")
    if len(lines) > most_fields:
        raise Problem(431, f"more than {most_fields} header lines")
    method, minor = match[1].decode(), int(match[4])
    if method not in KNOWN_METHODS:
        raise Problem(501, "unknown method")
    headers = _fields(lines)
    if not HOST.fullmatch(headers.get("host", b"")) or (minor and "host" not in headers):
        raise Problem(400, "HTTP/1.1 needs one Host header")
    target = match[2]
    absolute = ABSOLUTE.match(target)
    if absolute and absolute[1]:        # its host counts, not that of the Host header
        headers["host"], target = absolute[1], target[absolute.end():]
        target = target if target.startswith(b"/") else b"/" + target
    elif not target.startswith(b"/") and (method, target) != ("OPTIONS", b"*"):
        raise Problem(400, "the request target is no path")
    path, _, query = target.decode().partition("?")
    connection = headers.get("connection", b"").lower()
    expectation = headers.get("expect", b"").lower() if minor else b""
    if expectation not in (b"", b"100-continue"):
        raise Problem(417, "the only known expectation is 100-continue")
    length = _length(headers, most_body if method == "POST" else min(most_body, UNUSED_BODY))
    return Head(method, path, query, headers, length, b"close" not in connection and (
        minor > 0 or b"keep-alive" in connection), minor, bool(expectation))


def _fields(lines: List[bytes]) -> Dict[str, bytes]:
    """{name in lower case: value} of the header lines; raises Problem. Values of a name that is there twice are
    joined by a comma (RFC 9110, section 5.3), but for the names that decide where a request ends or goes."""
    headers: Dict[str, bytes] = {}
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise Problem(400, "a header line is not name: value, on one line, in printable characters")
        name, value = match[1].decode().lower(), match[2].strip(b" \t")
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding"):
                raise Problem(400, f"{name} is there twice")
            value = headers[name] + b", " + value
        headers[name] = value
    return headers


def _length(headers: Dict[str, bytes], most: int) -> int:
    """Bytes of the body (RFC 9112, section 6.3); raises Problem."""
    text = headers.get("content-length")
    if "transfer-encoding" in headers:
        if text is not None:
            raise Problem(400, "Content-Length and Transfer-Encoding exclude each other")
        raise Problem(411, "send the body with a Content-Length; Transfer-Encoding is not understood")
    if text is None:
        return 0
    if not re.fullmatch(rb"[0-9]+", text):
        raise Problem(400, "Content-Length is not a number")
    length = int(text.lstrip(b"0")[:18] or b"0")        # int() takes no more than 4,300 digits, zeros included
    if length > most:
        raise Problem(413, f"the body is larger than {most} bytes (--max-body, if it is of a POST)")
    return length


def answer_head(response: Response, date: str, keep: bool, minor: int = 1) -> bytes:
    """The head of an answer, its last empty line included, to a client that speaks HTTP/1.`minor`."""
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


class Connection:
    """One client's connection, and what has arrived of its next request.

    It has one owner at a time: the listener thread while it waits for bytes, and while it is `busy` whoever has its
    request in hand. Only the owner reads, writes or closes it, and a busy one becomes the listener's again last.
    """

    __slots__ = ("sock", "peer", "buffer", "head", "busy", "watched", "leaving", "since", "deadline")

    def __init__(self, sock: Any, peer: Tuple[Any, ...], now: float, deadline: float) -> None:
        self.sock, self.peer = sock, f"{peer[0]}:{peer[1]}"
        self.buffer: Union[bytes, bytearray] = b""
        self.head: Optional[Head] = None        # of the request whose body is awaited
        self.busy = False                       # a request is in somebody's hands
        self.watched = False                    # in the selector
        self.leaving = 0                        # after a refusal: 1 and the bytes dropped since
        self.since, self.deadline = now, deadline           # when it became idle or its request incomplete

    def next_request(self, limits: Limits) -> bool:
        """Whether the buffer holds a whole request: then `head` is its head. Raises Problem."""
        if self.head is None:
            if not self.buffer:
                return False
            raw, self.buffer = split_head(self.buffer, limits)
            if raw is None:
                return False
            self.head = parse_head(raw, limits.fields, limits.body)
        return len(self.buffer) >= self.head.length

    def take_request(self) -> Tuple[Head, Request]:
        """The request that next_request found, taken off the buffer."""
        head, buffer, self.head = self.head, self.buffer, None
        assert head is not None
        self.buffer = bytes(buffer[head.length:])
        return head, Request(head.method, head.path, head.query, head.headers, bytes(buffer[:head.length]))
