"""The running program from outside: what it says at start, what survives, how it stops, what a
runtime gets."""
import contextlib
import json
import os
import re
import select
import signal
import socket
import sys

import pytest
from conftest import KEY, ROOT, Server

PYTHON = (sys.executable, "-m", "oqc")
STAMP = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z "


class Gate:
    """A runtime that waits at a named pipe in its first attempt at X(4), and runs everything else
    at once."""

    def __init__(self, folder, script):
        self.pipe = folder / "gate"
        os.mkfifo(self.pipe)
        self.program = script(f"""read -r job
[ "$OQC_ATTEMPT $job" = "1 X(4)" ] && cat {self.pipe}
echo "attempt $OQC_ATTEMPT"
""")
        self.flags = ("--runtime", f"qpu={self.program}")

    def reached(self):
        """Wait until the runtime is there; the descriptor that it reads from."""
        return os.open(self.pipe, os.O_WRONLY)

    @staticmethod
    def left(descriptor):
        """Wait until nothing of the runtime is left."""
        poll = select.poll()
        poll.register(descriptor, 0)
        assert poll.poll(20_000), "a process of the runtime is still there"
        os.close(descriptor)


@pytest.fixture
def gate(tmp_path, script):
    return Gate(tmp_path, script)


def alive(pids):
    """Those of these processes that are still there."""
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def ids(server):
    """{id: job} of all jobs."""
    return {job["id"]: job for job in server.request("GET", "/jobs/list/").json}


# Start

def test_at_start_it_says_in_a_line_each_where_it_listens_where_the_database_is_and_who_runs_what(
        serve, tmp_path):
    server = serve()
    server.line("manual: ")
    expected = [rf"info listening on http://127\.0\.0\.1:{server.port}/",
                f"info database {re.escape(str(tmp_path))}/oqc.db",
                "info runtimes: verbatim on emulator; simulation on simulator; echo on echo",
                "warning verbatim jobs go to an emulator, not to hardware; "
                "--runtime NAME=COMMAND names a runtime",
                rf"info manual: python3 .+ help, or http://127\.0\.0\.1:{server.port}/help/"]
    assert len(server.lines) == len(expected)
    for line, pattern in zip(server.lines, expected):
        assert re.fullmatch(STAMP + pattern, line)


def test_with_a_runtime_of_its_own_it_says_so_and_nothing_of_an_emulator(serve, script):
    server = serve("--runtime", f"qpu-1={script('exit 0')} --flag", "--runtime", "qpu-2=true")
    assert server.line("runtimes: ").endswith(
        "runtimes: verbatim on qpu-1, qpu-2; simulation on simulator; echo on echo")
    assert server.stop() == 0 and "emulator" not in server.log


def test_the_database_is_where_the_flag_or_the_environment_says_and_else_in_the_current_directory(
        serve, tmp_path):
    (tmp_path / "data").mkdir()
    for flags, variables, path in (((), {}, "oqc.db"), ((), {"OQC_DB": "data/a.db"}, "data/a.db"),
                                   (("--db", "data/b.db"), {"OQC_DB": "data/c.db"}, "data/b.db")):
        server = serve(*flags, environment=variables)
        server.wait(server.add())
        assert server.line("database").endswith(f"database {tmp_path / path}")
        assert server.stop() == 0
        assert (tmp_path / path).read_bytes().startswith(b"SQLite format 3\0")
        assert (tmp_path / path).stat().st_mode & 0o077 == 0, "for its owner alone"
    assert not (tmp_path / "data" / "c.db").exists()


def test_it_listens_on_loopback_alone_unless_told_otherwise(serve):
    server = serve()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=20)
    other = serve("--host", "127.0.0.2", "--db", "other.db")
    assert other.line("listening").endswith(f"http://127.0.0.2:{other.port}/")
    socket.create_connection(("127.0.0.2", other.port), timeout=20).close()


def test_it_is_reached_under_the_name_localhost_as_in_the_documentation(server):
    socket.create_connection(("localhost", server.port), timeout=20).close()


def test_the_start_script_works_from_any_directory_and_passes_its_flags_on(serve, tmp_path):
    absolute = ROOT / "scripts" / "start_server.sh"
    link = tmp_path / "oqc"
    link.symlink_to(absolute)
    variables = {"PYTHON": sys.executable, "PYTHONPATH": ""}
    for command in (absolute, os.path.relpath(absolute, tmp_path), link):
        server = serve(command=(str(command),), environment=variables)
        assert server.line("database").endswith(f"database {tmp_path}/oqc.db")
        assert server.wait(server.add())["status"] == "Success"
        assert server.stop() == 0, "the signal reaches the server, not a shell around it"


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_standard_error_that_takes_nothing_costs_no_request(tmp_path, serve, script, redirection):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pipe = tmp_path / "started"
    os.mkfifo(pipe)
    asks_again = script("exit 75")
    first = serve("--runtime", f"qpu={asks_again}")         # by the next server
    waiting = first.add("X(2)", "verbatim")
    first.process.kill()
    first.process.wait()
    says_so = script(f"echo error >&2; echo started >{pipe}")
    command = ("sh", "-c", f'exec "$@" {redirection}', "sh", *PYTHON)
    silent = Server(tmp_path, "--runtime", f"qpu={says_so}", "--port", port, command=command,
                    wait=False)
    silent.port = port
    try:
        # It opens when the runtime runs: so the server listens.
        assert pipe.read_text(encoding="utf-8") == "started\n"
        assert silent.wait(waiting)["status"] == silent.wait(silent.add())["status"] == "Success"
        assert silent.request("GET", "/jobs/07/").body == b"0\n"
        files = {os.readlink(f"/proc/{silent.process.pid}/fd/{number}") for number in (0, 1, 2)}
        assert files <= {"/dev/null", "/dev/full"}, "or the log goes to whatever got the number"
    finally:
        assert silent.stop() == 0 and not silent.lines


