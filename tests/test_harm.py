"""What a client, or a proxy that means harm, can say to a server, beside what test_wire.py says:
requests that two parsers could read differently, costly heads, text that would forge a log line or
a cached page."""
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from test_wire import GET, HEAD, Wire, ask, request

PUT_OFF = "import socket; socket.getfqdn = socket.gethostbyaddr = socket.gethostbyname = None; "


def test_a_length_that_begins_with_thousands_of_zeros_is_a_number(server):
    length = b"Content-Length: " + b"0" * 5000
    for digits, body in ((b"", b""), (b"1", b"x")):
        first = request(b"GET /health/ HTTP/1.1", length + digits) + body
        with Wire(server, first + GET) as client:
            assert [client.answer()[0], client.answer()[0]] == [200, 200]
    assert ask(server, request(b"POST /jobs/add/ HTTP/1.1", length + b"1" * 30))[0] == 413
    assert "Traceback" not in server.log


def test_blanks_in_a_header_line_cost_no_more_than_other_bytes():
    """Seen with 30 KB of blanks before a NUL, which took the thread that reads all connections 4
    seconds."""
    program = ("from oqc import messages, wire\n"
               "n = 1_000_000\n"
               "begin = b'GET / HTTP/1.1\\r\\nHost: localhost\\r\\nA: '\n"
               "for blanks in (b' ' * n, b'b' + b' ' * n, b'b ' * n):\n"
               "    try:\n"
               "        wire.parse_head(begin + blanks + b'\\0')\n"
               "    except messages.Problem:\n"
               "        pass")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=30)


@pytest.mark.parametrize("path", [b"/", b""])
def test_the_host_of_an_absolute_target_counts_and_not_the_host_header(serve, path):
    """Else a cache in front, which goes by the target, would hold a page with addresses of somebody
    else's choice."""
    server = serve(environment={"OQC_API_KEY": "secret"})
    target = b"http://good.example:81" + path
    status, _, body = ask(server, b"GET " + target + b" HTTP/1.1\r\nHost: evil\r\n\r\n")
    assert status == 200 and b"http://good.example:81/" in body and b"evil" not in body


@pytest.mark.parametrize("target, status", [
    (b"http://localhost//jobs/list/", 404), (b"http://localhost/../jobs/list/", 404),
    (b"http://localhost?/jobs/list/", 200), (b"http:///jobs/list/", 400),
    (b"http://user@localhost/jobs/list/", 400), (b"http://localhost\\/jobs/list/", 400),
    (b"ftp://x/jobs/list/", 400), (b"http:/jobs/list/", 400), (b"x:80", 400)])
def test_an_absolute_target_leads_to_its_own_path_only(server, target, status):
    found, headers, body = ask(server, request(b"GET " + target + b" HTTP/1.1"))
    assert found == status and not body.startswith(b"[")
    assert status == 404 or headers.get(b"connection") == (b"close" if status == 400 else None)


def test_an_absolute_target_needs_a_host_header_all_the_same(server):
    assert ask(server, b"GET http://localhost/health/ HTTP/1.1\r\n\r\n")[0] == 400
    assert ask(server, b"GET http://localhost/health/ HTTP/1.1\r\nHost: a b\r\n\r\n")[0] == 400
    assert ask(server, b"GET http://localhost/health/ HTTP/1.0\r\n\r\n")[0] == 200


def test_options_of_the_server_itself_is_answered(server):
    with Wire(server, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET) as client:
        status, headers, _ = client.answer()
        assert (status, headers[b"allow"]) == (204, b"OPTIONS")
        assert client.answer()[0] == 200


@pytest.mark.parametrize("line", [
    b"GET / HTTP/1.1", b"DELETE /jobs/9999/ HTTP/1.1", b"OPTIONS / HTTP/1.1"])
def test_only_a_post_can_have_a_large_body(server, line):
    """Else whoever has no key could have the server hold --max-body for each connection."""
    with Wire(server, request(line, b"Content-Length: 65537")) as client:
        assert client.answer()[0] == 413
    with Wire(server, request(line, b"Content-Length: 65536") + b" " * 65536 + GET) as client:
        assert client.answer()[0] in (200, 204, 404)
        assert client.answer()[0] == 200, "the body of the first is no request"


def test_a_refusal_of_a_head_request_has_no_body_either(server):
    with Wire(server, request(b"HEAD /nothing HTTP/1.1", b"Content-Length: 1")) as client:
        status, headers, _ = client.answer(body=False)
        assert status == 404 and int(headers[b"content-length"]) > 0
        assert client.closed()


