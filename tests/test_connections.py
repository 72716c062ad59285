"""Connections at their limits: who makes room for whom, what is cut short, what stopping does. In
this process, with an Api that does what the test says."""
import contextlib
import errno
import json
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import types

import pytest
from conftest import until
from test_wire import Wire, ask, skip_head

from oqc.api import HEAVY, Api
from oqc.clock import Clock
from oqc.jobs import Addition, Job, StoreError, UnknownJob
from oqc.keys import Key, Keys
from oqc.messages import Request, Response
from oqc.server import TICK, Limits, Server, tls_context
from oqc.waiting import Waiting

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
UPLOAD = (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
          b"Expect: 100-continue\r\n\r\n")


class Scripted:
    """An Api that leaves every request to functions of the test: by a thread of the pool, or by
    the listener, alone if `quick`, or with others of the round if there is `together`."""

    keys = Keys([])

    def __init__(self, handle, quick, together):
        self.handle = handle
        self.handle_together = together
        self.held = threading.Event()
        self.go = threading.Event()
        self.refuse = lambda _: None
        self.would_wait = lambda: False
        self.is_quick = lambda request: quick
        self.is_small_add = lambda request: together is not None


class Ahead(Clock):
    """The machine's clock, moved on by hand."""

    def __init__(self):
        super().__init__()
        self.seconds = 0

    def monotonic(self):    # pylint: disable=arguments-differ # a static method
        return super().monotonic() + self.seconds


class Listening:
    """A server in this process."""

    def __init__(self, handle, *, quick=False, together=None, tick=TICK, tls=None, make=Server,
                 **limits):
        self.lines = []
        self.api = Scripted(handle, quick, together)
        self.clock = Ahead()
        self.server = make(("127.0.0.1", 0), self.api, self.clock, limits=Limits(**limits),
                           access=self.lines.append, tls=tls, rest=0.05)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(tick,))
        self.thread.start()

    @property
    def connections(self):
        """The connections that there are now."""
        return list(self.server.connections)

    @contextlib.contextmanager
    def held(self):
        """Meanwhile its listener does nothing."""
        held = threading.Event()
        go = threading.Event()

        def hold(_):
            held.set()
            go.wait(20)
            return Response(200, b"held\n")
        script = self.api.handle, self.api.is_quick, self.api.is_small_add
        self.api.handle = hold
        self.api.is_quick = lambda _: True
        self.api.is_small_add = lambda _: False
        with Wire(self, GET) as client:
            assert held.wait(20)
            self.api.handle, self.api.is_quick, self.api.is_small_add = script
            try:
                yield
            finally:
                go.set()
            assert client.answer()[0] == 200

    def stop(self):
        """Stop, twice does no harm."""
        if self.thread.is_alive():
            self.server.shutdown(0.2)
            self.thread.join()
        self.server.server_close()


@pytest.fixture
def listen():
    """listen(handle, **options): a server whose requests are given to handle(request)."""
    started = []

    def start(handle=lambda request: Response(200, b"ok\n"), **options):
        started.append(Listening(handle, **options))
        return started[-1]
    yield start
    for one in started:
        one.stop()