def test_a_key_never_shows_up_in_the_log(serve):
    server = serve("--log-level", "debug", environment={"OQC_API_KEY": "our-secret"})
    assert server.request("GET", "/jobs/list/", key="our-secret").status == 200
    assert server.request("GET", "/jobs/list/", key="a-wrong-key").status == 401
    assert server.request("GET", "/jobs/list/", key=KEY).status == 401, (
        "keys of its own replace the documented one")
    assert server.stop() == 0
    assert '"OQC_API_KEY" "GET /jobs/list/" 200' in server.log
    assert not any(key in server.log for key in ("our-secret", "a-wrong-key", KEY))


# An outside runtime

def test_an_exit_code_of_3_arrives_with_the_last_line_of_standard_error(serve, script):
    runtime = script("""
read -r job
echo "got $job" >&2
echo result
echo "qubit 0: no lock " >&2
echo >&2
exit 3""")
    server = serve("--runtime", f"qpu-1={runtime} --flag")
    job = server.wait(server.add("X(90), Y(180), X(90)", "verbatim"))
    assert (job["status"], job["runtime"], job["return_code"], job["runtime_error"]) == (
        "Runtime Error", "qpu-1", 3, "qubit 0: no lock")
    assert server.result(job).body == b"result\n"
    assert server.stop() == 0
    said = f"job {job['id']} failed on qpu-1 after 1 attempts: return code 3, "
    assert said in server.log


@pytest.mark.parametrize("ending, code, error", [
    ("exit 1", 1, "exit status 1"), ("exit 123", 123, "exit status 123"),
    ("echo é >&2; exit 2", 2, "é"), ("echo warning >&2; exit 0", 0, None)])
def test_other_ends_of_a_runtime_arrive_as_they_are(serve, script, ending, code, error):
    server = serve("--runtime", f"qpu={script(ending)}")
    job = server.wait(server.add(mode="verbatim"))
    assert (job["return_code"], job["runtime_error"]) == (code, error)
    assert job["status"] == ("Runtime Error" if code else "Success")


# What survives

def test_jobs_and_results_survive_a_restart_and_ids_go_on(serve):
    server = serve()
    ended = [server.wait(server.add("X(90)", mode)) for mode in ("echo", "simulation", "verbatim")]
    results = [server.result(job).body for job in ended]
    assert server.stop() == 0
    server = serve()
    assert list(ids(server).values()) == ended
    assert [server.result(job).body for job in ended] == results
    assert server.add()["id"] == len(ended) + 1


def test_after_kill_9_what_ran_and_what_waited_is_run_and_what_had_ended_is_as_it_was(serve, gate):
    server = serve(*gate.flags)
    ended = server.wait(server.add("X(1)", "verbatim"))
    running = server.add("X(4)", "verbatim")
    held = gate.reached()
    waiting = [server.add(f"X({n})", "verbatim") for n in (5, 6)]
    assert server.get(running)["start_time"] and not server.get(waiting[0])["start_time"]
    server.process.kill()
    server.process.wait()
    gate.left(held)
    server = serve(*gate.flags)
    assert server.get(ended) == ended and server.result(ended).body == b"attempt 1\n"
    for job, attempt in ((running, 2), *((job, 1) for job in waiting)):
        now = server.wait(job)
        assert now["status"] == "Success" and server.result(now).body == b"attempt %d\n" % attempt
        assert (now["job"], now["created_time"]) == (job["job"], job["created_time"])
    line = server.line("was running on qpu when the server was killed")
    assert line.endswith("it is tried again")


