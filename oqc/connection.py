"""One client's connection: its state, the bytes of its next request, the one in hand, its response.

It has one owner at a time: the listener, but while it is ANSWERING the thread that has the request
in hand. Of that one's the listener touches only `state` and `events`, and at the end of a shutdown
it closes the connection. No sockets are read or written here.
"""
import select
from typing import Any, Dict, Optional, Tuple, Union

from oqc.messages import Request, Response
from oqc.wire import Head, Limits, parse_head, response_head, split_head

IDLE = "idle"                       # no byte of a request has arrived
HEAD = "head"                       # a part of a head has
BODY = "body"                       # the head is read, the body has not arrived
ANSWERING = "answering"             # a request is in hand
SENDING = "sending"                 # the rest of a response waits for the socket
LEAVING = "leaving"                 # refused: what the client still sends is read and dropped
CLOSED = "closed"

# Which state may follow which.
TRANSITIONS: Dict[str, Tuple[str, ...]] = {
    IDLE: (HEAD, LEAVING, CLOSED),
    HEAD: (BODY, ANSWERING, LEAVING, CLOSED),
    BODY: (ANSWERING, LEAVING, CLOSED),
    ANSWERING: (SENDING, IDLE, CLOSED),
    SENDING: (IDLE, CLOSED),
    LEAVING: (CLOSED,),
    CLOSED: (),
}
READING = (IDLE, HEAD, BODY)        # the client is to go on
# Linux has a name of its own for the end of a client's half; others say the whole has ended.
LEFT = getattr(select, "POLLRDHUP", select.POLLHUP)


class Connection:                   # pylint: disable=too-many-instance-attributes # each says why
    """A client's connection; socketserver calls it a request."""

    __slots__ = ("sock", "address", "state", "since", "deadline", "events", "buffer", "head",
                 "request", "response", "began", "keep", "size", "unsent", "dropped", "counted",
                 "aborted")

    def __init__(self, sock: Any, address: Tuple[Any, ...], now: float, deadline: float) -> None:
        """Take over an accepted socket; `now` and `deadline` are monotonic seconds."""
        self.sock = sock
        self.address = address
        self.state = IDLE
        self.since = now                # when it became idle, its head began, its body arrived last
        self.deadline = deadline        # when the listener gives it up, unless it is ANSWERING
        self.events = 0                 # what the selector watches it for
        self.buffer: Union[bytes, bytearray] = b""
        self.head: Optional[Head] = None            # of the request that is read or in hand
        self.request: Optional[Request] = None      # in hand
        self.response: Optional[Response] = None    # to it; none after a defect
        self.began = now                # when the request was whole
        self.keep = False               # whether the connection goes on after the response
        self.size = 0                   # bytes of the response's body, for the access log
        self.unsent: Union[bytes, memoryview] = b""     # what the socket has not taken yet
        self.dropped = 0                # bytes that arrived while it was LEAVING
        self.counted = 0                # bytes of its body among those that are still arriving
        self.aborted = False            # whether closing it resets it

    def become(self, state: str) -> None:
        """Change the state as TRANSITIONS allows; anything else is a defect."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a connection that is {self.state} cannot become {state}")
        self.state = state

    def receive(self, data: bytes) -> None:
        """Add bytes to what has arrived."""
        self.buffer += data
        if self.state == IDLE:
            self.become(HEAD)

    def parse(self, limits: Limits) -> None:
        """Go on to BODY when the head is whole, to ANSWERING when the request is; raise Problem."""
        if self.state == HEAD:
            raw, rest = split_head(self.buffer, limits)
            if raw is None:
                self.buffer = rest
                return
            self.head = parse_head(raw, limits)
            self.buffer = rest
            if len(self.buffer) < self.head.length:
                self.buffer = bytearray(self.buffer)    # grows without being copied each time
                self.become(BODY)
        head = self.head
        if head is not None and len(self.buffer) >= head.length:
            body = bytes(self.buffer[:head.length])
            self.buffer = bytes(self.buffer[head.length:])
            self.request = Request(head.method, head.path, head.query, head.headers, body,
                                   has_left=self.has_left)
            self.become(ANSWERING)

    def has_left(self) -> bool:
        """Return whether the client has closed its half of the connection, so that it will hardly
        read on. A system call; for who has the request in hand."""
        watch = select.poll()
        try:
            watch.register(self.sock, LEFT)
            return bool(watch.poll(0))
        except (OSError, ValueError):       # closed at the end of a shutdown
            return True

    def asks_for_head(self) -> bool:
        """Return whether the method is HEAD, also where the head could not be parsed."""
        if self.head is not None:
            return self.head.method == "HEAD"
        return self.buffer.lstrip(b"\r\n").startswith(b"HEAD ")

    def streams(self) -> bool:
        """Return whether the response goes out piece by piece, by whoever has the request."""
        return not isinstance(self.response.body, bytes) and self.head.method != "HEAD"

    def response_head(self, date: str, stopping: bool) -> bytes:
        """Return the head of the response as it goes over the wire, and decide whether to keep the
        connection: its client must want that, and see where the response ends."""
        delimited = self.head.minor > 0 or isinstance(self.response.body, bytes)
        self.keep = self.head.wants_keep and delimited and not stopping
        return response_head(self.response, date, self.keep, self.head.minor)

    def next_request(self) -> None:
        """Go on, after the response, to what has arrived since."""
        self.head = self.request = self.response = None
        self.size = 0
        self.become(IDLE)
        if self.buffer:
            self.become(HEAD)
