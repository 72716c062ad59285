"""The commands that ask a server, as their users meet them.

A person at a terminal, a script that reads JSON, another oqc.
"""
import contextlib
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading

import pytest
from conftest import KEY, ROOT

PYTHON = (sys.executable, "-m", "oqc")
FAR = f"{sys.executable} -m oqc add - --wait --server http://127.0.0.1:"
COMMANDS = ("add", "get", "list", "wait", "cancel", "result", "prune", "runtimes", "pause",
            "resume", "status")


def environment(port, **more):
    """What a client finds in its environment: the server, and nothing else of oqc."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OQC_SERVER": f"http://127.0.0.1:{port}", **more}


def start(server, *arguments, **more):
    """A client that has just begun to run. `server` is one, or a port."""
    streams = {name: more.pop(name, subprocess.PIPE) for name in ("stdin", "stdout", "stderr")}
    port = getattr(server, "port", server)
    return subprocess.Popen([*PYTHON, *map(str, arguments)], env=environment(port, **more),
                            text=True, **streams)


def run(server, *arguments, text="", **more):
    """Run a client to its end; (exit status, standard output, standard error)."""
    with start(server, *arguments, **more) as process:
        out, error = process.communicate(text, timeout=60)
    assert "Traceback" not in error
    return process.returncode, out, error


def line(ended, status):
    """The one line on standard error with which a client ended that could not do what it should."""
    assert ended[:2] == (status, ""), ended
    assert ended[2].startswith("oqc: ") and ended[2].count("\n") == 1, ended
    return ended[2][len("oqc: "):-1]


def lines(count, begin=0):
    """Jobs, one a line, each another."""
    return "".join(f"X({angle // 1000}), Y({angle % 1000})\n"
                   for angle in range(begin, begin + count))


def on_a_terminal(server, *arguments, text=None, **more):
    """(exit status, what a terminal showed, escapes included)"""
    ours, theirs = pty.openpty()
    pieces = []
    with start(server, *arguments, stdin=subprocess.PIPE if text else theirs, stdout=theirs,
               stderr=theirs, **more) as process:
        os.close(theirs)
        if text:
            process.stdin.write(text)
            process.stdin.close()
        try:
            while piece := os.read(ours, 65536):
                pieces.append(piece)
        except OSError:             # EIO: nobody holds the other end any more
            pass
        os.close(ours)
        status = process.wait(60)
    return status, b"".join(pieces).decode().replace("\r\n", "\n")


def settled(shown):
    """What a terminal shows in the end: what was there before an erase is gone."""
    return "\n".join(row.rpartition("\r\x1b[K")[2] for row in shown.split("\n"))


class Scripted:
    """A server that answers each request with the next of these (status, body)s.

    None ends the connection; a function is called, and the client ends it.
    """

    def __init__(self, *answers):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answers = list(answers)
        self.requests = []
        self.last = False           # whether it takes no connection after the next one
        self.port = self.listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while self.answers:
            with self.listener.accept()[0] as connection:
                if self.last:
                    self.listener.close()
                while self.answers and self._answer(connection):
                    pass

    def _answer(self, connection):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(65536)
            if not piece:
                return False
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += connection.recv(65536)
        self.requests.append((head.decode("latin-1"), body))
        answer = self.answers.pop(0)
        if callable(answer):
            answer()
            return bool(connection.recv(1))
        if answer:
            status, content = answer
            connection.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (
                status, len(content), content))
        return answer is not None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def job(number, ended=True):
    """A job as a server would show it."""
    members = {"id": number, "job": "X(90)", "mode": "echo",
               "status": "Success" if ended else "Starting", "runtime": "echo",
               "return_code": 0 if ended else None, "runtime_error": None, "created_time": "T",
               "start_time": "T", "end_time": "T" if ended else None}
    return json.dumps(members).encode() + b"\n"


def free_port():
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


# JSON, where nobody looks on

def test_a_job_is_added_and_shown_as_the_server_says_it(server):
    status, out, error = run(server, "add", "X(90)", "--mode", "simulation", "--shots", 10,
                             "--seed", 7)
    added = json.loads(out)
    assert (status, error, out.count("\n")) == (0, "", 1)
    assert (added["job"], added["mode"]) == ("X(90)", "simulation")
    server.wait(added)
    assert run(server, "get", added["id"]) == (
        0, server.request("GET", f"/jobs/{added['id']}/").body.decode(), "")
    assert run(server, "result", added["id"]) == (0, server.result(added).body.decode(), "")
    assert (server.result(added).json["shots"], server.result(added).json["seed"]) == (10, 7)


@pytest.mark.parametrize("seed, expected", [
    (7, [7, 8, 9]), (2 ** 63 - 2, [2 ** 63 - 2, 2 ** 63 - 1, 0])])
@pytest.mark.parametrize("waits", [(), ("--wait",)])
def test_each_job_of_standard_input_gets_a_seed_of_its_own(server, seed, expected, waits):
    arguments = ("add", "-", "--mode", "simulation", "--shots", 10, *waits)
    text = "X(90)\n\nX(90)\nX(90)\n"             # a blank line is no job
    for flags, variables in ((("--seed", seed), {}), ((), {"OQC_SEED": str(seed)})):
        status, _, error = run(server, *arguments, *flags, text=text, **variables)
        assert (status, error) == (0, "")
        added = server.request("GET", "/jobs/list/?order=desc&limit=3").json[::-1]
        for job in added:
            server.wait(job)
        assert [server.result(job).json["seed"] for job in added] == expected


def test_the_seeds_of_standard_input_go_on_from_one_request_to_the_next(serve):
    """The runtime is paused: 1,001 jobs are added, and those at the border are looked at."""
    server = serve()
    server.request("POST", "/runtimes/simulator/pause/")
    assert run(server, "add", "-", "--mode", "simulation", "--seed", 7, text=lines(1001))[0] == 0
    with contextlib.closing(sqlite3.connect(server.folder / "oqc.db")) as connection:
        seeds = [seed for seed, in connection.execute("SELECT seed FROM jobs ORDER BY id")]
    assert seeds == list(range(7, 7 + 1001))


@pytest.mark.parametrize("job, text", [("X(90)", ""), ("-", "X(90)")])
def test_a_single_job_gets_the_seed_as_it_is_given_and_one_out_of_range_is_refused(
        server, job, text):
    status, out, _ = run(server, "add", job, "--mode", "simulation", "--seed", 7, text=text)
    assert status == 0
    added = json.loads(out)
    server.wait(added)
    assert server.result(added).json["seed"] == 7
    for seed in (2 ** 63, "7.0"):
        ended = run(server, "add", job, "--mode", "simulation", "--seed", seed, text=text)
        assert "seed: expected a whole number from 0 to 9223372036854775807" in line(ended, 1)


def test_the_help_of_add_says_which_seed_each_job_gets_and_why(server):
    shown = " ".join(run(server, "add", "--help")[1].split())
    assert "the n-th job of standard input, counted from 0, gets SEED + n" in shown
    assert "with one seed for all jobs" in shown


def test_a_listing_comes_as_it_came_in_pages_or_whole(server):
    for code in (0, 3, 0):
        server.wait(server.add(return_code=code))
    assert run(server, "list")[1] == server.request("GET", "/jobs/list/").body.decode()
    page = "?status=Runtime%20Error&mode=echo&limit=2&after=9999&order=desc"
    status, out, error = run(server, "list", "--status", "Runtime Error", "--mode", "echo",
                             "--limit", 2, "--after", 9999, "--order", "desc")
    shown = server.request("GET", "/jobs/list/" + page).body.decode()
    assert (status, out, error) == (0, shown, "")
    assert json.loads(out)[0]["return_code"] == 3


def test_a_long_listing_does_not_wait_for_its_end(serve):
    server = serve()
    for begin in range(0, 3000, 1000):
        assert server.request("POST", "/jobs/add/", [{"job": pulse, "mode": "echo"} for pulse in
                                                     lines(1000, begin).splitlines()]).status == 201
    server.wait(3000)
    assert run(server, "list")[1] == server.request("GET", "/jobs/list/").body.decode()


def test_runtimes_and_status_are_what_the_server_says(server):
    runtimes = json.loads(run(server, "runtimes")[1])
    assert [one["name"] for one in runtimes] == ["emulator", "simulator", "echo"]
    assert set(json.loads(run(server, "status")[1])) == set(server.request("GET", "/status/").json)


def test_a_runtime_is_paused_with_a_reason_and_resumed(serve):
    server = serve()
    status, out, _ = run(server, "pause", "emulator", "--reason", "cool-down")
    assert (status, json.loads(out)) == (0, server.runtime("emulator"))
    runtime = server.runtime("emulator")
    assert (runtime["state"], runtime["reason"]) == ("paused", "cool-down")
    status, out, _ = run(server, "resume", "emulator")
    assert (status, json.loads(out)["state"], server.runtime("emulator")["state"]) == (
        0, "idle", "idle")


def test_a_cancelled_job_is_shown_and_one_that_is_refused_keeps_no_other_back(serve):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    ended, waiting = server.wait(server.add()), server.add(mode="verbatim")
    status, out, error = run(server, "cancel", ended["id"], 99, waiting["id"])
    assert (status, json.loads(out)) == (1, server.get(waiting))
    assert error == f"oqc: job {ended['id']} has ended: Success\noqc: no job has the id 99\n"
    assert server.get(waiting)["return_code"] == 130


# Waiting

def test_jobs_that_ended_long_ago_are_forgotten(serve):
    server = serve()
    server.wait(server.add())
    assert run(server, "prune", "--older-than", "1d") == (0, '{"deleted": 0}\n', "")
    assert run(server, "prune", "--older-than", "0s") == (0, '{"deleted": 1}\n', "")
    assert "expected a time such as 90d" in line(run(server, "prune", "--older-than", "1 day"), 1)
    assert run(server, "prune")[0] == 2 and server.request("GET", "/jobs/list/").json == []


def test_wait_ends_with_the_first_return_code_that_is_not_0_in_the_order_of_the_jobs(server):
    numbers = [server.add(return_code=code)["id"] for code in (0, 5, 3)]
    status, out, error = run(server, "wait", *numbers)
    assert (status, error) == (5, "")
    assert [json.loads(row) for row in out.splitlines()] == [
        server.get(number) for number in numbers]
    assert run(server, "wait", numbers[0])[0] == 0


def test_a_job_that_is_waited_for_is_as_if_it_ran_here(serve, script):
    program = script('read -r job; echo "ran $job"; echo one >&2; echo "$job" >&2\n'
                     '[ "$job" = "X(1)" ] && exit 3; exit 0')
    server = serve("--runtime", f"qpu={program}")
    assert run(server, "add", "X(0)", "--mode", "verbatim", "--wait") == (0, "ran X(0)\n", "")
    assert run(server, "add", "--wait", "X(1)", "--mode", "verbatim") == (3, "ran X(1)\n", "X(1)\n")
    assert run(server, "add", "-", "--mode", "verbatim", "--wait=60",
               text="X(0)\nX(1)\nX(2)\n") == (
        3, "ran X(0)\nran X(1)\nran X(2)\n", "job 4: X(1)\n")


def test_the_end_of_the_time_to_wait_is_124_and_the_job_goes_on(serve):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    ended = run(server, "add", "X(0)", "--mode", "verbatim", "--wait=0")
    assert line(ended, 124) == "job 1 has not ended yet; it goes on"
    ended = run(server, "wait", 1, "--seconds", "0.01")
    assert line(ended, 124) == "job 1 has not ended yet; it goes on"
    assert server.get(1)["end_time"] is None


def test_a_wait_goes_on_through_a_restart_of_the_server(serve):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    server.add(mode="verbatim")
    with start(server, "wait", 1) as client:
        server.process.kill()
        said = client.stderr.readline()
        assert re.fullmatch(rf"oqc: http://127\.0\.0\.1:{server.port}: .+; trying again\n", said)
        server = serve("--port", server.port)
        server.request("POST", "/runtimes/emulator/resume/")
        out, error = client.communicate(timeout=60)
    assert (client.returncode, json.loads(out), error) == (0, server.get(1), "")


@pytest.mark.slow        # many processes
def test_a_wait_is_asked_for_again_after_300_seconds_and_after_a_lost_answer():
    answers = [None, (b"200 OK", job(7, False)), (b"200 OK", job(7)), (b"200 OK", job(7))]
    with Scripted(*answers) as far:
        status, out, error = run(far, "wait", 7)
    assert (status, out) == (0, job(7).decode())
    assert error.count("\n") == 1 and "trying again" in error
    assert [head.split()[1] for head, _ in far.requests] == ["/jobs/7/?wait=300"] * 3 + ["/jobs/7/"]


def test_a_wait_with_an_end_asks_for_no_more_than_what_is_left_of_it():
    with Scripted((b"200 OK", job(7)), (b"200 OK", job(7))) as far:
        assert run(far, "wait", 7, "--seconds", 20)[0] == 0
    assert far.requests[0][0].startswith("GET /jobs/7/?wait=20 ")


def test_a_wait_for_all_since_an_age_keeps_the_jobs_that_it_began_with():
    """Asked again later, the same age would leave out the first ones."""
    counts = dict.fromkeys(("waiting", "running", "retrying", "succeeded", "failed"), 0)
    answers = [None] + [(b"200 OK", json.dumps(content).encode()) for content in (
        [json.loads(job(7, False))], {"jobs": {**counts, "running": 1}},
        {"jobs": {**counts, "succeeded": 1}}, [json.loads(job(7))])]
    with Scripted(*answers) as far:
        status, out, _ = run(far, "wait", "--since", "10m", "--tag", "t")
    assert (status, json.loads(out)["id"]) == (0, 7)
    assert [head.split()[1] for head, _ in far.requests] == [
        *["/jobs/list/?tag=t&since=10m&limit=1"] * 2,
        *["/status/?tag=t&since=T&wait=300"] * 2, "/jobs/list/?tag=t&since=T"]


def test_a_wait_for_a_server_that_does_not_come_ends_with_its_time():
    status, out, error = run(free_port(), "wait", 1, "--seconds", "0.1")
    assert (status, out) == (69, "") and error.splitlines()[-1].endswith(": Connection refused")


# Standard input

def test_jobs_from_standard_input_are_added_in_their_order_a_thousand_at_a_time(serve):
    server = serve()
    status, out, error = run(server, "add", "-", "--mode", "echo", text=lines(2500))
    added = [json.loads(row) for row in out.splitlines()]
    assert (status, error) == (0, "")
    assert [one["id"] for one in added] == list(range(1, 2501))
    assert [one["job"] for one in added] == lines(2500).splitlines()
    server.wait(2500)
    assert server.stop() == 0
    assert server.log.count('"POST /jobs/add/"') == 3


def test_blank_lines_behind_a_full_batch_are_no_batch_of_their_own(server):
    """As the last line of an editor: everything before it was added."""
    status, out, error = run(server, "add", "-", "--mode", "echo", text=lines(1000) + "\n\n\n")
    assert (status, out.count("\n"), error) == (0, 1000, "")


def test_long_jobs_from_standard_input_stay_below_what_a_body_may_have(server):
    jobs = [", ".join(["X(1)"] * 20_000)] * 50
    status, out, _ = run(server, "add", "-", "--mode", "echo", text="\n".join(jobs))
    assert (status, [json.loads(row)["job"] for row in out.splitlines()] == jobs) == (0, True)


def test_a_wrong_line_is_named_and_what_was_added_before_it_as_well(serve):
    server = serve()
    status, out, error = run(server, "add", "-", "--mode", "echo",
                             text="\n" + lines(1000) + "\nX(1)\nX(9x)\nX(2)\n")
    assert (status, out.count("\n")) == (1, 1000)
    assert error == ('oqc: line 1004: job: at character 4: expected ")" after an angle of '
                     '1 to 3 digits (whole degrees), found "x"; '
                     'added 1000 jobs, 1 to 1000, before line 1003\n')
    assert server.request("GET", "/jobs/1001/").status == 404


@pytest.mark.parametrize("text", ["", "\n\r\n"])
def test_standard_input_without_a_job_is_an_error(server, text):
    ended = run(server, "add", "-", "--mode", "echo", text=text)
    assert line(ended, 1) == "standard input: expected a job on each line, found none"


def test_a_connection_that_was_closed_meanwhile_is_opened_again_and_nothing_is_added_twice():
    added = b"[" + b",".join([job(1)] * 1000) + b"]"
    with Scripted((b"201 Created", added), None, (b"201 Created", b"[" + job(2) + b"]")) as far:
        assert run(far, "add", "-", "--mode", "echo", text=lines(1001))[::2] == (0, "")
    keys = [re.search("Idempotency-Key: ([0-9a-f]{32})\r\n", head + "\r\n")[1]
            for head, _ in far.requests]
    assert keys[0] != keys[1] == keys[2]
    assert far.requests[1][1] == far.requests[2][1] == b'[{"job": "X(1), Y(0)", "mode": "echo"}]'


# Results

def test_results_are_shown_in_each_format(server):
    jobs = [server.wait(server.add(f"X({angle})", "simulation", tag="formats-cli"))
            for angle in (0, 180)]
    path = "/jobs/results/?tag=formats-cli"
    for name, accept in (("csv", "text/csv"), ("ndjson", "application/x-ndjson"),
                         ("json", "application/json"), ("table", "text/plain")):
        served = server.request("GET", path, headers={"Accept": accept}).body.decode()
        with start(server, "results", "--tag", "formats-cli", "--format", name) as process:
            process.wait(60)
            assert process.stdout.read() == served.replace("\r\n", "\n"), name     # as text has it
    status, out, _ = run(server, "results", "--tag", "formats-cli", "--order", "desc", "--limit", 1)
    assert (status, json.loads(out)["id"]) == (0, jobs[1]["id"])
    assert run(server, "results", "--format", "xml")[0] == 2
    shown = settled(on_a_terminal(server, "results", "--tag", "formats-cli")[1])
    assert shown.split()[:2] == ["ID", "JOB"] and len(shown.splitlines()) == 3
    shown = settled(on_a_terminal(server, "results", "--tag", "formats-cli", "--format", "csv")[1])
    assert len(shown.splitlines()) == 3 and "\\r" not in shown


def test_with_a_tag_a_wait_writes_a_record_a_line_whatever_a_runtime_puts_out(serve, script):
    hostile = script("""printf '{"counts":\\r\\n {"1": 5}}\\n\\n'; read -r job; """
                     """[ "$job" = "X(1)" ] || { printf 'a\\nb\\033[2J\\377"'; exit 3; }""")
    server = serve("--runtime", f"q={hostile}")
    status, out, error = run(server, "add", "-", "--mode", "verbatim", "--tag", "t", "--wait",
                             text="X(1)\nX(2)\n")
    assert (status, error) == (3, "job 2: exit status 3\n")
    first, second = map(json.loads, out.splitlines())
    assert (first["id"], first["job"], first["p1"]) == (1, "X(1)", 1.0)
    assert first["result"] == {"counts": {"1": 5}}
    assert (second["id"], second["job"], second["p1"]) == (2, "X(2)", None)
    assert second["result"].endswith('a\nb\x1b[2J\ufffd"')


# What goes wrong

@pytest.mark.parametrize("arguments, said", [
    (["add", "X(90", "--mode", "echo"], 'job: at character 5: expected ")" after an angle'),
    (["add", "X(90)"], "mode: missing"),
    (["add", "X(9)", "--mode", "echo", "--shots", "x"], "shots: expected a whole"),
    (["list", "--limit", "0"], "limit: expected"), (["get", "999999"], "no job has the id 999999"),
    (["pause", "../../x"], "no runtime has this name"),
    (["resume", "nothing"], "no runtime has this name")])
@pytest.mark.slow        # many processes
def test_what_the_server_refuses_is_1_and_its_reason(server, arguments, said):
    assert line(run(server, *arguments), 1).startswith(said)


def test_a_wrong_key_is_77_and_says_where_another_may_stand(server):
    assert line(run(server, "status", OQC_API_KEY="wrong"), 77).endswith(
        ": does not know the key; --key-file, OQC_KEY_FILE or OQC_API_KEY has another")
    assert line(run(server, "add", "X(1)", "--mode", "echo", "--wait", OQC_API_KEY="wrong"), 77)


def test_a_server_that_cannot_be_reached_is_69_and_for_a_job_to_be_run_now_75():
    port = free_port()
    refused = f"http://127.0.0.1:{port}: Connection refused"
    for arguments in (["status"], ["get", "1"], ["add", "X(1)", "--mode", "echo"]):
        assert line(run(port, *arguments), 69) == refused
    assert line(run(port, "add", "X(1)", "--mode", "echo", "--wait"), 75) == refused


def test_only_what_was_surely_not_added_is_75():
    full = (b"503 Full\r\nRetry-After: 10", b'{"detail": "the server is stopping"}')
    defect = (b"500 Defect", b'{"detail": "a defect"}')
    for answers, status in (([full], 75), ([defect], 1), ([None, defect], 1)):
        with Scripted(*answers) as far:
            said = line(run(far, "add", "X(1)", "--mode", "echo", "--wait"), status)
        assert said.endswith("; it may or may not have been added") == (answers[0] is None)


@pytest.mark.slow        # it asks again for 10 seconds
def test_what_may_have_been_added_before_the_server_went_away_is_69():
    with Scripted(None) as far:
        far.last = True
        status, out, error = run(far, "add", "X(1)", "--mode", "echo", "--wait")
    assert (status, out) == (69, "")
    assert [said.rpartition("; ")[2] for said in error.splitlines()] == [
        "trying again", "it may or may not have been added"]


def test_what_is_not_an_oqc_server_is_one_line():
    for answer in ((b"200 OK", b"<html>"), (b"502 Bad Gateway", b"<html>"),
                   (b"404 Not Found", b"[1]")):
        with Scripted(answer) as far:
            line(run(far, "wait", 1), 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with start(listener.getsockname()[1], "status") as client:
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-\x1b[2J\r\n\r\n")
            ended = (client.wait(60), client.stdout.read(), client.stderr.read())
            assert line(ended, 69).isprintable()


@pytest.mark.parametrize("arguments", [
    ["get"], ["get", "list"], ["get", "1/result"], ["get", "0"], ["add", "--mode", "echo"],
    ["add", "X(1)", "X(2)"], ["add", "X(1)", "--wait=soon"], ["status", "--key", "x"],
    ["wait", "1", "--seconds", "-1"], ["pause"]])
@pytest.mark.slow        # many processes
def test_wrong_usage_is_2(arguments):
    status, out, error = run(0, *arguments)
    assert (status, out) == (2, "") and error.startswith("usage: oqc ") and ": error: " in error


@pytest.mark.parametrize("url", [
    "localhost:12021", "ftp://localhost", "http://", "http://localhost:x",
    "http://you:word@localhost", "http://localhost:70000", "http://[::1", "http://a b"])
@pytest.mark.slow        # many processes
def test_a_server_that_cannot_be_meant_is_78_and_not_repeated(url):
    ended = run(0, "status", "--server", url)
    assert line(ended, 78) == "--server: expected http://HOST:PORT or https://HOST:PORT"


def test_a_name_that_cannot_be_one_is_69_at_once_even_for_a_wait():
    assert "a..b" in line(run(0, "wait", 1, OQC_SERVER="http://a..b", OQC_API_KEY="x"), 69)


def test_standard_output_that_is_full_is_one_line_and_one_that_nobody_reads_none(server):
    with open("/dev/full", "w", encoding="ascii") as full:
        status, _, error = run(server, "status", stdout=full)
    assert (status, error) == (1, "oqc: standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert run(server, "status", stdout=writer) == (141, None, "")
    os.close(writer)


def test_a_closed_standard_input_is_one_line(server):
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *PYTHON, "add", "-", "--mode", "echo"]
    ended = subprocess.run(closed, env=environment(server.port), capture_output=True, text=True,
                           check=False)
    said = line((ended.returncode, ended.stdout, ended.stderr), 1)
    assert said == "standard input: Bad file descriptor"


# The key, the certificate

@pytest.mark.parametrize("text", [
    "{}", "{}\n", "alice:{}\n", "api_key: {}\r\n", "# mine\n\nalice:{}\n"])
@pytest.mark.slow        # many processes
def test_a_key_file_holds_a_key_alone_or_behind_a_name(server, tmp_path, text):
    (tmp_path / "key").write_bytes(text.format(KEY).encode())
    assert run(server, "status", "--key-file", tmp_path / "key", OQC_API_KEY="wrong")[0] == 0
    assert run(server, "status", OQC_KEY_FILE=str(tmp_path / "key"))[0] == 0


@pytest.mark.parametrize("text, said", [
    ("", "expected one line with a key, found 0"), ("a:1\nb:2\n", "found 2"),
    ("a:\n", "can carry"), ("a:\x01\n", "can carry")])
@pytest.mark.slow        # many processes
def test_a_key_file_that_cannot_be_meant_is_78_and_not_shown(tmp_path, text, said):
    path = tmp_path / "key"
    path.write_text(text, encoding="ascii")
    told = line(run(0, "status", "--key-file", path), 78)
    assert told.startswith(f"{path}: ") and told.endswith(said)
    ended = run(0, "status", "--key-file", tmp_path / "none")
    assert line(ended, 78).endswith("/none: No such file or directory")


def test_the_documented_key_goes_to_no_other_machine_and_ones_own_does(serve):
    said = line(run(0, "status", OQC_SERVER="http://192.0.2.1"), 78)
    assert said == "http://192.0.2.1: needs a key, in --key-file or OQC_API_KEY"
    assert run(serve(environment={"OQC_API_KEY": "mine"}), "status", OQC_API_KEY="mine")[0] == 0


def test_a_path_before_the_servers_own_is_kept():
    with Scripted((b"200 OK", b"{}\n")) as far:
        assert run(0, "status", "--server", f"http://127.0.0.1:{far.port}/oqc/") == (0, "{}\n", "")
    assert far.requests[0][0].startswith("GET /oqc/status/ ")


def test_https_needs_a_certificate_that_is_trusted(serve, tmp_path):
    path = tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec",
                    "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{path}.key",
                    "-out", path], check=True, capture_output=True)
    url = f"https://127.0.0.1:{serve('--tls-cert', path, '--tls-key', f'{path}.key').port}"
    assert run(0, "status", "--server", url, "--ca", path)[0] == 0
    assert run(0, "status", OQC_SERVER=url, OQC_CA=str(path))[0] == 0
    ended = run(0, "wait", 1, OQC_SERVER=url)       # at once: it will not be trusted later
    assert "self" in line(ended, 69)
    for wrong in (f"{path}.none", f"{path}.key"):
        assert line(run(0, "status", "--ca", wrong, OQC_SERVER=url), 78).startswith(f"{wrong}: ")


# Signals

def test_ctrl_c_is_130_without_a_traceback_and_the_jobs_go_on():
    clients = []
    with Scripted((b"201 Created", b"[" + job(1, False) + b"," + job(2, False) + b"]"),
                  lambda: clients[0].send_signal(signal.SIGINT)) as far:
        with start(far, "add", "-", "--mode", "echo", "--wait", stdin=subprocess.PIPE) as client:
            clients.append(client)
            assert client.communicate(lines(2), timeout=60) == (
                "", "oqc: interrupted; not cancelled: 2 jobs, 1 to 2\n")
    assert client.returncode == 130
    assert [head.split()[0] for head, _ in far.requests] == ["POST", "GET"]


@pytest.mark.slow        # many processes
def test_ctrl_c_is_130_for_every_command():
    clients = []
    with Scripted(lambda: clients[0].send_signal(signal.SIGINT)) as far:
        with start(far, "wait", "1", stdin=subprocess.PIPE) as client:
            clients.append(client)
            client.stdin.close()
            assert (client.wait(60), client.stderr.read()) == (130, "")


def test_term_is_143_and_cancels_the_jobs(serve, tmp_path, script):
    os.mkfifo(tmp_path / "started")
    server = serve("--runtime", "qpu=" + script(f"echo >{tmp_path}/started; exec sleep 60"))
    with start(server, "add", "-", "--mode", "verbatim", "--wait", stdin=subprocess.PIPE) as client:
        client.stdin.write(lines(2))
        client.stdin.close()
        assert (tmp_path / "started").read_text(encoding="ascii") == "\n"
        client.send_signal(signal.SIGTERM)
        assert (client.wait(60), client.stderr.read()) == (143, "")
    assert [server.wait(number)["runtime_error"] for number in (1, 2)] == ["cancelled", "cancelled"]
    assert server.get(2)["start_time"] is None      # did not begin because the first was cancelled


def test_term_that_comes_before_the_answer_to_the_add_cancels_all_the_same():
    with Scripted() as far:
        with start(far, "add", "X(1)", "--mode", "echo", "--wait") as client:
            with far.listener.accept()[0] as connection:
                data = b""
                while not data.endswith(b"}"):
                    data += connection.recv(65536)
                client.send_signal(signal.SIGTERM)
                answer = job(7, False)
                connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (
                    len(answer), answer))
                assert connection.recv(65536).startswith(b"DELETE /jobs/7/ ")
            assert client.wait(60) == 143


# On a terminal

def test_a_terminal_gets_the_servers_tables(serve):
    server = serve()
    number = server.wait(server.add(mode="simulation", seed=7))["id"]
    for arguments, path in ((["get", number], f"/jobs/{number}/"),
                            (["result", number], f"/jobs/{number}/result/"),
                            (["wait", number], f"/jobs/{number}/"), (["runtimes"], "/runtimes/"),
                            (["list", "--limit", 3], "/jobs/list/?limit=3"),
                            (["list"], "/jobs/list/")):
        text = server.request("GET", path, headers={"Accept": "text/plain"}).body.decode()
        status, shown = on_a_terminal(server, *arguments)
        assert (status, settled(shown)) == (0, text), arguments
    assert settled(on_a_terminal(server, "status")[1]).startswith("WHAT")
    shown = settled(on_a_terminal(server, "add", "X(5)", "--mode", "echo")[1])
    assert re.search(r"ID +STATUS.* CREATED \(UTC\) .*\n\d+ +\S.* X\(5\)\n$", shown)


def test_a_change_shows_a_table_on_a_terminal(serve):
    server = serve()
    assert re.search(r"(?m)^emulator +verbatim +lines +1 +paused +hot ", settled(
        on_a_terminal(server, "pause", "emulator", "--reason", "hot")[1]))
    number = server.add(mode="verbatim")["id"]
    assert re.search(rf"(?m)^{number} +Runtime Error +130 ",
                     settled(on_a_terminal(server, "cancel", number)[1]))


def test_a_terminal_shows_progress_and_then_only_what_is_left(serve):
    server = serve()
    status, shown = on_a_terminal(server, "add", "-", "--mode", "echo", text=lines(1500))
    assert (status, settled(shown)) == (0, "added 1500 jobs, 1 to 1500\n")
    assert "\x1b[K1000 jobs added\r" in shown and "\x1b[K1500 jobs added\r" in shown
    status, shown = on_a_terminal(server, "add", "-", "--mode", "echo", "--wait",
                                  "--return-code", 3, text=lines(2))
    assert (status, settled(shown)) == (3, "null\njob 1501: echo of return code 3\n"
                                           "null\njob 1502: echo of return code 3\n")
    assert "\x1b[K0 of 2 jobs\r" in shown and "\x1b[K1 of 2 jobs\r" in shown


def test_a_result_moves_no_cursor_whatever_its_bytes_are(serve, script):
    """0x9b begins an escape sequence on a terminal that does not speak UTF-8."""
    server = serve("--runtime", "qpu=" + script("printf 'a\\033[2J\\2332Jb\\n'"))
    number = server.wait(server.add(mode="verbatim"))["id"]
    status, shown = on_a_terminal(server, "result", number)
    assert (status, settled(shown)) == (0, "a\\x1b[2J\ufffd2Jb\n")


def test_what_goes_wrong_on_a_terminal_stands_on_a_line_of_its_own(server):
    assert settled(on_a_terminal(server, "get", 999999)[1]) == "oqc: no job has the id 999999\n"


# Starting

def test_a_client_does_without_the_server_side_and_its_sqlite3(server, tmp_path):
    (tmp_path / "sqlite3.py").write_text("raise ImportError('none', name='sqlite3')\n",
                                         encoding="utf-8")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(server, "status", **path)[0] == 0
    assert run(server, **path)[0] == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.slow        # many processes
def test_each_command_explains_itself_and_its_exit_statuses(command):
    status, out, error = run(0, command, "--help")
    assert (status, error) == (0, "") and out.startswith(f"usage: oqc {command} ")
    assert all(re.search(rf"\b{code}\b", out) for code in (1, 2, 69, 77, 78, 124, 130))
    assert ("75" in out and "--runtime" in out) == (command == "add")
    assert all(len(row) <= 120 for row in out.splitlines())


def test_the_help_of_oqc_names_each_command(server):
    out = run(server, "--help")[1]
    assert all(re.search(rf"\b{command}\b", out) for command in COMMANDS)


# One oqc in front of another

def test_a_job_of_the_near_server_is_a_job_of_the_far_one(serve, script):
    """Its string, shots and seed go there; the result, the error and the return code come back."""
    far = serve("--db", "far.db", "--runtime", "qpu=" + script(
        'read -r job\n'
        'echo "{\\"ran\\": \\"$job\\", \\"shots\\": $OQC_SHOTS, \\"seed\\": $OQC_SEED}"\n'
        '[ "$job" != "Z(0)" ] || { echo "Z(0): the device is warm" >&2; exit 3; }'))
    near = serve("--runtime", f"far={FAR}{far.port}")
    good = near.wait(near.add("X(90), Y(180)", mode="verbatim", shots=12, seed=34))
    assert (good["status"], good["runtime"], good["return_code"]) == ("Success", "far", 0)
    assert near.result(good).json == {"ran": "X(90), Y(180)", "shots": 12, "seed": 34}
    bad = near.wait(near.add("Z(0)", mode="verbatim"))
    assert (bad["return_code"], bad["runtime_error"]) == (3, "Z(0): the device is warm")
    listed = far.request("GET", "/jobs/list/").json
    assert [(one["job"], one["mode"], one["return_code"]) for one in listed] == [
        ("X(90), Y(180)", "verbatim", 0), ("Z(0)", "verbatim", 3)]


def test_while_the_far_server_is_away_the_near_one_tries_again(serve, tmp_path):
    port, marker = free_port(), tmp_path / "failed"
    os.mkfifo(marker)
    command = tmp_path / "command"
    command.write_text(f'#!/bin/sh\n{FAR}{port}\ncode=$?\n'
                       f'[ "$code" = 0 ] || echo "$code" >{marker}\nexit "$code"\n',
                       encoding="utf-8")
    command.chmod(0o755)
    near = serve("--runtime", f"far={command}")
    added = near.add(mode="verbatim")
    assert marker.read_text(encoding="ascii") == "75\n"
    marker.unlink()     # another attempt may fail before the far server is there: it must not block
    far = serve("--db", "far.db", "--port", port)
    ended = near.wait(added)
    assert (ended["status"], ended["return_code"]) == ("Success", 0)
    assert near.result(ended).json == far.result(1).json


def test_a_job_cancelled_near_is_cancelled_far(serve, tmp_path, script):
    os.mkfifo(tmp_path / "started")
    far = serve("--db", "far.db", "--runtime",
                "qpu=" + script(f"echo >{tmp_path}/started; exec sleep 60"))
    near = serve("--runtime", f"far={FAR}{far.port}")
    added = near.add(mode="verbatim")
    assert (tmp_path / "started").read_text(encoding="ascii") == "\n"
    assert near.request("DELETE", f"/jobs/{added['id']}/").json["return_code"] == 130
    assert far.wait(1)["runtime_error"] == "cancelled"
