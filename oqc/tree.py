"""Whose is a process: what this server has started, what came of it, and how all of it ends.

The only room that starts programs. Each leads a session of its own and bears a mark in its
environment, OQC_MARK, which all that it starts inherits: instance, run, number of the start,
runtime, job and attempt. The instance is written in the lock file beside the database, the run is
counted there, so that a server knows what another one, killed, has left.

Killed is only what is ours without doubt: what bears the mark, or is in the session of a process
that we started and have not reaped, so that nobody else can have its number.

Orphans of a tree become children of this process (Linux; prctl(2), PR_SET_CHILD_SUBREAPER), and the
kernel lists them below the main thread, where no worker's own children are. So one short file tells
whether anything is left, and /proc is searched only if there is a stranger in it, a process that
lost the mark; at a timeout or a cancel; and after a crash.
"""
import contextlib
import errno
import functools
import itertools
import logging
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import threading
from typing import Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Set, Tuple

log = logging.getLogger("oqc")

MARK = "OQC_MARK"
MARK_IN_ENVIRON = re.compile(rb"(?:^|\0)OQC_MARK=([^\0]*)")
KILL_WAIT = 2.0                     # seconds that a killed process has to be gone
REAP_EVERY = 1.0                    # seconds between looks at what has ended unexpectedly
KEEPER_EVERY = 5.0                  # seconds between looks at the keeper while nothing runs
LEFT_OVER_WAIT = 4.0                # seconds that a killed server's keeper has to end its processes
POLL_EVERY = 0.05                   # seconds between looks at a process that no descriptor watches
EXEC_LOOKS = 100                    # at a process in execve(2), a millisecond apart
EXIT_WAIT = 2.0                     # seconds that a process in _exit(2) is waited for
EXITING = 0x4                       # PF_EXITING, of the kernel's flags of a process
WITHOUT_MEMORY = 0x00200000 | EXITING   # PF_KTHREAD
MOST_LEADERS = 4096                 # that a keeper is told of; any more have only their mark
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)    # and reset in what is started
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT   # waitid(2): look for an end, and leave it there
PR_SET_CHILD_SUBREAPER = 36                     # prctl(2)


