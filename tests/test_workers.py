"""Who runs what, when: a real store, runtimes that do what the test says, and a clock that is moved
by hand."""
import os
import queue
import threading

import pytest
from conftest import HandClock, until

from oqc import jobs
from oqc.jobs import (
    Ended, IdempotencyKey, Outcome, Queued, RetryPolicy, RuntimeSpec, StoreError, Submission,
    UnknownJob)
from oqc.store import Store
from oqc.waiting import Waiting
from oqc.workers import Workers

DONE = Outcome(0)
BUSY = Outcome(75, "busy", transient=True)
GONE = Outcome(127, "not found", transient=True, started=False)


class StillClock(HandClock):
    """A clock that only the test moves: waits do not."""

    def wait(self, event, seconds):
        """Wait until the event, or until the test has moved the clock on so far."""
        if seconds is None:
            return event.wait(20)
        end = self.seconds + seconds
        until(lambda: event.is_set() or self.seconds >= end)
        return event.is_set()


class Script:
    """A runtime: each attempt is noted in `ran`, `play(task, interrupted)` gives its outcome."""

    def __init__(self, clock, play):
        self.clock = clock
        self.play = play                # a function, or the outcome itself
        self.ran = []                   # (job, attempt, when)
        self.open = 0                   # slots
        self.woken = threading.Event()  # while it ran
        self.slots = []
        self.rest = lambda slot, may_start: None    # what a rest does first; or its outcome

    def run(self, task, interrupted):
        """Do an attempt."""
        self.ran.append((task.id, task.attempt, self.clock.seconds))
        if callable(self.play):
            return self.play(task, interrupted)
        return self.play

    def make(self):
        """A slot of it."""
        self.open += 1
        self.slots.append(ScriptSlot(self))
        return self.slots[-1]

    @property
    def order(self):
        return [number for number, _, _ in self.ran]

    def pauses(self):
        """Seconds on the clock from each attempt to the next."""
        times = [seconds for _, _, seconds in self.ran]
        return [round(later - earlier, 6) for earlier, later in zip(times, times[1:])]


class ScriptSlot:
    """A slot of such a runtime."""

    survivors = ""

    def __init__(self, script):
        self.script = script
        self.device = None
        self.late = []                  # what late_logs gives
        self.runs = False
        self.bell = threading.Semaphore(0)

    def run(self, task, interrupted):
        """Do an attempt."""
        self.runs = True
        try:
            return self.script.run(task, interrupted)
        finally:
            self.runs = False

    def rest(self, is_over, may_start):
        """Wait until it is over, or the script has an outcome."""
        outcome = self.script.rest(self, may_start)
        while outcome is None and not is_over() and not self.late:
            assert self.bell.acquire(timeout=60)    # pylint: disable=consider-using-with
        return outcome

    def late_logs(self):
        """What was said late, once."""
        late, self.late = self.late, []
        return late

    def wake(self):
        """Have it look again."""
        if self.runs:
            self.script.woken.set()
        self.bell.release()

    def close(self):
        self.script.open -= 1


class Blocked:
    """What to play: an attempt that goes on until the test gives its outcome, or somebody
    interrupts it."""

    def __init__(self, heed=True):
        self.heed = heed
        self.started = threading.Semaphore(0)
        self._given = queue.SimpleQueue()

    def __call__(self, task, interrupted):
        self.started.release()
        if not self.heed:
            return self._given.get(timeout=20)
        until(lambda: interrupted() or not self._given.empty())
        try:
            return self._given.get(block=False)
        except queue.Empty:
            return Outcome(130, interrupted=True)

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


class Altered:
    """A store some of whose methods are the test's."""

    def __init__(self, store, **methods):
        self.store = store
        vars(self).update(methods)

    def __getattr__(self, name):
        return getattr(self.store, name)


class Lab:
    """A store and workers over scripted runtimes; it can be stopped and started again."""

    def __init__(self, path, clock):
        self.path = path
        self.clock = clock
        self.dice = 1.0
        self.policy = RetryPolicy()
        self.specs = []
        self.scripts = {}
        self.workers = None
        self.waiting = None
        self.store = Store(path, clock)

    def runtime(self, play=DONE, name="qpu", **spec):
        """Add a runtime, or have one play something else after a restart."""
        self.scripts[name] = Script(self.clock, play)
        self.specs = [one for one in self.specs if one.name != name]
        self.specs.append(RuntimeSpec(name, ("none",), **spec))
        return self.scripts[name]

    def start(self, **methods):
        """Have new workers take up what the store says; some of its methods may be the test's."""
        self.waiting = Watched(self.store, self.clock)
        slots = [(spec, self.scripts[spec.name].make) for spec in self.specs]
        left_over = methods.pop("left_over", lambda *_: False)
        self.workers = Workers(Altered(self.store, **methods), slots, self.policy, self.clock,
                               lambda: self.dice, self.waiting, left_over)
        self.workers.start()
        if "waiting" not in methods:    # until all that wait are loaded, no echo ends at once
            until(lambda: all(one.name != "loader" for one in threading.enumerate()))

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
        outcomes = ()
        if self.workers:
            outcomes = [self.workers.immediate_outcome(submission)] * count
        added = self.store.add([submission] * count, "test", outcomes=outcomes)
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
    number = lab.add("echo")
    other = lab.add("echo", return_code=3)
    assert lab.store.get(number)[3:7] == ("Success", "echo", 0, None)
    assert lab.store.get(other)[3:7] == ("Runtime Error", "echo", 3, "echo of return code 3")
    assert echo.ran == [] and lab.workers.queued() == 0 and lab.waiting.changes > changes
    described = lab.workers.describe("echo")
    assert (described["ended"], described["failures"], described["state"]) == (2, 1, "idle")
    assert {key: sum(counts[:-1]) for key, counts in lab.workers.durations().items()} == {
        ("echo", "succeeded"): 1, ("echo", "failed"): 1}
    assert (f"job {other} failed on echo after 1 attempts: return code 3, echo of return code 3"
            in caplog.text)
    lab.workers.drain(threading.Event())        # nothing is taken from a queue any more
    lab.add("echo")
    assert lab.workers.queued() == 0


def test_an_echo_that_is_to_be_tried_again_is_run_by_a_worker(lab):
    echo = lab.runtime(lambda task, _: BUSY if task.attempt < 3 else DONE, **ECHO)
    lab.start()
    assert lab.end(lab.add("echo", return_code=75)).status == "Success"
    assert [attempt for _, attempt, _ in echo.ran] == [1, 2, 3]
    lab.workers.stop()
    lab.runtime(BUSY, **ECHO, attempts=1)
    lab.start()
    job = lab.end(lab.add("echo", return_code=75))
    assert job[3:6] == ("Runtime Error", "echo", 75), "no attempt is left"


def test_echoes_wait_while_they_are_paused_and_one_that_comes_later_never_goes_before_them(lab):
    attempt = Blocked()
    echo = lab.runtime(attempt, **ECHO)
    lab.start()
    lab.workers.pause("echo", "")
    first, second = lab.add("echo", 2)
    assert lab.store.get(first).status == lab.store.get(second).status == "Starting"
    assert lab.workers.queued() == 2
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
    submissions = [Submission("X(90)", mode, seed=1) for mode in ("verbatim", "echo")]
    outcomes = [lab.workers.immediate_outcome(submission) for submission in submissions]
    for status in ("Starting", "Success"):
        added = lab.store.add(submissions, "test", IdempotencyKey("key", "digest"), outcomes)
        lab.workers.take_up([added])
        lab.end(1)
        lab.workers.pause("qpu", "")
        assert [job.status for job in added.jobs] == [status] * 2
    for name in ("qpu", "echo"):
        until(lambda name=name: lab.workers.describe(name)["ended"] == 1)
    assert qpu.order == [1] and lab.workers.queued() == 0


# Retries

def test_a_busy_runtime_is_tried_five_times_after_doubling_delays_and_its_last_error_is_kept(lab):
    qpu = lab.runtime(lambda task, _: Outcome(75, f"busy {task.attempt}", transient=True))
    lab.start()
    job = lab.end(lab.add())
    assert (job.status, job.return_code, job.runtime_error) == ("Runtime Error", 75, "busy 5")
    assert (job.runtime, bool(job.start_time)) == ("qpu", True)
    assert [attempt for _, attempt, _ in qpu.ran] == [1, 2, 3, 4, 5]
    assert qpu.pauses() == [0.5, 1, 2, 4]


def test_the_delay_is_at_least_half_and_stops_doubling_at_30_seconds(lab):
    lab.dice = 0.0
    qpu = lab.runtime(BUSY, attempts=10)
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


@pytest.mark.parametrize("code, error", [(137, "died"), (76, "no answer")])
def test_what_is_no_answer_is_tried_again_until_attempts_run_out(lab, code, error):
    qpu = lab.runtime(Outcome(code, error, transient=True))
    lab.start()
    assert lab.end(lab.add())[3:7] == ("Runtime Error", "qpu", code, error)
    assert len(qpu.ran) == 5


def test_no_job_starts_before_all_that_wait_are_loaded_and_new_ones_come_behind_them(lab):
    """Nor is an echo ended at once meanwhile. What the loader had read already is queued once."""
    qpu = lab.runtime()
    echo = lab.runtime(name="echo", modes=("echo",), protocol="echo")
    old = lab.add(count=3)
    first_page, go = threading.Event(), threading.Event()

    def waiting():
        yield [row for page in lab.store.waiting() for row in page][:1]
        first_page.set()
        assert go.wait(20)
        yield [row for page in lab.store.waiting() for row in page][1:]

    lab.start(waiting=waiting)
    assert first_page.wait(20)
    new, echoed = lab.add(), lab.add("echo")
    assert lab.workers.queued() == 5        # the old ones, two of which are not loaded, and these
    assert not qpu.ran and not echo.ran
    go.set()
    for number in (*old, new, echoed):
        assert lab.end(number).status == "Success"
    assert (qpu.order, echo.order) == ([*old, new], [echoed])
    until(lambda: lab.workers.queued() == 0)


def test_a_database_that_cannot_be_read_while_jobs_are_loaded_is_read_again(lab):
    qpu = lab.runtime()
    old = lab.add(count=3)
    reads = []

    def waiting():
        rows = [row for page in lab.store.waiting() for row in page]
        reads.append(len(rows))
        yield rows[:1]
        if len(reads) < 3:
            raise StoreError("disk I/O error")
        yield rows[1:]

    lab.start(waiting=waiting)
    assert [lab.end(number).status for number in old] == ["Success"] * 3
    assert reads == [3, 3, 3] and qpu.order == old


def test_a_stop_does_not_wait_for_all_that_wait_to_be_loaded(lab):
    lab.runtime()
    lab.add(count=2)
    first_page, go = threading.Event(), threading.Event()

    def waiting():
        rows = [row for page in lab.store.waiting() for row in page]
        yield rows[:1]
        first_page.set()
        assert go.wait(20)
        yield rows[1:]
        raise AssertionError("it goes on")

    lab.start(waiting=waiting)
    assert first_page.wait(20)
    lab.workers.drain(threading.Event())
    stopping = threading.Thread(target=lab.workers.stop)
    stopping.start()
    until(lab.workers._stopped.is_set)      # pylint: disable=protected-access # nothing else tells
    go.set()
    stopping.join(20)
    assert not stopping.is_alive()


def test_a_job_that_waits_for_its_next_attempt_says_so_and_holds_no_runtime(still):
    first_attempt = (1, "X(90)", "verbatim", 1, 1000, 1, 0)
    qpu = still.runtime(lambda task, _: BUSY if task[:7] == first_attempt else DONE)
    still.start()
    number = still.add()
    still.end(still.add())          # on the same runtime, after the first attempt at the other
    job = still.store.get(number)
    assert job[3:7] == ("Retrying", None, None, None) and job.start_time is job.end_time is None
    still.clock.seconds += 0.49
    still.end(still.add())
    assert still.store.get(number).start_time is None
    still.clock.seconds += 0.02
    assert still.end(number).status == "Success"
    assert qpu.order == [1, 2, 3, 1]


def show_times_that_sort(clock):
    """Have a clock show all times in one form, of which the texts sort as the times do."""
    clock.at = lambda seconds: f"{seconds:020.6f}"
    clock.now = lambda: clock.at(clock.wall)


def test_a_job_that_is_due_says_what_it_waits_for_now(still):
    show_times_that_sort(still.clock)
    still.runtime(lambda task, _: BUSY if task.attempt == 1 else DONE)
    still.start()
    number = still.add()
    until(lambda: still.store.get(number).status == "Retrying")
    job = Queued(number, "verbatim", 0, "test")
    due_time = still.store.details(number).due_time
    assert still.workers.outlook(job, due_time) == (None, f"tried again at {due_time}")
    still.workers.pause("qpu", "cable")
    still.clock.wall += 1
    assert still.workers.outlook(job, due_time) == (0, "qpu is paused: cable")


def test_a_job_that_is_given_back_says_what_keeps_its_runtime_from_starting(still):
    show_times_that_sort(still.clock)
    still.runtime(lambda *_: Outcome(127, "not found", transient=True, started=False))
    still.start()
    first = [still.add() for _ in range(3)]
    until(lambda: still.store.get(first[-1]).status == "Retrying")
    details = still.store.details(first[-1])
    assert details.attempts == [], "none ran"
    assert still.workers.outlook(Queued(first[-1], "verbatim", 0, "test"), details.due_time) == (
        None, f"tried again at {details.due_time}: qpu cannot be started: not found")


def test_until_all_that_wait_are_loaded_nobody_knows_how_many_are_before_a_job(lab):
    lab.runtime()
    numbers = lab.add(count=2)
    gate = threading.Event()
    store = lab.store

    def waiting():
        gate.wait(10)
        yield from store.waiting()

    lab.start(waiting=waiting)
    lab.workers.pause("qpu", "cable")
    job = Queued(numbers[1], "verbatim", 0, "test")
    assert lab.workers.outlook(job, None) == (None, "qpu is paused: cable")
    lab.workers.resume("qpu")
    assert lab.workers.outlook(job, None) == (None, "those that waited at the start to be loaded")
    lab.workers.pause("qpu", "cable")
    gate.set()
    until(lambda: lab.workers.outlook(job, None) == (1, "qpu is paused: cable"))


def test_a_job_whose_attempt_a_crash_left_behind_says_so(lab):
    show_times_that_sort(lab.clock)
    lab.runtime()
    number = lab.add()
    lab.store.claim(number, "qpu")
    left = [True]
    lab.start(left_over=lambda *_: left[0])
    job = Queued(number, "verbatim", 0, "test")
    lab.clock.wall += 60
    assert lab.workers.outlook(job, lab.store.details(number).due_time)[1] == (
        "the end of what a crash of the server left of its last attempt")
    left[0] = False
    assert lab.end(number).status == "Success"


def test_a_job_is_retrying_while_it_runs_again(lab):
    attempt = Blocked()
    lab.runtime(lambda task, interrupted: BUSY if task.attempt == 1 else attempt(task, interrupted))
    lab.start()
    number = lab.add()
    attempt.wait()
    job = lab.store.get(number)
    assert (job.status, job.runtime, job.return_code) == ("Retrying", "qpu", None)
    assert job.start_time and job.end_time is None
    attempt.give(DONE)
    assert lab.end(number).status == "Success"


def test_an_attempt_is_counted_before_it_begins(lab):
    seen = []

    def play(*_):
        seen.extend(lab.store.running())
        return DONE
    lab.runtime(play)
    lab.start()
    lab.end(lab.add())
    assert seen == [[(1, 1, "verbatim", "qpu")]]


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


def defect(*_):
    """What goes wrong although it cannot."""
    raise ZeroDivisionError("a defect")


