"""Who runs what, when: a real store, runtimes that do what the test says, and a clock that is moved by hand."""
import queue
import threading
import time

import pytest
from conftest import HandClock, until

from oqc import jobs
from oqc.jobs import (
    Ended, IdempotencyKey, Outcome, RetryPolicy, RuntimeSpec, StoreError, Submission, UnknownJob)
from oqc.store import Store
from oqc.waiting import Waiting
from oqc.workers import Workers

DONE, BUSY = Outcome(0), Outcome(75, "busy", transient=True)
GONE = Outcome(127, "not found", transient=True, started=False)


class StillClock(HandClock):
    """A clock that only the test moves: waits do not."""

    def wait(self, event, seconds):
        until, give_up = None if seconds is None else self.seconds + seconds, time.monotonic() + 20
        while not event.wait(0.001) and time.monotonic() < give_up:
            if until is not None and self.seconds >= until:
                return False
        return event.is_set()


class Script:
    """A runtime: each attempt is noted in `ran`, `play(task, interrupted)` gives its outcome."""

    def __init__(self, clock, play):
        self.clock, self.play, self.ran, self.open = clock, play, [], 0
        self.woken = threading.Event()

    def run(self, task, interrupted):
        self.ran.append((task.id, task.attempt, self.clock.seconds))
        return self.play(task, interrupted) if callable(self.play) else self.play

    def wake(self):
        self.woken.set()

    def close(self):
        self.open -= 1

    def make(self):
        """A slot of it: all its slots are this one."""
        self.open += 1
        return self

    @property
    def order(self):
        return [number for number, _, _ in self.ran]

    def pauses(self):
        """Seconds on the clock from each attempt to the next."""
        times = [seconds for _, _, seconds in self.ran]
        return [round(later - earlier, 6) for earlier, later in zip(times, times[1:])]


class Blocked:
    """What to play: an attempt that goes on until the test gives its outcome, or somebody interrupts it."""

    def __init__(self, heed=True):
        self.heed, self.started, self._given = heed, threading.Semaphore(0), queue.SimpleQueue()

    def __call__(self, task, interrupted):
        self.started.release()
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            try:
                return self._given.get(timeout=0.001)
            except queue.Empty:
                if self.heed and interrupted():
                    return None
        return None

    def wait(self):
        assert self.started.acquire(timeout=20)     # pylint: disable=consider-using-with

    def give(self, outcome):
        self._given.put(outcome)


class Watched(Waiting):
    """Those who wait; it says when somebody looks at the job that is waited for."""

    def __init__(self, store, clock):
        super().__init__(self, clock)
        self.jobs = store
        self.looked = threading.Semaphore(0)

    def get(self, number):
        """What it asks the store, once it would hear of the job's end."""
        job = self.jobs.get(number)
        self.looked.release()
        return job


class Lab:
    """A store and workers over scripted runtimes; it can be stopped and started again."""

    def __init__(self, path, clock):
        self.path, self.clock, self.dice, self.policy = path, clock, 1.0, RetryPolicy()
        self.specs, self.scripts, self.workers, self.waiting = [], {}, None, None
        self.store = Store(path, clock)

    def runtime(self, play=DONE, name="qpu", **spec):
        """Add a runtime, or have one play something else after a restart."""
        self.scripts[name] = Script(self.clock, play)
        self.specs = [one for one in self.specs if one.name != name]
        self.specs.append(RuntimeSpec(name, ("none",), **spec))
        return self.scripts[name]

    def start(self):
        """Have new workers take up what the store says."""
        self.waiting = Watched(self.store, self.clock)
        slots = [(spec, self.scripts[spec.name].make) for spec in self.specs]
        self.workers = Workers(self.store, slots, self.policy, self.clock, lambda: self.dice,
                               self.waiting)
        self.workers.start()

    def stop(self):
        """Stop the workers, if there are some, and close the store."""
        if self.workers:
            self.workers.stop()
        self.workers = None
        self.store.close()

    def open(self):
        self.store = Store(self.path, self.clock)

    def add(self, mode="verbatim", count=1, return_code=0):
        """The ids of new jobs; if there are workers, they take them up."""
        submission = Submission("X(90)", mode, seed=1, return_code=return_code)
        end = self.workers.immediate_end(submission) if self.workers else None
        added = self.store.add([submission] * count, "test", ends=[end] * count)
        if self.workers:
            self.workers.take_up([added])
        numbers = [job.id for job in added.jobs]
        return numbers if count > 1 else numbers[0]

    def end(self, number):
        """The job as soon as it has ended."""
        until(lambda: self.store.get(number).end_time)
        return self.store.get(number)


