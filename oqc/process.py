"""A child process: start it, feed it, listen to it, and end it with all that it has started.

What it starts, and how all of that ends, is tree.py's concern.
"""
import contextlib
import fcntl
import os
import select
import struct
import termios
import threading
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from oqc.tree import INSTANCE, POLL_EVERY, Clock, Tree

MOST_ERROR = 2048                   # bytes at the end of standard error that have its last line
PIPE_READ = 1 << 16                 # bytes that one read asks for
LARGEST_PIPE = 1 << 20              # bytes that a pipe may hold (pipe(7), pipe-max-size)
LONGEST_POLL = 3600.0               # seconds; poll(2) takes no more than 24 days


class Tail:
    """The last bytes of what a process writes. One thread adds to it, any thread may look."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.total = 0                  # bytes that were added
        self._text = bytearray()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> None:
        """Keep these bytes, and as many before them as there is room for."""
        with self._lock:
            self.total += len(data)
            self._text += data
            del self._text[:-self.most]

    def kept(self) -> Tuple[bytes, int]:
        """Return what is kept, and how many bytes before it are not."""
        with self._lock:
            return bytes(self._text), self.total - len(self._text)


class Process:                      # pylint: disable=too-many-instance-attributes # each says why
    """A child that leads a session of its own, and the pipes to it.

    It belongs to one thread, which does all reading and writing while it listens. Output beyond
    what is kept is read and dropped.
    """

    most_output = 0                 # bytes that are kept of `output`, from its beginning
    heard = 0                       # bytes of both that were read
    has_closed_input = False        # nobody can read what it is sent
    _data = b""                     # what is sent, and how many bytes of it were written
    _sent = 0
    _when_taken: Optional[Callable[[], Any]] = None     # to be told of its first byte

    def __init__(
        self,
        command: Sequence[str],
        environment: Dict[str, str],
        feed: Optional[int],
        wake: int,
        clock: Clock,
        cwd: Optional[str] = None,
    ) -> None:
        """Start `command` with this environment; raise OSError, with a text, if that fails.

        `feed` is the open file that becomes its standard input; None stands for a pipe, which
        `send` writes to. As soon as the descriptor `wake` can be read, `listen` and `send` read it
        and ask their `is_over`.
        """
        self.output = bytearray()       # with one byte more than that there was too much
        self.error = bytearray()        # the last MOST_ERROR bytes
        self.log = Tail(MOST_ERROR)     # of standard error, and of what the owner adds
        self._wake = wake
        self._clock = clock
        self._input = -1                # our end of the pipe to its standard input, if there is one
        self._unsent = memoryview(b"")      # what may be written now
        with contextlib.ExitStack() as at_end, contextlib.ExitStack() as after_start:
            output, childs_output = _pipe(at_end, after_start)
            error, childs_error = _pipe(at_end, after_start)
            if feed is None:
                feed, self._input = _pipe(after_start, at_end)
                os.set_blocking(self._input, False)
            standard = (feed, childs_output, childs_error)
            self._tree = Tree(command, environment, cwd, standard, clock)
            self._descriptors = at_end.pop_all()
        self._sinks = {output: self.output, error: self.error}
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)
        for descriptor in self._sinks:
            os.set_blocking(descriptor, False)
            self._poll.register(descriptor, select.POLLIN)
        self._longest_poll = POLL_EVERY
        with contextlib.suppress(AttributeError, OSError):      # Linux 5.3 and later have it
            watch = os.pidfd_open(self.pid)     # type: ignore[attr-defined,unused-ignore]
            self._descriptors.callback(os.close, watch)
            self._poll.register(watch, select.POLLIN)
            self._longest_poll = LONGEST_POLL

    def exited(self) -> bool:
        """Return whether the process itself has ended; its children may go on."""
        return self._tree.exited()

    def listen(self, deadline: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Read what it writes until it has ended or `is_over`; return False at the deadline.

        `is_over` is asked at the beginning, and again after whatever was read. The deadline is in
        monotonic seconds.
        """
        while not (is_over() or self.exited()):
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return False
            self._wait_for_event(left)
        return True

    def send(
        self,
        data: bytes,
        deadline: float,
        is_over: Callable[[], bool],
        when_taken: Optional[Callable[[], Any]] = None,
    ) -> bool:
        """Write `data` to its standard input while listening; arguments and result as `listen`.

        `when_taken` is called once, before anything is read that it has written after it began to
        read the data. A later `listen` writes what is left, until `send_no_more`.
        """
        self._data = data
        self._sent = 0
        self._unsent = memoryview(data)
        self._when_taken = when_taken
        self._poll.register(self._input, select.POLLOUT)
        self._write()
        return self.listen(deadline, is_over)

    def send_no_more(self) -> None:
        """Drop what the process has not taken of what it was sent."""
        if self._sent < len(self._data) and not self.has_closed_input:
            self._end_of_data()

    def written(self) -> Optional[bytes]:
        """Return what was sent last, as it was written; None if not all of it was."""
        return self._data if self._sent == len(self._data) else None

    def took_some(self) -> bool:
        """Return whether it has read anything of what it was sent last."""
        number = fcntl.ioctl(self._input, termios.FIONREAD, bytes(4))
        left_in_pipe: int = struct.unpack("i", number)[0]
        return self._sent > left_in_pipe

    def read_on(self) -> None:
        """Read what it has written by now, but no more than a pipe holds: it may never stop."""
        self._tell_if_taken()
        for descriptor, sink in list(self._sinks.items()):
            for _ in range(LARGEST_PIPE // PIPE_READ + 1):
                if not self._read(descriptor):
                    break
                if sink is self.output and len(sink) > self.most_output:
                    break

    @property
    def pid(self) -> int:
        """Its id."""
        return self._tree.pid

    @property
    def survivors(self) -> str:
        """What of it could not be ended, as a line; known when `end` has returned."""
        if not self._tree.survivors:
            return ""
        return INSTANCE.survivors(self._tree.runtime)

    def end(self, grace: float) -> int:
        """End it with all that it started; return the exit code, or -n after signal n.

        All get TERM, and KILL as soon as the process has ended, or after `grace` seconds. This is
        the last call to a process.
        """
        if not self.exited():
            self._tree.terminate()
            self.listen(self._clock.monotonic() + grace)
        self.read_on()
        code = self._tree.end()
        self._descriptors.close()
        return code

    def _wait_for_event(self, seconds: float) -> None:
        """Wait until something can be read or written, or for so long; read and write it."""
        milliseconds = min(seconds, self._longest_poll) * 1000 + 1
        ready = self._poll.poll(milliseconds)
        self._tell_if_taken()
        for descriptor, events in ready:
            if descriptor in self._sinks:
                self._read(descriptor)
            elif descriptor == self._input and events & select.POLLERR:
                self._note_closed_input()
            elif descriptor == self._input:
                self._write()
            elif descriptor == self._wake:
                os.read(self._wake, 64)

    def _tell_if_taken(self) -> None:
        if self._when_taken and self.took_some():
            self._when_taken()
            self._when_taken = None

    def _read(self, descriptor: int) -> bool:
        """Read once and keep what is to be kept; return False if there was nothing."""
        try:
            data = os.read(descriptor, PIPE_READ)
        except BlockingIOError:
            return False
        if not data:                    # it has closed this end, and may go on all the same
            self._poll.unregister(descriptor)
            del self._sinks[descriptor]
            return False
        self.heard += len(data)
        sink = self._sinks[descriptor]
        if sink is self.error:
            sink += data
            del sink[:-MOST_ERROR]
            self.log.add(data)
        elif len(sink) <= self.most_output:
            sink += data[:self.most_output + 1 - len(sink)]
        return True

    def _write(self) -> None:
        """Write as much of the data as its pipe has room for."""
        try:
            while self._unsent:
                written = os.write(self._input, self._unsent)
                self._sent += written
                self._unsent = self._unsent[written:]
        except BlockingIOError:
            return
        except BrokenPipeError:         # what it answers to that decides
            self._note_closed_input()
            return
        if self._sent == len(self._data):
            self._end_of_data()

    def _end_of_data(self) -> None:
        self._unsent = memoryview(b"")
        self._poll.register(self._input, 0)     # which goes on to say when it is closed

    def _note_closed_input(self) -> None:
        self._unsent = memoryview(b"")
        self.has_closed_input = True
        self._poll.unregister(self._input)


def wait_to_read(descriptor: int, seconds: float) -> None:
    """Wait until there is something to read, for so long at most."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(seconds * 1000)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> Tuple[int, int]:
    """Return the two ends of a new pipe, (to read, to write), closed with these stacks."""
    ends = os.pipe()
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends
