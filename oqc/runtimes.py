"""Slots: one attempt at a job by `exec`, by `lines` or as an echo, and what its end means.

A runtime is a program from outside. Whatever it does, an attempt ends when it should, and nothing
of the attempt is left. How its process is started and ended is process.py's concern.
"""
import contextlib
import errno
import json
import os
import signal
import tempfile
from typing import IO, Callable, Dict, Optional, Protocol, Sequence, Tuple

from oqc import jobs
from oqc.jobs import Log, Outcome, RuntimeSpec, Task
from oqc.process import MOST_ERROR, MOST_OUTPUT, Clock, Process
from oqc.tree import script_fault

SECRETS = ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")    # of the environment, and all of OQC_*
QUESTION = ("id", "job", "mode", "attempt", "shots", "seed")    # of a Task, what `lines` is asked
INTERRUPTED = Outcome(jobs.CANCELLED, interrupted=True)


class Child(Protocol):
    """A running process, as process.Process is one; that is where each method is described."""

    output: bytearray
    error: bytearray

    @property
    def survivors(self) -> str:
        """What of it could not be ended, as a line."""

    def exited(self) -> bool:
        """Return whether it has ended."""

    def listen(self, deadline: float, is_over: Callable[[], bool]) -> bool:
        """Read what it writes until it has ended or `is_over`; return False at the deadline."""

    def send(self, data: bytes, deadline: float, is_over: Callable[[], bool]) -> bool:
        """Write to its standard input while listening."""

    def took_some(self) -> bool:
        """Return whether it has read anything of what it was sent."""

    def read_on(self) -> None:
        """Read what it has written by now."""

    def end(self, grace: float) -> int:
        """End it with all its children; return its exit code, or -n after signal n."""


# What starts one, as Process(command, environment, feed, wake, clock, cwd) does; raises OSError.
Start = Callable[
    [Sequence[str], Dict[str, str], Optional[int], int, Clock, Optional[str]], Child]


class Slot:
    """Room for one attempt at a time on a runtime. One thread runs it; any thread may `wake` it."""

    def __init__(
        self,
        spec: RuntimeSpec,
        clock: Clock,
        kill_grace: float,
        start: Start = Process,
    ) -> None:
        """Make the pipe of `wake`; raise OSError if no descriptor is left. `kill_grace`: seconds
        from TERM to KILL."""
        self.spec = spec
        self._clock = clock
        self._kill_grace = kill_grace
        self._start = start
        self.survivors = ""         # of the last process: what could not be ended
        self._wake, self._wake_write_end = os.pipe()
        os.set_blocking(self._wake_write_end, False)
        inherited = {
            variable: value
            for variable, value in os.environ.items()
            if not variable.startswith("OQC_") and variable not in SECRETS
        }
        # QRMI, the quantum resource management interface, reads the name of its resource there.
        name = {"OQC_RUNTIME": spec.name, "QRMI_JOB_QPU_RESOURCES": spec.name}
        self._environment = {**inherited, **name}

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        """Run one attempt to its end, or until `interrupted()`; then the outcome says so."""
        raise NotImplementedError

    def log(self) -> Log:
        """Return what the attempt that runs now has written on standard error. For any thread."""
        return Log()

    def wake(self) -> None:
        """Have a running attempt ask `interrupted()` again, now."""
        with contextlib.suppress(BlockingIOError):      # it is full, and so will be read
            os.write(self._wake_write_end, b"!")

    def close(self) -> None:
        """End what is left between attempts."""
        os.close(self._wake)
        os.close(self._wake_write_end)

    def _start_command(self, environment: Dict[str, str], feed: Optional[int]) -> Child:
        """Start the runtime's command with these variables besides; raise OSError."""
        assert self.spec.command is not None, "builtin.command has that of a bundled runtime"
        self.survivors = ""
        environment = {**self._environment, **environment}
        return self._start(
            self.spec.command, environment, feed, self._wake, self._clock, self.spec.cwd)

    def _timed_out(self) -> Outcome:
        """Return the outcome of an attempt that was not over in time."""
        error = f"took longer than its timeout of {self.spec.timeout:g} s"
        return Outcome(jobs.TIMED_OUT, error)

    def _outcome_of_exit(self, code: int, process: Child) -> Outcome:
        """Return the outcome of a process that ended by itself; the code is what `end` gave."""
        error = _last_words(process)
        if code < 0:
            cause = f"died of {_signal_name(-code)}"
            if error:
                cause += f"; {error}"
            return Outcome(128 - code, cause, transient=True)
        if code == 0:
            return Outcome(0)
        error = error or f"exit status {code}"
        if code in (jobs.NOT_EXECUTABLE, jobs.NOT_FOUND) and self.spec.command:
            # as `env` says it of #!/usr/bin/env python3 and a CR
            error = script_fault(self.spec.command[0]) or error
        if code in (jobs.NOT_EXECUTABLE, jobs.NOT_FOUND):
            return Outcome(code, error, transient=True, started=False)
        return Outcome(code, error, transient=code in self.spec.retry_codes)