@pytest.fixture
def lab(tmp_path, clock):
    """Workers that have not begun, with a clock whose waits move it."""
    made = Lab(str(tmp_path / "oqc.db"), clock)
    yield made
    made.stop()
    assert not any(script.open for script in made.scripts.values())     # every slot was closed


@pytest.fixture
def still(lab):
    """The same on a clock that only the test moves."""
    lab.clock = lab.store.clock = StillClock()
    return lab


# Echoes

ECHO = {"name": "echo", "modes": ("echo",), "protocol": "echo"}


def test_an_echo_ends_with_its_add_and_no_worker_sees_it(lab, caplog):
    caplog.set_level("INFO")
    echo = lab.runtime(**ECHO)
    lab.start()
    changes = lab.waiting.changes
    number, other = lab.add("echo"), lab.add("echo", return_code=3)
    assert [lab.store.get(one)[3:7] for one in (number, other)] == [
        ("Success", "echo", 0, None), ("Runtime Error", "echo", 3, "echo of return code 3")]
    assert echo.ran == [] and lab.workers.queued() == 0 and lab.waiting.changes > changes
    assert [lab.workers.describe("echo")[name] for name in ("ended", "failures", "state")] == [2, 1, "idle"]
    assert {key: sum(counts[:-1]) for key, counts in lab.workers.durations().items()} == {
        ("echo", "succeeded"): 1, ("echo", "failed"): 1}
    assert f"job {other} failed on echo after 1 attempts: return code 3, echo of return code 3" in caplog.text
    lab.workers.drain(threading.Event())        # nothing is taken from a queue any more
    lab.add("echo")
    assert lab.workers.queued() == 0


def test_an_echo_that_is_to_be_tried_again_is_run_by_a_worker(lab):
    echo = lab.runtime(lambda task, _: BUSY if task.attempt < 3 else DONE, **ECHO)
    lab.start()
    assert lab.end(lab.add("echo", return_code=75)).status == "Success"
    assert [attempt for _, attempt, _ in echo.ran] == [1, 2, 3]
    lab.policy = RetryPolicy(attempts=1)
    lab.workers.stop()
    lab.start()
    assert lab.store.get(lab.add("echo", return_code=75))[3:6] == ("Runtime Error", "echo", 75), "no attempt is left"


def test_echoes_wait_while_they_are_paused_and_one_that_comes_later_never_goes_before_them(lab):
    attempt = Blocked()
    echo = lab.runtime(attempt, **ECHO)
    lab.start()
    lab.workers.pause("echo", "")
    first, second = lab.add("echo", 2)
    assert [lab.store.get(one).status for one in (first, second)] == ["Starting"] * 2 and lab.workers.queued() == 2
    lab.workers.resume("echo")
    attempt.wait()
    third = lab.add("echo")
    assert lab.store.get(third).start_time is None, "the second waits still"
    for _ in range(3):
        attempt.give(DONE)
    assert lab.end(third).status == "Success" and echo.order == [first, second, third]


def test_a_request_that_comes_again_has_nothing_run_again(lab):
    qpu = lab.runtime()
    lab.runtime(**ECHO)
    lab.start()
    for _ in range(2):
        submissions = [Submission("X(90)", mode, seed=1) for mode in ("verbatim", "echo")]
        added = lab.store.add(submissions, "test", IdempotencyKey("key", "digest"),
                              list(map(lab.workers.immediate_end, submissions)))
        lab.workers.take_up([added])
        lab.end(1)
        lab.workers.pause("qpu", "")
        assert [job.status for job in added.jobs] == ["Starting" if not added.replayed else "Success"] * 2
    until(lambda: lab.workers.describe("qpu")["ended"] == lab.workers.describe("echo")["ended"] == 1)
    assert qpu.order == [1] and lab.workers.queued() == 0


# Retries

def test_a_busy_runtime_is_tried_five_times_after_doubling_delays_and_the_last_code_and_error_are_kept(lab):
    qpu = lab.runtime(lambda task, _: Outcome(75, f"busy {task.attempt}", transient=True))
    lab.start()
    job = lab.end(lab.add())
    assert (job.status, job.return_code, job.runtime_error) == ("Runtime Error", 75, "busy 5")
    assert (job.runtime, bool(job.start_time)) == ("qpu", True)
    assert [attempt for _, attempt, _ in qpu.ran] == [1, 2, 3, 4, 5]
    assert qpu.pauses() == [0.5, 1, 2, 4]


