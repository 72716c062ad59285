"""Who runs what, when: a queue of ids for each mode, a worker thread for each slot, retries, cancelling, pausing.

The database is the truth; what is here holds ids, is rebuilt from it at start, and is changed after it.
"""
import bisect
import contextlib
import heapq
import logging
import queue
import threading
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from oqc import jobs
from oqc.jobs import Ended, Ending, Job, Outcome, RetryPolicy, RuntimeSpec, StoreError, Task

log = logging.getLogger("oqc")

SET_ASIDE_AFTER = 3                 # failures to start, in a row
FIRST_PAUSE, MOST_PAUSE = 1.0, 60.0     # seconds a failing runtime is left alone, doubling
INTERRUPTED = Outcome(jobs.KILLED, "interrupted, outcome unknown")
STORE_AGAIN = 1.0                   # seconds until a write that the store could not take is tried again


class _Attempt:
    """A job that a worker has in its hands. Its flags are set under Workers.lock."""

    def __init__(self, slot: Any) -> None:
        self.slot, self.cancelled, self.stopped = slot, False, False

    def interrupted(self) -> bool:
        """Whether somebody wants it ended."""
        return self.cancelled or self.stopped


class _Runtime:
    """A runtime and how it fares. Changed under Workers.lock."""

    def __init__(self, spec: RuntimeSpec, make_slot: Callable[[], Any], since: str) -> None:
        self.spec, self.make_slot, self.since = spec, make_slot, since
        self.bell: "queue.Queue[None]" = queue.Queue(maxsize=spec.slots)    # full: its workers will look anyway
        self.paused: Optional[str] = None       # the reason
        self.unstartable, self.aside_until = 0, 0.0     # failures to start, in a row; monotonic seconds
        self.why: Optional[str] = None          # of the last of them, once it is set aside for them
        self.running: Dict[int, _Attempt] = {}
        self.ended = self.failures = 0

    @property
    def failing(self) -> bool:
        """Whether it is set aside."""
        return self.unstartable >= SET_ASIDE_AFTER

    def state(self) -> str:
        """What GET /runtimes/ says of it."""
        return ("paused" if self.paused is not None else "failing" if self.failing else
                "busy" if len(self.running) >= self.spec.slots else "idle")

    def ring(self, times: int = 0) -> None:
        """Have so many workers that wait look at the queues, or all."""
        with contextlib.suppress(queue.Full):
            for _ in range(times or self.spec.slots):
                self.bell.put_nowait(None)