class Clock(Protocol):
    """The clock of deadlines."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""


class ReapersClock(Clock, Protocol):
    """What the reaper asks of a clock."""

    def wait(self, event: threading.Event, seconds: Optional[float]) -> bool:
        """Wait until `event` is set, `seconds` at most; return whether it is set."""


class Leaders:
    """The ids of the processes that were started, in memory shared with the keeper."""

    def __init__(self) -> None:
        self._pids = memoryview(mmap.mmap(-1, 4 * MOST_LEADERS)).cast("i")
        self._free = list(range(MOST_LEADERS))

    def enter(self, pid: int) -> int:
        """Enter a process; return its place, or -1 if there is none."""
        if not self._free:
            return -1
        place = self._free.pop()
        self._pids[place] = pid
        return place

    def leave(self, place: int) -> None:
        """Give a place back."""
        if place >= 0:
            self._pids[place] = 0
            self._free.append(place)

    def pids(self) -> Set[int]:
        """Return all that are entered."""
        return set(self._pids) - {0}


class Instance:                     # pylint: disable=too-many-instance-attributes # each says why
    """What this process knows of its children. There is one: they are the process's, not a part's.

    `lock` is held over `trees`, `leaders`, `_strangers` and `_owners`; and while orphans are
    reaped.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.trees: Dict[str, "Tree"] = {}      # by their marks: started, and not gone
        self.leaders = Leaders()
        self.own: Set[int] = set()              # children that belong to no tree: the keeper
        self._prefix = ""                       # of the marks of this run
        self._earlier = ""                      # of those of all runs, while some may be left
        self._left: Set[Tuple[str, str]] = set()    # (runtime, job) of those, when last looked at
        self._looked = float("-inf")            # monotonic seconds
        self._clock: ReapersClock
        self._starts = itertools.count(1)
        self._starting: Set[str] = set()        # marks of what is not entered in `trees` yet
        self._strangers: Set[int] = set()       # orphans that bear no mark
        self._owners: Dict[int, str] = {}       # of orphans that may not be killed: their trees
        self._started = threading.Event()       # there is something for the reaper to look at

    def begin(self, instance: str, run: int, clock: ReapersClock) -> str:
        """Take this name, and reap from now on; return how the marks of this run begin.

        A run after the first: an earlier one was killed, and processes of it may be left.
        """
        self._prefix = f"{instance}:{run}:"
        self._clock = clock
        if run > 1:
            self._earlier = f"{instance}:"
            self._started.set()
        threading.Thread(target=self._reap_always, name="reaper", daemon=True).start()
        return self._prefix

    def new_mark(self, environment: Mapping[str, str]) -> str:
        """Return the mark of what is started with this environment."""
        _become_subreaper()
        prefix = self._prefix or f"{os.getpid()}:0:"
        runtime = environment.get("OQC_RUNTIME", "")
        attempt = f"{environment.get('OQC_JOB_ID', 0)}.{environment.get('OQC_ATTEMPT', 0)}"
        mark = f"{prefix}{next(self._starts)}:{runtime}:{attempt}"
        self._starting.add(mark)
        return mark

    def enter(self, tree: "Tree") -> int:
        """Note that a tree is there; return its leader's place."""
        with self.lock:
            self.trees[tree.mark] = tree
            self._starting.discard(tree.mark)
            if not self._started.is_set():
                self._started.set()
            return self.leaders.enter(tree.pid)

    def forget(self, mark: str) -> None:
        """Note that nothing could be started with this mark."""
        self._starting.discard(mark)

    def leave(self, tree: "Tree", place: int) -> None:
        """Note that a tree is gone."""
        with self.lock:
            self.trees.pop(tree.mark, None)
            self.leaders.leave(place)

    def orphans(self) -> List[int]:
        """Return the orphans that became our children and go on; reap those that have ended."""
        with self.lock:
            known = {tree.pid for tree in self.trees.values()} | self.own
            orphans = []
            for pid in _adopted():
                if pid in known:
                    continue
                with contextlib.suppress(ChildProcessError):
                    if not os.waitpid(pid, os.WNOHANG)[0]:
                        orphans.append(pid)
            self._strangers.intersection_update(orphans)
            self._owners = {pid: self._owners[pid] for pid in orphans if pid in self._owners}
        return orphans

    def untouchable(self, orphans: Sequence[int], tree: "Tree") -> List[int]:
        """Return those of these orphans that may not be killed, nor looked at, such as a setuid
        program's, and are of this tree that ends: the first that was there when they began."""
        with self.lock:
            for pid in orphans:
                if pid not in self._owners and not _may_signal(pid):
                    if tree.code is None and _began(pid) >= _began(tree.pid):
                        self._owners[pid] = tree.mark
            return [pid for pid in orphans if self._owners.get(pid) == tree.mark]

    def has_stranger(self, orphans: Sequence[int]) -> bool:
        """Return whether an orphan lost its mark; true once for each, which is logged then."""
        strangers = []
        with self.lock:
            sessions = {tree.pid for tree in self.trees.values()}
            for pid in orphans:
                if pid in self._strangers or session_of(pid) in sessions:
                    continue
                if not mark_of(pid) and _may_signal(pid) and not _is_exiting(pid):
                    self._strangers.add(pid)
                    strangers.append(pid)
        for pid in strangers:
            log.warning("process %d (%s) left its runtime and does not bear the server's mark: it "
                        "is not ended", pid, _name(pid))
        return bool(strangers)

    def survivors(self, runtime: str) -> str:
        """Return a line about what an earlier attempt on a runtime left and cannot be ended, or
        nothing."""
        with self.lock:
            trees = [tree for tree in self.trees.values() if tree.runtime == runtime]
        pids = [pid for tree in trees for pid in tree.survivors if not has_ended(pid)]
        if not pids:
            return ""
        names = ", ".join(f"{pid} ({_name(pid)})" for pid in pids)
        return f"process {names} of an earlier attempt cannot be ended"

    def left_over(self, job: int, runtime: str) -> bool:
        """Return whether something is left of an attempt at a job that a killed server made.

        Of the protocol `lines` that is the runtime's process, whoever's job it had.
        """
        if self._earlier and self._clock.monotonic() > self._looked + POLL_EVERY:
            self._left_over()
        return bool(self._left & {(runtime, "0"), (runtime, str(job))})

    def _left_over(self) -> Dict[int, str]:
        """Return {process: mark} of what an earlier run left."""
        left: Dict[int, str] = {}
        if self._earlier:
            for pid in all_processes():
                mark = mark_of(pid)
                if mark.startswith(self._earlier) and not mark.startswith(self._prefix):
                    left[pid] = mark
            if not left:
                self._earlier = ""
            owners = [mark.split(":")[3:] for mark in left.values()]
            self._left = {(runtime, attempt.partition(".")[0]) for runtime, attempt in owners}
            self._looked = self._clock.monotonic()
        return left

    def _reap_always(self) -> None:
        """The reaper thread."""
        clock = self._clock
        never = threading.Event()
        began = clock.monotonic()
        while True:
            clock.wait(self._started, KEEPER_EVERY)
            clock.wait(never, REAP_EVERY)
            try:
                self._reap()
                if self._earlier and clock.monotonic() - began > LEFT_OVER_WAIT:
                    self._end_left_over()
            except Exception:       # pylint: disable=broad-exception-caught # the thread goes on
                log.exception("reaper")

    def _reap(self) -> None:
        """Reap what has ended and nobody waits for, such as a process of `lines` without a job; end
        what was missed when its tree ended."""
        for pid in filter(has_ended, list(self.own)):
            self.own.discard(pid)
            log.error("the keeper (process %d) was ended: if the server is killed now, what it "
                      "runs goes on; restart it", pid)
        orphans = self.orphans()
        self.has_stranger(orphans)
        for pid in orphans:
            mark = mark_of(pid)
            if not mark.startswith(self._prefix) or mark in self._starting:
                continue
            if mark not in self.trees:
                send(pid, signal.SIGKILL, functools.partial(_bears, mark))
        with self.lock:
            trees = list(self.trees.values())
            if not trees and not orphans and not self._earlier:
                self._started.clear()
        for tree in trees:
            tree.end_if_overdue()

    def _end_left_over(self) -> None:
        """Kill what a killed server and its keeper left."""
        for pid, mark in self._left_over().items():
            log.warning("process %d (%s) of a server that was killed is ended", pid, _name(pid))
            send(pid, signal.SIGKILL, functools.partial(_bears, mark))


