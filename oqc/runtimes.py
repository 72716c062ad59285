"""The only room that starts processes: how a runtime is started, fed, listened to, timed and ended.

A runtime is a program from outside. It runs with all its children in a process group of its own, and whatever it does,
an attempt ends when it should. What keeps that promise when the server itself is killed is GUARD.
"""
import argparse
import contextlib
import errno
import fcntl
import functools
import json
import os
import select
import signal
import struct
import sys
import tempfile
import termios
import threading
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from oqc import jobs, qubit
from oqc.jobs import Outcome, RuntimeSpec, Task

OUTPUT_MOST = 1 << 20               # bytes of standard output kept of an attempt, and of an answer's line
ERROR_MOST = 2048                   # bytes of standard error that can become runtime_error
PIPE_READ = 1 << 16

# A tiny shell in the runtime's process group holds the read end of a pipe whose write end only the server has. When the
# server dies, however it dies, the read ends and the shell ends the group. (PR_SET_PDEATHSIG would fire when the thread
# that started the child ends, and would not reach grandchildren.) It is started from a subshell that is gone at once,
# so that the runtime is not handed a child it did not start; the descriptor is closed before the runtime begins.
GUARD = """( ( trap '' HUP INT TERM; exec >/dev/null 2>&1; read -r line <&3
kill -TERM 0; sleep 2; kill -KILL 0 ) & )
exec 3<&-; exec "$@" """

PR_SET_CHILD_SUBREAPER = 36         # prctl(2)


@functools.lru_cache(maxsize=None)
def _lifeline() -> int:
    """The read end of the pipe whose closing tells every guard that the server is gone. Made at the first runtime."""
    read_end, _write_end = os.pipe()    # the write end is never closed: the kernel does it when we die
    lifeline = fcntl.fcntl(read_end, fcntl.F_DUPFD_CLOEXEC, 10)     # not 3, which guards have it as
    os.close(read_end)
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes       # pylint: disable=import-outside-toplevel # memory that a server at rest can spare
        # Linux: orphans of a group become our children, so that waiting for them is exact and they are reaped
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return lifeline


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> Tuple[int, int]:
    """A pipe whose ends are closed with these."""
    ends = os.pipe()
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


