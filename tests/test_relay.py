"""The relay: by its pipes, and behind a real ssh and sshd, on loopback and with keys of its own."""
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import PROGRAM, ROOT, command_line, need, until

QUESTION = {
    "id": 7, "job": "X(90)", "mode": "verbatim", "attempt": 2, "shots": 10, "seed": 5,
    "timeout": 30.0, "submitter": "alice", "tag": "sweep-1", "note": {"t": 1}}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OQC_SECRET": "here"}
# Says which processes the attempt has, one of which has left its session, and stays.
STAYS = ("setsid sleep 300 >/dev/null 2>&1 &\necho $$ $! >$(dirname $0)/up\n"
         "trap '' TERM\nsleep 300 & wait; sleep 300")


class Relay:
    """`python -m oqc relay`, and what comes over its pipes."""

    def __init__(self, folder, *arguments, before=()):
        self.process = subprocess.Popen(
            [*before, *PROGRAM, "relay", *arguments], cwd=folder, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.answer() == {"ready": True}

    def write(self, line):
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def ask(self, **members):
        """The answer to a question with these members."""
        self.put(**members)
        return self.answer()

    def put(self, **members):
        self.write(json.dumps({**QUESTION, **members}).encode())

    def close(self):
        """Close its input; its exit status, what it said since on standard output and error."""
        process = self.process
        with process.stdout, process.stderr:
            process.stdin.close()
            return process.wait(20), process.stdout.read(), process.stderr.read()


@pytest.fixture
def relay(tmp_path):
    """relay(*arguments): a new relay, in a folder that all of a test share."""
    started = []

    def start(*arguments, **options):
        started.append(Relay(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if not one.process.stdout.closed:
            one.close()


@pytest.fixture
def up(tmp_path):
    """up(): the processes of the next attempt that says so."""
    os.mkfifo(tmp_path / "up")
    return lambda: [int(pid) for pid in (tmp_path / "up").read_text(encoding="ascii").split()]


def gone(pids):
    return not any(map(command_line, pids))


# An attempt

def test_the_program_gets_the_job_and_the_environment_and_nothing_of_ours(relay, script):
    text = "cat; env | grep -E '^(OQC|QRMI)' | sort; echo $* >&2"
    far = relay("--name", "qpu", script(text), "-v")
    answer = far.ask()
    lines = answer.pop("result").splitlines()
    assert answer == {"id": 7, "return_code": 0, "runtime_error": None}
    assert lines[0] == "X(90)"
    assert [line for line in lines[1:] if not line.startswith("OQC_MARK=")] == [
        "OQC_ATTEMPT=2", "OQC_JOB_ID=7", "OQC_MODE=verbatim", 'OQC_NOTE={"t": 1}',
        "OQC_RUNTIME=qpu", "OQC_SEED=5", "OQC_SHOTS=10", "OQC_SUBMITTER=alice", "OQC_TAG=sweep-1",
        "OQC_TIMEOUT=30", "QRMI_JOB_QPU_RESOURCES=qpu"]
    assert far.ask(id=8)["id"] == 8
    assert far.close() == (0, b"", b"-v\n-v\n")


@pytest.mark.parametrize("text, answer", [
    ("echo '{\"a\": [1,\n2]}'", (0, None, {"a": [1, 2]})),
    ("echo no JSON", (0, None, "no JSON\n")),
    ("echo 1e999", (0, None, "1e999\n")),
    ("echo '\"\\ud800\"'", (0, None, "\ud800")),
    ("exit 3", (3, "exit status 3", None)),
    ("echo part; echo why >&2; exit 75", (75, "why", "part\n")),
    ("echo why >&2; kill -SEGV $$", (139, "died of SIGSEGV; why", None)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_an_attempt_ends_as_one_over_exec_does(relay, script, text, answer):
    said = relay(script(text)).ask()
    assert (said["return_code"], said["runtime_error"], said["result"]) == answer


def test_a_program_that_cannot_be_started_is_an_answer_that_says_why(relay, tmp_path):
    (tmp_path / "not-executable").write_text("#!/bin/sh\n", encoding="ascii")
    for command, code, reason in (("./no-such", 127, "./no-such: not found"),
                                  ("./not-executable", 126, "Permission denied")):
        answer = relay(command).ask()
        assert answer["return_code"] == code
        assert answer["runtime_error"].startswith("could not be started: ")
        assert reason in answer["runtime_error"]


@pytest.mark.parametrize("line, number, reason", [
    (b"X(90)", None, "Expecting value"),
    (b"\xff", None, "'utf-8' codec"),
    (b"[" * 100_000, None, ""),
    (b'{"id": 4, "job": "X(90"}', 4, "job: at character 5"),
    (b'{"id": 4, "job": "X(90)", "timeout": NaN}', None, "NaN is not JSON"),
    (b'{"id": 4, "job": "X(90)", "timeout": "1"}', 4, "id and attempt are whole numbers"),
    (b'{"id": 4, "job": "X(90)", "timeout": 0}', 4, "timeout: expected more than 0"),
], ids=lambda value: str(value)[:20])
def test_what_is_no_job_is_65_and_the_next_is_answered(relay, line, number, reason):
    far = relay("cat")
    far.write(line)
    answer = far.answer()
    assert (answer["id"], answer["return_code"]) == (number, 65)
    assert answer["runtime_error"].startswith(f"not a job: {reason}")
    assert far.ask()["result"] == "X(90)\n"


def test_by_hand_a_job_is_enough(relay, script):
    far = relay(script("echo $OQC_MODE $OQC_SHOTS $OQC_SEED $OQC_ATTEMPT $OQC_TIMEOUT"))
    far.write(b'{"job": "X(90)"}')
    assert far.answer()["result"] == "verbatim 1000 0 1 60\n"


def test_what_the_program_writes_on_standard_error_comes_as_it_is_written(
        relay, script, tmp_path):
    os.mkfifo(tmp_path / "go on")
    far = relay(script(f"echo warm >&2; read -r line <'{tmp_path}/go on'; echo cold >&2; exit 3"))
    far.put()
    assert far.process.stderr.readline() == b"warm\n"
    (tmp_path / "go on").write_text("now\n", encoding="ascii")
    assert far.answer()["runtime_error"] == "cold"
    assert far.process.stderr.readline() == b"cold\n"


@pytest.mark.slow
def test_a_standard_error_that_nobody_reads_holds_no_timeout_up(relay, script):
    far = relay(script("yes 'the fridge is warm' >&2"))
    assert far.ask(timeout=0.5)["return_code"] == 124


def test_a_result_of_eight_mebibytes_is_handed_on_the_server_judges(relay, script):
    result = relay(script(f"head -c {8 << 20} /dev/zero | tr '\\0' 0")).ask()["result"]
    assert result == (8 << 20) * "0"


# Its end

def test_a_timeout_of_the_question_ends_all_that_the_program_has_started(relay, script, up):
    far = relay("--kill-grace", "0.1", script(STAYS))
    far.put(timeout=0.5)
    left = up()
    assert far.answer() == {"id": 7, "return_code": 124, "result": None,
                            "runtime_error": "took longer than its timeout of 0.5 s"}
    assert len(left) == 2 and gone(left)


@pytest.mark.parametrize("number", [None, signal.SIGINT], ids=["input", "Ctrl-C"])
def test_a_closed_input_or_an_interrupt_ends_all_of_it(relay, script, up, number):
    far = relay("--kill-grace", "0.1", script(STAYS))
    far.put()
    left = up()
    far.put(id=8)                           # and is not begun
    if number:
        far.process.send_signal(number)
        assert far.process.wait(20) == 0
    assert far.close() == (0, b"", b"")
    assert len(left) == 2 and gone(left)


def test_signals_that_were_ignored_for_the_relay_count_again(relay, script):
    far = relay(script("exec grep -E 'Sig(Blk|Ign)' /proc/self/status"), before=(
        "sh", "-c", "trap '' HUP INT QUIT USR1 CHLD; exec \"$0\" \"$@\""))
    assert [int(line.split()[1], 16) for line in far.ask()["result"].splitlines()] == [0, 0]


# The lock

def test_the_next_relay_waits_until_nothing_is_left_of_one_that_was_killed(
        relay, script, tmp_path, up):
    os.mkfifo(tmp_path / "go on")
    stays = script(f"trap 'read -r line <\"{tmp_path}/go on\"; exit' TERM\n"
                   f"echo $$ >{tmp_path}/up; sleep 300 & wait")
    first = relay(stays)
    first.put()
    left = up()
    first.process.kill()
    second = relay("--lock", "./oqc-relay.lock", script("echo ran"))
    second.put()
    assert second.process.stderr.readline() == (
        b"oqc relay: waiting: another relay's program is not over, it holds ./oqc-relay.lock\n")
    assert not gone(left)
    (tmp_path / "go on").write_text("now\n", encoding="ascii")
    assert second.answer()["result"] == "ran\n"
    assert gone(left)


def test_a_lock_that_is_not_to_be_had_in_time_is_busy_and_another_file_is_free(
        relay, script, up):
    stays = script(STAYS)
    first = relay("--kill-grace", "0.1", stays)
    first.put()
    left = up()
    second = relay("cat")
    assert second.ask(timeout=0.2) == {
        "id": 7, "return_code": 75, "result": None,
        "runtime_error": "busy: another relay's program is not over, it holds oqc-relay.lock"}
    assert relay("--lock", "other.lock", "cat").ask()["return_code"] == 0
    second.put()
    assert b"waiting: another" in second.process.stderr.readline()
    second.process.stdin.close()
    assert second.process.wait(20) == 0     # it waits no more
    assert not gone(left)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
def test_the_lock_is_held_as_long_as_something_is_left_that_may_not_be_killed(
        relay, script, tmp_path, up):
    sleeper = script(f"echo $$ >{tmp_path}/up; exec sleep 300")
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    (tmp_path / "up").chmod(0o666)
    program = script("[ $OQC_JOB_ID != 7 ] || "
                     f"exec setpriv --reuid=65534 --clear-groups {sleeper}\necho ran")
    first = relay("--kill-grace", "0.1", program, before=(
        "setpriv", "--bounding-set=-kill", "--inh-caps=-kill"))
    first.put(timeout=0.5)
    pid, = up()
    try:
        assert first.answer()["return_code"] == 124
        refused = first.ask(id=8, timeout=0.2)
        assert (refused["return_code"], refused["runtime_error"]) == (
            75, f"busy: process {pid} (sleep) of an earlier attempt cannot be ended")
        first.process.stdin.close()
        second = relay(program)
        second.put(id=9)
        assert b"waiting: another" in second.process.stderr.readline()
        assert first.process.poll() is None
    finally:
        os.kill(pid, signal.SIGKILL)
    assert second.answer()["result"] == "ran\n"
    status, _, error = first.close()
    assert (status, error.decode()) == (
        0, f"oqc relay: waiting: process {pid} (sleep) of an earlier attempt cannot be ended\n")


def test_between_two_jobs_the_lock_is_free(relay):
    first = relay("cat")
    second = relay("cat")
    for far in (first, second, first, second):
        assert far.ask()["return_code"] == 0
    assert first.close() == second.close() == (0, b"", b"")


def test_wrong_usage_is_told_at_once(tmp_path):
    for arguments, status, reason in (
            ((), 2, "COMMAND"), (("--name", "a:b", "cat"), 2, "--name"),
            (("--kill-grace", "-1", "cat"), 2, "--kill-grace"),
            (("--lock", "no/such/file", "cat"), 1,
             "oqc relay: no/such/file: No such file or directory; --lock names another file\n")):
        ran = subprocess.run([*PROGRAM, "relay", *arguments], cwd=tmp_path, env=ENVIRONMENT,
                             stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (status, "")
        assert reason in ran.stderr


# Behind ssh

SSHD = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""


@pytest.fixture(scope="module", name="ssh")
def fixture_ssh(tmp_path_factory):
    """The words of an ssh to a real sshd on this machine, but for its command."""
    need("ssh", "ssh-keygen", "sshd")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name],
                       check=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "config").write_text(SSHD.format(port=port, folder=folder), encoding="utf-8")
    if not os.getuid():
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)      # it wants an empty root to live in
    program = shutil.which("sshd", path="/usr/sbin:" + os.environ["PATH"])
    with subprocess.Popen([program, "-D", "-e", "-f", folder / "config"], stdin=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as daemon:
        said = []
        for line in daemon.stderr:
            said.append(line)
            if "listening on" in line:
                break
        else:
            pytest.fail("".join(said))
        threading.Thread(target=daemon.stderr.read, daemon=True).start()
        yield ("ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15",
               "-o", "ControlPath=none", "-o", "StrictHostKeyChecking=accept-new",
               "-o", f"UserKnownHostsFile={folder}/known", "-i", f"{folder}/user",
               "-p", str(port), "127.0.0.1")
        daemon.terminate()


@pytest.fixture
def lab(serve, ssh, tmp_path):
    """lab(script): a server whose verbatim jobs go by ssh to a relay of this script."""
    def start(program, *flags, keys="", grace="0.1"):
        far = tmp_path / "far"
        far.mkdir()
        program = shlex.join([*PROGRAM, "relay", "--kill-grace", grace, "--name", "qpu", program])
        remote = f"cd {shlex.quote(str(far))} && PYTHONPATH={ROOT} {program}"
        command = shlex.join([*ssh, remote])
        (tmp_path / "lab.ini").write_text(
            f"[runtime qpu]\ncommand = {command}\nprotocol = lines\n{keys}\n", encoding="utf-8")
        return serve("--config", tmp_path / "lab.ini", *flags)
    return start


def log(server, job):
    """What the runtimes of a job wrote on standard error."""
    return server.request("GET", f"/jobs/{job['id']}/log/").body.decode()


def test_behind_ssh_a_job_gets_there_with_its_environment_and_its_result_and_error_come_back(
        lab, script):
    server = lab(script(
        'read -r job\necho "$SSH_CONNECTION" | cut -c 1-9 >&2\n[ "$job" != "Z(0)" ] || exit 3\n'
        'echo "[\\"$job\\", $OQC_SHOTS, $OQC_SEED, $OQC_ATTEMPT, $OQC_JOB_ID, \\"$OQC_TAG\\"]"'))
    job = server.add("X(90), Y(1)", mode="verbatim", shots=7, seed=8, tag="sweep")
    assert server.wait(job)["return_code"] == 0
    assert server.result(job).json == ["X(90), Y(1)", 7, 8, 1, job["id"], "sweep"]
    failed = server.wait(server.add("Z(0)", mode="verbatim"))
    assert (failed["return_code"], failed["runtime_error"]) == (3, "127.0.0.1")
    assert "\n127.0.0.1\n" in log(server, job)


@pytest.mark.parametrize("end, code", [("cancel", 130), ("timeout", 124), ("stop", None)])
def test_behind_ssh_nothing_is_left_there_after_a_cancel_a_timeout_and_a_stop(
        lab, script, up, end, code):
    server = lab(script(STAYS), "--drain", "0", keys="timeout = 1" if end == "timeout" else "")
    job = server.add(mode="verbatim")
    left = up()
    assert not gone(left)
    if end == "cancel":
        assert server.request("DELETE", f"/jobs/{job['id']}/").status == 200
    elif end == "stop":
        assert server.stop() == 0
    if code:
        assert server.wait(job)["return_code"] == code
    until(lambda: gone(left))


def test_behind_ssh_the_next_attempt_begins_when_nothing_is_left_of_a_connection_that_was_cut(
        lab, script, tmp_path, up):
    os.mkfifo(tmp_path / "go on")
    server = lab(script(
        f"cd '{tmp_path}'\n"
        "if [ $OQC_ATTEMPT = 2 ]; then\nread -r old <old\n"
        "if kill -0 $old; then echo both; else echo alone; fi; exit; fi\n"
        "trap 'read -r line <\"go on\"; exit' TERM\n"
        "echo $$ >old; echo $$ >up; sleep 300 & wait"), grace="20")
    job = server.add(mode="verbatim")
    left = up()
    ssh, = [pid for pid in server.children() if command_line(pid).startswith(b"ssh\0")]
    os.kill(ssh, signal.SIGKILL)
    until(lambda: "oqc relay: waiting: " in log(server, job))
    assert not gone(left)
    (tmp_path / "go on").write_text("now\n", encoding="ascii")
    assert server.wait(job)["return_code"] == 0
    assert server.result(job).json == "alone\n"
    assert gone(left)


@pytest.mark.slow
def test_behind_ssh_a_lock_that_is_not_to_be_had_is_an_answer_before_the_server_gives_up(
        lab, script, tmp_path):
    server = lab(script("echo ran"), keys="timeout = 10\nattempts = 1")
    with open(tmp_path / "far" / "oqc-relay.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = server.wait(server.add(mode="verbatim"))
    assert ended["return_code"] == 75
    assert ended["runtime_error"].startswith("busy: another relay's program is not over")