@pytest.mark.parametrize("write", ["claim", "settle", "settle_and_claim"])
def test_a_defect_of_a_write_ends_at_most_its_job_and_others_go_on(lab, caplog, write):
    broken = [defect]

    def once(*arguments):
        return (broken.pop() if broken else getattr(lab.store, write))(*arguments)
    qpu = lab.runtime()
    for _ in range(3):
        lab.add()
    lab.start(**{write: once})
    codes = [lab.end(number).return_code for number in (1, 2, 3)]
    until(lambda: not lab.workers.busy())
    expected = {"claim": [70, 0, 0], "settle": [0, 0, 70], "settle_and_claim": [0, 0, 0]}
    assert codes == expected[write] and not broken
    assert qpu.order == ([2, 3] if write == "claim" else [1, 2, 3])
    if write != "settle_and_claim":
        assert lab.store.get(1 if write == "claim" else 3).runtime_error == (
            "internal error; the server's log has it")
        assert "a defect" in caplog.text


def test_of_two_jobs_whose_writes_are_defective_together_only_the_one_ends_whose_fault_it_is(lab):
    def claim(number, runtime):
        return defect() if number == 2 else lab.store.claim(number, runtime)
    lab.runtime()
    for _ in range(3):
        lab.add()
    lab.start(claim=claim, settle_and_claim=lambda *_: defect())
    assert [lab.end(number).return_code for number in (1, 2, 3)] == [0, 70, 0]


def test_what_the_store_cannot_take_now_is_written_later_and_said_once(lab, caplog):
    refusals = [StoreError("no room on the disk") for _ in range(3)]

    def settle(endings):
        if refusals:
            raise refusals.pop()
        lab.store.settle(endings)
    lab.runtime()
    lab.start(settle=settle)
    assert lab.end(lab.add()).status == "Success"
    assert caplog.text.count("waiting for the database: no room on the disk") == 1


# Who takes what

def test_a_free_runtime_takes_the_oldest_job_that_is_due(lab):
    first = Blocked()

    def play(task, interrupted):
        return first(task, interrupted) if len(qpu.ran) == 1 else DONE
    qpu = lab.runtime(play, modes=("verbatim", "simulation"))
    lab.start()
    lab.add()
    first.wait()
    modes = ("simulation", "verbatim", "verbatim", "simulation", "verbatim")
    others = [lab.add(mode) for mode in modes]
    first.give(BUSY)
    lab.end(others[-1])
    lab.end(1)
    order = qpu.order
    order.pop(order.index(1, 1))        # tried again when it was due
    assert order == [1, 2, 3, 4, 5, 6]


def test_a_job_that_is_due_again_goes_before_younger_ones(still):
    second = Blocked()

    def play(task, interrupted):
        if task.id == 2:
            return second(task, interrupted)
        return BUSY if (task.id, task.attempt) == (1, 1) else DONE
    qpu = still.runtime(play)
    still.start()
    still.add(count=4)
    second.wait()
    still.clock.seconds += 1
    until(lambda: still.workers.queued() == 3)      # 3, 4, and 1 when its alarm has rung
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
    meeting = threading.Barrier(4)      # of the test and three attempts, which run at once

    def play(*_):
        meeting.wait(20)
        return DONE
    qpu = lab.runtime(play, slots=3)
    lab.start()
    lab.add(count=3)
    meeting.wait(20)
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

def test_a_runtime_that_does_not_start_is_set_aside_and_says_so_once_until_it_starts_again(
        lab, caplog):
    states = []
    reasons = []

    def play(*_):
        described = lab.workers.describe("qpu")
        states.append(described["state"])
        reasons.append(described["reason"])
        return GONE if len(states) < 12 else DONE
    qpu = lab.runtime(play)
    lab.start()
    numbers = lab.add(count=30)
    assert {lab.end(number).status for number in numbers} == {"Success"}
    assert {attempt for _, attempt, _ in qpu.ran} == {1}        # its jobs are not burnt down
    assert reasons == [None] * 3 + ["not found"] * 9 + [None] * (len(states) - 12)
    assert states == ["busy"] * 3 + ["failing"] * 9 + ["busy"] * (len(states) - 12)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "runtime qpu is set aside: it failed to start 3 times in a row (not found); "
                  "its jobs wait, and it is tried again"),
        ("WARNING", "runtime qpu starts again")]


def test_a_runtime_that_is_set_aside_is_tried_again_after_pauses_that_grow_to_a_minute(lab):
    """A single job gets there, too, and loses no attempt meanwhile."""
    qpu = lab.runtime(lambda *_: GONE if len(qpu.ran) < 12 else DONE)
    lab.dice = 0.0
    lab.start()
    assert lab.end(lab.add()).status == "Success"
    assert [attempt for _, attempt, _ in qpu.ran] == [1] * 12
    for pause, expected in zip(qpu.pauses()[2:], (1, 2, 4, 8, 16, 32, 60, 60, 60)):
        # The job's own delay may begin when the pause has ended.
        assert expected <= pause <= expected + 1


def test_only_starts_that_fail_in_a_row_count(lab, caplog):
    # Whose turn it is depends on delays: no job may run out of attempts.
    qpu = lab.runtime(lambda task, _: GONE if len(qpu.ran) % 3 else DONE, attempts=100)
    lab.start()
    numbers = lab.add(count=10)
    assert {lab.end(number).status for number in numbers} == {"Success"}
    assert "set aside" not in caplog.text


