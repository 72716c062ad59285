#!/usr/bin/env python3
"""Run the scheduler through N random histories, a step at a time, and check it after each step.

    scripts/simulate.py N [SEED] [--steps STEPS] [--folder FOLDER]

As FoundationDB and TigerBeetle test: the real store on a real file and the real scheduler, without
threads; the clock and what runtimes do are made up. A seed makes a history, always the same, of
adds, attempts, ends, cancels, pauses, failures to start, stops, crashes, clock jumps and failing
writes. What has to hold is checked against a model of the rules that is as plain as can be. A
history that fails is shown with its seed: `scripts/simulate.py 1 SEED` repeats it.
"""
import argparse
import contextlib
import logging
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# pylint: disable=wrong-import-position # of this checkout, not of an oqc that is installed

from oqc import jobs
from oqc.database import check, open_writer
from oqc.jobs import (
    Batch, Ended, Outcome, RetryPolicy, RuntimeSpec, Selection, StoreError, Submission)
from oqc.store import Store
from oqc.waiting import Waiting
from oqc.workers import Workers

RUNTIMES = (
    RuntimeSpec("qpu-1", ("x",), ("verbatim",)),
    RuntimeSpec("qpu-2", ("x",), ("verbatim", "simulation"), slots=2),
    RuntimeSpec("qpu-3", ("x",), ("verbatim",), interrupted="fail", attempts=2, pause_after=4),
    RuntimeSpec("echo", None, ("echo",), "echo"))
MODES = {spec.name: spec.modes for spec in RUNTIMES}
SUBMITTERS = ("ada", "bob", "cyd", "dan", "eve")
TAGS = ("rabi-7", "t1")
STEPS = 1000
CHECK_EVERY = 50                    # steps from one check of the whole file to the next
GOOD = Outcome(0, None, "[1]", True)
GONE = Outcome(127, "gone", transient=True, started=False)
OUTCOMES = (                        # what an attempt comes to, the first ones more often
    GOOD, GOOD, GOOD, Outcome(3, "cold"), Outcome(75, "busy", transient=True),
    Outcome(137, "died", transient=True), GONE)


class Wrong(AssertionError):
    """Something that has to hold does not."""


def hold(condition, what, *about):
    """Raise Wrong unless the condition holds."""
    if not condition:
        raise Wrong(what.format(*about))


class HandClock:
    """A clock that stands still until it is moved; a wait moves it."""

    def __init__(self):
        self.seconds = 1000.0
        self.wall = 1_800_000_000.0

    def now(self):
        """Return the UTC time."""
        return self.at(self.wall)

    @staticmethod
    def at(seconds):
        """Return the UTC time so many seconds since 1970."""
        return f"{seconds:020.6f}"

    def ago(self, seconds):
        """Return the UTC time before now."""
        return self.at(self.wall - seconds)

    @staticmethod
    def parse(text):
        """Return seconds since 1970."""
        return float(text)

    def unix(self):
        """Return seconds since 1970."""
        return self.wall

    def monotonic(self):
        """Return seconds that never jump."""
        return self.seconds

    def move(self, seconds):
        """Let time pass."""
        self.seconds += seconds
        self.wall += seconds

    def wait(self, event, seconds):
        """Let that time pass at once, unless the event is set."""
        if not event.is_set():
            self.move(seconds or 0.0)
        return event.is_set()


class Slot:             # pylint: disable=too-few-public-methods # what a slot has to have
    """A slot whose attempts end when the history says so."""

    survivors = ""

    def wake(self):
        """Do nothing: the history asks."""

    def close(self):
        """Do nothing."""


class Told(Waiting):
    """Those who wait: it notes which jobs it was told have ended."""

    def __init__(self, store, clock):
        super().__init__(store, clock)
        self.ended = set()

    def notify(self, ended=()):
        """Note them."""
        ended = list(ended)
        self.ended.update(ended)
        super().notify(ended)


class Accepted(NamedTuple):
    """A job that was acknowledged, as its submitter knows it."""

    id: int
    mode: str
    priority: int
    submitter: str
    runtime: str                    # None: any
    tag: str                        # None: none


