"""Who runs what, when: the queue, a worker thread for each slot, retries, cancelling, pausing.

The database is the truth; what is here holds ids, is rebuilt from it at start, and is changed after
it.
"""
import bisect
import contextlib
import heapq
import itertools
import json
import logging
import threading
from collections import Counter
from typing import (
    Any, Callable, Dict, Iterator, List, Optional, Protocol, Sequence, Set, Tuple,
    Union)

from oqc import jobs
from oqc.jobs import (
    Addition, DamagedRow, Ended, Ending, Job, Log, Outcome, Queued, RetryPolicy, RuntimeSpec,
    StoreError, Submission, Task)
from oqc.recent import MINUTE, SECOND, Recent
from oqc.turns import TurnQueue
from oqc.waiting import Waiting

log = logging.getLogger("oqc")

SET_ASIDE_AFTER = 3                 # failures to start, in a row
FIRST_PAUSE = 1.0                   # seconds that a failing runtime is left alone, doubling
MOST_PAUSE = 60.0
INTERRUPTED = Outcome(jobs.KILLED, "interrupted, outcome unknown", interrupted=True)
DEFECT = Outcome(jobs.SOFTWARE, "internal error; the server's log has it")
NEVER_RUN = Outcome(jobs.CANCELLED, started=False, interrupted=True)
STORE_AGAIN = 1.0                   # seconds until a write that failed is tried again
NO_JOB = 0                          # an id that is never given out
REMOVED_AT_ONCE = 100               # jobs, from the queue: it is locked meanwhile
CANCELLED_AT_ONCE = 1000            # jobs that wait, in one transaction: others write between two
CANCEL_AGAIN = 0.01                 # seconds between two tries to cancel a job that changes hands
HELD_AGAIN = 0.1                    # seconds between looks at what a crash has left of an attempt


def _nothing_left(_number: int, _runtime: str) -> bool:
    return False


def _as_cancelled(outcome: Outcome) -> Outcome:
    """Return the outcome of a job that was cancelled, with what its runtime had said by then."""
    return outcome._replace(
        return_code=jobs.CANCELLED, runtime_error="cancelled", interrupted=True)


def _queued(task: Task) -> Queued:
    """Return the job of a task as the queue knows it."""
    return Queued(task.id, task.mode, task.priority, task.submitter, task.asked_runtime)


class _Stopping(BaseException):
    """The server stops before something could be stored. No Exception: it is no defect."""


class Store(Protocol):
    """What the workers ask of the store; a write is on disk when it returns."""

    def get(self, number: int) -> Job:
        """Return a job; raise UnknownJob."""

    def claim(self, number: int, runtime: str) -> Optional[Task]:
        """Start an attempt at a job; return None if it does not wait any more. Raise DamagedRow."""

    def settle(self, endings: Sequence[Ending]) -> None:
        """End these attempts."""

    def settle_and_claim(self, ending: Ending, number: int, runtime: str) -> Optional[Task]:
        """End an attempt, and start one at another job, as `settle` and `claim` do."""

    def keep_log(self, number: int, attempt: int, said: Log) -> None:
        """Replace the log of a job's last attempt that has this number and is over."""

    def cancel(self, number: int, code: int = jobs.CANCELLED,
               error: str = "cancelled") -> Optional[Queued]:
        """End a job that waits as cancelled, or with another return code, and return it; None if it
        does not wait."""

    def cancel_together(self, numbers: Sequence[int]) -> List[Queued]:
        """End those of these jobs that wait as cancelled; return them."""

    def pause(self, runtime: str, reason: str, by: str = "oqc") -> str:
        """Remember that a runtime is paused, why and by whose key; return since when."""

    def resume(self, runtime: str) -> None:
        """Forget that a runtime is paused."""

    def pauses(self) -> Dict[str, Tuple[str, str, Optional[str]]]:
        """Return {runtime: (reason, since, by whose key)} of the paused ones."""

    def running(self) -> Iterator[List[Tuple[int, int, str, str]]]:
        """Yield pages of (id, attempt, mode, runtime) of the jobs that a crash cut off."""

    def waiting(self) -> Iterator[List[Tuple[Queued, Optional[float]]]]:
        """Yield pages of (job, when it is due) of the jobs that wait."""

    def ended(self, since: str, until: str) -> Dict[Optional[str], int]:
        """Return how many jobs ended on each runtime, from one UTC time until before another."""

    def status(self) -> Dict[str, Any]:
        """Return how many jobs wait and run: "waiting", "retrying" and others, by mode."""


class Slot(Protocol):
    """Room for one attempt at a time on a runtime."""

    survivors: str                  # what of its last attempt could not be ended, as a line

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        """Run one attempt to its end, or until `interrupted()`; then the outcome says so."""

    def log(self, number: int) -> Log:
        """Return what the attempt that runs at this job has written on standard error. For any
        thread."""

    device: Optional[str]           # JSON: what its runtime says of itself

    def rest(self, is_over: Callable[[], bool], may_start: bool) -> Optional[Outcome]:
        """Wait between attempts until `is_over()`, or sooner; return an outcome if a process has
        started without a job, or failed to, which only happens if it `may_start`."""

    def late_logs(self) -> List[Tuple[int, int, Log]]:
        """Return (job, attempt, log) of attempts whose log has grown since they were over."""

    def wake(self) -> None:
        """Have a running attempt ask `interrupted()` again, or a rest its `is_over()`. For any
        thread."""

    def close(self) -> None:
        """End what is left between attempts."""


