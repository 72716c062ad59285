"""The server: socketserver's hooks around a loop that reads all connections, and a pool of threads.

What socketserver calls a request is a `Connection` here, as UDPServer's is `(data, socket)`; the
method `process_request` is called each time a connection has a whole HTTP request in hand. The
listener is the thread in `serve_forever`, and every method of Server is the listener's but those
that say otherwise.

| hook | thread | what it does |
|---|---|---|
| get_request | listener | accepts; the TLS handshake comes with the first bytes |
| verify_request | listener | is there room |
| process_request | listener | answers what is quick, gathers small adds, else asks the pool |
| process_request_thread | pool | inherited: finish_request, handle_error, shutdown_request |
| finish_request | listener or pool | inherited: Handler(connection, address, server) |
| Handler.handle | listener or pool | asks the Api for the response |
| Handler.finish | pool | sends a response in pieces; what is quick has none |
| shutdown_request | listener or pool | gives the connection back to the listener |
| close_request | listener | ends a connection |
| handle_error | listener or pool | logs a defect, which costs its connection and no other |
| service_actions | listener | ends what is past its deadline |
"""
import collections
import contextlib
import errno
import logging
import queue
import selectors
import socket
import socketserver
import ssl
import struct
import threading
from http.server import ThreadingHTTPServer
from typing import Any, Callable, Deque, Dict, List, Optional, Protocol, Tuple

from oqc.api import Api
from oqc.connection import (
    ANSWERING, BODY, CLOSED, HEAD, IDLE, LEAVING, READING, SENDING, Connection)
from oqc.messages import Problem, Request, Response, problem_response
from oqc.wire import Limits, response_head

log = logging.getLogger("oqc")

NEVER = float("inf")
TICK = 0.25                         # seconds between two looks at the deadlines
PAUSE = 0.1                         # seconds without new connections when no descriptor is free
READ = 1 << 16                      # bytes read at once
BODIES = 64 << 20                   # bytes that the bodies which are still arriving take together
AT_REST = 1.0                       # seconds after which an idle connection may make room
MADE_AT_ONCE = 8                    # connections that make room when no descriptor is free
ACCEPTED_AT_ONCE = 64
MOST_LEAVING = 64                   # connections over the limit that are told so before they end
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
REST = 60.0                         # seconds that a thread of the pool waits for work
NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
OVERLOADED = problem_response(Problem(
    503, "no connection or no thread is free; try again soon", ("Retry-After", "1")))
NO_MEMORY = problem_response(Problem(
    503, f"the bodies that are arriving take {BODIES >> 20} MiB already; try again soon",
    ("Retry-After", "1")))
ABORT = struct.pack("ii", 1, 0)     # SO_LINGER with no time: closing resets (socket(7))


