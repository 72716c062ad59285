"""Connections at their limits: who makes room for whom, what is cut short, what stopping does. In this process, with
an Api that does what the test says."""
# pylint: disable=protected-access # what two threads tell the listener at once shows nowhere else
import collections
import contextlib
import json
import socket
import ssl
import subprocess
import threading
import time
import types

import pytest
from test_wire import Wire, ask

from oqc.api import HEAVY, Api, Keys
from oqc.clock import Clock
from oqc.jobs import Addition, Job, StoreError, UnknownJob
from oqc.messages import Request, Response
from oqc.server import TICK, Limits, Server, tls_context

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
NOBODY = object()           # a connection that is closed already


class Scripted:
    """An Api that leaves every request to one function: in a thread, or in the listener if there is a flush."""

    keys = Keys({})

    def __init__(self, handle, flush):
        self.handle = handle
        self.flush = flush or (lambda: None)
        self.is_quick = lambda _: flush is not None

    @staticmethod
    def refuse(_):
        """Nothing is refused."""


class Listening:
    """A server in this process."""

    def __init__(self, handle, flush=None, tick=TICK, tls=None, **limits):  # pylint: disable=too-many-arguments # a server has them
        self.lines = []
        self.server = Server(("127.0.0.1", 0), Scripted(handle, flush), Clock(), limits=Limits(**limits),
                             access=self.lines.append, tls=tls)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(tick,))
        self.thread.start()

    def until(self, condition):
        """Wait until this holds, which nothing announces."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline

    @contextlib.contextmanager
    def held(self):
        """Meanwhile its listener does nothing."""
        held, go = threading.Event(), threading.Event()
        self.server._tell(NOBODY, lambda _: (held.set(), go.wait(20)))
        assert held.wait(20)
        try:
            yield
        finally:
            go.set()

    def stop(self):
        """Stop, twice does no harm."""
        if self.thread.is_alive():
            self.server.stop(0.2)
            self.thread.join()


@pytest.fixture
def listen(monkeypatch):
    """listen(handle, **limits): a server whose requests are all given to handle(request, answer)."""
    monkeypatch.setattr("oqc.server.KEEP_THREAD", 0.05)     # or its threads are still there in other tests
    started = []

    def start(handle=lambda request, answer: answer(Response(200, b"ok\n")), **options):
        started.append(Listening(handle, **options))
        return started[-1]
    yield start
    for one in started:
        one.stop()


class Gate:
    """A handler that keeps every request waiting until it is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, request, answer):
        self.entered.release()
        self.opened.wait(20)
        answer(Response(200, b"ok\n"))


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
        for _ in range(3):
            assert stack.enter_context(Wire(server, GET)).answer()[0] == 200


def test_a_client_that_has_its_answer_is_not_at_work_any_more(listen):
    """A thread of the pool that sent the answer itself would tell the listener too late."""
    server = listen(connections=1)
    tell = server.server._tell
    server.server._tell = lambda *what: (time.sleep(0.1), tell(*what))
    with Wire(server, GET) as first:
        assert first.answer()[0] == 200
        with Wire(server, GET) as second:
            assert second.answer()[0] == 200


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
        server.until(lambda: any(one.buffer for one in list(server.server.connections)))
        body.sock.sendall(UPLOAD)
        assert body.answer()[0] == 100
        with Wire(server, GET) as first, Wire(server, GET) as second:
            assert first.answer()[0] == second.answer()[0] == 200
            assert head.closed() and body.closed()


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
    server = listen(lambda request, answer: answer(Response(200, pieces())))
    with Wire(server, GET) as client:
        assert client.answer(body=False)[0] == 200
        assert client.file.read() == b"3\r\none\r\n", "no last chunk, and the connection ends"
    assert "the rest cannot be read" in caplog.text and len(server.lines) == 1


def test_a_client_that_does_not_read_its_answer_is_left(listen):
    server = listen(lambda request, answer: answer(Response(200, b"x" * (32 << 20))), head_seconds=0.2, pace=1 << 30)
    with Wire(server, GET) as client:
        assert gone(server)
        status, headers, _ = client.answer(body=False)
        with contextlib.suppress(ConnectionResetError):
            assert status == 200 and len(client.file.read()) < int(headers[b"content-length"])