def test_what_was_answered_201_is_there_after_kill_9_and_has_ended(serve):
    server = serve()
    body = b'{"job": "Y(1)", "mode": "echo"}'
    head = f"POST /jobs/add/ HTTP/1.1\r\nHost: localhost\r\napi_key: {KEY}\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(8)]
    for client in clients:
        client.sendall(request * 100)
    answers = [client.makefile("rb") for client in clients]
    for answer in answers:
        assert answer.readline() == b"HTTP/1.1 201 Created\r\n"
    server.process.kill()                   # in the middle of the rest
    server.process.wait()
    acknowledged = set()
    for client, answer in zip(clients, answers):
        with contextlib.suppress(ConnectionResetError):
            numbers = re.findall(rb'\{"id": ([0-9]+), [^\n]*\}\n', answer.read())
            acknowledged.update(map(int, numbers))
        answer.close()
        client.close()
    jobs = ids(serve())
    assert acknowledged and acknowledged <= set(jobs)
    assert {job["status"] for job in jobs.values()} == {"Success"}, (
        "an echo has ended as soon as it is on disk")


# Stop

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_status_0_and_leaves_no_child(serve, tmp_path, number):
    server = serve()
    for mode in ("verbatim", "simulation"):
        server.wait(server.add(mode=mode))
    children = server.children()
    assert children, "the built-in runtimes stay between jobs"
    assert server.stop(number) == 0
    assert not alive(children) and "Traceback" not in server.log
    assert server.lines[-1].endswith("info stopped")
    assert not (tmp_path / "oqc.db-wal").exists(), "all is in one file, which can be copied"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=20)


def test_ctrl_c_at_a_terminal_reaches_the_whole_group_and_stops_it_as_cleanly(serve, gate):
    server = serve(*gate.flags, "--drain", "0", command=("setsid", *PYTHON))
    job = server.add("X(4)", "verbatim")
    held = gate.reached()
    server.wait(server.add(mode="simulation"))
    children = server.children()
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(20) == 0 and server.stop() == 0
    gate.left(held)
    assert not alive(children) and "Traceback" not in server.log
    server = serve(*gate.flags)
    os.close(gate.reached())
    result = server.result(server.wait(job)).body
    assert result == b"attempt 1\n", "being stopped costs a job no attempt"


def test_a_running_job_may_end_within_the_drain_and_a_waiting_one_stays_for_the_next_start(
        serve, gate):
    server = serve(*gate.flags, "--drain", "20")
    running = server.add("X(4)", "verbatim")
    held = gate.reached()
    waiting = server.add("X(5)", "verbatim")
    server.process.send_signal(signal.SIGTERM)
    server.line("stopping: no new jobs, 20 s for those that run")
    assert server.get(running)["end_time"] is None, "it still answers"
    os.close(held)
    assert server.process.wait(20) == 0, "by one signal: stop() would send a second one"
    server = serve(*gate.flags)
    assert server.result(server.wait(running)).body == b"attempt 1\n"
    assert server.result(server.wait(waiting)).body == b"attempt 1\n"


@pytest.mark.parametrize("again", [False, True])
def test_a_job_that_does_not_end_is_cut_off_at_the_deadline_or_by_a_second_signal(
        serve, gate, again):
    server = serve(*gate.flags, "--drain", "60" if again else "0.1")
    job = server.add("X(4)", "verbatim")
    held = gate.reached()
    server.process.send_signal(signal.SIGTERM)
    server.line("stopping")
    if again:
        server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0 and server.stop() == 0
    gate.left(held)
    assert "Traceback" not in server.log
    server = serve(*gate.flags)
    os.close(gate.reached())
    result = server.result(server.wait(job)).body
    assert result == b"attempt 1\n", "being stopped costs a job no attempt"


def test_a_runtime_that_ignores_being_asked_is_killed_with_its_children(serve, tmp_path, script):
    pipe = tmp_path / "gate"
    os.mkfifo(pipe)
    runtime = script(f"""
trap '' TERM HUP INT
(trap '' TERM HUP INT; cat {pipe}; cat {pipe}) &
cat {pipe}
wait""")
    server = serve("--runtime", f"qpu={runtime}", "--drain", "0", "--kill-grace", "0.1")
    server.add(mode="verbatim")
    held = os.open(pipe, os.O_WRONLY)
    children = server.children()
    assert server.stop() == 0
    Gate.left(held)
    assert children and not alive(children)


def test_it_stops_although_clients_hold_connections_open(serve):
    server = serve()
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(3)]
    clients[1].sendall(b"GET /jobs/li")
    clients[2].sendall(b"GET /jobs/list/ HTTP/1.1\r\nHost: localhost\r\n"
                       b"api_key: %b\r\n\r\n" % KEY.encode())
    assert clients[2].recv(12) == b"HTTP/1.1 200"
    assert server.stop() == 0
    for client in clients:
        client.close()


def test_a_client_that_waits_for_a_job_is_answered_when_the_server_stops(serve, gate):
    server = serve(*gate.flags, "--drain", "0")
    job = server.add("X(4)", "verbatim")
    held = gate.reached()
    rest_of_head = f" HTTP/1.1\r\nHost: localhost\r\napi_key: {KEY}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(f"GET /jobs/{job['id']}/?wait=300{rest_of_head}"
                       f"GET /jobs/0/{rest_of_head}".encode())
        server.get(job)                         # the request before has been read by then
        assert server.stop() == 0
        with client.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    gate.left(held)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(body.splitlines()[0])["id"] == job["id"]