def test_the_delay_is_at_least_half_and_stops_doubling_at_30_seconds(lab):
    lab.policy, lab.dice = RetryPolicy(attempts=10), 0.0
    qpu = lab.runtime(BUSY)
    lab.start()
    lab.end(lab.add())
    assert qpu.pauses() == [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15]


def test_a_job_that_is_answered_at_last_succeeds(lab):
    lab.runtime(lambda task, _: BUSY if task.attempt < 5 else DONE)
    lab.start()
    job = lab.end(lab.add())
    assert (job.status, job.return_code, job.runtime_error) == ("Success", 0, None)


def test_an_attempt_that_is_followed_by_another_is_logged_with_its_reason(lab, caplog):
    caplog.set_level("INFO")
    lab.runtime(lambda task, _: BUSY if task.attempt < 3 else DONE)
    lab.start()
    lab.end(lab.add())
    assert [record.getMessage() for record in caplog.records] == [
        "job 1, attempt 1 on qpu: return code 75, busy; tried again in 0.5 s",
        "job 1, attempt 2 on qpu: return code 75, busy; tried again in 1.0 s"]


@pytest.mark.parametrize("code", [1, 70, 124, 137, 255])
def test_an_answer_is_not_tried_again_whatever_its_code(lab, code):
    qpu = lab.runtime(Outcome(code, "so it is"))
    lab.start()
    assert lab.end(lab.add())[3:7] == ("Runtime Error", "qpu", code, "so it is")
    assert len(qpu.ran) == 1


@pytest.mark.parametrize("outcome", [Outcome(137, "died", transient=True), Outcome(76, "no answer", transient=True)],
                         ids=["signal", "no answer"])
def test_what_is_no_answer_is_tried_again_until_attempts_run_out(lab, outcome):
    qpu = lab.runtime(outcome)
    lab.start()
    assert lab.end(lab.add())[3:7] == ("Runtime Error", "qpu", outcome.return_code, outcome.runtime_error)
    assert len(qpu.ran) == 5


def test_a_job_that_waits_for_its_next_attempt_says_so_and_holds_no_runtime(still):
    qpu = still.runtime(lambda task, _: BUSY if task == (1, "X(90)", "verbatim", 1, 1000, 1, 0) else DONE)
    still.start()
    number = still.add()
    still.end(still.add())          # on the same runtime, after the first attempt at the other
    job = still.store.get(number)
    assert (job.status, job.runtime, job.return_code, job.runtime_error, job.start_time, job.end_time) == (
        "Retrying", None, None, None, None, None)
    still.clock.seconds += 0.49
    still.end(still.add())
    assert still.store.get(number).start_time is None
    still.clock.seconds += 0.02
    assert still.end(number).status == "Success"
    assert qpu.order == [1, 2, 3, 1]


def test_a_job_is_retrying_while_it_runs_again(lab):
    attempt = Blocked()
    lab.runtime(lambda task, interrupted: BUSY if task.attempt == 1 else attempt(task, interrupted))
    lab.start()
    number = lab.add()
    attempt.wait()
    job = lab.store.get(number)
    assert (job.status, job.runtime, job.return_code, job.end_time) == ("Retrying", "qpu", None, None)
    assert job.start_time
    attempt.give(DONE)
    assert lab.end(number).status == "Success"


def test_an_attempt_is_counted_before_it_begins(lab):
    seen = []
    lab.runtime(lambda task, _: seen.extend(row for page in lab.store.running() for row in page) or DONE)
    lab.start()
    lab.end(lab.add())
    assert seen == [(1, 1, "verbatim", "qpu")]


def test_a_defect_in_a_slot_ends_its_job_and_not_its_worker(lab, caplog):
    def play(task, _):
        if task.id == 1:
            raise ZeroDivisionError("a defect")
        return DONE
    lab.runtime(play)
    lab.start()
    job = lab.end(lab.add())
    assert (job.return_code, job.runtime_error) == (70, "internal error; the server's log has it")
    assert lab.end(lab.add()).status == "Success"
    assert "a defect" in caplog.text


def test_what_the_store_cannot_take_now_is_written_later_and_said_once(lab, caplog):
    refusals = iter(range(3))

    class Refusing:                 # pylint: disable=missing-class-docstring
        def __getattr__(self, name):
            return getattr(lab.store, name)

        def settle(self, endings):  # pylint: disable=missing-function-docstring
            if next(refusals, None) is not None:
                raise StoreError("no room on the disk")
            lab.store.settle(endings)
    lab.runtime()
    lab.start()
    lab.workers.store = Refusing()
    assert lab.end(lab.add()).status == "Success"
    assert caplog.text.count("waiting for the database: no room on the disk") == 1


