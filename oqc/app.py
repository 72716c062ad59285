"""The composition root: builds a server, starts its parts, waits for signals, stops its parts.

The table of threads, with the locks that each takes:

| name | runs | may block on | locks |
|---|---|---|---|
| main | start, until_stopped, stop | signals; a commit; threads | Store, Workers, Waiting |
| signals | Signals._wait | a pipe | none |
| log | LogLines._write | standard error | none |
| listener | Server.serve_forever | select; a commit, see below | Store, Api, Workers, Waiting |
| pool | Server.process_request_thread | its client; a commit; Waiting | all |
| checker | Store.check_rest, once | the disk | Store._checking |
| loader | Workers.load | no event: it ends when all that waits is queued | Workers |
| alarms | Workers._ring_alarms | its event, until a retry is due | Workers, Waiting |
| reaper | Instance._reap_always | its event | Instance |
| NAME-n | Workers._work, one a slot | a bell; a runtime; a commit | Store, Workers, Waiting |

The locks: Store._large, of large adds, and in it Store._lead, the leader's; Workers._pausing, of a
pause that comes or goes, and in it Store._lead or Workers.lock; Workers.lock, over what runs;
Waiting's, over who waits; Api._counting, over what is being stored; tree.INSTANCE's, over what
was started. No other
two are held together, and none while a runtime or a client is waited for. The listener commits
while nobody else does and the last commit was quick, so that it waits for the disk alone; if a
thread takes the lead just before it, it waits for that one's commit as well.

The way of a POST of a small job: Server._ready reads its bytes into a Connection; Connection.parse
makes a Request of them; Server.process_request puts it with the other small adds of the round;
Server._handle_adds gives them to Api.handle_together, which parses the jobs and has
Store.add_together commit them and Workers.take_up put them on their queue, and returns the
Responses; Server.shutdown_request gives each Connection back; Server._respond sends the response.
Any other request goes from Server.process_request to a thread of the pool, where
Server.finish_request makes a Handler that asks Api.handle, and comes back the same way. Then a
worker thread takes the job: Workers._take, Store.claim, Slot.run, Store.settle (or, with the next
job, settle_and_claim), Waiting.notify.
"""
import contextlib
import functools
import logging
import os
import random
import resource
import signal
import threading
from typing import Any, Tuple

from oqc import builtin, runtimes
from oqc.api import Api
from oqc.clock import Clock
# pylint: disable-next=unused-import # for cli
from oqc.database import SQLITE_VERSION, backup, check, compact, restore
from oqc.config import DOCUMENTED_KEY, PROGRAM, ConfigError, Settings, read_keys
from oqc.jobs import MODES, MOST_SEED, RetryPolicy, RuntimeSpec, StoreError
from oqc.keeper import Keeper
from oqc.keys import Keys
from oqc.log import LogLines
from oqc.store import Store
from oqc.tree import INSTANCE, reset_signals
from oqc.waiting import Waiting
from oqc.workers import Workers
# Last on purpose: what http.server brings reuses the memory that compiling the others has freed,
# which saves 1 MiB where no bytecode is kept.
from oqc.server import Limits, Server, load_certificate_again, notify, tls_context

log = logging.getLogger("oqc")

OWN_DESCRIPTORS = 32                # that a server needs beside connections and slots
SLOT_DESCRIPTORS = 6                # that a slot needs while a job runs in it
HOUR = 3600.0                       # seconds between the server's notes of when it was seen


class StartError(Exception):
    """The server cannot start; the text is one line that says why and what to do."""


class Signals:
    """The signals that came, as events that a thread of its own sets.

    A handler runs only when the main thread happens to, so that a signal that comes just before it
    waits is not heard, and one that comes while it holds an event's lock waits for that lock for
    ever: these do nothing, and the thread reads what the interpreter writes at each signal. None is
    blocked, since a runtime would inherit that; what is handled, it does not (execve(2)).
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.any = threading.Event()        # one of the three below; or no job runs any more
        self.stop = threading.Event()
        self.hurry = threading.Event()      # a second signal to stop
        self.reload = threading.Event()
        self._came, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in self.NUMBERS:
            signal.signal(number, _heard)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            number, = os.read(self._came, 1)
            if number == signal.SIGHUP:
                self.reload.set()
            elif self.stop.is_set():
                self.hurry.set()
            elif number in self.NUMBERS:
                self.stop.set()
            self.any.set()


def _heard(_number: int, _frame: object) -> None:
    """Do nothing: Signals' thread is told."""


