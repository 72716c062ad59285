"""What comes over the wire, byte by byte: a strict parser, limits, many and slow clients, fuzz."""
import contextlib
import json
import os
import random
import resource
import select
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from conftest import KEY, PROGRAM, ROOT, until

from oqc import wire

HEAD = b"Host: localhost\r\napi_key: " + KEY.encode() + b"\r\n"
GET = b"GET /jobs/list/?limit=1 HTTP/1.1\r\n" + HEAD + b"\r\n"
QUICK = b"GET /jobs/1/ HTTP/1.1\r\n" + HEAD + b"\r\n"


class Wire:
    """A raw connection."""

    def __init__(self, server, data=b""):
        self.sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self.file = self.sock.makefile("rb")
        self.sock.sendall(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.sock.close()

    def answer(self, body=True):
        """(status, headers, body) of the next answer; status 0 when the connection ends instead."""
        line = self.file.readline()
        if not line:
            return 0, {}, b""
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while True:
            name, _, value = self.file.readline().partition(b":")
            if not value:
                break
            headers[name.lower()] = value.strip()
        length = int(headers.get(b"content-length", 0)) if body else 0
        return int(line.split()[1]), headers, self.file.read(length)

    def closed(self):
        """Whether the server ends the connection, with nothing more on it."""
        return self.file.read() == b""


def skip_head(file):
    """Read what is left of a head, to its empty line."""
    for line in file:
        if line == b"\r\n":
            return
    pytest.fail("the connection ended in the middle of a head")


def ask(server, data):
    with Wire(server, data) as client:
        return client.answer()


def request(line, *fields, head=HEAD):
    return line + b"\r\n" + head + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def get(path, *fields, head=HEAD):
    return request(b"GET %b HTTP/1.1" % path, *fields, head=head)


def post(path, *fields, body=None, head=HEAD):
    """The head of a POST, and all of it if there is a body."""
    if body is not None:
        fields = (b"Content-Length: %d" % len(body), *fields)
    return request(b"POST %b HTTP/1.1" % path, *fields, head=head) + (body or b"")


def add(*fields):
    """The head of a request that adds a job."""
    return post(b"/jobs/add/", *fields)


MALFORMED = {
    "a bare LF in the head": (b"GET / HTTP/1.1\nHost: localhost\r\n\r\n", 400),
    "bare LFs throughout": (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
    "a bare CR in the head": (get(b"/", b"A: b\rc"), 400),
    "a space before the colon": (get(b"/", b"A : b"), 400),
    "a folded line": (get(b"/", b"A: b", b" c"), 400),
    "a folded first line": (b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n", 400),
    "two content lengths": (add(b"Content-Length: 1", b"Content-Length: 1"), 400),
    "a list of content lengths": (add(b"Content-Length: 1, 1"), 400),
    "a signed length": (add(b"Content-Length: +1"), 400),
    "a negative length": (add(b"Content-Length: -1"), 400),
    "a length with a blank line in it": (add(b"Content-Length: 1_0"), 400),
    "an Arabic length": (add("Content-Length: ٣".encode()), 400),
    "a hexadecimal length": (add(b"Content-Length: 0x1"), 400),
    "an empty length": (add(b"Content-Length:"), 400),
    "a length and an encoding": (add(b"Content-Length: 1", b"Transfer-Encoding: chunked"), 400),
    "an encoding alone": (add(b"Transfer-Encoding: chunked"), 411),
    "a name that is no token": (get(b"/", b"A(b): c"), 400),
    "a name that is not ASCII": (get(b"/", b"\xc3\xa4: c"), 400),
    "no name": (get(b"/", b": c"), 400),
    "no colon": (get(b"/", b"abc"), 400),
    "NUL in a value": (get(b"/", b"A: b\0c"), 400),
    "ESC in a value": (get(b"/", b"A: \x1b[31m"), 400),
    "DEL in a value": (get(b"/", b"A: \x7f"), 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get(b"/", b"Host: y"), 400),
    "two hosts under 1.0": (request(b"GET / HTTP/1.0", b"Host: y"), 400),
    "a host that is none": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "two words": (b"GET /\r\nHost: localhost\r\n\r\n", 400),
    "four words": (b"GET / / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a tab": (b"GET\t/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "NBSP": (b"GET\xa0/\xa0HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a target that is no path": (b"GET jobs HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "an asterisk for GET": (b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a method in lower case": (b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "an unknown method": (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "HTTP/2": (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP in lower case": (b"GET / http/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a version of two digits": (b"GET / HTTP/1.10\r\nHost: localhost\r\n\r\n", 400),
    "a line that is too long": (
        b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "a line that never ends": (b"GET /" + b"a" * 9000, 414),
    "a head that is too long": (
        get(b"/", *[b"A%d: " % number + b"b" * 4000 for number in range(9)]), 431),
    "too many lines": (get(b"/", *[b"A%d: b" % number for number in range(99)]), 431),
    "a body that is too large": (add(b"Content-Length: 4194305"), 413),
    "a length of 30 digits": (add(b"Content-Length: " + b"9" * 30), 413),
    "an unknown expectation": (add(b"Content-Length: 1", b"Expect: miracles"), 417),
}


@pytest.mark.parametrize("data, status", MALFORMED.values(), ids=list(MALFORMED))
def test_what_is_malformed_is_refused_and_the_connection_closed(server, data, status):
    with Wire(server, data + GET) as client:        # what follows must not be run as a request
        found, headers, body = client.answer()
        assert (found, headers[b"connection"]) == (status, b"close"), body
        assert headers[b"content-type"] == b"application/problem+json"
        client.sock.shutdown(socket.SHUT_WR)
        assert client.closed()


@pytest.mark.parametrize("data", [
    GET, b"\r\n" + GET, request(b"GET /jobs/list/?limit=1 HTTP/1.0", head=HEAD[17:]),
    get(b"http://127.9.9.9:80/jobs/list/?limit=1"), get(b"/jobs/list?limit=1"),
    get(b"/jobs/list/?limit=1", b"A:", b"B:\tc\t ", b"C: \xe4\xff"),
    get(b"/jobs/list/?limit=1", *[b"A%d: b" % number for number in range(98)])])
def test_what_is_well_formed_is_answered(server, data):
    assert ask(server, data)[0] == 200


def test_options_of_the_server_itself_and_of_a_path(server):
    assert ask(server, request(b"OPTIONS * HTTP/1.1"))[0] in (204, 404)
    assert ask(server, request(b"OPTIONS /jobs/add/ HTTP/1.1"))[1][b"allow"] == b"OPTIONS, POST"


@pytest.mark.parametrize("path", [
    b"/jobs/%6cist/", b"/%6aobs/list/", b"/jobs/../jobs/list/", b"/jobs/./list/", b"//jobs/list/",
    b"/jobs/list/%00", b"/jobs//list/", b"/jobs/list/..", b"/jobs/1%2f"])
def test_a_path_written_another_way_is_never_another_route(server, path):
    assert ask(server, get(path))[0] == 404


def test_pipelined_requests_are_answered_in_order_also_with_a_refusal_among_them(server):
    first = server.wait(server.add())["id"]
    body = b'{"job": "X(1)", "mode": "echo"}'
    data = (get(b"/jobs/%d/" % first) + post(b"/jobs/add/", body=body)
            + get(b"/nothing") + get(b"/jobs/%d/?wait=20" % (first + 1))
            + request(b"BREW / HTTP/1.1") + GET)
    with Wire(server, data) as client:
        assert [client.answer()[0] for _ in range(6)] == [200, 201, 404, 200, 501, 0]


def test_requests_on_one_connection_go_on_until_the_client_asks_to_close(server):
    with Wire(server, GET) as client:
        for _ in range(3):
            assert client.answer()[0] == 200
            client.sock.sendall(GET)
        assert client.answer()[0] == 200
        client.sock.sendall(get(b"/jobs/list/?limit=1", b"Connection: close"))
        assert client.answer()[1][b"connection"] == b"close" and client.closed()


@pytest.mark.parametrize("field", [
    b"Connection: keep-alive, close", b"Connection: close, keep-alive", b"Connection: Close",
    b"CONNECTION: Keep-Alive,CLOSE", b"Connection: keep-alive\r\nConnection: close"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_close_among_what_a_client_says_of_its_connection_closes_it(server, version, field):
    """RFC 9112, section 9.3: it wins, wherever it stands in the list, however it is spelled."""
    with Wire(server, request(b"GET /health/ HTTP/%b" % version, field)) as client:
        status, headers, _ = client.answer()
        assert (status, headers[b"connection"]) == (200, b"close") and client.closed()


@pytest.mark.parametrize("field, keeps", [(b"", False), (b"Connection: keep-alive\r\n", True)])
def test_a_client_of_http_1_0_keeps_its_connection_only_if_it_asks(server, field, keeps):
    with Wire(server, b"GET /health/ HTTP/1.0\r\n" + field + b"\r\n") as client:
        assert client.answer()[1][b"connection"] == (b"keep-alive" if keeps else b"close")
        assert keeps or client.closed()


def test_head_is_answered_without_a_body_and_the_connection_goes_on(server):
    with Wire(server, request(b"HEAD /jobs/list/ HTTP/1.1") + GET) as client:
        assert client.answer(body=False)[0] == 200
        assert client.answer()[0] == 200


def test_a_client_that_expects_is_told_to_continue_only_if_its_body_will_be_read(server):
    fields = (b"Content-Length: 31", b"Expect: 100-continue")
    with Wire(server, add(*fields)) as client:
        assert client.answer() == (100, {}, b"")
        client.sock.sendall(b'{"job": "X(1)", "mode": "echo"}')
        assert client.answer()[0] == 201
    for line, head, status in ((b"POST /jobs/add/ HTTP/1.1", b"Host: localhost\r\n", 401),
                               (b"POST /x HTTP/1.1", HEAD, 404),
                               (b"PUT /jobs/add/ HTTP/1.1", HEAD, 405)):
        with Wire(server, request(line, *fields, head=head)) as client:
            assert client.answer()[0] == status


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_a_client_that_sends_ten_megabytes_sees_why_they_are_refused(server, key):
    for _ in range(5):
        answer = server.request("POST", "/jobs/add/", b" " * (10 << 20), key=key)
        assert answer.status == 413


def test_a_wrong_key_with_a_large_body_is_seen_as_such(server):
    assert server.request("POST", "/jobs/add/", b" " * (3 << 20), key="wrong").status == 401


def test_a_body_in_many_pieces_is_put_together(server):
    text = ", ".join(["X(90)"] * 50_000)
    body = b'{"job": "%s", "mode": "echo"}' % text.encode()
    with Wire(server, add(b"Content-Length: %d" % len(body))) as client:
        for begin in range(0, len(body), 7777):
            client.sock.sendall(body[begin:begin + 7777])
        status, _, answer = client.answer()
        assert status == 201 and text.encode() in answer


def test_what_came_from_outside_is_neither_in_a_header_nor_raw_in_the_log(serve):
    server = serve()
    ask(server, request(b'GET /"forged\\"/ HTTP/1.1'))
    ask(server, get(b"/%0d%0aX-A:%20b"))
    with Wire(server, get(b"/", b"A: \x1b[31m")) as client:
        client.answer()
    assert r'"GET /\"forged\\\"/" 404' in server.line("forged")
    assert "\x1b" not in server.log and server.line("%0d%0a")


# Slow and many

def test_at_the_cap_the_connection_that_waited_longest_makes_room(serve):
    server = serve("--max-connections", "3")
    clients = []        # the listener itself answers what they ask, and then knows them as idle
    for _ in range(3):  # one after the other, so that it is known who waits longest
        clients.append(Wire(server, QUICK))
        assert clients[-1].answer()[0] == 404
    clients[0].sock.sendall(QUICK)
    assert clients[0].answer()[0] == 404            # now the second one has waited longest
    assert ask(server, QUICK)[0] == 503             # but all of them a moment ago
    until(lambda: ask(server, QUICK)[0] == 404)
    assert clients[1].closed()
    clients[2].sock.sendall(QUICK)
    assert clients[2].answer()[0] == 404
    for client in clients:
        client.__exit__()


def test_at_the_cap_with_every_one_at_work_a_new_one_gets_503_at_once(serve, script, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    runtime = script(f"trap '' TERM; touch started; read -r go <{gate}; exit 75")
    server = serve("--max-connections", "2", "--kill-grace", "60", "--runtime", f"q={runtime}")
    job = server.add(mode="verbatim")["id"]
    until((tmp_path / "started").exists)
    with Wire(server, get(b"/jobs/%d/?wait=60" % job)) as waits:
        with Wire(server, request(b"DELETE /jobs/%d/ HTTP/1.1" % job)) as cancels:
            # Connections are accepted in their order: both have theirs.
            status, headers, _ = ask(server, GET)
            assert (status, headers[b"retry-after"]) == (503, b"1")
            assert headers[b"connection"] == b"close"
            gate.write_text("go\n", encoding="ascii")
            assert cancels.answer()[0] == 200 and waits.answer()[0] == 200


def test_requests_that_wait_give_their_places_back(serve, script, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    runtime = script(f"read -r go <{gate}")
    server = serve("--max-connections", "4", "--runtime", f"q={runtime}")      # two may wait
    job = server.add(mode="verbatim")["id"]     # a change, for which none has to wait
    with Wire(server) as client:
        for _ in range(300):
            client.sock.sendall(get(b"/status/?since=0&wait=5"))
            assert client.answer()[0] == 200
        client.sock.sendall(get(b"/jobs/%d/?wait=60" % job))
        answered, _, _ = select.select([client.sock], [], [], 0.2)
        assert not answered, "who finds no place is answered at once"
        gate.write_text("go\n", encoding="ascii")
        status, headers, body = client.answer()
    assert status == 200 and json.loads(body)["end_time"] and b"retry-after" not in headers


def test_two_hundred_clients_at_once_are_all_answered(server):
    clients = [Wire(server) for _ in range(200)]
    for client in clients:
        client.sock.sendall(GET)
    assert [client.answer()[0] for client in clients] == [200] * 200
    for client in clients:
        client.__exit__()


def cpu_seconds(pid):
    """Seconds of processor time that a process has taken."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_without_a_descriptor_to_be_had_the_server_neither_spins_nor_fails(serve):
    limited = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)); "
               "sys.argv[0] = 'oqc'; runpy.run_module('oqc', run_name='__main__', alter_sys=True)")
    server = serve(command=(sys.executable, "-c", limited))
    server.line(" connections at most, not 512: too few descriptors")
    clients = [Wire(server) for _ in range(80)]
    server.line("no connection can be accepted")
    before = cpu_seconds(server.process.pid)
    time.sleep(1)                   # the time is what is measured here
    assert cpu_seconds(server.process.pid) - before < 0.5
    for client in clients:
        client.__exit__()
    assert ask(server, GET)[0] == 200


def test_the_descriptors_of_the_slots_are_no_connections(serve):
    limited = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, "
               "(200, 200)); sys.argv[0] = 'oqc'; "
               "runpy.run_module('oqc', run_name='__main__', alter_sys=True)")
    server = serve(command=(sys.executable, "-c", limited))
    server.line(" 150 connections at most, not 512: too few descriptors")    # of 200: 3 slots


def trickle(clients, stop):
    """Send a byte on each connection every second until told to stop."""
    place = 0
    while not stop.wait(1):
        place += 1
        for client in clients:
            with contextlib.suppress(OSError):
                client.sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n"[place % 20:][:1])


@pytest.mark.slow
def test_five_hundred_clients_that_trickle_delay_nobody_and_cost_no_memory(serve):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    server = serve()
    before = memory(server.process.pid)
    clients = [Wire(server, b"G") for _ in range(500)]
    stop = threading.Event()
    thread = threading.Thread(target=trickle, args=(clients, stop))
    thread.start()
    slowest = 0.0
    for _ in range(60):
        begin = time.monotonic()
        assert ask(server, GET)[0] == 200
        slowest = max(slowest, time.monotonic() - begin)
        time.sleep(0.1)
    stop.set()
    thread.join()
    for client in clients:
        client.__exit__()
    after = memory(server.process.pid)
    print(f"500 connections, slowest answer {slowest * 1000:.0f} ms, "
          f"memory {before:.1f} -> {after:.1f} MiB")
    assert slowest < 1 and after - before < 8


def memory(pid):
    """MiB of resident memory."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        resident = next(line for line in file if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024


# TLS

@pytest.fixture(name="certificate", scope="module")
def a_certificate_for_localhost(tmp_path_factory):
    """The path of a PEM file with a certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    path = folder / "both.pem"
    key = folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", key, "-out", path], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return str(path)


def test_https_serves_whom_it_should_while_a_silent_client_and_a_plain_one_hold_on(
        serve, certificate):
    server = serve("--tls-cert", certificate)
    assert "https://" in server.line("listening on")
    context = ssl.create_default_context(cafile=certificate)
    with Wire(server) as silent, Wire(server, GET) as plain:
        with contextlib.suppress(ConnectionResetError):     # its request was not read
            assert plain.closed()
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        with context.wrap_socket(raw, server_hostname="localhost") as client:
            assert client.version() in ("TLSv1.2", "TLSv1.3")
            for _ in range(2):
                client.sendall(GET)
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            body = b'{"job": "%s", "mode": "echo"}' % b", ".join([b"X(90)"] * 50_000)
            client.sendall(post(b"/jobs/add/", body=body))
            assert client.recv(65536).startswith(b"HTTP/1.1 201 ")
        silent.sock.sendall(b"x")
    assert "Traceback" not in server.log


def test_a_key_with_a_pass_phrase_is_one_line_and_asks_nobody(certificate, tmp_path):
    subprocess.run(["openssl", "pkey", "-in", certificate, "-aes256", "-passout", "pass:secret",
                    "-out", tmp_path / "key.pem"], check=True, capture_output=True)
    ended = subprocess.run(
        [*PROGRAM, "--port", "0", "--tls-cert", certificate, "--tls-key", "key.pem"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr == (
        f"oqc: {certificate}, key.pem: the key has a pass phrase; "
        "openssl pkey -in KEY -out PLAIN takes it off\n")


def test_tls_1_1_is_refused(serve, certificate):
    server = serve("--tls-cert", certificate)
    ended = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}",
                            "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
                           input=b"", capture_output=True, check=False, timeout=20)
    assert ended.returncode != 0


# The log

def test_an_access_line_has_time_peer_key_request_status_bytes_and_milliseconds(server):
    job = server.wait(server.add())
    server.result(job)
    line = server.line(f'"GET /jobs/{job["id"]}/result/" 2')
    begin, name, _, _, numbers = line.split('"')
    _, kind, peer = begin.split()
    assert (kind, name) == ("access", "documented") and peer.startswith("127.0.0.1:")
    assert [float(number) > 0 for number in numbers.split()] == [True] * 3


def test_with_journald_lines_begin_with_their_priority(serve):
    server = serve(environment={"JOURNAL_STREAM": "8:1"}, wait=True)
    assert server.line("listening on").startswith("<6>listening on")
    assert server.line("verbatim jobs go").startswith("<4>")
    server.request("GET", "/health/")
    assert server.line("GET /health/").startswith("<6>127.0.0.1:")


def test_the_log_level_leaves_out_what_is_less_severe(serve):
    server = serve("--log-level", "info")
    port = server.port
    assert server.stop() == 0
    quiet = serve("--log-level", "error", "--port", str(port), wait=False)
    quiet.port = port

    def answers():
        with contextlib.suppress(OSError):
            return quiet.request("GET", "/health/").status == 200
    until(answers)
    assert quiet.stop() == 0 and quiet.lines == []


def connected(port):
    """A connection to a server that may not listen yet."""
    connections = []

    def connect():
        with contextlib.suppress(ConnectionRefusedError):
            connections.append(socket.create_connection(("127.0.0.1", port), timeout=20))
        return connections
    until(connect)
    return connections[0]


@pytest.mark.parametrize("how", ["2>&-", "2>/dev/full", "2> >(sleep 60)"])
def test_a_log_that_cannot_be_written_fails_no_request(tmp_path, how):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"exec {sys.executable} -m oqc --port {port} --db jobs.db {how}"
    process = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        with connected(port) as sock, sock.makefile("rb") as file:
            ask_allowed = (b"OPTIONS /health/ HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Length: 0\r\n\r\n")
            sock.sendall(ask_allowed * 1500)
            for _ in range(1500):       # more than a pipe that nobody reads can hold
                assert file.readline() == b"HTTP/1.1 204 No Content\r\n"
                skip_head(file)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)       # also who does not read the log
        process.wait()


# Fuzz

def mutated(dice):
    """A request with some of its bytes changed, cut out, doubled or swapped."""
    body = b'{"job": "X(90), Y(180)", "mode": "echo", "shots": 3}'
    seeds = [GET, post(b"/jobs/add/", body=body),
             get(b"/jobs/1/", b"Accept: text/plain", b"Connection: keep-alive"),
             get(b"/jobs/list/?limit=5&after=3&order=desc&status=Success"),
             request(b"GET /jobs/1/result/ HTTP/1.0"), request(b"OPTIONS * HTTP/1.1")]
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.randrange(1, 8)):
        place = dice.randrange(len(data))
        kind = dice.randrange(5)
        if kind == 0:
            data[place] = dice.randrange(256)
        elif kind == 1:
            del data[place:place + dice.randrange(1, 12)]
        elif kind == 2:
            data[place:place] = data[place:place + dice.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = dice.choice([b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\xff",
                                             b"%00", b"9" * 30, b"{" * 500])
        else:
            other = dice.randrange(len(data))
            data[place], data[other] = data[other], data[place]
        if not data:
            data = bytearray(b"\r\n")
    return bytes(data)


def fuzz(server, seed, count):
    """Send so many mutated requests and look at every answer."""
    dice = random.Random(seed)
    for number in range(count):
        data = mutated(dice)
        with Wire(server, data) as client:
            client.sock.shutdown(socket.SHUT_WR)
            text = client.file.read()
            for line in text.split(b"\r\n"):
                if line.startswith(b"HTTP/1.1 "):
                    status = line[9:12]
                    assert status < b"500" or status in (b"501", b"505"), (number, data, line)
    assert ask(server, GET)[0] == 200
    assert "Traceback" not in server.log


def test_mutated_requests_get_no_5xx_no_traceback_and_no_hang(serve):
    fuzz(serve(), 1, 500)


@pytest.mark.slow
def test_ten_thousand_mutated_requests_get_no_5xx_no_traceback_and_no_hang(serve):
    fuzz(serve(), 2, 10_000)


# Pure

def test_a_head_is_parsed_once_and_kept():
    head = b"GET /a?b=c HTTP/1.1\r\nHost: localhost\r\nA: 1\r\na: 2"
    parsed = wire.parse_head(head)
    assert (parsed.method, parsed.path, parsed.query) == ("GET", "/a", "b=c")
    assert parsed.headers["a"] == b"1, 2"
    assert wire.parse_head(head) is parsed
