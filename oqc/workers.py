"""Who runs what, when: a queue of ids for each mode, a worker thread for each slot, retries,
cancelling, pausing.

The database is the truth; what is here holds ids, is rebuilt from it at start, and is changed after
it.
"""
import bisect
import contextlib
import heapq
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
INTERRUPTED = Outcome(jobs.KILLED, "interrupted, outcome unknown", interrupted=True)
NEVER_RUN = Outcome(jobs.CANCELLED, started=False, interrupted=True)
STORE_AGAIN = 1.0                   # seconds until a write that failed is tried again
CANCELLED_AT_ONCE = 1000            # jobs that wait, in one transaction: others write between two
CANCEL_AGAIN = 0.01                 # seconds between two tries to cancel a job that changes hands


def _as_cancelled(outcome: Outcome) -> Outcome:
    """Return the outcome of a job that was cancelled, with what its runtime had said by then."""
    return outcome._replace(
        return_code=jobs.CANCELLED, runtime_error="cancelled", interrupted=True)


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

    def cancel(self, number: int) -> bool:
        """End a job that waits as cancelled; return False if it does not wait."""

    def cancel_together(self, numbers: Sequence[int]) -> List[int]:
        """End those of these jobs that wait as cancelled; return them."""

    def pause(self, runtime: str, reason: str, by: str = "oqc") -> str:
        """Remember that a runtime is paused, why and by whose key; return since when."""

    def resume(self, runtime: str) -> None:
        """Forget that a runtime is paused."""

    def pauses(self) -> Dict[str, Tuple[str, str, Optional[str]]]:
        """Return {runtime: (reason, since, by whose key)} of the paused ones."""

    def running(self) -> Iterator[List[Tuple[int, int, str, str]]]:
        """Yield pages of (id, attempt, mode, runtime) of the jobs that a crash cut off."""

    def waiting(self) -> Iterator[List[Tuple[int, str, Optional[float]]]]:
        """Yield pages of (id, mode, due) of the jobs that wait."""


class Slot(Protocol):
    """Room for one attempt at a time on a runtime."""

    def run(self, task: Task, interrupted: Callable[[], bool]) -> Outcome:
        """Run one attempt to its end, or until `interrupted()`; then the outcome says so."""

    def log(self) -> Log:
        """Return what the attempt that runs has written on standard error. For any thread."""

    def wake(self) -> None:
        """Have a running attempt ask `interrupted()` again. For any thread."""

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