def test_a_start_that_fails_is_no_attempt_also_where_there_is_only_one(lab, caplog):
    caplog.set_level("INFO")
    qpu = lab.runtime(lambda *_: GONE if len(qpu.ran) < 5 else DONE, attempts=1)
    lab.start()
    number = lab.add()
    assert lab.end(number).status == "Success"
    assert [attempt for _, attempt, _ in qpu.ran] == [1] * 5
    kept = lab.store.details(number).attempts
    assert [(one.attempt, one.return_code) for one in kept] == [(1, 127), (1, 127), (1, 0)]
    assert f"job {number}, attempt 1 on qpu: return code 127, not found; tried again" in caplog.text
    assert "runtime qpu is set aside: it failed to start 3 times in a row" in caplog.text


def test_another_runtime_of_the_mode_takes_over_what_one_does_not_start(lab, caplog):
    failed = threading.Semaphore(0)

    def play_broken(*_):
        failed.release()
        return GONE

    def play_sound(task, _):
        if task.id == 1:
            for _ in range(3):
                assert failed.acquire(timeout=20)
        return DONE
    lab.runtime(play_broken, "broken")
    sound = lab.runtime(play_sound, "sound")
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
        until(lambda failures=failures: len(qpu.ran) == failures)
        until(lambda: not still.workers.busy())
    still.add(count=5)
    assert still.workers.describe("qpu")["state"] == "failing"
    qpu.play = trial
    still.clock.seconds += 1.0
    trial.wait()
    still.workers.resume("qpu")             # has all its workers look again
    assert len(qpu.ran) == 4 and len(still.workers.describe("qpu")["running"]) == 1
    qpu.play = DONE
    trial.give(DONE)
    still.clock.seconds += 60
    assert {still.end(number).status for number in range(1, 9)} == {"Success"}


def test_a_runtime_that_is_set_aside_is_tried_out_with_another_job_than_the_one_that_did_it(still):
    still.dice = 0.0
    qpu = still.runtime(lambda task, _: GONE if task.id == 1 else DONE)
    still.start()
    still.add()
    for failures in (1, 2, 3, 4):
        until(lambda failures=failures: len(qpu.ran) == failures and not still.workers.busy())
        still.clock.seconds += 1.0      # it is due again, after the fourth sooner than the runtime
    numbers = still.add(count=2)
    until(lambda: still.workers.queued() == 3)
    assert still.workers.describe("qpu")["state"] == "failing" and len(qpu.ran) == 4
    still.clock.seconds += 1.0
    still.end(numbers[-1])
    assert qpu.order[:5] == [1, 1, 1, 1, 2], "not the oldest"


def test_a_runtime_that_is_set_aside_is_tried_out_with_the_job_that_did_it_if_there_is_no_other(
        lab):
    qpu = lab.runtime(lambda *_: GONE if len(qpu.ran) < 5 else DONE)
    lab.start()
    assert lab.end(lab.add()).status == "Success"
    assert qpu.order == [1] * 5


# A warm runtime

def test_a_warm_runtime_that_does_not_start_is_set_aside_before_a_job_comes(still, caplog):
    qpu = still.runtime()
    starts = []

    def start(_, may_start):
        starts.append(may_start)
        return GONE if may_start else None
    qpu.rest = start
    still.start()
    until(lambda: still.workers.describe("qpu")["state"] == "failing")
    assert still.workers.describe("qpu")["reason"] == "not found"
    assert still.workers.states()["verbatim", "failing"] == 1
    until(lambda: starts == [True] * 3 + [False])
    for pause, count in ((1.0, 6), (2.0, 8)):
        still.clock.seconds += pause
        until(lambda count=count: len(starts) == count)
    assert starts == [True] * 3 + [False, True] * 2 + [False]
    assert caplog.text.count("is set aside") == 1
    outcomes = [Outcome(0)]
    qpu.rest = lambda *_: outcomes.pop() if outcomes else None
    still.clock.seconds += 4.0
    until(lambda: still.workers.describe("qpu")["state"] == "idle")
    assert "runtime qpu starts again" in caplog.text


def test_a_paused_runtime_is_not_started_to_be_warm(lab):
    allowed = queue.SimpleQueue()
    qpu = lab.runtime()
    qpu.rest = lambda _, may_start: allowed.put(may_start)
    lab.store.pause("qpu", "cable")
    lab.start()
    assert allowed.get(timeout=20) is False
    lab.workers.resume("qpu")
    assert allowed.get(timeout=20) is True


def test_a_runtime_shows_its_device(lab):
    qpu = lab.runtime(slots=2)
    lab.start()
    assert lab.workers.describe("qpu")["device"] is None
    qpu.slots[0].device = '{"v": 1}'
    assert lab.workers.describe("qpu")["device"] == {"v": 1}


# What is said after an attempt

def test_what_a_runtime_says_after_an_attempt_is_stored_with_it(lab):
    kept = queue.SimpleQueue()
    qpu = lab.runtime()
    lab.start(keep_log=lambda *said: kept.put(said))
    lab.end(lab.add())
    late = (1, 1, jobs.Log(b"late words", 3))
    qpu.slots[0].late.append(late)
    qpu.slots[0].wake()                 # as one that has read something
    assert kept.get(timeout=20) == late


def test_late_words_that_cannot_be_stored_now_are_stored_later_and_at_a_stop_too(lab, caplog):
    kept = []
    refusals = [StoreError("no room on the disk")]

    def keep(*said):
        if refusals:
            raise refusals.pop()
        kept.append(said)
    qpu = lab.runtime()
    lab.start(keep_log=keep)
    lab.end(lab.add())
    late = (1, 1, jobs.Log(b"late words", 0))
    qpu.slots[0].late.append(late)
    qpu.slots[0].wake()
    until(lambda: kept == [late])
    assert "waiting for the database: no room on the disk" in caplog.text
    qpu.slots[0].late.append(late)      # nobody is woken
    lab.workers.stop()
    assert kept == [late] * 2


