"""The keeper: a process beside the server, which ends what is left when the server dies.

The server holds the only write end of a pipe; however it dies, the kernel closes that. The keeper
then ends what bears the marks of this run, or is in the session of a program that the server had
started: TERM, and KILL after GRACE seconds. (PR_SET_PDEATHSIG would fire when the thread that
started a program ends, and would not reach what that one has started.)
"""
import contextlib
import functools
import os
import signal
import threading
from typing import Callable, Set

from oqc.tree import INSTANCE, ReapersClock, all_processes, mark_of, send, session_of, stat_of

GRACE = 2.0                         # seconds from TERM to KILL
GIVE_UP = 10.0                      # seconds in all; what does not end of KILL never will
LOOK_EVERY = 0.05                   # seconds between looks at what is left
STOPPED = b"stopped"                # what the server says when it stops and leaves nothing
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)    # of a terminal, a group


class Keeper:
    """The server's side of it."""

    def __init__(self, clock: ReapersClock, kept: int = -1) -> None:
        """Start it: before there are threads, whose locks a fork would leave held.

        `kept`: a descriptor that it keeps open until nothing is left.
        """
        lifeline, self._alive = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                _keep(lifeline, clock, kept)
            os._exit(0)         # pylint: disable=protected-access # no exit handlers of the server
        os.close(lifeline)
        INSTANCE.own.add(self.pid)

    def tell(self, prefix: str) -> None:
        """Say how the marks of this run begin, before the first program is started."""
        with contextlib.suppress(BrokenPipeError):      # somebody has killed it
            os.write(self._alive, prefix.encode() + b"\n")

    def stop(self) -> None:
        """Have it end, since nothing is left for it."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._alive, STOPPED)
        os.close(self._alive)
        INSTANCE.own.discard(self.pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _keep(lifeline: int, clock: ReapersClock, kept: int) -> None:
    """Be the keeper, until the server is gone and all that it has started."""
    os.setsid()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) not in (lifeline, kept):
            with contextlib.suppress(OSError):          # the one that listdir itself had
                os.close(int(name))
    with open(lifeline, "rb") as file:
        words = file.read().split()
    if words and words[-1] != STOPPED:
        _end_all(words[0].decode(), INSTANCE.leaders.pids(), clock)


def _end_all(prefix: str, leaders: Set[int], clock: ReapersClock) -> None:
    """End what bears a mark that begins so, and the sessions of what was started."""
    is_ours = functools.partial(_is_ours, prefix, leaders)
    never = threading.Event()
    began = clock.monotonic()
    _signal_all(signal.SIGTERM, is_ours, leaders)
    while any(map(is_ours, all_processes())) and clock.monotonic() < began + GRACE:
        clock.wait(never, LOOK_EVERY)
    while _signal_all(signal.SIGKILL, is_ours, leaders) and clock.monotonic() < began + GIVE_UP:
        clock.wait(never, LOOK_EVERY)


def _signal_all(number: int, is_ours: Callable[[int], bool], leaders: Set[int]) -> bool:
    """Send a signal to all that is left; return whether anything was."""
    processes = all_processes()
    if not processes:               # a system without /proc
        for leader in leaders:
            with contextlib.suppress(OSError):
                os.killpg(leader, number)
    ours = list(filter(is_ours, processes))
    for pid in ours:
        send(pid, number, is_ours)
    return bool(ours)


def _is_ours(prefix: str, leaders: Set[int], pid: int) -> bool:
    return mark_of(pid).startswith(prefix) or session_of(pid) in leaders and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Return whether a process has ended, and whoever adopted it does not reap it."""
    return stat_of(pid)[:1] in ([], [b"Z"], [b"X"])
