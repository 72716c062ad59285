"""The composition root: builds a server, starts its parts, waits for signals, stops them in the reverse order."""
import contextlib
import functools
import logging
import os
import queue
import random
import signal
import threading
from typing import Optional

from oqc import builtin, runtimes
from oqc.api import Api, Keys
from oqc.clock import Clock
from oqc.database import SQLITE_VERSION, backup, check  # pylint: disable=unused-import # for cli
from oqc.config import ConfigError, Settings, read_keys
from oqc.jobs import MODES, MOST_SEED, RetryPolicy, RuntimeSpec, StoreError
from oqc.store import Store
from oqc.workers import Workers
# last: what http.server brings fills the holes that compiling the others leaves, 1 MiB where no bytecode is kept
from oqc.server import Limits, Server, notify, tls_context

log = logging.getLogger("oqc")

MOST_LINES = 10_000                 # log lines that wait for a standard error that nobody reads
PRUNE_EVERY = 3600.0                # seconds, with --keep-days
GATHER = 0.05                       # seconds in which access lines are gathered into one write


class StartError(Exception):
    """The server cannot start; the text is one line that says why and what to do."""


class LogLines(logging.Handler):
    """The log on standard error, written by a thread of its own: a full, blocked or closed standard error costs lines,
    never a request. Without journald each line begins with its time, with it with its priority (sd-daemon(3))."""

    def __init__(self, clock: Clock, journal: bool) -> None:
        super().__init__()
        self.clock, self.journal, self.dropped = clock, journal, 0
        self._lines: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record in one line: what a terminal would act on, line breaks included, as text."""
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in self.format(record))
        priority = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}.get(record.levelno, 3)
        begin = f"<{priority}>" if self.journal else f"{self.clock.now()} {record.levelname.lower()} "
        self._put(f"{begin}{text}\n")
        self._urgent.set()

    def access(self, line: str) -> None:
        """Log a request."""
        self._put(f"<6>{line}\n" if self.journal else f"{self.clock.now()} access {line}\n")

    def _put(self, line: str) -> None:
        if self._lines.qsize() < MOST_LINES:
            self._lines.put(line)
        else:
            self.dropped += 1

    def _write(self) -> None:
        running = True
        while running:
            lines = [self._lines.get()]
            self.clock.wait(self._urgent, GATHER)
            self._urgent.clear()
            while not self._lines.empty():
                lines.append(self._lines.get())
            running = None not in lines
            if self.dropped:
                lines.append(f"{self.dropped} lines were dropped: standard error took them too slowly\n")
                self.dropped = 0
            data = "".join(filter(None, lines)).encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data):]

    def close(self) -> None:
        """Write what there is, unless nobody reads it."""
        self._lines.put(None)
        self._urgent.set()
        self._thread.join(1)
        super().close()


class Signals:
    """What the outside asked for, as events that a thread of its own sets.

    No handlers: they run only when the main thread happens to, so that a signal that comes just before it waits is not
    heard, and one that comes while it holds an event's lock waits for that lock for ever. Every thread that starts
    after this one has the signals blocked as well.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.any, self.stop, self.hurry, self.reload = (threading.Event() for _ in range(4))
        signal.pthread_sigmask(signal.SIG_BLOCK, self.NUMBERS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            if signal.sigwait(self.NUMBERS) == signal.SIGHUP:
                self.reload.set()
            else:
                (self.hurry if self.stop.is_set() else self.stop).set()
            self.any.set()


def serve(settings: Settings) -> int:
    """Run a server until it is told to stop; 0. Raises StartError."""
    _keep_standard_descriptors()
    signals, clock = Signals(), Clock()
    lines = LogLines(clock, bool(os.environ.get("JOURNAL_STREAM")))
    log.handlers, log.propagate = [lines], False
    log.setLevel(settings.log_level.upper())
    try:
        _serve(settings, signals, clock, lines)
        return 0
    except StoreError as error:
        raise StartError(str(error)) from None
    finally:
        lines.close()


def _serve(settings: Settings, signals: Signals, clock: Clock, lines: LogLines) -> None:
    """Build, start, wait, stop."""
    dice = random.Random()              # seeded by the system; a system call for each number is a 20th of an add
    try:
        tls = tls_context(settings.tls_cert, settings.tls_key)
    except OSError as error:
        files = ", ".join(filter(None, (settings.tls_cert, settings.tls_key)))
        raise StartError(f"{files}: {error.strerror or error}") from None
    store = Store(settings.db, clock)
    slots = [(spec, functools.partial(_slot, spec, clock, settings.kill_grace)) for spec in settings.runtimes]
    workers = Workers(store, slots, RetryPolicy(), clock, dice.random, max(1, settings.max_connections // 2))
    api = Api(store, workers, Keys(dict(settings.keys)), lambda: dice.getrandbits(MOST_SEED.bit_length()),
              settings.max_waiting)
    try:
        server = Server((settings.host, settings.port), api, clock,
                        limits=Limits(body=settings.max_body, connections=settings.max_connections),
                        tls=tls,
                        access=lines.access if log.isEnabledFor(logging.INFO) else lambda line: None)
    except (OSError, TypeError) as error:       # TypeError: half of a surrogate pair in the host
        store.close()
        raise StartError(f"{settings.host}:{settings.port}: {getattr(error, 'strerror', None) or error}; --host and "
                         "--port name another address") from None
    try:
        workers.start()
    except OSError as error:
        store.close()
        raise StartError(f"no room for so many slots: {error.strerror}; each takes two descriptors (ulimit -n), and "
                         "more while a job runs in it") from None
    _say_what_there_is(settings, server)
    threading.Thread(target=server.serve_forever, name="listener", daemon=True).start()
    notify(os.environ.get("NOTIFY_SOCKET"), "READY=1")
    while not signals.stop.is_set():
        if settings.keep_days:
            _forget_old_jobs(settings, store)
        clock.wait(signals.any, PRUNE_EVERY if settings.keep_days else None)
        signals.any.clear()
        if signals.reload.is_set():
            signals.reload.clear()
            _read_keys_again(settings, api)
    _stop(settings, signals, clock, server, workers, store)


def _slot(spec: RuntimeSpec, clock: Clock, kill_grace: float) -> runtimes.Slot:
    """Return a slot for this runtime; a bundled one gets its command."""
    if spec.command is None and spec.protocol == "lines":
        spec = spec._replace(command=builtin.command(spec.name))
    return runtimes.slot(spec, clock, kill_grace)


def _stop(settings: Settings, signals: Signals, clock: Clock, server: Server, workers: Workers, store: Store) -> None:
    """Take no more jobs, let those that run end, then everything, in the reverse order of its start."""
    notify(os.environ.get("NOTIFY_SOCKET"), "STOPPING=1")
    log.info("stopping: no new jobs, %g s for those that run; a second signal ends them at once", settings.drain)
    deadline = clock.monotonic() + settings.drain
    workers.drain(signals.any)
    while workers.busy() and not signals.hurry.is_set() and clock.monotonic() < deadline:
        clock.wait(signals.any, max(0.0, deadline - clock.monotonic()))
        signals.any.clear()
    workers.stop()
    server.stop()
    store.close()
    log.info("stopped")


def _say_what_there_is(settings: Settings, server: Server) -> None:
    host, port = server.server_address[:2]
    shown = f"[{host}]" if ":" in str(host) else host
    log.info("listening on %s://%s:%d/", "https" if settings.tls_cert else "http", shown, port)
    log.info("database %s", os.path.abspath(settings.db))
    log.info("runtimes: %s", "; ".join(
        f"{mode} on {', '.join(spec.name for spec in settings.runtimes if mode in spec.modes)}" for mode in MODES))
    if any(spec.name == "emulator" for spec in settings.runtimes):
        log.warning("verbatim jobs go to an emulator, not to hardware; --runtime NAME=COMMAND names a runtime")


def _forget_old_jobs(settings: Settings, store: Store) -> None:
    try:
        deleted = store.prune(settings.keep_days * 86400)
        if deleted:
            log.info("%d jobs that ended more than %d days ago are deleted", deleted, settings.keep_days)
    except StoreError as error:
        log.error("old jobs not deleted: %s", error)


def _read_keys_again(settings: Settings, api: Api) -> None:
    try:
        api.keys = Keys(read_keys(settings, os.environ))
        log.info("keys read again: %s", ", ".join(sorted(api.keys.names.values())))
    except ConfigError as error:
        log.error("keys not read again, the old ones stay: %s", error)


def _keep_standard_descriptors() -> None:
    """Open what of 0, 1 and 2 is closed, so that no socket or database gets its number; make sure that runtimes
    inherit no other descriptor than those."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        if int(name) > 2:
            with contextlib.suppress(OSError):      # the one that listdir itself had
                os.set_inheritable(int(name), False)
