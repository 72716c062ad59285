"""Life and death, on the running server: nothing of an attempt outlives it, and nothing is killed
that is not the server's."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAM, RUNTIMES, command_line, descendants, need, until

# A parent that has ignored and blocked every signal, as nohup does one of them.
IGNORING = (sys.executable, "-c", """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
""", *PROGRAM)
# A root that may not send signals to other users' processes (capabilities(7), CAP_KILL).
POWERLESS = ("setpriv", "--bounding-set=-kill", "--inh-caps=-kill", *PROGRAM)
# Nor read the environment of those, as an ordinary user's server with a setuid program.
BLIND = ("setpriv", "--bounding-set=-all,+setuid,+setgid,+dac_override,+fowner", "--inh-caps=-all",
         *PROGRAM)
# What a sh script over `lines` answers to the question in $line.
ANSWER = r"""id=${line#*\"id\": }; echo "{\"id\": ${id%%,*}, \"return_code\": 0}" """


def state(pid):
    """The state of a process, such as S or Z; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][:1]
    except OSError:
        return ""


def is_alive(pid):
    return state(pid) not in ("", "Z")


def bearers(text):
    """The processes that have a text in their environment, but for servers and keepers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return [pid for pid in found if b"oqc" not in command_line(pid)]


@pytest.fixture
def lab(serve, tmp_path):
    """lab(*flags): a server whose runtimes, and all that they start, have LAB=FOLDER."""
    servers = []

    def start(*flags, **more):
        servers.append(serve(*flags, environment={"LAB": str(tmp_path)}, **more))
        return servers[-1]

    try:
        yield start
        for server in servers:
            server.stop(signal.SIGKILL)
        until(lambda: not bearers(f"LAB={tmp_path}"))
    finally:
        for pid in bearers(f"LAB={tmp_path}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ini(folder, text):
    """The path of an INI file."""
    path = folder / "oqc.ini"
    path.write_text(text, encoding="utf-8")
    return str(path)


# Nothing outlives its attempt

ENDS = {            # how a script goes on that has left a daemon, how its job ends, its timeout
    "success": ("exit 0", 0, 60),
    "failure": ("exit 3", 3, 60),
    "timeout": ("sleep 60", 124, 0.3),
    "death": ("kill -SEGV $$", 139, 60),
}


@pytest.mark.parametrize("end, code, timeout", ENDS.values(), ids=ENDS)
def test_children_that_leave_their_session_end_with_their_attempt(
        lab, script, tmp_path, end, code, timeout):
    command = script("mkfifo $0.$$\n"
                     "setsid sh -c 'echo $$ >$0; sleep 300 & wait' $0.$$ >/dev/null 2>&1 &\n"
                     "read -r pid <$0.$$\n" + end)
    server = lab("--kill-grace", "0.1", "--config", ini(
        tmp_path, f"[runtime qpu]\ncommand = {command}\ntimeout = {timeout}\nslots = 2\n"))
    for job in [server.add(mode="verbatim") for _ in range(5)]:
        if code == 139:
            until(lambda job=job: server.get(job)["status"] == "Retrying")
            server.request("DELETE", f"/jobs/{job['id']}/")
        else:
            assert server.wait(job)["return_code"] == code
    until(lambda: not server.request("GET", "/status/").json["running"]["verbatim"])
    assert bearers(f"LAB={tmp_path}") == []
    assert server.children() == []


LEAVES = """
import os
memory = b"x" * (100 << 20)             # which it takes the kernel a while to free
if not os.fork():
    os.setsid()
    os.execvp("sleep", ["sleep", "300"])
with open("up", "w", encoding="ascii") as up:
    up.write("up")
os._exit(0)
"""


@pytest.mark.slow
def test_what_a_process_started_that_is_just_ending_itself_ends_with_the_attempt_too(
        lab, script, tmp_path):
    """Such a one bears no mark any more, and what it started is nobody's orphan yet."""
    os.mkfifo(tmp_path / "up")
    command = script(f"setsid {sys.executable} -c '{LEAVES}' >/dev/null 2>&1 &\nread -r line <up\n"
                     "exit 0")
    server = lab("--runtime", f"qpu={command}")
    for _ in range(5):
        assert server.wait(server.add(mode="verbatim"))["status"] == "Success"
        assert bearers(f"LAB={tmp_path}") == []
    assert "does not bear the server's mark" not in server.log


@pytest.mark.parametrize("protocol", ["exec", "lines"])
@pytest.mark.parametrize("how", ["cancel", "stop", "crash"])
def test_children_that_leave_their_session_end_at_a_cancel_a_stop_and_a_crash(
        lab, script, tmp_path, protocol, how):
    os.mkfifo(tmp_path / "up")
    command = script(f"setsid sh -c 'echo up >{tmp_path}/up; exec sleep 300' >/dev/null 2>&1 &\n"
                     "setsid env -i sleep 0 &\nsleep 300")
    server = lab("--drain", "0", "--config", ini(
        tmp_path, f"[runtime qpu]\ncommand = {command}\nprotocol = {protocol}\n"))
    job = server.add(mode="verbatim")
    (tmp_path / "up").read_bytes()
    keeper = server.keeper()
    if how == "cancel":
        assert server.request("DELETE", f"/jobs/{job['id']}/").status == 200
    else:
        server.stop(signal.SIGTERM if how == "stop" else signal.SIGKILL)
        until(lambda: not is_alive(keeper))
    assert bearers(f"LAB={tmp_path}") == []


def test_a_child_that_left_its_group_hears_term_before_it_is_killed(lab, script, tmp_path):
    os.mkfifo(tmp_path / "up")
    heard = tmp_path / "heard"
    child = script(f"trap 'echo TERM >{heard}; exit' TERM\necho up >{tmp_path}/up\n"
                   "sleep 300 & wait")
    command = script(f"trap 'while ! [ -e {heard} ]; do sleep 0.01; done; exit' TERM\n"
                     f"setsid {child} >/dev/null 2>&1 &\nsleep 300 & wait")
    server = lab("--runtime", f"qpu={command}")
    job = server.add(mode="verbatim")
    (tmp_path / "up").read_bytes()
    server.request("DELETE", f"/jobs/{job['id']}/")
    assert heard.read_text() == "TERM\n"


def test_a_background_child_of_a_lines_process_lives_as_long_as_that(lab, script, tmp_path):
    command = script("setsid sleep 300 >/dev/null 2>&1 &\n"
                     f"while read -r line; do {ANSWER}; done")
    other = script("setsid sleep 200 >/dev/null 2>&1 &")
    server = lab("--config", ini(
        tmp_path, f"[runtime kept]\ncommand = {command}\nprotocol = lines\n"
                  f"[runtime other]\ncommand = {other}\nmodes = simulation\n"))
    server.wait(server.add(mode="verbatim"))
    # A child that has just called exec has no environment to be read for a moment.
    until(lambda: len(bearers(f"LAB={tmp_path}")) == 2)
    left = bearers(f"LAB={tmp_path}")
    for _ in range(3):
        assert server.wait(server.add(mode="simulation"))["status"] == "Success"
    assert bearers(f"LAB={tmp_path}") == left
    assert server.wait(server.add(mode="verbatim"))["status"] == "Success"


# Nothing else is killed

def test_what_lost_the_mark_is_logged_and_let_live_and_reaped(lab, script, tmp_path):
    os.mkfifo(tmp_path / "pid")
    loses = f"echo $$ >{tmp_path}/pid; exec sleep 300"
    command = script(f"setsid env -i sh -c '{loses}' >/dev/null 2>&1 &\ncat {tmp_path}/pid")
    server = lab("--runtime", f"qpu={command}")
    job = server.add(mode="verbatim")
    assert server.wait(job)["status"] == "Success"
    pid = int(server.result(job).body)
    assert f"process {pid} (" in server.line("does not bear the server's mark")
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not state(pid))
    assert server.log.count("does not bear the server's mark") == 1


def test_two_servers_with_the_same_runtime_do_not_end_each_others_processes(
        lab, script, tmp_path):
    """Nor one on a copy of the other's folder, its lock file included."""
    os.mkfifo(tmp_path / "up")
    command = script(f"[ $OQC_RUNTIME = quick ] || {{ echo up >{tmp_path}/up; sleep 300; }}")
    server = lab("--runtime", f"slow={command}")
    server.add(mode="verbatim")
    (tmp_path / "up").read_bytes()
    left = bearers(f"LAB={tmp_path}")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("oqc.db", "oqc.db-wal", "oqc.db.lock"):
        shutil.copy(tmp_path / name, copy / name)
    other = lab("--db", copy / "oqc.db", "--runtime", f"quick={command}")
    assert other.wait(1)["runtime"] == "quick"
    assert other.wait(other.add(mode="verbatim"))["status"] == "Success"
    assert other.stop() == 0
    assert set(left) <= set(bearers(f"LAB={tmp_path}"))


# Zombies, signals

def test_no_zombie_stays_beside_a_lines_process_that_has_nothing_to_do(lab, script, tmp_path):
    command = script("while read -r line; do\n(sleep 0.01 &) >/dev/null 2>&1\n"
                     f"{ANSWER}\ndone")
    server = lab("--config", ini(
        tmp_path, f"[runtime qpu]\ncommand = {command}\nprotocol = lines\n"))
    jobs = [server.add(mode="verbatim") for _ in range(20)]
    assert {server.wait(job)["status"] for job in jobs} == {"Success"}
    until(lambda: len(server.children()) == 1)
    process, = server.children()
    os.kill(process, signal.SIGKILL)        # and it is one itself
    until(lambda: not server.children())
    assert server.wait(server.add(mode="verbatim"))["status"] == "Success"


def test_signals_that_were_ignored_or_blocked_for_the_server_count_again_in_it_and_in_its_runtimes(
        lab, script):
    server = lab("--runtime", f"qpu={script('exec grep Sig /proc/self/status')}", command=IGNORING)
    job = server.add(mode="verbatim")
    assert server.wait(job)["return_code"] == 0
    lines = server.result(job).body.decode().splitlines()
    masks = {line.split()[0]: int(line.split()[1], 16) for line in lines if "SigQ" not in line}
    assert (masks["SigBlk:"], masks["SigIgn:"]) == (0, 0)
    server.process.send_signal(signal.SIGHUP)
    server.line("keys read again")
    assert server.stop(signal.SIGINT) == 0


# The keeper

def test_the_keeper_has_nothing_of_the_server_ignores_its_group_and_ends_with_it(lab):
    server = lab()
    keeper = server.keeper()
    links = {os.readlink(link) for link in Path(f"/proc/{keeper}/fd").iterdir()}
    assert {link for link in links if not link.startswith("pipe:")} == {"/dev/null"}
    assert len(list(Path(f"/proc/{keeper}/fd").iterdir())) == 4
    assert os.getsid(keeper) == keeper
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(keeper, number)
    assert server.wait(server.add(mode="verbatim"))["status"] == "Success"
    assert is_alive(keeper)
    assert server.stop() == 0
    assert not state(keeper)


def test_a_keeper_that_was_killed_is_reaped_and_said(lab):
    server = lab()
    keeper = server.keeper()
    server.wait(server.add(mode="verbatim"))
    os.kill(keeper, signal.SIGKILL)
    assert f"process {keeper}" in server.line("the keeper")
    until(lambda: not state(keeper))
    assert server.wait(server.add(mode="verbatim"))["status"] == "Success"
    assert server.stop() == 0


def test_a_keeper_that_is_killed_while_nothing_was_ever_started_leaves_no_zombie(lab):
    server = lab()
    keeper = server.keeper()
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not state(keeper))
    assert f"process {keeper}" in server.line("the keeper")


