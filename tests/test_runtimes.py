"""Slots and their processes, with real hostile runtimes: whatever one does, its attempt ends as it
should."""
import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, RUNTIMES, descendants, until

from oqc import jobs, runtimes
from oqc.clock import Clock
from oqc.jobs import RuntimeSpec, Task
from oqc.process import Process
from oqc.tree import INSTANCE

TASK = Task(7, "X(90)", "verbatim", 2, 100, 42, 0)
TRUE = '{"id": ID, "return_code": 0}\n'


class Impatient:
    """A clock on which the timeout comes with the first thing that the runtime says, and no sooner;
    it has no time of day, so that an attempt that asks for one is found."""

    def __init__(self):
        self.ahead, self.asked = 0.0, 0

    def monotonic(self):
        return Clock.monotonic() + self.ahead

    def heard(self):
        """What to give a slot as `interrupted`: it asks at the beginning, and then after whatever
        it has read."""
        self.asked += 1
        self.ahead = 1000.0 if self.asked > 1 else 0.0
        return False


def slot_for(command, kill_grace=20.0, clock=None, start=Process, **spec):
    """A slot of a runtime `qpu` with this command."""
    if isinstance(command, str):
        command = [command]
    spec = {"timeout": 30.0, "start_timeout": 0.01, **spec}
    runtime = RuntimeSpec("qpu", tuple(map(str, command)), **spec)
    return runtimes.slot(runtime, clock or Clock(), kill_grace, start)


class Starts:
    """What to give a slot as `start`: real processes, and when they have exited."""

    def __init__(self):
        self.processes = []

    def __call__(self, *arguments):
        self.processes.append(Process(*arguments))
        return self.processes[-1]

    def start_and_wait(self, *arguments):
        """Start one that exits by itself, and hand it over when it has."""
        started = self(*arguments)
        self.wait_for_exit()
        return started

    def wait_for_exit(self):
        """Wait until the last one has exited; False, which as `interrupted` says no."""
        os.waitid(os.P_PID, self.processes[-1].pid, os.WEXITED | os.WNOWAIT)
        return False


def run(*command, task=TASK, interrupted=lambda: False, **more):
    """The outcome of one attempt at a command in a slot of its own."""
    with contextlib.closing(slot_for(command, **more)) as slot:
        return slot.run(task, interrupted)


def time_out(*command, kill_grace=20.0, **more):
    """The outcome of an attempt whose timeout comes as soon as the command has said something."""
    clock = Impatient()
    return run(*command, clock=clock, interrupted=clock.heard, timeout=900.0, kill_grace=kill_grace,
               **more)


def hostile(name):
    return RUNTIMES / name