INSTANCE = Instance()


class Tree:
    """A program that was started, which leads a session, and all that came of it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Optional[str],
        standard: Tuple[int, int, int],
        clock: Clock,
    ) -> None:
        """Start `command` with `standard` as its descriptors 0, 1 and 2.

        Raises OSError, with a text for people, if it cannot be started, or something of an earlier
        attempt on the same runtime cannot be ended.
        """
        self.runtime = environment.get("OQC_RUNTIME", "")
        survivors = INSTANCE.survivors(self.runtime)
        if survivors:
            raise OSError(errno.EBUSY, survivors)
        self.mark = INSTANCE.new_mark(environment)
        self.survivors: List[int] = []          # what could not be ended
        self.code: Optional[int] = None         # once it is reaped: its exit code, -n for signal n
        self._clock = clock
        self._lock = threading.Lock()           # held while it is ended
        self._overdue = False
        stdin, stdout, stderr = standard
        try:
            # No preexec_fn: it may deadlock where there are threads. The signals that Python
            # ignores are reset by Popen, all others in this process (reset_signals). No
            # descriptor of ours can be inherited (PEP 446), so that none has to be closed.
            self._popen = subprocess.Popen(     # pylint: disable=consider-using-with # see end
                command, env={**environment, MARK: self.mark}, cwd=cwd, stdin=stdin, stdout=stdout,
                stderr=stderr, close_fds=False, start_new_session=True)
        except OSError as error:
            INSTANCE.forget(self.mark)
            raise _explained(error, command[0]) from error
        self.pid = self._popen.pid
        self._place = INSTANCE.enter(self)

    def exited(self) -> bool:
        """Return whether the program itself has ended; what it started may go on.

        It is not reaped yet, so that its id and its session's stay taken.
        """
        return self.code is not None or has_ended(self.pid)

    def terminate(self) -> None:
        """Ask all of it to end: SIGTERM to its group, and to what has left that."""
        self._signal_group(signal.SIGTERM)
        for pid in all_processes():
            with contextlib.suppress(OSError):
                if os.getpgid(pid) != self.pid and self._owns(pid):
                    send(pid, signal.SIGTERM, self._owns)

    def end(self) -> int:
        """Kill all that is left of it, and return the exit code of the program, -n for signal n.

        What cannot be ended in KILL_WAIT seconds becomes `survivors`.
        """
        with self._lock:
            if self.code is None or self.survivors:
                self._kill(KILL_WAIT)
        if self.code is None:
            return -signal.SIGKILL
        return self.code

    def end_if_overdue(self) -> None:
        """End it if the program has ended by itself and nobody has noticed for a while."""
        if not self.exited():
            return
        if self._overdue and self._lock.acquire(blocking=False):
            try:
                self._kill(0.0)
            finally:
                self._lock.release()
        self._overdue = True

    def _kill(self, seconds: float) -> None:
        """Kill the group, then what has left it; reap the program last, since until then nobody
        else can get the number of its session."""
        deadline = self._clock.monotonic() + seconds
        self._signal_group(signal.SIGKILL)
        wait_for_ends([self.pid], deadline, self._clock)
        strays = self._strays()
        while strays:
            for pid in strays:
                send(pid, signal.SIGKILL, self._owns)
            wait_for_ends(strays, deadline, self._clock)
            strays = self._strays()     # what these have started has become ours by now
            if self._clock.monotonic() >= deadline:
                break
        self.survivors = strays
        if not has_ended(self.pid):
            self.survivors = [self.pid, *strays]
        elif self.code is None:
            self.code = self._popen.wait()
        if not self.survivors:
            INSTANCE.leave(self, self._place)

    def _strays(self) -> List[int]:
        """Return orphans of this tree that go on.

        One that is just ending bears no mark any more, and what it has started becomes our child
        when it has: so it is waited for, and looked again.
        """
        deadline = self._clock.monotonic() + EXIT_WAIT
        orphans = INSTANCE.orphans()
        strays = self._own_of(orphans)
        while not strays and self._clock.monotonic() < deadline:
            exiting = list(filter(_is_exiting, orphans))
            if not exiting:
                break
            wait_for_ends(exiting, deadline, self._clock)
            orphans = INSTANCE.orphans()
            strays = self._own_of(orphans)
        return strays

    def _own_of(self, orphans: Sequence[int]) -> List[int]:
        """Return those of these orphans that are of this tree."""
        if not orphans:
            return []
        untouchable = INSTANCE.untouchable(orphans, self)
        if INSTANCE.has_stranger(orphans):
            orphans = all_processes()
        strays = [pid for pid in orphans if pid != self.pid and self._owns(pid)]
        return sorted({*strays, *untouchable})

    def _owns(self, pid: int) -> bool:
        """Return whether a process is of this tree."""
        if pid in self.survivors:           # our child, and so not reaped
            return True
        if self.code is None and session_of(pid) == self.pid:
            return True
        return _bears(self.mark, pid)

    def _signal_group(self, number: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


def reset_signals() -> None:
    """Undo what whoever started this process has ignored or blocked: nohup SIGHUP, a shell SIGINT
    and SIGQUIT for what runs in the background, a careless parent SIGCHLD, without which no end of
    a child is seen. Runtimes would inherit it."""
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN and number not in IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def mark_of(pid: int) -> str:
    """Return the mark of a process; nothing if it has none, has ended, or may not be looked at."""
    environment = _environment(pid)
    for _ in range(EXEC_LOOKS):
        if environment:
            break
        was_in_exec = _is_in_exec(pid)
        environment = _environment(pid)     # of what it may have become meanwhile
        if not was_in_exec:
            break
        select.poll().poll(1)
    mark = MARK_IN_ENVIRON.search(environment)
    return os.fsdecode(mark[1]) if mark else ""


def _environment(pid: int) -> bytes:
    """Return the environment of a process; nothing if it has none, or may not be looked at."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def _is_in_exec(pid: int) -> bool:
    """Return whether a process has no environment because it is just becoming another program."""
    fields = stat_of(pid)
    if len(fields) < 49 or int(fields[6]) & WITHOUT_MEMORY:
        return False
    return fields[0] != b"Z" and fields[48] == b"0"     # env_end