class Clock(Protocol):
    """What the workers ask of a clock."""

    def now(self) -> str:
        """Return the UTC time as the API shows it."""

    def at(self, seconds: float) -> str:
        """Return the UTC time so many seconds since 1970."""

    def unix(self) -> float:
        """Return seconds since 1970."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""

    def wait(self, event: threading.Event, seconds: Optional[float]) -> bool:
        """Wait until `event` is set, `seconds` at most; return whether it is set."""


class _Attempt:
    """One attempt, from the moment a worker takes the job from its queue until its end is on disk.

    A cancel counts if it is set before `_decide` reads it: both hold Workers.lock.
    """

    def __init__(self, runtime: "_Runtime", number: int, slot: Slot) -> None:
        self.runtime = runtime
        self.number = number            # of its job
        self.slot = slot
        self.task: Optional[Task] = None            # once the job is claimed
        self.began = 0.0                # monotonic seconds
        self.cancelled = False          # somebody wants the job ended
        self.stopped = False            # the server stops
        self.ending: Optional[Ending] = None        # how it ended, once that is on disk
        self.over = threading.Event()   # set last: the worker has done with it

    def must_end(self) -> bool:
        """Return whether somebody wants it ended."""
        return self.cancelled or self.stopped


class _Worker:
    """What a worker thread has of its own. `is_rung` is changed under its runtime's lock of the
    bell."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.is_rung = True             # it looks at the queues before it rests


class _Runtime:                     # pylint: disable=too-many-instance-attributes # each says why
    """A runtime and its state. Changed under Workers.lock."""

    def __init__(self, spec: RuntimeSpec, make_slot: Callable[[], Slot], since: str,
                 policy: RetryPolicy) -> None:
        if spec.attempts == 1:          # no job runs twice, whatever cut it off
            spec = spec._replace(interrupted="fail")
        self.spec = spec
        self.policy = policy._replace(attempts=spec.attempts)
        self.make_slot = make_slot
        self.since = since              # UTC time of the last change of state
        self.workers: List[_Worker] = []
        self._bell = threading.Lock()   # held while a worker goes to rest, or is rung
        self._resting: List[_Worker] = []
        self.paused: Optional[str] = None       # the reason
        self.paused_by: Optional[str] = None    # the name of a key, while it is paused
        self.failed_starts = 0          # in a row
        self.aside_until = 0.0          # monotonic seconds
        self.start_error: Optional[str] = None      # the last one, once it is set aside
        self.failed_by: Optional[Queued] = None     # the job that it failed to start with last
        self.failed_jobs = 0            # in a row
        self.last_error: Optional[str] = None       # of the last job that failed
        self.running: Dict[int, _Attempt] = {}
        self.jobs_ended = 0
        self.jobs_failed = 0

    @property
    def set_aside(self) -> bool:
        """Whether it failed to start too often, so that it is tried only now and then."""
        return self.failed_starts >= SET_ASIDE_AFTER

    def state(self) -> str:
        """Return what GET /runtimes/ says of it."""
        if self.paused is not None:
            return "paused"
        if self.set_aside:
            return "failing"
        if len(self.running) >= self.spec.slots:
            return "busy"
        return "idle"

    def may_run(self, mode: str, asked_runtime: Optional[str]) -> bool:
        """Return whether it runs jobs of this mode that ask for that runtime, or for any."""
        return mode in self.spec.modes and asked_runtime in (None, self.spec.name)

    def obstacle(self) -> Optional[str]:
        """Return why it starts no job, or None."""
        if self.paused is not None:
            return f"{self.spec.name} is paused: {self.paused or 'no reason given'}"
        if self.set_aside:
            return f"{self.spec.name} cannot be started: {self.start_error}"
        return None

    @property
    def device(self) -> Optional[str]:
        """What it says of itself, as JSON."""
        devices = [worker.slot.device for worker in self.workers if worker.slot.device]
        return devices[-1] if devices else None

    def lie_down(self, worker: _Worker) -> None:
        """Have a worker rung from now on. It looks at the queues once more before it rests, or a
        ring between the two would be lost."""
        with self._bell:
            worker.is_rung = False
            self._resting.append(worker)

    def rise(self, worker: _Worker) -> bool:
        """Have a worker rung no more; return whether it was."""
        with self._bell:
            was_rung = worker.is_rung
            if not was_rung:
                self._resting.remove(worker)
                worker.is_rung = True
            return was_rung

    def ring(self, times: int = 0) -> None:
        """Have so many workers that rest look at the queues, or all."""
        with self._bell:
            rung = self._resting[-times:]       # who has worked last
            del self._resting[-times:]
            for worker in rung:
                worker.is_rung = True
        for worker in rung:
            worker.slot.wake()