def group(number):
    """The ids of all processes of a process group, zombies included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == number:
                found.append(int(folder.name))
    return found


def possessions():
    """What must not pile up: children, open descriptors and threads of this process."""
    return {*descendants(os.getpid()), *os.listdir("/proc/self/fd"), *threading.enumerate()}


def passed_on():
    """The descriptors that whoever started these tests left open for all; a server closes them to
    its runtimes."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):      # the one that listdir itself had
            if number > 2 and os.get_inheritable(number):
                found.add(number)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each of these tests no process, not even a zombie, no descriptor and no thread is there
    that was not; and it ends sooner than the runtimes would by themselves, after a minute."""
    run("true")                     # has made what is made once a process, at its first runtime
    before, began = possessions(), Clock.monotonic()
    yield
    assert possessions() - before == set()
    assert not INSTANCE.trees
    assert Clock.monotonic() - began < 40


# Protocol exec

def test_exec_gives_the_job_and_a_newline_on_standard_input_byte_for_byte():
    outcome = run("cat", task=TASK._replace(job="X(90), Y(000), X(0)"))
    assert (outcome.return_code, outcome.result) == (0, "X(90), Y(000), X(0)\n")


def test_exec_gives_the_documented_environment_and_nothing_of_oqc_besides(monkeypatch):
    for name in ("OQC_API_KEY", "OQC_KEYS_FILE", "OQC_DB", "CREDENTIALS_DIRECTORY",
                 "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LAB", "kept")
    task = TASK._replace(submitter="alice", tag="t1", note='{"angle": 3}')
    environment = json.loads(run(hostile("tells"), task=task).result)["environment"]
    ours = {name: value for name, value in environment.items()
            if name.startswith(("OQC_", "QRMI_"))}
    assert ours == {"OQC_JOB_ID": "7", "OQC_MODE": "verbatim", "OQC_RUNTIME": "qpu",
                    "OQC_ATTEMPT": "2", "OQC_SHOTS": "100", "OQC_SEED": "42",
                    "OQC_TIMEOUT": "30", "OQC_SUBMITTER": "alice", "OQC_TAG": "t1",
                    "OQC_NOTE": '{"angle": 3}', "QRMI_JOB_QPU_RESOURCES": "qpu",
                    "OQC_MARK": ours["OQC_MARK"]}
    assert environment["LAB"] == "kept"
    assert "secret" not in environment.values()


@pytest.mark.parametrize("timeout, text", [(30.0, "30"), (0.25, "0.25"), (1000001.5, "1000001.5"),
                                           (1000000.0, "1000000")])
def test_a_timeout_is_a_decimal_number_however_long_it_is(script, timeout, text):
    assert run(script("echo \"t $OQC_TIMEOUT\""), timeout=timeout).result == f"t {text}\n"


# A slot in a process of its own; the runtime prints its note in octal.
NOTE = """
import sys
from oqc import runtimes
from oqc.clock import Clock
from oqc.jobs import RuntimeSpec, Task
slot = runtimes.slot(RuntimeSpec("qpu", (sys.argv[1],)), Clock(), 5.0)
task = Task(7, "X(90)", "verbatim", 1, 1, 1, 0, note='{"a": "\\u2192"}')
print(slot.run(task, lambda: False).result)
"""


def test_a_note_is_utf_8_in_the_environment_whatever_the_locale_is(script):
    says = script('printf %s "$OQC_NOTE" | od -An -t o1')
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", NOTE, says], check=False,
                          capture_output=True, text=True, timeout=60, env=environment)
    assert "342 206 222" in done.stdout, done.stderr


def test_exec_inherits_no_descriptor_of_this_process_but_the_standard_ones():
    told = json.loads(run(hostile("tells")).result)
    assert set(told["descriptors"]) - passed_on() == {0, 1, 2}


def test_lines_inherits_no_descriptor_of_this_process_but_the_standard_ones():
    look = ("import os, sys\nsys.stdin.readline()\n"
            "open_ones = [number for number in map(int, os.listdir('/proc/self/fd'))\n"
            "             if os.path.exists(f'/proc/self/fd/{number}')]\n"
            "print('{\"id\": 7, \"return_code\": 0, \"result\": %s}' % open_ones, flush=True)")
    outcome = run(sys.executable, "-c", look, protocol="lines")
    assert set(json.loads(outcome.result)) - passed_on() == {0, 1, 2}


def test_a_runtime_is_started_without_a_shell_in_a_group_of_its_own_with_no_signal_blocked():
    told = json.loads(run(hostile("tells"), "$HOME; `id` *", "a 'b'").result)
    assert told["arguments"] == ["$HOME; `id` *", "a 'b'"]
    assert told["group"] == told["pid"]
    assert told["blocked"] == []


def test_a_runtime_has_no_child_that_it_did_not_start(script):
    outcome = run(script('read -r children <"/proc/$$/task/$$/children"; echo "[$children]"'))
    assert outcome.result == "[]\n"


@pytest.mark.parametrize("code", [1, 3, 70, 74, 76, 123, 124, 125, 126, 127, 128, 130, 137, 180,
                                  255])
def test_the_exit_status_of_exec_is_the_return_code_and_an_answer(code, script):
    outcome = run(script(f"exit {code}"))
    assert (outcome.return_code, outcome.runtime_error) == (code, f"exit status {code}")
    assert (outcome.transient, outcome.started) == (False, True)


def test_exit_status_75_is_worth_another_attempt_unless_retry_codes_say_otherwise(script):
    busy = script('echo "busy" >&2; exit 75')
    assert run(busy)[:5] == (75, "busy", None, False, True)
    assert run(busy, retry_codes=(3, 4)).transient is False
    assert run(script("exit 4"), retry_codes=(3, 4)).transient is True


@pytest.mark.parametrize("protocol", ["exec", "lines"])
@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV", "HUP"])
def test_dying_of_a_signal_is_128_and_its_number_and_worth_another_attempt(name, protocol):
    outcome = run(hostile("dies"), name, protocol=protocol)
    assert outcome.return_code == 128 + signal.Signals["SIG" + name]
    assert outcome.runtime_error == f"died of SIG{name}; last words"
    assert (outcome.transient, outcome.started) == (True, True)


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_a_program_that_is_gone_is_127_and_one_that_cannot_be_executed_126(protocol, tmp_path):
    gone = run(tmp_path / "gone", protocol=protocol)
    assert (gone.return_code, gone.transient, gone.started) == (127, True, False)
    assert gone.runtime_error == f"could not be started: {tmp_path}/gone: not found"
    unfit = tmp_path / "unfit"
    unfit.write_text("#!/bin/sh\n")
    refused = run(unfit, protocol=protocol)
    assert (refused.return_code, refused.transient, refused.started) == (126, True, False)


def test_the_last_line_of_standard_error_that_is_not_blank_is_the_runtime_error(script):
    outcome = run(script(r"printf 'first\n\tthe \303\251 \377 \000 last \n\n  \n' >&2; exit 1"))
    assert outcome.runtime_error == "the \u00e9 \ufffd \ufffd last"
    assert run(script("echo warning >&2")).runtime_error is None


def test_of_a_runtime_error_the_last_2_kib_are_kept(script):
    outcome = run(script("head -c 5000 /dev/zero | tr '\\0' a >&2; printf b >&2; exit 1"))
    assert outcome.runtime_error == "a" * 2047 + "b"


def test_a_result_is_json_where_it_parses_and_else_text(script):
    for text, kind in (('{"counts": {"0": 1}}', True), ("[1, 2]", True), ("5", True),
                       ("null", True), ("five", False), ("NaN", False), ('{"a": Infinity}', False),
                       ("9" * 5000, False), ("[" * 100_000, False)):
        put_out = Path(script("")).with_name("put-out")
        put_out.write_text(text, encoding="utf-8")
        outcome = run("cat", put_out)
        if kind or not text.startswith("9"):    # before Python 3.10.7 a number may have any length
            assert (outcome.result, outcome.is_json) == (text, kind), text[:40]
    assert run("true")[2:4] == (None, False)


@pytest.mark.parametrize("text, kind", [
    (b"\xff\xc3\xa9", False), (b'{"a": "\xff"}', False), (b" \r\n five\0 \n\n", False),
    (b' {"a": 1}\r\n\n', True), (b" \n", False)])
def test_a_result_is_what_was_put_out_byte_for_byte(text, kind, tmp_path):
    (tmp_path / "put-out").write_bytes(text)
    outcome = run("cat", tmp_path / "put-out")
    assert (jobs.result_bytes(outcome.result), outcome.is_json) == (text, kind)


def test_of_a_result_that_fails_the_beginning_is_kept_and_the_rest_is_read_and_dropped(script):
    outcome = run(script("head -c 1048576 /dev/zero | tr '\\0' a; head -c 3000000 /dev/zero\n"
                         "echo done >&2; exit 5"))
    assert (outcome.return_code, outcome.runtime_error[:6]) == (5, "done; ")
    assert outcome.result == "a" * (1 << 20)


def test_what_a_process_wrote_counts_though_it_ended_before_anybody_listened(script):
    says = script("echo result; echo error >&2; exit 3")
    assert run(says, start=Starts().start_and_wait)[:3] == (3, "error", "result\n")


def test_a_result_that_fails_is_kept_too(script):
    assert run(script("echo half; exit 3")).result == "half\n"


def test_a_job_of_3_mib_reaches_both_protocols_whole():
    job = ", ".join(["X(90)"] * 450_000)
    assert len(job) > 3 << 20
    task, digest = TASK._replace(job=job), hashlib.sha256(job.encode() + b"\n").hexdigest()
    assert json.loads(run(hostile("tells"), task=task).result)["digest"] == digest
    count = "import json, sys; n = len(json.loads(sys.stdin.readline())['job']); " \
            "print(json.dumps({'id': 7, 'return_code': 0, 'result': n}), flush=True)"
    assert run(sys.executable, "-c", count, task=task, protocol="lines").result == str(len(job))


def test_a_runtime_that_does_not_read_its_big_job_ends_as_it_likes(script):
    task = TASK._replace(job=", ".join(["X(90)"] * 450_000))
    assert run(script("exit 3"), task=task).return_code == 3
    assert run(script("exit 3"), task=task, protocol="lines").return_code == 3


# Protocol lines

def lines(*answers, tasks=1, **more):
    """The outcomes of so many attempts at a runtime over lines that says this, one answer a job."""
    says = [hostile("says"), *answers]
    with contextlib.closing(slot_for(says, protocol="lines", **more)) as slot:
        return [slot.run(TASK._replace(id=number), lambda: False) for number in range(1, tasks + 1)]


def test_lines_gives_a_job_as_a_json_line_with_the_documented_members():
    outcome, = lines('{"id": ID, "return_code": 0, "result": {}}\n')
    assert json.loads(outcome.result) == {
        "id": 1, "job": "X(90)", "mode": "verbatim", "attempt": 2, "shots": 100, "seed": 42,
        "timeout": 30.0, "submitter": "", "tag": None, "note": None}
    assert (outcome.return_code, outcome.is_json, outcome.started) == (0, True, True)


def test_lines_keeps_one_process_for_all_jobs():
    pid = ("import os, sys\nfor line in sys.stdin:\n"
           "    print('{\"id\": 7, \"return_code\": 0, \"result\": %d}' % os.getpid(), flush=True)")
    with contextlib.closing(slot_for([sys.executable, "-c", pid], protocol="lines")) as slot:
        assert len({slot.run(TASK, lambda: False).result for _ in range(3)}) == 1


def test_lines_passes_return_code_and_error_on():
    failed, busy, unnamed, ignored = lines(
        '{"id": ID, "return_code": 3, "runtime_error": "too warm", "result": [1]}\n',
        '{"id": ID, "return_code": 75}\n',
        '{"id": ID, "return_code": 9, "runtime_error": null, "more": 1}\n',
        '{"id": ID, "return_code": 0, "runtime_error": "x"}\n', tasks=4)
    assert failed[:5] == (3, "too warm", "[1]", True, False)
    assert (busy.return_code, busy.transient) == (75, True)
    assert unnamed[:3] == (9, "return code 9", None)
    assert (ignored.return_code, ignored.runtime_error) == (0, None)


def test_a_runtime_error_over_lines_is_its_last_line_as_on_standard_error():
    several, blank, null = lines(
        '{"id": ID, "return_code": 1, '
        '"runtime_error": "Traceback:\\n  here\\nValueError: boom\\n \\n"}\n',
        '{"id": ID, "return_code": 1, "runtime_error": " \\n"}\n',
        '{"id": ID, "return_code": 1, "runtime_error": "a\\u0000b"}\n', tasks=3)
    assert several.runtime_error == "ValueError: boom"
    assert blank.runtime_error == "return code 1"
    assert null.runtime_error == "a\ufffdb"


def test_of_a_runtime_error_over_lines_2_kib_are_kept():
    outcome, = lines('{"id": ID, "return_code": 1, "runtime_error": "' + "\u00e9" * 3000 + '"}\n')
    assert outcome.runtime_error == "\u00e9" * 1024


@pytest.mark.parametrize("said", [
    '{"id": ID, "return_code": "0"}', '{"id": ID, "return_code": true}',
    '{"id": ID, "return_code": 256}', '{"id": ID, "return_code": -1}',
    '{"id": ID, "return_code": 0.0}', '{"id": ID, "return_code": null}',
    '{"id": ID, "return_code": 1, "runtime_error": 5}',
    '{"id": ID, "return_code": 0, "result": NaN}',
    '{"id": ID, "return_code": 0, "result": 1e999}',
    '\ufeff{"id": ID, "return_code": 0}',
    '{"id": ID, "return_code": 0} {"return_code": 0}',
    '{"id": ID, "return_code": 0, "result": ' + "[" * 100_000 + "}",
], ids=lambda said: said[:60])
def test_an_answer_that_is_none_is_76_once_and_what_was_said_is_the_result(said):
    first, second = lines(said + "\n", TRUE, tasks=2)
    assert (first.return_code, first.transient, first.started) == (76, False, True)
    assert first.runtime_error.startswith("not an answer: ")
    assert (first.result, first.is_json) == (said.replace("ID", "1"), False)
    assert first.pause is None
    assert second.return_code == 0, "the same process answers the next one"


@pytest.mark.parametrize("said", [
    '{"return_code": 0}', '{"id": null, "return_code": 0}', '{"id": true, "return_code": 0}',
    '{"id": 1.0, "return_code": 0}', '{"id": "1", "return_code": 0}', '{"return_code": NaN}'])
def test_an_answer_without_its_id_is_76_and_pauses_the_runtime(said):
    first, second = lines(said + "\n", tasks=2)
    assert (first.return_code, first.transient, first.result) == (76, False, said)
    assert first.runtime_error.startswith("an answer without the id of its question: ")
    assert "do not carry the id" in first.pause
    assert second.pause, "a new process, since the program has to be mended: its first answer"


@pytest.mark.parametrize("noise", [
    "QDriver 1.2 connected\n", "\n \n", "[]\n", "0\n", "null\n", "{ }\n", "{\"id\": ID}\n",
    "10 %\r20 %\r", "100 %", '{"id": 99, "return_code": 0}\n', "{'return_code': 0}\n",
    '{"id": 99, "return_code": NaN}\n', 'sent {"return_code": 0}\n', '{"device": 5}\n',
    '{"ready": 1}\n', "x" * 9999 + "\n", "[" * 100_000 + "\n", '{"device": {"a": 1e999}}\n',
], ids=lambda said: said[:40].strip() or "nothing")
def test_all_else_is_noise_and_goes_to_the_log(noise):
    outcome, = lines(noise + '{"id": ID, "return_code": 0, "result": 5}\n')
    assert outcome[:4] == (0, None, "5", True)
    said = noise.replace("ID", "1").replace("\r", "\n")
    assert outcome.log.text.decode().split() == said.split() or len(noise) > 9000
    assert outcome.device is None


def test_a_line_of_noise_of_any_length_is_noise(script):
    outcome = run(script("""head -c 3000000 /dev/zero | tr '\\0' x; echo
                            echo '{"id": 7, "return_code": 0}'; cat"""), protocol="lines")
    assert outcome[:3] == (0, None, None)


def test_an_answer_to_another_question_is_said_once_a_process(caplog):
    lines(*['{"id": 99, "return_code": 0}\n' + TRUE] * 3, tasks=3)
    assert [record.getMessage() for record in caplog.records] == [
        "runtime qpu: an answer that nobody asked for (id 99) is ignored; "
        "others of this process are not reported"]


def test_bytes_that_are_not_utf_8_are_no_answer(script):
    says = script(r"""printf '{"id": 7, "return_code": 0, "result": "\377"}\n'; cat""")
    outcome = run(says, protocol="lines")
    assert (outcome.return_code, outcome.transient) == (76, False)


def test_an_answer_without_a_line_end_counts_if_its_runtime_then_ends(script):
    whole = """read -r line; printf '{"id": 7, "return_code": 0, "result": 5}'; """
    assert run(script(whole + "exit 3"), protocol="lines")[:3] == (0, None, "5")
    half = """read -r line; printf '{"id": 7, "return_code": 0, "result": {}'; kill -KILL $$"""
    died = run(script(half), protocol="lines")
    assert (died.return_code, died.transient) == (137, True), "cut off while it answered"
    assert time_out(script(whole + "echo >&2; exec sleep 60"), protocol="lines").return_code == 124


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_a_result_that_is_too_long_is_76_and_no_success(protocol, script):
    """For exec what was put out, for lines the JSON in the answer's line."""
    puts = {"exec": "head -c %d /dev/zero | tr '\\0' y",
            "lines": """echo "{\\"id\\": 7, \\"return_code\\": 0, \\"result\\": """
                     """\\"$(head -c %d /dev/zero | tr '\\0' y)\\"}"; cat"""}[protocol]
    fits = run(script(puts % 2046), protocol=protocol, result_bytes=2048)
    assert (fits.return_code, len(fits.result)) == (0, 2046 if protocol == "exec" else 2048)
    for count in (2049, 300_000):
        outcome = run(script(puts % count), protocol=protocol, result_bytes=2048)
        assert outcome[:2] == (
            76, "a result longer than result_bytes (2048); its beginning is kept")
        assert (len(outcome.result), outcome.result[-9:]) == (2048, "y" * 9)
        assert (outcome.is_json, outcome.transient) == (False, False)


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_a_failure_whose_result_is_too_long_keeps_its_return_code_and_names_the_key(
        protocol, script):
    puts = {"exec": "echo warm >&2; head -c 5000 /dev/zero | tr '\\0' y; exit 3",
            "lines": """read -r line; echo '{"id": 7, "return_code": 3, "runtime_error": "warm", """
                     """"result": "%s"}'""" % ("y" * 5000)}[protocol]
    outcome = run(script(puts), protocol=protocol, result_bytes=1024)
    assert outcome[:2] == (
        3, "warm; a result longer than result_bytes (1024); its beginning is kept")
    assert (len(outcome.result), outcome.is_json) == (1024, False)