# Who takes what

def test_a_free_runtime_takes_the_oldest_job_that_is_due(lab):
    first = Blocked()
    qpu = lab.runtime(lambda task, interrupted: first(task, interrupted) if not qpu.ran[1:] else DONE,
                      modes=("verbatim", "simulation"))
    lab.start()
    lab.add()
    first.wait()
    others = [lab.add(mode) for mode in ("simulation", "verbatim", "verbatim", "simulation", "verbatim")]
    first.give(BUSY)
    lab.end(others[-1])
    lab.end(1)
    order = qpu.order
    order.pop(order.index(1, 1))        # tried again when it was due
    assert order == [1, 2, 3, 4, 5, 6]


def test_a_job_that_is_due_again_goes_before_younger_ones(still):
    second = Blocked()
    qpu = still.runtime(lambda task, interrupted: (
        BUSY if (task.id, task.attempt) == (1, 1) else second(task, interrupted) if task.id == 2 else DONE))
    still.start()
    still.add(count=4)
    second.wait()
    still.clock.seconds += 1
    until(lambda: still.workers.queued() == 3)     # 3 and 4, and 1 when the alarm thread has seen the time
    second.give(DONE)
    still.end(4)
    assert qpu.order == [1, 2, 1, 3, 4]


def test_several_runtimes_share_a_mode(lab):
    one, other = Blocked(), Blocked()
    lab.runtime(one, "one")
    lab.runtime(other, "other")
    lab.start()
    lab.add(count=3)
    one.wait()
    other.wait()
    assert sorted(lab.store.get(number).runtime for number in (1, 2)) == ["one", "other"]
    assert lab.store.get(3).runtime is None
    other.give(DONE)
    other.wait()                        # the one that is free takes the third
    assert lab.store.get(3).runtime == "other"
    one.give(DONE)
    other.give(DONE)
    assert {lab.end(number).status for number in (1, 2, 3)} == {"Success"}


def test_a_runtime_runs_as_many_jobs_at_once_as_it_has_slots(lab):
    plays = threading.Barrier(4)            # the test and three attempts: it opens only if they run at once
    qpu = lab.runtime(lambda *_: plays.wait(20) and DONE or DONE, slots=3)
    lab.start()
    lab.add(count=3)
    plays.wait(20)
    lab.end(3)
    assert sorted(qpu.order) == [1, 2, 3]


def test_a_slow_job_delays_no_other_mode(lab):
    slow = Blocked()
    lab.runtime(slow)
    lab.runtime(name="sim", modes=("simulation",))
    lab.runtime(name="echo", modes=("echo",))
    lab.start()
    number = lab.add()
    slow.wait()
    assert lab.end(lab.add("simulation")).status == lab.end(lab.add("echo")).status == "Success"
    assert lab.store.get(number).end_time is None
    slow.give(DONE)
    lab.end(number)


# A runtime that does not start

def test_a_runtime_that_does_not_start_is_set_aside_and_says_so_once_until_it_starts_again(lab, caplog):
    states, reasons = [], []

    def play(*_):
        found = lab.workers.describe("qpu")
        states.append(found["state"])
        reasons.append(found["reason"])
        return GONE if len(states) < 12 else DONE
    qpu = lab.runtime(play)
    lab.start()
    numbers = lab.add(count=30)
    assert {lab.end(number).status for number in numbers} == {"Success"}
    assert max(attempt for _, attempt, _ in qpu.ran) <= 3       # its jobs are not burnt down
    assert reasons == [None] * 3 + ["not found"] * 9 + [None] * (len(states) - 12)
    assert states[:3] == ["busy"] * 3 and set(states[3:12]) == {"failing"} and set(states[12:]) == {"busy"}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "runtime qpu is set aside: it failed to start 3 times in a row (not found); its jobs wait, and it is "
                  "tried again"), ("WARNING", "runtime qpu starts again")]


def test_a_runtime_that_is_set_aside_is_tried_again_after_pauses_that_grow_to_a_minute(lab):
    """A single job gets there, too, and loses no attempt meanwhile."""
    qpu = lab.runtime(lambda *_: GONE if len(qpu.ran) < 12 else DONE)
    lab.dice = 0.0
    lab.start()
    assert lab.end(lab.add()).status == "Success"
    assert [attempt for _, attempt, _ in qpu.ran] == [1, 2] + [3] * 10
    for pause, expected in zip(qpu.pauses()[2:], (1, 2, 4, 8, 16, 32, 60, 60, 60)):
        assert expected <= pause <= expected + 1        # the job's own delay may begin when the pause has ended


def test_only_starts_that_fail_in_a_row_count(lab, caplog):
    qpu = lab.runtime(lambda task, _: GONE if len(qpu.ran) % 3 else DONE)
    lab.start()
    numbers = lab.add(count=10)
    assert {lab.end(number).status for number in numbers} == {"Success"}
    assert "set aside" not in caplog.text


def test_another_runtime_of_the_mode_takes_over_what_one_does_not_start(lab, caplog):
    failed = threading.Semaphore(0)
    lab.runtime(lambda *_: failed.release() or GONE, "broken")
    sound = lab.runtime(lambda task, _: (task.id == 1 and [failed.acquire(timeout=20) for _ in range(3)]) and DONE
                        or DONE, "sound")
    lab.start()
    numbers = lab.add(count=20)
    assert {lab.end(number)[3:5] for number in numbers} == {("Success", "sound")}
    assert sorted(set(sound.order)) == numbers
    assert caplog.text.count("set aside") == 1


def test_one_job_at_a_time_tries_a_runtime_out_that_is_set_aside(still):
    trial = Blocked()
    qpu = still.runtime(GONE, slots=4)
    still.start()
    for failures in (1, 2, 3):
        still.add()
        until(lambda failures=failures: len(qpu.ran) == failures and not still.workers.busy())
    still.add(count=5)
    assert still.workers.describe("qpu")["state"] == "failing"
    qpu.play = trial
    still.clock.seconds += 1.0
    trial.wait()
    still.workers.resume("qpu")             # has all its workers look again
    assert (len(qpu.ran), len(still.workers.describe("qpu")["running"])) == (4, 1)
    qpu.play = DONE
    trial.give(DONE)
    still.clock.seconds += 60
    assert {still.end(number).status for number in range(1, 9)} == {"Success"}


# After a restart

def test_jobs_that_waited_run_in_order_after_a_restart(lab):
    qpu = lab.runtime()
    lab.workers = None
    numbers = lab.add(count=5)
    lab.stop()
    lab.open()
    lab.start()
    lab.end(numbers[-1])
    assert qpu.order == numbers


def test_a_job_that_ran_is_run_again_in_its_turn(lab):
    qpu = lab.runtime()
    lab.add(count=3)
    lab.store.claim(2, "qpu")         # as if the server had been killed now
    lab.stop()
    lab.open()
    lab.start()
    lab.end(3)
    assert [entry[:2] for entry in qpu.ran] == [(1, 1), (2, 2), (3, 1)]
    assert lab.end(2).status == "Success"


def test_a_job_that_ran_is_ended_if_its_runtime_says_so(lab):
    qpu = lab.runtime(interrupted="fail")
    number = lab.add()
    lab.store.claim(number, "qpu")
    lab.start()
    job = lab.store.get(number)
    assert (job.status, job.return_code, job.runtime_error) == ("Runtime Error", 137, "interrupted, outcome unknown")
    assert (job.runtime, bool(job.start_time and job.end_time)) == ("qpu", True)
    lab.end(lab.add())
    assert qpu.order == [2]


def test_a_job_of_a_runtime_that_is_no_longer_there_is_run_by_another(lab):
    lab.runtime(interrupted="fail")
    number = lab.add()
    lab.store.claim(number, "an older one")
    lab.start()
    assert lab.end(number)[3:5] == ("Success", "qpu")


def test_a_job_that_takes_the_server_down_each_time_does_not_do_so_for_ever(lab):
    qpu = lab.runtime()
    number = lab.add()
    lab.store.pause("qpu", "so that the test alone claims")
    for attempt in range(1, 6):
        assert lab.store.claim(number, "qpu").attempt == attempt
        lab.start()                     # finds it running, as after a crash
        lab.workers.stop()
    job = lab.store.get(number)
    assert (job.status, job.return_code, job.runtime_error) == ("Runtime Error", 137, "interrupted, outcome unknown")
    assert not qpu.ran


def settled(lab, delay):
    """A job whose first attempt ended with 75, to be tried again after `delay` seconds."""
    number = lab.add()
    task = lab.store.claim(number, "qpu")
    lab.store.settle([jobs.Ending(task, "retry", BUSY, delay)])
    return number


def test_a_delay_holds_across_a_restart(lab):
    qpu, begun = lab.runtime(), lab.clock.seconds
    number = settled(lab, 8.0)
    lab.stop()
    lab.open()
    lab.clock.seconds = begun = 5.0     # the monotonic clock of another process
    lab.clock.wall += 3.0               # it was down for so long
    lab.start()
    lab.end(number)
    assert [(number, 2, begun + 5.0)] == qpu.ran


