"""Log lines on standard error, written by a thread of its own."""
import contextlib
import logging
import os
import queue
import threading
from typing import Optional

from oqc.clock import Clock

MOST_LINES = 10_000                 # that wait for a standard error which nobody reads
GATHER = 0.05                       # seconds in which access lines are gathered into one write
PRIORITIES = {                      # sd-daemon(3)
    logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class LogLines(logging.Handler):
    """The log on standard error: a full, blocked or closed one costs lines, never a request.

    Without journald each line begins with its time, with it with its priority (sd-daemon(3)).
    """

    def __init__(self, clock: Clock, journal: bool) -> None:
        """`journal`: whether journald reads standard error."""
        super().__init__()
        self.clock = clock
        self.journal = journal
        self.dropped = 0                # about how many lines were, since the last write
        self._lines: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()   # None: the last
        self._urgent = threading.Event()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record in one line: what a terminal would act on, line breaks included, as text."""
        text = "".join(char if char.isprintable() else repr(char)[1:-1]
                       for char in self.format(record))
        self._put(PRIORITIES.get(record.levelno, 3), record.levelname.lower(), text)
        self._urgent.set()

    def access(self, line: str) -> None:
        """Log a request, in a line that is printable."""
        self._put(PRIORITIES[logging.INFO], "access", line)

    def _put(self, priority: int, kind: str, text: str) -> None:
        if self._lines.qsize() >= MOST_LINES:
            self.dropped += 1
        elif self.journal:
            self._lines.put(f"<{priority}>{text}\n")
        else:
            self._lines.put(f"{self.clock.now()} {kind} {text}\n")

    def _write(self) -> None:
        """The log thread: write what has gathered."""
        running = True
        while running:
            lines = [self._lines.get()]
            self.clock.wait(self._urgent, GATHER)
            self._urgent.clear()
            while not self._lines.empty():
                lines.append(self._lines.get())
            running = None not in lines
            if self.dropped:
                lines.append(f"{self.dropped} lines were dropped: "
                             "standard error took them too slowly\n")
                self.dropped = 0
            data = "".join(filter(None, lines)).encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data):]

    def close(self) -> None:
        """Write the lines that wait; give up after a second."""
        self._lines.put(None)
        self._urgent.set()
        self._thread.join(1)
        super().close()