def test_of_a_line_that_does_not_end_the_beginning_is_kept_and_its_job_is_not_run_again(script):
    started = script("""echo >>$0.starts; printf '{"id": 7, "return_code": 0, "result": "'
                        yes | tr -d '\\n'""")
    with contextlib.closing(slot_for(started, protocol="lines", result_bytes=4096)) as slot:
        for starts in (1, 2):       # what follows in the pipe is no answer to the next job
            outcome = slot.run(TASK, lambda: False)
            assert outcome[:3] == (
                76, "a result longer than result_bytes (4096); its beginning is kept",
                '"' + "y" * 4095)
            assert len(Path(started + ".starts").read_text(encoding="ascii")) == starts


def test_what_has_left_its_group_and_its_session_ends_with_its_attempt(script, tmp_path):
    os.mkfifo(tmp_path / "said")
    orphans = f"sleep 60 & echo $$ $! >{tmp_path}/said; wait"
    leaves = script(f"setsid sh -c '{orphans}' >/dev/null 2>&1 &\ncat {tmp_path}/said")
    for pid in run(leaves).result.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize("status", [0, 1, 3, 76, 124, 126, 127, 130, 137, 180, 255])
def test_ending_without_an_answer_over_lines_is_an_answer_as_over_exec(status):
    """Of a program that has taken its job: that has run, whatever it says at its end."""
    answered, ended = lines(TRUE, f"={status}", tasks=2)
    assert answered.return_code == 0
    assert (ended.return_code, ended.transient, ended.started) == (status or 76, False, True)
    first, = lines(f"={status}")
    assert (first.return_code, first.transient, first.started) == (status or 76, False, True)