class Process:
    """A runtime's process, with its children in a process group of its own, and the pipes to it.

    All reading is done in the thread that waits for it. What it writes beyond what is kept is read and dropped.
    """

    children: List[int] = []        # the ids of those that are not reaped yet; with `spawning`, which keeps it true
    spawning = threading.Lock()

    def __init__(self, command: Sequence[str], environment: Dict[str, str], feed: Optional[int], clock: Any) -> None:
        """Start it with the open file `feed` as its standard input, or with a pipe if that is None."""
        self.clock, self.answered, self.sent = clock, False, 0
        self.output, self.error = bytearray(), bytearray()
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as childs:
            out, out_child = _pipe(ours, childs)
            error, error_child = _pipe(ours, childs)
            feed_child, self.input = _pipe(childs, ours) if feed is None else (feed, -1)
            with self.spawning:
                self.pid = os.posix_spawn(
                    "/bin/sh", ["/bin/sh", "-c", GUARD, "oqc", *command], environment, setpgroup=0,
                    file_actions=[(os.POSIX_SPAWN_DUP2, feed_child, 0), (os.POSIX_SPAWN_DUP2, out_child, 1),
                                  (os.POSIX_SPAWN_DUP2, error_child, 2), (os.POSIX_SPAWN_DUP2, _lifeline(), 3)],
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ], setsigmask=[])
                self.children.append(self.pid)
            self.pipes = ours.pop_all()         # closed at the end
        self.poll = select.poll()
        self.sinks = {out: self.output, error: self.error}
        if feed is None:
            os.set_blocking(self.input, False)
        for descriptor in (out, error):
            os.set_blocking(descriptor, False)
            self.poll.register(descriptor, select.POLLIN)
        self.exit_watch = -1
        with contextlib.suppress(AttributeError, OSError):      # before Linux 5.3, and elsewhere: looked at in turns
            self.exit_watch = os.pidfd_open(self.pid)           # type: ignore[attr-defined,unused-ignore]
            self.pipes.callback(os.close, self.exit_watch)
            self.poll.register(self.exit_watch, select.POLLIN)

    def exited(self) -> bool:
        """Whether the process itself has ended (its children may go on). It is not reaped yet: its id stays taken."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def listen(self, deadline: float, wake: int = -1, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Read what it writes until it has ended or `is_over` (asked after whatever was read, and whenever `wake`
        can be read) or the deadline has come, on the monotonic clock. False at the deadline."""
        if wake >= 0:
            self.poll.register(wake, select.POLLIN)
        try:
            while not (is_over() or self.exited()):
                left = deadline - self.clock.monotonic()
                if left <= 0:
                    return False
                for descriptor, _ in self.poll.poll(min(left, 3600.0 if self.exit_watch >= 0 else 0.05) * 1000 + 1):
                    if descriptor in self.sinks:
                        self._read(descriptor)
                    elif descriptor == wake:
                        os.read(wake, 64)
            return True
        finally:
            if wake >= 0:
                self.poll.unregister(wake)

    def _read(self, descriptor: int) -> bool:
        """Read once; keep the first part of the output, the last of the error. False when there was nothing."""
        try:
            data = os.read(descriptor, PIPE_READ)
        except BlockingIOError:
            return False
        sink = self.sinks[descriptor]
        if not data:                # it closed this end: it may still go on
            self.poll.unregister(descriptor)
            del self.sinks[descriptor]
            return False
        if sink is self.error:
            sink += data
            del sink[:-ERROR_MOST]
        else:
            sink += data[:OUTPUT_MOST + 1 - len(sink)]
        return True

    def read_on(self) -> None:
        """Read what it has written; no more than a pipe holds, since it may never stop."""
        for descriptor in list(self.sinks):
            for _ in range(OUTPUT_MOST // PIPE_READ + 1):
                if not self._read(descriptor):
                    break

    def took(self) -> bool:
        """Whether it has read anything of what it was sent: FIONREAD says how much of that the pipe still holds."""
        return self.sent > struct.unpack("i", fcntl.ioctl(self.input, termios.FIONREAD, bytes(4)))[0]

    def send(self, data: bytes, deadline: float, wake: int, is_over: Callable[[], bool]) -> bool:
        """Write `data` to its standard input while listening, until `is_over`; False at the deadline."""
        rest = memoryview(data)

        def sent_or_over() -> bool:
            nonlocal rest
            try:
                while rest:
                    written = os.write(self.input, rest)
                    self.sent += written
                    rest = rest[written:]
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                rest = memoryview(b"")          # it closed its input: what it answers to that decides
            if not rest:
                with contextlib.suppress(KeyError):
                    self.poll.unregister(self.input)
            return is_over()

        self.poll.register(self.input, select.POLLOUT)
        try:
            return self.listen(deadline, wake, sent_or_over)
        finally:
            with contextlib.suppress(KeyError):
                self.poll.unregister(self.input)

    def end(self, grace: float) -> int:
        """End the whole process group (TERM, and KILL after `grace` seconds if the process is still there), and give
        back the process's exit code, or -n after signal n."""
        if not self.exited():
            self._signal(signal.SIGTERM)
            self.listen(self.clock.monotonic() + grace)
        self.read_on()                          # what it wrote last
        self._signal(signal.SIGKILL)            # before it is reaped: until then nobody else can get its group's number
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(ChildProcessError):
            while True:                         # its orphans are our children: the group has ended when none is left
                os.waitpid(-self.pid, 0)
        self._reap_others()
        self.pipes.close()
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)

    def _reap_others(self) -> None:
        """Reap what left its process group and has ended since: as orphans they became our children as well."""
        with self.spawning, contextlib.suppress(ChildProcessError):     # there is no child at all
            self.children.remove(self.pid)
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and (
                    ended.si_pid not in self.children):     # whose own thread reaps it
                os.waitpid(ended.si_pid, 0)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def last_words(self) -> Optional[str]:
        """The last line of its standard error that is not blank."""
        return _last_line(self.error.decode("utf-8", "replace"))