def stat_of(pid: int) -> List[bytes]:
    """Return what proc_pid_stat(5) says of a process, from its state on; nothing if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read().rpartition(b") ")[2].split()
    except OSError:
        return []


def _is_exiting(pid: int) -> bool:
    """Return whether a process is in _exit(2), or was."""
    fields = stat_of(pid)
    return len(fields) < 7 or bool(int(fields[6]) & EXITING)


def _began(pid: int) -> int:
    """Return when a process began, in ticks of the kernel; 0 if it is gone."""
    fields = stat_of(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def _may_signal(pid: int) -> bool:
    """Return whether the kernel lets this process be killed; also if it is gone."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def _bears(mark: str, pid: int) -> bool:
    return mark_of(pid) == mark


def all_processes() -> List[int]:
    """Return the ids of all processes but this; none where there is no /proc."""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    return [pid for pid in pids if pid != os.getpid()]


def has_ended(pid: int) -> bool:
    """Return whether a child has ended; also one that is reaped."""
    try:
        return os.waitid(os.P_PID, pid, ENDED) is not None
    except ChildProcessError:
        return True


def send(pid: int, number: int, is_ours: Callable[[int], bool]) -> None:
    """Send a signal to a process that is ours; asked again while it holds its number."""
    with contextlib.ExitStack() as stack, contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            descriptor = os.pidfd_open(pid)     # type: ignore[attr-defined,unused-ignore]
            stack.callback(os.close, descriptor)
        except (AttributeError, OSError):       # before Linux 5.3 there are none
            descriptor = -1
        if not is_ours(pid):
            return
        if descriptor < 0:
            os.kill(pid, number)
        else:
            # type: ignore[attr-defined,unused-ignore]
            signal.pidfd_send_signal(descriptor, number)