# A crash and an instant restart

def test_a_new_attempt_waits_until_the_old_ones_tree_is_gone_and_other_jobs_do_not(
        lab, script, tmp_path):
    os.mkfifo(tmp_path / "up")
    deaf = script("trap '' TERM\necho $$ >up\nsleep 300")
    command = script(f"[ $OQC_JOB_ID.$OQC_ATTEMPT != 1.1 ] || {{ setsid {deaf} & sleep 300; }}\n"
                     "[ $OQC_JOB_ID = 2 ] || ! grep -q OQC_MARK /proc/$(cat old)/environ || "
                     "echo 'both at once'")
    server = lab("--runtime", f"qpu={command}")
    job = server.add(mode="verbatim")
    old = (tmp_path / "up").read_text()
    (tmp_path / "old").write_text(old)
    keeper = server.keeper()
    os.kill(keeper, signal.SIGSTOP)     # or it would end the old tree during a slow restart
    server.stop(signal.SIGKILL)
    server = lab("--runtime", f"qpu={command}")
    assert server.wait(server.add(mode="verbatim"))["status"] == "Success"
    assert is_alive(int(old)), "the other job waited, too"
    os.kill(keeper, signal.SIGCONT)
    assert "job 1 waits until its attempt on qpu has ended" in server.log
    assert server.wait(job)["status"] == "Success"
    assert server.result(job).body == b"null\n"
    assert not is_alive(int(old))


