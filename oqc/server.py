"""The only room that touches sockets: connections, limits, deadlines, TLS, one write an answer."""
import collections
import contextlib
import errno
import functools
import logging
import queue
import selectors
import socket
import socketserver
import ssl
import threading
from http.server import ThreadingHTTPServer
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

from oqc.api import Api
from oqc.messages import Problem, Request, Response, problem_response
from oqc.wire import Connection, Head, Limits, answer_head

log = logging.getLogger("oqc")

FAR = float("inf")
TICK = 0.25                         # seconds between two looks at the deadlines
PAUSE = 0.1                         # seconds without new connections when no descriptor is to be had
READ = 1 << 16                      # bytes read at once
ACCEPTED_AT_ONCE = 64
MOST_LEAVING = 64                   # connections over the cap, while they are told that there is no room
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
KEEP_THREAD = 60.0                  # seconds a thread of the pool rests before it ends
OVERLOADED = problem_response(Problem(503, "no connection or no thread is free; try again soon", ("Retry-After", "1")))


class Server(ThreadingHTTPServer):  # pylint: disable=too-many-instance-attributes # each has a line that says why
    """Listens, reads the requests of all connections in one thread, and keeps them to their deadlines.

    The listener answers by itself what needs no waiting, so that a crowd of clients does not fight for the interpreter
    lock (16 threads that each serve a connection answer a quarter as many); a request that may take long gets a thread
    of the pool while it lasts. An idle or slow client costs no thread.
    """

    request_queue_size = 1024       # the backlog: 5 makes a crowd wait for seconds (net.core.somaxconn caps it)

    def __init__(self, address: Tuple[str, int], api: Api, clock: Any, *, limits: Limits = Limits(),
                 access: Callable[[str], None] = lambda line: None, tls: Optional[ssl.SSLContext] = None) -> None:
        """Listen on `address`; raises OSError. `access` takes a line for each request. Call serve_forever next."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.api, self.clock, self.limits, self.access, self.tls = api, clock, limits, access, tls
        self.connections: Dict[Connection, None] = {}       # in the order in which they came
        self.date = clock.date()
        self._look_at = self._accept_at = 0.0               # monotonic: of the deadlines; of the listening socket
        self._close_at = FAR                                # monotonic: by then all connections are closed
        self._more = False                                  # there is more to do, so that nothing may be awaited
        self._listener = 0                                  # the id of the thread in serve_forever
        self._stopped = threading.Event()
        self._told: Deque[Tuple[Connection, Callable[[Connection], None]]] = collections.deque()   # what to do, where
        self._resting: List["queue.SimpleQueue[Callable[[], None]]"] = []   # mailboxes of threads without work
        self._selector = selectors.DefaultSelector()
        self._wake_end, self._wake_write_end = socket.socketpair()
        super().__init__(address, Connection)   # in the place of a handler, which nothing calls

    def server_bind(self) -> None:
        """Bind without asking for the host's name: with a dead resolver, HTTPServer's hangs for half a minute."""
        socketserver.TCPServer.server_bind(self)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # what accept gives inherits it
        self.server_name, self.server_port = self.server_address[:2]

    # The listener thread

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Serve until stop()."""
        self._listener = threading.get_ident()
        for sock, ready in ((self.socket, self._accept), (self._wake_end, self._awake)):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, (ready,))
        self._wake_write_end.setblocking(False)
        while self._close_at == FAR:
            self._look(poll_interval)
        self.socket.close()
        while self.connections and self.clock.monotonic() < self._close_at:
            for connection in list(self.connections):
                if not connection.busy and not connection.leaving:
                    self._forget(connection)
            self._look(0.02)
        for connection in list(self.connections):
            self._forget(connection)
        self._stopped.set()

    def _look(self, seconds: float) -> None:
        for key, _ in self._selector.select(0 if self._more else seconds):
            self._safely(*key.data)
        self._finish()
        self._safely(self.service_actions)

    def _safely(self, do: Callable[..., None], *about: Any) -> None:
        """Do something about a connection, or in general: a defect costs that connection, and no other."""
        try:
            do(*about)
        except Exception:           # pylint: disable=broad-exception-caught # see above
            log.exception("listener")
            if about:
                self._forget(about[0])

    def _accept(self) -> None:
        """Take all new connections. What most of them have to say has arrived with them."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, peer = self.socket.accept()
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._pause_accepting(error)
                return
            now = self.clock.monotonic()
            sock.setblocking(False)
            if self.tls:                # the first recv()s shake hands, and none of them waits for a silent client
                try:
                    sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                except OSError:         # the client has gone
                    sock.close()
                    continue
            connection = Connection(sock, peer, now, now + self.limits.idle_seconds)
            room = self._has_room()
            if not room:
                self._finish()          # who gets an answer may leave with it
                room = self._has_room()
            self.connections[connection] = None
            self._safely(self._readable if room else self._turn_away, connection)

    def _pause_accepting(self, error: OSError) -> None:
        """Without a descriptor to be had, the connection that waited longest gives up its own. The listening socket
        stays readable meanwhile, and would have the listener spin."""
        log.warning("no connection can be accepted: %s", error.strerror)
        self._make_room()
        self._selector.unregister(self.socket)
        self._accept_at = self.clock.monotonic() + PAUSE

    def _turn_away(self, connection: Connection) -> None:
        """Say that there is no room, as long as that takes no room itself."""
        if self.tls or len(self.connections) > self.limits.connections + MOST_LEAVING:
            self._forget(connection)
        else:
            self._refuse(connection, OVERLOADED)

    def _readable(self, connection: Connection) -> None:
        """Read what has arrived on a connection and answer the requests that are whole."""
        if connection not in self.connections:
            return                      # closed while this event was on its way
        if connection.busy:             # the client goes on, or went away, before it has its answer: not now
            self._selector.unregister(connection.sock)
            connection.watched = False
            return
        try:
            data = connection.sock.recv(READ)
            while data and self.tls and connection.sock.pending():
                data += connection.sock.recv(READ)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._watch(connection)
            return
        except OSError:
            data = b""
        if connection.leaving:
            connection.leaving += len(data)
        if not data or connection.leaving > self.limits.drain:
            self._forget(connection)
        elif not connection.leaving:
            self._arrived(connection, data)

    def _arrived(self, connection: Connection, data: bytes) -> None:
        """Take in what a client sent."""
        began = not connection.buffer and not connection.head       # these are the first bytes of a request
        connection.buffer += data
        if began or connection.head:        # a body that goes on arriving leaves its client less idle than others
            connection.since = self.clock.monotonic()
        if began:
            connection.deadline = connection.since + self.limits.head_seconds
        self._go_on(connection)

    def _go_on(self, connection: Connection) -> None:
        """Answer the requests in a connection's buffer, and wait for more when there is none that is whole."""
        if connection not in self.connections:
            return                      # closed when it was given back, or since
        while not (connection.busy or connection.leaving):
            try:
                if not connection.next_request(self.limits):
                    if connection.head and not isinstance(connection.buffer, bytearray):
                        self._await_body(connection, connection.head)
                    break
            except Problem as problem:
                self._refuse(connection, problem_response(problem))
                return
            self._handle(connection)
        if not connection.busy and connection in self.connections:
            self._watch(connection)

    def _await_body(self, connection: Connection, head: Head) -> None:
        """Once the head is read and the body is not: refuse what can be refused already, or let the client send it."""
        refusal = self.api.refuse(Request(head.method, head.path, head.query, head.headers))
        if refusal:
            self._refuse(connection, refusal)
            return
        connection.deadline = self.clock.monotonic() + self.limits.head_seconds + head.length / self.limits.pace
        if head.expects and not connection.buffer:
            with contextlib.suppress(OSError):      # the client has gone: reading finds that out
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.buffer = bytearray(connection.buffer)

    def _handle(self, connection: Connection) -> None:
        """Have the request that is whole answered, here if that needs no waiting."""
        head, request = connection.take_request()
        connection.busy, connection.deadline = True, FAR
        began = self.clock.monotonic()

        def answer_soon(response: Response) -> None:
            answer = functools.partial(self._answer, head=head, response=response, began=began)
            if isinstance(response.body, bytes):
                self._tell(connection, answer)
            else:
                answer(connection)

        if self.api.is_quick(request):
            self._more = True
            self.api.handle(request, answer_soon)
        else:
            try:
                self._in_thread(functools.partial(self.api.handle, request, answer_soon))
            except RuntimeError:        # the system has no more (RLIMIT_NPROC, a container's limit of pids)
                log.warning("no thread can be started: %s %s is answered 503", head.method, head.path)
                self._more = True
                answer_soon(OVERLOADED)

    def _watch(self, connection: Connection) -> None:
        if not connection.watched:
            self._selector.register(connection.sock, selectors.EVENT_READ, (self._readable, connection))
            connection.watched = True

    def _awake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_end.recv(4096)

    def _finish(self) -> None:
        """Write and answer what is at hand, and take connections back. Answers go out together: one at a time, each
        wakes a client that has gone to sleep since the last, and 16 clients are shown a quarter fewer jobs a second."""
        self._more = False
        self._safely(self.api.flush)
        for _ in range(len(self._told)):
            connection, what = self._told.popleft()
            self._safely(what, connection)
            self._safely(self._go_on, connection)

    def _forget(self, connection: Connection) -> None:
        """Close a connection."""
        self.connections.pop(connection, None)
        if connection.watched:
            connection.watched = False
            self._selector.unregister(connection.sock)
        connection.sock.close()

    def _has_room(self) -> bool:
        """Whether one connection more may be had, if need be in place of another."""
        return len(self.connections) < self.limits.connections or self._make_room()

    def _make_room(self) -> bool:
        """Close the connection that has been idle or incomplete longest; False if every one is at work."""
        leaving = [one for one in self.connections if one.leaving]
        waiting = [one for one in self.connections if not one.busy and not one.leaving]
        if leaving and len(self.connections) - len(leaving) < self.limits.connections:
            waiting = leaving           # they have their answers
        if waiting:
            self._forget(min(waiting, key=lambda one: one.since))
        return bool(waiting)

    def _refuse(self, connection: Connection, response: Response) -> None:
        """Answer a request that is not read to its end, and leave. What the client still sends is read and dropped,
        up to a limit: closing at once would reset the connection, and the answer would be lost with it."""
        head, connection.head = connection.head, None
        body = b"" if head and head.method == "HEAD" else response.body
        data = answer_head(response, self.date, False) + body
        self.log_access(connection, head, response.status, len(body), connection.since)
        connection.leaving, connection.deadline = 1, self.clock.monotonic() + self.limits.leave_seconds
        connection.buffer = b""
        try:
            connection.sock.send(data)
            socket.socket.shutdown(connection.sock, socket.SHUT_WR)     # an SSLSocket's own forgets its TLS
            self._watch(connection)
        except OSError:
            self._forget(connection)

    def service_actions(self) -> None:
        """Called at least every TICK: whatever is past its deadline ends."""
        now = self.clock.monotonic()
        if now < self._look_at:
            return
        self._look_at, self.date = now + TICK, self.clock.date()
        if self._accept_at and now >= self._accept_at and self._close_at == FAR:
            self._accept_at = 0.0
            self._selector.register(self.socket, selectors.EVENT_READ, (self._accept,))
        for connection in [one for one in list(self.connections) if one.deadline < now and not one.busy]:
            if connection.leaving or not (connection.buffer or connection.head):
                self._forget(connection)
            else:
                what = "body" if connection.head else "head"
                self._refuse(connection, problem_response(Problem(408, f"the {what} did not arrive in time")))

    # Any thread

    def _in_thread(self, work: Callable[[], None]) -> None:
        """Have a thread of the pool do this; threads are kept a while for the next."""
        try:
            self._resting.pop().put(work)
        except IndexError:
            threading.Thread(target=self._work, args=(work,), daemon=True).start()

    def _work(self, work: Callable[[], None]) -> None:
        """A thread of the pool."""
        mailbox: "queue.SimpleQueue[Callable[[], None]]" = queue.SimpleQueue()
        while True:
            work()
            self._resting.append(mailbox)
            try:
                work = mailbox.get(timeout=KEEP_THREAD)
            except queue.Empty:
                try:
                    self._resting.remove(mailbox)
                    return
                except ValueError:      # taken in this moment
                    work = mailbox.get()

    def _answer(self, connection: Connection, head: Head, response: Response, began: float) -> None:
        """Send an answer, in one write where its body is at hand, and give the connection back."""
        chunked = not isinstance(response.body, bytes)
        keep = head.keep and self._close_at == FAR and not (chunked and not head.minor)
        size = 0
        try:
            if chunked and head.method != "HEAD":
                size = self._send_pieces(connection.sock, response, keep, head.minor)
            else:
                data = answer_head(response, self.date, keep, head.minor)
                if head.method != "HEAD":
                    data, size = data + response.body, len(response.body)
                sent = _send(connection.sock, data)
                if sent < len(data):
                    self._in_thread(functools.partial(self._send_rest, connection, data[sent:], keep))
                    return
        except OSError:                 # the client has gone
            keep = False
        except Exception:   # pylint: disable=broad-exception-caught # a body that breaks off costs one connection
            log.exception("an answer is cut short")
            keep = False
        finally:
            self.log_access(connection, head, response.status, size, began)
        self._give_back(connection, keep)

    def _send_pieces(self, sock: socket.socket, response: Response, keep: bool, minor: int) -> int:
        """Send an answer piece by piece; the bytes of its body. An error in the middle cuts it short, which the client
        can see: the last chunk is missing."""
        data, size = answer_head(response, self.date, keep, minor), 0
        for piece in response.body:
            sock.settimeout(self.limits.head_seconds + len(piece) / self.limits.pace)
            sock.sendall(data + (b"%x\r\n%b\r\n" % (len(piece), piece) if minor else piece))
            data, size = b"", size + len(piece)
        if minor:
            sock.sendall(b"0\r\n\r\n")
        sock.setblocking(False)
        return size

    def _send_rest(self, connection: Connection, data: bytes, keep: bool) -> None:
        """Send what the socket did not take at once, in a thread."""
        try:
            connection.sock.settimeout(self.limits.head_seconds + len(data) / self.limits.pace)
            connection.sock.sendall(data)
            connection.sock.setblocking(False)
        except OSError:
            keep = False
        self._give_back(connection, keep)

    def _give_back(self, connection: Connection, keep: bool) -> None:
        """Give a connection back to the listener, to go on or to be closed."""
        if threading.get_ident() == self._listener:
            self._take(connection, keep)        # whoever called goes on with it
        else:
            self._tell(connection, functools.partial(self._take, keep=keep))

    def _take(self, connection: Connection, keep: bool) -> None:
        if keep:
            connection.busy, connection.since = False, self.clock.monotonic()
            connection.deadline = connection.since + self.limits.idle_seconds
        else:
            self._forget(connection)

    def _tell(self, connection: Connection, what: Callable[[Connection], None]) -> None:
        """Have the listener do this soon, and go on with the connection."""
        self._told.append((connection, what))
        if threading.get_ident() != self._listener:
            self._wake()                # each time: whoever left that to another could do so just after it was done

    def _wake(self) -> None:
        with contextlib.suppress(OSError):      # full of wakes; or the server has stopped
            self._wake_write_end.send(b"!")

    def log_access(self, connection: Connection, head: Optional[Head], status: int, size: int, began: float) -> None:
        """One line for a request: peer, key name, request, status, bytes, milliseconds. Quoted so that none can forge
        one: method and path are printable ASCII."""
        request = name = "-"
        if head is not None:
            request = f"{head.method} {head.path}".replace("\\", "\\\\").replace('"', '\\"')
            name = self.api.keys.name(head.headers) or name
        took = (self.clock.monotonic() - began) * 1000
        self.access(f'{connection.peer} "{name}" "{request}" {status} {size} {took:.1f}')

    def stop(self, seconds: float = 2.0) -> None:
        """Stop listening, let what is being answered be answered for so long, and end all connections."""
        self._close_at = self.clock.monotonic() + seconds
        self._wake()
        self._stopped.wait(seconds + 1)
        self.server_close()
        for one in (self._wake_end, self._wake_write_end, self._selector):
            one.close()


def _send(sock: socket.socket, data: bytes) -> int:
    """Send what the socket takes at once; the number of bytes. Raises OSError."""
    try:
        return sock.send(data)
    except (BlockingIOError, ssl.SSLWantWriteError):
        return 0


def notify(address: Optional[str], state: str) -> None:
    """Tell systemd how the server fares, at the address that it gave in NOTIFY_SOCKET, if it did (sd_notify(3))."""
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
            except OSError as error:
                log.warning("NOTIFY_SOCKET %s: %s", address, error.strerror or error)


def tls_context(certificate: Optional[str], key: Optional[str]) -> Optional[ssl.SSLContext]:
    """What serves HTTPS, TLS 1.2 and later, with these PEM files; None without a certificate. Raises OSError."""
    if not certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, _refuse_to_ask)
    return context


def _refuse_to_ask() -> str:
    """In place of OpenSSL's question at the terminal, which may be nobody's and cannot be interrupted."""
    raise OSError(0, "the key has a pass phrase; openssl pkey -in KEY -out PLAIN takes it off")
