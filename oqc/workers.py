"""Who runs what, when: a queue of ids for each mode, a worker thread for each slot, retries,
cancelling, pausing.

The database is the truth; what is here holds ids, is rebuilt from it at start, and is changed after
it.
"""
import bisect
import contextlib
import heapq
import json
import logging
import queue
import threading
from collections import Counter
from typing import (
    Any, Callable, Dict, Iterator, List, Optional, Protocol, Sequence, Tuple)

from oqc import jobs
from oqc.jobs import (
    Addition, Ended, Ending, Job, Log, Outcome, RetryPolicy, RuntimeSpec, StoreError, Submission,
    Task)
from oqc.waiting import Waiting

log = logging.getLogger("oqc")

SET_ASIDE_AFTER = 3                 # failures to start, in a row
FIRST_PAUSE = 1.0                   # seconds that a failing runtime is left alone, doubling
MOST_PAUSE = 60.0
CANCELLED = Outcome(jobs.CANCELLED, "cancelled", interrupted=True)
INTERRUPTED = Outcome(jobs.KILLED, "interrupted, outcome unknown")
NEVER_RUN = Outcome(jobs.CANCELLED, interrupted=True)
STORE_AGAIN = 1.0                   # seconds until a write that failed is tried again
CANCEL_AGAIN = 0.01                 # seconds between two tries to cancel a job that changes hands


class _Stopping(Exception):
    """The server stops before something could be stored."""


class Store(Protocol):
    """What the workers ask of the store; a write is on disk when it returns."""

    def get(self, number: int) -> Job:
        """Return a job; raise UnknownJob."""

    def claim(self, number: int, runtime: str) -> Optional[Task]:
        """Start an attempt at a job; return None if it does not wait any more."""

    def settle(self, endings: Sequence[Ending]) -> None:
        """End these attempts."""

    def keep_log(self, number: int, attempt: int, said: Log) -> None:
        """Replace the log of a job's last attempt that has this number and is over."""

    def cancel(self, number: int) -> bool:
        """End a job that waits as cancelled; return False if it does not wait."""

    def pause(self, runtime: str, reason: str) -> str:
        """Remember that a runtime is paused; return since when."""

    def resume(self, runtime: str) -> None:
        """Forget that a runtime is paused."""

    def pauses(self) -> Dict[str, Tuple[str, str]]:
        """Return {runtime: (reason, since)} of the paused ones."""

    def running(self) -> Iterator[List[Tuple[int, int, str, str]]]:
        """Yield pages of (id, attempt, mode, runtime) of the jobs that a crash cut off."""

    def waiting(self) -> Iterator[List[Tuple[int, str, Optional[float]]]]:
        """Yield pages of (id, mode, due) of the jobs that wait."""


class Slot(Protocol):
    """Room for one attempt at a time on a runtime."""

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        """Run one attempt to its end, or until `interrupted()`; then the outcome says so."""

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

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
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
        self.failed_starts = 0          # in a row
        self.aside_until = 0.0          # monotonic seconds
        self.start_error: Optional[str] = None      # the last one, once it is set aside
        self.failed_by = 0              # the job that it failed to start with last
        self.failed_jobs = 0            # in a row
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