# pylint: disable-next=too-many-instance-attributes, too-many-public-methods # each says why
class Workers:
    """The worker threads of all runtimes, and what concerns jobs that wait or run."""

    def __init__(self, store: Store, runtimes: Sequence[Tuple[RuntimeSpec, Callable[[], Slot]]],
                 policy: RetryPolicy, clock: Clock, dice: Callable[[], float],
                 waiting: Waiting,
                 left_over: Callable[[int, str], bool] = _nothing_left) -> None:
        """`runtimes`: each with what makes a slot of it. `dice` gives numbers from 0 to 1, for the
        delays. `waiting` is told of every change, after it is on disk. `left_over`: whether
        processes are left of an attempt at a job on a runtime, which a crash cut off."""
        self.store = store
        self.policy = policy
        self.clock = clock
        self.dice = dice
        self.waiting = waiting
        self.left_over = left_over
        self._cut_off_on: Dict[int, str] = {}   # jobs that a crash cut off, and their runtimes
        self.runtimes = {spec.name: _Runtime(spec, make, clock.now(), policy)
                         for spec, make in runtimes}
        self._echo = self.runtimes.get("echo")
        self._recent = Recent(clock)
        self._queue = TurnQueue({spec.name: spec.modes for spec, _ in runtimes})
        self._loading = True            # what waits in the database is not all in the queue yet
        self._to_load = 0               # how much of it there was at the start
        self._loaded = 0                # the last job of it that is there
        self._arrived: List[Queued] = []        # what came meanwhile
        self._cancelled: Set[int] = set()       # while they waited, but not in the queue
        self._began = clock.monotonic()
        self.draining = threading.Event()       # no more jobs are started
        self._stopped = threading.Event()
        self._idle = threading.Event()          # set by a worker that leaves no job running
        self._threads: List[threading.Thread] = []
        self._pausing = threading.Lock()        # held while a pause comes or goes, on disk and here
        self.lock = threading.Lock()            # over every _Runtime and _Attempt, and what follows
        # A heap of (monotonic seconds, serial, what then: a job to queue, a runtime to ring).
        self._alarms: List[Tuple[float, int, Union[Queued, _Runtime]]] = []
        self._alarm_serial = itertools.count()
        self._alarm_set = threading.Event()
        self._durations: Dict[Tuple[str, str], List[float]] = {}

    # Life

    def start(self) -> None:
        """Take over what the database says, and start the threads."""
        self.take_over()
        for target, name in ((self._load_all, "loader"), (self._ring_alarms, "alarms")):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
        for name, runtime in self.runtimes.items():
            for number in range(runtime.spec.slots):
                worker = _Worker(runtime.make_slot())
                runtime.workers.append(worker)
                self._threads.append(threading.Thread(
                    target=self._work, name=f"{name}-{number}", args=(runtime, worker),
                    daemon=True))
        for thread in self._threads:
            thread.start()

    def take_over(self) -> None:
        """Take over the pauses, and decide on what a crash cut off."""
        for name, (reason, since, by) in self.store.pauses().items():
            if name in self.runtimes:
                self.runtimes[name].paused = reason
                self.runtimes[name].paused_by = by
                self.runtimes[name].since = since
        for page in self.store.running():
            endings = [self._cut_off(*row) for row in page]
            self.store.settle(endings)
            for ending in endings:
                if ending.event == "failed":
                    self._recent.count(self._cut_off_on[ending.task.id])
        status = self.store.status()
        self._to_load = sum(sum(status[state].values()) for state in ("waiting", "retrying"))

    def _load_all(self) -> None:
        """The loader thread: read what waits, and then what has ended of late."""
        with contextlib.suppress(_Stopping):
            self._until_stored(self.load)
        with contextlib.suppress(StoreError):       # which the store has logged
            self._recent.load(self.store.ended, self._stopped.is_set)

    def load(self) -> None:
        """Queue what waits in the database, the oldest first, and then what came meanwhile. Until
        then no job is started. After a StoreError it goes on where it was."""
        for page in self.store.waiting():
            if self._stopped.is_set():
                return
            for job, due in page:
                if job.id > self._loaded:
                    self._load_job(job, due)
                    self._loaded = job.id
        with self.lock:
            for job in self._arrived:
                if job.id > self._loaded:       # else the database had it already
                    self._put(job)
            self._arrived.clear()
            self._loading = False
        if self._queue.qsize():
            for runtime in self.runtimes.values():
                runtime.ring()

    def _load_job(self, job: Queued, due: Optional[float]) -> None:
        """Queue a job, at once or when it is due."""
        delay = 0.0
        if due is not None:
            # A wall clock that jumped must hold no job back for longer than a delay can.
            delay = min(due - self.clock.unix(), self.policy.most)
        if self._is_held(job.id):
            log.warning("job %d waits until its attempt on %s has ended, which goes on since the "
                        "server was killed", job.id, self._cut_off_on[job.id])
            delay = max(delay, HELD_AGAIN)
        if delay <= 0:
            self._put(job)
            return
        with self.lock:
            self._set_alarm(self.clock.monotonic() + delay, job)

    def _cut_off(self, number: int, attempt: int, mode: str, name: str) -> Ending:
        """Return the end of an attempt that ran when the server was killed."""
        runtime = self.runtimes.get(name)
        again = runtime is None or runtime.spec.interrupted == "retry"
        outcome = INTERRUPTED._replace(transient=again)
        self._cut_off_on[number] = name
        event = jobs.decide(outcome, attempt, runtime.policy if runtime else self.policy)
        fate = "it is tried again" if event == "retry" else "ended as interrupted"
        log.warning("job %d was running on %s when the server was killed: %s", number, name, fate)
        return Ending(Task(number, "", mode, attempt, 0, 0, 0), event, outcome)

    def drain(self, idle: threading.Event) -> None:
        """Start no more jobs. Those that run go on, and `idle` is set when none is left."""
        self._idle = idle
        self.draining.set()
        self.waiting.notify()

    def busy(self) -> bool:
        """Return whether a job runs."""
        with self.lock:
            return any(runtime.running for runtime in self.runtimes.values())

    def stop(self) -> None:
        """End what still runs, which the next start runs again or what its runtime's `interrupted`
        says, and all threads."""
        self.drain(self._idle)
        self._stopped.set()
        with self.lock:
            for runtime in self.runtimes.values():
                for attempt in runtime.running.values():
                    attempt.stopped = True
                    attempt.slot.wake()
                runtime.ring()
        self._alarm_set.set()
        self.waiting.stop()
        for thread in self._threads:
            thread.join()

    # Queues

    def immediate_outcome(self, submission: Submission) -> Optional[Outcome]:
        """Return the outcome of a new job where nothing can come between: of an echo, unless it is
        to be tried again, or echoes are paused or wait before it.

        It is stored as ended: a thread that claims and ends each one takes a third of the rate at
        which they are added.
        """
        echo = self._echo
        if submission.mode != "echo" or echo is None or echo.paused is not None:
            return None
        if self._loading or self._queue.count("echo"):
            return None
        outcome = jobs.echo(submission.return_code, echo.spec.retry_codes)
        return None if outcome.transient else outcome

    def take_up(self, additions: Sequence[Addition]) -> None:
        """Have new jobs run, once the store has them; count and announce those that ended."""
        endings = []
        queued: List[Queued] = []
        for addition in additions:
            endings += addition.endings
            queued += addition.queued
        if endings and self._echo:
            self._announce(self._echo, endings)
        if queued and not self._have_to_wait(queued):
            self._enqueue(queued)

    def _have_to_wait(self, queued: Sequence[Queued]) -> bool:
        """Return whether new jobs have to wait until older ones are loaded; keep them for then."""
        if self._loading:
            with self.lock:             # the loader ends under it
                if self._loading:
                    self._arrived += queued
                    return True
        return False

    def _enqueue(self, queued: Sequence[Queued]) -> None:
        """Put these jobs on the queue and wake the workers of their runtimes."""
        for job in queued:
            self._put(job)
        kinds = Counter((job.mode, job.runtime) for job in queued)
        for runtime in self.runtimes.values():
            rings = sum(count for kind, count in kinds.items() if runtime.may_run(*kind))
            if rings:
                runtime.ring(rings)
        self.waiting.notify()

    def _put(self, job: Queued) -> None:
        """Put a job on the queue, unless it was cancelled on its way."""
        if self._cancelled and job.id in self._cancelled:
            self._cancelled.discard(job.id)
        else:
            self._queue.put(job)

    def queued(self) -> int:
        """Return how many jobs wait to be run now; until all are loaded, with those of later."""
        if self._loading:
            with self.lock:             # the loader ends under it
                if self._loading:
                    return self._to_load + len(self._arrived)
        return self._queue.qsize()

    def _is_held(self, number: int) -> bool:
        """Return whether something is left of a job's attempt that a crash cut off."""
        name = self._cut_off_on.get(number)
        if name is None:
            return False
        if self.left_over(number, name):
            return True
        del self._cut_off_on[number]
        return False

    def _set_alarm(self, at: float, then: Union[Queued, _Runtime]) -> None:
        """Have a job queued at that time, until when it holds no thread and no runtime; or have a
        runtime's workers look again. Under the lock."""
        heapq.heappush(self._alarms, (at, next(self._alarm_serial), then))
        self._alarm_set.set()

    def _ring_alarms(self) -> None:
        """The alarm thread: ring what is due, and wait for the next alarm."""
        while not self._stopped.is_set():
            self._alarm_set.clear()
            self.ring_due()
            pause = None
            with self.lock:
                if self._alarms:
                    pause = self._alarms[0][0] - self.clock.monotonic()
            self.clock.wait(self._alarm_set, pause)

    def ring_due(self) -> List[int]:
        """Do what has become due; return the ids of the jobs that were queued."""
        due = []
        with self.lock:
            now = self.clock.monotonic()
            while self._alarms and self._alarms[0][0] <= now:
                due.append(heapq.heappop(self._alarms)[2])
        queued = []
        for then in due:
            if isinstance(then, _Runtime):
                then.ring()
            elif self._is_held(then.id):
                with self.lock:
                    self._set_alarm(self.clock.monotonic() + HELD_AGAIN, then)
            else:
                self._enqueue([then])
                queued.append(then.id)
        return queued

    # Work

    def _work(self, runtime: _Runtime, worker: _Worker) -> None:
        """A worker thread: a turn after the other, and a rest when there is nothing to run."""
        slot = worker.slot
        attempt: Optional[_Attempt] = None
        while attempt or not self.draining.is_set():
            try:
                attempt = attempt or self.begin(runtime, slot) or self._rest(runtime, worker)
                if attempt is not None:
                    attempt = self.end(attempt, self._outcome(attempt))
                self._keep_late_logs(slot)
            except _Stopping:       # the next start decides on the job
                attempt = None
            except Exception:       # pylint: disable=broad-exception-caught # the thread goes on
                log.exception("worker of %s", runtime.spec.name)
                if attempt is None:     # or it would do nothing else any more
                    self.clock.wait(self._stopped, STORE_AGAIN)
                attempt = None
        slot.close()
        with contextlib.suppress(_Stopping):
            self._keep_late_logs(slot)

    def _rest(self, runtime: _Runtime, worker: _Worker) -> Optional[_Attempt]:
        """Rest until somebody rings, or there is something to be stored; return the attempt at a
        job that came meanwhile, if there is one."""
        runtime.lie_down(worker)
        outcome = None
        try:
            attempt = self.begin(runtime, worker.slot)
            if attempt is None:
                outcome = worker.slot.rest(
                    lambda: worker.is_rung or self.draining.is_set(),
                    self._may_start(runtime, worker))
        finally:
            was_rung = runtime.rise(worker)
        if attempt is not None and was_rung:
            runtime.ring(1)         # for another job, perhaps
        if outcome is not None:
            with self.lock:
                if runtime.set_aside or not outcome.started:
                    self._note_start(runtime, outcome)
        return attempt

    def _may_start(self, runtime: _Runtime, worker: _Worker) -> bool:
        """Return whether a runtime that is to be warm may be started now: if it is set aside, by
        one worker, and when its pause is over."""
        with self.lock:
            if runtime.paused is not None:
                return False
            if not runtime.set_aside:
                return True
            if runtime.aside_until > self.clock.monotonic():
                return False
            return worker is runtime.workers[0] and not runtime.running

    def _keep_late_logs(self, slot: Slot) -> None:
        """Store what a runtime has said since its attempts were over."""
        for number, attempt, said in slot.late_logs():
            self._until_stored(self.store.keep_log, number, attempt, said)

    def begin(self, runtime: _Runtime, slot: Slot) -> Optional[_Attempt]:
        """Start an attempt at the next job for this slot; return None if there is none for it, or
        it may not run."""
        while attempt := self._take(runtime, slot):
            try:
                attempt.task = self._claim(attempt)
            finally:
                if attempt.task is None:    # it was cancelled meanwhile, or cannot be stored
                    self._cancelled.discard(attempt.number)
                    self._finish(attempt)
            if attempt.task is not None:
                attempt.began = self.clock.monotonic()
                self.waiting.notify()
                return attempt
        return None

    def _claim(self, attempt: _Attempt) -> Optional[Task]:
        """Store that an attempt begins; return None if its job does not wait any more. If it is
        damaged, or after a defect, it ends: nothing would take it up again."""
        number = attempt.number
        error = DEFECT.runtime_error
        try:
            task: Optional[Task] = self._until_stored(
                self.store.claim, number, attempt.runtime.spec.name)
            return task
        except DamagedRow as damage:
            error = str(damage)
            log.error("%s; it is not run and ends with 70", damage)
        except Exception:           # pylint: disable=broad-exception-caught # the job has to end
            self._log_defect(attempt)
        self._until_stored(self.store.cancel, number, DEFECT.return_code, error)
        self.waiting.notify([number])
        return None

    @staticmethod
    def _log_defect(attempt: _Attempt) -> None:
        log.exception("%s: job %d", attempt.runtime.spec.name, attempt.number)

    def end(self, attempt: _Attempt, outcome: Outcome) -> Optional[_Attempt]:
        """End an attempt with this outcome. After a success return the next one of its slot, begun
        with the same commit, if there is one."""
        following = None
        try:
            ending = self._decide(attempt, outcome)
            ending = ending._replace(seconds=self.clock.monotonic() - attempt.began)
            reason = self._reason_to_pause(attempt.runtime, ending)
            if reason:              # first, so that who is told of the end can read it
                self._until_stored(self.pause, attempt.runtime.spec.name, reason)
            if ending.event == "succeeded":     # which never keeps a runtime from its next job
                following = self._take(attempt.runtime, attempt.slot)
            if following is None:
                ending = self._settle(attempt, ending)
            else:
                ending = self._settle_and_claim(attempt, ending, following)
            attempt.ending = ending
        finally:
            self._finish(attempt)
        if following is None or following.task is None:
            return None
        return following

    def _settle(self, attempt: _Attempt, ending: Ending) -> Ending:
        """Store how an attempt ended; return that, or, after a defect, the end that was stored
        instead."""
        try:
            self._until_stored(self.store.settle, [ending])
        except Exception:           # pylint: disable=broad-exception-caught # the job has to end
            self._log_defect(attempt)
            ending = Ending(ending.task, "failed", DEFECT, seconds=ending.seconds)
            self._until_stored(self.store.settle, [ending])
        return ending

    def _settle_and_claim(self, attempt: _Attempt, ending: Ending, following: _Attempt) -> Ending:
        """Store how an attempt ended and that another begins, in one transaction: a commit takes as
        long as a short job. Return what _settle does."""
        try:
            try:
                following.task = self._until_stored(
                    self.store.settle_and_claim, ending, following.number,
                    following.runtime.spec.name)
            except Exception as error:  # pylint: disable=broad-exception-caught # of one of the two
                if not isinstance(error, DamagedRow):
                    log.exception("%s: job %d, or job %d behind it", following.runtime.spec.name,
                                  attempt.number, following.number)
                ending = self._settle(attempt, ending)
                following.task = self._claim(following)
            following.began = self.clock.monotonic()
        finally:
            if following.task is None:      # it was cancelled meanwhile
                self._cancelled.discard(following.number)
                self._finish(following)
        return ending

    def _take(self, runtime: _Runtime, slot: Slot) -> Optional[_Attempt]:
        """Return an attempt at the job to run next on this slot, already entered as running; None
        if there is nothing or it may not run."""
        with self.lock:             # whoever takes from a queue holds it
            if self.draining.is_set() or self._loading or runtime.paused is not None:
                return None
            if runtime.set_aside:
                if runtime.aside_until > self.clock.monotonic() or runtime.running:
                    return None     # set aside, or one job is trying it out already
            number = self._queue.take(runtime.spec.name)
            if number is None:
                return None
            if runtime.set_aside and runtime.failed_by and runtime.failed_by.id == number:
                number = self._instead_of(runtime.failed_by, runtime)
            attempt = _Attempt(runtime, number, slot)
            runtime.running[number] = attempt
            return attempt

    def _instead_of(self, job: Queued, runtime: _Runtime) -> int:
        """Return another job to try a runtime out with than the one that it did not start with; the
        same if there is no other."""
        other = self._queue.take(runtime.spec.name)
        if other is None:
            return job.id
        self._queue.put(job)
        return other

    def _finish(self, attempt: _Attempt) -> None:
        """Enter an attempt as over, and tell those who wait."""
        with self.lock:         # first: what they read when they are told shows it as over
            del attempt.runtime.running[attempt.number]
        try:
            if attempt.ending is not None:
                self._announce(attempt.runtime, [attempt.ending])
        finally:
            attempt.over.set()
            if self.draining.is_set() and not self.busy():
                self._idle.set()

    def _outcome(self, attempt: _Attempt) -> Outcome:
        """Run a job on its slot."""
        assert attempt.task is not None, "it is claimed"
        if attempt.must_end():
            return NEVER_RUN
        try:
            return attempt.slot.run(attempt.task, attempt.must_end)
        except Exception:           # pylint: disable=broad-exception-caught # the job has to end
            self._log_defect(attempt)
            return DEFECT

    def _decide(self, attempt: _Attempt, outcome: Outcome) -> Ending:
        """Return what becomes of a job after this outcome; if it was interrupted, it was cancelled
        or the server stops. Exactly one of an answer and a cancel wins."""
        runtime = attempt.runtime
        task = attempt.task
        assert task is not None, "it is claimed"
        with self.lock:
            survivors = attempt.slot.survivors
            if survivors:           # the device may still be driven by what nobody can end
                failure = Outcome(jobs.NOT_EXECUTABLE, survivors, started=False)
                self._note_start(runtime, failure, failures=SET_ASIDE_AFTER)
            if outcome.interrupted:
                if attempt.cancelled:
                    return Ending(task, "failed", _as_cancelled(outcome))
                failed = outcome.started and runtime.spec.interrupted == "fail"
                outcome = outcome._replace(
                    return_code=INTERRUPTED.return_code, runtime_error=INTERRUPTED.runtime_error)
                return Ending(task, "failed" if failed else "release", outcome)
            if not survivors:
                self._note_start(runtime, outcome, _queued(task))
            event = jobs.decide(outcome, task.attempt, runtime.policy)
            if not outcome.started:     # the job never ran: that is no attempt of it
                event = "release"
                # It is kept for its log, unless it is one more of many.
                outcome = outcome._replace(started=not runtime.set_aside)
            if attempt.cancelled and event in ("release", "retry"):
                return Ending(task, "failed", _as_cancelled(outcome))
            return Ending(task, event, outcome, self.policy.delay(task.attempt, self.dice()))

    def _reason_to_pause(self, runtime: _Runtime, ending: Ending) -> Optional[str]:
        """Count jobs that fail in a row; return why the runtime must be paused, or None."""
        outcome = ending.outcome
        with self.lock:
            if ending.event == "succeeded":
                runtime.failed_jobs = 0
            elif ending.event == "failed" and not outcome.interrupted:
                runtime.failed_jobs += 1
            if runtime.paused is not None:
                return None
            if outcome.pause:
                return outcome.pause
            if 0 < runtime.spec.pause_after <= runtime.failed_jobs:
                return (f"{runtime.failed_jobs} jobs failed in a row, the last, job "
                        f"{ending.task.id}, with {outcome.return_code}: {outcome.runtime_error}")
        return None

    def _note_start(self, runtime: _Runtime, outcome: Outcome, job: Optional[Queued] = None,
                    failures: int = 1) -> None:
        """Set a runtime aside that fails to start again and again, and take it back when it starts;
        say so once. `job`: that it was started for. `failures`: for how many a failure counts."""
        was_set_aside = runtime.set_aside
        if outcome.started:
            runtime.failed_starts = 0
            runtime.start_error = None
        else:
            runtime.failed_starts += failures
            runtime.failed_by = job
        if runtime.set_aside:
            runtime.start_error = outcome.runtime_error
            doublings = min(30, runtime.failed_starts - SET_ASIDE_AFTER)
            pause = min(MOST_PAUSE, FIRST_PAUSE * 2 ** doublings)
            runtime.aside_until = self.clock.monotonic() + pause
            self._set_alarm(runtime.aside_until, runtime)
        if runtime.set_aside == was_set_aside:
            return
        runtime.since = self.clock.now()
        if runtime.set_aside:
            log.error("runtime %s is set aside: it failed to start %d times in a row (%s); its "
                      "jobs wait, and it is tried again", runtime.spec.name, runtime.failed_starts,
                      outcome.runtime_error)
        else:
            log.warning("runtime %s starts again", runtime.spec.name)
            runtime.ring()

    def _announce(self, runtime: _Runtime, endings: Sequence[Ending]) -> None:
        """Count attempts that ended and tell those who wait, and set the alarm for what is tried
        again; after it is on disk."""
        ended = []
        for ending in endings:
            task = ending.task
            outcome = ending.outcome
            if ending.event in ("retry", "release"):
                with self.lock:
                    self._set_alarm(self.clock.monotonic() + ending.delay, _queued(task))
                if not outcome.interrupted:
                    log.info("job %d, attempt %d on %s: return code %d, %s; tried again in %.1f s",
                             task.id, task.attempt, runtime.spec.name, outcome.return_code,
                             outcome.runtime_error, ending.delay)
                continue
            ended.append(task.id)
            self._count(runtime, ending)
            if ending.event == "failed":
                log.info("job %d failed on %s after %d attempts: return code %d, %s", task.id,
                         runtime.spec.name, task.attempt, outcome.return_code,
                         outcome.runtime_error)
        if ended:
            self._recent.count(runtime.spec.name, len(ended))
        self.waiting.notify(ended)

    def _count(self, runtime: _Runtime, ending: Ending) -> None:
        """Count a job that ended. The lock is taken for each: there may be 10,000, and the listener
        wants it, too."""
        with self.lock:
            runtime.jobs_ended += 1
            if ending.event == "failed":
                runtime.jobs_failed += 1
                runtime.last_error = (f"job {ending.task.id}, return code "
                                      f"{ending.outcome.return_code}: "
                                      f"{ending.outcome.runtime_error}")
            counts = self._durations.setdefault(
                (ending.task.mode, ending.event), [0.0] * (len(jobs.BUCKETS) + 2))
            counts[bisect.bisect_left(jobs.BUCKETS, ending.seconds)] += 1
            counts[-1] += ending.seconds

    def _until_stored(self, write: Callable[..., Any], *arguments: Any) -> Any:
        """Do a write that must not be lost, or a read without which nothing runs; while the store
        cannot do it, again. Raise _Stopping if the server stops first."""
        said = False
        while True:
            try:
                return write(*arguments)
            except DamagedRow:      # it stays so
                raise
            except StoreError as error:
                if not said:
                    log.error("waiting for the database: %s", error)
                said = True
                if self.clock.wait(self._stopped, STORE_AGAIN):
                    raise _Stopping from None

    # What people ask for

    def cancel(self, number: int) -> Job:
        """End a job: one that waits at once, one that runs when its process group has ended.
        Return the ended job; raise Ended if it had ended (or did so by itself meanwhile),
        UnknownJob, and StoreError if its end cannot be stored now: then it comes later."""
        stopping = False
        while True:
            attempt = self.interrupt(number)
            if attempt is not None:
                if self._ended_by_cancel(attempt):
                    return self.store.get(number)
            elif queued := self.store.cancel(number):
                self._forget([queued])
                return self.store.get(number)
            job = self.store.get(number)
            if job.end_time is not None:
                raise Ended(job)
            # It was claimed after the look into memory, or an attempt was over when it was asked:
            # so once more, also at a stop, which gives attempts back.
            if stopping:
                raise StoreError("the server is stopping")
            stopping = self.clock.wait(self._stopped, CANCEL_AGAIN)

    def cancel_all(self, numbers: Sequence[int]) -> int:
        """End these jobs, first those that wait, so that none of them starts meanwhile; return how
        many had not ended by themselves. Raise StoreError."""
        cancelled = 0
        others: List[int] = []
        for start in range(0, len(numbers), CANCELLED_AT_ONCE):
            group = numbers[start:start + CANCELLED_AT_ONCE]
            ended = self.store.cancel_together(group)
            self._forget(ended)
            ids = [queued.id for queued in ended]
            cancelled += len(ids)
            others += sorted(set(group).difference(ids), reverse=True)
        # All are asked before one is waited for: each may take its grace.
        attempts = [(number, self.interrupt(number)) for number in others]
        for number, attempt in attempts:
            if attempt is not None and self._ended_by_cancel(attempt):
                cancelled += 1
                continue
            with contextlib.suppress(DamagedRow, Ended, jobs.UnknownJob):
                self.cancel(number)
                cancelled += 1
        return cancelled

    def _forget(self, cancelled: Sequence[Queued]) -> None:
        """Take jobs that were cancelled while they waited out of the queue; tell of it."""
        for start in range(0, len(cancelled), REMOVED_AT_ONCE):
            group = cancelled[start:start + REMOVED_AT_ONCE]
            ids = {queued.id for queued in group}
            missing = ids - self._queue.remove(group)
            with self.lock:
                self._cancelled |= missing          # on their way there, or taken
        self._recent.count(None, len(cancelled))
        self.waiting.notify([queued.id for queued in cancelled])

    def _ended_by_cancel(self, attempt: _Attempt) -> bool:
        """Return whether an attempt that was asked to end did so because of that, not by itself;
        when it is over."""
        while not self.clock.wait(attempt.over, STORE_AGAIN):
            self.store.cancel(NO_JOB)   # changes nothing, but raises if it could not
        ending = attempt.ending
        return ending is not None and ending.event == "failed" and ending.outcome.interrupted

    def interrupt(self, number: int) -> Optional[_Attempt]:
        """Return the attempt that runs at a job, asked to end; None if none does."""
        with self.lock:
            for runtime in self.runtimes.values():
                attempt = runtime.running.get(number)
                if attempt is not None:
                    attempt.cancelled = True
                    attempt.slot.wake()
                    return attempt
        return None

    def pause(self, name: str, reason: str, by: str = "oqc") -> Dict[str, Any]:
        """Let what runs on this runtime end and start no other; return its description. `by`: the
        name of a key. Raise KeyError."""
        runtime = self.runtimes[name]
        with self._pausing:
            since = self.store.pause(name, reason, by)
            with self.lock:
                runtime.paused = reason
                runtime.paused_by = by
                runtime.since = since
        self.waiting.notify()
        log.warning("runtime %s is paused: %s", name, reason or "no reason given")
        return self.describe(name)

    def resume(self, name: str) -> Dict[str, Any]:
        """Let a paused runtime run jobs again; return its description. Raise KeyError."""
        runtime = self.runtimes[name]
        with self._pausing:
            self.store.resume(name)
            with self.lock:
                runtime.failed_jobs = 0
                if runtime.paused is not None:
                    runtime.paused = None
                    runtime.paused_by = None
                    runtime.since = self.clock.now()
                    log.warning("runtime %s is resumed", name)
        runtime.ring()
        self.waiting.notify()
        return self.describe(name)

    def describe(self, name: str) -> Dict[str, Any]:
        """Return a runtime as GET /runtimes/ shows it; raise KeyError."""
        with self.lock:
            runtime = self.runtimes[name]
            reason = runtime.start_error if runtime.paused is None else runtime.paused
            return {"name": name, "modes": list(runtime.spec.modes),
                    "protocol": runtime.spec.protocol, "slots": runtime.spec.slots,
                    "state": runtime.state(), "reason": reason,
                    "paused_by": runtime.paused_by, "running": sorted(runtime.running),
                    "ended": runtime.jobs_ended, "failures": runtime.jobs_failed,
                    "failed_in_a_row": runtime.failed_jobs, "last_error": runtime.last_error,
                    "since": runtime.since, "device": json.loads(runtime.device or "null"),
                    "command": runtime.spec.command and list(runtime.spec.command),
                    "ended_per_minute": self._recent.per_minute(name)}

    def log(self, number: int) -> Optional[Log]:
        """Return what was said so far in the attempt that runs at a job; None if none does."""
        with self.lock:
            for runtime in self.runtimes.values():
                attempt = runtime.running.get(number)
                if attempt is not None:
                    return attempt.slot.log(number)
        return None

    def outlook(self, job: Queued, due_time: Optional[str]) -> Tuple[Optional[int], Optional[str]]:
        """Return (how many jobs would be started before one that waits, what it waits for); no
        number before its `due_time`, and until all that waited at the start are loaded."""
        with self.lock:
            its_own = [runtime for runtime in self.runtimes.values()
                       if runtime.may_run(job.mode, job.runtime)]
            obstacles = [runtime.obstacle() for runtime in its_own]
        obstacle = ""
        if None not in obstacles:
            obstacle = "; ".join(filter(None, obstacles))
        if due_time is not None and due_time > self.clock.now():
            return None, ": ".join(filter(None, (f"tried again at {due_time}", obstacle)))
        if job.id in self._cut_off_on:
            return None, "the end of what a crash of the server left of its last attempt"
        if not its_own:
            return None, f"{job.runtime}, which is not configured for this mode"
        ahead = None
        if not self._loading:
            ahead = min(self._queue.ahead(job, runtime.spec.name) for runtime in its_own)
        if obstacle:
            return ahead, obstacle
        if ahead is None:
            return None, "those that waited at the start to be loaded"
        if ahead == 1:
            return ahead, "1 job is before it"
        if ahead:
            return ahead, f"{ahead} jobs are before it"
        return ahead, "a free slot"

    def ended(self) -> Dict[str, int]:
        """Return how many jobs have ended of late, as GET /status/ says it."""
        return {"ended_last_minute": self._recent.total(SECOND),
                "ended_last_hour": self._recent.total(MINUTE)}

    def uptime(self) -> float:
        """Return the seconds since the server began."""
        return round(float(self.clock.monotonic() - self._began), 3)

    def durations(self) -> Dict[Tuple[str, str], List[float]]:
        """Return {(mode, event): [last attempts in each of jobs.BUCKETS, those that took longer,
        sum of seconds]}."""
        with self.lock:
            return {key: list(values) for key, values in self._durations.items()}

    def jobs(self) -> Dict[Tuple[str, str, str], int]:
        """Return {(runtime, mode, state): how many jobs} of those that run, and of those that are
        due and wait for it alone; for any runtime with an empty name."""
        counts = Counter({("", mode, "waiting"): 0 for mode in jobs.MODES})
        for name, runtime in self.runtimes.items():
            for mode in runtime.spec.modes:
                counts[name, mode, "waiting"] = counts[name, mode, "running"] = 0
        for (mode, asked), count in self._queue.waiting().items():
            counts[asked or "", mode, "waiting"] += count
        with self.lock:
            for name, runtime in self.runtimes.items():
                for attempt in runtime.running.values():
                    if attempt.task:
                        counts[name, attempt.task.mode, "running"] += 1
        return counts

    def states(self) -> Counter:
        """Return how many runtimes of each mode are in each state: {(mode, state): n}."""
        with self.lock:
            return Counter((mode, runtime.state()) for runtime in self.runtimes.values()
                           for mode in runtime.spec.modes)