def test_retry_codes_count_for_lines_as_for_exec():
    busy, = lines("=75")
    assert (busy.return_code, busy.transient) == (75, True)
    busy, final = (lines(f"={status}", retry_codes=(3, 4))[0] for status in (4, 75))
    assert (busy.transient, final.transient) == (True, False)


def test_a_lines_runtime_that_has_ended_between_two_jobs_is_started_again(script):
    once = script("""read -r line; echo '{"id": 7, "return_code": 0}'""")
    starts = Starts()
    with contextlib.closing(slot_for(once, protocol="lines", start=starts)) as slot:
        for attempt in (1, 2):
            assert slot.run(TASK, lambda: False).return_code == 0
            assert len(starts.processes) == attempt
            starts.wait_for_exit()


def test_an_answer_counts_though_its_runtime_has_ended_by_the_time_it_is_read(script):
    once = script("""read -r line; echo '{"id": 7, "return_code": 0, "result": "done"}'""")
    starts = Starts()

    def read_late():
        return starts.processes[0].written() is not None and starts.wait_for_exit()
    outcome = run(once, protocol="lines", start=starts, interrupted=read_late)
    assert outcome[:3] == (0, None, '"done"')


def test_what_a_lines_runtime_says_while_it_fails_to_start_is_the_error(script):
    """Even if all of it was there before the first job was sent."""
    fails = script("echo 'no device' >&2; exit 1")
    start = Starts().start_and_wait
    assert run(fails, protocol="lines", start=start)[:2] == (1, "no device")


def test_a_lines_runtime_that_ends_before_it_took_a_job_has_not_started(script):
    outcome = run(script("echo 'no device' >&2; exit 1"), protocol="lines")
    assert (outcome.return_code, outcome.runtime_error) == (1, "no device")
    assert (outcome.transient, outcome.started) == (True, False)


def test_a_lines_runtime_that_dies_of_its_job_has_started():
    """Or else such a job would be tried for ever, and others behind it not at all."""
    outcome = run(hostile("dies"), "KILL", protocol="lines")
    assert (outcome.return_code, outcome.runtime_error) == (137, "died of SIGKILL; last words")
    assert (outcome.transient, outcome.started) == (True, True)


def test_a_job_that_a_lines_runtime_ends_without_a_look_at_is_given_to_the_next_process(
        script, tmp_path):
    """In the same attempt: it did not run, and with attempts = 1 there would be no other."""
    os.mkfifo(tmp_path / "end")
    blind = script(f"""echo '{{"id": 7, "return_code": 0}}'
                       read -r line <{tmp_path}/end; exit 1""")

    def end_it():
        if len(starts.processes) == 1:
            (tmp_path / "end").write_text("now\n", encoding="ascii")
            starts.wait_for_exit()
        return False
    starts = Starts()
    with contextlib.closing(slot_for(blind, protocol="lines", start=starts)) as slot:
        assert slot.run(TASK, lambda: False).return_code == 0
        outcome = slot.run(TASK, end_it)
        assert (outcome.return_code, outcome.started, len(starts.processes)) == (0, True, 2)


def test_a_lines_runtime_that_cannot_start_again_has_not_started(script, tmp_path):
    fails = script(f"""[ -e {tmp_path}/again ] && exit 1
                       >{tmp_path}/again; read -r line; echo '{{"id": 7, "return_code": 0}}'""")
    starts = Starts()
    with contextlib.closing(slot_for(fails, protocol="lines", start=starts)) as slot:
        assert slot.run(TASK, lambda: False).return_code == 0
        starts.wait_for_exit()
        outcome = slot.run(TASK, lambda: False)
        assert (outcome.return_code, outcome.started) == (1, False)


def test_what_a_lines_runtime_wrote_for_one_job_is_not_the_error_of_the_next(script):
    warns = script("""read -r line; echo warning >&2
                      echo '{"id": 7, "return_code": 0}'; read -r line""")
    with contextlib.closing(slot_for(warns, protocol="lines")) as slot:
        assert slot.run(TASK, lambda: False).return_code == 0
        assert slot.run(TASK, lambda: False)[:2] == (76, "ended without an answer")


def test_what_a_lines_runtime_says_too_much_is_not_the_answer_to_the_next_job(tmp_path):
    go, said = tmp_path / "go", tmp_path / "said"
    os.mkfifo(go)
    os.mkfifo(said)
    chatty = ("import json, sys\nfor line in sys.stdin:\n"
              "    number = json.loads(line)['id']\n"
              "    answer = {'id': number, 'return_code': 0, 'result': number}\n"
              "    print(json.dumps(answer), flush=True)\n"
              f"    open({str(go)!r}).close()\n"
              "    print(json.dumps({**answer, 'result': 'debug'}), flush=True)\n"
              f"    open({str(said)!r}, 'w').close()\n")
    with contextlib.closing(slot_for([sys.executable, "-c", chatty], protocol="lines")) as slot:
        for number in (1, 2, 3):
            assert slot.run(TASK._replace(id=number), lambda: False).result == str(number)
            go.write_bytes(b"")
            said.read_bytes()       # until it has said the other line