def test_after_a_refusal_neither_the_rest_of_a_body_nor_what_follows_is_a_request(server):
    before = server.add()["id"]
    add = b'{"job": "X(1)", "mode": "echo"}'
    smuggled = request(b"POST /jobs/add/ HTTP/1.1", b"Content-Length: %d" % len(add)) + add
    for fields in ([b"Content-Length: 4", b"Transfer-Encoding: chunked"],
                   [b"Content-Length: 4", b"Content-Length: 5"],
                   [b"Transfer-Encoding: chunked"],
                   [b"Content-Length: 0,0"],
                   [b"Transfer-Encoding : chunked"],
                   [b"Transfer-Encoding: x", b"transfer-encoding: chunked"],
                   [b"Content-Length: 0", b" 31"]):
        refused = request(b"POST /jobs/add/ HTTP/1.1", *fields) + b"0\r\n\r\n"
        with Wire(server, refused + smuggled) as client:
            assert client.answer()[0] in (400, 411), fields
            client.sock.shutdown(socket.SHUT_WR)
            assert client.closed()
    assert server.add()["id"] == before + 1


def test_a_body_that_looks_like_a_request_is_a_body(server):
    before = server.add()["id"]
    add = b'{"job": "X(1)", "mode": "echo"}'
    smuggled = request(b"POST /jobs/add/ HTTP/1.1", b"Content-Length: %d" % len(add)) + add
    for line in (b"GET /health/ HTTP/1.1", b"POST /jobs/add/ HTTP/1.1", b"HEAD /health/ HTTP/1.1"):
        with Wire(server, request(line, b"Content-Length: %d" % len(smuggled), b"Connection: close")
                  + smuggled) as client:
            assert client.answer(body=not line.startswith(b"HEAD"))[0] in (200, 400)
            assert client.closed()
    assert server.add()["id"] == before + 1


def test_headers_that_only_look_like_those_that_frame_a_request_frame_none(server):
    data = request(b"GET /health/ HTTP/1.1", b"Content_Length: 99", b"X-Transfer-Encoding: chunked",
                   b"Content-Length-: 99", b"Upgrade: h2c", b"Connection: Upgrade")
    with Wire(server, data + GET) as client:
        assert [client.answer()[0], client.answer()[0]] == [200, 200]


def test_requests_that_arrive_byte_by_byte_are_the_same_requests(server):
    body = b'{"job": "X(1)", "mode": "nothing"}'
    data = (b"\r\n" + request(b"GET /health/ HTTP/1.1")
            + request(b"HEAD /nothing HTTP/1.0", b"Connection: keep-alive")
            + request(b"POST /jobs/add/ HTTP/1.1", b"Content-Length: %d" % len(body)) + body
            + request(b"OPTIONS /jobs/add/ HTTP/1.1") + b"BREW")
    with Wire(server) as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(len(data)):
            client.sock.sendall(data[place:place + 1])
        client.sock.sendall(b" / HTTP/1.1\r\n\r\n")
        for status in (200, 404, 400, 204, 501):
            assert client.answer(body=status != 404 or None)[0] == status
        assert client.closed()


def test_405_says_what_is_allowed_and_the_connection_goes_on(server):
    refused = request(b"PATCH /jobs/1/ HTTP/1.1") + request(b"TRACE / HTTP/1.1")
    with Wire(server, refused + GET) as client:
        for allowed in (b"DELETE, GET, HEAD, OPTIONS", b"GET, HEAD, OPTIONS"):
            status, headers, _ = client.answer()
            assert (status, headers[b"allow"]) == (405, allowed)
        assert client.answer()[0] == 200


def test_a_client_whose_body_is_refused_is_not_told_to_continue(server):
    fields = (b"Content-Length: 31", b"Expect: 100-continue")
    for line, head, status in (
            (b"POST /jobs/add/ HTTP/1.1", b"Host: localhost\r\n", 401),
            (b"POST /x HTTP/1.1", HEAD, 404),
            (b"PUT /jobs/add/ HTTP/1.1", HEAD, 405),
            (b"POST /jobs/add/ HTTP/1.1", HEAD + b"Content-Length: 31\r\n", 400)):
        with Wire(server, request(line, *fields, head=head)) as client:
            found, headers, _ = client.answer()
            assert (found, headers[b"connection"]) == (status, b"close") and client.closed()


def test_a_server_starts_where_no_name_can_be_resolved(serve):
    program = PUT_OFF + ("import runpy, sys; sys.argv[0] = 'oqc'; "
                         "runpy.run_module('oqc', run_name='__main__')")
    assert ask(serve(command=(sys.executable, "-c", program)), GET)[0] == 200


def test_text_from_outside_is_not_raw_in_any_line_of_the_log(serve, script):
    """Neither from a request's body nor from a runtime: a terminal would act on it, and a line
    could be forged."""
    says = script(r"printf 'here \033[2J\233 \302\205 \342\200\256over' >&2; exit 3")
    server = serve("--runtime", f"q={says}")
    reason = "there\r2026-01-01 forged\u2028\u0085\x1b[31m\u202e\\ é"
    assert server.request("POST", "/runtimes/echo/pause/", {"reason": reason}).status == 200
    server.wait(server.add(mode="verbatim"))
    said = server.line("is paused: there") + server.line("job 1 failed")
    assert said.isprintable() and "over" in said
    assert r"there\r2026-01-01 forged\u2028\x85\x1b[31m\u202e\ é" in said