class ExecSlot(Slot):
    """Protocol `exec`: a process for each attempt.

    The job is its standard input, its standard output the result, its exit status the return code.
    """

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        try:
            process = self._start_attempt(task)
        except OSError as error:
            return _unstartable(error)
        deadline = self._clock.monotonic() + self.spec.timeout
        in_time = process.listen(deadline, interrupted)
        exited = process.exited()       # by itself: asked before it is made to
        code = process.end(self._kill_grace)
        self.survivors = process.survivors
        if exited:
            outcome = self._outcome_of_exit(code, process)
        elif in_time:
            outcome = INTERRUPTED
        else:
            outcome = self._timed_out()
        result, is_json = _result(process.output)
        return outcome._replace(result=result, is_json=is_json)

    def _start_attempt(self, task: Task) -> Child:
        """Start the process that this task is given to; raise OSError."""
        environment = {
            "OQC_JOB_ID": str(task.id),
            "OQC_MODE": task.mode,
            "OQC_ATTEMPT": str(task.attempt),
            "OQC_SHOTS": str(task.shots),
            "OQC_SEED": str(task.seed),
        }
        with _memory_file() as feed:    # a pipe would block at 64 KiB until it is read
            feed.write(task.job.encode() + b"\n")
            feed.seek(0)
            return self._start_command(environment, feed.fileno())


class LinesSlot(Slot):
    """Protocol `lines`: a process that stays, and an attempt is a JSON line in and one out."""

    _process: Optional[Child] = None
    _has_answered = False               # the process, to anything

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        deadline = self._clock.monotonic() + self.spec.timeout
        try:
            process = self._make_ready()
        except OSError as error:
            return _unstartable(error)
        question = {name: getattr(task, name) for name in QUESTION}
        in_time = process.send(
            json.dumps(question).encode() + b"\n",
            deadline,
            lambda: _is_answered(process) or interrupted(),
        )
        if not _is_answered(process):
            process.read_on()           # it may have answered and ended at once
        if _is_answered(process):
            return self._outcome_of_answer(process)
        return self._outcome_without_answer(process, in_time)

    def close(self) -> None:
        if self._process is not None:
            self._end(self._process)
        super().close()

    def _make_ready(self) -> Child:
        """Return a process that has said nothing yet, the old one or a new one; raise OSError."""
        if self._process is not None and self._process.exited():
            self._end(self._process)    # it ended between two attempts, and harmed neither
        if self._process is None:
            self._process = self._start_command({}, None)
            self._has_answered = False
        else:
            self._process.read_on()     # said without being asked: no answer to the next question
            self._process.output.clear()
            self._process.error.clear()
        return self._process

    def _outcome_of_answer(self, process: Child) -> Outcome:
        """Return the outcome in an answer; end a process that does not keep to the protocol."""
        line, end, _ = process.output.partition(b"\n")
        if not end:                     # the job ran: it would take as long, and say as much, again
            self._end(process)
            error = "an answer longer than 1 MiB; its beginning is the result"
            return Outcome(jobs.PROTOCOL, error, *_result(line))
        outcome = _parse_answer(line, self.spec.retry_codes)
        self._has_answered = True
        if outcome.return_code == jobs.PROTOCOL and outcome.transient:
            self._end(process)
        return outcome

    def _outcome_without_answer(self, process: Child, in_time: bool) -> Outcome:
        """End the process; return the outcome without an answer."""
        exited = process.exited()       # by itself: asked before it is made to
        # One that ends before it takes a job has not started; later it may be the job's fault.
        started = self._has_answered or process.took_some()
        code = self._end(process)
        if exited:
            outcome = self._outcome_of_exit(code, process)
            if code == 0:
                error = _last_words(process) or "ended without an answer"
                outcome = Outcome(jobs.PROTOCOL, error)
            return outcome._replace(transient=True, started=started and outcome.started)
        if in_time:
            return INTERRUPTED
        return self._timed_out()

    def _end(self, process: Child) -> int:
        """End the process, so that the next attempt starts another; return its exit code."""
        self._process = None
        code = process.end(self._kill_grace)
        self.survivors = process.survivors
        return code


