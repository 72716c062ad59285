"""Slots: one attempt at a job by `exec`, by `lines` or as an echo, and what its end means.

A runtime is a program from outside. Whatever it does, an attempt ends when it should, and nothing
of the attempt is left. How its process is started and ended is process.py's concern.
"""
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import signal
import tempfile
from typing import IO, Any, Callable, Dict, List, Optional, Protocol, Sequence, Set, Tuple

from oqc import jobs
from oqc.jobs import Log, Outcome, RuntimeSpec, Task
from oqc.lines import (
    BESIDE_RESULT, STRICT, Answer, Lines, beginning, cut, is_object, last_line, read, read_cut,
    too_long)
from oqc.process import PIPE_READ, Clock, Process, Tail, wait_to_read
from oqc.tree import script_fault

log = logging.getLogger("oqc")

SECRETS = ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")    # of the environment, and all of OQC_*
INTERRUPTED = Outcome(jobs.CANCELLED, interrupted=True)
STARTED = Outcome(0)                # of a process that has started without a job
ENDED_BY_US = (-signal.SIGTERM, -signal.SIGKILL)
KILLED_PAUSE = 1.0                  # seconds until a warm process that was killed is replaced
KEEP_EVERY = 1.0                    # seconds between two logs that are kept between attempts


class Child(Protocol):
    """A running process, as process.Process is one; that is where each method is described."""

    most_output: int
    output: bytearray
    error: bytearray
    log: Tail
    heard: int
    has_closed_input: bool

    @property
    def survivors(self) -> str:
        """What of it could not be ended, as a line."""

    def exited(self) -> bool:
        """Return whether it has ended."""

    def listen(self, deadline: float, is_over: Callable[[], bool]) -> bool:
        """Read what it writes until it has ended or `is_over`; return False at the deadline."""

    def send(self, data: bytes, deadline: float, is_over: Callable[[], bool],
             when_taken: Callable[[], None]) -> bool:
        """Write to its standard input while listening."""

    def send_no_more(self) -> None:
        """Drop what it has not taken of what it was sent."""

    def written(self) -> Optional[bytes]:
        """Return what was sent last, as it was written; None if not all of it was."""

    def took_some(self) -> bool:
        """Return whether it has read anything of what it was sent last."""

    def read_on(self) -> None:
        """Read what it has written by now."""

    def end(self, grace: float) -> int:
        """End it with all its children; return its exit code, or -n after signal n."""


# What starts one, as Process(command, environment, feed, wake, clock, cwd) does; raises OSError.
Start = Callable[
    [Sequence[str], Dict[str, str], Optional[int], int, Clock, Optional[str]], Child]