# pylint: disable-next=too-many-instance-attributes, too-many-public-methods # a step each
class History:
    """What happens to one server, and the model that tells what has to hold."""

    def __init__(self, seed, folder):
        self.dice = random.Random(seed)
        self.folder = folder
        self.copies = 0
        self.path = str(folder / "oqc.db")
        self.clock = HandClock()
        self.policy = RetryPolicy()
        self.jobs = {}              # {id: Accepted}
        self.final = {}             # {id: how it was when it had ended}
        self.failing = 0            # writes that fail from now on
        self.trail = []             # what was done, for the report
        self.submitters = SUBMITTERS[:self.dice.randint(1, len(SUBMITTERS))]
        self.open()

    # A server

    def open(self):
        """Start a server on the file."""
        self.store = Store(self.path, self.clock, prepare=self.prepare)
        self.told = Told(self.store, self.clock)
        self.workers = Workers(self.store, [(spec, Slot) for spec in RUNTIMES], self.policy,
                               self.clock, self.dice.random, self.told)
        self.running = {}           # {id: attempt}
        self.failures = dict.fromkeys(MODES, 0)     # jobs that failed in a row, on each runtime
        self.unstartable = set()    # runtimes whose program is gone for a while
        self.served = {}            # {(runtime, submitter, priority): number of its last take}
        self.seen = []              # submitters, in the order in which the queue met them
        self.takes = 0
        self.workers.take_over()
        # What a crash cut off may have ended now, when nobody can wait for it.
        self.told.ended.update(job.id for job in self.everything() if job.end_time)
        self.workers.load()
        self.queue = []             # what is due, in the order in which it came
        for page in self.store.waiting():
            for job, due in page:
                if due is None or due <= self.clock.wall:
                    self.enqueue(job.id)

    def prepare(self, path):
        """Return the connection that writes, whose commits fail when the history says so."""
        history = self

        class Writer:
            """It."""

            def __init__(self):
                self.connection = open_writer(path)

            def __getattr__(self, name):
                return getattr(self.connection, name)

            def execute(self, statement, *values):
                """Execute a statement, or fail as a full disk does."""
                if statement == "COMMIT" and history.failing:
                    history.failing -= 1
                    raise history.full()
                return self.connection.execute(statement, *values)

        return Writer()

    @staticmethod
    def full():
        """Return the error of a full disk."""
        return sqlite3.OperationalError("database or disk is full")

    def enqueue(self, number):
        """Note that a job is due."""
        self.queue.append(number)
        submitter = self.jobs[number].submitter
        if submitter not in self.seen:
            self.seen.append(submitter)

    # Steps

    def step(self):
        """Do something."""
        steps = ((self.add, 25), (self.begin, 30), (self.end, 30), (self.cancel, 6),
                 (self.cancel_by_filter, 2),
                 (self.pause, 2), (self.resume, 4), (self.pass_time, 12), (self.jump, 1),
                 (self.fail_writes, 1), (self.stop, 0.5), (self.crash, 0.5),
                 (self.break_or_mend, 1))
        names, weights = zip(*steps)
        do = self.dice.choices(names, weights)[0]
        self.trail.append(do.__name__)
        do()

    def add(self):
        """Add some jobs."""
        submitter = self.dice.choice(self.submitters)
        submissions = [self.submission() for _ in range(self.dice.choice((1, 1, 2, 7)))]
        outcomes = [self.workers.immediate_outcome(one) for one in submissions]
        addition, = self.store.add_together([Batch(submissions, submitter, None, outcomes)])
        if isinstance(addition, Exception):
            hold(isinstance(addition, StoreError), "an add failed: {!r}", addition)
            return
        for job, submission in zip(addition.jobs, submissions):
            self.jobs[job.id] = Accepted(
                job.id, job.mode, submission.priority, submitter, submission.runtime,
                submission.tag)
        self.workers.take_up([addition])
        for queued in addition.queued:
            self.enqueue(queued.id)

    def submission(self):
        """Return a job as somebody sends it."""
        mode = self.dice.choice(("verbatim", "verbatim", "simulation", "echo"))
        able = [name for name, modes in MODES.items() if mode in modes]
        runtime = self.dice.choice((None, None, None, *able))
        priority = self.dice.choice((0, 0, 0, 0, 5, -5))
        code = self.dice.choice((0, 3, 75)) if mode == "echo" else 0
        return Submission("X(90)", mode, seed=1, return_code=code, runtime=runtime,
                          priority=priority, tag=self.dice.choice((None, None, *TAGS)))

    def begin(self):
        """Let a slot take its next job, if it has one."""
        self.begin_on(self.dice.choice(RUNTIMES))

    def begin_on(self, spec):
        """Let a slot of this runtime take its next job, if it has one."""
        runtime = self.workers.runtimes[spec.name]
        if len(runtime.running) >= spec.slots:
            return
        idle = self.expected(spec)
        if runtime.set_aside and runtime.aside_until <= self.clock.seconds:
            idle = self.tried_out_with(spec, idle)
        may_run = runtime.paused is None and not runtime.set_aside
        attempt = self.workers.begin(runtime, Slot())
        if attempt is None:
            hold(not may_run or idle is None, "{} started nothing, though {} is due",
                 spec.name, idle)
            return
        hold(runtime.paused is None, "{} started job {}, though it is paused", spec.name,
             attempt.task.id)
        self.note_start(spec, attempt, idle)

    def note_start(self, spec, attempt, expected):
        """Check that it was right to start an attempt."""
        number = attempt.task.id
        hold(number == expected, "{} started job {}, its next was {}", spec.name, number, expected)
        hold(number not in self.running, "job {} runs twice", number)
        hold(number not in self.final, "job {} runs after its end", number)
        job = self.jobs[number]
        hold(job.runtime in (None, spec.name), "job {} runs on {}", job, spec.name)
        hold(attempt.task.attempt <= 5, "job {} has too many attempts", number)
        self.queue.remove(number)
        self.running[number] = attempt
        self.note_turn(spec, job)

    def note_turn(self, spec, job):
        """Note that a runtime has served a submitter."""
        self.takes += 1
        self.served[spec.name, job.submitter, job.priority] = self.takes

    def tried_out_with(self, spec, number):
        """Return the id of the job with which a runtime that is set aside is tried out: not that
        which it did not start with, if there is another; but that has had its turn."""
        failed_by = self.workers.runtimes[spec.name].failed_by
        runtime = self.workers.runtimes[spec.name]
        if failed_by is None or failed_by.id != number or runtime.paused is not None \
                or runtime.running:
            return number
        self.note_turn(spec, self.jobs[number])
        self.queue.remove(number)
        other = self.expected(spec)
        self.queue.append(number)
        if other is None:               # its turn is noted again when it starts
            self.takes -= 1
            return number
        return other

    def expected(self, spec):
        """Return the id that a runtime has to start next, by the rule as it is told."""
        able = [self.jobs[number] for number in self.queue
                if self.jobs[number].mode in spec.modes
                and self.jobs[number].runtime in (None, spec.name)]
        if not able:
            return None
        return min(able, key=lambda job: (
            -job.priority, self.served.get((spec.name, job.submitter, job.priority), 0),
            self.seen.index(job.submitter), job.id)).id

    def end(self):
        """Let an attempt end, as its runtime or the one who interrupts it has it."""
        if not self.running:
            return
        number = self.dice.choice(sorted(self.running))
        attempt = self.running[number]
        outcome = self.dice.choice(OUTCOMES)
        if attempt.must_end() and self.dice.random() < 0.7:
            outcome = Outcome(130, interrupted=True)
        if attempt.runtime.spec.name in self.unstartable:
            outcome = GONE
        if attempt.task.mode == "echo":
            outcome = jobs.echo(attempt.task.return_code, (75,))
        spec = attempt.runtime.spec
        del self.running[number]
        expected = self.expected(spec)
        following = self.workers.end(attempt, outcome)
        if following is not None:
            self.note_start(spec, following, expected)
        self.note_end(spec, attempt)

    def note_end(self, spec, attempt):
        """Check what became of a job whose attempt is over."""
        job = self.store.get(attempt.number)
        hold(job.end_time is not None or not attempt.cancelled, "job {} was cancelled and goes on",
             job.id)
        if job.end_time is None or job.return_code == jobs.CANCELLED:
            return
        self.failures[spec.name] += 1
        if job.return_code == 0:
            self.failures[spec.name] = 0
        if spec.pause_after and self.failures[spec.name] >= spec.pause_after:
            hold(self.workers.runtimes[spec.name].paused is not None,
                 "{} is not paused after {} failures", spec.name, self.failures[spec.name])

    def cancel(self):
        """Cancel a job, in whatever state it is."""
        if not self.jobs:
            return
        number = self.dice.choice(sorted(self.jobs)[-40:])
        if number in self.running:
            self.workers.interrupt(number)
            return
        try:
            job = self.workers.cancel(number)
            hold(job.return_code == jobs.CANCELLED, "a cancelled job is {}", job)
            hold(number not in self.final, "job {} was cancelled after its end", number)
            if number in self.queue:
                self.queue.remove(number)
        except (Ended, StoreError) as error:
            hold(isinstance(error, StoreError) or number in self.final or self.ended(number),
                 "job {} is said to have ended", number)

    def cancel_by_filter(self):
        """Cancel all jobs of a filter that have not ended; those that run end in a later step, as
        their runtimes have it."""
        tag = self.dice.choice((None, *TAGS))
        by = self.dice.choice((None, *self.submitters) if tag else self.submitters)
        matching = {job.id for job in self.jobs.values()
                    if tag in (None, job.tag) and by in (None, job.submitter)}
        still_open = [number for number in sorted(matching, reverse=True)
                      if not self.ended(number)]
        numbers = self.store.open_jobs(Selection(tag=tag, by=by))
        hold(numbers == still_open, "of tag {}, by {} are open {}, found {}", tag, by, still_open,
             numbers)
        running = [number for number in numbers if number in self.running]
        for number in running:
            self.workers.interrupt(number)
        waiting = [number for number in numbers if number not in self.running]
        with contextlib.suppress(StoreError):
            count = self.workers.cancel_all(waiting)
            hold(count == len(waiting), "{} of {} were cancelled", count, len(waiting))
        for number in waiting:
            if self.ended(number):
                code = self.store.get(number).return_code
                hold(code == jobs.CANCELLED, "job {} was cancelled and ended with {}", number, code)
                if number in self.queue:
                    self.queue.remove(number)

    def ended(self, number):
        """Return whether a job has ended on disk."""
        return self.store.get(number).end_time is not None

    def pause(self):
        """Pause a runtime."""
        with contextlib.suppress(StoreError):
            self.workers.pause(self.dice.choice(RUNTIMES).name, "for the history")

    def resume(self):
        """Resume a runtime."""
        name = self.dice.choice(RUNTIMES).name
        with contextlib.suppress(StoreError):
            self.workers.resume(name)
            self.failures[name] = 0

    def pass_time(self):
        """Let some time pass; what is due is queued."""
        self.clock.move(self.dice.choice((0.1, 1.0, 5.0, 40.0)))
        self.ring()

    def ring(self):
        """Queue what has become due."""
        for number in self.workers.ring_due():
            if number not in self.final and not self.ended(number):
                self.enqueue(number)

    def break_or_mend(self):
        """A program is deleted, or is back."""
        self.unstartable ^= {self.dice.choice(RUNTIMES).name}

    def jump(self):
        """Somebody sets the clock."""
        self.clock.wall += self.dice.choice((-7200.0, -1.0, 60.0, 86400.0))

    def fail_writes(self):
        """The disk is full for a while."""
        self.failing = self.dice.randrange(1, 4)

    def stop(self):
        """Stop in good order and start again."""
        self.failing = 0
        self.workers.drain(self.workers.draining)
        self.workers.stop()
        for number in list(self.running):
            attempt = self.running.pop(number)
            outcome = Outcome(130, interrupted=True)
            if self.dice.random() < 0.3:
                outcome = GOOD
            following = self.workers.end(attempt, outcome)
            hold(following is None, "a job was started during a stop")
        self.look()
        self.store.close()
        self.open()

    def crash(self):
        """Have the machine stop, at once: what is on disk now is all there is."""
        self.failing = 0
        self.look()
        self.copies += 1
        folder = self.folder / str(self.copies)
        folder.mkdir()
        for name in ("oqc.db", "oqc.db-wal", "oqc.db.lock"):
            shutil.copy(os.path.join(os.path.dirname(self.path), name), folder / name)
        self.workers.stop()
        self.store.close()
        self.path = str(folder / "oqc.db")
        self.open()

    # What has to hold

    def look(self):
        """Compare what the store says with what was acknowledged."""
        there = {job.id: job for job in self.everything()}
        hold(set(there) == set(self.jobs), "accepted {}, stored {}", len(self.jobs), len(there))
        for number, job in there.items():
            if number in self.final:
                hold(job == self.final[number], "job {} changed after its end", number)
            elif job.end_time is not None:
                self.final[number] = job
                hold(number not in self.running, "job {} has ended and runs", number)
                hold(number in self.told.ended, "nobody was told that job {} has ended", number)
            else:
                runs = job.start_time is not None
                hold(runs == (number in self.running), "job {} runs: {}", number, runs)
        still = len(there) - len(self.final)
        hold(self.store.status()["idle"] == (still == 0), "idle, with {} open jobs", still)

    def everything(self):
        """Yield all jobs."""
        after = None
        while page := self.store.page(after, 1000):
            yield from map(jobs.Job._make, page)
            after = page[-1][0]

    def finish(self):
        """Let all that waits come to its end."""
        self.failing = 0
        self.unstartable.clear()
        for spec in RUNTIMES:
            self.workers.resume(spec.name)
        for _ in range(100_000):
            if not self.running and len(self.final) == len(self.jobs):
                return
            self.pass_time()
            for spec in RUNTIMES:
                self.workers.resume(spec.name)      # pause_after may have paused it again
                self.failures[spec.name] = 0
                self.begin_on(spec)
            while self.running:
                self.end()
            self.look()
        raise Wrong(f"{len(self.jobs) - len(self.final)} jobs never end")

    def run(self, steps):
        """Do so many steps, and then what is left."""
        for number in range(1, steps + 1):
            self.step()
            if number % CHECK_EVERY == 0:
                self.failing = 0
                self.look()
                faults = list(check(self.path))
                hold(not faults, "check: {}", faults)
        self.finish()
        faults = list(check(self.path))
        hold(not faults, "check: {}", faults)