class Gate:
    """A handler that keeps every request waiting until it is opened."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, request):
        self.entered.release()
        self.opened.wait(20)
        return Response(200, b"ok\n")


@pytest.fixture
def gate():
    """A Gate that is open in the end."""
    made = Gate()
    yield made
    made.opened.set()


def test_clients_that_were_refused_and_stay_do_not_keep_others_out(listen):
    server = listen(connections=2)
    with contextlib.ExitStack() as stack:
        refused = [stack.enter_context(Wire(server, b"no request\r\n\r\n")) for _ in range(2)]
        assert [client.answer()[0] for client in refused] == [400, 400]
        for _ in range(2):
            assert stack.enter_context(Wire(server, GET)).answer()[0] == 200


class GivesBackLate(Server):
    """A server whose threads are slow to give connections back."""

    def shutdown_request(self, request):
        time.sleep(0.1)
        super().shutdown_request(request)


def test_a_client_that_has_its_answer_is_not_at_work_any_more(listen):
    """A thread of the pool that sent the answer itself would give the connection back too late."""
    server = listen(connections=1, make=GivesBackLate)
    with Wire(server, GET) as first:
        assert first.answer()[0] == 200
        until(lambda: server.connections[0].state == "idle")
        server.clock.seconds += 2
        with Wire(server, GET) as second:
            assert second.answer()[0] == 200


def test_a_client_that_was_just_answered_keeps_its_connection_and_a_new_one_gets_503(listen):
    server = listen(connections=2)
    with Wire(server, GET) as first, Wire(server, GET) as second:
        assert first.answer()[0] == second.answer()[0] == 200
        for _ in range(5):
            assert ask(server, GET)[0] == 503
            for client in (first, second):
                client.sock.sendall(GET)
                assert client.answer()[0] == 200


def test_a_client_whose_next_request_waits_to_be_read_does_not_make_room(listen):
    """They were idle for long when the listener comes to a new client and their requests."""
    server = listen(connections=3)
    with Wire(server, GET) as first, Wire(server, GET) as second:
        assert first.answer()[0] == second.answer()[0] == 200
        with contextlib.ExitStack() as stack:
            with server.held():
                server.clock.seconds += 2
                new = stack.enter_context(Wire(server, GET))
                for client in (first, second):
                    client.sock.sendall(GET)
            assert [client.answer()[0] for client in (first, second)] == [200, 200]
            assert new.answer()[0] in (200, 503)


def leaves(client, how):
    """The client goes away, or closes its half alone, as nc -N does."""
    if how == "half":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        client.__exit__()


class OpenJob:
    """A store of a job that does not end."""

    def get(self, number):
        """Return the job."""
        return Job(number, "X(1)", "verbatim", "Starting", None, None, None, "T", None, None)


@pytest.mark.parametrize("how", ["half", "whole"])
@pytest.mark.parametrize("behind", [b"", GET], ids=["alone", "with a request behind it"])
def test_a_client_that_has_left_waits_no_more_and_is_answered(listen, how, behind):
    waiting = Waiting(OpenJob(), Clock(), most=2)
    entered = threading.Semaphore(0)
    over = threading.Semaphore(0)

    def wait(request):
        entered.release()
        if request.path == "/status":
            waiting.for_change(waiting.changes, 300, "", request.has_left)
        elif request.path == "/job":
            waiting.until_ended([1], 300, "", request.has_left)
        over.release()
        return Response(200, b"ok\n")
    server = listen(wait)
    for path in (b"/job", b"/status"):
        client = Wire(server, GET.replace(b"GET /", b"GET " + path))
        assert entered.acquire(timeout=20)
        client.sock.sendall(behind)
        leaves(client, how)
        assert over.acquire(timeout=20)
        if how == "half":
            assert client.answer()[0] == 200
            client.__exit__()


def test_an_answer_to_http_1_0_that_is_cut_short_ends_with_a_reset(listen):
    """Else it looks whole: it ends where the connection does."""
    def pieces():
        yield b"one"
        raise ValueError("no more")
    server = listen(lambda request: Response(200, pieces()))
    with Wire(server, b"GET / HTTP/1.0\r\n\r\n") as client:
        with pytest.raises(ConnectionResetError):
            client.file.read()


@pytest.mark.parametrize("data", [
    b"HEAD / HTTP/1.1\r\n\r\n", b"HEAD /\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost x\r\n\r\n",
    b"\r\nHEAD / HTTP/3.0\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: y\r\n\r\n",
    b"HEAD /" + b"a" * 9000, b"HEAD / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000,
    b"HEAD / HTTP/1.1\nHost: x\n\n"])
def test_a_head_request_gets_no_body_whatever_is_wrong_with_it(listen, data):
    with Wire(listen(), data) as client:
        status, headers, _ = client.answer(body=False)
        assert 400 <= status <= 505 and int(headers[b"content-length"]) > 0
        assert client.closed()


def test_a_head_request_that_finds_no_room_or_comes_too_late_gets_no_body(listen, gate):
    server = listen(gate, connections=1, head_seconds=0.1)
    with Wire(server, b"HEAD / HTTP/1.1\r\n") as late:
        assert late.answer(body=False)[0] == 408 and late.closed()
    with Wire(server, GET):
        assert gate.entered.acquire(timeout=20)
        service = server.server.service_actions
        held, go = threading.Event(), threading.Event()

        def stand_still():              # until the request is there when its connection is seen
            server.server.service_actions = service
            held.set()
            go.wait(20)

        server.server.service_actions = stand_still
        assert held.wait(20)
        with Wire(server, GET.replace(b"GET", b"HEAD")) as client:
            go.set()
            assert client.answer(body=False)[0] == 503 and client.closed()


def test_what_arrived_while_the_server_stood_still_is_not_late(listen):
    server = listen(head_seconds=5.0)
    upload = UPLOAD.replace(b"Content-Length: 9", b"Content-Length: 200000")
    with Wire(server, b"GET / HTTP/1.1\r\n") as head, Wire(server) as body, Wire(server) as idle:
        body.sock.sendall(upload)
        assert body.answer()[0] == 100
        until(lambda: sorted(one.state for one in server.connections) == ["body", "head", "idle"])
        service = server.server.service_actions
        held = threading.Event()
        go = threading.Event()

        def stand_still():
            server.server.service_actions = service
            held.set()
            go.wait(20)
            server.clock.seconds += 60
            service()
        server.server.service_actions = stand_still
        assert held.wait(20)
        head.sock.sendall(b"Host: x\r\n\r\n")
        body.sock.sendall(b"b" * 200_000)
        idle.sock.sendall(GET)
        go.set()
        assert [client.answer()[0] for client in (head, body, idle)] == [200] * 3


def test_bodies_that_are_arriving_take_so_much_together_and_no_more(listen, monkeypatch):
    monkeypatch.setattr("oqc.server.BODIES", 1 << 20)
    server = listen(body=1 << 20)
    part = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n" + b"b" * 400_000
    with Wire(server, part) as first, Wire(server, part) as second:
        until(lambda: sum(len(one.buffer) for one in server.connections) == 800_000)
        with Wire(server) as third:
            third.sock.sendall(part)
            status, headers, _ = third.answer()
            assert (status, headers[b"retry-after"]) == (503, b"1")
        for client in (first, second):
            client.sock.sendall(b"b" * 100_000)
            assert client.answer()[0] == 200
        assert [ask(server, part + b"b" * 100_000)[0] for _ in range(5)] == [200] * 5


def test_tls_on_the_plain_port_is_refused_at_once(listen):
    server = listen(head_seconds=60.0)
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(client, server_hostname="localhost")
    for begin in (b"\x16\x03\x01", b"\x80", b"\0", b"\r\n\x16"):
        assert ask(server, begin)[0] == 400


class OutOfDescriptors(Server):
    """A server that finds no descriptor for its eleventh connection, once."""

    raised = False

    def get_request(self):
        if len(self.connections) == 10 and not self.raised and self.clock.seconds:
            self.raised = True
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().get_request()


def test_without_a_descriptor_several_idle_connections_make_room_at_once(listen):
    server = listen(make=OutOfDescriptors, tick=0.05)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Wire(server)) for _ in range(10)]
        until(lambda: len(server.connections) == 10)
        server.clock.seconds += 2
        new = stack.enter_context(Wire(server, GET))
        assert new.answer()[0] == 200
        assert all(client.closed() for client in idle[:8])
        for client in idle[8:]:
            client.sock.sendall(GET)
            assert client.answer()[0] == 200


def test_clients_that_were_turned_away_leave_no_room_for_another(listen, gate):
    server = listen(gate, connections=2)
    with contextlib.ExitStack() as stack:
        at_work = [stack.enter_context(Wire(server, GET)) for _ in range(2)]
        for _ in at_work:
            assert gate.entered.acquire(timeout=20)
        for _ in range(3):
            status, headers, _ = stack.enter_context(Wire(server, GET)).answer()
            assert (status, headers[b"retry-after"]) == (503, b"1")
        gate.opened.set()
        assert [client.answer()[0] for client in at_work] == [200, 200]


def test_an_incomplete_head_and_an_incomplete_body_make_room_for_a_new_client(listen):
    server = listen(connections=2)
    with Wire(server, b"GET / HT") as head, Wire(server) as body:
        until(lambda: any(one.buffer for one in server.connections))
        body.sock.sendall(UPLOAD)
        assert body.answer()[0] == 100
        server.clock.seconds += 2
        with Wire(server, GET) as first, Wire(server, GET) as second:
            assert first.answer()[0] == second.answer()[0] == 200
            assert head.closed() and body.closed()


@pytest.mark.parametrize("part", [
    b"GET / HTTP/1.1\r\nHost",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"], ids=["head", "body"])
def test_a_head_or_a_body_that_does_not_arrive_in_time_is_answered_408(listen, part):
    with Wire(listen(head_seconds=0.3), part) as client:
        assert client.answer()[0] == 408 and client.closed()


def test_an_idle_connection_is_closed_without_a_word(listen):
    server = listen(idle_seconds=0.3)
    with Wire(server) as new, Wire(server, GET) as kept:
        assert kept.answer()[0] == 200
        assert new.closed() and kept.closed()


def test_a_client_that_says_nothing_but_empty_lines_has_the_time_of_one_head(listen):
    server = listen(head_seconds=0.3)
    stop = threading.Event()
    with Wire(server) as client:
        def chatter():
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    client.sock.sendall(b"\r\n")
        thread = threading.Thread(target=chatter)
        thread.start()
        try:
            assert client.answer()[0] == 408
        finally:
            stop.set()
            thread.join()


def test_an_answer_whose_body_cannot_be_read_to_its_end_is_cut_short(listen, caplog):
    def pieces():
        yield b"one"
        raise ValueError("the rest cannot be read")
    server = listen(lambda request: Response(200, pieces()))
    with Wire(server, GET) as client:
        assert client.answer(body=False)[0] == 200
        assert client.file.read() == b"3\r\none\r\n", "no last chunk, and the connection ends"
    assert "the rest cannot be read" in caplog.text and len(server.lines) == 1


def test_a_client_that_does_not_read_its_answer_is_left(listen):
    server = listen(lambda request: Response(200, b"x" * (32 << 20)), head_seconds=0.2,
                    pace=1 << 30)
    with Wire(server, GET) as client:
        assert gone(server)
        status, headers, _ = client.answer(body=False)
        with contextlib.suppress(ConnectionResetError):
            assert status == 200 and len(client.file.read()) < int(headers[b"content-length"])


def gone(server):
    """True as soon as a connection has come and no connection is left."""
    until(lambda: server.lines and not server.connections)
    return True


def test_what_threads_give_back_at_one_moment_is_answered_although_nothing_else_wakes_the_listener(
        listen):
    """Of two that gave something back at once each left it to the other to wake the listener."""
    together = threading.Barrier(8)

    def handle(_):
        together.wait(20)
        return Response(200, b"ok\n")
    server = listen(handle, tick=60.0)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Wire(server)) for _ in range(together.parties)]
        for _ in range(50):
            for client in clients:
                client.sock.sendall(GET)
            assert [client.answer()[0] for client in clients] == [200] * len(clients)


def test_a_response_that_cannot_be_sent_costs_nobody_else_an_answer(listen, caplog):
    wrong = [Response(999, b"no such status\n")]

    def handle(_):
        return wrong.pop() if wrong else Response(200, b"ok\n")
    one = listen(handle, quick=True)
    with one.held():
        first = Wire(one, GET)
        second = Wire(one, GET)
    with first, second:
        assert first.closed(), "or nothing would ever end it"
        assert second.answer()[0] == ask(one, GET)[0] == 200
    assert "KeyError: 999" in caplog.text


def test_a_body_has_its_time_from_the_head_on_however_it_is_cut(listen):
    one, awaited = listen(), []
    one.api.refuse = awaited.append         # asked when a body begins to be awaited

    def arrived(count):
        return all(len(connection.buffer) == count for connection in one.connections)
    with Wire(one, UPLOAD) as client:
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.file.readline() == b"\r\n"
        deadlines = [connection.deadline for connection in one.connections]
        for count in range(1, 9):
            client.sock.sendall(b"x")
            until(lambda count=count: arrived(count))
        assert [connection.deadline for connection in one.connections] == deadlines
        assert len(awaited) == 1
        client.sock.sendall(b"x")
        assert client.answer()[0] == 200


@contextlib.contextmanager
def no_thread_can_be_started():
    """Have new threads ask for a stack that no address space has room for."""
    before = threading.stack_size(1 << 60)
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
        yield
    finally:
        threading.stack_size(before)


def test_a_request_for_which_there_is_no_thread_is_answered_503_and_costs_no_connection(listen):
    one = listen(tick=60.0)
    with no_thread_can_be_started(), Wire(one) as client:
        for requests in (1, 3):
            client.sock.sendall(requests * GET)
            for _ in range(requests):       # and nothing is awaited between
                status, headers, _ = client.answer()
                assert (status, headers[b"retry-after"]) == (503, b"1")
    assert ask(one, GET)[0] == 200
    assert gone(one), "the descriptors are given back"


def test_a_defect_at_the_first_request_of_a_connection_costs_that_connection_alone(listen, caplog):
    one = listen()
    with one.held():
        one.api.is_quick = lambda _: 1 // 0
        client = Wire(one, GET)     # so that the request is there when the connection is accepted
    with client:
        assert client.closed()
    one.api.is_quick = lambda _: True
    assert ask(one, GET)[0] == 200 and "ZeroDivisionError" in caplog.text


class Unwatchable:
    """A socket with the descriptor of a file, which epoll refuses to watch, as it does sockets
    where the system has no room for more (epoll(7), max_user_watches)."""

    def __init__(self, sock):
        self.sock = sock
        self.file = tempfile.TemporaryFile()

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()
        self.sock.close()


class WatchesAllButOne(Server):
    """A server whose second connection cannot be watched."""

    accepted = 0

    def get_request(self):
        """Accept a connection, of which one is not what it seems."""
        connection, address = super().get_request()
        self.accepted += 1
        if self.accepted == 2:
            connection.sock = Unwatchable(connection.sock)
        return connection, address


def test_a_connection_that_cannot_be_watched_is_closed_and_no_other(listen):
    one = listen(make=WatchesAllButOne)
    with Wire(one, GET) as other:
        assert other.answer()[0] == 200
        with Wire(one) as client:
            assert client.closed()
        other.sock.sendall(GET)
        assert other.answer()[0] == ask(one, GET)[0] == 200


def test_a_defect_of_what_is_written_together_does_not_end_the_listener(listen, caplog):
    broken = [OSError("the disk is away")]

    def together(requests):
        if broken:
            raise broken.pop()
        return [Response(200, b"ok\n") for _ in requests]
    one = listen(together=together)
    with Wire(one, GET) as first:
        assert first.closed()
        assert ask(one, GET)[0] == 200 and "the disk is away" in caplog.text


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_small_adds_are_stored_by_the_listener_only_while_that_costs_no_waiting(listen, busy):
    threads = []

    def together(requests):
        threads.append(threading.current_thread())
        return [Response(200, b"ok\n") for _ in requests]
    one = listen(together=together)
    one.api.would_wait = lambda: busy
    assert ask(one, GET)[0] == 200
    assert (threads[0] is one.thread) is not busy


def test_small_adds_that_come_in_one_round_are_stored_together(listen):
    sizes = []

    def together(requests):
        sizes.append(len(requests))
        return [Response(200, request.path.encode()) for request in requests]
    one = listen(together=together)
    with contextlib.ExitStack() as stack:
        with one.held():
            clients = [stack.enter_context(Wire(one, GET.replace(b"/ ", b"/%d " % number, 1)))
                       for number in range(10)]
        assert [client.answer()[2] for client in clients] == [b"/%d" % number
                                                              for number in range(10)]
    assert sizes == [10]


def test_an_upload_that_goes_on_does_not_make_room_for_others(listen):
    one = listen(connections=2)
    with Wire(one, UPLOAD) as upload:
        assert upload.answer()[0] == 100
        connection, = one.connections
        upload.sock.sendall(b"so")
        until(lambda: len(connection.buffer) == 2)
        with Wire(one) as silent, contextlib.ExitStack() as stack:
            until(lambda: len(one.connections) == 2)
            one.clock.seconds += 2
            upload.sock.sendall(b"me")
            until(lambda: len(connection.buffer) == 4)
            another = stack.enter_context(Wire(one))
            assert silent.closed()
            upload.sock.sendall(b" body")
            assert upload.answer()[0] == 200
            another.sock.sendall(GET)
            assert another.answer()[0] == 200


def answers_each(requests):
    """What is answered with others: each with its path."""
    return [Response(200, request.path.encode()) for request in requests]


@pytest.mark.parametrize("how", [{"quick": True}, {"together": answers_each}],
                         ids=["answered at once", "written first"])
def test_of_many_who_come_at_once_nobody_is_turned_away_who_would_find_room_after_an_answer(
        listen, how):
    """As many as one look of the listener takes, at a server for two."""
    one = listen(connections=2, **how)
    closes = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with contextlib.ExitStack() as stack:
        with one.held():
            clients = [stack.enter_context(Wire(one, closes)) for _ in range(40)]
        assert [client.answer()[0] for client in clients] == [200] * 40


@pytest.mark.parametrize("how", [{"quick": True}, {"together": answers_each}, {}],
                         ids=["at once", "with others", "by the pool"])
def test_requests_that_come_together_are_answered_in_order_and_nothing_is_awaited_between(
        listen, how):
    """On one connection, so that each answer is what lets the next request be handled."""
    server = listen(lambda request: Response(200, request.path.encode()), tick=60.0, **how)
    paths = [b"/%d" % number for number in range(20)]
    requests = [GET.replace(b"/ ", path + b" ", 1) for path in paths]
    with Wire(server, b"".join(requests)) as client:
        assert [client.answer()[2] for _ in paths] == paths


def test_stopping_ends_all_connections_and_lets_those_at_work_be_answered(listen, gate):
    server = listen(gate)
    with contextlib.ExitStack() as stack:
        at_work, silent, head, body = [stack.enter_context(Wire(server, sent)) for sent in (
            GET, b"", b"GET / HT",
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n123")]
        assert gate.entered.acquire(timeout=20)
        until(lambda: len(server.connections) == 4)
        threading.Thread(target=server.server.shutdown, args=(20,)).start()
        for waiting in (silent, head, body):
            with contextlib.suppress(ConnectionResetError):
                assert waiting.closed()
        gate.opened.set()
        status, headers, _ = at_work.answer()
        assert (status, headers[b"connection"]) == (200, b"close") and at_work.closed()
        server.thread.join(20)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=20).close()


def test_stopping_does_not_wait_longer_than_it_should_for_what_is_at_work(listen, gate):
    server = listen(gate)
    with Wire(server, GET) as client:
        assert gate.entered.acquire(timeout=20)
        server.stop()
        with contextlib.suppress(ConnectionResetError):
            assert client.closed()


def test_an_answer_after_the_stop_is_dropped(listen, gate):
    """What a thread still does after the server has stopped must not end in a traceback."""
    server = listen(gate)
    with Wire(server, GET):
        assert gate.entered.acquire(timeout=20)
        workers = set(threading.enumerate()) - {threading.current_thread()}
        server.stop()
        gate.opened.set()
        for thread in workers:
            thread.join(20)
            assert not thread.is_alive()


def test_what_is_read_after_a_refusal_is_capped(listen):
    """Nothing else ends such a client: it goes on sending, and its time is long."""
    server = listen(drain=1 << 20, leave_seconds=60.0)
    with Wire(server, b"no request\r\n\r\n") as client:
        assert client.answer()[0] == 400
        sent = 0
        with pytest.raises(OSError):
            while sent < 64 << 20:
                sent += client.sock.send(bytes(1 << 16))
        assert sent >= 1 << 20 and gone(server)


# The Api, over a store and workers that do what the test says

def small_add(query="", body=b'{"job": "X(1)", "mode": "verbatim"}'):
    return Request("POST", "/jobs/add/", query, {"api_key": b"k"}, body)


def scripted_api(store, waiting=None, **options):
    """An Api over a store that the test scripts, and workers that do nothing."""
    workers = types.SimpleNamespace(
        draining=threading.Event(), queued=lambda: 0, immediate_outcome=lambda _: None, runtimes={},
        take_up=lambda _: None, uptime=lambda: 0, durations=dict, states=dict, ended=dict,
        jobs=dict)
    keys = Keys([Key("lab", "operator", b"k")])
    return Api(types.SimpleNamespace(**store), workers, waiting, keys, lambda: 7, Clock(),
               **options)


JOB = Job(7, "X(1)", "verbatim", "Starting", None, None, None, "T", None, None)


@pytest.mark.parametrize("count, query, small", [(0, "", True), (1, "", False), (1000, "", False),
                                                 (0, "wait=0", False)])
def test_only_a_small_add_is_answered_together_with_others(count, query, small):
    """Anything else may keep the listener, and with it all others, waiting."""
    job = {"job": "X(1)", "mode": "echo"}
    api = scripted_api({})
    body = json.dumps([job] * count or job).encode()
    assert api.is_small_add(small_add(query, body)) is small
    assert api.is_small_add(small_add(query, b" \r\n\t" + body)) is small
    assert not api.is_small_add(small_add()._replace(method="PUT"))


def test_small_adds_are_stored_with_one_call_and_a_wrong_one_harms_no_other():
    calls = []

    def add_together(batches):
        calls.append(len(batches))
        return [StoreError("the disk is away"), Addition([JOB])]
    api = scripted_api({"add_together": add_together})
    wrong = small_add(body=b"{}")
    unknown = small_add()._replace(headers={})
    responses = api.handle_together([wrong, small_add(), unknown, small_add()])
    assert [response.status for response in responses] == [400, 503, 401, 201]
    assert calls == [2]


@pytest.mark.parametrize("handle", [Api.handle, lambda api, add: api.handle_together([add])[0]],
                         ids=["alone", "together"])
def test_jobs_that_could_not_be_stored_are_not_counted_as_waiting(handle):
    store = {"add_together": lambda batches: [StoreError("the disk is away") for _ in batches]}
    api = scripted_api(store, most_waiting=1)
    for _ in range(3):
        assert b"the disk is away" in handle(api, small_add()).body


@pytest.mark.parametrize("error", [UnknownJob(1), StoreError("the disk is away")],
                         ids=["pruned", "unreadable"])
def test_jobs_that_were_added_are_answered_201_whatever_becomes_of_the_wait_for_them(error):
    """With another answer they would be sent again, and run twice."""
    def until_ended(*_):
        raise error
    api = scripted_api({"add_together": lambda _: [Addition([JOB])]},
                       types.SimpleNamespace(until_ended=until_ended))
    response = api.handle(small_add("wait=5"))
    assert (response.status, json.loads(response.body)["id"]) == (201, 7)


@pytest.mark.parametrize("path, query", [("/jobs/list/", "limit=9"), ("/jobs/list/", ""),
                                         ("/status/", ""), ("/metrics/", "")])
def test_of_reads_of_many_rows_only_some_go_on_at_once(path, query):
    """More would keep each other and all others waiting for the interpreter."""
    met, inside, most = threading.Condition(), [], []

    def read(*_, **__):
        with met:
            inside.append(1)
            most.append(len(inside))
            met.notify_all()
            met.wait_for(lambda: len(inside) > HEAVY, 0.1)
            inside.pop()
        if path == "/jobs/list/":
            return []
        return {"waiting": {}, "running": {}, "retrying": {}, "oldest_waiting_seconds": 0,
                "database_bytes": 0}
    api = scripted_api({"page": read, "status": read},
                       types.SimpleNamespace(changes=0, for_change=lambda *_: None))
    answers = []
    request = Request("GET", path, query, {"api_key": b"k"})
    threads = [threading.Thread(target=lambda: answers.append(api.handle(request)))
               for _ in range(2 * HEAVY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [answer.status for answer in answers] == [200] * len(threads) and max(most) == HEAVY


# TLS

@pytest.fixture(name="tls", scope="module")
def a_certificate_of_its_own(tmp_path_factory):
    """The folder of a certificate that signs itself, and its key."""
    path = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-keyout", path / "key", "-out", path / "certificate"],
                   check=True, capture_output=True)
    return path


def shake_hands(server, tls):
    """A socket with TLS to the server."""
    context = ssl.create_default_context(cafile=str(tls / "certificate"))
    context.check_hostname = False
    return context.wrap_socket(socket.create_connection(("127.0.0.1", server.port), timeout=20))


def test_clients_that_never_shake_hands_make_room_for_one_that_does(listen, tls):
    server = listen(tls=tls_context(str(tls / "certificate"), str(tls / "key")), connections=3)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Wire(server)) for _ in range(3)]
        until(lambda: len(server.connections) == 3)
        server.clock.seconds += 2
        for _ in range(2):
            client = stack.enter_context(shake_hands(server, tls))
            client.sendall(GET)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert silent[0].closed() and silent[1].closed()


def test_pipelined_requests_in_one_tls_record_are_all_answered(listen, tls):
    server = listen(tls=tls_context(str(tls / "certificate"), str(tls / "key")))
    with shake_hands(server, tls) as client, client.makefile("rb") as file:
        client.sendall(GET * 300)               # about the 16 KiB that a record holds
        for _ in range(300):
            assert file.readline() == b"HTTP/1.1 200 OK\r\n"
            skip_head(file)
            assert file.readline() == b"ok\n"


def test_an_answer_over_tls_that_does_not_fit_the_socket_arrives_whole(listen, tls):
    body = bytes(range(256)) * (1 << 15)
    server = listen(lambda request: Response(200, body),
                    tls=tls_context(str(tls / "certificate"), str(tls / "key")))
    with shake_hands(server, tls) as client, client.makefile("rb") as file:
        client.sendall(GET + GET)
        for _ in range(2):
            skip_head(file)
            assert file.read(len(body)) == body


def test_plain_http_on_the_tls_port_is_closed_at_once(listen, tls):
    server = listen(tls=tls_context(str(tls / "certificate"), str(tls / "key")), idle_seconds=60.0)
    for data in (GET, b"GET /", b"hello\r\n"):
        with Wire(server, data) as client, contextlib.suppress(ConnectionResetError):
            client.file.read()


def test_the_end_of_tls_is_said_before_the_connection_ends(listen, tls):
    server = listen(tls=tls_context(str(tls / "certificate"), str(tls / "key")), body=1 << 20)
    closes = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    large = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n" + b"b" * 500_000
    for data, status in ((closes, b"200"), (b"no request\r\n\r\n", b"400"), (large, b"413")):
        with shake_hands(server, tls) as client:
            client.suppress_ragged_eofs = False
            client.sendall(data)
            answer = b""
            while True:
                piece = client.recv(65536)      # raises SSLEOFError without a close_notify
                if not piece:
                    break
                answer += piece
            assert answer.split()[1] == status