class Slot:
    """Room for one attempt at a time on a runtime. One thread runs it and rests on it; any thread
    may `wake` it and ask for its `log` and its `device`."""

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
        self.device: Optional[str] = None       # JSON: what the runtime says of itself
        self._clock = clock
        self._kill_grace = kill_grace
        self._start = start
        self.survivors = ""         # of the last process: what could not be ended
        self._log: Optional[Tail] = None        # of the attempt that runs, or was the last
        self._log_of = 0                # the job whose log that is
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

    def rest(self, is_over: Callable[[], bool], may_start: bool) -> Optional[Outcome]:
        """Wait between attempts until `is_over()`, which is asked again at each `wake`; or return
        sooner, for what is to be done.

        Return an outcome if a process has started without a job, or failed to: only where
        `may_start`, and the runtime is to be warm.
        """
        del may_start               # there is no process between attempts
        while not is_over():
            os.read(self._wake, 64)

    def late_logs(self) -> List[Tuple[int, int, Log]]:
        """Return (job, attempt, log) of attempts whose log has grown since they were over."""
        return []

    def log(self, number: int) -> Log:
        """Return what the attempt that runs now at this job has written on standard error. For any
        thread."""
        tail = self._log
        if tail is None or self._log_of != number:
            return Log()
        return Log(*tail.kept())

    def wake(self) -> None:
        """Have a running attempt ask `interrupted()` again, or a rest its `is_over()`, now."""
        with contextlib.suppress(BlockingIOError):      # it is full, and so will be read
            os.write(self._wake_write_end, b"!")

    def close(self) -> None:
        """End what is left between attempts."""
        os.close(self._wake)
        os.close(self._wake_write_end)

    def _start_command(
        self,
        environment: Dict[str, str],
        feed: Optional[int],
        most_output: int,
    ) -> Child:
        """Start the runtime's command with these variables besides; raise OSError."""
        assert self.spec.command is not None, "builtin.command has that of a bundled runtime"
        self.survivors = ""
        environment = {**self._environment, **environment}
        process = self._start(
            self.spec.command, environment, feed, self._wake, self._clock, self.spec.cwd)
        process.most_output = most_output
        process.log = Tail(self.spec.log_bytes)
        self._log = process.log
        return process

    def _timed_out(self, process: Child) -> Outcome:
        """Return the outcome of an attempt that was not over in time, with its last words before
        it is ended."""
        error = f"took longer than {self._time_allowed()}"
        words = _last_words(process)
        if words:
            error += f"; {words}"
        return Outcome(jobs.TIMED_OUT, error)

    def _time_allowed(self) -> str:
        return f"its timeout of {_seconds(self.spec.timeout)} s"

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
        if code in (jobs.NOT_EXECUTABLE, jobs.NOT_FOUND) and self.spec.command:
            # as `env` says it of #!/usr/bin/env python3 and a CR
            error = script_fault(self.spec.command[0]) or error
        error = error or f"exit status {code}"
        return Outcome(code, error, transient=code in self.spec.retry_codes)


class ExecSlot(Slot):
    """Protocol `exec`: a process for each attempt.

    The job is its standard input, its standard output the result, its exit status the return code.
    """

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        self._log = None
        self._log_of = task.id
        try:
            process, sent = self._start_attempt(task)
        except OSError as error:
            return _unstartable(error)
        deadline = self._clock.monotonic() + self.spec.timeout
        try:
            in_time = process.listen(deadline, interrupted)
            exited = process.exited()   # by itself: asked before it is made to
            outcome = INTERRUPTED if in_time else self._timed_out(process)
        finally:                        # also at a defect
            code = process.end(self._kill_grace)
            self.survivors = process.survivors
        if exited:
            outcome = self._outcome_of_exit(code, process)
        outcome = self._with_result(outcome, process.output)
        return outcome._replace(log=self.log(task.id), sent_sha256=sent)

    def _with_result(self, outcome: Outcome, output: bytearray) -> Outcome:
        """Return the outcome with what was put out; one that is too long makes it no success."""
        most = self.spec.result_bytes
        if len(output) <= most:
            result, is_json = _result(output)
            return outcome._replace(result=result, is_json=is_json)
        if outcome.return_code == 0:
            return too_long(output, most)
        error = cut(outcome.runtime_error, most)
        return outcome._replace(runtime_error=error, result=beginning(output, most))

    def _start_attempt(self, task: Task) -> Tuple[Child, bytes]:
        """Start the process that this task is given to; return it and the hash of the job in the
        file that it reads. Raise OSError."""
        environment = {
            "OQC_JOB_ID": str(task.id),
            "OQC_MODE": task.mode,
            "OQC_ATTEMPT": str(task.attempt),
            "OQC_SHOTS": str(task.shots),
            "OQC_SEED": str(task.seed),
            "OQC_TIMEOUT": _seconds(self.spec.timeout),
            "OQC_SUBMITTER": task.submitter,
            "OQC_TAG": task.tag or "",
            # UTF-8, also where the locale is another: a name of the system, as os.environ has it.
            "OQC_NOTE": os.fsdecode((task.note or "").encode()),
        }
        with _memory_file() as feed:    # a pipe would block at 64 KiB until it is read
            feed.write(task.job.encode() + b"\n")
            feed.seek(0)
            # What the file has, not what was to be written: that is what a receipt is for.
            sent = hashlib.sha256(feed.read()[:-1]).digest()
            feed.seek(0)
            most = self.spec.result_bytes
            return self._start_command(environment, feed.fileno(), most), sent