def run(seed, steps, folder):
    """Run the history of a seed; return whether all held, and say what did not."""
    logging.getLogger("oqc").handlers = [logging.NullHandler()]
    logging.getLogger("oqc").propagate = False
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        history = History(seed, Path(temporary))
        try:
            history.run(steps)
            return True
        except Exception:       # pylint: disable=broad-exception-caught # a defect is a finding
            traceback.print_exc()
            print(f"seed {seed} fails after {len(history.trail)} steps, the last ones: "
                  f"{', '.join(history.trail[-10:])}\n"
                  f"repeat it: scripts/simulate.py 1 {seed} --steps {steps}", file=sys.stderr)
            return False
        finally:
            history.workers.stop()
            history.store.close()


def main():
    """Run as many histories as asked, one on each core; return 1 if any fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, metavar="N", help="how many histories")
    parser.add_argument("seed", type=int, nargs="?", default=1, metavar="SEED",
                        help="seed of the first one; the next has the next [default: 1]")
    parser.add_argument("--steps", type=int, default=STEPS,
                        help="steps in a history [default: %(default)s]")
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None,
                        help="where the files are; in memory a commit is quick "
                             "[default: %(default)s]")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.count)
    with ProcessPoolExecutor() as processes:
        jobs_of_seeds = [processes.submit(run, seed, options.steps, options.folder)
                         for seed in seeds]
        if not all(one.result() for one in jobs_of_seeds):
            return 1
    print(f"{options.count} histories of {options.steps} steps, seeds {options.seed} to "
          f"{options.seed + options.count - 1}: all held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