@pytest.mark.parametrize("jump, wait", [(1e9, 0.0), (-1e9, 30.0)], ids=["forwards", "backwards"])
def test_a_wall_clock_that_jumped_during_a_restart_holds_no_job_back_for_longer_than_a_delay_can_be(lab, jump, wait):
    qpu, begun = lab.runtime(), lab.clock.seconds
    number = settled(lab, 8.0)
    lab.clock.wall += jump
    lab.start()
    lab.end(number)
    assert qpu.ran == [(number, 2, begun + wait)]


@pytest.mark.parametrize("jump", [1e9, -1e9], ids=["forwards", "backwards"])
def test_a_wall_clock_that_jumps_changes_neither_order_nor_delays(lab, jump):
    def play(task, _):
        lab.clock.wall += jump
        return BUSY if task.attempt < 3 else DONE
    qpu = lab.runtime(play)
    lab.start()
    lab.end(lab.add())
    assert qpu.pauses() == [0.5, 1.0]
    lab.end(lab.add(count=3)[-1])
    assert [number for number, attempt, _ in qpu.ran if attempt == 1] == [1, 2, 3, 4]


def test_a_wall_clock_that_goes_back_lets_no_job_end_before_it_began(lab):
    lab.runtime()
    lab.store.pause("qpu", "")
    lab.start()
    number = lab.add()
    created = lab.store.get(number).created_time
    lab.clock.now = lambda: "2020-01-01T00:00:00.000000Z"
    lab.workers.resume("qpu")
    assert lab.end(number)[7:] == (created, created, created)


# Cancelling

CANCELLED = ("Runtime Error", 130, "cancelled")


def told(job):
    return job.status, job.return_code, job.runtime_error


def test_a_job_that_waits_is_cancelled_at_once_and_never_runs(still):
    qpu = still.runtime()
    still.store.pause("qpu", "")
    still.start()
    number = still.add()
    waiting = []
    waiter = threading.Thread(target=lambda: waiting.extend(still.waiting.until_ended([number], 20)))
    waiter.start()
    assert still.waiting.looked.acquire(timeout=20)
    job = still.workers.cancel(number)
    assert told(job) == CANCELLED
    assert (job.runtime, job.start_time, bool(job.end_time)) == (None, None, True)
    waiter.join(20)
    assert waiting == [job]                 # whoever waits for its end is told
    still.workers.resume("qpu")
    still.end(still.add())
    assert qpu.order == [2]


def test_a_job_that_runs_is_cancelled_when_its_attempt_has_ended(still):
    attempt = Blocked()
    qpu = still.runtime(attempt)
    still.start()
    number = still.add()
    attempt.wait()
    job = still.workers.cancel(number)
    assert told(job) == CANCELLED
    assert (job.runtime, bool(job.start_time)) == ("qpu", True)
    assert qpu.woken.is_set()
    assert still.workers.describe("qpu")["running"] == []


def test_a_job_that_waits_for_its_next_attempt_is_cancelled_at_once_and_never_runs_again(still):
    qpu = still.runtime(lambda task, _: BUSY if task.id == 1 else DONE)
    still.start()
    number = still.add()
    still.end(still.add())
    assert told(still.workers.cancel(number)) == CANCELLED
    still.clock.seconds += 1
    still.end(still.add())
    assert qpu.order == [1, 2, 3]


def test_a_job_that_is_cancelled_between_its_turn_and_its_claim_is_counted_once(lab, monkeypatch):
    """It waits when the cancel looks, and has its turn before the store hears of the cancel."""
    claim, cancel, cancelled = lab.store.claim, lab.store.cancel, threading.Event()

    def claim_late(*arguments):
        assert cancelled.wait(20)
        return claim(*arguments)

    def cancel_late(number):
        lab.workers.resume("qpu")
        until(lab.workers.busy)
        ended = cancel(number)
        cancelled.set()
        until(lambda: not lab.workers.busy())
        return ended
    lab.runtime()
    lab.start()
    lab.workers.pause("qpu", "")
    monkeypatch.setattr(lab.store, "claim", claim_late)
    monkeypatch.setattr(lab.store, "cancel", cancel_late)
    assert told(lab.workers.cancel(lab.add())) == CANCELLED
    lab.workers.pause("qpu", "")
    lab.add()
    assert lab.workers.queued() == 1