# Timeouts and interruptions

def test_at_a_timeout_the_whole_group_gets_term_and_may_end_in_good_order():
    outcome = time_out(hostile("hears-term"))
    assert (outcome.return_code, outcome.transient, outcome.started) == (124, False, True)
    assert outcome.runtime_error == "took longer than its timeout of 900 s"
    pid, *heard = outcome.result.split("\n")
    assert sorted(heard) == ["", "child heard", "runtime heard"]
    assert not group(int(pid))


@pytest.mark.parametrize("command", [
    ["ignores-term"], ["never-reads"],
    ["leaves-children", "sleep", "60"], ["closes-output", "sleep", "60"],
    ["leaves-children", str(RUNTIMES / "ignores-term")],
], ids=" ".join)
def test_a_hostile_runtime_is_ended_at_its_timeout_with_all_its_children(command):
    name, *arguments = command
    outcome = time_out(hostile(name), *arguments, kill_grace=0.05)
    assert outcome.return_code == 124
    assert not group(int(outcome.result.split()[0]))


@pytest.mark.parametrize("flood", [
    "cat /dev/zero", "cat /dev/zero >&2", "cat /dev/zero & exec cat /dev/zero >&2",
    "trap '' TERM; cat /dev/zero & cat /dev/zero >&2"])
def test_a_runtime_that_floods_for_ever_is_ended_at_its_timeout(flood, script):
    outcome = time_out(script(flood), kill_grace=0.05)
    assert outcome.return_code == 124
    assert len(outcome.result or "") <= 1 << 20


def test_a_lines_runtime_that_is_silent_is_ended_at_its_timeout_and_started_again_for_the_next_job(
        script, tmp_path):
    again = tmp_path / "again"
    silent = script(f"""read -r line
                        [ -e {again} ] || {{ >{again}; echo asked >&2; sleep 60; }}
                        echo '{{"id": 7, "return_code": 0}}'""")
    clock = Impatient()

    def time_out_when_asked():
        if slot.log(7).text:
            clock.ahead = 1000.0
        return False
    with contextlib.closing(slot_for(silent, protocol="lines", clock=clock, timeout=900.0)) as slot:
        assert slot.run(TASK, time_out_when_asked)[:2] == (
            124, "took longer than its timeout of 900 s and its start_timeout of 0.01 s; asked")
        assert slot.run(TASK, lambda: False).return_code == 0


def test_a_lines_runtime_that_never_reads_its_big_job_is_ended_at_its_timeout():
    big = TASK._replace(job=", ".join(["X(90)"] * 450_000))
    outcome = time_out("sh", "-c", "echo asleep >&2; exec sleep 60", protocol="lines", task=big)
    assert outcome.return_code == 124


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_the_real_clock_ends_a_runtime_too(protocol):
    assert run("sleep", "60", protocol=protocol, timeout=0.05).return_code == 124


def test_grandchildren_that_hold_the_pipes_do_not_delay_an_end():
    outcome = run(hostile("leaves-children"), "sh", "-c", "echo done >&2; exit 3")
    assert (outcome.return_code, outcome.runtime_error) == (3, "done")
    assert not group(int(outcome.result))


def test_a_runtime_that_closes_its_output_ends_when_it_ends():
    assert run(hostile("closes-output"), "sh", "-c", "cat; exit 3").return_code == 3


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_an_attempt_ends_when_it_is_woken_because_somebody_wants_it_to(protocol, tmp_path):
    started, stop = tmp_path / "started", threading.Event()
    os.mkfifo(started)
    (tmp_path / "waits").write_text(f"#!/bin/sh\necho $$ >{started}\nexec sleep 60\n")
    (tmp_path / "waits").chmod(0o755)
    with contextlib.closing(slot_for([tmp_path / "waits"], protocol=protocol)) as slot:
        outcomes = []
        worker = threading.Thread(target=lambda: outcomes.append(slot.run(TASK, stop.is_set)))
        worker.start()
        pid = int(started.read_text())
        slot.wake()             # asked, and not wanted: it goes on
        stop.set()
        slot.wake()
        worker.join(20)
        assert [outcome.interrupted for outcome in outcomes] == [True]
        assert not group(pid)


def test_a_slot_that_is_woken_again_and_again_does_not_block():
    with contextlib.closing(slot_for("true")) as slot:
        for _ in range(70_000):
            slot.wake()
        assert slot.run(TASK, lambda: False).return_code == 0


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_a_slot_that_has_nothing_to_do_rests(protocol, script):
    """Neither a wake, nor an input that is closed before all of the job is written, nor silence
    keeps it busy."""
    asked = []
    task = TASK._replace(job=", ".join(["X(90)"] * 450_000))
    with contextlib.closing(slot_for(script("exec <&-; sleep 0.24"), protocol=protocol)) as slot:
        slot.wake()
        slot.run(task, lambda: bool(asked.append(1)))
    assert len(asked) <= 6


# The record of an attempt

def sha256(text):
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_standard_error_of_an_attempt_is_kept_whole_or_its_end_and_how_much_is_not(
        protocol, script):
    says = script("""read -r line; head -c 5000 /dev/zero | tr '\\0' a >&2; echo b >&2
                     echo '{"id": 7, "return_code": 0}'""")
    log = run(says, protocol=protocol).log
    assert log == (b"a" * 5000 + b"b\n", 0)
    log = run(says, protocol=protocol, log_bytes=1024).log
    assert log == (b"a" * 1022 + b"b\n", 5002 - 1024)


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_the_log_is_kept_at_a_timeout_and_the_error_has_its_last_line(protocol, script):
    outcome = time_out(script("printf 'step 1\\nstep 2\\n' >&2; exec sleep 60"), protocol=protocol)
    assert outcome.return_code == 124
    assert outcome.runtime_error.startswith("took longer than its timeout of 900 s")
    assert outcome.runtime_error.endswith("; step 2")
    assert outcome.log.text == b"step 1\nstep 2\n"


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_an_interrupted_attempt_keeps_its_output_its_log_and_its_receipt(protocol, script):
    says = script("read -r line; echo half; echo warm >&2; exec sleep 60")
    with contextlib.closing(slot_for(says, protocol=protocol)) as slot:
        heard = []

        def interrupted():
            heard.append(slot.log(TASK.id).text)
            return b"warm" in heard[-1]
        outcome = slot.run(TASK, interrupted)
    assert outcome.interrupted and outcome.sent_sha256 == sha256("X(90)")
    if protocol == "exec":
        assert (outcome.result, outcome.log.text) == ("half\n", b"warm\n")
    else:
        assert sorted(outcome.log.text.split()) == [b"half", b"warm"]
    assert heard[0] == b""


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_the_receipt_is_the_hash_of_the_jobs_bytes_as_they_were_written(protocol, script):
    job = ", ".join(["X(90)"] * 100_000)
    task = TASK._replace(job=job, tag='a', note='{"job": "Y(1)"}')
    reads = script("""read -r line; echo '{"id": 7, "return_code": 0}'""")
    assert run(reads, protocol=protocol, task=task).sent_sha256 == sha256(job)