@pytest.mark.slow
def test_what_a_killed_server_and_its_killed_keeper_left_is_ended_by_the_next_server(
        lab, script, tmp_path):
    os.mkfifo(tmp_path / "up")
    command = script("[ $OQC_ATTEMPT = 2 ] || { echo $$ >up; exec sleep 300; }")
    server = lab("--runtime", f"qpu={command}")
    job = server.add(mode="verbatim")
    old = int((tmp_path / "up").read_text())
    os.kill(server.keeper(), signal.SIGKILL)
    server.stop(signal.SIGKILL)
    assert is_alive(old)
    server = lab("--runtime", f"qpu={command}")
    assert server.wait(job)["status"] == "Success"
    assert not is_alive(old)
    assert f"process {old} (sleep) of a server that was killed is ended" in server.log


# What cannot be killed

def a_sleeper(script, public):
    """A program for any user, which says its id in the named pipe `up` beside it, and sleeps."""
    up = public / "up"
    os.mkfifo(up)
    up.chmod(0o666)
    return shutil.copy(script(f"echo $$ >{up}; exec sleep 300"), public)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
@pytest.mark.parametrize("end, command", [
    ("timeout", POWERLESS), ("cancel", POWERLESS), ("exit", POWERLESS), ("exit", BLIND)],
    ids=["timeout", "cancel", "exit", "exit, not to be looked at"])