class Clock(Protocol):
    """What the server asks of a clock."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""

    def date(self) -> str:
        """Return the UTC time as an HTTP date."""


class Handler(socketserver.BaseRequestHandler):
    """Answers the request that a connection has in hand: socketserver makes one for each."""

    server: "Server"
    request: Connection

    def handle(self) -> None:
        """Ask the Api for the response."""
        connection = self.request
        connection.response = self.server.api.handle(connection.request)

    def finish(self) -> None:
        """Send a response that comes in pieces; one that is at hand is sent by the listener."""
        connection = self.request
        if connection.response is None or not connection.streams():
            return
        try:
            self._send_pieces(connection)
        except OSError:                 # the client has gone
            connection.keep = False
        except Exception:   # pylint: disable=broad-exception-caught # of what makes the pieces
            log.exception("an answer is cut short")
            connection.keep = False     # HTTP/1.1 clients see that the last chunk is missing
            if connection.head.minor == 0:      # others only see a reset
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                connection.aborted = True

    def _send_pieces(self, connection: Connection) -> None:
        """Send the head and each piece, chunked (RFC 9112, section 7.1); raise what goes wrong."""
        limits = self.server.limits
        chunked = connection.head.minor > 0
        data = connection.response_head(self.server.date, self.server.stopping)
        for piece in connection.response.body:
            if chunked and piece:       # an empty chunk would be the last one
                data += b"%x\r\n%b\r\n" % (len(piece), piece)
            elif piece:
                data += piece
            connection.sock.settimeout(limits.head_seconds + len(piece) / limits.pace)
            connection.sock.sendall(data)
            connection.size += len(piece)
            data = b""
        if chunked:
            data += b"0\r\n\r\n"
        connection.sock.sendall(data)       # the head is in it if there was no piece
        connection.sock.setblocking(False)


class Server(ThreadingHTTPServer):  # pylint: disable=too-many-instance-attributes # each says why
    """Listens, reads the requests of all connections in one thread, keeps them to their deadlines.

    The listener answers by itself what needs no waiting, so that a crowd of clients does not fight
    for the interpreter lock (16 threads that each serve a connection answer a quarter as many); a
    request that may take long gets a thread of the pool. An idle or slow client costs no thread.
    """

    request_queue_size = 1024       # 5 makes a crowd wait for seconds (net.core.somaxconn caps it)

    def __init__(self, address: Tuple[str, int], api: Api, clock: Clock, *,
                 limits: Limits = Limits(), access: Callable[[str], None] = lambda line: None,
                 tls: Optional[ssl.SSLContext] = None, rest: float = REST) -> None:
        """Listen on `address`; raise OSError. `access` takes a line for each request, `rest` is how
        many seconds a thread of the pool waits for work. Call serve_forever next."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.api = api
        self.clock = clock
        self.limits = limits
        self.access = access
        self.tls = tls
        self.date = clock.date()
        self.connections: Dict[Connection, None] = {}       # in the order in which they came
        self._adds: List[Connection] = []       # small adds, to be stored together
        self._arriving = 0                      # bytes of the bodies that are still arriving
        self._returned: Deque[Connection] = collections.deque()     # given back by shutdown_request
        self._pool = Pool(rest)
        self._deadlines_at = 0.0                # monotonic: when deadlines are looked at next
        self._accept_at = 0.0                   # monotonic: when to accept again; 0: it does
        self._close_at = NEVER                  # monotonic: by then all connections are closed
        self._listener = 0                      # the id of the thread in serve_forever
        self._stopped = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake_end, self._wake_write_end = socket.socketpair()
        self._wake_end.setblocking(False)
        self._wake_write_end.setblocking(False)
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind without asking for the host's name: with a dead resolver that takes half a minute,
        and HTTPServer's server_bind does."""
        socketserver.TCPServer.server_bind(self)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)   # accept() hands it on
        self.server_name, self.server_port = self.server_address[:2]    # HTTPServer's attributes

    # The loop, in place of BaseServer's, which watches one descriptor

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Serve until shutdown()."""
        self._listener = threading.get_ident()
        self.socket.setblocking(False)
        self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_end, selectors.EVENT_READ, self._awake)
        while not self.stopping:
            self._round(poll_interval)
        self.socket.close()
        while self.connections and self.clock.monotonic() < self._close_at:
            for connection in list(self.connections):
                if connection.state in READING:
                    self.close_request(connection)
            self._round(0.02)
        for connection in list(self.connections):
            self.close_request(connection)
        self._stopped.set()

    @property
    def stopping(self) -> bool:
        """Whether shutdown() was called. For any thread."""
        return self._close_at != NEVER

    def shutdown(self, seconds: float = 2.0) -> None:
        """Stop listening, let what is being answered be answered for so many seconds, close all
        connections. For any other thread."""
        self._close_at = self.clock.monotonic() + seconds
        self._wake()
        self._stopped.wait(seconds + 1)

    def server_close(self) -> None:
        """Give back the listening socket and the loop's descriptors; after shutdown(), by who
        called it."""
        super().server_close()
        self._wake_end.close()
        self._wake_write_end.close()
        self._selector.close()

    def _round(self, seconds: float) -> None:
        """Do what is to be done, after waiting for it if there is nothing.

        Responses go out together at its end: one at a time, each wakes a client that has gone to
        sleep since the last, and 16 clients are answered a quarter more slowly.
        """
        if self._adds or self._returned:    # requests that came right behind others
            seconds = 0
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, Connection):
                self._guarded(self._ready, key.data)
            else:
                key.data()
        self._dispatch_adds()
        self._take_back()
        self.service_actions()

    def _take_back(self) -> None:
        """Send the responses of the connections that were given back, and go on with them."""
        for _ in range(len(self._returned)):
            self._guarded(self._respond, self._returned.popleft())

    def _guarded(self, step: Callable[[Connection], None], connection: Connection) -> None:
        """Take a step with a connection; a defect costs that connection, and no other."""
        try:
            step(connection)
        except Exception:           # pylint: disable=broad-exception-caught # see above
            self.handle_error(connection, connection.address)
            self.close_request(connection)

    def _awake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_end.recv(4096)

    def _wake(self) -> None:
        """Have the loop go round now. For any thread."""
        with contextlib.suppress(OSError):      # full of wakes; or the server is closed
            self._wake_write_end.send(b"!")

    # New connections

    def get_request(self) -> Tuple[Any, Any]:
        """Accept a connection; raise OSError. With TLS its first reads shake hands, and none of
        them waits for a silent client."""
        sock, address = self.socket.accept()
        sock.setblocking(False)
        if self.tls:
            try:
                sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError:             # the client has gone
                sock.close()
                raise
        now = self.clock.monotonic()
        return Connection(sock, address, now, now + self.limits.idle_seconds), address

    def verify_request(self, request: Connection, client_address: Any) -> bool:
        """Return whether there is room for a connection; close an idle one to make some."""
        if self._has_room():
            return True
        self._dispatch_adds()             # who gets an answer may leave with it
        self._take_back()
        return self._has_room()

    def _accept(self) -> None:
        """Take all new connections. What most of them have to say has arrived with them."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, address = self.get_request()
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._pause_accepting(error)
                return
            has_room = self.verify_request(connection, address)
            self.connections[connection] = None
            self._guarded(self._ready if has_room else self._turn_away, connection)

    def _pause_accepting(self, error: OSError) -> None:
        """Accept nothing for a while; those that waited longest give up their descriptors.

        The listening socket stays readable meanwhile, and would have the listener spin.
        """
        log.warning("no connection can be accepted: %s", error.strerror)
        for _ in range(MADE_AT_ONCE):
            if not self._make_room():
                break
        self._selector.unregister(self.socket)
        self._accept_at = self.clock.monotonic() + PAUSE

    def _has_room(self) -> bool:
        return len(self.connections) < self.limits.connections or self._make_room()

    def _make_room(self) -> bool:
        """Close the connection that was idle or incomplete longest; False if all are at work.

        An idle one only after AT_REST: a client that was just answered is about to ask again, and
        would be reset.
        """
        leaving = [other for other in self.connections if other.state == LEAVING]
        if leaving and len(self.connections) - len(leaving) < self.limits.connections:
            self.close_request(min(leaving, key=_since))    # they have their answers
            return True
        before = self.clock.monotonic() - AT_REST
        candidates = [other for other in self.connections
                      if other.state in READING and other.since <= before]
        for connection in sorted(candidates, key=_since):
            if not self._has_arrived(connection):
                self.close_request(connection)
                return True
        return False

    @staticmethod
    def _has_arrived(connection: Connection) -> bool:
        """Return whether bytes wait to be read, so that closing would reset the connection."""
        try:
            return bool(socket.socket.recv(connection.sock, 1, socket.MSG_PEEK))
        except OSError:
            return False

    def _turn_away(self, connection: Connection) -> None:
        """Say that there is no room, as long as that takes no room itself."""
        if self.tls or len(self.connections) > self.limits.connections + MOST_LEAVING:
            self.close_request(connection)
        else:
            connection.buffer = self._received(connection) or b""   # a HEAD gets no body
            self._refuse(connection, OVERLOADED)

    # Requests

    def _ready(self, connection: Connection) -> None:
        """Read what has arrived on a connection, or send on what its socket takes again."""
        if connection.state == CLOSED:
            return                      # while this event was on its way
        if connection.state == SENDING:
            self._send(connection)
            if not connection.unsent:
                self._end_response(connection)
            return
        if connection.state == ANSWERING:   # the client sends more, or went away: not now
            self._watch(connection, 0)
            return
        data = self._received(connection)
        if data is None:
            self._watch(connection, selectors.EVENT_READ)
        elif not data:
            self.close_request(connection)
        elif connection.state == LEAVING:
            connection.dropped += len(data)
            if connection.dropped >= self.limits.drain:
                self.close_request(connection)
        else:
            self._arrived(connection, data)

    def _received(self, connection: Connection) -> Optional[bytes]:
        """Read once: the bytes, none at the end, None where nothing has arrived."""
        try:
            if connection.state == LEAVING:     # dropped, and after the end of TLS if there was any
                return socket.socket.recv(connection.sock, READ)
            data: bytes = connection.sock.recv(READ)
            # What TLS has decrypted already, the selector does not see.
            while data and self.tls and connection.sock.pending():
                data += connection.sock.recv(READ)
            return data
        except NOT_NOW:
            return None
        except OSError:
            return b""

    def _arrived(self, connection: Connection, data: bytes) -> None:
        """Take in what a client sent."""
        if connection.state == IDLE:
            connection.since = self.clock.monotonic()
            connection.deadline = connection.since + self.limits.head_seconds
        elif connection.state == BODY:  # one that goes on arriving is less idle than others
            connection.since = self.clock.monotonic()
        connection.receive(data)
        self._go_on(connection)

    def _go_on(self, connection: Connection) -> None:
        """Have the request answered if it is whole, else wait for the rest."""
        before = connection.state
        try:
            connection.parse(self.limits)
        except Problem as problem:
            self._refuse(connection, problem_response(problem))
            return
        if connection.state == BODY or connection.counted:
            self._count_body(connection)
            if self._arriving > max(BODIES, self.limits.body):
                self._refuse(connection, NO_MEMORY)
                return
        if connection.state == ANSWERING:
            connection.began = self.clock.monotonic()
            self.process_request(connection, connection.address)
            return
        if connection.state == BODY and before != BODY:
            self._await_body(connection)
        if connection.state in READING:
            self._watch(connection, selectors.EVENT_READ)

    def _count_body(self, connection: Connection) -> None:
        """Keep count of what the bodies that are still arriving take."""
        size = 0
        if connection.state == BODY:
            size = len(connection.buffer)
        self._arriving += size - connection.counted
        connection.counted = size

    def _await_body(self, connection: Connection) -> None:
        """Refuse what can be refused once the head is read, or let the client send the body."""
        head = connection.head
        refusal = self.api.refuse(Request(head.method, head.path, head.query, head.headers))
        if refusal:
            self._refuse(connection, refusal)
            return
        seconds = self.limits.head_seconds + head.length / self.limits.pace
        connection.deadline = self.clock.monotonic() + seconds
        if head.expects_continue and not connection.buffer:
            with contextlib.suppress(OSError):      # the client has gone: reading finds that out
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def process_request(self, request: Connection, client_address: Any) -> None:
        """Have the request in hand answered: with others of this round, now, or by the pool."""
        connection = request
        if self.api.is_small_add(connection.request):
            self._adds.append(connection)
        elif self.api.is_quick(connection.request):
            self.finish_request(connection, client_address)
            self.shutdown_request(connection)
        else:
            self._in_pool([connection], self.process_request_thread, connection, client_address)

    def _dispatch_adds(self) -> None:
        """Have the small adds of this round stored with one commit: here, since handing them to
        another thread and back takes as long as the disk does; by the pool if the store is busy or
        slow."""
        if not self._adds:
            return
        adds = self._adds
        self._adds = []
        if self.api.would_wait():
            self._in_pool(adds, self._answer_together, adds)
        else:
            self._answer_together(adds)

    def _answer_together(self, connections: List[Connection]) -> None:
        """Answer small adds together, as process_request_thread answers one request. Listener or
        pool."""
        requests = [connection.request for connection in connections]
        try:
            responses = self.api.handle_together(requests)
            for connection, response in zip(connections, responses):
                connection.response = response
        except Exception:           # pylint: disable=broad-exception-caught # see handle_error
            self.handle_error(connections[0], connections[0].address)
        finally:
            for connection in connections:
                self.shutdown_request(connection)

    def _in_pool(self, connections: List[Connection], work: Callable[..., None],
                 *arguments: Any) -> None:
        """Answer these connections by a thread of the pool; 503 if none can be started."""
        try:
            self._pool.submit(work, *arguments)
        except RuntimeError:        # no more threads (RLIMIT_NPROC, a container's limit of pids)
            log.warning("no thread can be started: %d requests are answered 503", len(connections))
            for connection in connections:
                connection.response = OVERLOADED
                self.shutdown_request(connection)

    def shutdown_request(self, request: Connection) -> None:
        """Give a connection back to the listener, with its response or, after a defect, without.
        Listener or pool; who calls it does not touch the connection any more."""
        self._returned.append(request)
        if threading.get_ident() != self._listener:
            self._wake()    # always: to look first whether others wait would race with _take_back

    def handle_error(self, request: Connection, client_address: Any) -> None:
        """Log a defect. Listener or pool."""
        log.exception("a request of %s", client_address)

    # Responses

    def _respond(self, connection: Connection) -> None:
        """Send the response of a connection that was given back, and go on with it."""
        response = connection.response
        if response is None:            # a defect
            self.close_request(connection)
            return
        if not connection.streams():    # else its Handler has sent it
            connection.unsent = connection.response_head(self.date, self.stopping)
            if connection.head.method != "HEAD":
                connection.unsent += response.body
                connection.size = len(response.body)
            self._send(connection)
        # After it was sent: the log's thread, when it is woken, keeps the client waiting.
        self._log_access(connection, response.status, connection.size, connection.began)
        if not connection.unsent:
            self._end_response(connection)

    def _send(self, connection: Connection) -> None:
        """Send what the socket takes of a response, and watch for when it takes the rest."""
        unsent = connection.unsent
        try:
            sent = connection.sock.send(unsent)
        except NOT_NOW:
            sent = 0
        except OSError:                 # the client has gone
            connection.keep = False
            sent = len(unsent)
        if sent == len(unsent):
            connection.unsent = b""
            return
        connection.unsent = memoryview(unsent)[sent:]
        if connection.state != SENDING:
            connection.become(SENDING)
            seconds = self.limits.head_seconds + len(unsent) / self.limits.pace
            connection.deadline = self.clock.monotonic() + seconds
            self._watch(connection, selectors.EVENT_WRITE)

    def _end_response(self, connection: Connection) -> None:
        """Wait for the next request of a connection, or close it."""
        if not connection.keep:
            self.close_request(connection)
            return
        connection.next_request()
        connection.since = self.clock.monotonic()
        connection.deadline = connection.since + self.limits.idle_seconds
        self._go_on(connection)

    def _refuse(self, connection: Connection, response: Response) -> None:
        """Answer a request that is not read to its end, and leave. What the client still sends is
        read and dropped, up to a limit: closing at once would reset the connection, and the
        answer would be lost with it."""
        body = response.body
        if connection.asks_for_head():
            body = b""
        connection.become(LEAVING)
        self._count_body(connection)
        self._log_access(connection, response.status, len(body), connection.since)
        connection.deadline = self.clock.monotonic() + self.limits.leave_seconds
        connection.buffer = b""
        try:
            connection.sock.send(response_head(response, self.date, False) + body)
            self._end_tls(connection)
            # An SSLSocket's own shutdown() forgets its TLS.
            socket.socket.shutdown(connection.sock, socket.SHUT_WR)
            self._watch(connection, selectors.EVENT_READ)
        except OSError:
            self.close_request(connection)

    def close_request(self, request: Connection) -> None:
        """End a connection; one that has ended stays so."""
        if request.state == CLOSED:
            return
        if request.state != LEAVING and not request.aborted:
            self._end_tls(request)
        request.become(CLOSED)
        self._count_body(request)
        self.connections.pop(request, None)
        self._watch(request, 0)
        request.sock.close()

    def _end_tls(self, connection: Connection) -> None:
        """Say that nothing follows (RFC 8446, section 6.1: close_notify), without waiting for the
        client to say so, too: else what was cut off looks the same."""
        if self.tls:
            with contextlib.suppress(OSError, ValueError):      # no handshake yet; it has gone
                connection.sock.unwrap()

    def service_actions(self) -> None:
        """End what is past its deadline; called at least every TICK."""
        now = self.clock.monotonic()
        if now < self._deadlines_at:
            return
        self._deadlines_at = now + TICK
        self.date = self.clock.date()
        if self._accept_at and now >= self._accept_at and not self.stopping:
            self._accept_at = 0.0
            self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        late = [connection for connection in self.connections
                if connection.deadline < now and connection.state != ANSWERING]
        for connection in late:
            self._guarded(self._end_late, connection)

    def _end_late(self, connection: Connection) -> None:
        """Say what did not arrive in time, if a client had begun to send it, and close.

        First take what has arrived: it may have been this server that was late.
        """
        while connection.state in READING:
            data = self._received(connection)
            if not data:
                break
            self._arrived(connection, data)
        if connection.state in (ANSWERING, CLOSED) or connection.deadline >= self.clock.monotonic():
            return
        if connection.state not in (HEAD, BODY):
            self.close_request(connection)
            return
        part = "body" if connection.state == BODY else "head"
        problem = Problem(408, f"the {part} did not arrive in time")
        self._refuse(connection, problem_response(problem))

    def _watch(self, connection: Connection, events: int) -> None:
        """Watch a connection for exactly these events."""
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.sock, events, connection)
        elif events:
            self._selector.modify(connection.sock, events, connection)
        else:
            self._selector.unregister(connection.sock)
        connection.events = events

    def _log_access(self, connection: Connection, status: int, size: int, began: float) -> None:
        """Log a request: peer, key name, request, status, bytes, milliseconds. Quoted so that no
        client can forge a line: method and path are printable ASCII."""
        request = "-"
        name = "-"
        head = connection.head
        if head is not None:
            request = f"{head.method} {head.path}".replace("\\", "\\\\").replace('"', '\\"')
            name = self.api.keys.name(head.headers) or "-"
        peer = f"{connection.address[0]}:{connection.address[1]}"
        took = (self.clock.monotonic() - began) * 1000
        self.access(f'{peer} "{name}" "{request}" {status} {size} {took:.1f}')


