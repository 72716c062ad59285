"""The whole life of a job, from outside: a real server, hostile runtimes, signals, and what
GET /jobs/{id}/ says."""
import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, RUNTIMES

from oqc import cli

ENDED = ("status", "return_code", "runtime_error")
CANCELLED = ("Runtime Error", 130, "cancelled")


def told(job):
    """How a job ended."""
    return tuple(job[name] for name in ENDED)


def until(server, condition, seconds=20):
    """Wait until something holds of jobs or runtimes: it is asked after each change there."""
    give_up = time.monotonic() + seconds
    change = server.request("GET", "/status/").json["change"]
    while not condition():
        assert time.monotonic() < give_up
        change = server.request("GET", f"/status/?wait={seconds}&since={change}").json["change"]


class Gate:
    """The runtime tests/runtimes/gate: it tells when an attempt begins, and ends when and as the
    test says."""

    def __init__(self, folder):
        folder.mkdir()
        self.command = f"{RUNTIMES}/gate {folder}"
        for name in ("started", "go"):
            os.mkfifo(folder / name)
        # for both, so that nobody waits for the other end and nothing ends when that goes away
        self._started, self._go = (os.open(folder / name, os.O_RDWR) for name in ("started", "go"))

    def wait(self):
        """(job, attempt, runtime, process id) of the next attempt that begins."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._started], [], [], 20)[0], "no attempt began"
            line += os.read(self._started, 1)
        job, attempt, runtime, pid = line.decode().split()
        return int(job), int(attempt), runtime, int(pid)

    def give(self, code=0):
        """Have one attempt end with this code."""
        os.write(self._go, b"%-3d\n" % code)

    def take_back(self):
        """What was given and not taken."""
        while select.select([self._go], [], [], 0)[0]:
            os.read(self._go, 64)

    def close(self):
        os.close(self._started)
        os.close(self._go)


@pytest.fixture
def gate(tmp_path):
    """gate(): a new one."""
    made = []

    def make():
        made.append(Gate(tmp_path / f"gate-{len(made)}"))
        return made[-1]
    yield make
    for one in made:
        one.close()


@pytest.fixture
def ini(tmp_path):
    """ini(text): the path of an INI file."""
    def write(text):
        path = tmp_path / "runtimes.ini"
        path.write_text(text, encoding="utf-8")
        return path
    return write


def watch(pids):
    """{pidfd: pid} of processes that are there."""
    watched = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            watched[os.pidfd_open(pid)] = pid
    return watched


def all_gone(watched, seconds=0):
    """Whether they all have ended by now, or do so in time; closes the pidfds."""
    give_up, left = time.monotonic() + seconds, dict(watched)
    while left:
        ended = select.select(list(left), [], [], max(0.0, give_up - time.monotonic()))[0]
        if not ended:
            break
        for descriptor in ended:
            with contextlib.suppress(ChildProcessError):    # a killed server's may have become ours
                os.waitpid(left.pop(descriptor), os.WNOHANG)
    for descriptor in watched:
        os.close(descriptor)
    return not left


def memory(pid, what):
    """A line of /proc/PID/status in KiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.split(f"{what}:")[1].split()[0])


# Which runtime gets a job, over which protocol

def test_runtimes_come_from_the_flag_and_from_the_ini_file_over_both_protocols(serve, ini, script):
    server = serve("--runtime", f"a={script('cat')}", "--config", ini(f"""
        [runtime b]
        command = {script('exit 3')}
        modes = simulation
        [runtime c]
        command = sh -c "exit 7"            ; with a comment
        modes = verbatim, simulation
        slots = 2
        timeout = 9.5
        retry_codes = 7, 75
        interrupted = fail
        """.replace("\n        ", "\n")))
    shown = [(one["name"], one["modes"], one["protocol"], one["slots"]) for one in
             server.request("GET", "/runtimes/").json]
    assert shown == [("a", ["verbatim"], "exec", 1), ("b", ["simulation"], "exec", 1),
                     ("c", ["verbatim", "simulation"], "exec", 2), ("echo", ["echo"], "echo", 1)]


