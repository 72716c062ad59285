"""The HTTP of a client, as a Python program uses it: what it returns, and what it raises."""
import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import KEY, ROOT

from oqc import client
from oqc.config import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Nothing of oqc in the environment."""
    for name in list(os.environ):
        if name.startswith("OQC_"):
            monkeypatch.delenv(name)


def url(port):
    """The address of a server on this port."""
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def far(server):
    """A client of the shared server."""
    connected = client.connect(url(server.port))
    yield connected
    connected.connection.close()


def add(far, **members):
    """Add an echo; its id."""
    body = json.dumps({"job": "X(90)", "mode": "echo", **members}).encode()
    return json.loads(far.ask("POST", "/jobs/add/", body))["id"]


def test_a_job_is_added_waited_for_and_read_on_one_connection(far):
    number = add(far, return_code=3)
    connection = far.connection.sock
    assert far.ended_job(number, far.deadline(20))["return_code"] == 3
    assert far.ask("GET", f"/jobs/{number}/result/", text=True).endswith(b"\n")
    assert far.connection.sock is connection


def test_a_request_that_comes_twice_counts_once(far):
    body = b'{"job": "X(90)", "mode": "echo"}'
    first, second = (json.loads(far.ask("POST", "/jobs/add/", body, idempotency_key="twice"))
                     for _ in range(2))
    assert first["id"] == second["id"]


def test_a_listing_comes_in_pieces_and_is_the_same_as_whole(far):
    body = json.dumps([{"job": "X(90)", "mode": "echo"}] * 1000).encode()
    last = json.loads(far.ask("POST", "/jobs/add/", body))[-1]["id"]
    assert far.ended_job(last, far.deadline(20))
    pieces = list(far.stream("GET", "/jobs/list/"))
    assert len(pieces) > 1
    assert b"".join(pieces) == far.ask("GET", "/jobs/list/")


def test_a_refusal_says_why_and_that_waiting_does_not_help(far):
    for path, reason in (("/jobs/999999/", "no job has the id 999999"),
                         ("/jobs/list/?limit=0", "limit: expected a whole number")):
        with pytest.raises(client.Failed, match=reason) as refused:
            far.ask("GET", path)
        assert (refused.value.passing, refused.value.sent) == (False, False)


def test_a_key_that_is_not_known_is_an_error_of_its_own(server, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"alice:wrong\n")
    wrong = client.connect(url(server.port), str(path))
    with pytest.raises(client.KeyRefused):
        wrong.ask("GET", "/status/")
    wrong.connection.close()
    path.write_bytes(b"alice:%b\n" % KEY.encode())
    right = client.connect(url(server.port), str(path))
    assert "waiting" in json.loads(right.ask("GET", "/status/"))
    right.connection.close()


def test_a_server_that_is_away_may_come_back_and_a_host_that_is_no_name_does_not(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(client.Unreachable) as away:
        client.connect(url(port)).ask("GET", "/status/")
    assert (away.value.passing, away.value.sent) == (True, False)
    monkeypatch.setenv("OQC_API_KEY", "x")      # the documented one goes to no other machine
    with pytest.raises(client.Unreachable) as wrong:
        client.connect("http://a..b").ask("GET", "/status/")
    assert (wrong.value.passing, wrong.value.sent) == (False, False)


def test_an_answer_that_does_not_come_leaves_open_what_was_done():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = client.connect(url(listener.getsockname()[1]))
        with pytest.raises(client.Unreachable, match="timed out") as silent:
            far.ask("POST", "/jobs/add/", b"{}", seconds=0.05)
    assert (silent.value.passing, silent.value.sent) == (True, True)
    assert far.connection.sock is None


def test_a_server_that_is_away_is_reported_once_until_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said = []
    far = client.connect(url(port), report=said.append)
    with pytest.raises(client.Unreachable):
        far.ended_job(1, far.deadline(0.1))
    assert said == [f"http://127.0.0.1:{port}: Connection refused; trying again"]


def test_a_job_that_has_not_ended_at_the_deadline_is_none(serve):
    server = serve()
    assert server.request("POST", "/runtimes/emulator/pause/").status == 200
    far = client.connect(url(server.port))
    number = add(far, mode="verbatim")
    assert far.ended_job(number, far.deadline(0)) is None
    far.connection.close()


@pytest.mark.parametrize("address, reason", [
    ("ftp://localhost", "expected http://"), ("http://192.0.2.1", "needs a key")])
def test_a_wrong_address_and_a_missing_key_are_errors_before_anything_is_sent(address, reason):
    with pytest.raises(ConfigError, match=reason):
        client.connect(address)


def test_it_is_imported_without_the_server_side_and_the_command_line():
    shown = "import oqc.client, sys; print(*sorted(name for name in sys.modules if 'oqc' in name))"
    done = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "oqc oqc.client oqc.clock oqc.config oqc.jobs oqc.keys\n"