class Slot:
    """Room for one attempt at a time on a runtime. One worker thread runs it; any thread may `wake` it."""

    def __init__(self, spec: RuntimeSpec, clock: Any, kill_grace: float) -> None:
        """`kill_grace`: seconds from TERM to KILL."""
        self.spec, self.clock, self.kill_grace = spec, clock, kill_grace
        self.wake_end, self._wake_write_end = os.pipe()
        os.set_blocking(self._wake_write_end, False)

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Optional[Outcome]:
        """Run one attempt to its end, and nothing of it is left; None if it was ended because of `interrupted()`."""
        raise NotImplementedError

    def wake(self) -> None:
        """Have a running attempt ask `interrupted()` again, now."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write_end, b"!")

    def close(self) -> None:
        """End what is left between attempts."""
        os.close(self.wake_end)
        os.close(self._wake_write_end)

    def _late(self) -> str:
        return f"took longer than its timeout of {self.spec.timeout:g} s"

    def _start(self, environment: Dict[str, str], feed: Optional[int]) -> Process:
        """Start the runtime's command; raises OSError."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith("OQC_") and name not in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET")}
        assert self.spec.command is not None
        return Process(self.spec.command,
                       {**kept, "OQC_RUNTIME": self.spec.name, "QRMI_JOB_QPU_RESOURCES": self.spec.name, **environment},
                       feed, self.clock)

    def _outcome(self, code: int, process: Process, started: bool = True) -> Outcome:
        """What it means that the process ended with this code, or -n after signal n."""
        result, is_json = _result(process.output) if self.spec.protocol == "exec" else (None, False)
        words = process.last_words()
        if code < 0:
            words = "; ".join(filter(None, (f"died of {_signal_name(-code)}", words)))
            return Outcome(128 - code, words, result, is_json, transient=True, started=started)
        if not code:
            return Outcome(0, None, result, is_json)
        unstartable = code in (jobs.NOT_EXECUTABLE, jobs.NOT_FOUND)
        return Outcome(code, words or f"exit status {code}", result, is_json,
                       transient=unstartable or code in self.spec.retry_codes, started=started and not unstartable)


class ExecSlot(Slot):
    """Protocol `exec`: a process an attempt. The job is its standard input, its exit status is the return code."""

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Optional[Outcome]:
        try:
            with tempfile.TemporaryFile() as feed:      # a pipe would block at 64 KiB until it is read
                feed.write(task.job.encode() + b"\n")
                feed.seek(0)
                process = self._start({f"OQC_{name}": str(value) for name, value in (
                    ("JOB_ID", task.id), ("MODE", task.mode), ("ATTEMPT", task.attempt), ("SHOTS", task.shots),
                    ("SEED", task.seed))}, feed.fileno())
        except OSError as error:    # no process, no descriptor, no memory to be had: not the job's fault
            return _unstartable(error)
        in_time = process.listen(self.clock.monotonic() + self.spec.timeout, self.wake_end, interrupted)
        ended = process.exited()
        code = process.end(self.kill_grace)
        if ended:
            return self._outcome(code, process)
        if in_time:
            return None
        return Outcome(jobs.TIMED_OUT, self._late(), *_result(process.output))


class LinesSlot(Slot):
    """Protocol `lines`: a process that stays, a JSON line in and a JSON line out for each attempt."""

    process: Optional[Process] = None

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Optional[Outcome]:
        deadline = self.clock.monotonic() + self.spec.timeout
        if self.process is not None and self.process.exited():      # between two attempts: nobody was harmed
            self._end()
        if self.process is None:
            try:
                self.process = self._start({}, None)
            except OSError as error:
                return _unstartable(error)
        else:
            self.process.read_on()
            self.process.output.clear()     # said without being asked: not the answer to this question
            self.process.error.clear()
        process = self.process
        question = {name: getattr(task, name) for name in ("id", "job", "mode", "attempt", "shots", "seed")}
        in_time = process.send(json.dumps(question).encode() + b"\n", deadline, self.wake_end, lambda: (
            b"\n" in process.output or len(process.output) > OUTPUT_MOST or interrupted()))
        if b"\n" not in process.output:
            process.read_on()       # it may have answered and ended at once
        if b"\n" in process.output or len(process.output) > OUTPUT_MOST:
            outcome = _answer(bytes(process.output), self.spec.retry_codes)
            process.answered = True
            if b"\n" not in process.output or (outcome.return_code == jobs.PROTOCOL and outcome.transient):
                self._end()
            return outcome
        # one that ends before it takes a job has not started; after that, the job may be what it dies of
        started, ended, code = process.answered or process.took(), process.exited(), self._end()
        if ended:
            return self._outcome(code, process, started)._replace(transient=True) if code else Outcome(
                jobs.PROTOCOL, process.last_words() or "ended without an answer", transient=True, started=started)
        return None if in_time else Outcome(jobs.TIMED_OUT, self._late())

    def _end(self) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        return process.end(self.kill_grace)

    def close(self) -> None:
        if self.process is not None:
            self._end()
        super().close()


class EchoSlot(Slot):
    """The echo: the return code that was asked for, from nowhere."""

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Optional[Outcome]:
        return jobs.echo(task.return_code, self.spec.retry_codes)


def slot(spec: RuntimeSpec, clock: Any, kill_grace: float) -> Slot:
    """A slot for this runtime, by its protocol."""
    if spec.command is None and spec.protocol == "lines":
        spec = spec._replace(command=builtin_command(spec.name))
    return {"exec": ExecSlot, "lines": LinesSlot, "echo": EchoSlot}[spec.protocol](spec, clock, kill_grace)