def test_a_runtime_over_lines_from_the_ini_file_runs_jobs(serve, ini, tmp_path):
    answer = tmp_path / "answer.py"
    answer.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    code = len(job['job']) % 2\n"
        "    answer = {'id': job['id'], 'return_code': code, 'runtime_error': 'odd', "
        "'result': job}\n"
        "    print(json.dumps(answer), flush=True)\n", encoding="utf-8")
    command = f"{sys.executable} {answer}"
    server = serve("--config", ini(f"[runtime qpu]\ncommand = {command}\nprotocol = lines\n"))
    even = server.add("X(90), Y(9)", "verbatim", shots=7, seed=9)
    odd = server.add("X(1)", "verbatim")
    assert told(server.wait(even)) == ("Runtime Error", 1, "odd")
    assert told(server.wait(odd)) == ("Success", 0, None)
    asked = server.result(even).json
    for member in ("submitter", "tag", "note"):
        del asked[member]
    assert asked == {
        "id": even["id"], "job": "X(90), Y(9)", "mode": "verbatim", "attempt": 1, "shots": 7,
        "seed": 9, "timeout": 60.0}


@pytest.mark.parametrize("text, line, says", [
    ("[runtime a]\ncommand = true\nspeed = 9\n", "line 3: [runtime a]: speed: ", "unknown key"),
    ("[runtime a]\ncommand = true\nmodes = verbatim, hardware\n", "line 3: [runtime a]: modes: ",
     "hardware"),
    ("[runtime a]\ncommand = true\n\n[runtime a]\ncommand = true\n", "line 4: [runtime a]",
     "twice"),
    ("[runtime emulator]\ncommand = true\n", "line 1: [runtime emulator]: ", "taken"),
    ("[runtime a]\ncommand = true\n[runtime b]\ncommand = /no/such\n",
     "line 4: [runtime b]: command: ", "/no/such"),
    ("[runtime a]\nmodes = verbatim\n", "line 1: [runtime a]: command: ",
     "expected a program and its arguments"),
    ("[runtime a]\ncommand = true\nprotocol = http\n", "line 3: [runtime a]: protocol: ",
     "exec or lines"),
    ("[runtime a]\ncommand = true\ntimeout = 0\n", "line 3: [runtime a]: timeout: ",
     "a number of seconds above 0"),
    ("[runtime a]\ncommand = true\nslots = 0\n", "line 3: [runtime a]: slots: ", "from 1 to"),
    ("[runtime a]\ncommand = true\nretry_codes = 75, x\n", "line 3: [runtime a]: retry_codes: ",
     "'x'"),
    ("[runtime a]\ncommand = true\ninterrupted = maybe\n", "line 3: [runtime a]: interrupted: ",
     "retry or fail"),
    ("[server]\nport = 1\n", "line 1: [server]: ", "[runtime NAME]"),
    ("[runtime a]\nwhat is this\n", "line 2: ", "key = value"),
], ids=lambda part: part.split("\n")[-2] if "\n" in part else "")
def test_an_ini_file_that_cannot_be_meant_is_one_line_with_file_section_and_line(
        ini, capsys, text, line, says):
    path = ini(text)
    # a server that took it would find that its database is a directory, and end
    assert cli.main(["--config", str(path), "--db", str(path.parent)]) == 78
    said = capsys.readouterr().err
    assert said.startswith(f"oqc: {path}: {line}") and says in said
    assert said.count("\n") == 1