class Workers:                      # pylint: disable=too-many-instance-attributes # each has a line that says why
    """The worker threads of all runtimes, and what concerns jobs that wait or run."""

    def __init__(self, store: Any, runtimes: Sequence[Tuple[RuntimeSpec, Callable[[], Any]]], policy: RetryPolicy,
                 clock: Any, dice: Callable[[], float], most_waits: int = 256) -> None:
        """`runtimes`: each with what makes a runtimes.Slot of it. `dice` gives numbers from 0 to 1, for the delays.
        `most_waits`: how many may be in `wait` at once, each of which holds a thread."""
        self.store, self.policy, self.clock, self.dice, self.most_waits = store, policy, clock, dice, most_waits
        self.runtimes = {spec.name: _Runtime(spec, make, clock.now()) for spec, make in runtimes}
        self._echo = next((one for one in self.runtimes.values() if one.spec.protocol == "echo"), None)
        self._queues: Dict[str, "queue.PriorityQueue[int]"] = {mode: queue.PriorityQueue() for mode in jobs.MODES}
        self._began = clock.monotonic()
        self.draining, self._stopped = threading.Event(), threading.Event()
        self._idle = threading.Event()          # set by a worker that leaves no job running
        self._threads: List[threading.Thread] = []
        self._pausing = threading.Lock()        # held while a pause comes or goes, in the store and then here
        self.lock = threading.Condition()       # over every _Runtime and _Attempt, and over what is below
        self._alarms: List[Tuple[float, str, int]] = []     # a heap: at these monotonic seconds a mode's id is due;
        self._alarm_set = threading.Event()                 # id 0: look again
        self._waiters: Dict[int, List[threading.Event]] = {}
        self._durations: Dict[Tuple[str, str], List[float]] = {}
        self._cancelled = 0                     # jobs that are still on a queue, or will be put on one by an alarm
        self.changes = self._waits = 0          # what has happened so far; who is in `wait` now

    # Life

    def start(self) -> None:
        """Take up what the database says: decide on what a crash cut off, queue what waits, start the threads."""
        for name, (reason, since) in self.store.pauses().items():
            if name in self.runtimes:
                self.runtimes[name].paused, self.runtimes[name].since = reason, since
        for page in self.store.running():
            self.store.settle([self._cut_off(*row) for row in page])
        for page in self.store.waiting():
            for number, mode, due in page:
                # a wall clock that jumped must not hold a job back for longer than a delay can be
                delay = 0.0 if due is None else min(due - self.clock.unix(), self.policy.most)
                self._enqueue_in(delay, mode, number)
        self._threads = [threading.Thread(target=self._ring_alarms, name="alarms", daemon=True)] + [
            threading.Thread(target=self._work, name=f"{name}-{number}", args=(runtime, runtime.make_slot()),
                             daemon=True)
            for name, runtime in self.runtimes.items() for number in range(runtime.spec.slots)]
        for thread in self._threads:
            thread.start()

    def _cut_off(self, number: int, attempt: int, mode: str, name: str) -> Ending:
        """What becomes of a job that ran when the server was killed."""
        runtime = self.runtimes.get(name)
        outcome = INTERRUPTED._replace(transient=runtime is None or runtime.spec.interrupted == "retry")
        event = jobs.decide(outcome, attempt, self.policy)
        log.warning("job %d was running on %s when the server was killed: %s", number, name,
                    "it is tried again" if event == "retry" else "ended as interrupted")
        return Ending(Task(number, "", mode, attempt, 0, 0, 0), event, outcome)

    def drain(self, tell: threading.Event) -> None:
        """Start no more jobs. Those that run go on, and `tell` is set when none is left."""
        self._idle = tell
        self.draining.set()
        self._tell()

    def busy(self) -> bool:
        """Whether a job runs."""
        with self.lock:
            return any(runtime.running for runtime in self.runtimes.values())

    def stop(self) -> None:
        """End what still runs, so that it is run again at the next start, and all threads."""
        self.drain(self._idle)
        self._stopped.set()
        with self.lock:
            for runtime in self.runtimes.values():
                for attempt in runtime.running.values():
                    attempt.stopped = True
                    attempt.slot.wake()
                runtime.ring()
            self._alarm_set.set()
            self._tell(list(self._waiters))
        for thread in self._threads:
            thread.join()

    # Queues

    def foregone(self, submission: jobs.Submission) -> Optional[jobs.Foregone]:
        """How a new job ends, where nothing can come between: an echo, unless echoes are paused or wait before it. It
        is stored as ended: a thread that claims and ends each one takes a third of the rate at which they are added."""
        if submission.mode != "echo" or not self._echo or self._echo.paused is not None or self._queues["echo"].queue:
            return None
        return jobs.foregone(submission.return_code, self._echo.spec, self.policy)

    def take_up(self, added: jobs.Addition) -> None:
        """Have new jobs run, once the store has them; count and announce those that are stored as ended."""
        if added.endings and self._echo:
            self._announce(self._echo, added.endings)
        ended = {ending.task.id for ending in added.endings}
        waiting = [] if added.replayed else [job for job in added.jobs if job.id not in ended]
        for mode in {job.mode for job in waiting}:
            self.enqueue(mode, [job.id for job in waiting if job.mode == mode])

    def enqueue(self, mode: str, numbers: Sequence[int]) -> None:
        """Have these jobs run, oldest first, once the store has them."""
        for number in numbers:
            self._queues[mode].put(number)
        self._ring(mode, len(numbers))
        self._tell()

    def waiting(self) -> int:
        """How many jobs wait to be run now."""
        return max(0, sum(waiting.qsize() for waiting in self._queues.values()) - self._cancelled)

    def _enqueue_in(self, delay: float, mode: str, number: int) -> None:
        """Have a job run after `delay` seconds; it holds no thread and no runtime until then."""
        if delay <= 0:
            self.enqueue(mode, [number])
        else:
            with self.lock:
                heapq.heappush(self._alarms, (self.clock.monotonic() + delay, mode, number))
            self._alarm_set.set()

    def _ring_alarms(self) -> None:
        """The alarm thread: put on its queue what has become due."""
        while not self._stopped.is_set():
            self._alarm_set.clear()
            with self.lock:
                now, due = self.clock.monotonic(), []
                while self._alarms and self._alarms[0][0] <= now:
                    due.append(heapq.heappop(self._alarms))
                pause = self._alarms[0][0] - now if self._alarms else None
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

    def _work(self, runtime: _Runtime, slot: Any) -> None:
        """A worker thread: take the oldest job that is due, run it, settle it."""
        while not self.draining.is_set():
            number = self._take(runtime, slot)
            if not number:
                runtime.bell.get()
                continue
            try:
                self._run(runtime, slot, number)
            except Exception:       # pylint: disable=broad-exception-caught # whatever it was, the thread goes on
                log.exception("worker of %s: job %d", runtime.spec.name, number)
            finally:
                with self.lock:
                    runtime.running.pop(number, None)
                if self.draining.is_set() and not self.busy():
                    self._idle.set()
        slot.close()

    def _take(self, runtime: _Runtime, slot: Any) -> Optional[int]:
        """The id to run next on this slot, already entered as running; None if there is nothing or it may not."""
        with self.lock:             # whoever takes from a queue holds it
            if self.draining.is_set() or runtime.paused is not None:
                return None
            if runtime.failing and (runtime.aside_until > self.clock.monotonic() or runtime.running):
                return None         # set aside, or one job is trying it out already
            waiting = [self._queues[mode] for mode in runtime.spec.modes if self._queues[mode].queue]
            if not waiting:
                return None
            number = min(waiting, key=lambda one: one.queue[0]).get_nowait()
            runtime.running[number] = _Attempt(slot)
            return number

    def _run(self, runtime: _Runtime, slot: Any, number: int) -> None:
        """One attempt at a job, from the claim in the store to whoever waits for its end."""
        task = self._insist(self.store.claim, number, runtime.spec.name)
        if not task:                # it was cancelled, or the server stops
            with self.lock:
                self._cancelled -= 1
            return
        ending = self._attempt(runtime, slot, task)
        self._insist(self.store.settle, [ending])
        self._announce(runtime, [ending])

    def _attempt(self, runtime: _Runtime, slot: Any, task: Task) -> Ending:
        """Run a job that is claimed; what becomes of it."""
        self._tell()
        attempt, began = runtime.running[task.id], self.clock.monotonic()
        begun = not attempt.interrupted()
        try:
            outcome = slot.run(task, attempt.interrupted) if begun else None
        except Exception:           # pylint: disable=broad-exception-caught # the job must not stay "running"
            log.exception("%s: job %d", runtime.spec.name, task.id)
            outcome = Outcome(jobs.SOFTWARE, "internal error; the server's log has it")
        return self._decide(runtime, task, attempt, outcome, begun)._replace(seconds=self.clock.monotonic() - began)

    def _decide(self, runtime: _Runtime, task: Task, attempt: _Attempt, outcome: Optional[Outcome],
                begun: bool) -> Ending:
        """What becomes of a job after this outcome; after None it was cancelled, or the server stops."""
        with self.lock:
            runtime.running.pop(task.id, None)  # from here on nobody can interrupt it: exactly one of the two wins
            event = "release" if outcome is None else jobs.decide(outcome, task.attempt, self.policy)
            if attempt.cancelled and event in ("release", "retry"):
                return Ending(task, "failed", Outcome(jobs.CANCELLED, "cancelled"))
            if outcome is None:
                failed = begun and runtime.spec.interrupted == "fail"
                return Ending(task, "failed" if failed else event, INTERRUPTED)
            self._note_start(runtime, outcome)
            if not outcome.started and runtime.failing:
                event = "release"   # the runtime's fault: it costs the job no attempt
            return Ending(task, event, outcome, self.policy.delay(task.attempt, self.dice()))

    def _note_start(self, runtime: _Runtime, outcome: Outcome) -> None:
        """Set a runtime aside that fails to start again and again, and take it back when it starts; say so once."""
        was_failing = runtime.failing
        runtime.unstartable = 0 if outcome.started else runtime.unstartable + 1
        runtime.why = outcome.runtime_error if runtime.failing else None
        if runtime.failing:
            pause = min(MOST_PAUSE, FIRST_PAUSE * 2 ** min(30, runtime.unstartable - SET_ASIDE_AFTER))
            runtime.aside_until = self.clock.monotonic() + pause
            for mode in runtime.spec.modes:
                heapq.heappush(self._alarms, (runtime.aside_until, mode, 0))
            self._alarm_set.set()
        if runtime.failing and not was_failing:
            runtime.since = self.clock.now()
            log.error("runtime %s is set aside: it failed to start %d times in a row (%s); its jobs wait, and it is "
                      "tried again", runtime.spec.name, runtime.unstartable, outcome.runtime_error)
        elif was_failing and not runtime.failing:
            runtime.since = self.clock.now()
            log.warning("runtime %s starts again", runtime.spec.name)
            runtime.ring()

    def _announce(self, runtime: _Runtime, endings: Sequence[Ending]) -> None:
        """Tell those who wait, and set the alarm for what is tried again; after it is on disk."""
        over = []
        for task, event, outcome, delay, seconds in endings:
            if event in ("retry", "release"):
                self._enqueue_in(delay, task.mode, task.id)
                if event == "retry":
                    log.info("job %d, attempt %d on %s: return code %d, %s; tried again in %.1f s", task.id,
                             task.attempt, runtime.spec.name, outcome.return_code, outcome.runtime_error, delay)
                continue
            over.append(task.id)
            with self.lock:         # for each: there may be 10,000, and the listener wants it, too
                runtime.ended += 1
                runtime.failures += event == "failed"
                found = self._durations.setdefault((task.mode, event), [0.0] * (len(jobs.BUCKETS) + 2))
                found[bisect.bisect_left(jobs.BUCKETS, seconds)] += 1
                found[-1] += seconds
            if event == "failed":
                log.info("job %d failed on %s after %d attempts: return code %d, %s", task.id, runtime.spec.name,
                         task.attempt, outcome.return_code, outcome.runtime_error)
        self._tell(over)

    def _insist(self, write: Callable[..., Any], *arguments: Any) -> Any:
        """Do a write that must not be lost; while the store cannot take it, again. None if the server stops first:
        then the job stands in the database as running, and the next start decides on it."""
        said = False
        while True:
            try:
                return write(*arguments)
            except StoreError as error:
                if not said:
                    log.error("waiting for the database: %s", error)
                said = True
                if self.clock.wait(self._stopped, STORE_AGAIN):
                    return None

    # What people ask for

    def wait(self, numbers: Sequence[int], seconds: float) -> List[Job]:
        """These jobs as soon as all have ended, or as they are after `seconds`; none at all, and at once, when as many
        wait already as may. Raises UnknownJob."""
        deadline = self.clock.monotonic() + seconds
        with self.lock:
            if self._waits >= self.most_waits:
                return []
            self._waits += 1
        try:
            return [self._wait(number, deadline) for number in numbers]
        finally:
            with self.lock:
                self._waits -= 1

    def _wait(self, number: int, deadline: float) -> Job:
        ended = threading.Event()
        with self.lock:
            self._waiters.setdefault(number, []).append(ended)
        try:
            job: Job = self.store.get(number)       # only now: it cannot end unnoticed any more
            left = deadline - self.clock.monotonic()
            if job.end_time is None and left > 0 and not self._stopped.is_set() and self.clock.wait(ended, left):
                job = self.store.get(number)
            return job
        finally:
            with self.lock:
                self._waiters[number].remove(ended)
                if not self._waiters[number]:
                    del self._waiters[number]

    def _tell(self, numbers: Sequence[int] = ()) -> None:
        with self.lock:             # whoever wants to know of any change waits for the lock itself
            self.changes += 1
            self.lock.notify_all()
            for number in numbers:
                for ended in self._waiters.get(number, ()):
                    ended.set()

    def wait_for_change(self, since: int, seconds: float) -> None:
        """Return as soon as `changes` is not `since`, or after `seconds`; at once when as many wait as may."""
        with self.lock:
            room = self._waits < self.most_waits
            self._waits += room
            self.lock.wait_for(lambda: self.changes != since or self._stopped.is_set(), seconds * room)
            self._waits -= room

    def cancel(self, number: int) -> Job:
        """End a job: one that waits at once, one that runs when its process group has ended. The ended job; raises
        Ended if it had ended (or did so by itself meanwhile), UnknownJob."""
        asked = False
        while not self.store.cancel(number):
            if self._stopped.is_set():
                raise StoreError("the server is stopping")
            job: Job = self.store.get(number)
            if asked and (job.return_code, job.runtime_error) == (jobs.CANCELLED, "cancelled"):
                return job
            if job.end_time is not None:
                raise Ended(job)
            with self.lock:
                attempt = next((one.running[number] for one in self.runtimes.values() if number in one.running), None)
                if attempt:
                    attempt.cancelled = asked = True
                    attempt.slot.wake()
            self._wait(number, self.clock.monotonic() + 1.0)
        with self.lock:
            self._cancelled += 1
            self._tell([number])
        return self.store.get(number)           # type: ignore[no-any-return]

    def pause(self, name: str, reason: str) -> Dict[str, Any]:
        """Let what runs on this runtime end and start no other; raises KeyError. Its description."""
        runtime = self.runtimes[name]
        with self._pausing:
            since = self.store.pause(name, reason)
            with self.lock:
                runtime.paused, runtime.since = reason, since
        self._tell()
        log.warning("runtime %s is paused: %s", name, reason or "no reason given")
        return self.describe(name)

    def resume(self, name: str) -> Dict[str, Any]:
        """Let a paused runtime run jobs again; raises KeyError. Its description."""
        runtime = self.runtimes[name]
        with self._pausing:
            self.store.resume(name)
            with self.lock:
                if runtime.paused is not None:
                    runtime.paused, runtime.since = None, self.clock.now()
                    log.warning("runtime %s is resumed", name)
        runtime.ring()
        self._tell()
        return self.describe(name)

    def describe(self, name: str) -> Dict[str, Any]:
        """A runtime as GET /runtimes/ shows it; raises KeyError."""
        with self.lock:
            runtime = self.runtimes[name]
            return {"name": name, "modes": list(runtime.spec.modes), "protocol": runtime.spec.protocol,
                    "slots": runtime.spec.slots, "state": runtime.state(),
                    "reason": runtime.why if runtime.paused is None else runtime.paused,
                    "running": sorted(runtime.running), "ended": runtime.ended, "failures": runtime.failures,
                    "since": runtime.since}

    def uptime(self) -> float:
        """Seconds since the server began."""
        return round(float(self.clock.monotonic() - self._began), 3)

    def durations(self) -> Dict[Tuple[str, str], List[float]]:
        """{(mode, outcome): how many last attempts took up to each of jobs.BUCKETS, how many longer, all seconds}."""
        with self.lock:
            return {key: list(values) for key, values in self._durations.items()}

    def states(self) -> Counter:
        """How many runtimes of each mode are in each state: {(mode, state): n}."""
        with self.lock:
            return Counter((mode, one.state()) for one in self.runtimes.values() for mode in one.spec.modes)
