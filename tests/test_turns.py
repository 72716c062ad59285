"""Whose turn it is: the queue beside a naive model of the rule, and its promises one by one."""
import queue
import random
import threading
from collections import Counter

import pytest

from oqc.jobs import Queued
from oqc.turns import TurnQueue

RUNTIMES = {"a": ("verbatim",), "b": ("verbatim", "simulation"), "c": ("echo",)}


class Model:
    """The rule as it is told, on a plain list."""

    def __init__(self):
        self.waiting = []
        self.seen = []
        self.served = {}            # {(runtime, submitter, priority): number of its last take}
        self.takes = 0

    def put(self, job):
        """Add a job."""
        self.waiting.append(job)
        if job.submitter not in self.seen:
            self.seen.append(job.submitter)

    def order(self, runtime, job):
        """What the next job of a runtime has the least of."""
        last = self.served.get((runtime, job.submitter, job.priority), 0)
        return -job.priority, last, self.seen.index(job.submitter), job.id

    def take(self, runtime):
        """The id of its next job."""
        able = [job for job in self.waiting
                if job.mode in RUNTIMES[runtime] and job.runtime in (None, runtime)]
        if not able:
            return None
        chosen = min(able, key=lambda job: self.order(runtime, job))
        self.waiting.remove(chosen)
        self.takes += 1
        self.served[runtime, chosen.submitter, chosen.priority] = self.takes
        return chosen.id


def anything(dice, number):
    """A job as it may come."""
    mode = dice.choice(("verbatim", "verbatim", "simulation", "echo"))
    asked = [None, None, *(name for name, modes in RUNTIMES.items() if mode in modes), "gone"]
    return Queued(number, mode, dice.choice((0, 0, 0, 5, -100)), dice.choice("pqrstu"),
                 dice.choice(asked))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_twenty_thousand_random_operations_do_what_the_naive_model_does(seed):
    """100,000 of them together."""
    dice = random.Random(seed)
    turns, model, taken, number = TurnQueue(RUNTIMES), Model(), [], 0
    for _ in range(20_000):
        action = dice.random()
        if action < 0.45:
            number += 1
            job = anything(dice, number)
            turns.put(job)
            model.put(job)
        elif action < 0.85:
            runtime = dice.choice(list(RUNTIMES))
            before = {job.id: job for job in model.waiting}
            expected = model.take(runtime)
            assert turns.take(runtime) == expected
            if expected:
                taken.append(before[expected])
        elif action < 0.93 and taken:           # one that is tried again
            job = taken.pop(dice.randrange(len(taken)))
            turns.put(job)
            model.put(job)
        elif model.waiting:                     # some that are cancelled, one of them long ago
            some = dice.sample(model.waiting, min(len(model.waiting), dice.choice((1, 1, 1, 9))))
            model.waiting = [job for job in model.waiting if job not in some]
            assert turns.remove([*some, *taken[:1]]) == {job.id for job in some}
            assert turns.remove(some) == set()
        assert turns.qsize() == len(model.waiting)
    for mode in ("verbatim", "simulation", "echo"):
        assert turns.count(mode) == sum(job.mode == mode for job in model.waiting)
    kinds = Counter((job.mode, job.runtime) for job in model.waiting)
    assert {kind: count for kind, count in turns.waiting().items() if count} == kinds
    for runtime in RUNTIMES:
        while (expected := model.take(runtime)) is not None:
            assert turns.take(runtime) == expected
        assert turns.take(runtime) is None


@pytest.mark.parametrize("seed", range(20))
def test_ahead_is_how_many_a_runtime_takes_before_a_job(seed):
    dice = random.Random(seed)
    turns = TurnQueue(RUNTIMES)
    waiting = {number: anything(dice, number)._replace(runtime=None) for number in range(1, 60)}
    for job in waiting.values():
        turns.put(job)
    for _ in range(10):
        turns.take("b")
    for number in dice.sample(sorted(waiting), 20):     # the b's among them are not ahead any more
        turns.remove([waiting[number]])
    told, order = {}, []
    for number, job in waiting.items():
        if job.mode in RUNTIMES["b"]:
            told[number] = turns.ahead(job, "b")
    while (number := turns.take("b")) is not None:
        order.append(number)
    assert order and [told[number] for number in order] == list(range(len(order)))


def test_ahead_of_the_first_job_of_somebody_which_is_on_its_way_to_the_queue():
    """An add is stored first, and can be asked for from then on."""
    turns = TurnQueue(RUNTIMES)
    turns.put(Queued(1, "verbatim", 0, "p", None))
    turns.put(Queued(2, "verbatim", 0, "p", None))
    assert turns.ahead(Queued(3, "verbatim", 0, "newcomer", None), "b") == 1


def test_with_one_submitter_the_oldest_job_is_next():
    turns = TurnQueue(RUNTIMES)
    for number in (1, 2, 4, 3):
        turns.put(Queued(number, "verbatim", 0, "p", None))
    assert [turns.take("a") for _ in range(5)] == [1, 2, 3, 4, None]


def test_each_of_k_submitters_starts_one_of_the_next_k_jobs_of_a_runtime():
    turns = TurnQueue(RUNTIMES)
    for number in range(1, 20_001):
        turns.put(Queued(number, "verbatim", 0, "greedy", None))
    assert turns.take("a") == 1
    for name in "pqrs":
        turns.put(Queued(ord(name) * 1000, "verbatim", 0, name, None))
    assert [turns.take("a") for _ in range(5)] == [112_000, 113_000, 114_000, 115_000, 2]


def test_a_priority_goes_before_turns_and_ages():
    turns = TurnQueue(RUNTIMES)
    for number, (priority, submitter) in enumerate(
            ((0, "p"), (-5, "q"), (7, "p"), (7, "p"), (100, "r")), 1):
        turns.put(Queued(number, "verbatim", priority, submitter, None))
    assert [turns.take("a") for _ in range(5)] == [5, 3, 4, 1, 2]


def test_a_job_is_taken_only_by_a_runtime_that_it_asked_for_and_that_serves_its_mode():
    turns = TurnQueue(RUNTIMES)
    turns.put(Queued(1, "verbatim", 0, "p", "b"))
    turns.put(Queued(2, "simulation", 0, "p", None))
    turns.put(Queued(3, "verbatim", 0, "p", "gone"))
    assert turns.take("a") is None
    assert [turns.take("b") for _ in range(3)] == [1, 2, None]
    assert turns.qsize() == 1, "it waits for a runtime that there is not"


def test_it_is_a_queue():
    """put, get, qsize and empty are those of queue.Queue, and safe for threads."""
    turns = TurnQueue(RUNTIMES)
    assert isinstance(turns, queue.Queue) and turns.empty()
    with pytest.raises(queue.Empty):
        turns.get(timeout=0)
    threads = [threading.Thread(target=lambda begin: [
        turns.put(Queued(begin + number, "verbatim", 0, f"p{begin}", None))
        for number in range(1000)], args=(begin,)) for begin in range(0, 8000, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns.qsize() == 8000 and not turns.empty()
    assert sorted(turns.get() for _ in range(8000)) == list(range(8000))


def test_a_million_waiting_jobs_take_16_bytes_each():
    turns = TurnQueue(RUNTIMES)
    import tracemalloc      # pylint: disable=import-outside-toplevel # no other test needs it
    tracemalloc.start()
    for number in range(1, 100_001):
        turns.put(Queued(number, "verbatim", 0, "pqrs"[number % 4], None))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 100_000 < 16