def test_the_receipt_shows_what_a_defect_changed_on_its_way(script, monkeypatch):
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value: dumps(value).replace("X(90)", "X(91)"))
    reads = script("""read -r line; echo '{"id": 7, "return_code": 0}'""")
    assert run(reads, protocol="lines").sent_sha256 == sha256("X(91)")


def test_there_is_no_receipt_of_a_job_that_was_not_written_whole(script):
    big = TASK._replace(job=", ".join(["X(90)"] * 450_000))
    assert run(script("exit 3"), protocol="lines", task=big).sent_sha256 is None
    answers_early = script("""read -r -n 9 x; echo '{"id": 7, "return_code": 0}'; exec sleep 60""")
    starts = Starts()
    with contextlib.closing(slot_for(answers_early, protocol="lines", start=starts)) as slot:
        for count in (1, 2):        # the rest of a question would be the next one
            outcome = slot.run(big, lambda: False)
            assert (outcome.return_code, outcome.sent_sha256) == (0, None)
            assert len(starts.processes) == count


# Which process is asked

def test_a_process_is_never_asked_the_same_job_twice(script):
    """Or its late second answer to the first attempt would be the answer to the second."""
    twice = script("""while read -r line; do
                          echo '{"id": 7, "return_code": 75, "result": '$$'}'
                          echo '{"id": 8, "return_code": 0, "result": '$$'}'
                      done""")
    with contextlib.closing(slot_for(twice, protocol="lines")) as slot:
        asked = [slot.run(TASK._replace(id=number), lambda: False).result
                 for number in (7, 8, 7, 8, 7)]
    assert asked[0] == asked[1] and asked[2] == asked[3], "another job is asked of the same process"
    assert len(set(asked)) == 3


@pytest.mark.parametrize("closes", ["exec <&-; echo closed >&2", "echo closed >&2; exec <&-"])
def test_a_process_that_closes_its_input_between_two_jobs_is_not_asked_again(closes, script):
    deaf = script(f"""read -r line; echo '{{"id": 7, "return_code": 0, "result": '$$'}}'
                      {closes}; exec sleep 60""")
    starts = Starts()
    with contextlib.closing(slot_for(deaf, protocol="lines", start=starts)) as slot:
        assert slot.run(TASK, lambda: False).return_code == 0
        outcome = slot.run(TASK._replace(attempt=1), lambda: False)
        assert (outcome.return_code, outcome.sent_sha256) == (0, sha256("X(90)"))
        assert len(starts.processes) == 2


def test_a_process_that_closes_its_input_with_an_unread_question_is_not_waited_for(
        script, tmp_path):
    os.mkfifo(tmp_path / "go")
    deaf = script(f"""read -r line; echo '{{"id": 7, "return_code": 0, "result": '$$'}}'
                      read -r word <{tmp_path}/go; exec <&-; exec sleep 60""")
    starts = Starts()

    def let_it_close():
        if not said:
            said.append(1)
            (tmp_path / "go").write_text("now\n", encoding="ascii")
        return False
    with contextlib.closing(slot_for(deaf, protocol="lines", start=starts)) as slot:
        said = [1]
        assert slot.run(TASK, let_it_close).return_code == 0
        said.clear()
        assert slot.run(TASK, let_it_close).return_code == 0
        assert len(starts.processes) == 2


def test_a_process_that_closes_its_input_before_its_first_job_has_not_started(script):
    outcome = run(script("exec <&-; exec sleep 60"), protocol="lines")
    assert outcome[:2] == (76, "closed its standard input before it took the job")
    assert (outcome.transient, outcome.started) == (True, False)


def test_an_answer_counts_of_a_process_that_took_the_job_and_closed_its_input(script):
    last = script("""read -r line; exec <&-; sleep 0.1; echo '{"id": 7, "return_code": 0}'""")
    assert run(last, protocol="lines").return_code == 0


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_nothing_is_left_of_an_attempt_that_a_defect_of_the_server_ends(protocol, script):
    class Defect(Process):
        """A process that is started, and fails when it is listened to for the first time."""

        def listen(self, *arguments):
            if not defects:
                defects.append(1)
                raise RuntimeError("a defect")
            return super().listen(*arguments)
    defects = []
    starts = []

    def start(*arguments):
        starts.append((Process if starts else Defect)(*arguments))
        return starts[-1]
    answers = script("""read -r line; echo '{"id": 7, "return_code": 0}'""")
    with contextlib.closing(slot_for(answers, protocol=protocol, start=start)) as slot:
        before = descendants(os.getpid())
        with pytest.raises(RuntimeError):
            slot.run(TASK, lambda: False)
        assert descendants(os.getpid()) == before
        assert slot.run(TASK, lambda: False).return_code == 0


# Lines between two attempts

def rest(slot, condition=lambda: True, may_start=True):
    """Let a slot rest until a condition holds, which is asked after whatever it has read; the
    outcome."""
    return slot.rest(condition, may_start)


def rest_for_a_late_log(slot):
    """The next late log."""
    late = []
    while not late:
        slot.rest(lambda: False, True)
        late = slot.late_logs()
    (number, attempt, log), = late
    return number, attempt, log.text


def test_what_a_lines_runtime_says_between_two_attempts_belongs_to_the_one_before(script, tmp_path):
    os.mkfifo(tmp_path / "go")
    late = script(f"""echo banner; echo hello >&2
                      while read -r line; do
                          echo "begin" >&2; echo '{{"id": 7, "return_code": 0}}'
                          read -r word <{tmp_path}/go; echo "$word" >&2
                          echo '{{"id": 7, "return_code": 3}}'; echo '{{"device": {{"t1": 5}}}}'
                      done""")
    with contextlib.closing(slot_for(late, protocol="lines")) as slot:
        for attempt, word in ((1, "late"), (2, "later")):
            outcome = slot.run(TASK._replace(attempt=attempt), lambda: False)
            assert outcome.return_code == 0
            first = {b"banner", b"hello"} if attempt == 1 else set()
            assert set(outcome.log.text.split()) == {*first, b"begin"}
            assert slot.late_logs() == []
            (tmp_path / "go").write_text(word + "\n", encoding="ascii")
            said = b""
            while b'"return_code": 3' not in said or not slot.device:
                number, of_attempt, said = rest_for_a_late_log(slot)
            assert (number, of_attempt) == (7, attempt)
            assert said.startswith(outcome.log.text) and word.encode() in said
        assert json.loads(slot.device) == {"t1": 5}
        assert json.loads(outcome.device) == {"t1": 5}