def _unstartable(error: OSError) -> Outcome:
    return Outcome(jobs.NOT_EXECUTABLE, f"could not be started: {error.strerror}", transient=True, started=False)


def _last_line(text: str) -> Optional[str]:
    """The last line that is not blank."""
    lines = text.replace("\0", "\ufffd").strip().splitlines()
    return lines[-1].strip() if lines else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:              # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {number}"


def _result(output: bytes) -> Tuple[Optional[str], bool]:
    """(standard output as text or None, whether it is JSON)."""
    text = bytes(output[:OUTPUT_MOST]).decode("utf-8", "replace")
    try:
        json.loads(text, parse_constant=jobs.refuse_constant)
        return text.strip(), True
    except (ValueError, RecursionError):
        return text or None, False


def _answer(output: bytes, retry_codes: Sequence[int]) -> Outcome:
    """The outcome in an answer's line: {"return_code", "runtime_error", "result"}; PROTOCOL if it is none."""
    line, end, _ = output.partition(b"\n")
    if not end:                     # the job ran: another attempt would take as long, and say as much
        return Outcome(jobs.PROTOCOL, "an answer longer than 1 MiB; its beginning is the result", *_result(output))
    try:
        answer = json.loads(line.decode("utf-8"), parse_constant=jobs.refuse_constant)
        code, error, result = answer["return_code"], answer.get("runtime_error"), answer.get("result")
        if isinstance(code, bool) or not isinstance(code, int) or not 0 <= code <= 255:
            raise ValueError("return_code")
        if not isinstance(error, (str, type(None))):
            raise ValueError("runtime_error")
        text = None if result is None else json.dumps(result, allow_nan=False)      # 1e999 is read as infinity
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shown = line[:80].decode("utf-8", "replace")
        return Outcome(jobs.PROTOCOL, f"not an answer: {json.dumps(shown)}", transient=True)
    if code:
        words = _last_line(error or "") or f"return code {code}"
        error = words.encode("utf-8", "replace")[:ERROR_MOST].decode("utf-8", "ignore")
    return Outcome(code, error if code else None, text, True, transient=code in retry_codes)


# The built-in runtimes, each a program over `lines`

@functools.lru_cache(maxsize=None)
def _root() -> str:
    """Where children import oqc from: the folder that holds oqc/; or a copy of the .pyz in memory, since that file may
    be replaced while the server runs (memfd_create(2), where there is one)."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if not os.path.isfile(root) or not hasattr(os, "memfd_create"):
        return root
    with open(root, "rb") as file, open(os.memfd_create("oqc.pyz"), "wb", closefd=False) as copy:
        copy.write(file.read())
        return f"/proc/{os.getpid()}/fd/{copy.fileno()}"


START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from oqc.runtimes import builtin; builtin(sys.argv[1:])"


def builtin_command(name: str) -> Tuple[str, ...]:
    """The command of a built-in runtime, from a folder and from a single file alike. (A child that is started with
    `-m oqc` could not be imported from the .pyz.)"""
    return (sys.executable, "-IS", "-c", START, _root(), name)


def builtin(arguments: Sequence[str]) -> int:
    """`emulator [--t1-us …]` or `simulator`: answer the jobs that come as JSON lines on standard input."""
    parser = argparse.ArgumentParser(prog=f"oqc {arguments[0]}", description="A runtime over the protocol lines: "
                                     "reads a job a line on standard input and answers each in a line.")
    if arguments[0] == "emulator":
        for name, default in qubit.Device()._asdict().items():
            parser.add_argument("--" + name.replace("_", "-"), type=float, default=default, help="default: %(default)s")
    device = qubit.Device(**vars(parser.parse_args(arguments[1:])))
    try:
        device.check()
    except ValueError as error:
        parser.error(str(error))
    for line in sys.stdin.buffer:
        try:
            task = _task(line)
        except (ValueError, RecursionError) as error:
            answer = {"return_code": jobs.DATAERR, "runtime_error": f"not a job: {error}"}
        else:
            result = qubit.emulation(*task, device) if arguments[0] == "emulator" else qubit.simulation(*task)
            answer = {"return_code": 0, "runtime_error": None, "result": result}
        print(json.dumps(answer), flush=True)
    return 0


def _task(line: bytes) -> Tuple[str, int, int]:
    """Job, shots and seed in a question's line; the last two may be left out by hand. Raises ValueError."""
    asked = json.loads(line.decode("utf-8"), parse_constant=jobs.refuse_constant)
    if isinstance(asked, dict):
        asked = {"mode": "simulation", **{name: asked[name] for name in ("job", "shots", "seed") if name in asked}}
    submission = jobs.parse(asked)
    return submission.job, submission.shots, submission.seed or 0