def gone(server):
    """True as soon as a connection has come and no connection is left."""
    # bool(): an empty list that is given back may not be empty any more when it is looked at
    server.until(lambda: bool(server.lines) and not server.server.connections)
    return True


def test_what_one_thread_tells_the_listener_is_done_although_another_tells_it_something_between(listen):
    """The second append came before the first looked whether it was alone: each left it to the other to wake."""
    server = listen().server
    done, second = [threading.Event(), threading.Event()], []

    class Interrupted(collections.deque):
        """After its first append another thread gets its turn."""

        def append(self, x):
            super().append(x)
            if not second:
                second.append(threading.Thread(target=server._tell, args=(NOBODY, lambda _: done[1].set())))
                second[0].start()
                second[0].join()

    server._told = Interrupted()
    server._tell(NOBODY, lambda _: done[0].set())
    assert done[0].wait(20) and done[1].wait(20)


def test_a_defect_in_what_the_listener_is_told_costs_nobody_else_an_answer(listen, caplog):
    one, done = listen(), [threading.Event(), threading.Event()]
    with Wire(one, GET) as client:
        client.answer()
        connection, = one.server.connections
        with one.held():
            one.server._tell(connection, lambda _: 1 // 0)
            one.server._tell(NOBODY, lambda _: done[0].set())
        assert client.closed(), "or nothing would ever end it"
        assert done[0].wait(20)
        one.server._tell(NOBODY, lambda _: done[1].set())
        assert done[1].wait(20) and "ZeroDivisionError" in caplog.text


def test_a_body_has_its_time_from_the_head_on_however_it_is_cut(listen, monkeypatch):
    one, awaited = listen(), []
    monkeypatch.setattr(one.server.api, "refuse", awaited.append)       # asked when a body begins to be awaited

    def arrived(count):
        return all(len(connection.buffer) == count for connection in one.server.connections)
    with Wire(one, UPLOAD) as client:
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n" and client.file.readline() == b"\r\n"
        deadlines = [connection.deadline for connection in one.server.connections]
        for count in range(1, 9):
            client.sock.sendall(b"x")
            one.until(lambda count=count: arrived(count))
        assert [connection.deadline for connection in one.server.connections] == deadlines and len(awaited) == 1
        client.sock.sendall(b"x")
        assert client.answer()[0] == 200


def test_a_request_for_which_there_is_no_thread_is_answered_503_and_costs_no_connection(listen, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")
    one = listen(tick=60.0)
    with monkeypatch.context() as patch, Wire(one) as client:
        patch.setattr(threading.Thread, "start", refuse)
        for requests in (1, 3):
            client.sock.sendall(requests * GET)
            for _ in range(requests):       # and nothing is awaited between
                status, headers, _ = client.answer()
                assert (status, headers[b"retry-after"]) == (503, b"1")
    assert ask(one, GET)[0] == 200
    assert gone(one), "the descriptors are given back"


def test_a_defect_at_the_first_request_of_a_connection_costs_that_connection_alone(listen, caplog):
    one = listen(flush=lambda: None)
    one.server.api.is_quick = lambda _: 1 // 0
    with one.held():
        client = Wire(one, GET)     # so that the request is there when the connection is accepted
    with client:
        assert client.closed()
    one.server.api.is_quick = lambda _: True
    assert ask(one, GET)[0] == 200 and "ZeroDivisionError" in caplog.text


def test_a_connection_that_cannot_be_watched_is_closed_and_no_other(listen, monkeypatch):
    """As where the system has no more room for what epoll watches (epoll(7), max_user_watches)."""
    one = listen()
    register = one.server._selector.register

    def refuse(*_):
        monkeypatch.setattr(one.server._selector, "register", register)
        raise OSError(28, "No space left on device")
    with Wire(one, GET) as other:
        assert other.answer()[0] == 200
        with one.held():
            monkeypatch.setattr(one.server._selector, "register", refuse)
            client = Wire(one)
        with client:
            assert client.closed()
        other.sock.sendall(GET)
        assert other.answer()[0] == ask(one, GET)[0] == 200


def test_a_defect_of_what_is_written_together_does_not_end_the_listener(listen, caplog):
    waiting, broken = [], [True]

    def flush():
        if waiting and broken:
            broken.clear()
            raise OSError("the disk is away")
        while waiting:
            waiting.pop()(Response(200, b"ok\n"))
    one = listen(lambda _, answer: waiting.append(answer), flush=flush)
    with Wire(one, GET) as first:
        one.until(lambda: not broken)
        assert ask(one, GET)[0] == first.answer()[0] == 200 and "the disk is away" in caplog.text


def test_an_upload_that_goes_on_does_not_make_room_for_others(listen):
    one = listen(connections=2)
    with Wire(one, UPLOAD) as upload:
        assert upload.answer()[0] == 100
        connection, = one.server.connections
        upload.sock.sendall(b"so")
        one.until(lambda: len(connection.buffer) == 2)
        with Wire(one) as silent, contextlib.ExitStack() as stack:
            one.until(lambda: len(one.server.connections) == 2)
            upload.sock.sendall(b"me")
            one.until(lambda: len(connection.buffer) == 4)
            another = stack.enter_context(Wire(one))
            assert silent.closed()
            upload.sock.sendall(b" body")
            assert upload.answer()[0] == 200
            another.sock.sendall(GET)
            assert another.answer()[0] == 200


@pytest.mark.parametrize("quick", [True, False], ids=["answered at once", "written first"])
def test_of_many_who_come_at_once_nobody_is_turned_away_who_would_find_room_after_an_answer(listen, quick):
    """As many as one look of the listener takes, at a server for two."""
    waiting = []

    def handle(_, answer):
        waiting.append(answer)
        if quick:
            flush()

    def flush():
        while waiting:
            waiting.pop()(Response(200, b"ok\n"))
    one = listen(handle, flush=flush, connections=2)
    with contextlib.ExitStack() as stack:
        with one.held():
            clients = [stack.enter_context(Wire(one, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")))
                       for _ in range(40)]
        assert [client.answer()[0] for client in clients] == [200] * 40


@pytest.mark.parametrize("written", [False, True], ids=["at once", "with the next flush"])
def test_requests_that_come_together_are_answered_in_order_and_nothing_is_awaited_between(listen, written):
    """On one connection, so that each answer is what lets the next request be handled."""
    came, waiting = [], []

    def handle(request, answer):
        came.append(request.path)
        waiting.append(lambda: answer(Response(200, request.path.encode())))
        if not written:
            waiting.pop()()

    def flush():
        while waiting:
            waiting.pop()()
    server = listen(handle, flush=flush, tick=60.0)
    paths = [f"/{number}" for number in range(20)]
    with Wire(server, b"".join(GET.replace(b"/ ", f"{path} ".encode(), 1) for path in paths)) as client:
        assert [client.answer()[2].decode() for _ in paths] == paths == came


def test_stopping_ends_all_connections_and_lets_those_at_work_be_answered(listen, gate):
    server = listen(gate)
    with Wire(server, GET) as at_work, Wire(server) as silent, Wire(server, b"GET / HT") as head, Wire(
            server, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123") as body:
        assert gate.entered.acquire(timeout=20)
        server.until(lambda: len(server.server.connections) == 4)
        threading.Thread(target=server.server.stop, args=(20,)).start()
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


def test_an_answer_after_the_stop_is_dropped(listen):
    """The store answers what it still writes after the server has stopped: its thread must not end by that."""
    answers = []
    server = listen(lambda request, answer: answers.append(answer))
    with Wire(server, GET):
        server.until(lambda: answers)
        server.stop()
        answers[0](Response(200, b"late\n"))


@pytest.mark.parametrize("count, query, how", [(0, "", "add_soon"), (1, "", "add"), (1000, "", "add"),
                                               (0, "wait=0", "add")])
def test_only_what_the_listener_handles_is_left_to_its_flush(count, query, how):
    """What a thread of the pool leaves to it would lie there until the listener looks by itself."""
    asked, job = [], Job(1, "X(1)", "echo", "Starting", None, None, None, "T", None, None)

    def add(*_):
        asked.append("add")
        return Addition([job])
    store = types.SimpleNamespace(add=add, add_soon=lambda *_: asked.append("add_soon"))
    workers = types.SimpleNamespace(draining=threading.Event(), waiting=lambda: 0, foregone=None,
                                    take_up=lambda _: None)
    api = Api(store, workers, Keys({"me": b"k"}), lambda: 7)
    body = json.dumps([{"job": "X(1)", "mode": "echo"}] * count or {"job": "X(1)", "mode": "echo"}).encode()
    request = Request("POST", "/jobs/add/", query, {"api_key": b"k"}, body)
    answers = []
    assert api.is_quick(request) is (how == "add_soon")
    api.handle(request, answers.append)
    assert asked == [how] and [answer.status for answer in answers] == [201] * (how == "add")


@pytest.mark.parametrize("query", ["", "wait=0"], ids=["by the listener", "in a thread"])
def test_jobs_that_could_not_be_stored_are_not_counted_as_waiting(query):
    def add(*_):
        raise StoreError("the disk is away")
    store = types.SimpleNamespace(add=add, add_soon=lambda *given: given[3](None, StoreError("the disk is away")))
    workers = types.SimpleNamespace(draining=threading.Event(), waiting=lambda: 0, foregone=None)
    api, answers = Api(store, workers, Keys({"me": b"k"}), lambda: 7, most_waiting=1), []
    for _ in range(3):
        api.handle(Request("POST", "/jobs/add/", query, {"api_key": b"k"}, b'{"job": "X(1)", "mode": "verbatim"}'),
                   answers.append)
    assert [b"the disk is away" in answer.body for answer in answers] == [True] * 3


@pytest.mark.parametrize("error", [UnknownJob(1), StoreError("the disk is away")], ids=["pruned", "unreadable"])
def test_jobs_that_were_added_are_answered_201_whatever_becomes_of_the_wait_for_them(error):
    """With another answer they would be sent again, and run twice."""
    def wait(*_):
        raise error
    job = Job(7, "X(1)", "echo", "Starting", None, None, None, "T", None, None)
    workers = types.SimpleNamespace(draining=threading.Event(), waiting=lambda: 0, foregone=None, wait=wait,
                                    take_up=lambda _: None)
    store, answers = types.SimpleNamespace(add=lambda *_: Addition([job])), []
    api = Api(store, workers, Keys({"me": b"k"}), lambda: 7)
    api.handle(Request("POST", "/jobs/add/", "wait=5", {"api_key": b"k"}, b'{"job": "X(1)", "mode": "echo"}'),
               answers.append)
    assert (answers[0].status, json.loads(answers[0].body)["id"]) == (201, 7)


@pytest.mark.parametrize("path, query", [("/jobs/list/", "limit=9"), ("/jobs/list/", ""), ("/status/", ""),
                                         ("/metrics/", "")])
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
        return [] if path == "/jobs/list/" else {
            "waiting": {}, "running": {}, "retrying": {}, "oldest_waiting_seconds": 0, "database_bytes": 0}
    workers = types.SimpleNamespace(changes=0, wait_for_change=lambda *_: None, runtimes={}, uptime=lambda: 0,
                                    durations=dict, states=dict)
    api, answers = Api(types.SimpleNamespace(page=read, status=read), workers, Keys({"me": b"k"}), lambda: 7), []
    threads = [threading.Thread(target=api.handle, args=(
        Request("GET", path, query, {"api_key": b"k"}), answers.append)) for _ in range(2 * HEAVY)]
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
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-keyout", path / "key", "-out", path / "certificate"],
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
        server.until(lambda: len(server.server.connections) == 3)
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
            while file.readline() != b"\r\n":
                pass
            assert file.readline() == b"ok\n"


def test_an_answer_over_tls_that_does_not_fit_the_socket_arrives_whole(listen, tls):
    body = bytes(range(256)) * (1 << 15)
    server = listen(lambda request, answer: answer(Response(200, body)),
                    tls=tls_context(str(tls / "certificate"), str(tls / "key")))
    with shake_hands(server, tls) as client, client.makefile("rb") as file:
        client.sendall(GET + GET)
        for _ in range(2):
            while file.readline() != b"\r\n":
                pass
            assert file.read(len(body)) == body