class LinesSlot(Slot):      # pylint: disable=too-many-instance-attributes # each says why
    """Protocol `lines`: a process that stays, and an attempt is a JSON line in and one out."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._process: Optional[Child] = None
        self._lines = Lines(0)          # of the process
        self._is_ready = False          # it has said so, or answered
        self._ready_at = 0.0            # monotonic seconds
        self._has_answered = False      # it, to anything
        self._starts_at = 0.0           # when it was started, or 0.0: the worker knows how it went
        self._has_warned = False        # of answers to other questions
        self._retried: Set[int] = set()         # jobs that it is not asked again
        self._asked: Optional[Task] = None
        self._answer: Optional[Outcome] = None
        self._device_asked: Optional[str] = None        # the last one before the answer
        self._last: Optional[Tuple[int, int]] = None    # the job and attempt that `_log` is of
        self._kept = 0                  # bytes of that log that are kept already
        self._keep_at = 0.0             # not before that is more of it kept
        self._late: List[Tuple[int, int, Log]] = []

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        try:
            return self._attempt(task, interrupted)
        except Exception:               # a defect
            if self._process is not None:
                self._end(self._process)
            raise

    def _attempt(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        began = self._clock.monotonic()
        try:
            process = self._make_ready(task)
        except OSError as error:
            return _unstartable(error)
        if self._last is None:
            self._begin_log(process, task)
        self._asked = task
        self._answer = None
        device = self._device_asked = self.device
        in_time = self._ask(process, task, began, interrupted)
        if self._answer is None:
            process.read_on()           # it may have answered and ended at once
            if process.exited() and is_object(process.output):
                process.output += b"\n"         # the end of its output ends its last line
            self._hear(process)
        if self._answer is None and self._has_answered and _is_lost(process):
            self._end(process)          # it harmed no job: a new one is asked
            return self._attempt(task, interrupted)
        self._begin_log(process, task)  # else it did so when the question was being read
        if not self._has_answered:
            device = device or self._device_asked
        sent = process.written()
        if self._answer is not None:
            outcome = self._outcome_of_answer(process, task, sent is not None)
        else:
            outcome = self._outcome_without_answer(process, in_time)
        self._asked = None
        said = self.log(task.id)
        self._last = task.id, task.attempt
        self._kept = process.log.total
        return outcome._replace(log=said, sent_sha256=_job_sha256(sent), device=device)

    def rest(self, is_over: Callable[[], bool], may_start: bool) -> Optional[Outcome]:
        if self._process is None and may_start and self.spec.warm:
            try:
                self._begin()
            except OSError as error:
                return _unstartable(error)
        if self._process is None:
            return super().rest(is_over, may_start)
        return self._rest_on(self._process, is_over)

    def late_logs(self) -> List[Tuple[int, int, Log]]:
        late = self._late
        self._late = []
        return late

    def close(self) -> None:
        if self._process is not None:
            self._end(self._process)
        super().close()

    def _begin(self) -> Child:
        """Start a process; raise OSError."""
        most = self.spec.result_bytes + BESIDE_RESULT
        self._last = None
        self._log = None
        self.device = None
        self._lines = Lines(most)
        # Whoever reads takes the lines out when a read has made more than one of the longest.
        process = self._start_command({}, None, most + PIPE_READ)
        self._process = process
        self._is_ready = False
        self._has_answered = False
        self._has_warned = False
        self._retried.clear()
        self._starts_at = self._clock.monotonic()
        return process

    def _make_ready(self, task: Task) -> Child:
        """Return a process that can be asked this, the old one or a new one; raise OSError.

        What the old one has said since the last attempt belongs to that one.
        """
        process = self._process
        if process is not None:
            process.read_on()
            self._hear(process)
            # One that ended between two attempts harmed neither. One that was asked this job
            # before may answer that once more, and nobody could tell what it answers.
            if process.exited() or process.has_closed_input or task.id in self._retried:
                self._end(process)
                process = None
        if process is None:
            return self._begin()
        return process

    def _begin_log(self, process: Child, task: Task) -> None:
        """Have what is read from now on belong to this attempt, unless it does so."""
        if self._last is not None:
            self._note_late()
            self._last = None
            if process.log.total:
                process.error.clear()
                process.log = Tail(self.spec.log_bytes)
                self._log = process.log
        self._log_of = task.id

    def _question(self, task: Task) -> bytes:
        question = {
            "id": task.id,
            "job": task.job,
            "mode": task.mode,
            "attempt": task.attempt,
            "shots": task.shots,
            "seed": task.seed,
            "timeout": self.spec.timeout,
            "submitter": task.submitter,
            "tag": task.tag,
            "note": json.loads(task.note) if task.note else None,
        }
        return json.dumps(question).encode() + b"\n"

    def _ask(
        self,
        process: Child,
        task: Task,
        began: float,
        interrupted: Callable[[], bool],
    ) -> bool:
        """Ask, and listen until there is an answer; return False if it was not in time."""
        question = self._question(task)
        when_taken = functools.partial(self._begin_log, process, task)
        deadline = began + self.spec.timeout
        if self._is_ready:
            return process.send(
                question, deadline, lambda: self._is_over(process, interrupted), when_taken)
        late = deadline + self.spec.start_timeout
        in_time = process.send(
            question,
            late,
            lambda: self._is_over(process, interrupted) or self._is_ready,
            when_taken,
        )
        if not in_time or not self._is_ready or self._answer is not None:
            return in_time
        # It is warm from now on: from when it was, it has as long as any other.
        deadline = min(late, max(deadline, self._ready_at + self.spec.timeout))
        return process.listen(deadline, lambda: self._is_over(process, interrupted))

    def _is_over(self, process: Child, interrupted: Callable[[], bool]) -> bool:
        """Return whether there is an answer, or nobody waits for one any more."""
        return self._hear(process) or _is_deaf(process) or interrupted()

    def _hear(self, process: Child) -> bool:
        """Take in the lines that the process has put out; return whether one is the answer."""
        if process.output:
            for line, is_whole in self._lines.take(process.output):
                self._take_in(process, line, is_whole)
        return self._answer is not None

    def _take_in(self, process: Child, line: bytes, is_whole: bool) -> None:
        asked = self._asked.id if self._asked else None
        if is_whole:
            said = read(line, self.spec.result_bytes, self.spec.retry_codes)
        else:
            said = read_cut(line, asked, self.spec.result_bytes)
        if said is None:
            process.log.add(line + b"\n")
        elif not isinstance(said, Answer):
            if said.ready and not self._is_ready:
                self._is_ready = True
                self._ready_at = self._clock.monotonic()
            self.device = said.device or self.device
            if self._answer is None:
                self._device_asked = self.device
        elif asked is not None and self._answer is None and said.id in (asked, None):
            if said.noise:
                process.log.add(said.noise + b"\n")
            self._answer = said.outcome
        else:
            self._ignore(process, line, said)

    def _ignore(self, process: Child, line: bytes, answer: Answer) -> None:
        """Keep an answer to what was not asked in the log; say so once a process."""
        process.log.add(line + b"\n")
        if not self._has_warned:
            self._has_warned = True
            log.warning("runtime %s: an answer that nobody asked for (id %s) is ignored; "
                        "others of this process are not reported", self.spec.name, answer.id)

    def _time_allowed(self) -> str:
        if self._is_ready:
            return super()._time_allowed()
        start_timeout = _seconds(self.spec.start_timeout)
        return f"{super()._time_allowed()} and its start_timeout of {start_timeout} s"

    def _outcome_of_answer(self, process: Child, task: Task, is_sent: bool) -> Outcome:
        """Return the outcome in the answer; end a process that does not keep to the protocol."""
        assert self._answer is not None
        outcome = self._answer
        self._is_ready = True
        self._has_answered = True
        self._starts_at = 0.0
        if outcome.transient:
            self._retried.add(task.id)
        # One that has not read all of a question would take its rest for the next one.
        if outcome.pause or self._lines.is_skipping or not is_sent:
            self._end(process)
        return outcome

    def _outcome_without_answer(self, process: Child, in_time: bool) -> Outcome:
        """End the process; return the outcome without an answer."""
        exited = process.exited()       # by itself: asked before it is made to
        took_it = process.took_some()
        is_deaf = _is_deaf(process)     # as one is, too, that is about to exit
        unheard = INTERRUPTED if in_time else self._timed_out(process)
        code = self._end(process)
        if not exited and not is_deaf:
            return unheard
        if not exited and code in ENDED_BY_US:
            error = "closed its standard input before it took the job"
            return Outcome(jobs.PROTOCOL, error, transient=True, started=False)
        outcome = self._outcome_of_exit(code, process)
        if code == 0:
            error = _last_words(process) or "ended without an answer"
            outcome = Outcome(jobs.PROTOCOL, error)
        if took_it:
            return outcome
        # It is not the job's fault, and the job did not run.
        return outcome._replace(transient=True, started=False)

    def _rest_on(self, process: Child, is_over: Callable[[], bool]) -> Optional[Outcome]:
        """Listen to a process between attempts."""
        while not is_over():
            process.read_on()
            self._hear(process)
            if process.exited():
                return self._ended_at_rest(process)
            now = self._clock.monotonic()
            deadline = float("inf")
            if self._starts_at:
                deadline = self._starts_at + self.spec.start_timeout
                if self._is_ready or now >= deadline:
                    self._starts_at = 0.0
                    return STARTED
            if self._last is not None and process.log.total > self._kept:
                if now >= self._keep_at:
                    self._note_late()
                    return None
                deadline = min(deadline, self._keep_at)
            heard = process.heard
            process.listen(deadline, lambda: is_over() or process.heard != heard)
        return None

    def _ended_at_rest(self, process: Child) -> Optional[Outcome]:
        """Return the outcome of a start if a process has ended that never answered a question."""
        has_started = self._is_ready or not self._starts_at
        code = self._end(process)
        if self._has_answered:
            return None
        if code < 0 and has_started:    # somebody has killed it; or it crashes again and again
            wait_to_read(self._wake, KILLED_PAUSE)
            return None
        outcome = self._outcome_of_exit(code, process)
        error = outcome.runtime_error or _last_words(process) or "ended before its first job"
        return outcome._replace(runtime_error=error, transient=True, started=False)

    def _note_late(self) -> None:
        """Hand over the log of the last attempt if it has grown since that was over."""
        if self._last is None or self._log is None or self._log.total == self._kept:
            return
        self._kept = self._log.total
        self._keep_at = self._clock.monotonic() + KEEP_EVERY
        self._late.append((*self._last, Log(*self._log.kept())))

    def _end(self, process: Child) -> int:
        """End the process, so that the next attempt starts another; return its exit code."""
        self._process = None
        process.send_no_more()
        code = process.end(self._kill_grace)
        self.survivors = process.survivors
        self._hear(process)
        if process.output:              # a line without an end
            process.log.add(bytes(process.output) + b"\n")
        self._note_late()
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


def _seconds(value: float) -> str:
    """Return seconds as a decimal number, whole where they are."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _is_deaf(process: Child) -> bool:
    """Return whether a process cannot read anything of what it was sent last, and has not."""
    return process.has_closed_input and not process.took_some()


def _is_lost(process: Child) -> bool:
    """Return whether a process will never read anything of what it was sent last."""
    return (process.exited() or process.has_closed_input) and not process.took_some()


def _last_words(process: Child) -> Optional[str]:
    return last_line(process.error.decode("utf-8", "replace"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:                  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {number}"


def _result(output: bytearray) -> Tuple[Optional[str], bool]:
    """Return what was put out as text, None for nothing, and whether it is JSON."""
    try:
        text = output.decode("utf-8")
        STRICT.decode(text)
        return text, True
    except (ValueError, RecursionError):
        return output.decode("utf-8", "surrogateescape") or None, False


def _job_sha256(question: Optional[bytes]) -> Optional[bytes]:
    """Return the hash of the job in a question that was written, None for none.

    A job is ASCII without quotes, so that its bytes stand in the JSON as they are.
    """
    if question is None:
        return None
    begin = question.index(b'"job": "') + len(b'"job": "')
    return hashlib.sha256(memoryview(question)[begin:question.index(b'"', begin)]).digest()