class EchoSlot(Slot):
    """The echo: the return code that was asked for, and no process."""

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        return jobs.echo(task.return_code, self.spec.retry_codes)


SLOTS = {"exec": ExecSlot, "lines": LinesSlot, "echo": EchoSlot}


def slot(spec: RuntimeSpec, clock: Clock, kill_grace: float, start: Start = Process) -> Slot:
    """Return a slot for this runtime, by its protocol; raise OSError if there is no room for it.

    `kill_grace`: seconds from TERM to KILL. `start`: what starts its processes.
    """
    return SLOTS[spec.protocol](spec, clock, kill_grace, start)


def _memory_file() -> IO[bytes]:
    """Return a new file without a name: in memory (Linux), where it costs less than on a disk."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("job"), "w+b")
    return tempfile.TemporaryFile()     # pylint: disable=consider-using-with # the caller does


def _unstartable(error: OSError) -> Outcome:
    """Return the outcome if no process could be started; the error says why."""
    code = jobs.NOT_FOUND if error.errno == errno.ENOENT else jobs.NOT_EXECUTABLE
    text = f"could not be started: {error.strerror}"
    return Outcome(code, text, transient=True, started=False)


def _last_words(process: Child) -> Optional[str]:
    return _last_line(process.error.decode("utf-8", "replace"))


def _last_line(text: str) -> Optional[str]:
    """Return the last line that is not blank, or None if all are."""
    lines = text.replace("\0", "\ufffd").strip().splitlines()
    return lines[-1].strip() if lines else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:                  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {number}"


def _result(output: bytearray) -> Tuple[Optional[str], bool]:
    """Return what was put out as text, None for nothing, and whether it is JSON."""
    text = output[:MOST_OUTPUT].decode("utf-8", "replace")
    try:
        json.loads(text, parse_constant=jobs.refuse_constant)
        return text.strip(), True
    except (ValueError, RecursionError):
        return text or None, False


def _is_answered(process: Child) -> bool:
    """Return whether it has put out a line, or more than a line may have."""
    return b"\n" in process.output or len(process.output) > MOST_OUTPUT


def _parse_answer(line: bytearray, retry_codes: Sequence[int]) -> Outcome:
    """Return the outcome in an answer, {"return_code", "runtime_error", "result"}.

    A line that is none becomes PROTOCOL, to be tried again.
    """
    try:
        answer = json.loads(line.decode("utf-8"), parse_constant=jobs.refuse_constant)
        code = answer["return_code"]
        error = answer.get("runtime_error")
        result = answer.get("result")
        if isinstance(code, bool) or not isinstance(code, int) or not 0 <= code <= 255:
            raise ValueError("return_code")
        if not isinstance(error, (str, type(None))):
            raise ValueError("runtime_error")
        text = None if result is None else json.dumps(result, allow_nan=False)  # 1e999: infinity
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        beginning = line[:80].decode("utf-8", "replace")
        error = f"not an answer: {json.dumps(beginning)}"
        return Outcome(jobs.PROTOCOL, error, transient=True)
    if code == 0:
        return Outcome(0, None, text, True)
    error = _last_line(error or "") or f"return code {code}"
    error = error.encode("utf-8", "replace")[:MOST_ERROR].decode("utf-8", "ignore")
    return Outcome(code, error, text, True, transient=code in retry_codes)