def test_what_a_busy_runtime_writes_before_it_reads_the_next_question_belongs_to_the_one_before(
        script, tmp_path):
    for fifo in ("go", "read"):
        os.mkfifo(tmp_path / fifo)
    cools = script(f"""while read -r line; do
                           echo begin >&2; echo '{{"id": 7, "return_code": 0}}'
                           read -r word <{tmp_path}/go; echo "cooled $word" >&2
                           read -r word <{tmp_path}/read
                       done""")
    starts = Starts()
    words = []

    def heard():
        starts.processes[0].read_on()
        return b"cooled" in starts.processes[0].log.kept()[0]

    def let_it_cool():
        """And when that was heard, read the question, which is there by then."""
        for word in words[:]:
            (tmp_path / "go").write_text(word + "\n", encoding="ascii")
            until(heard)
            words.clear()
            (tmp_path / "read").write_text("on\n", encoding="ascii")
        return False
    with contextlib.closing(slot_for(cools, protocol="lines", start=starts)) as slot:
        assert slot.run(TASK._replace(attempt=1), let_it_cool).log.text == b"begin\n"
        for attempt in (2, 3, 4):
            words.append(str(attempt))
            outcome = slot.run(TASK._replace(attempt=attempt), let_it_cool)
            assert (outcome.return_code, outcome.log.text) == (0, b"begin\n")
            late, = slot.late_logs()
            assert late == (7, attempt - 1, jobs.Log(b"begin\ncooled %d\n" % attempt, 0))
        words.append("5")
        let_it_cool()