def test_a_job_that_has_ended_and_one_that_is_unknown_cannot_be_cancelled(lab):
    lab.runtime()
    lab.start()
    job = lab.end(lab.add())
    with pytest.raises(Ended) as refusal:
        lab.workers.cancel(job.id)
    assert refusal.value.job == job == lab.store.get(job.id)
    with pytest.raises(UnknownJob):
        lab.workers.cancel(99)


@pytest.mark.parametrize("outcome", [DONE, Outcome(3, "too warm"), Outcome(124, "too late")], ids=str)
def test_an_attempt_that_ends_with_an_answer_before_it_heard_of_the_cancelling_wins(still, outcome):
    attempt = Blocked(heed=False)
    qpu = still.runtime(attempt)
    still.start()
    number = still.add()
    attempt.wait()
    refused = []

    def cancel():
        with pytest.raises(Ended) as refusal:
            still.workers.cancel(number)
        refused.append(refusal.value.job)
    canceller = threading.Thread(target=cancel)
    canceller.start()
    assert qpu.woken.wait(20)
    attempt.give(outcome)
    canceller.join(20)
    assert refused == [still.store.get(number)]
    assert refused[0].return_code == outcome.return_code


@pytest.mark.parametrize("outcome", [BUSY, GONE, Outcome(137, "died", transient=True)], ids=["75", "127", "137"])
def test_an_attempt_that_would_be_tried_again_is_cancelled_instead(still, outcome):
    attempt = Blocked(heed=False)
    qpu = still.runtime(attempt)
    still.start()
    number = still.add()
    attempt.wait()
    cancelled = []
    canceller = threading.Thread(target=lambda: cancelled.append(still.workers.cancel(number)))
    canceller.start()
    assert qpu.woken.wait(20)
    attempt.give(outcome)
    canceller.join(20)
    assert [told(job) for job in cancelled] == [CANCELLED]
    still.clock.seconds += 60
    qpu.play = DONE
    still.end(still.add())
    assert qpu.order == [1, 2]


def test_of_many_that_cancel_while_a_job_starts_and_ends_all_hear_the_same(lab):
    """Three at once, against a worker that takes and ends the job: each is told what the job says."""
    lab.runtime(lambda task, interrupted: None if interrupted() else DONE)
    lab.start()
    ends = set()
    for _ in range(60):
        gate, came = threading.Barrier(4), queue.SimpleQueue()

        def cancel(number, gate=gate, came=came):
            gate.wait(20)
            try:
                came.put(told(lab.workers.cancel(number)))
            except Ended as refusal:
                came.put(told(refusal.job))
        number = lab.add()
        cancellers = [threading.Thread(target=cancel, args=(number,)) for _ in range(3)]
        for canceller in cancellers:
            canceller.start()
        gate.wait(20)
        for canceller in cancellers:
            canceller.join(20)
        end = told(lab.end(number))
        assert [came.get(timeout=20) for _ in cancellers] == [end] * 3
        ends.add(end)
    assert ends <= {CANCELLED, ("Success", 0, None)}


# Pausing

def test_a_pause_lets_what_runs_end_and_starts_no_other_until_it_is_resumed(lab):
    attempt = Blocked()
    qpu = lab.runtime(attempt)
    lab.start()
    first, second = lab.add(count=2)
    attempt.wait()
    paused = lab.workers.pause("qpu", "cable")
    assert (paused["state"], paused["reason"], paused["running"]) == ("paused", "cable", [first])
    attempt.give(DONE)
    assert lab.end(first).status == "Success"
    until(lambda: not lab.workers.describe("qpu")["running"])
    assert qpu.order == [first]
    qpu.play = DONE
    resumed = lab.workers.resume("qpu")
    assert (resumed["state"] in ("idle", "busy"), resumed["reason"]) == (True, None)
    assert lab.end(second).status == "Success"


def test_a_pause_and_its_reason_survive_a_restart_and_other_runtimes_work_on(lab):
    lab.runtime()
    lab.runtime(name="sim", modes=("simulation",))
    lab.start()
    before = lab.workers.pause("qpu", "cable")
    number = lab.add()
    lab.stop()
    lab.open()
    lab.start()
    after = lab.workers.describe("qpu")
    assert (after["state"], after["reason"], after["since"]) == ("paused", "cable", before["since"])
    lab.end(lab.add("simulation"))
    assert lab.store.get(number).start_time is None
    lab.workers.resume("qpu")
    assert lab.end(number).status == "Success"
    lab.stop()
    lab.open()
    lab.start()
    assert lab.workers.describe("qpu")["state"] == "idle"


