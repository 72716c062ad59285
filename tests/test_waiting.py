"""Who waits for a job or for a change: places are limited, and each wait gives its own back."""
import threading

import pytest

from oqc.clock import Clock
from oqc.jobs import Job, UnknownJob
from oqc.waiting import Waiting

OPEN = Job(1, "X(1)", "verbatim", "Starting", None, None, None, "T", None, None)
ENDED = OPEN._replace(status="Success", end_time="T")


class OneJob:
    """A store of one job; `asked` is released each time somebody looks at it."""

    def __init__(self):
        self.job = OPEN
        self.asked = threading.Semaphore(0)

    def get(self, number):
        """Return the job."""
        self.asked.release()
        if number != self.job.id:
            raise UnknownJob(number)
        return self.job


@pytest.fixture
def store():
    return OneJob()


def waiter(waiting):
    """(a thread that waits for the job, the list that gets what it is told)."""
    told = []
    thread = threading.Thread(target=lambda: told.extend(waiting.until_ended([1], 20)))
    thread.start()
    return thread, told


def test_a_wait_gives_its_place_back_however_it_ends(store):
    """300 in a row, where one may wait at a time."""
    waiting = Waiting(store, Clock(), most=1)
    for number in range(300):
        assert waiting.until_ended([1], 0) == [OPEN], number
        with pytest.raises(UnknownJob):
            waiting.until_ended([2], 20)
        waiting.for_change(waiting.changes - 1, 20)
    store.job = ENDED
    assert waiting.until_ended([1], 20) == [ENDED]


def test_who_finds_no_place_is_told_so_at_once(store):
    waiting = Waiting(store, Clock(), most=1)
    thread, told = waiter(waiting)
    assert store.asked.acquire(timeout=20)
    assert waiting.until_ended([1], 20) == []
    waiting.for_change(waiting.changes, 20)
    store.job = ENDED
    waiting.notify([1])
    thread.join(20)
    assert told == [ENDED] and waiting.until_ended([1], 20) == [ENDED]


def test_a_wait_hears_of_an_end_that_comes_while_it_looks(store):
    waiting = Waiting(store, Clock())
    get = store.get

    def ends_meanwhile(number):
        job = get(number)
        if store.job is OPEN:
            store.job = ENDED
            waiting.notify([number])
        return job
    store.get = ends_meanwhile
    assert waiting.until_ended([1], 20) == [ENDED]


def test_a_wait_that_runs_out_gives_the_job_as_it_is_then(store, clock):
    waiting = Waiting(store, clock)

    def runs_meanwhile(event, seconds):
        clock.seconds += seconds
        store.job = OPEN._replace(start_time="T")
        return event.is_set()
    clock.wait = runs_meanwhile
    assert waiting.until_ended([1], 20)[0].start_time == "T"


def test_a_stop_ends_all_waits_and_lets_none_begin(store):
    waiting = Waiting(store, Clock())
    thread, told = waiter(waiting)
    assert store.asked.acquire(timeout=20)
    waiting.stop()
    thread.join(20)
    assert told == [OPEN] == waiting.until_ended([1], 20)
    waiting.for_change(waiting.changes, 20)