def test_a_child_that_may_not_be_killed_ends_its_job_and_sets_its_runtime_aside(
        lab, script, tmp_path, public, end, command):
    sleeper = a_sleeper(script, public)
    leave = f"setpriv --reuid=65534 --clear-groups {sleeper}"
    if end == "exit":
        leave = f"setsid {leave} >/dev/null 2>&1 & sleep 0.3; exit 0"
    drive = script(f"[ $OQC_JOB_ID != 1 ] || {{ {leave}; }}")
    timeout = 1 if end == "timeout" else 60
    server = lab("--kill-grace", "0.1", "--config", ini(
        tmp_path, f"[runtime qpu]\ncommand = {drive}\ntimeout = {timeout}\n"
                  "[runtime other]\ncommand = true\nmodes = simulation\n"), command=command)
    job = server.add(mode="verbatim")
    pid = int((public / "up").read_text())
    try:
        if end == "cancel":
            assert server.request("DELETE", f"/jobs/{job['id']}/").json["return_code"] == 130
        ended = server.wait(job, 20)
        assert ended["return_code"] == {"timeout": 124, "cancel": 130, "exit": 0}[end]
        until(lambda: server.runtime("qpu")["state"] == "failing")
        assert f"process {pid} (sleep) of an earlier attempt" in server.runtime("qpu")["reason"]
        assert f"process {pid} (sleep)" in server.line("is set aside")
        assert server.wait(server.add(mode="simulation"))["status"] == "Success"
        assert server.runtime("other")["state"] == "idle"
        waits = server.add(mode="verbatim")
        os.kill(pid, signal.SIGKILL)
        assert server.wait(waits)["status"] == "Success"
        assert server.runtime("qpu")["state"] == "idle"
        assert not state(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
def test_a_server_stops_though_a_child_may_not_be_killed(lab, script, public):
    sleeper = a_sleeper(script, public)
    server = lab("--drain", "0", "--kill-grace", "0.1", "--runtime",
                 f"qpu=setpriv --reuid=65534 --clear-groups {sleeper}", command=POWERLESS)
    server.add(mode="verbatim")
    pid = int((public / "up").read_text())
    try:
        assert server.stop(timeout=15) == 0
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def frozen(tmp_path):
    """A folder of a frozen file system: who writes there sleeps, and no signal wakes it, until
    `frozen.thaw()`."""
    need("mount", "mke2fs", "fsfreeze")
    image = tmp_path / "image"
    folder = tmp_path / "disk"
    folder.mkdir()
    image.write_bytes(bytes(1 << 20))
    subprocess.run(["mke2fs", "-q", "-F", image], check=True, stderr=subprocess.DEVNULL)
    if subprocess.run(["mount", "-o", "loop", image, folder], check=False).returncode:
        pytest.skip("nothing can be mounted here")

    def thaw():
        subprocess.run(["fsfreeze", "-u", folder], check=False, stderr=subprocess.DEVNULL)

    try:
        subprocess.run(["fsfreeze", "-f", folder], check=True)
        yield SimpleNamespace(path=folder, thaw=thaw)
    finally:
        thaw()
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("protocol", ["exec", "lines\nstart_timeout = 1"], ids=["exec", "lines"])
def test_a_process_that_sleeps_in_the_kernel_ends_its_job_and_sets_its_runtime_aside(
        lab, frozen, script, tmp_path, protocol):
    """State D, as in a driver whose device does not answer."""
    drive = script(f"[ -e pid ] || echo $$ >pid; read -r line; >{frozen.path}/a; {ANSWER}")
    server = lab("--drain", "0", "--kill-grace", "0.1", "--config", ini(
        tmp_path, f"[runtime qpu]\nprotocol = {protocol}\ntimeout = 3\ncommand = {drive}\n"
                  "[runtime other]\ncommand = true\nmodes = simulation\n"))
    ended = server.wait(server.add(mode="verbatim"), 20)
    assert ended["return_code"] == 124
    pid = int((tmp_path / "pid").read_text())
    assert state(pid) == "D"
    reason = f"process {pid} (runtime-0) of an earlier attempt cannot be ended"
    assert reason in server.line("is set aside")
    assert server.runtime("qpu")["reason"] == reason
    assert server.wait(server.add(mode="simulation"))["status"] == "Success"
    waits = server.add(mode="verbatim")
    frozen.thaw()
    assert server.wait(waits)["status"] == "Success"
    assert server.runtime("qpu")["state"] == "idle"
    until(lambda: not state(pid))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_server_stops_though_a_process_sleeps_in_the_kernel(lab, frozen, script, tmp_path):
    os.mkfifo(tmp_path / "up")
    server = lab("--drain", "0", "--kill-grace", "0.1", "--runtime",
                 f"qpu={script(f'echo $$ >up; echo >{frozen.path}/a')}")
    server.add(mode="verbatim")
    pid = int((tmp_path / "up").read_text())
    until(lambda: state(pid) == "D")
    try:
        assert server.stop(timeout=15) == 0
        assert state(pid) == "D"
    finally:
        frozen.thaw()


# What cannot be started

@pytest.mark.parametrize("content, reason", [
    (b"#!/bin/sh\r\nexit 0\r\n",
     "could not be started: {}: its lines end with CR LF; write them with LF alone"),
    (b"#!/usr/bin/env sh\r\nexit 0\r\n", ", {}: its lines end with CR LF"),
    (b"#!/no/such/python\n",
     "could not be started: {}: its first line names /no/such/python, which is not there"),
    (b"\x7fELF, but not of this machine",
     "could not be started: {}: neither a program of this machine nor a script with a #! line"),
], ids=["CR LF", "CR LF and env", "no interpreter", "no program"])
def test_a_program_that_cannot_be_started_says_why(lab, tmp_path, content, reason):
    program = tmp_path / "drive"
    program.write_bytes(content)
    program.chmod(0o755)
    server = lab("--runtime", f"qpu={program}")
    server.add(mode="verbatim")
    server.line(reason.format(program))


def test_a_working_directory_is_the_sections_and_a_program_stands_beside_the_ini_file(
        lab, tmp_path):
    folder = tmp_path / "lab"
    (folder / "data").mkdir(parents=True)
    program = folder / "drive"
    program.write_text("#!/bin/sh\npwd\n")
    program.chmod(0o755)
    config = ini(folder, "[runtime qpu]\ncommand = ./drive\ncwd = data\n"
                         "[runtime other]\ncommand = drive\nmodes = simulation\n")
    server = lab("--config", config)
    for mode, place in (("verbatim", folder / "data"), ("simulation", tmp_path)):
        job = server.add(mode=mode)
        assert server.wait(job)["status"] == "Success"
        assert server.result(job).body.decode() == f"{place}\n"


def test_a_working_directory_that_is_gone_is_named(lab, tmp_path):
    (tmp_path / "data").mkdir()
    server = lab("--config", ini(tmp_path, "[runtime qpu]\ncommand = true\ncwd = data\n"))
    (tmp_path / "data").rmdir()
    server.add(mode="verbatim")
    line = server.line("could not be started")
    assert f"could not be started: {tmp_path}/data: No such file or directory" in line


def test_the_start_script_hands_no_pythonpath_of_its_own_to_runtimes(lab):
    start = RUNTIMES.parent.parent / "scripts" / "start_server.sh"
    server = lab("--runtime", f"qpu={RUNTIMES}/tells",
                 command=("env", "-u", "PYTHONPATH", f"PYTHON={sys.executable}", str(start)))
    job = server.add(mode="verbatim")
    assert server.wait(job)["status"] == "Success"
    assert "PYTHONPATH" not in server.result(job).json["environment"]
    assert server.wait(server.add(mode="simulation"))["status"] == "Success"
    assert descendants(server.process.pid)