class Pool:
    """Threads that rest between two pieces of work: starting one takes longer than most requests.

    The scheme of concurrent.futures.thread (its _idle_semaphore), without an upper limit.
    """

    def __init__(self, rest: float) -> None:
        """Keep a thread for `rest` seconds after its last work."""
        self._rest = rest
        self._work: "queue.SimpleQueue[Tuple[Callable[..., None], Tuple[Any, ...]]]" = (
            queue.SimpleQueue())
        self._resting = threading.Semaphore(0)      # threads that nothing was submitted for

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a thread call this; raise RuntimeError if none rests and none can be started."""
        if self._resting.acquire(blocking=False):   # pylint: disable=consider-using-with # counts
            self._work.put((function, arguments))
        else:
            threading.Thread(target=self._run, name="pool", args=(function, arguments),
                             daemon=True).start()

    def _run(self, function: Callable[..., None], arguments: Tuple[Any, ...]) -> None:
        """What a thread of the pool does."""
        while True:
            function(*arguments)
            self._resting.release()
            try:
                function, arguments = self._work.get(timeout=self._rest)
            except queue.Empty:
                if self._resting.acquire(blocking=False):   # pylint: disable=consider-using-with
                    return
                function, arguments = self._work.get()      # submitted at this moment


def _since(connection: Connection) -> float:
    return connection.since


def notify(address: Optional[str], state: str) -> None:
    """Tell systemd a state at the address that it gave in NOTIFY_SOCKET, if any (sd_notify(3))."""
    if not address:
        return
    if address.startswith("@"):         # an abstract address (unix(7))
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            log.warning("NOTIFY_SOCKET %s: %s", address.replace("\0", "@"), error.strerror or error)


def tls_context(certificate: Optional[str], key: Optional[str]) -> Optional[ssl.SSLContext]:
    """Return what serves HTTPS, TLS 1.2 and later, with these PEM files, or None without a
    certificate; raise OSError."""
    if not certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, _refuse_to_ask)
    return context


def load_certificate_again(context: ssl.SSLContext, certificate: str, key: Optional[str]) -> None:
    """Have the handshakes from now on use what is in these PEM files; raise OSError.

    They are tried on another context first: a pair that does not match would leave the new
    certificate in this one, without its key, and fail every handshake. Handshakes that are under
    way and connections that exist go on with what they began with.
    """
    tls_context(certificate, key)
    context.load_cert_chain(certificate, key, _refuse_to_ask)


def _refuse_to_ask() -> str:
    """Stand in for OpenSSL's question at the terminal, which may be nobody's."""
    raise OSError(0, "the key has a pass phrase; openssl pkey -in KEY -out PLAIN takes it off")