def test_a_defect_in_a_rest_is_logged_and_the_worker_goes_on(lab, caplog):
    defects = [ZeroDivisionError("a defect")]

    def rest(*_):
        if defects:
            raise defects.pop()
    lab.runtime().rest = rest
    lab.start()
    until(lambda: "a defect" in caplog.text)
    assert lab.end(lab.add()).status == "Success"


# attempts, pause_after

def test_a_section_says_how_often_a_job_is_tried(lab):
    twice = lab.runtime(BUSY, attempts=2)
    once = lab.runtime(BUSY, "once", modes=("simulation",), attempts=1)
    lab.start()
    assert lab.end(lab.add()).return_code == lab.end(lab.add("simulation")).return_code == 75
    assert (len(twice.ran), len(once.ran)) == (2, 1)


@pytest.mark.parametrize("interrupted", ["retry", "fail"])
def test_with_one_attempt_no_job_runs_twice_whatever_cut_it_off(lab, interrupted):
    crashed = lab.add()
    lab.store.claim(crashed, "qpu")     # as if the server had been killed now
    attempt = Blocked()
    qpu = lab.runtime(attempt, attempts=1, interrupted=interrupted)
    lab.start()
    assert told(lab.store.get(crashed)) == CUT_OFF
    stopped = lab.add()
    attempt.wait()
    lab.stop()
    lab.open()
    assert told(lab.store.get(stopped)) == CUT_OFF
    assert qpu.order == [stopped]


FAILED = Outcome(3, "too warm")


def test_pause_after_so_many_failed_jobs_in_a_row_the_runtime_is_paused_with_the_reason(lab):
    outcomes = [FAILED, FAILED, DONE, FAILED, FAILED, FAILED, DONE]
    qpu = lab.runtime(lambda task, _: outcomes[task.id - 1], pause_after=3)
    lab.start()
    numbers = lab.add(count=7)
    lab.end(numbers[5])
    shown = lab.workers.describe("qpu")
    assert (shown["state"], shown["reason"]) == (
        "paused", "3 jobs failed in a row, the last, job 6, with 3: too warm")
    assert "qpu" in lab.store.pauses() and qpu.order == numbers[:6]
    lab.workers.resume("qpu")
    assert lab.end(numbers[6]).status == "Success"


def test_pause_after_begins_anew_at_a_resume_and_counts_neither_retries_nor_cancels(lab):
    attempt = Blocked()
    qpu = lab.runtime(lambda task, _: BUSY if task.attempt < 3 else FAILED, pause_after=2)
    lab.start()
    lab.end(lab.add())
    lab.workers.resume("qpu")
    lab.end(lab.add())
    until(lambda: lab.workers.describe("qpu")["state"] == "idle")       # its end is on disk first
    qpu.play = attempt
    number = lab.add()
    attempt.wait()
    assert told(lab.workers.cancel(number)) == CANCELLED
    until(lambda: lab.workers.describe("qpu")["state"] == "idle")
    qpu.play = FAILED
    lab.end(lab.add())
    assert lab.workers.describe("qpu")["state"] == "paused"


def test_an_outcome_that_asks_for_it_pauses_the_runtime_before_its_job_has_ended(lab):
    lab.runtime(Outcome(76, "no id", pause="no ids"))
    lab.start()
    first, second = lab.add(count=2)
    assert lab.end(first).return_code == 76
    shown = lab.workers.describe("qpu")
    assert (shown["state"], shown["reason"]) == ("paused", "no ids")
    assert lab.store.get(second).start_time is None


def test_a_pause_of_the_server_does_not_replace_that_of_a_person(lab):
    attempt = Blocked()
    lab.runtime(attempt, pause_after=1)
    lab.start()
    number = lab.add()
    attempt.wait()
    lab.workers.pause("qpu", "cable")
    attempt.give(FAILED)
    lab.end(number)
    assert lab.workers.describe("qpu")["reason"] == "cable"


# After a restart

CUT_OFF = ("Runtime Error", 137, "interrupted, outcome unknown")


def told(job):
    return job.status, job.return_code, job.runtime_error


def test_jobs_that_waited_run_in_order_after_a_restart(lab):
    qpu = lab.runtime()
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
    assert told(job) == CUT_OFF
    assert job.runtime == "qpu" and job.start_time and job.end_time
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
    assert told(lab.store.get(number)) == CUT_OFF
    assert not qpu.ran


def settled(lab, delay):
    """A job whose first attempt ended with 75, to be tried again after `delay` seconds."""
    number = lab.add()
    task = lab.store.claim(number, "qpu")
    lab.store.settle([jobs.Ending(task, "retry", BUSY, delay)])
    return number


def test_a_delay_holds_across_a_restart(lab):
    qpu = lab.runtime()
    number = settled(lab, 8.0)
    lab.stop()
    lab.open()
    lab.clock.seconds = 5.0             # the monotonic clock of another process
    lab.clock.wall += 3.0               # it was down for so long
    lab.start()
    lab.end(number)
    assert qpu.ran == [(number, 2, 5.0 + 5.0)]


