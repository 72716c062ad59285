"""One client's connection: its state, the bytes of its next request, the one in hand, its response.

It has one owner at a time, and only the owner touches it: the listener in every state but
ANSWERING, and in that one whoever has the request in hand. No sockets are read or written here.
"""
from typing import Any, Dict, Optional, Tuple, Union

from oqc.messages import Request, Response
from oqc.wire import Head, Limits, answer_head, parse_head, split_head

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


class Connection:                   # pylint: disable=too-many-instance-attributes # each says why
    """A client's connection; socketserver calls it a request."""

    __slots__ = ("sock", "address", "state", "since", "deadline", "events", "buffer", "head",
                 "request", "response", "began", "keep", "size", "unsent", "dropped")

    def __init__(self, sock: Any, address: Tuple[Any, ...], now: float, deadline: float) -> None:
        """Take over an accepted socket; `now` and `deadline` are monotonic seconds."""
        self.sock = sock
        self.address = address
        self.state = IDLE
        self.since = now                # when it became idle, or its request incomplete
        self.deadline = deadline        # when the listener gives it up, unless it is ANSWERING
        self.events = 0                 # what the selector watches it for
        self.buffer: Union[bytes, bytearray] = b""
        self.head: Optional[Head] = None            # of the request that is read or in hand
        self.request: Optional[Request] = None      # in hand
        self.response: Optional[Response] = None    # to it; none after a defect
        self.began = now                # when the request was whole
        self.keep = False               # whether the connection goes on after the response
        self.size = 0                   # bytes of the response's body that were sent
        self.unsent: Union[bytes, memoryview] = b""     # what the socket has not taken yet
        self.dropped = 0                # bytes that arrived while it was LEAVING

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
            raw, self.buffer = split_head(self.buffer, limits)
            if raw is None:
                return
            self.head = parse_head(raw, limits.fields, limits.body)
            if len(self.buffer) < self.head.length:
                self.buffer = bytearray(self.buffer)    # grows without being copied each time
                self.become(BODY)
        head = self.head
        if head is not None and len(self.buffer) >= head.length:
            body = bytes(self.buffer[:head.length])
            self.buffer = bytes(self.buffer[head.length:])
            self.request = Request(head.method, head.path, head.query, head.headers, body)
            self.become(ANSWERING)

    def streams(self) -> bool:
        """Return whether the response goes out piece by piece, by whoever has the request."""
        return not isinstance(self.response.body, bytes) and self.head.method != "HEAD"

    def decide_keep(self, stopping: bool) -> None:
        """Decide whether the connection goes on: its client must want that, and see an end."""
        delimited = self.head.minor > 0 or isinstance(self.response.body, bytes)
        self.keep = self.head.keep and delimited and not stopping

    def response_head(self, date: str) -> bytes:
        """Return the head of the response as it goes over the wire."""
        return answer_head(self.response, date, self.keep, self.head.minor)

    def next_request(self) -> None:
        """Go on, after the response, to what has arrived since."""
        self.head = self.request = self.response = None
        self.size = 0
        self.become(IDLE)
        if self.buffer:
            self.become(HEAD)