def serve(settings: Settings) -> int:
    """Run a server until it is told to stop; return 0. Raise StartError."""
    _keep_standard_descriptors()
    reset_signals()
    clock = Clock()
    keeper = Keeper(clock)          # before there are threads
    signals = Signals()
    lines = LogLines(clock, bool(os.environ.get("JOURNAL_STREAM")))
    log.handlers = [lines]
    log.propagate = False
    log.setLevel(settings.log_level.upper())
    try:
        tls = _tls(settings)
        store = Store(settings.db, clock)
        # Whatever goes wrong: a store that is forgotten takes its WAL along and leaves its marks.
        with contextlib.closing(store):
            running = _Running(settings, clock, lines, store, tls)
            keeper.tell(INSTANCE.begin(store.instance, store.run, clock))
            running.start()
            running.until_stopped(signals)
            running.stop(signals)
        keeper.stop()
        return 0
    except StoreError as error:
        raise StartError(str(error)) from None
    finally:
        lines.close()


class _Running:
    """A server with all its parts."""

    def __init__(self, settings: Settings, clock: Clock, lines: LogLines, store: Store,
                 tls: Any) -> None:
        """Build it and listen; raise StartError."""
        self.settings = settings
        self.clock = clock
        self.store = store
        # Seeded by the system; a system call for each number is a 20th of an add.
        dice = random.Random()
        waiting = Waiting(self.store, clock, max(1, settings.max_connections // 2))
        slots = [(spec, functools.partial(_slot, spec, clock, settings.kill_grace))
                 for spec in settings.runtimes]
        self.workers = Workers(self.store, slots, RetryPolicy(), clock, dice.random, waiting,
                               INSTANCE.left_over)
        choose_seed = functools.partial(dice.getrandbits, MOST_SEED.bit_length())
        keys = Keys(settings.keys, DOCUMENTED_KEY)
        self.api = Api(self.store, self.workers, waiting, keys, choose_seed, clock,
                       settings.max_waiting)
        limits = Limits(body=settings.max_body, connections=_most_connections(settings))
        access = lines.access
        if not log.isEnabledFor(logging.INFO):
            access = _discard
        try:
            self.server = Server((settings.host, settings.port), self.api, clock, limits=limits,
                                 access=access, tls=tls)
        except (OSError, TypeError) as error:   # TypeError: half of a surrogate pair in the host
            reason = getattr(error, "strerror", None) or error
            raise StartError(f"{settings.host}:{settings.port}: {reason}; choose another "
                             "address with --host and --port") from None

    def start(self) -> None:
        """Start the workers, then the listener; raise StartError."""
        try:
            self.store.pause_restored(
                [spec.name for spec in self.settings.runtimes if spec.protocol != "echo"])
            self.workers.start()
        except OSError as error:
            raise StartError(f"too many slots: {error.strerror}; each takes two descriptors "
                             "(ulimit -n), and more while a job runs in it") from None
        except RuntimeError as error:
            raise StartError(f"too many slots: {error}; each takes a thread (ulimit -u), and "
                             "memory for it (ulimit -v)") from None
        _log_startup(self.settings, self.server.server_address)
        _warn_without_operator(self.api.keys)
        threading.Thread(target=self.server.serve_forever, name="listener", daemon=True).start()
        threading.Thread(target=self.store.check_rest, name="checker", daemon=True).start()
        notify(os.environ.get("NOTIFY_SOCKET"), "READY=1")

    def until_stopped(self, signals: Signals) -> None:
        """Prune and read keys and certificate again, as it is time, until a signal asks to stop."""
        while not signals.stop.is_set():
            self._each_hour(signals)
            self.clock.wait(signals.any, HOUR)      # not at all, if a signal has interrupted it
            signals.any.clear()
            if signals.reload.is_set():
                signals.reload.clear()
                self._read_keys_again()
                self._read_certificate_again()

    def stop(self, signals: Signals) -> None:
        """Take no more jobs and let those that run end. Then stop the workers, so that who waits
        for a job is answered; then the listener; then the store."""
        notify(os.environ.get("NOTIFY_SOCKET"), "STOPPING=1")
        log.info("stopping: no new jobs, %g s for those that run; a second signal ends them at "
                 "once", self.settings.drain)
        deadline = self.clock.monotonic() + self.settings.drain
        self.workers.drain(signals.any)
        while self.workers.busy() and not signals.hurry.is_set():
            left = deadline - self.clock.monotonic()
            if left <= 0:
                break
            self.clock.wait(signals.any, left)
            signals.any.clear()
        self.workers.stop()
        self.server.shutdown()
        self.server.server_close()
        self.store.close()
        log.info("stopped")

    def _each_hour(self, signals: Signals) -> None:
        """Remember when the server was seen, and delete old jobs, but not by a clock that was set
        far ahead, and until a signal interrupts it."""
        period = (self.settings.keep_days or 0) * 86400
        try:
            absent = self.store.seconds_since_seen()
            if 0 < period < absent:
                log.warning("no old jobs are deleted: by the clock no server ran for %d days; if "
                            "that is right, prune once by hand", absent // 86400)
            elif period:
                self.store.prune(period, "--keep-days", signals.any.is_set)
            else:
                self.store.note_seen()
        except StoreError as error:
            if period:
                log.error("old jobs not deleted: %s", error)

    def _read_keys_again(self) -> None:
        try:
            self.api.keys = Keys(read_keys(self.settings, os.environ), DOCUMENTED_KEY)
            log.info("keys read again: %s", ", ".join(self.api.keys.names))
            _warn_without_operator(self.api.keys)
        except ConfigError as error:
            log.error("keys not read again, the old ones stay: %s", error)

    def _read_certificate_again(self) -> None:
        if not self.server.tls:
            return
        try:
            load_certificate_again(
                self.server.tls, self.settings.tls_cert, self.settings.tls_key)
            log.info("certificate read again: %s", _tls_files(self.settings))
        except OSError as error:
            log.error("certificate not read again, the old one stays: %s: %s",
                      _tls_files(self.settings), error.strerror or error)


def _most_connections(settings: Settings) -> int:
    """Return how many connections there may be: what --max-connections says, if RLIMIT_NOFILE
    leaves so many descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return settings.max_connections
    slots = sum(spec.slots for spec in settings.runtimes)
    room = max(1, limit - OWN_DESCRIPTORS - SLOT_DESCRIPTORS * slots)
    return min(room, settings.max_connections)


def _slot(spec: RuntimeSpec, clock: Clock, kill_grace: float) -> runtimes.Slot:
    """Return a slot for this runtime; a bundled one gets its command."""
    if spec.command is None and spec.protocol == "lines":
        spec = spec._replace(command=builtin.command(spec.name))
    return runtimes.slot(spec, clock, kill_grace)


def _discard(_: str) -> None:
    """Take an access line that nobody wants to read."""


def _tls(settings: Settings) -> Any:
    """Return what serves HTTPS, if it is asked for; raise StartError."""
    try:
        return tls_context(settings.tls_cert, settings.tls_key)
    except OSError as error:
        raise StartError(f"{_tls_files(settings)}: {error.strerror or error}") from None


def _tls_files(settings: Settings) -> str:
    """Return the names of the certificate's files."""
    return ", ".join(filter(None, (settings.tls_cert, settings.tls_key)))


def _warn_without_operator(keys: Keys) -> None:
    if not keys.has_operator:
        log.warning("no key is an operator's: nobody can pause a runtime, delete old jobs or "
                    "cancel the jobs of others")


def _log_startup(settings: Settings, address: Tuple[str, int]) -> None:
    host, port = address[:2]
    if ":" in str(host):
        host = f"[{host}]"
    scheme = "https" if settings.tls_cert else "http"
    url = f"{scheme}://{host}:{port}/"
    log.info("listening on %s", url)
    log.info("database %s", os.path.abspath(settings.db))
    modes = []
    for mode in MODES:
        names = [spec.name for spec in settings.runtimes if mode in spec.modes]
        modes.append(f"{mode} on {', '.join(names)}")
    log.info("runtimes: %s", "; ".join(modes))
    if any(spec.name == "emulator" for spec in settings.runtimes):
        log.warning("verbatim jobs go to an emulator, not to hardware; --runtime NAME=COMMAND "
                    "names a runtime")
    most = _most_connections(settings)
    if most < settings.max_connections:
        log.warning("%d connections at most, not %d: too few descriptors (ulimit -n)",
                    most, settings.max_connections)
    log.info("manual: %s help, or %shelp/", PROGRAM, url)


def _keep_standard_descriptors() -> None:
    """Open /dev/null for each of 0, 1 and 2 that is closed, so that no socket or database gets its
    number; make sure that runtimes inherit no other descriptor than those."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if not os.path.isdir("/dev/fd"):
        return
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):      # the one that listdir itself had
                os.set_inheritable(int(name), False)