@pytest.mark.parametrize("jump, wait", [(1e9, 0.0), (-1e9, 30.0)], ids=["forwards", "backwards"])
def test_a_wall_clock_that_jumped_during_a_restart_holds_no_job_back_for_longer_than_a_delay_can_be(
        lab, jump, wait):
    qpu = lab.runtime()
    begun = lab.clock.seconds
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


def waiter_for(lab, number):
    """(a thread that waits for the job's end, the list that gets what it is told)."""
    told_waiter = []
    thread = threading.Thread(
        target=lambda: told_waiter.extend(lab.waiting.until_ended([number], 20)))
    thread.start()
    assert lab.waiting.looked.acquire(timeout=20)
    return thread, told_waiter


def test_a_job_that_waits_is_cancelled_at_once_and_never_runs(still):
    qpu = still.runtime()
    still.store.pause("qpu", "")
    still.start()
    number = still.add()
    waiter, told_waiter = waiter_for(still, number)
    job = still.workers.cancel(number)
    assert told(job) == CANCELLED
    assert (job.runtime, job.start_time, bool(job.end_time)) == (None, None, True)
    waiter.join(20)
    assert told_waiter == [job]
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


def test_a_cancel_whose_end_cannot_be_stored_says_so_and_the_job_ends_when_it_can(lab, tmp_path):
    attempt = Blocked()
    lab.runtime(attempt)
    lab.start()
    number = lab.add()
    attempt.wait()
    database = tmp_path / os.path.basename(lab.path)
    database.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="was moved"):
        lab.workers.cancel(number)
    (tmp_path / "away").rename(database)
    assert told(lab.end(number)) == CANCELLED


def test_a_cancelled_job_is_cancelled_also_where_a_stop_would_end_it_as_interrupted(still):
    attempt = Blocked()
    still.runtime(attempt, interrupted="fail")
    still.start()
    number = still.add()
    attempt.wait()
    assert told(still.workers.cancel(number)) == CANCELLED


def test_a_job_that_waits_for_its_next_attempt_is_cancelled_at_once_and_never_runs_again(still):
    qpu = still.runtime(lambda task, _: BUSY if task.id == 1 else DONE)
    still.start()
    number = still.add()
    still.end(still.add())
    assert told(still.workers.cancel(number)) == CANCELLED
    still.clock.seconds += 1
    still.end(still.add())
    assert qpu.order == [1, 2, 3]


def test_a_cancel_that_comes_while_a_stop_gives_the_attempt_back_ends_the_job(lab):
    attempt = Blocked()
    lab.runtime(attempt)
    settling, go, told = threading.Event(), threading.Event(), []

    def settle(endings):
        settling.set()
        assert go.wait(20)
        lab.store.settle(endings)

    lab.start(settle=settle)
    number = lab.add()
    attempt.wait()
    stopping = threading.Thread(target=lab.workers.stop)
    stopping.start()
    assert settling.wait(20)            # it was decided that the attempt is given back
    cancelling = threading.Thread(target=lambda: told.append(lab.workers.cancel(number)))
    cancelling.start()
    until(lambda: lab.workers.runtimes["qpu"].running[number].cancelled)
    go.set()
    cancelling.join(20)
    stopping.join(20)
    assert [(job.status, job.return_code) for job in told] == [("Runtime Error", 130)]


def test_a_job_that_is_cancelled_between_its_turn_and_its_claim_is_counted_once(lab):
    """It waits when the cancel looks, and has its turn before the store hears of the cancel."""
    cancelled = threading.Event()

    def claim_late(*arguments):
        assert cancelled.wait(20)
        return lab.store.claim(*arguments)

    def cancel_late(number):
        lab.workers.resume("qpu")
        until(lab.workers.busy)
        ended = lab.store.cancel(number)
        cancelled.set()
        until(lambda: not lab.workers.busy())
        return ended
    lab.runtime()
    lab.start(claim=claim_late, cancel=cancel_late)
    lab.workers.pause("qpu", "")
    assert told(lab.workers.cancel(lab.add())) == CANCELLED
    lab.workers.pause("qpu", "")
    lab.add()
    assert lab.workers.queued() == 1


def test_others_write_while_thousands_are_cancelled_the_newest_of_which_end_first(lab):
    """A thousand at a time: what is added meanwhile is stored between two groups, and stays."""
    groups = []
    added = []

    def cancel_together(numbers):
        added.append(lab.add())
        groups.append(len(numbers))
        return lab.store.cancel_together(numbers)
    lab.runtime()
    lab.start(cancel_together=cancel_together)
    lab.workers.pause("qpu", "")
    numbers = lab.add(count=2500)[::-1]
    assert lab.workers.cancel_all(numbers) == 2500
    assert groups == [1000, 1000, 500]
    ends = [lab.store.get(number).end_time for number in numbers]
    assert ends == sorted(ends)
    assert [lab.store.get(number).end_time for number in added] == [None] * 3
    assert lab.workers.queued() == 3


def test_the_end_of_a_success_and_the_start_of_the_next_job_are_one_commit(lab):
    calls = []

    def noted(name):
        def call(*arguments):
            calls.append(name)
            return getattr(lab.store, name)(*arguments)
        return call
    lab.runtime(lambda task, _: Outcome(3, "too warm") if task.id == 2 else DONE)
    lab.start(**{name: noted(name) for name in ("claim", "settle", "settle_and_claim")})
    ends = [lab.end(number).return_code for number in lab.add(count=4)]
    until(lambda: not lab.workers.busy())
    assert ends == [0, 3, 0, 0]
    assert calls == ["claim", "settle_and_claim", "settle", "claim", "settle_and_claim", "settle"]