class Workers:                      # pylint: disable=too-many-instance-attributes # each says why
    """The worker threads of all runtimes, and what concerns jobs that wait or run."""

    def __init__(self, store: Store, runtimes: Sequence[Tuple[RuntimeSpec, Callable[[], Slot]]],
                 policy: RetryPolicy, clock: Clock, dice: Callable[[], float],
                 waiting: Waiting) -> None:
        """`runtimes`: each with what makes a slot of it. `dice` gives numbers from 0 to 1, for the
        delays. `waiting` is told of every change, after it is on disk."""
        self.store = store
        self.policy = policy
        self.clock = clock
        self.dice = dice
        self.waiting = waiting
        self.runtimes = {spec.name: _Runtime(spec, make, clock.now(), policy)
                         for spec, make in runtimes}
        self._echo = self.runtimes.get("echo")
        self._queues: Dict[str, "queue.PriorityQueue[int]"] = {
            mode: queue.PriorityQueue() for mode in jobs.MODES}
        self._began = clock.monotonic()
        self.draining = threading.Event()       # no more jobs are started
        self._stopped = threading.Event()
        self._idle = threading.Event()          # set by a worker that leaves no job running
        self._threads: List[threading.Thread] = []
        self._pausing = threading.Lock()        # held while a pause comes or goes, on disk and here
        self.lock = threading.Lock()            # over every _Runtime and _Attempt, and what follows
        # A heap of (monotonic seconds, mode, id): then the job is queued; with the id 0 the mode's
        # workers look again.
        self._alarms: List[Tuple[float, str, int]] = []
        self._alarm_set = threading.Event()
        self._durations: Dict[Tuple[str, str], List[float]] = {}
        self._cancelled_in_queue = 0            # cancelled jobs that are on a queue, or will be

    # Life

    def start(self) -> None:
        """Take up what the database says: decide on what a crash cut off, queue what waits, start
        the threads."""
        for name, (reason, since) in self.store.pauses().items():
            if name in self.runtimes:
                self.runtimes[name].paused = reason
                self.runtimes[name].since = since
        for page in self.store.running():
            self.store.settle([self._cut_off(*row) for row in page])
        for page in self.store.waiting():
            for number, mode, due in page:
                delay = 0.0
                if due is not None:
                    # A wall clock that jumped must hold no job back for longer than a delay can.
                    delay = min(due - self.clock.unix(), self.policy.most)
                self._enqueue_in(delay, mode, number)
        self._threads.append(
            threading.Thread(target=self._ring_alarms, name="alarms", daemon=True))
        for name, runtime in self.runtimes.items():
            for number in range(runtime.spec.slots):
                worker = _Worker(runtime.make_slot())
                runtime.workers.append(worker)
                self._threads.append(threading.Thread(
                    target=self._work, name=f"{name}-{number}", args=(runtime, worker),
                    daemon=True))
        for thread in self._threads:
            thread.start()

    def _cut_off(self, number: int, attempt: int, mode: str, name: str) -> Ending:
        """Return the end of an attempt that ran when the server was killed."""
        runtime = self.runtimes.get(name)
        again = runtime is None or runtime.spec.interrupted == "retry"
        outcome = INTERRUPTED._replace(transient=again)
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
        if not self._queues["echo"].empty():
            return None
        outcome = jobs.echo(submission.return_code, echo.spec.retry_codes)
        return None if outcome.transient else outcome

    def take_up(self, additions: Sequence[Addition]) -> None:
        """Have new jobs run, once the store has them; count and announce those that ended."""
        endings = []
        numbers: Dict[str, List[int]] = {}
        for addition in additions:
            if addition.replayed:
                continue
            endings += addition.endings
            ended = {ending.task.id for ending in addition.endings}
            for job in addition.jobs:
                if job.id not in ended:
                    numbers.setdefault(job.mode, []).append(job.id)
        if endings and self._echo:
            self._announce(self._echo, endings)
        for mode, numbers_of_mode in numbers.items():
            self.enqueue(mode, numbers_of_mode)

    def enqueue(self, mode: str, numbers: Sequence[int]) -> None:
        """Have these jobs run, oldest first, once the store has them."""
        for number in numbers:
            self._queues[mode].put(number)
        self._ring(mode, len(numbers))
        self.waiting.notify()

    def queued(self) -> int:
        """Return how many jobs wait to be run now."""
        queued = sum(one.qsize() for one in self._queues.values())
        return max(0, queued - self._cancelled_in_queue)

    def _enqueue_in(self, delay: float, mode: str, number: int) -> None:
        """Have a job run after `delay` seconds; it holds no thread and no runtime until then."""
        if delay <= 0:
            self.enqueue(mode, [number])
            return
        with self.lock:
            self._set_alarm(self.clock.monotonic() + delay, mode, number)

    def _set_alarm(self, at: float, mode: str, number: int = 0) -> None:
        heapq.heappush(self._alarms, (at, mode, number))
        self._alarm_set.set()

    def _ring_alarms(self) -> None:
        """The alarm thread: put on its queue what has become due."""
        while not self._stopped.is_set():
            self._alarm_set.clear()
            due = []
            pause = None
            with self.lock:
                now = self.clock.monotonic()
                while self._alarms and self._alarms[0][0] <= now:
                    due.append(heapq.heappop(self._alarms))
                if self._alarms:
                    pause = self._alarms[0][0] - now
            for _, mode, number in due:
                if number:
                    self.enqueue(mode, [number])
                else:
                    self._ring(mode)
            self.clock.wait(self._alarm_set, pause)

    def _ring(self, mode: str, times: int = 0) -> None:
        for runtime in self.runtimes.values():
            if mode in runtime.spec.modes:
                runtime.ring(times)

    # Work

    def _work(self, runtime: _Runtime, worker: _Worker) -> None:
        """A worker thread: take the oldest job that is due, run it, settle it; rest if there is
        none."""
        slot = worker.slot
        while not self.draining.is_set():
            number = self._take(runtime, slot)
            try:
                if number is None:
                    number = self._rest(runtime, worker)
                if number is not None:
                    try:
                        self._run(runtime, runtime.running[number], number)
                    finally:
                        self._finish(runtime, runtime.running[number], number)
                self._keep_late_logs(slot)
            except _Stopping:       # the next start decides on the job
                pass
            except Exception:       # pylint: disable=broad-exception-caught # the thread goes on
                log.exception("worker of %s: job %d", runtime.spec.name, number or 0)
                if number is None:  # or it would do nothing else any more
                    self.clock.wait(self._stopped, STORE_AGAIN)
        slot.close()
        with contextlib.suppress(_Stopping):
            self._keep_late_logs(slot)

    def _rest(self, runtime: _Runtime, worker: _Worker) -> Optional[int]:
        """Rest until somebody rings, or there is something to be stored; return the id of a job
        that came meanwhile and is entered as running, if there is one."""
        runtime.lie_down(worker)
        outcome = None
        try:
            number = self._take(runtime, worker.slot)
            if number is None:
                outcome = worker.slot.rest(
                    lambda: worker.is_rung or self.draining.is_set(),
                    self._may_start(runtime, worker))
        finally:
            was_rung = runtime.rise(worker)
        if number is not None and was_rung:
            runtime.ring(1)         # for another job, perhaps
        if outcome is not None:
            with self.lock:
                if runtime.set_aside or not outcome.started:
                    self._note_start(runtime, outcome)
        return number

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
            self._write_until_stored(self.store.keep_log, number, attempt, said)

    def _take(self, runtime: _Runtime, slot: Slot) -> Optional[int]:
        """Return the id to run next on this slot, already entered as running; None if there is
        nothing or it may not run."""
        with self.lock:             # whoever takes from a queue holds it
            if self.draining.is_set() or runtime.paused is not None:
                return None
            if runtime.set_aside:
                if runtime.aside_until > self.clock.monotonic() or runtime.running:
                    return None     # set aside, or one job is trying it out already
            queues = [self._queues[mode] for mode in runtime.spec.modes
                      if not self._queues[mode].empty()]
            if not queues:
                return None
            oldest = min(queues, key=lambda one: one.queue[0])
            number = oldest.get_nowait()
            if runtime.set_aside and number == runtime.failed_by:
                number = self._instead_of(number, oldest, queues)
            runtime.running[number] = _Attempt(slot)
            return number

    @staticmethod
    def _instead_of(number: int, its_queue: "queue.PriorityQueue[int]",
                    queues: "Sequence[queue.PriorityQueue[int]]") -> int:
        """Return another job to try a runtime out with than the one that it did not start with; the
        same if there is no other."""
        others = [one for one in queues if not one.empty()]
        if not others:
            return number
        other = min(others, key=lambda one: one.queue[0]).get_nowait()
        its_queue.put(number)
        return other

    def _run(self, runtime: _Runtime, attempt: _Attempt, number: int) -> None:
        """Claim a job, make an attempt at it and store how it ended."""
        task = self._write_until_stored(self.store.claim, number, runtime.spec.name)
        if not task:                # it was cancelled meanwhile
            with self.lock:
                self._cancelled_in_queue -= 1
            return
        self.waiting.notify()
        began = self.clock.monotonic()
        outcome = NEVER_RUN
        has_run = not attempt.must_end()
        if has_run:
            outcome = self._outcome(runtime, attempt, task)
        ending = self._decide(runtime, task, attempt, outcome, has_run)
        ending = ending._replace(seconds=self.clock.monotonic() - began)
        reason = self._reason_to_pause(runtime, ending)
        if reason:                  # first, so that who is told of the end can read it
            self._write_until_stored(self.pause, runtime.spec.name, reason)
        self._write_until_stored(self.store.settle, [ending])
        attempt.ending = ending

    def _finish(self, runtime: _Runtime, attempt: _Attempt, number: int) -> None:
        """Enter an attempt as over, and tell those who wait."""
        with self.lock:         # first: what they read when they are told shows it as over
            del runtime.running[number]
        try:
            if attempt.ending is not None:
                self._announce(runtime, [attempt.ending])
        finally:
            attempt.over.set()
            if self.draining.is_set() and not self.busy():
                self._idle.set()

    def _outcome(self, runtime: _Runtime, attempt: _Attempt, task: Task) -> Outcome:
        """Run a job on its slot."""
        try:
            return attempt.slot.run(task, attempt.must_end)
        except Exception:           # pylint: disable=broad-exception-caught # the job has to end
            log.exception("%s: job %d", runtime.spec.name, task.id)
            return Outcome(jobs.SOFTWARE, "internal error; the server's log has it")

    def _decide(self, runtime: _Runtime, task: Task, attempt: _Attempt,
                outcome: Outcome, has_run: bool) -> Ending:
        """Return what becomes of a job after this outcome; if it was interrupted, it was cancelled
        or the server stops. Exactly one of an answer and a cancel wins."""
        with self.lock:
            if outcome.interrupted:
                if attempt.cancelled:
                    return Ending(task, "failed", CANCELLED)
                failed = has_run and runtime.spec.interrupted == "fail"
                return Ending(task, "failed" if failed else "release", INTERRUPTED)
            self._note_start(runtime, outcome, task.id)
            event = jobs.decide(outcome, task.attempt, runtime.policy)
            if not outcome.started and runtime.set_aside:
                event = "release"       # the runtime's fault: it costs the job no attempt
            if attempt.cancelled and event in ("release", "retry"):
                return Ending(task, "failed", CANCELLED)
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

    def _note_start(self, runtime: _Runtime, outcome: Outcome, number: int = 0) -> None:
        """Set a runtime aside that fails to start again and again, and take it back when it starts;
        say so once. `number`: of the job that it was started for."""
        was_set_aside = runtime.set_aside
        if outcome.started:
            runtime.failed_starts = 0
            runtime.start_error = None
        else:
            runtime.failed_starts += 1
            runtime.failed_by = number
        if runtime.set_aside:
            runtime.start_error = outcome.runtime_error
            doublings = min(30, runtime.failed_starts - SET_ASIDE_AFTER)
            pause = min(MOST_PAUSE, FIRST_PAUSE * 2 ** doublings)
            runtime.aside_until = self.clock.monotonic() + pause
            for mode in runtime.spec.modes:
                self._set_alarm(runtime.aside_until, mode)
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
                self._enqueue_in(ending.delay, task.mode, task.id)
                if ending.event == "retry":
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
        self.waiting.notify(ended)

    def _count(self, runtime: _Runtime, ending: Ending) -> None:
        """Count a job that ended. The lock is taken for each: there may be 10,000, and the listener
        wants it, too."""
        with self.lock:
            runtime.jobs_ended += 1
            if ending.event == "failed":
                runtime.jobs_failed += 1
            counts = self._durations.setdefault(
                (ending.task.mode, ending.event), [0.0] * (len(jobs.BUCKETS) + 2))
            counts[bisect.bisect_left(jobs.BUCKETS, ending.seconds)] += 1
            counts[-1] += ending.seconds

    def _write_until_stored(self, write: Callable[..., Any], *arguments: Any) -> Any:
        """Do a write that must not be lost; while the store cannot take it, again. Raise _Stopping
        if the server stops first."""
        said = False
        while True:
            try:
                return write(*arguments)
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
        while True:
            attempt = self._interrupt(number)
            if attempt is not None:
                while not self.clock.wait(attempt.over, STORE_AGAIN):
                    self.store.cancel(number)   # changes nothing, but raises if it could not
                if attempt.ending is not None and attempt.ending.outcome is CANCELLED:
                    return self.store.get(number)       # ended by this, not by itself
            elif self.store.cancel(number):
                with self.lock:
                    self._cancelled_in_queue += 1
                self.waiting.notify([number])
                return self.store.get(number)
            job = self.store.get(number)
            if job.end_time is not None:
                raise Ended(job)
            # It was claimed after the look into memory, or an attempt was over when it was asked.
            if self.clock.wait(self._stopped, CANCEL_AGAIN):
                raise StoreError("the server is stopping")

    def _interrupt(self, number: int) -> Optional[_Attempt]:
        """Return the attempt that runs at a job, asked to end; None if none does."""
        with self.lock:
            for runtime in self.runtimes.values():
                attempt = runtime.running.get(number)
                if attempt is not None:
                    attempt.cancelled = True
                    attempt.slot.wake()
                    return attempt
        return None

    def pause(self, name: str, reason: str) -> Dict[str, Any]:
        """Let what runs on this runtime end and start no other; return its description. Raise
        KeyError."""
        runtime = self.runtimes[name]
        with self._pausing:
            since = self.store.pause(name, reason)
            with self.lock:
                runtime.paused = reason
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
                    "running": sorted(runtime.running), "ended": runtime.jobs_ended,
                    "failures": runtime.jobs_failed, "since": runtime.since,
                    "device": json.loads(runtime.device or "null")}

    def uptime(self) -> float:
        """Return the seconds since the server began."""
        return round(float(self.clock.monotonic() - self._began), 3)

    def durations(self) -> Dict[Tuple[str, str], List[float]]:
        """Return {(mode, event): [last attempts in each of jobs.BUCKETS, those that took longer,
        sum of seconds]}."""
        with self.lock:
            return {key: list(values) for key, values in self._durations.items()}

    def states(self) -> Counter:
        """Return how many runtimes of each mode are in each state: {(mode, state): n}."""
        with self.lock:
            return Counter((mode, runtime.state()) for runtime in self.runtimes.values()
                           for mode in runtime.spec.modes)