def test_an_ini_file_without_a_runtime_for_verbatim_ends_the_server_with_78(ini, tmp_path):
    path = ini("[runtime a]\ncommand = true\nmodes = simulation\n")
    ran = subprocess.run([sys.executable, "-m", "oqc", "--config", path], cwd=tmp_path, check=False,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                         text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (78, "")
    assert "no runtime serves the mode verbatim" in ran.stderr and ran.stderr.count("\n") == 1


def test_runtimes_share_a_mode_oldest_first_and_a_slow_job_delays_no_other_mode(serve, gate):
    one, other = gate(), gate()
    server = serve("--runtime", f"one={one.command}", "--runtime", f"other={other.command}")
    jobs = [server.add(mode="verbatim") for _ in range(4)]
    begun = [one.wait()[:3], other.wait()[:3]]
    assert sorted(begun) in ([(1, 1, "one"), (2, 1, "other")], [(1, 1, "other"), (2, 1, "one")])
    others = [server.wait(server.add(mode=mode)) for mode in ("simulation", "echo")]
    assert {job["status"] for job in others} == {"Success"}
    shown = server.runtime("one")
    assert (shown["state"], shown["running"]) == ("busy", [begun[0][0]])
    other.give()
    assert other.wait()[:3] == (3, 1, "other")
    one.give(3)
    assert one.wait()[:3] == (4, 1, "one")
    one.give()
    other.give()
    ends = [(job["runtime"], job["return_code"]) for job in map(server.wait, jobs)]
    assert sorted(ends[:2]) == [("one", 3), ("other", 0)] and ends[2:] == [("other", 0), ("one", 0)]
    until(server, lambda: server.runtime("one")["ended"] == 2)
    assert server.runtime("one")["failures"] == 1


def test_runtimes_inherit_neither_secrets_nor_what_somebody_left_open_for_the_server(serve):
    command = ("sh", "-c", 'exec 7</dev/null; exec "$0" "$@"', sys.executable, "-m", "oqc")
    secret = "lab's secret"
    server = serve("--runtime", f"qpu={RUNTIMES}/tells", command=command,
                   environment={"OQC_API_KEY": secret})
    job = {"job": "X(90)", "mode": "verbatim"}
    assert server.request("POST", "/jobs/add/", job, key=secret).status == 201
    assert server.request("GET", "/jobs/1/?wait=20", key=secret).json["status"] == "Success"
    given = server.request("GET", "/jobs/1/result/", key=secret).json
    environment = given["environment"]
    assert given["descriptors"] == [0, 1, 2]
    assert not any(secret in value for value in environment.values())
    assert not any(name in environment for name in ("OQC_API_KEY", "OQC_DB", "OQC_CONFIG"))


# Timeouts and floods

HOSTILE = {                 # a command, and how its job ends; every timeout is that of the section
    "ignores TERM": (f"{RUNTIMES}/ignores-term", 124),
    "has children that hold its pipes": (f"{RUNTIMES}/leaves-children sleep 60", 124),
    "ends and leaves children": (f"{RUNTIMES}/leaves-children true", 0),
    "never reads its input": (f"{RUNTIMES}/never-reads", 124),
    "closes its output and goes on": (f"{RUNTIMES}/closes-output sleep 60", 124),
    "writes for ever": ("cat /dev/zero", 124),
}


def pipes(pid):
    """How many pipes and pidfds a process has open."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(descriptor))
    return sum("pipe:" in link or "pidfd" in link for link in links)


def test_hostile_runtimes_end_on_time_and_leave_no_process_no_thread_and_no_pipe(serve, ini):
    names = [f"r{place}" for place in range(len(HOSTILE))]
    server = serve("--kill-grace", "0.1", "--config", ini("".join(
        f"[runtime {name}]\ncommand = {command}\ntimeout = 0.2\n"
        for name, (command, _) in zip(names, HOSTILE.values()))))
    pid = server.process.pid
    for name in names:
        server.request("POST", f"/runtimes/{name}/pause/")
    before = ()
    for name, (_, code) in zip(names, HOSTILE.values()):
        server.request("POST", f"/runtimes/{name}/resume/")
        job = server.add(mode="verbatim")
        ended = server.wait(job)
        assert (ended["runtime"], ended["return_code"]) == (name, code)
        error, _, about_the_result = (ended["runtime_error"] or "").partition("; ")
        assert error == ("took longer than its timeout of 0.2 s" if code else "")
        assert not about_the_result or "result_bytes" in about_the_result, "of one that floods"
        assert server.children() == []
        server.request("POST", f"/runtimes/{name}/pause/")
        # some are made at the first runtime, and a request may take a new thread of the pool
        before = before or (memory(pid, "Threads"), pipes(pid))
    assert pipes(pid) == before[1]
    assert memory(pid, "Threads") < before[0] + len(names) - 1


@pytest.mark.parametrize(
    "size", [100_000_000, pytest.param(1_000_000_000, marks=pytest.mark.slow)], ids=str)
def test_a_flood_on_both_pipes_is_read_in_bounded_memory(serve, size):
    server = serve("--runtime", f"qpu={RUNTIMES}/floods {size} {size} sh -c 'echo end >&2; exit 3'")
    server.wait(server.add())
    before = memory(server.process.pid, "VmHWM")
    job = server.wait(server.add(mode="verbatim"))
    error, _, about_the_result = job["runtime_error"].partition("; ")
    assert "result_bytes" in about_the_result
    assert (job["return_code"], error[-3:], len(error)) == (3, "end", 2047)
    assert memory(server.process.pid, "VmHWM") - before < 16 << 10
    assert len(server.result(job).body) == (1 << 20) + 1


def test_big_jobs_and_results_pass_whole(serve, script):
    server = serve("--runtime", f"qpu={script('cat; exit 0')}")
    text = ", ".join(["X(90)"] * 100_000)
    job = server.add(text, "verbatim")
    server.wait(job)
    assert server.result(job).body == text.encode() + b"\n"
    big = server.add(", ".join(["X(90)"] * 450_000), "verbatim")
    assert server.wait(big)["return_code"] == 76
    assert len(server.result(big).body) == (1 << 20) + 1        # the first MiB of it, and a newline


# Runtimes over lines, on a server

def python(tmp_path, name, text):
    """The command of a Python program with these lines."""
    program = tmp_path / f"{name}.py"
    program.write_text("import json, os, sys\n" + text, encoding="utf-8")
    return f"{sys.executable} {program}"


UNTIDY = r"""
print("QDriver 1.2 connected")
print('{"ready": true, "device": {"name": "fridge"}}')
for line in sys.stdin:
    question = json.loads(line)
    print("\r50 %\r100 %", end="")
    print("warning: warm", file=sys.stderr, flush=True)
    result = question["job"]
    if result == "X(90)":
        result = float("nan")
    for _ in range(2):
        answer = {"id": question["id"], "return_code": 0, "result": result}
        print(json.dumps(answer), flush=True)
"""


def test_a_sweep_through_a_runtime_that_answers_twice_gives_each_job_its_own_result(
        serve, ini, tmp_path):
    command = python(tmp_path, "untidy", UNTIDY)
    server = serve("--config", ini(f"[runtime qpu]\ncommand = {command}\nprotocol = lines\n"))
    sweep = [{"job": f"X({angle})", "mode": "verbatim"} for angle in range(181)]
    jobs = server.request("POST", "/jobs/add/", sweep).json
    for job in jobs:
        ended = server.wait(job)
        if job["job"] == "X(90)":
            assert ended["return_code"] == 76 and "NaN" in server.result(job).body.decode()
        else:
            assert (ended["status"], server.result(job).json) == ("Success", job["job"])
    assert server.runtime("qpu")["device"] == {"name": "fridge"}
    assert server.log.count("an answer that nobody asked for") == 1


def test_a_runtime_whose_answers_have_no_id_is_paused_and_starts_anew_when_it_is_resumed(
        serve, ini, tmp_path):
    without = "for line in sys.stdin:\n    print('{\"return_code\": 0}', flush=True)\n"
    command = python(tmp_path, "forgets", without)
    server = serve("--config", ini(f"[runtime qpu]\ncommand = {command}\nprotocol = lines\n"))
    job = {"job": "X(9)", "mode": "verbatim"}
    first, *others = server.request("POST", "/jobs/add/", [job] * 100).json
    assert server.wait(first)["return_code"] == 76
    shown = server.runtime("qpu")
    assert (shown["state"], shown["ended"]) == ("paused", 1)
    assert shown["reason"] == ("its answers do not carry the id of their question, "
                               "see help runtimes")
    python(tmp_path, "forgets", "for line in sys.stdin:\n    number = json.loads(line)['id']\n"
           "    print(json.dumps({'id': number, 'return_code': 0}), flush=True)\n")
    assert server.request("POST", "/runtimes/qpu/resume/").status == 200
    assert {server.wait(other)["status"] for other in others} == {"Success"}


def test_health_says_that_a_warm_runtime_does_not_start_before_a_job_does(serve, ini, tmp_path):
    command = python(tmp_path, "connects", f"""
if not os.path.exists({str(tmp_path / 'cable')!r}):
    sys.exit('no device')
print('{{"ready": true}}', flush=True)
for line in sys.stdin:
    pass
""")
    server = serve("--config", ini(
        f"[runtime qpu]\ncommand = {command}\nprotocol = lines\nwarm = yes\n"))
    server.line("runtime qpu is set aside")
    answer = server.request("GET", "/health/")
    assert (answer.status, server.runtime("qpu")["reason"]) == (503, "no device")
    (tmp_path / "cable").touch()
    server.line("runtime qpu starts again")
    assert server.request("GET", "/health/").status == 200


# Retries

def test_a_busy_runtime_puts_its_job_into_retrying_and_the_job_tells_the_true_story(serve, gate):
    qpu = gate()
    server = serve("--runtime", f"qpu={qpu.command}")
    job = server.add(mode="verbatim")
    assert (job["status"], job["runtime"]) == ("Starting", None)
    assert (job["start_time"], job["end_time"]) == (None, None)
    assert qpu.wait()[:2] == (1, 1)
    running = server.get(job)
    assert (running["status"], running["runtime"]) == ("Starting", "qpu")
    assert running["return_code"] is None
    assert running["start_time"]
    qpu.give(75)
    assert qpu.wait()[:2] == (1, 2)
    again = server.get(job)
    assert (again["status"], again["runtime"], again["return_code"]) == ("Retrying", "qpu", None)
    assert again["start_time"] > running["start_time"]
    qpu.give()
    ended = server.wait(job)
    assert told(ended) == ("Success", 0, None)
    assert ended["created_time"] <= again["start_time"] == ended["start_time"] <= ended["end_time"]


def test_retry_codes_and_signals_are_tried_again_and_other_codes_are_not(serve, ini, script):
    play = script('case "$OQC_JOB_ID.$OQC_ATTEMPT" in\n'
                  '1.1) exit 7;; 2.1) kill -9 $$;; 3.*) exit 75;; esac\n'
                  'echo "attempt $OQC_ATTEMPT"')
    server = serve("--config", ini(
        f"[runtime qpu]\ncommand = {play}\nretry_codes = 7\nslots = 3\n"))
    jobs = [server.add(mode="verbatim") for _ in range(3)]
    assert [told(job) for job in map(server.wait, jobs)] == [
        ("Success", 0, None), ("Success", 0, None), ("Runtime Error", 75, "exit status 75")]
    assert [server.result(job).body for job in jobs] == [b"attempt 2\n", b"attempt 2\n", b"null\n"]


def test_an_echo_gives_the_return_code_that_was_asked_for_and_75_the_path_of_a_busy_runtime(server):
    assert told(server.wait(server.add())) == ("Success", 0, None)
    for code in (3, 255):
        echo = server.wait(server.add(return_code=code))
        assert told(echo) == ("Runtime Error", code, f"echo of return code {code}")
    busy = server.add(return_code=75)
    until(server, lambda: server.get(busy)["status"] == "Retrying")
    assert server.request("DELETE", f"/jobs/{busy['id']}/").status == 200
    for mode, code in (("verbatim", 3), ("simulation", 0), ("echo", 256), ("echo", -1),
                       ("echo", "3"), ("echo", True)):
        body = {"job": "X(90)", "mode": mode, "return_code": code}
        answer = server.request("POST", "/jobs/add/", body)
        assert answer.status == 400 and "return_code" in answer.detail


def test_a_runtime_that_does_not_start_is_set_aside_and_another_takes_over_until_it_is_back(
        serve, tmp_path, gate):
    cable, qpu = tmp_path / "qpu-2", gate()
    cable.write_text("#!/nowhere/sh\n")
    cable.chmod(0o755)
    server = serve("--runtime", f"qpu-1={qpu.command}", "--runtime", f"qpu-2={cable}")
    jobs = [server.add(mode="verbatim") for _ in range(4)]
    held = qpu.wait()[0]                # qpu-1 is busy with one, qpu-2 cannot start the others
    assert "qpu-2 is set aside: it failed to start 3 times in a row" in server.line("set aside")
    assert server.runtime("qpu-2")["state"] == "failing"
    cable.write_text("#!/bin/sh\nexit 0\n")
    server.line("qpu-2 starts again")
    others = [server.wait(job) for job in jobs if job["id"] != held]
    assert {(job["runtime"], job["status"]) for job in others} == {("qpu-2", "Success")}
    qpu.give()
    assert server.wait(held)["runtime"] == "qpu-1"
    assert server.log.count("set aside") == 1
    assert server.runtime("qpu-2")["state"] == "idle"


# Restart

def test_kill_9_leaves_no_runtime_and_no_grandchild_and_jobs_run_again_in_order(
        serve, gate, ini, script, tmp_path):
    qpu, deaf_now = gate(), tmp_path / "deaf-now"
    os.mkfifo(deaf_now)
    deaf_one = script(f"trap '' TERM; sleep 60 & echo $$ >{deaf_now}; wait")
    flags = ("--config", ini(f"[runtime qpu]\ncommand = {qpu.command}\nslots = 2\n"
                             "[runtime deaf]\n"
                             f"command = {RUNTIMES}/leaves-children {deaf_one}\n"))
    server = serve(*flags)
    server.request("POST", "/runtimes/qpu/pause/")
    deaf = server.add(mode="verbatim")
    deaf_now.read_bytes()
    assert server.get(deaf)["runtime"] == "deaf"
    server.request("POST", "/runtimes/deaf/pause/", {"reason": "deaf"})
    assert len(server.children()) == 4              # it and its children
    server.request("POST", "/runtimes/qpu/resume/")
    jobs = [server.add(mode="verbatim") for _ in range(4)]
    assert {qpu.wait()[:2], qpu.wait()[:2]} == {(2, 1), (3, 1)}
    watched = watch(server.children())
    assert len(watched) >= 6
    server.stop(signal.SIGKILL)
    assert all_gone(watched, 5)
    server = serve(*flags)
    assert server.log.count("was running on") == 3
    assert sorted([qpu.wait()[:2], qpu.wait()[:2]]) == [(1, 2), (2, 2)]
    qpu.give()
    qpu.give()
    assert sorted([qpu.wait()[:2], qpu.wait()[:2]]) == [(3, 2), (4, 1)]
    assert {server.get(job)["status"] for job in jobs[1:3]} == {"Retrying", "Starting"}
    for _ in range(3):
        qpu.give()
    assert [server.wait(job)["status"] for job in [deaf, *jobs]] == ["Success"] * 5


def test_a_job_that_ran_is_ended_after_kill_9_if_its_runtime_says_so(serve, gate, ini):
    qpu = gate()
    flags = ("--config", ini(f"[runtime qpu]\ncommand = {qpu.command}\ninterrupted = fail\n"))
    server = serve(*flags)
    job = server.add(mode="verbatim")
    qpu.wait()
    server.stop(signal.SIGKILL)
    server = serve(*flags)
    assert told(server.get(job)) == ("Runtime Error", 137, "interrupted, outcome unknown")


def test_a_job_during_which_the_server_is_killed_each_time_ends_after_its_last_attempt(serve, gate):
    qpu = gate()
    for attempt in range(1, 6):
        server = serve("--runtime", f"qpu={qpu.command}")
        if attempt == 1:
            server.add(mode="verbatim")
        assert qpu.wait()[:2] == (1, attempt)
        server.stop(signal.SIGKILL)
    server = serve("--runtime", f"qpu={qpu.command}")
    assert told(server.get(1)) == ("Runtime Error", 137, "interrupted, outcome unknown")


# Cancelling

def test_a_job_can_be_cancelled_while_it_waits_runs_or_is_to_be_tried_again_and_not_once_it_ended(
        serve, gate):
    qpu = gate()
    server = serve("--runtime", f"qpu={qpu.command}")
    running, waiting = server.add(mode="verbatim"), server.add(mode="verbatim")
    pid = qpu.wait()[3]
    for job in (waiting, running):
        answer = server.request("DELETE", f"/jobs/{job['id']}/")
        assert (answer.status, told(answer.json)) == (200, CANCELLED)
        assert answer.json == server.get(job)
        assert bool(answer.json["start_time"]) == (job is running)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)                 # its process group has ended
    retrying = server.add(mode="verbatim")
    qpu.wait()
    qpu.give(75)
    until(server, lambda: server.get(retrying)["status"] == "Retrying")
    answer = server.request("DELETE", f"/jobs/{retrying['id']}/")
    assert (answer.status, told(answer.json)) == (200, CANCELLED)
    for job in (running, waiting, retrying):
        answer = server.request("DELETE", f"/jobs/{job['id']}/")
        assert (answer.status, answer.headers["Content-Type"]) == (409, "application/problem+json")
        assert answer.detail == f"job {job['id']} has ended: Runtime Error"
    for number in (99, 0, "07", 2 ** 63, "x"):
        answer = server.request("DELETE", f"/jobs/{number}/")
        assert (answer.status, answer.body) == (404, b"0\n")
    assert server.children() == []


def test_of_a_job_that_ends_while_it_is_cancelled_exactly_one_wins_and_the_job_says_which(
        serve, gate):
    qpu = gate()
    server = serve("--runtime", f"qpu={qpu.command}")
    for number in range(1, 41):
        job, answers, both = server.add(mode="verbatim"), queue.SimpleQueue(), threading.Barrier(2)
        assert qpu.wait()[0] == number

        def cancel(number=number, answers=answers, both=both):
            both.wait(20)
            answers.put(server.request("DELETE", f"/jobs/{number}/"))
        canceller = threading.Thread(target=cancel)
        canceller.start()
        both.wait(20)
        time.sleep(number % 8 / 4000)   # now before it, now after it
        qpu.give()
        answer, ended = answers.get(timeout=20), server.wait(job)
        canceller.join(20)
        if answer.status == 200:
            assert (answer.json, told(ended)) == (ended, CANCELLED)
        else:
            assert (answer.status, told(ended)) == (409, ("Success", 0, None))
        qpu.take_back()                 # what it did not take


# Maintenance

def test_a_pause_shows_its_reason_lets_the_running_job_end_and_survives_a_restart(serve, gate):
    qpu = gate()
    server = serve("--runtime", f"qpu={qpu.command}")
    first, second = server.add(mode="verbatim"), server.add(mode="verbatim")
    qpu.wait()
    paused = server.request("POST", "/runtimes/qpu/pause/", {"reason": "cable"})
    assert paused.status == 200
    assert (paused.json["state"], paused.json["reason"]) == ("paused", "cable")
    assert paused.json["running"] == [1]
    qpu.give()
    assert server.wait(first)["status"] == "Success"
    assert server.stop() == 0
    server = serve("--runtime", f"qpu={qpu.command}")
    shown = server.runtime("qpu")
    assert (shown["state"], shown["reason"]) == ("paused", "cable")
    assert shown["since"] == paused.json["since"]
    assert server.get(second)["start_time"] is None
    resumed = server.request("POST", "/runtimes/qpu/resume/")
    assert resumed.status == 200
    assert resumed.json["state"] in ("idle", "busy") and resumed.json["reason"] is None
    qpu.wait()
    qpu.give()
    assert server.wait(second)["status"] == "Success"


def test_pausing_takes_no_body_or_a_reason_and_a_runtime_that_is_there(serve):
    server = serve()
    reason = "\u00e9\U0001f527"
    for body, shown in ((None, ""), (b"", ""), (b" \n", ""), ({}, ""), ({"reason": ""}, ""),
                        ({"reason": reason}, reason)):
        answer = server.request("POST", "/runtimes/emulator/pause/", body)
        assert (answer.status, answer.json["reason"]) == (200, shown)
    for body in (b"x", [], {"reason": 5}, {"cause": "x"}, {"reason": "x" * 2000}):
        assert server.request("POST", "/runtimes/emulator/pause/", body).status == 400
    for action in ("pause", "resume"):
        answer = server.request("POST", f"/runtimes/no-such/{action}/")
        assert answer.status == 404 and "no runtime has this name" in answer.detail


# Stopping

def test_sigterm_refuses_new_jobs_answers_reads_starts_nothing_and_lets_running_jobs_end(
        serve, gate):
    qpu = gate()
    server = serve("--runtime", f"qpu={qpu.command}", "--drain", "60")
    running, waiting = server.add(mode="verbatim"), server.add(mode="verbatim")
    qpu.wait()
    server.process.send_signal(signal.SIGTERM)
    server.line("stopping")
    refused = server.request("POST", "/jobs/add/", {"job": "X(90)", "mode": "echo"})
    assert (refused.status, refused.headers["Content-Type"]) == (503, "application/problem+json")
    assert int(refused.headers["Retry-After"]) > 0
    assert server.get(running)["runtime"] == "qpu"
    assert [job["id"] for job in server.request("GET", "/jobs/list/").json] == [1, 2]
    assert server.runtime("qpu")["running"] == [1]
    qpu.give()
    assert server.process.wait(30) == 0
    server = serve("--runtime", f"qpu={qpu.command}")
    assert server.get(running)["status"] == "Success"
    assert qpu.wait()[:2] == (waiting["id"], 1)
    qpu.give()
    assert server.wait(waiting)["status"] == "Success"


@pytest.mark.parametrize("drain, signals", [("0.05", 1), ("600", 2)],
                         ids=["after --drain", "at a second signal"])
def test_a_job_that_is_killed_by_a_stop_runs_again_at_the_next_start(serve, gate, drain, signals):
    qpu = gate()
    server = serve("--runtime", f"qpu={qpu.command}", "--drain", drain)
    job = server.add(mode="verbatim")
    watched = watch([qpu.wait()[3], *server.children()])
    for _ in range(signals):
        server.process.send_signal(signal.SIGTERM)
        server.line("stopping")
    assert server.process.wait(30) == 0
    assert all_gone(watched)
    assert "stopped" in server.line("stopped")
    server = serve("--runtime", f"qpu={qpu.command}")
    assert qpu.wait()[:2] == (1, 1)     # the attempt that was cut off is not counted
    qpu.give()
    assert told(server.wait(job)) == ("Success", 0, None)


def test_a_stop_ends_idle_runtimes_over_lines_too(serve):
    server = serve()
    server.wait(server.add(mode="verbatim"))
    watched = watch(server.children())
    assert watched
    assert server.stop() == 0
    assert all_gone(watched)