def test_a_job_that_is_cancelled_before_it_is_claimed_with_the_end_of_another_never_runs(lab):
    """It waits when the cancel looks, and has its turn before the store hears of the cancel."""
    first, taken, cancelled = Blocked(), threading.Event(), threading.Event()

    def settle_late(*arguments):
        taken.set()
        assert cancelled.wait(20)
        return lab.store.settle_and_claim(*arguments)

    def cancel_late(number):
        first.give(DONE)
        assert taken.wait(20)
        ended = lab.store.cancel(number)
        cancelled.set()
        return ended
    qpu = lab.runtime(lambda task, asked: first(task, asked) if task.id == 1 else DONE)
    lab.start(settle_and_claim=settle_late, cancel=cancel_late)
    lab.add(count=3)
    first.wait()
    assert told(lab.workers.cancel(2)) == CANCELLED
    assert lab.end(3).status == "Success"
    until(lambda: not lab.workers.busy())
    assert (qpu.order, lab.workers.queued()) == ([1, 3], 0)


def test_a_job_that_has_ended_and_one_that_is_unknown_cannot_be_cancelled(lab):
    lab.runtime()
    lab.start()
    job = lab.end(lab.add())
    with pytest.raises(Ended) as refusal:
        lab.workers.cancel(job.id)
    assert refusal.value.job == job == lab.store.get(job.id)
    with pytest.raises(UnknownJob):
        lab.workers.cancel(99)


@pytest.mark.parametrize("outcome", [
    DONE, Outcome(3, "too warm"), Outcome(124, "too late")], ids=["0", "3", "124"])
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


@pytest.mark.parametrize("outcome", [
    BUSY, GONE, Outcome(137, "died", transient=True)], ids=["75", "127", "137"])
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
    """Three at once, against a worker that takes and ends the job: each is told what it says."""
    lab.runtime(lambda task, interrupted: None if interrupted() else DONE)
    lab.start()
    gate = threading.Barrier(4)
    heard = queue.SimpleQueue()

    def cancel(number):
        gate.wait(20)
        try:
            heard.put(told(lab.workers.cancel(number)))
        except Ended as refusal:
            heard.put(told(refusal.job))
    for _ in range(60):
        number = lab.add()
        cancellers = [threading.Thread(target=cancel, args=(number,)) for _ in range(3)]
        for canceller in cancellers:
            canceller.start()
        gate.wait(20)
        for canceller in cancellers:
            canceller.join(20)
        end = told(lab.end(number))
        assert [heard.get(timeout=20) for _ in cancellers] == [end] * 3
        assert end in (CANCELLED, ("Success", 0, None))


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
    assert resumed["state"] in ("idle", "busy") and resumed["reason"] is None
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


def test_a_pause_that_cannot_be_stored_is_none(lab):
    def refuse(*_):
        raise StoreError("no room on the disk")
    lab.runtime()
    lab.start(pause=refuse)
    with pytest.raises(StoreError):
        lab.workers.pause("qpu", "cable")
    assert lab.workers.describe("qpu")["state"] == "idle"
    assert lab.end(lab.add()).status == "Success"


def test_a_resume_that_comes_during_a_pause_leaves_table_and_memory_of_one_mind(lab):
    other = threading.Thread(target=lambda: lab.workers.resume("qpu"))

    def pause(*said):
        since = lab.store.pause(*said)
        other.start()
        other.join(0.2)             # it has to wait for the pause, or else ends in this time
        return since
    lab.runtime()
    lab.start(pause=pause)
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
    fresh = {"name": "qpu", "modes": ["verbatim"], "protocol": "exec", "slots": 2,
             "state": "idle", "reason": None, "paused_by": None,
             "since": lab.workers.runtimes["qpu"].since,
             "running": [], "ended": 0, "failures": 0, "device": None,
             "failed_in_a_row": 0, "last_error": None, "command": ["none"], "ended_per_minute": []}
    assert lab.workers.describe("qpu") == fresh
    lab.add()
    attempt.wait()
    assert lab.workers.describe("qpu") == {**fresh, "running": [1]}
    lab.add()
    attempt.wait()
    assert lab.workers.describe("qpu") == {**fresh, "running": [1, 2], "state": "busy"}
    for ended, outcome in enumerate((DONE, Outcome(3, "no")), 1):
        attempt.give(outcome)
        until(lambda ended=ended: lab.workers.describe("qpu")["ended"] == ended)
    assert lab.workers.describe("qpu") == {
        **fresh, "ended": 2, "failures": 1, "failed_in_a_row": 1,
        "last_error": "job 2, return code 3: no",
        "ended_per_minute": [2]}


# Stopping

def test_a_drain_starts_no_job_and_tells_when_none_is_left(lab):
    attempt = Blocked()
    tell = threading.Event()
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
    assert told(lab.store.get(number)) == CUT_OFF


def test_a_stop_leaves_no_thread_and_wakes_who_waits(still):
    before = set(threading.enumerate())
    attempt = Blocked()
    still.runtime(attempt, slots=3)
    still.start()
    number = still.add()
    attempt.wait()
    waiter, told_waiter = waiter_for(still, number)
    still.workers.stop()
    waiter.join(20)
    assert [job.id for job in told_waiter] == [number]
    assert set(threading.enumerate()) == before
    still.workers = None