def wait_for_ends(pids: Sequence[int], deadline: float, clock: Clock) -> None:
    """Wait until these children have ended, until the deadline at most."""
    for pid in pids:
        while not has_ended(pid):
            left = deadline - clock.monotonic()
            if left <= 0:
                return
            _wait_for_end(pid, left)


def script_fault(program: str) -> Optional[str]:
    """Return a line about what is wrong with the first line of a script, if anything is."""
    path = program if "/" in program else shutil.which(program) or program
    try:
        with open(path, "rb") as file:
            first = file.readline(256)
    except OSError:
        return None
    if not first.startswith(b"#!"):
        return None
    if first.endswith(b"\r\n"):
        return f"{path}: its lines end with CR LF; write them with LF alone (sed -i 's/\\r$//')"
    words = os.fsdecode(first[2:]).split()
    if words and not os.path.exists(words[0]):
        return f"{path}: its first line names {words[0]}, which is not there"
    return None


def _explained(error: OSError, program: str) -> OSError:
    """Return an error of a start with a text that says where, for the one who has to mend it."""
    text = error.strerror or str(error)
    if error.filename is not None:          # that of the program, or of its working directory
        text = f"{os.fspath(error.filename)}: {text}"
    if error.filename == program:
        if error.errno == errno.ENOENT:
            text = script_fault(program) or f"{program}: not found"
        elif error.errno == errno.ENOEXEC:
            text = f"{program}: neither a program of this machine nor a script with a #! line"
    return OSError(error.errno, text)


def _adopted() -> List[int]:
    """Return the children of the main thread: the orphans that became ours, and its own."""
    pid = os.getpid()
    try:
        children = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, children)
        text = os.read(children, 1 << 16)       # the rest is there when these are gone
        return [int(child) for child in text.rpartition(b" ")[0].split()]


def session_of(pid: int) -> int:
    """Return the session of a process, or -1 if there is none."""
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _name(pid: int) -> str:
    """Return what a process is called."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def _wait_for_end(pid: int, seconds: float) -> None:
    """Wait for the end of a process, for so long at most."""
    poll = select.poll()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(AttributeError, OSError):
            watch = os.pidfd_open(pid)          # type: ignore[attr-defined,unused-ignore]
            stack.callback(os.close, watch)
            poll.register(watch, select.POLLIN)
            poll.poll(seconds * 1000 + 1)
            return
        poll.poll(min(seconds, POLL_EVERY) * 1000 + 1)


@functools.lru_cache(maxsize=None)
def _become_subreaper() -> None:
    """Have orphans of what is started become our children, at the first start."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes       # pylint: disable=import-outside-toplevel # a server at rest spares it
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