@pytest.mark.parametrize("size", [90, 5000])
def test_a_question_can_be_read_at_once(size):
    """As with os.read, C's read or `data` of node: a program that takes what it reads for a
    question. The last byte on its own would be one, too."""
    program = """import json, os
while True:
    question = json.loads(os.read(0, 1 << 16))
    answer = {"id": question["id"], "return_code": 0, "result": os.getpid()}
    os.write(1, json.dumps(answer).encode() + b"\\n")
"""
    command = (sys.executable, "-c", program)
    task = TASK._replace(job=", ".join(["X(90)"] * (size // 7)))
    with contextlib.closing(slot_for(command, protocol="lines")) as slot:
        outcomes = [slot.run(task._replace(attempt=n), lambda: False) for n in range(1, 6)]
        assert {outcome.return_code for outcome in outcomes} == {0}
        assert len({outcome.result for outcome in outcomes}) == 1, "started again and again"


def test_a_lines_runtime_that_writes_without_end_between_two_attempts_is_read(script):
    """Or it would stand still with a full pipe, and not read the next question."""
    chatty = script("""while read -r line; do
                           echo '{"id": 7, "return_code": 0}'
                           head -c 300000 /dev/zero >&2; echo >&2; echo '{"device": {"n": 1}}'
                       done""")
    with contextlib.closing(slot_for(chatty, protocol="lines")) as slot:
        for _ in range(3):
            slot.device = None
            assert slot.run(TASK, lambda: False).return_code == 0
            while slot.device is None:
                slot.rest(lambda: slot.device is not None, True)


def test_a_lines_runtime_that_ends_between_two_attempts_is_reaped_at_once(script):
    once = script("""read -r line; echo '{"id": 7, "return_code": 0}'""")
    with contextlib.closing(slot_for(once, protocol="lines")) as slot:
        before = descendants(os.getpid())
        assert slot.run(TASK, lambda: False).return_code == 0
        while descendants(os.getpid()) != before:
            slot.rest(lambda: descendants(os.getpid()) == before, True)


def test_a_rest_ends_when_it_is_woken(script):
    over = threading.Event()
    for protocol in ("exec", "lines"):
        answers = script("""read -r line; echo '{"id": 7, "return_code": 0}'; read -r line""")
        over.clear()
        with contextlib.closing(slot_for(answers, protocol=protocol)) as slot:
            slot.run(TASK, lambda: False)
            resting = threading.Thread(target=slot.rest, args=(over.is_set, True))
            resting.start()
            slot.wake()                 # asked, and not over
            over.set()
            slot.wake()
            resting.join(20)
            assert not resting.is_alive()


# Ready, device, warm

def test_a_device_is_kept_with_each_attempt_as_it_was_when_that_began():
    outcomes = lines('{"ready": true, "device": {"v": 1}}\n' + TRUE,
                     '{"device": {"v": 2}}\n' + TRUE, TRUE, tasks=3)
    assert [json.loads(outcome.device) for outcome in outcomes] == [{"v": 1}, {"v": 1}, {"v": 2}]


def test_a_device_that_follows_the_first_answer_is_not_that_of_its_attempt():
    """Both are read at once."""
    calibrates = TRUE + '{"device": {"v": 2}}\n'
    outcomes = lines('{"device": {"v": 1}}\n' + calibrates, TRUE, tasks=2)
    assert [json.loads(outcome.device) for outcome in outcomes] == [{"v": 1}, {"v": 2}]
    assert [outcome.device for outcome in lines(calibrates, TRUE, tasks=2)] == [None, '{"v": 2}']


def test_the_device_of_a_warm_process_is_that_before_its_first_job(script):
    warm = script("""echo '{"ready": true, "device": {"v": 1}}'
                     read -r line; echo '{"device": {"v": 2}}'
                     echo '{"id": 7, "return_code": 0}'; read -r line""")
    with contextlib.closing(slot_for(warm, protocol="lines", warm=True)) as slot:
        slot.rest(lambda: slot.device is not None, True)
        assert slot.run(TASK, lambda: False).device == '{"v": 1}'


@pytest.mark.parametrize("size, kept", [(65_528, True), (65_529, False)])
def test_a_device_of_64_kib_is_kept_and_a_larger_one_is_noise(size, kept):
    outcome, = lines('{"device": {"a": "' + "x" * (size - 1) + '"}}\n' + TRUE)
    assert (outcome.device is not None, outcome.log.text == b"") == (kept, kept)


@pytest.mark.parametrize("start_timeout, codes", [(1e6, [0, 124]), (1.0, [124, 124])])
def test_the_first_answer_of_a_process_may_take_the_start_timeout_more(
        start_timeout, codes, script, tmp_path):
    """The clock passes the timeout as soon as it is asked, and then it may answer."""
    os.mkfifo(tmp_path / "go")
    slow = script(f"""while read -r line; do
                          echo asked >&2; read -r word <{tmp_path}/go
                          echo '{{"id": 7, "return_code": 0}}'
                      done""")
    clock = Impatient()
    found = []

    def heard():
        clock.heard()
        if clock.asked == 2 and codes[len(found)] == 0:
            (tmp_path / "go").write_text("go\n", encoding="ascii")
        return False
    with contextlib.closing(slot_for(slow, protocol="lines", clock=clock, timeout=900.0,
                                     start_timeout=start_timeout)) as slot:
        for _ in codes:
            clock.asked = 0
            clock.ahead = 0.0
            found.append(slot.run(TASK, heard).return_code)
    assert found == codes


def test_from_ready_on_an_attempt_has_its_timeout_alone(script):
    connects = script("echo '{\"ready\": true}'; read -r line; exec sleep 60")
    outcome = run(connects, protocol="lines", timeout=0.1, start_timeout=1000.0)
    assert outcome[:2] == (124, "took longer than its timeout of 0.1 s")


def test_a_big_job_that_is_written_while_its_process_gets_ready_is_written_whole():
    big = TASK._replace(job=", ".join(["X(90)"] * 450_000))
    ready = ("import json, sys\nprint('{\"ready\": true}', flush=True)\n"
             "question = json.loads(sys.stdin.readline())\n"
             "print(json.dumps({'id': 7, 'return_code': 0, 'result': len(question['job'])}))")
    outcome = run(sys.executable, "-c", ready, protocol="lines", task=big)
    assert (outcome.return_code, outcome.result) == (0, str(len(big.job)))
    assert outcome.sent_sha256 == sha256(big.job)


def test_a_warm_runtime_is_started_by_a_rest_and_says_when_it_is_ready(script):
    says = script("""echo '{"ready": true, "device": {"n": 1}}'; echo connected >&2
                     while read -r line; do echo '{"id": 7, "return_code": 0}'; done""")
    starts = Starts()
    with contextlib.closing(slot_for(says, protocol="lines", start=starts, warm=True,
                                     start_timeout=1000.0)) as slot:
        assert rest(slot, may_start=False) is None and not starts.processes
        outcome = rest(slot, lambda: False)
        assert (outcome.return_code, outcome.started) == (0, True)
        assert json.loads(slot.device) == {"n": 1}
        outcome = slot.run(TASK, lambda: False)
        assert (outcome.return_code, len(starts.processes)) == (0, 1)
        assert b"connected" in outcome.log.text, "it belongs to the first attempt"


@pytest.mark.parametrize("fails", ["echo 'no device' >&2; exit 1", "echo 'no device' >&2; exit 0",
                                   "echo '{\"ready\": true}'; echo 'no device' >&2; exit 3"])
def test_a_warm_runtime_that_ends_before_its_first_answer_has_failed_to_start(fails, script):
    with contextlib.closing(slot_for(script(fails), protocol="lines", warm=True,
                                     start_timeout=1000.0)) as slot:
        outcome = None
        while outcome is None or outcome.started:
            outcome = rest(slot, lambda: False)
        assert outcome.runtime_error == "no device"


@pytest.mark.parametrize("says, start_timeout", [("ready", 1000.0), ("nothing", 0.0)])
def test_a_warm_process_that_has_started_and_is_killed_is_replaced_and_no_failed_start(
        says, start_timeout, script):
    starts = Starts()
    says = script(f"""echo '{{"{says}": true}}'; exec sleep 60""")
    with contextlib.closing(slot_for(says, protocol="lines", warm=True, start=starts,
                                     start_timeout=start_timeout)) as slot:
        for count in (1, 2, 3, 4):
            assert rest(slot, lambda: False) == jobs.Outcome(0)
            assert len(starts.processes) == count
            os.kill(starts.processes[-1].pid, signal.SIGKILL)
            slot.wake()                 # or it takes a second
            assert slot.rest(lambda: False, True) is None


def test_a_warm_runtime_that_says_nothing_has_started_after_its_start_timeout():
    with contextlib.closing(slot_for("cat", protocol="lines", warm=True)) as slot:
        assert rest(slot, lambda: False) == jobs.Outcome(0)


# A sweep

UNTIDY = r"""#!/usr/bin/env python3
import json, sys
print("QDriver 1.2 connected")
print('{"ready": true, "device": {"name": "q"}}')
for line in sys.stdin:
    question = json.loads(line)
    number = question["id"]
    for percent in (0, 50, 100):
        print(f"\r{percent} %", end="")
    print("warning: the fridge is warm", file=sys.stderr, flush=True)
    result = question["job"]
    if number == 90:
        result = float("nan")
    for _ in range(2):
        print(json.dumps({"id": number, "return_code": 0, "result": result}), flush=True)
    print("DEBUG", {"return_code": 0}, json.dumps({"return_code": 5}), flush=True)
"""


def test_a_sweep_of_181_jobs_through_an_untidy_runtime_gives_each_its_own_result(tmp_path):
    untidy = tmp_path / "untidy"
    untidy.write_text(UNTIDY, encoding="utf-8")
    untidy.chmod(0o755)
    with contextlib.closing(slot_for([untidy], protocol="lines")) as slot:
        for number in range(181):
            job = f"X({number})"
            outcome = slot.run(TASK._replace(id=number, job=job), lambda: False)
            slot.rest(lambda: True, True)
            assert outcome.sent_sha256 == sha256(job)
            if number == 90:
                assert outcome.return_code == 76 and "NaN" in outcome.result
            else:
                assert (outcome.return_code, outcome.result) == (0, f'"{job}"')
            assert json.loads(outcome.device) == {"name": "q"} and outcome.pause is None


# Where there is less than Linux has today

def test_without_pidfd_an_end_is_seen_too(monkeypatch, script):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert run(hostile("closes-output"), "sh", "-c", "exit 3").return_code == 3
    assert run(script("exit 4"), protocol="lines").return_code == 4
    assert time_out(hostile("ignores-term"), kill_grace=0.05).return_code == 124


@pytest.mark.parametrize("protocol", ["exec", "lines"])
def test_what_cannot_be_started_for_want_of_processes_is_tried_again(protocol):
    def refuse(*_):
        raise OSError(11, "Resource temporarily unavailable")
    outcome = run("true", protocol=protocol, start=refuse)
    assert (outcome.return_code, outcome.transient, outcome.started) == (126, True, False)
    assert outcome.runtime_error == "could not be started: Resource temporarily unavailable"


@contextlib.contextmanager
def room_for(count):
    """Meanwhile this process can open so many descriptors more."""
    highest, taken = max(map(int, os.listdir("/proc/self/fd"))), [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < highest:      # whatever number is free below gives room, too
        taken.append(os.open(os.devnull, os.O_RDONLY))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.parametrize("protocol, room", [*(("exec", room) for room in range(5)),
                                            *(("lines", room) for room in range(6))])
def test_an_attempt_for_whose_next_file_or_pipe_there_is_no_descriptor_keeps_none(protocol, room):
    with contextlib.closing(slot_for("true", protocol=protocol)) as slot:
        before = possessions()
        with room_for(room):
            outcome = slot.run(TASK, lambda: False)
        assert (outcome.return_code, outcome.runtime_error, outcome.transient, outcome.started) == (
            126, "could not be started: Too many open files", True, False)
        assert possessions() - before == set()


# The echo

def test_echo_gives_the_return_code_that_was_asked_for():
    echo = runtimes.slot(RuntimeSpec("echo", None, ("echo",), "echo"), Clock(), 5.0)
    with contextlib.closing(echo) as slot:
        for code in (0, 1, 75, 124, 255):
            outcome = slot.run(TASK._replace(return_code=code), lambda: False)
            assert outcome[:3] == (code, f"echo of return code {code}" if code else None, None)
            assert outcome.transient == (code == jobs.TEMPFAIL)
