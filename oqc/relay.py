"""The relay: a runtime over the protocol `lines` that runs a program over `exec`, behind ssh.

It does there what a server's slot does here, since ssh hands on neither the environment nor the end
of an attempt. When its standard input closes, the attempt is over: the program ends, and all that
it has started. However the relay itself dies, its keeper sees to that.

A lock is held from the start of a program until nothing is left of it. The keeper holds it as well:
flock(2) gives it up when the last descriptor of the open file is closed.

Its threads: main reads the questions, `attempts` answers them one by one, `errors` writes what the
programs wrote on standard error, and waits there for an ssh that is slow; the reaper is tree.py's.
"""
import argparse
import contextlib
import fcntl
import functools
import json
import os
import queue
import select
import signal
import sys
import threading
from typing import Any, Callable, Dict, Iterator, Optional, Protocol, Sequence, Tuple, Union

from oqc import jobs, runtimes, tree
from oqc.clock import Clock
from oqc.jobs import Log, Malformed, Outcome, RuntimeSpec, Task
from oqc.keeper import Keeper

LOCK = "oqc-relay.lock"             # in the current directory, as the server's is
LOCK_EVERY = 0.05                   # seconds between looks whether it is free
LOCK_SHARE = 0.9                    # of the timeout: the answer comes before the server gives up
TIMEOUT = 60.0                      # seconds, of a question that names none
MEMBERS = ("job", "mode", "shots", "seed", "tag", "note")       # of a question, and of a submission
MOST_RESULT = 8 << 20               # bytes, as much as result_bytes may be: the server judges
MOST_ERROR = 1 << 17                # bytes of standard error that wait to be copied: two reads
MOST_PIECES = 64                    # of standard error that wait to be written
ERRORS_WAIT = 5.0                   # seconds that an answer waits for them
SURVIVORS_EVERY = 1.0               # seconds between looks at what cannot be ended

DESCRIPTION = """\
A runtime over the protocol lines: reads a question a line on standard input, runs COMMAND over the \
protocol exec, and answers in a line. For the far side of ssh: when its input closes, COMMAND ends, \
with all that it has started.
"""


class Slot(Protocol):
    """What makes an attempt, as runtimes.Slot."""

    spec: RuntimeSpec

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        """Run one attempt; ask `interrupted()` after whatever was read, and at each `wake`."""

    def log(self, number: int) -> Log:
        """Return what the attempt that runs at this job has written on standard error."""

    def wake(self) -> None:
        """Have a running attempt ask `interrupted()` again."""


def main(arguments: Sequence[str]) -> int:
    """Run `relay [--lock FILE …] COMMAND`; return the exit status."""
    spec, path, kill_grace = _settings(arguments)
    tree.reset_signals()
    clock = Clock()
    try:
        lock = _open_lock(path)
    except OSError as error:
        print(f"oqc relay: {path}: {error.strerror}; --lock names another file", file=sys.stderr)
        return 1
    keeper = Keeper(clock, lock)    # before there are threads
    keeper.tell(tree.INSTANCE.begin(os.urandom(8).hex(), 1, clock))
    survivors = functools.partial(tree.INSTANCE.survivors, spec.name)
    with contextlib.closing(runtimes.slot(spec, clock, kill_grace)) as slot:
        Relay(slot, survivors, path, lock, clock).serve(0)
    while survivors():
        clock.wait(threading.Event(), SURVIVORS_EVERY)
    keeper.stop()
    return 0