class _Runtime:
    """A runtime and its state. Changed under Workers.lock."""

    def __init__(self, spec: RuntimeSpec, make_slot: Callable[[], Slot], since: str) -> None:
        self.spec = spec
        self.make_slot = make_slot
        self.since = since              # UTC time of the last change of state
        self.bell: "queue.Queue[None]" = queue.Queue(maxsize=spec.slots)    # its workers wait on it
        self.paused: Optional[str] = None       # the reason
        self.paused_by: Optional[str] = None    # the name of a key, while it is paused
        self.failed_starts = 0          # in a row
        self.aside_until = 0.0          # monotonic seconds
        self.start_error: Optional[str] = None      # the last one, once it is set aside
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

    def obstacle(self) -> Optional[str]:
        """Return why it starts no job, or None."""
        if self.paused is not None:
            return f"{self.spec.name} is paused: {self.paused or 'no reason given'}"
        if self.set_aside:
            return f"{self.spec.name} cannot be started: {self.start_error}"
        return None

    def ring(self, times: int = 0) -> None:
        """Have so many workers that wait look at the queues, or all. If the bell is full, each has
        a ring before it already."""
        with contextlib.suppress(queue.Full):
            for _ in range(times or self.spec.slots):
                self.bell.put_nowait(None)


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
        self.runtimes = {spec.name: _Runtime(spec, make, clock.now()) for spec, make in runtimes}
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
        for name, (reason, since, by) in self.store.pauses().items():
            if name in self.runtimes:
                self.runtimes[name].paused = reason
                self.runtimes[name].paused_by = by
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
                self._threads.append(threading.Thread(
                    target=self._work, name=f"{name}-{number}",
                    args=(runtime, runtime.make_slot()), daemon=True))
        for thread in self._threads:
            thread.start()

    def _cut_off(self, number: int, attempt: int, mode: str, name: str) -> Ending:
        """Return the end of an attempt that ran when the server was killed."""
        runtime = self.runtimes.get(name)
        again = runtime is None or runtime.spec.interrupted == "retry"
        outcome = INTERRUPTED._replace(transient=again)
        event = jobs.decide(outcome, attempt, self.policy)
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

    def _work(self, runtime: _Runtime, slot: Slot) -> None:
        """A worker thread: take the oldest job that is due, run it, settle it."""
        while not self.draining.is_set():
            number = self._take(runtime, slot)
            if not number:
                runtime.bell.get()
                continue
            attempt = runtime.running[number]
            try:
                try:
                    self._run(runtime, attempt, number)
                finally:
                    self._finish(runtime, attempt, number)
            except _Stopping:       # the next start decides on the job
                pass
            except Exception:       # pylint: disable=broad-exception-caught # the thread goes on
                log.exception("worker of %s: job %d", runtime.spec.name, number)
        slot.close()

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
            runtime.running[number] = _Attempt(slot)
            return number

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
                    return Ending(task, "failed", _as_cancelled(outcome))
                failed = has_run and runtime.spec.interrupted == "fail"
                outcome = outcome._replace(
                    return_code=INTERRUPTED.return_code, runtime_error=INTERRUPTED.runtime_error)
                return Ending(task, "failed" if failed else "release", outcome)
            self._note_start(runtime, outcome)
            event = jobs.decide(outcome, task.attempt, self.policy)
            if not outcome.started and runtime.set_aside:
                event = "release"       # the runtime's fault: it costs the job no attempt
            if attempt.cancelled and event in ("release", "retry"):
                return Ending(task, "failed", _as_cancelled(outcome))
            return Ending(task, event, outcome, self.policy.delay(task.attempt, self.dice()))

    def _note_start(self, runtime: _Runtime, outcome: Outcome) -> None:
        """Set a runtime aside that fails to start again and again, and take it back when it starts;
        say so once."""
        was_set_aside = runtime.set_aside
        if outcome.started:
            runtime.failed_starts = 0
            runtime.start_error = None
        else:
            runtime.failed_starts += 1
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
                if self._ended_by_cancel(attempt, number):
                    return self.store.get(number)
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

    def cancel_all(self, numbers: Sequence[int]) -> int:
        """End these jobs, first those that wait, so that none of them starts meanwhile; return how
        many had not ended by themselves. Raise StoreError."""
        cancelled = 0
        others: List[int] = []
        for start in range(0, len(numbers), CANCELLED_AT_ONCE):
            group = numbers[start:start + CANCELLED_AT_ONCE]
            ended = self.store.cancel_together(group)
            with self.lock:
                self._cancelled_in_queue += len(ended)
            self.waiting.notify(ended)
            cancelled += len(ended)
            others += sorted(set(group).difference(ended), reverse=True)
        # All are asked before one is waited for: each may take its grace.
        attempts = [(number, self._interrupt(number)) for number in others]
        for number, attempt in attempts:
            if attempt is not None and self._ended_by_cancel(attempt, number):
                cancelled += 1
                continue
            with contextlib.suppress(Ended, jobs.UnknownJob):
                self.cancel(number)
                cancelled += 1
        return cancelled

    def _ended_by_cancel(self, attempt: _Attempt, number: int) -> bool:
        """Return whether an attempt that was asked to end did so because of that; when it is
        over."""
        while not self.clock.wait(attempt.over, STORE_AGAIN):
            self.store.cancel(number)   # changes nothing, but raises if it could not
        ending = attempt.ending
        return ending is not None and ending.event == "failed" and ending.outcome.interrupted

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
                    "since": runtime.since}

    def log(self, number: int) -> Optional[Log]:
        """Return what was said so far in the attempt that runs at a job; None if none does."""
        with self.lock:
            for runtime in self.runtimes.values():
                attempt = runtime.running.get(number)
                if attempt is not None:
                    return attempt.slot.log()
        return None

    def outlook(self, job: Job, due_time: Optional[str]) -> Tuple[Optional[int], Optional[str]]:
        """Return (how many jobs would be started before one that waits, what it waits for); no
        number before its `due_time`."""
        if due_time is not None:
            return None, f"tried again at {due_time}"
        with self.lock:
            its_own = [runtime for runtime in self.runtimes.values()
                       if job.mode in runtime.spec.modes]
            obstacles = [runtime.obstacle() for runtime in its_own]
        modes = {mode for runtime in its_own for mode in runtime.spec.modes}
        ahead = sum(number < job.id for mode in modes for number in list(self._queues[mode].queue))
        if None not in obstacles:
            return ahead, "; ".join(filter(None, obstacles))
        if ahead == 1:
            return ahead, "1 job is before it"
        if ahead:
            return ahead, f"{ahead} jobs are before it"
        return ahead, "a free slot"

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
