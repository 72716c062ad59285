"""The record of a job: its details, its attempts, what was said in them; while it runs, a day later
and from a backup."""
import hashlib
import http.client
import json
import os
import signal
import subprocess

import pytest
from conftest import KEY, PROGRAM, ROOT, until

TEXT = {"Accept": "text/plain"}
JOB = "X(90), Y(180)"
# It says how far it is, and dies as a Python program does.
DYING = """
echo "step 1 of 2" >&2
echo "step 2 of 2" >&2
echo 'Traceback (most recent call last):
  File "drive.py", line 7, in <module>
    raise RuntimeError("the fridge is warm")
RuntimeError: the fridge is warm' >&2
exit 1
"""
SAID = """step 1 of 2
step 2 of 2
Traceback (most recent call last):
  File "drive.py", line 7, in <module>
    raise RuntimeError("the fridge is warm")
RuntimeError: the fridge is warm
"""
BUSY_ONCE = '[ "$OQC_ATTEMPT" = 2 ] || exit 75'


def details(server, job):
    """What GET /jobs/{id}/details/ says of a job."""
    answer = server.request("GET", f"/jobs/{job['id']}/details/")
    assert answer.status == 200, answer.body
    return answer.json


def log(server, job):
    """What GET /jobs/{id}/log/ says of a job."""
    answer = server.request("GET", f"/jobs/{job['id']}/log/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    return answer.body.decode()


def heading(server, job, place=0):
    """The line that stands before what was said in an attempt."""
    attempt = details(server, job)["attempts"][place]
    return f"== attempt {attempt['attempt']} on {attempt['runtime']}, {attempt['start_time']}\n"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# Details

def test_details_have_what_came_with_a_job_and_what_the_members_do_not_hold(server):
    note = {"angle": 30, "sample": "A\u00e9", "nested": [None, True, 1.5]}
    job = server.wait(server.add(JOB, "simulation", tag="rabi-7", note=note, shots=10, seed=7))
    assert details(server, job) == {
        "id": job["id"], "submitter": "documented", "tag": "rabi-7", "note": note, "priority": 0,
        "asked_runtime": None, "shots": 10, "seed": 7, "sha256": sha256(JOB), "state": "ended",
        "due_time": None, "ahead": None, "waits_for": None,
        "attempts": [{
            "attempt": 1, "runtime": "simulator", "start_time": job["start_time"],
            "end_time": job["end_time"], "return_code": 0, "runtime_error": None,
            "sent_sha256": sha256(JOB), "device": None}]}
    assert set(job) == set(server.get(job)), "the ten documented members stay as they are"


def test_an_echo_has_no_attempts_and_a_job_without_tag_and_note_has_nulls(server):
    ended = details(server, server.wait(server.add(return_code=3)))
    assert (ended["attempts"], ended["tag"], ended["note"]) == ([], None, None)


def test_details_as_text_are_two_tables(server):
    job = server.wait(server.add(JOB, "simulation", tag="rabi-7", note={"angle": 30}))
    text = server.request("GET", f"/jobs/{job['id']}/details/", headers=TEXT).body.decode()
    first, second = text.split("\n\n")
    rows = dict(line.split(None, 1) for line in first.splitlines() if " " in line.strip())
    assert rows["WHAT"] == "VALUE" and rows["tag"] == "rabi-7" and rows["note"] == '{"angle": 30}'
    header, attempt = second.splitlines()
    assert header.split()[:3] == ["ATTEMPT", "RUNTIME", "START_TIME"]
    assert attempt.split()[:2] == ["1", "simulator"]


def test_while_a_job_is_tried_again_its_details_say_why_and_when(serve, script):
    server = serve("--runtime", f"qpu={script(f'echo busy: calibrating >&2; {BUSY_ONCE}')}")
    job = server.add(JOB, "verbatim")
    seen = []

    def waits():
        seen.append(details(server, job))
        return seen[-1]["due_time"] is not None

    until(waits)
    last = seen[-1]["attempts"][-1]
    assert (last["return_code"], last["runtime_error"]) == (75, "busy: calibrating")
    assert last["start_time"] < last["end_time"] < seen[-1]["due_time"]
    assert (seen[-1]["state"], seen[-1]["ahead"]) == ("waiting", None)
    assert seen[-1]["waits_for"] == f"tried again at {seen[-1]['due_time']}"
    server.wait(job)
    attempts = details(server, job)["attempts"]
    assert [(one["attempt"], one["return_code"]) for one in attempts] == [(1, 75), (2, 0)]


def test_a_running_attempt_is_among_the_attempts_and_one_that_waits_says_for_what(serve, script):
    server = serve("--runtime", f"qpu={script('sleep 60')}")
    first, second = server.add(JOB, "verbatim"), server.add("Z(1)", "verbatim")
    until(lambda: server.get(first)["start_time"])
    running = details(server, first)
    start_time = server.get(first)["start_time"]
    assert running["state"] == "running"
    assert running["attempts"] == [{
        "attempt": 1, "runtime": "qpu", "start_time": start_time, "end_time": None,
        "return_code": None, "runtime_error": None, "sent_sha256": None, "device": None}]
    third = server.add("Z(2)", "verbatim")
    assert details(server, second)["waits_for"] == "a free slot"
    waiting = details(server, third)
    assert (waiting["ahead"], waiting["waits_for"]) == (1, "1 job is before it")
    server.request("POST", "/runtimes/qpu/pause/", {"reason": "cable"})
    assert details(server, third)["waits_for"] == "qpu is paused: cable"
    assert server.runtime("qpu")["paused_by"] == "documented"
    for job in (third, second, first):
        server.request("DELETE", f"/jobs/{job['id']}/")


# The log

def test_a_traceback_can_be_read_a_day_later_after_a_restart_and_from_a_backup(
        serve, script, tmp_path):
    server = serve("--runtime", f"qpu={script(DYING)}")
    job = server.wait(server.add(JOB, "verbatim"))
    assert job["runtime_error"] == "RuntimeError: the fridge is warm"
    expected = heading(server, job) + SAID
    assert log(server, job) == expected
    server.stop()
    backup = tmp_path / "copy.db"
    subprocess.run([*PROGRAM, "backup", backup], cwd=tmp_path, check=True, timeout=60,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    for database in ("oqc.db", backup):
        server = serve("--db", database)
        assert log(server, job) == expected
        assert details(server, job)["attempts"][0]["return_code"] == 1
        server.stop()


def test_each_attempt_has_its_heading_and_its_log(serve, script):
    server = serve("--runtime", f"qpu={script(f'echo attempt $OQC_ATTEMPT >&2; {BUSY_ONCE}')}")
    job = server.wait(server.add(JOB, "verbatim"))
    assert log(server, job) == "".join(
        f"{heading(server, job, place)}attempt {place + 1}\n" for place in range(2))


def test_a_log_without_a_last_line_feed_does_not_swallow_the_next_heading(serve, script):
    server = serve("--runtime", f"qpu={script(f'printf busy >&2; {BUSY_ONCE}')}")
    job = server.wait(server.add(JOB, "verbatim"))
    assert log(server, job) == "\n".join(
        f"{heading(server, job, place)}busy" for place in range(2))


def test_control_characters_are_shown_in_the_log_and_kept_in_the_result(serve, script):
    said = r"printf '\033[2J\t\rbell\007\n\302\233\377' | tee /dev/stderr"
    server = serve("--runtime", f"qpu={script(said)}")
    job = server.wait(server.add(JOB, "verbatim"))
    assert log(server, job) == heading(server, job) + "\\x1b[2J\t\\x0dbell\\x07\n\\x9b\ufffd"
    assert server.result(job).body.startswith(b"\x1b[2J\t\rbell\x07\n\xc2\x9b")


def test_of_a_job_that_said_nothing_the_headings_are_the_log_and_of_an_echo_there_is_none(server):
    simulated = server.wait(server.add(JOB, "simulation"))
    assert log(server, simulated) == heading(server, simulated)
    assert log(server, server.wait(server.add())) == ""


@pytest.mark.parametrize("part", ["details", "log"])
def test_an_id_that_there_is_not_is_404_and_a_0(server, part):
    for number in ("999999", "07", "x", str(2 ** 63)):
        answer = server.request("GET", f"/jobs/{number}/{part}/")
        assert (answer.status, answer.body) == (404, b"0\n")


@pytest.mark.parametrize("query", ["follow=2", "follow=", "follow=1&follow=1", "wait=1"])
def test_follow_takes_1_and_nothing_else(server, query):
    job = server.add()
    answer = server.request("GET", f"/jobs/{job['id']}/log/?{query}")
    assert answer.status == 400 and "follow" in answer.detail


# While it runs

@pytest.fixture
def talking(serve, tmp_path):
    """(a server, its job that has said "warming up" and goes on when `go` is written to)."""
    go = tmp_path / "go"
    os.mkfifo(go)
    runtime = tmp_path / "talk"
    runtime.write_text(f"#!/bin/sh\necho warming up >&2\nread -r line <{go}\n"
                       "echo \"$line\" >&2\nexit 3\n", "utf-8")
    runtime.chmod(0o755)
    server = serve("--runtime", f"qpu={runtime}", "--max-connections", "8")
    return server, server.add(JOB, "verbatim"), go


def follow(server, job, key=KEY):
    """A response that goes on while a job runs."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", f"/jobs/{job['id']}/log/?follow=1", headers={"api_key": key})
    return connection, connection.getresponse()


def test_a_log_can_be_read_and_followed_while_its_job_runs(talking):
    server, job, go = talking
    connection, response = follow(server, job)
    until(lambda: server.get(job)["start_time"])
    head = heading(server, job)
    assert response.fp.read(0) == b""       # the head of the response is here
    assert [response.readline().decode() for _ in range(2)] == [head, "warming up\n"]
    assert log(server, job) == head + "warming up\n"
    go.write_text("the fridge is warm\n")
    assert response.read() == b"the fridge is warm\n", "it ends with the job"
    assert log(server, job) == head + "warming up\nthe fridge is warm\n"
    connection.close()


def test_a_log_that_is_followed_says_when_a_stop_of_the_server_ends_it(talking):
    """A job that goes on after the next start would seem to have ended."""
    server, job, _ = talking
    connection, response = follow(server, job)
    until(lambda: server.get(job)["start_time"])
    head = heading(server, job)
    assert [response.readline().decode() for _ in range(2)] == [head, "warming up\n"]
    server.process.send_signal(signal.SIGTERM)
    server.line("stopping")
    server.process.send_signal(signal.SIGTERM)
    assert response.read().endswith(b"\n(the server is stopping; the job has not ended)\n")
    connection.close()


def test_followers_hold_half_of_the_connections_at_most_and_a_name_half_of_those(
        serve, tmp_path, script):
    (tmp_path / "keys").write_text("a:operator-a\nb:operator-b\nc:operator-c\n", "utf-8")
    (tmp_path / "keys").chmod(0o600)
    server = serve("--runtime", f"qpu={script('sleep 60')}", "--max-connections", "8",
                   "--keys-file", tmp_path / "keys")
    job = server.request("POST", "/jobs/add/", {"job": JOB, "mode": "verbatim"},
                         key="operator-a").json
    open_ones = []
    statuses = []
    for key in ("operator-a",) * 3 + ("operator-b",) * 3 + ("operator-c",):
        connection, response = follow(server, job, key)
        statuses.append(response.status)
        if response.status == 200:
            open_ones.append(connection)
        else:
            assert "without follow" in json.loads(response.read())["detail"]
            connection.close()
    assert statuses == [200, 200, 503, 200, 200, 503, 503]
    answer = server.request("GET", f"/jobs/{job['id']}/?wait=20", key="operator-c")
    assert answer.headers["Retry-After"] == "1", "those who wait and those who follow share them"
    server.request("DELETE", f"/jobs/{job['id']}/", key="operator-a")
    for connection in open_ones:
        connection.close()


# What is kept whatever the end is

def test_at_a_timeout_the_log_and_the_last_words_are_kept(serve, tmp_path, script):
    talks = script("echo partial; echo cooling >&2; sleep 60")
    (tmp_path / "oqc.ini").write_text(f"[runtime qpu]\ncommand = {talks}\ntimeout = 1\n", "utf-8")
    server = serve("--config", "oqc.ini")
    job = server.wait(server.add(JOB, "verbatim"))
    assert job["return_code"] == 124
    assert job["runtime_error"] == "took longer than its timeout of 1 s; cooling"
    assert log(server, job) == heading(server, job) + "cooling\n"
    assert server.result(job).body == b"partial\n"


def test_what_a_cancelled_job_had_said_is_kept(serve, script):
    server = serve("--runtime", f"qpu={script('echo partial; echo cooling >&2; sleep 60')}")
    job = server.add(JOB, "verbatim")
    until(lambda: server.get(job)["start_time"] and "cooling" in log(server, job))
    cancelled = server.request("DELETE", f"/jobs/{job['id']}/").json
    assert (cancelled["return_code"], cancelled["runtime_error"]) == (130, "cancelled")
    assert server.result(job).body == b"partial\n"
    assert log(server, job) == heading(server, job) + "cooling\n"
    assert details(server, job)["attempts"][0]["return_code"] == 130


def test_an_attempt_that_a_crash_cut_off_is_recorded_at_the_next_start_without_a_receipt(
        serve, script):
    command = script('[ "$OQC_ATTEMPT" = 2 ] || sleep 60')
    server = serve("--runtime", f"qpu={command}")
    job = server.add(JOB, "verbatim")
    until(lambda: server.get(job)["start_time"])
    start_time = server.get(job)["start_time"]
    server.stop(signal.SIGKILL)
    server = serve("--runtime", f"qpu={command}")
    server.wait(job)
    first, second = details(server, job)["attempts"]
    assert (first["attempt"], first["start_time"]) == (1, start_time)
    assert (first["return_code"], first["sent_sha256"]) == (137, None)
    assert first["runtime_error"] == "interrupted, outcome unknown"
    assert (second["attempt"], second["return_code"]) == (2, 0)
    assert second["sent_sha256"] == sha256(JOB)


def test_an_attempt_that_a_stop_gave_back_is_in_the_record_and_its_number_comes_again(
        serve, script, tmp_path):
    command = script(f"[ -e {tmp_path}/second ] || {{ touch {tmp_path}/second; sleep 60; }}")
    server = serve("--runtime", f"qpu={command}", "--drain", "0")
    job = server.add(JOB, "verbatim")
    until((tmp_path / "second").exists)
    server.stop()
    server = serve("--runtime", f"qpu={command}")
    server.wait(job)
    assert [(one["attempt"], one["return_code"]) for one in details(server, job)["attempts"]] == [
        (1, 137), (1, 0)]