def _settings(arguments: Sequence[str]) -> Tuple[RuntimeSpec, str, float]:
    """Return what to run, the lock's path and the seconds from TERM to KILL; exit if an argument
    is invalid."""
    parser = argparse.ArgumentParser(prog="oqc relay", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--lock", metavar="FILE", default=LOCK,
        help="the file whose lock is held while COMMAND runs; relays with the same file run one "
             "job at a time (default: %(default)s in the current directory)")
    parser.add_argument(
        "--name", default="relay",
        help="what COMMAND finds in OQC_RUNTIME (default: %(default)s)")
    parser.add_argument(
        "--kill-grace", metavar="SECONDS", type=float, default=5.0,
        help="time between SIGTERM, which asks COMMAND to end, and SIGKILL (default: %(default)g)")
    parser.add_argument("command", metavar="COMMAND", help="a program over the protocol exec")
    parser.add_argument("arguments", metavar="…", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    if not jobs.NAME.fullmatch(options.name):
        parser.error("--name: expected letters, digits, '.', '_' and '-', 64 at most")
    if not 0 <= options.kill_grace <= 3600:
        parser.error("--kill-grace: expected 0 to 3600 seconds")
    command = (options.command, *options.arguments)
    spec = RuntimeSpec(
        options.name, command, jobs.MODES[:2], result_bytes=MOST_RESULT, log_bytes=MOST_ERROR)
    return spec, options.lock, options.kill_grace


def _open_lock(path: str) -> int:
    """Return the descriptor of a lock's file; raise OSError, also if its file system has none."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(BlockingIOError):      # it is held, and so can be
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)
    return lock


class Relay:
    """Answers questions by attempts in a slot, one at a time."""

    def __init__(
        self,
        slot: Slot,
        survivors: Callable[[], str],
        path: str,
        lock: int,
        clock: Clock,
    ) -> None:
        """`survivors` returns what of an attempt cannot be ended, as a line; `lock` is the open
        file of that path."""
        self._slot = slot
        self._survivors = survivors
        self._path = path
        self._lock = lock
        self._clock = clock
        self._closed = threading.Event()        # our standard input is
        self._questions: "queue.SimpleQueue[bytes]" = queue.SimpleQueue()   # b"": no more come
        self._number = 0                        # of the job that runs
        self._copied = 0                        # bytes of the attempt's standard error
        # What is to be written on standard error; an event is set when it is its turn.
        self._errors: "queue.SimpleQueue[Union[bytes, threading.Event]]" = queue.SimpleQueue()

    def serve(self, descriptor: int) -> None:
        """Answer the questions of this open file until it is closed, or Ctrl-C comes, and end what
        runs then.

        Attempts are made by a thread of its own: orphans of a program become children of the main
        one, and are told from programs by that.
        """
        attempts = threading.Thread(target=self._answer_all, name="attempts", daemon=True)
        attempts.start()
        threading.Thread(target=self._write_errors, name="errors", daemon=True).start()
        _write(1, b'{"ready": true}\n')
        with contextlib.suppress(KeyboardInterrupt):
            for line in _lines(descriptor):
                self._questions.put(line)
        self._closed.set()
        self._slot.wake()
        self._questions.put(b"")
        attempts.join()

    def _answer_all(self) -> None:
        """The thread of the attempts."""
        for line in iter(self._questions.get, b""):
            answer = self._answer(line)
            if self._closed.is_set():
                return
            _write(1, json.dumps(answer).encode() + b"\n")

    def _answer(self, line: bytes) -> Dict[str, Any]:
        """Return the answer to the question in a line; nobody reads it if that is closed."""
        number = None
        try:
            question = json.loads(line.decode("utf-8"), parse_constant=jobs.refuse_constant)
            if isinstance(question, dict):
                number = question.get("id")
            task, timeout = _task(question)
        except (ValueError, RecursionError) as error:
            outcome = Outcome(jobs.DATAERR, f"not a job: {error}")
        else:
            try:
                outcome = self._attempt(task, timeout)
            except Exception as error:      # pylint: disable=broad-exception-caught # or no answer
                outcome = Outcome(jobs.SOFTWARE, f"a defect of the relay: {error!r}")
        return {
            "id": number,
            "return_code": outcome.return_code,
            "runtime_error": outcome.runtime_error,
            "result": _result(outcome),
        }

    def _attempt(self, task: Task, timeout: float) -> Outcome:
        """Make an attempt while the lock is held; in `timeout` seconds, that for the lock too."""
        waited = self._take_lock(LOCK_SHARE * timeout)
        if waited is None:
            return Outcome(jobs.TEMPFAIL, f"busy: {self._obstacle()}")
        self._slot.spec = self._slot.spec._replace(timeout=timeout - waited)
        self._number = task.id
        self._copied = 0
        outcome = self._slot.run(task, self._is_interrupted)
        if not self._survivors():
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._copy_errors()
        written = threading.Event()
        self._errors.put(written)
        self._clock.wait(written, ERRORS_WAIT)
        return outcome

    def _take_lock(self, most: float) -> Optional[float]:
        """Take the lock, when nothing is left of what we ran; return the seconds that it was waited
        for, None if it was not to be had in `most`, or our input is closed."""
        began = self._clock.monotonic()
        waited = 0.0
        while waited < most and not self._closed.is_set():
            with contextlib.suppress(BlockingIOError):
                if not self._survivors():
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return waited
            if not waited:
                words = f"oqc relay: waiting: {self._obstacle()}\n"
                self._errors.put(words.encode("utf-8", "replace"))
            self._clock.wait(self._closed, LOCK_EVERY)
            waited = self._clock.monotonic() - began
        return None

    def _obstacle(self) -> str:
        """Return why a program cannot be started now, as a line."""
        return self._survivors() or f"another relay's program is not over, it holds {self._path}"

    def _is_interrupted(self) -> bool:
        """Return whether the attempt is to end; called after whatever was read of its program."""
        self._copy_errors()
        return self._closed.is_set()

    def _copy_errors(self) -> None:
        """Have what the program has written since the last time written on our standard error.

        If that is slower than the program, the oldest is left out.
        """
        text, dropped = self._slot.log(self._number)
        new = dropped + len(text) - self._copied
        if new <= 0:
            return
        self._copied += new
        if self._errors.qsize() >= MOST_PIECES:
            with contextlib.suppress(queue.Empty):
                self._errors.get_nowait()
        self._errors.put(text[-new:])

    def _write_errors(self) -> None:
        """The thread of the errors."""
        while True:
            piece = self._errors.get()
            if isinstance(piece, threading.Event):
                piece.set()
            else:
                _write(2, piece)


def _lines(descriptor: int) -> Iterator[bytes]:
    """Yield the lines of an open file, until it ends or a signal comes.

    The signal is heard by a pipe: one that comes just before a read would wait for its end.
    """
    signals, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(signals, select.POLLIN)
    rest = b""
    while signals not in dict(poll.poll()):
        data = os.read(descriptor, 1 << 16)
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if not data:
            break
    if rest:
        yield rest


def _task(question: Any) -> Tuple[Task, float]:
    """Return a question as a task, and its timeout in seconds; raise Malformed if it is none.

    All but the job may be left out, by people who type one.
    """
    if isinstance(question, dict):
        members = {name: question[name] for name in MEMBERS if question.get(name) is not None}
        submission = jobs.parse({"mode": "verbatim", **members})
    else:
        submission = jobs.parse(question)
    number = question.get("id", 0)
    attempt = question.get("attempt", 1)
    timeout = question.get("timeout", TIMEOUT)
    submitter = question.get("submitter") or ""
    for value, kind in ((number, int), (attempt, int), (timeout, (int, float)), (submitter, str)):
        if not isinstance(value, kind):
            raise Malformed("id and attempt are whole numbers, timeout is seconds, "
                            "submitter is text")
    if timeout <= 0:
        raise Malformed("timeout: expected more than 0 seconds")
    task = Task(
        number, submission.job, submission.mode, attempt, submission.shots, submission.seed or 0,
        0, submitter, submission.tag, submission.note)
    return task, float(timeout)


def _result(outcome: Outcome) -> Any:
    """Return the result as JSON; as text if it is none that an answer can carry (1e999)."""
    if outcome.result is None:
        return None
    if not outcome.is_json:
        return jobs.result_bytes(outcome.result).decode("utf-8", "replace")
    try:
        result = json.loads(outcome.result)
        json.dumps(result, allow_nan=False)
    except (ValueError, RecursionError):
        return outcome.result
    return result


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it; nothing once nobody reads it any more."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data):]