def test_a_pause_that_cannot_be_stored_is_none(lab, monkeypatch):
    def refuse(*_):
        raise StoreError("no room on the disk")
    lab.runtime()
    lab.start()
    monkeypatch.setattr(lab.store, "pause", refuse)
    with pytest.raises(StoreError):
        lab.workers.pause("qpu", "cable")
    assert lab.workers.describe("qpu")["state"] == "idle"
    assert lab.end(lab.add()).status == "Success"


def test_a_resume_that_comes_during_a_pause_leaves_table_and_memory_of_one_mind(lab, monkeypatch):
    store_pause, other = lab.store.pause, threading.Thread(target=lambda: lab.workers.resume("qpu"))

    def pause(*said):
        since = store_pause(*said)
        other.start()
        other.join(0.2)             # it has to wait for the pause, or else ends in this time
        return since
    lab.runtime()
    lab.start()
    monkeypatch.setattr(lab.store, "pause", pause)
    lab.workers.pause("qpu", "cable")
    other.join(20)
    assert (lab.workers.describe("qpu")["state"], lab.store.pauses()) == ("idle", {})


def test_a_runtime_nobody_knows_cannot_be_paused(lab):
    lab.runtime()
    lab.start()
    for ask in (lab.workers.describe, lab.workers.resume, lambda name: lab.workers.pause(name, "")):
        with pytest.raises(KeyError):
            ask("other")


def test_a_runtime_says_how_it_fares(lab):
    attempt = Blocked()
    lab.runtime(attempt, slots=2)
    lab.start()
    since = lab.workers.runtimes["qpu"].since
    said = {"name": "qpu", "modes": ["verbatim"], "protocol": "exec", "slots": 2, "reason": None, "since": since}
    assert lab.workers.describe("qpu") == {**said, "state": "idle", "running": [], "ended": 0, "failures": 0}
    lab.add()
    attempt.wait()
    assert lab.workers.describe("qpu") == {**said, "state": "idle", "running": [1], "ended": 0, "failures": 0}
    lab.add()
    attempt.wait()
    assert lab.workers.describe("qpu") == {**said, "state": "busy", "running": [1, 2], "ended": 0, "failures": 0}
    for ended, outcome in enumerate((DONE, Outcome(3, "no")), 1):
        attempt.give(outcome)
        until(lambda ended=ended: lab.workers.describe("qpu")["ended"] == ended)
    assert lab.workers.describe("qpu") == {**said, "state": "idle", "running": [], "ended": 2, "failures": 1}


# Stopping

def test_a_drain_starts_no_job_and_tells_when_none_is_left(lab):
    attempt, tell = Blocked(), threading.Event()
    qpu = lab.runtime(attempt)
    lab.start()
    first, second = lab.add(count=2)
    attempt.wait()
    lab.workers.drain(tell)
    assert (lab.workers.busy(), tell.is_set()) == (True, False)
    attempt.give(DONE)
    assert tell.wait(20)
    assert not lab.workers.busy()
    lab.stop()
    lab.open()
    assert lab.store.get(first).status == "Success"
    assert (lab.store.get(second).status, lab.store.get(second).start_time) == ("Starting", None)
    qpu = lab.runtime()
    lab.start()
    lab.end(second)
    assert qpu.order == [second]


def test_what_a_stop_cuts_off_is_run_again_without_losing_an_attempt(lab):
    attempt = Blocked()
    lab.runtime(attempt)
    lab.start()
    number = lab.add()
    attempt.wait()
    lab.stop()
    lab.open()
    job = lab.store.get(number)
    assert (job.status, job.start_time, job.return_code) == ("Retrying", None, None)
    qpu = lab.runtime()
    lab.start()
    assert lab.end(number).status == "Success"
    assert [entry[:2] for entry in qpu.ran] == [(number, 1)]


def test_what_a_stop_cuts_off_is_ended_if_its_runtime_says_so(lab):
    attempt = Blocked()
    lab.runtime(attempt, interrupted="fail")
    lab.start()
    number = lab.add()
    attempt.wait()
    lab.stop()
    lab.open()
    assert told(lab.store.get(number)) == ("Runtime Error", 137, "interrupted, outcome unknown")


def test_a_stop_leaves_no_thread_and_wakes_who_waits(still):
    before = set(threading.enumerate())
    attempt, came = Blocked(), []
    still.runtime(attempt, slots=3)
    still.start()
    number = still.add()
    attempt.wait()
    waiter = threading.Thread(target=lambda: came.extend(still.waiting.until_ended([number], 20)))
    waiter.start()
    assert still.waiting.looked.acquire(timeout=20)
    still.workers.stop()
    waiter.join(20)
    assert [job.id for job in came] == [number]
    assert set(threading.enumerate()) == before
    still.workers = None
