"""The jobs in SQL: real SQLite in a folder of its own, every transition and every other one,
threads, pages, files."""
import contextlib
import os
import sqlite3
import threading

import pytest
from conftest import until

from oqc import jobs
from oqc.clock import Clock
from oqc.database import INVARIANTS, backup, check, connect_to, open_writer
from oqc.jobs import (
    Addition, Attempt, Batch, DamagedRow, Details, DiskFull, Ending, IdempotencyKey, Job,
    KeyReused, Log, Outcome, Queued, Selection, StoreError, Submission, UnknownJob)
from oqc.store import LARGE, MOST_READERS, IllegalTransition, Store

ECHO = Submission("X(90)", "echo", seed=7)
GOOD = Outcome(0, None, "[1]", True)
BAD = Outcome(3, "cold")
BUSY = Outcome(75, "busy", transient=True)
OUTCOMES = {"succeeded": GOOD, "failed": BAD, "retry": BUSY, "release": BUSY}


class Writer:
    """The connection that writes, which a test can hold up, watch and have fail."""

    def __init__(self, path):
        self.connection = open_writer(path)
        self.statements = []            # what was executed
        self.before = lambda statement: None    # called before each; may block or raise

    @property
    def text_factory(self):
        """What makes texts of bytes."""
        return self.connection.text_factory

    @text_factory.setter
    def text_factory(self, texts):
        self.connection.text_factory = texts

    @property
    def in_transaction(self):
        """Whether there is something to undo."""
        return self.connection.in_transaction

    def execute(self, statement, *values):
        """Execute a statement."""
        self.statements.append(statement)
        self.before(statement)
        return self.connection.execute(statement, *values)

    def close(self):
        """Close the connection."""
        self.connection.close()

    def commits(self):
        """Return how many transactions were committed."""
        return self.statements.count("COMMIT")


class Connections:
    """Make the connections of a store, and keep them."""

    def __init__(self):
        self.writer = None
        self.readers = []
        self.on_connect = lambda reader: None

    def prepare(self, path):
        """Return the one that writes."""
        self.writer = Writer(path)
        return self.writer

    def connect(self, path):
        """Return one that reads."""
        self.readers.append(connect_to(path))
        self.on_connect(self.readers[-1])
        return self.readers[-1]


@pytest.fixture
def connections():
    """The connections of the store that was opened last."""
    return Connections()


@pytest.fixture
def opened(tmp_path, clock, connections):
    """opened(): the store on tmp_path/oqc.db, closed at the end."""
    stores = []

    def make(path="oqc.db", clock=clock):
        connections.readers.clear()
        stores.append(Store(str(tmp_path / path), clock, connections.prepare, connections.connect))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(opened):
    return opened()


@pytest.fixture
def writer(store, connections):
    """The connection with which the store writes."""
    assert store
    return connections.writer


@contextlib.contextmanager
def raw(tmp_path):
    """Another program's connection to the same file, which commits what it did."""
    connection = sqlite3.connect(os.path.join(tmp_path, "oqc.db"))
    with contextlib.closing(connection), connection:
        yield connection


def rows(tmp_path, number=None):
    """All jobs with all their columns as they are on disk, or one of them."""
    with raw(tmp_path) as connection:
        every = connection.execute("SELECT * FROM jobs ORDER BY id").fetchall()
    if number is None:
        return every
    return next(row for row in every if row[0] == number)


def added(store, *submissions):
    return [job.id for job in store.add(submissions or [ECHO], "alice").jobs]


def ending(task, event, outcome=None, delay=0.0):
    return Ending(task, event, outcome or OUTCOMES[event], delay)


class Held:
    """A store whose leader is held inside a commit until `go`, so that what is asked of it
    meanwhile stands in line and makes one group."""

    def __init__(self, store, writer):
        self.store = store
        self.writer = writer
        self.threads = []
        self.results = {}
        self.reached = threading.Event()
        self.may_go = threading.Event()
        writer.before = self._hold
        self.start("held", store.resume, "nobody")
        assert self.reached.wait(20)
        self.commits_before = writer.commits()

    def _hold(self, _statement):
        self.reached.set()
        assert self.may_go.wait(20)

    def start(self, name, write, *arguments):
        """Have a thread do a write, and keep what it returned or raised."""
        def run():
            try:
                self.results[name] = write(*arguments)
            except Exception as error:      # pylint: disable=broad-exception-caught # looked at
                self.results[name] = error
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def ask(self, name, write, *arguments):
        """Have a thread do a write, which stands in line after those before it."""
        in_line = self.store.in_line()
        self.start(name, write, *arguments)
        until(lambda: self.store.in_line() > in_line)

    def go(self):
        """Let the leader go on; return what came of each, after all have ended."""
        self.writer.before = lambda statement: None
        self.may_go.set()
        for thread in self.threads:
            thread.join(20)
        del self.results["held"]
        return self.results

    def commits(self):
        """Return how many transactions committed the writes that were asked for."""
        return self.writer.commits() - self.commits_before - 1      # that of the one that held


# Every transition, and every other one

def waiting(store):
    return added(store)[0]


def running(store):
    """A job that runs."""
    number = waiting(store)
    store.claim(number, "qpu")
    return number


def retrying(store):
    """A job that waits to be tried again."""
    number = waiting(store)
    store.settle([ending(store.claim(number, "qpu"), "retry", delay=5.0)])
    return number


def running_again(store):
    """A job that runs for the second time."""
    number = retrying(store)
    store.claim(number, "qpu")
    return number


def succeeded(store):
    """A job that ended well."""
    number = waiting(store)
    store.settle([ending(store.claim(number, "qpu"), "succeeded")])
    return number


def failed(store):
    """A job that ended with an error."""
    number = waiting(store)
    store.settle([ending(store.claim(number, "qpu"), "failed")])
    return number


def cancelled(store):
    """A job that was cancelled while it waited."""
    number = waiting(store)
    assert store.cancel(number)
    return number


STARTS = (waiting, running, retrying, running_again, succeeded, failed, cancelled)
EVENTS = ("claim", "cancel", "retry", "release", "succeeded", "failed")
NEXT = {                # the status after what may happen, and whether there is a start_time then
    (waiting, "claim"): ("Starting", True),
    (waiting, "cancel"): ("Runtime Error", False),
    (retrying, "claim"): ("Retrying", True),
    (retrying, "cancel"): ("Runtime Error", False),
}
for start_of_attempt in (running, running_again):
    NEXT[start_of_attempt, "retry"] = ("Retrying", False)
    NEXT[start_of_attempt, "release"] = ("Retrying", False)
    NEXT[start_of_attempt, "succeeded"] = ("Success", True)
    NEXT[start_of_attempt, "failed"] = ("Runtime Error", True)


def happen(store, number, event):
    """Have an event happen to a job; whether the store said that it did."""
    if event == "claim":
        return store.claim(number, "qpu") is not None
    if event == "cancel":
        return store.cancel(number) is not None
    attempts = rows(os.path.dirname(store.path), number)[10]
    task = jobs.Task(number, "X(90)", "echo", attempts, 1000, 7, 0)
    try:
        store.settle([ending(task, event)])
        return True
    except IllegalTransition as error:
        assert str(error) == f"job {number}, attempt {attempts}: {event}"
        return False


@pytest.mark.parametrize("event", EVENTS)
def test_what_may_happen_to_a_job_happens_and_nothing_else_changes_a_byte_of_it(
        store, tmp_path, event):
    for start in STARTS:
        start(store)                    # others, to which nothing happens
    numbers = {start: start(store) for start in STARTS}
    before = rows(tmp_path)
    for start, number in numbers.items():
        move = (start.__name__, event)
        happened = happen(store, number, event)
        assert happened == ((start, event) in NEXT), move
        if happened:
            job = store.get(number)
            assert (job.status, job.start_time is not None) == NEXT[start, event], move
            assert (job.end_time is not None) == (event in ("cancel", "succeeded", "failed")), move
    legal = {number for start, number in numbers.items() if (start, event) in NEXT}
    assert [row for row in rows(tmp_path) if row[0] not in legal] == [
        row for row in before if row[0] not in legal]


def test_the_store_takes_the_moves_of_the_one_table_and_no_others():
    names = {"claim": "claimed", "cancel": "failed", "release": "retry"}
    taken = set()
    for (start, event), (status, _) in NEXT.items():
        status_before = "Retrying" if start in (retrying, running_again) else "Starting"
        taken.add((status_before, names.get(event, event), status))
    assert taken == {(*start, end) for start, end in jobs.TRANSITIONS.items()}


def test_the_members_of_a_job_tell_its_story(store, clock):
    number, = added(store)
    created = clock.now()
    told = Job(number, "X(90)", "echo", "Starting", None, None, None, created, None, None)
    assert store.get(number) == told
    clock.seconds += 1
    task = store.claim(number, "qpu")
    assert task == jobs.Task(number, "X(90)", "echo", 1, 1000, 7, 0, "alice")
    assert store.get(number) == told._replace(runtime="qpu", start_time=clock.now())
    clock.seconds += 1
    store.settle([ending(task, "retry", delay=9.0)])
    assert store.get(number) == told._replace(status="Retrying")
    assert list(store.waiting()) == [[(Queued(number, "echo", 0, "alice"), clock.wall + 9.0)]]
    assert not list(store.running())
    task = store.claim(number, "other")
    began = clock.now()
    assert task.attempt == 2 and list(store.running()) == [[(number, 2, "echo", "other")]]
    clock.seconds += 1
    store.settle([ending(task, "failed")])
    assert store.get(number) == Job(number, "X(90)", "echo", "Runtime Error", "other", 3, "cold",
                                    created, began, clock.now())
    assert not list(store.waiting()) and not list(store.running())


# The record

VERBATIM = ECHO._replace(mode="verbatim")
SAID = Log(b"step 1\nstep 2\n" * 50, 7)


def attempted(store, event="succeeded", submission=VERBATIM, **outcome):
    """The task of a job whose attempt ended so."""
    number, = added(store, submission)
    task = store.claim(number, "qpu")
    store.settle([ending(task, event, OUTCOMES[event]._replace(**outcome))])
    return task


def test_an_attempt_is_recorded_as_it_ends_with_what_was_said_in_it(store, clock):
    digest = bytes(range(32))
    began = clock.now()
    number, = added(store, VERBATIM._replace(tag="rabi", note='{"a": 1}'))
    task = store.claim(number, "qpu")
    assert (task.submitter, task.tag, task.note) == ("alice", "rabi", '{"a": 1}')
    running = store.details(number)
    assert running.attempts == [Attempt(1, "qpu", began)]
    clock.seconds += 1
    outcome = BUSY._replace(log=SAID, sent_sha256=digest, device='{"name": "q"}')
    store.settle([ending(task, "retry", outcome, 30.0)])
    details = store.details(number)
    first = Attempt(1, "qpu", began, clock.now(), 75, "busy", digest.hex(), '{"name": "q"}')
    assert details == Details(number, "alice", "rabi", '{"a": 1}', 0, None, 1000, 7, "waiting",
                              clock.at(clock.wall + 30), [first])
    assert (store.log(number, 1), store.log(number, 2)) == (SAID, Log())
    store.settle([ending(store.claim(number, "other"), "failed")])
    details = store.details(number)
    assert (details.state, details.due_time) == ("ended", None)
    assert details.attempts == [first, Attempt(2, "other", clock.now(), clock.now(), 3, "cold")]


def test_an_echo_leaves_no_record_and_neither_does_what_could_not_be_started(store):
    echo = attempted(store, submission=ECHO, log=SAID)
    unstartable = attempted(store, "release", started=False, log=SAID)
    for task in (echo, unstartable):
        assert store.details(task.id).attempts == []
        assert store.log(task.id, 1) == Log()


def test_of_an_attempt_that_was_given_back_and_the_next_one_both_are_recorded(store):
    task = attempted(store, "release", log=SAID)
    again = store.claim(task.id, "qpu")
    assert again.attempt == task.attempt
    store.settle([ending(again, "failed")])
    assert [one.attempt for one in store.details(task.id).attempts] == [1, 1]
    assert (store.log(task.id, 1), store.log(task.id, 2)) == (SAID, Log())


def test_late_words_replace_the_log_of_the_last_attempt_with_this_number(store):
    task = attempted(store, "retry")
    store.keep_log(task.id, 1, SAID)
    assert store.log(task.id, 1) == SAID
    longer = Log(SAID.text + b"late\n", 9)
    store.keep_log(task.id, 1, longer)
    store.keep_log(task.id, 2, SAID)        # which there is not
    assert (store.log(task.id, 1), store.log(task.id, 2)) == (longer, Log())


def test_a_description_of_a_device_is_stored_once_and_goes_with_the_last_attempt_that_has_it(
        store, clock, tmp_path):
    for device in ('{"t1": 30}', '{"t1": 30}', '{"t1": 31}', None):
        attempted(store, log=SAID, device=device)

    def stored():
        with raw(tmp_path) as connection:
            return [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                    for table in ("devices", "attempts", "logs")]

    assert stored() == [2, 4, 4]
    clock.wall += 100
    clock.ago = lambda _: "2026"
    store.prune(50)
    assert stored() == [2, 4, 4]
    clock.ago = lambda _: "2028"
    assert store.prune(50) == 4
    assert stored() == [0, 0, 0]


def test_the_counts_that_are_kept_are_those_of_the_jobs_whatever_happens(store, writer, tmp_path):
    def broken(statement):
        if statement.startswith("INSERT INTO results"):
            raise sqlite3.OperationalError("disk I/O error")

    def counted():
        with raw(tmp_path) as connection:
            return {(state, mode): jobs for state, mode, jobs in connection.execute(
                "SELECT * FROM counts WHERE jobs")}

    first, second, third, _ = added(store, *[VERBATIM] * 4)
    task = store.claim(first, "qpu")
    assert counted() == {("waiting", "verbatim"): 3, ("running", "verbatim"): 1}
    store.settle([ending(task, "retry")])
    store.settle([ending(store.claim(second, "qpu"), "release")])
    assert counted() == {("waiting", "verbatim"): 2, ("retrying", "verbatim"): 2}
    assert store.cancel(third) and store.cancel(second) and not store.cancel(second)
    task = store.claim(first, "qpu")
    assert counted() == {("waiting", "verbatim"): 1, ("running", "verbatim"): 1}
    writer.before = broken
    with pytest.raises(StoreError):
        store.settle([ending(task, "succeeded")])
    writer.before = lambda statement: None
    assert counted() == {("waiting", "verbatim"): 1, ("running", "verbatim"): 1}
    with pytest.raises(IllegalTransition):
        store.settle([ending(task, "succeeded")] * 2)
    assert counted() == {("waiting", "verbatim"): 1}
    assert not list(check(store.path))


def test_an_attempt_is_ended_and_the_next_job_started_together(store, tmp_path):
    first, second = added(store), added(store)
    task = store.claim(*first, "qpu")
    following = store.settle_and_claim(ending(task, "succeeded"), *second, "qpu")
    assert (following.id, following.attempt) == (*second, 1)
    assert [store.get(*number).status for number in (first, second)] == ["Success", "Starting"]
    assert list(store.running()) == [[(*second, 1, "echo", "qpu")]]
    before = rows(tmp_path)
    with pytest.raises(IllegalTransition):
        store.settle_and_claim(ending(task, "succeeded"), *added(store), "qpu")
    assert rows(tmp_path)[:2] == before[:2] and store.get(3).start_time is None
    assert store.settle_and_claim(ending(following, "failed"), *first, "qpu") is None
    assert store.get(*second).status == "Runtime Error"


def test_a_release_costs_no_attempt_and_a_retry_does(store):
    number = running(store)
    task = jobs.Task(number, "X(90)", "echo", 1, 1000, 7, 0, "alice")
    store.settle([ending(task, "release")])
    assert store.claim(number, "qpu").attempt == 1
    store.settle([ending(task, "retry")])
    assert store.claim(number, "qpu").attempt == 2


def test_what_an_attempt_says_that_is_over_is_illegal_while_the_next_one_runs(store, tmp_path):
    number = running_again(store)
    before = rows(tmp_path)
    with pytest.raises(IllegalTransition, match=f"job {number}, attempt 1: succeeded"):
        task = jobs.Task(number, "X(90)", "echo", 1, 1000, 7, 0)
        store.settle([ending(task, "succeeded")])
    assert rows(tmp_path) == before and store.result(number) == ("null", True)


def test_a_job_that_there_is_not_can_be_neither_read_nor_changed(store):
    assert (store.claim(1, "qpu"), store.cancel(1)) == (None, None)
    with pytest.raises(IllegalTransition):
        store.settle([ending(jobs.Task(1, "X(90)", "echo", 1, 1000, 7, 0), "succeeded")])
    for read in (store.get, store.result):
        with pytest.raises(UnknownJob):
            read(1)


def test_an_ending_that_is_illegal_leaves_the_others_of_its_call_ended(store, tmp_path):
    good = running(store)
    ended = succeeded(store)
    before = rows(tmp_path, ended)
    tasks = [jobs.Task(number, "X(90)", "echo", 1, 1000, 7, 0, "alice") for number in (ended, good)]
    with pytest.raises(IllegalTransition, match=f"^job {ended}, attempt 1: failed$"):
        store.settle([ending(task, "failed") for task in tasks])
    assert store.get(good).status == "Runtime Error" and rows(tmp_path, ended) == before


def test_a_result_is_kept_as_text_or_json_and_is_null_without_one(store):
    numbers = added(store, *[ECHO] * 4)
    outcomes = [("succeeded", Outcome(0, None, '{"a": 1}', True)),
                ("failed", Outcome(3, "cold", "caf\u00e9\n")), ("succeeded", Outcome(0)),
                ("succeeded", Outcome(0, None, "\udcff\0\u00e9\n"))]
    store.settle([ending(store.claim(number, "qpu"), *outcome)
                  for number, outcome in zip(numbers, outcomes)])
    assert [store.result(number) for number in numbers] == [
        ('{"a": 1}', True), ("caf\u00e9\n", False), ("null", True),
        (b"\xff\0\xc3\xa9\n", False)]
    assert [store.get(number).status for number in numbers] == [
        "Success", "Runtime Error", "Success", "Success"]
    assert not list(check(store.path)), "bytes that are no text are no damage"


def test_what_waits_and_what_runs_comes_back_in_id_order_after_the_store_is_opened_again(opened):
    first = opened()
    numbers = {start: [start(first) for _ in range(2)] for start in STARTS}
    first.close()
    store = opened()
    wait = [number for page in store.waiting() for (number, *_), _ in page]
    assert wait == sorted(numbers[waiting] + numbers[retrying])
    run = [(number, attempt) for page in store.running() for number, attempt, _, _ in page]
    assert run == sorted([(number, 1) for number in numbers[running]]
                         + [(number, 2) for number in numbers[running_again]])


def test_pauses_are_kept_until_they_are_resumed(opened, clock):
    first = opened()
    since = first.pause("qpu", "cable", "carol")
    first.pause("other", "", "oqc")
    first.close()
    store = opened()
    assert store.pauses() == {"qpu": ("cable", since, "carol"), "other": ("", since, "oqc")}
    assert since == clock.now()
    clock.seconds += 1
    store.pause("qpu", "warm", "oqc")
    store.resume("other")
    store.resume("nobody")
    assert store.pauses() == {"qpu": ("warm", clock.now(), "oqc")}


# Ids

def test_an_id_is_never_given_out_again_not_even_that_of_a_deleted_last_job(opened, tmp_path):
    store = opened(clock=Clock())
    numbers = added(store, *[ECHO] * 3)
    for number in numbers:
        store.cancel(number)
    assert store.prune(-1) == 3 and not rows(tmp_path)
    assert added(store) == [4]
    store.cancel(4)
    assert store.prune(-1) == 1
    store.close()
    assert added(opened(clock=Clock())) == [5]


def test_an_addition_that_fails_stores_none_of_its_jobs(store, tmp_path):
    with pytest.raises(sqlite3.IntegrityError):
        store.add([ECHO, ECHO._replace(mode="other")], "alice")
    with pytest.raises(UnicodeEncodeError):
        store.add([ECHO, ECHO._replace(job="\ud800")], "alice")
    assert not rows(tmp_path)
    assert len(added(store, *[ECHO] * 3)) == len(rows(tmp_path)) == 3


def test_a_key_counts_once_for_each_name_for_a_day(store, clock, tmp_path):
    first = store.add([ECHO, ECHO], "alice", IdempotencyKey("k", "digest"))
    again = store.add([ECHO, ECHO], "alice", IdempotencyKey("k", "digest"))
    assert (first.replayed, again.replayed, again.jobs) == (False, True, first.jobs)
    with pytest.raises(KeyReused):
        store.add([ECHO], "alice", IdempotencyKey("k", "another"))
    assert not store.add([ECHO], "bob", IdempotencyKey("k", "another")).replayed
    clock.wall += 86401
    assert not store.add([ECHO], "alice", IdempotencyKey("k", "another")).replayed
    assert [row[15] for row in rows(tmp_path)] == ["alice", "alice", "bob", "alice"]


# What SQL itself refuses

REFUSED = (                         # of which job, and what another program might do to it
    (waiting, "status = 'Running'"), (waiting, "status = NULL"), (waiting, "status = 'success'"),
    (waiting, "mode = 'other'"), (waiting, "job = NULL"), (waiting, "submitter = NULL"),
    (waiting, "status = 'Success'"), (waiting, "status = 'Runtime Error'"),
    (waiting, "status = 'Success', end_time = created_time"),
    (waiting, "status = 'Runtime Error', return_code = 1"),
    (waiting, "end_time = created_time"), (waiting, "return_code = 0"),
    (waiting, "end_time = created_time, return_code = 0"),
    (waiting, "start_time = created_time"), (waiting, "runtime = 'qpu'"),
    (running, "runtime = NULL"), (running, "start_time = NULL"),
    (running, "start_time = '1970-01-01T00:00:00.000000Z'"),
    (running, "status = 'Success', return_code = 3, end_time = start_time"),
    (running, "status = 'Runtime Error', return_code = 0, end_time = start_time"),
    (running, "status = 'Success', return_code = 0, end_time = '1970-01-01T00:00:00.000000Z'"),
    (retrying, "status = 'Success'"), (retrying, "return_code = 75"),
    (succeeded, "status = 'Starting'"), (succeeded, "status = 'Retrying'"),
    (succeeded, "status = 'Runtime Error'"), (succeeded, "return_code = 1"),
    (succeeded, "return_code = NULL"), (succeeded, "end_time = NULL"),
    (succeeded, "status = 'Starting', end_time = NULL"),
    (succeeded, "status = 'Starting', return_code = NULL"),
    (failed, "status = 'odd'"), (failed, "status = 'Success'"), (failed, "return_code = 0"),
    (failed, "status = 'Retrying'"), (failed, "end_time = NULL"),
    (cancelled, "status = 'Starting'"),
    (cancelled, "end_time = '1970-01-01T00:00:00.000000Z'"),
)


def test_the_database_itself_refuses_a_job_that_no_transition_leads_to(store, tmp_path):
    numbers = {start: start(store) for start in STARTS}
    store.close()
    before = rows(tmp_path)
    for start, change in REFUSED:
        with raw(tmp_path) as connection, pytest.raises(sqlite3.IntegrityError):
            connection.execute(f"UPDATE jobs SET {change} WHERE id = {numbers[start]}")
            pytest.fail(f"{start.__name__}: {change}")
    assert rows(tmp_path) == before


def test_every_job_that_a_transition_leads_to_is_sound(store, tmp_path):
    for start in STARTS:
        start(store)
    store.close()
    assert not list(check(str(tmp_path / "oqc.db")))


@pytest.mark.parametrize("change", [
    "status = 'odd'", "end_time = '1970'", "start_time = '1970'",
    "end_time = NULL, return_code = 0, status = 'Success'", "return_code = 3", "attempts = 0"])
def test_a_check_names_a_job_that_no_transition_leads_to(store, tmp_path, change):
    number = succeeded(store)
    store.close()
    with raw(tmp_path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        connection.execute(f"UPDATE jobs SET {change}")
    found = list(check(str(tmp_path / "oqc.db")))
    assert set(found) & {f"job {number}: {what}" for what, _ in INVARIANTS}, found


# Groups

def test_writes_that_come_together_share_a_commit_and_all_are_on_disk(store, writer, tmp_path):
    held = Held(store, writer)
    for place in range(40):
        held.ask(place, added, store, ECHO, ECHO)
    results = held.go()
    numbers = sorted(number for pair in results.values() for number in pair)
    assert numbers == [row[0] for row in rows(tmp_path)]
    assert len(rows(tmp_path)) == 80 and held.commits() == 1


def test_many_threads_at_once_lose_nothing_and_share_no_id(store, tmp_path):
    found = []
    barrier = threading.Barrier(16)

    def client():
        barrier.wait(20)
        for _ in range(10):
            number, = added(store)
            assert store.get(number).status == "Starting"       # what is answered can be read
            if number % 2:
                assert store.cancel(number)
            found.append(number)
    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(1, 161)) == [row[0] for row in rows(tmp_path)]
    assert sum(row[3] == "Runtime Error" for row in rows(tmp_path)) == 80


@pytest.mark.parametrize("wrong, error, commits", [
    (lambda store, task: store.settle([ending(task, "failed")]), IllegalTransition, 1),
    (lambda store, _: store.add([ECHO], "a", IdempotencyKey("k", "another")), KeyReused, 1),
    (lambda store, _: store.add([ECHO, ECHO._replace(mode="other")], "a"),
     sqlite3.IntegrityError, 4),
    (lambda store, _: store.add([ECHO._replace(job="\ud800")], "a"), UnicodeEncodeError, 4),
    (lambda store, _: store.add([ECHO], "a", outcomes=[1]), AttributeError, 4),
], ids=["an illegal transition", "a key with another body", "a constraint", "no text", "a defect"])
def test_what_is_wrong_with_one_write_of_a_group_harms_no_other(
        store, writer, tmp_path, wrong, error, commits):
    store.add([ECHO], "a", IdempotencyKey("k", "digest"))
    ended = succeeded(store)
    number = waiting(store)
    before = rows(tmp_path, ended)
    held = Held(store, writer)
    held.ask("added", added, store)
    held.ask("wrong", wrong, store, jobs.Task(ended, "X(90)", "echo", 1, 1000, 7, 0))
    held.ask("claimed", store.claim, number, "qpu")
    held.ask("also", added, store)
    results = held.go()
    assert isinstance(results["wrong"], error)
    assert (results["added"], results["claimed"].id, results["also"]) == ([4], number, [5])
    assert rows(tmp_path, ended) == before and len(rows(tmp_path)) == 5
    assert store.get(1).status == "Starting" and store.get(number).runtime == "qpu"
    assert held.commits() in (commits, commits - 1), (
        "one for all, or one for each that did nothing wrong")


def test_a_job_that_is_damaged_is_not_started_and_harms_no_other_write_of_a_group(
        store, writer, tmp_path):
    damaged, = added(store, ECHO._replace(job="X(90); rm"))
    with raw(tmp_path) as connection:
        connection.execute("UPDATE jobs SET tag = CAST(x'ff' AS TEXT)")
    number = waiting(store)
    held = Held(store, writer)
    held.ask("added", added, store)
    held.ask("damaged", store.claim, damaged, "qpu")
    held.ask("claimed", store.claim, number, "qpu")
    results = held.go()
    assert isinstance(results["damaged"], DamagedRow) and "job 1: " in str(results["damaged"])
    assert (results["added"], results["claimed"].id) == ([3], number)
    assert store.cancel(damaged, 70, "damaged").id == damaged
    assert store.get(damaged).return_code == 70
    assert store.unusable() is None


def test_batches_that_are_added_together_share_a_commit_and_one_that_is_wrong_harms_no_other(
        store, writer, tmp_path):
    key = IdempotencyKey("k", "digest")
    store.add([ECHO], "alice", key)
    commits = writer.commits()
    first, reused, replayed, second = store.add_together([
        Batch([ECHO], "alice"), Batch([ECHO], "alice", IdempotencyKey("k", "another")),
        Batch([ECHO], "alice", key), Batch([ECHO, ECHO], "bob")])
    assert [job.id for job in first.jobs + second.jobs] == [2, 3, 4]
    assert isinstance(reused, KeyReused) and [job.id for job in replayed.jobs] == [1]
    assert writer.commits() == commits + 1 and len(rows(tmp_path)) == 4
    wrong, good = store.add_together([Batch([ECHO._replace(mode="other")], "alice"),
                                      Batch([ECHO], "alice")])
    assert isinstance(wrong, sqlite3.IntegrityError) and isinstance(good, Addition)
    assert len(rows(tmp_path)) == 5


def test_a_store_is_busy_while_somebody_commits_and_after_a_commit_that_was_slow(
        store, writer, clock):
    assert not store.is_busy()
    held = Held(store, writer)
    assert store.is_busy()
    held.go()
    assert not store.is_busy()

    def slow(statement):
        clock.seconds += statement == "COMMIT"
    writer.before = slow
    added(store)
    assert store.is_busy()
    writer.before = lambda statement: None
    added(store)
    assert not store.is_busy(), "the last commit was quick again"


def test_a_job_whose_end_is_known_is_stored_as_ended_with_one_commit(store, writer, clock):
    outcomes = {0: Outcome(0), 3: Outcome(3, "cold"), 75: None}
    writer.statements.clear()
    addition = store.add([ECHO._replace(return_code=code) for code in outcomes], "alice",
                         outcomes=list(outcomes.values()))
    assert [statement.split()[0] for statement in writer.statements] == [
        "BEGIN", "INSERT", "INSERT", "INSERT", "UPDATE", "COMMIT"]
    now = clock.now()
    as_it_came = ("Starting", None, None, None, now, None, None)
    assert [store.get(number)[3:] for number in (1, 2, 3)] == [
        ("Success", "echo", 0, None, now, now, now),
        ("Runtime Error", "echo", 3, "cold", now, now, now), as_it_came]
    assert [job[3:] for job in addition.jobs] == [as_it_came] * 3
    assert [(end.task, end.event, end.outcome) for end in addition.endings] == [
        (jobs.Task(1, "X(90)", "echo", 1, 1000, 7, 0), "succeeded", Outcome(0)),
        (jobs.Task(2, "X(90)", "echo", 1, 1000, 7, 3), "failed", Outcome(3, "cold"))]
    assert [job.id for page in store.waiting() for job, _ in page] == [3]
    assert not list(store.running())
    assert not list(check(store.path)), "each attempt was counted"
    with pytest.raises(IllegalTransition):
        store.settle(addition.endings[:1])
    assert store.claim(1, "qpu") is store.claim(2, "qpu") is None and not store.cancel(1)


def test_of_large_adds_one_at_a_time_is_before_a_small_write(store, writer):
    held = Held(store, writer)
    held.ask("a", added, store, *[ECHO] * (LARGE + 1))
    for name in "bcd":
        held.start(name, added, store, *[ECHO] * (LARGE + 1))
    held.ask("small", added, store)
    assert held.go()["small"] == [LARGE + 2]
    assert len(store.page(None, 9999)) == 4 * (LARGE + 1) + 1


def test_a_commit_that_goes_wrong_in_any_way_is_told_and_the_next_one_is_done(
        store, writer, monkeypatch, caplog):
    """The disk is away, so that nothing can be undone either, nor asked how much room there is."""
    def away(statement):
        raise sqlite3.OperationalError(f"disk I/O error: {statement}")

    def no_answer(_):
        raise OSError(116, "Stale file handle")
    with monkeypatch.context() as patch:
        writer.before = away
        patch.setattr(os, "statvfs", no_answer)
        for _ in range(2):
            with pytest.raises(StoreError, match="disk I/O error"):
                added(store)
            assert "disk I/O error" in store.unusable()
        error, = store.add_together([Batch([ECHO], "alice")])
        assert isinstance(error, StoreError)
    writer.before = lambda statement: None
    assert added(store) == [1] and store.unusable() is None
    assert "can be written again" in caplog.text


def test_a_defect_of_a_commit_does_not_keep_the_lead(store, writer, caplog):
    def defect(_):
        raise KeyError("defect")
    writer.before = defect
    with pytest.raises(KeyError):
        added(store)
    writer.before = lambda statement: None
    assert added(store) == [1] and not caplog.records, "who asked for it is told"


def test_what_could_not_be_undone_is_undone_before_the_next_write(store, writer, tmp_path):
    failures = [sqlite3.OperationalError("disk I/O error")]

    def fail_once_to_undo(statement):
        if statement == "ROLLBACK" and failures:
            raise failures.pop()
    writer.before = fail_once_to_undo
    with pytest.raises(UnicodeEncodeError):
        store.add([ECHO, ECHO._replace(job="\ud800")], "alice")
    with pytest.raises(StoreError, match="within a transaction"):
        added(store)
    assert added(store) == [1] == [row[0] for row in rows(tmp_path)]


def test_a_database_that_was_moved_away_is_said_before_anything_is_written(store, tmp_path):
    (tmp_path / "oqc.db").rename(tmp_path / "elsewhere")
    assert "was moved, replaced, emptied or deleted" in store.unusable()
    with pytest.raises(StoreError, match="was moved, replaced, emptied or deleted"):
        store.pauses()
    assert not (tmp_path / "oqc.db").exists(), "or a reader would make another"
    (tmp_path / "elsewhere").rename(tmp_path / "oqc.db")
    assert store.unusable() is None


def test_no_more_readers_are_kept_than_some(store, connections):
    """They meet inside their reads, each on a connection of its own."""
    together = threading.Barrier(3 * MOST_READERS)
    closed = []

    def meet(reader):
        reader.set_trace_callback(lambda statement: statement and together.wait(20))
    connections.on_connect = meet
    threads = [threading.Thread(target=store.pauses) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for reader in connections.readers:
        try:
            reader.set_trace_callback(None)
        except sqlite3.ProgrammingError:
            closed.append(reader)
    assert len(connections.readers) == together.parties and not together.broken
    assert len(connections.readers) - len(closed) == MOST_READERS


# Pages

def test_a_page_of_long_jobs_is_cut_before_it_fills_the_memory(store):
    long = ECHO._replace(job="X(1)" + ", X(1)" * 50_000)        # 300 kB
    numbers = added(store, *[long] * 64)
    first = [row[0] for row in store.page(None, 1000)]
    assert first == numbers[:4], "1 MiB"
    assert [row[0] for row in store.page(4, 1000)] == numbers[4:8]
    assert len(store.page(None, 3)) == 3


FILL = """
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?1),
    jobs_to_be (is_open, is_good) AS (
        SELECT ?2 AND n % max(1, ?2) = 0, n % 1000 FROM n)
    INSERT INTO jobs (job, mode, status, runtime, return_code, created_time, start_time, end_time,
                      attempts, shots, seed, echo_code, submitter)
    SELECT 'X(90)', 'echo',
           CASE WHEN is_open THEN 'Starting' WHEN is_good THEN 'Success' ELSE 'Runtime Error' END,
           CASE WHEN is_open THEN NULL ELSE 'echo' END,
           CASE WHEN is_open THEN NULL WHEN is_good THEN 0 ELSE 3 END,
           '2027',
           CASE WHEN is_open THEN NULL ELSE '2027' END,
           CASE WHEN is_open THEN NULL ELSE '2027' END,
           1, 1, 1, 0, 'alice'
    FROM jobs_to_be"""


def fill(tmp_path, count, open_every=0):
    """Have so many jobs in the closed database, of which each `open_every`-th waits and the others
    have ended, each thousandth with an error."""
    with raw(tmp_path) as connection:
        connection.execute(FILL, (count, open_every))


class Steps:
    """What the store's one reader does: its statements, and how many instructions SQLite took for
    them."""

    def __init__(self, store, connections):
        store.pauses()
        self.reader, = connections.readers
        self.statements = []
        self.count = 0
        self.reader.set_trace_callback(self.statements.append)
        self.reader.set_progress_handler(self._step, 10)

    def _step(self):
        self.count += 1

    def of(self, read, *arguments, **named):
        """(what it gave, its instructions in tens, SQLite's plan for its last statement)."""
        self.count = 0
        self.statements.clear()
        found = read(*arguments, **named)
        count = self.count
        explanation = self.reader.execute(f"EXPLAIN QUERY PLAN {self.statements[-1]}").fetchall()
        return found, count, "; ".join(row[3] for row in explanation)


FAILED = Selection(status="Runtime Error")
READS = {
    "a page deep in the list": (
        lambda store, last: store.page(last - 11, 10), "USING INTEGER PRIMARY KEY (rowid>?)"),
    "a page from the end": (
        lambda store, last: store.page(last, 10, True), "USING INTEGER PRIMARY KEY (rowid<?)"),
    "the first page": (lambda store, last: store.page(None, 10), "SCAN"),
    "the last page": (lambda store, last: store.page(None, 10, True), "SCAN"),
    "a page of the failed": (
        lambda store, last: store.page(1, 10, selection=FAILED), "USING INDEX jobs_failed"),
    "a page of the failed, from the end": (
        lambda store, last: store.page(None, 10, True, FAILED),
        "USING INDEX jobs_failed"),
    "the jobs that wait": (
        lambda store, last: list(store.waiting()), "jobs_starting (id>?)"),
    "the jobs that run": (
        lambda store, last: list(store.running()), "jobs_running (id>?)"),
    "one job": (lambda store, last: store.get(last), "USING INTEGER PRIMARY KEY (rowid=?)"),
}


def test_a_page_uses_an_index_and_costs_at_100000_jobs_what_it_costs_at_a_few(
        opened, connections, tmp_path):
    opened().close()
    fill(tmp_path, 1)
    store = opened()
    steps = Steps(store, connections)
    plans = {name: steps.of(read, store, 1)[2] for name, (read, _) in READS.items()}
    store.close()
    fill(tmp_path, 99_999, 10_000)
    store = opened()
    steps = Steps(store, connections)
    for name, (read, expected) in READS.items():
        found, count, plan = steps.of(read, store, 100_000)
        assert expected in plan and "TEMP B-TREE" not in plan, (name, plan)
        assert expected in plans[name], (name, plans[name])
        assert count < 100, (name, "instructions in tens", count)
        assert found or name == "the jobs that run", name
    assert steps.of(store.page, None, 1000)[1] > 100, "it counts"


def test_pages_go_through_all_jobs_once_in_either_order_and_keep_what_is_asked_for(
        opened, tmp_path):
    opened().close()
    fill(tmp_path, 2500, 100)
    store = opened()

    def through(descending=False, **filters):
        after = None
        found = []
        while True:
            page = store.page(after, 400, descending, Selection(**filters))
            found += [row[0] for row in page]
            if len(page) < 400:
                return found
            after = found[-1]
    everything = list(range(1, 2501))
    assert through() == through(mode="echo") == everything
    assert through(descending=True) == everything[::-1]
    assert through(status="Starting") == everything[99::100]
    assert through(status="Runtime Error") == [], "each thousandth is also a hundredth"
    assert through(mode="verbatim") == through(status="Retrying", mode="echo") == []
    assert len(through(status="Success", mode="echo", descending=True)) == 2475
    assert [len(page) for page in store.waiting()] == [25]
    assert Job._make(store.page(2499, 5)[0]) == store.get(2500)


def test_what_waits_is_read_a_thousand_at_a_time(opened, tmp_path):
    opened().close()
    fill(tmp_path, 2500, 1)
    assert [len(page) for page in opened().waiting()] == [1000, 1000, 500]


# Files

def test_a_commit_is_on_disk_before_it_is_told(writer):
    settings = [writer.execute(f"PRAGMA {name}").fetchone()[0] for name in (
        "journal_mode", "synchronous", "foreign_keys", "query_only")]
    assert settings == ["wal", 2, 1, 0]         # 2: FULL, a sync at each commit


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("name", [b"a b%20?mode=ro#&.db", b"caf\xe9.db", "\u00fc.db".encode()])
def test_a_database_may_have_any_name(tmp_path, clock, name, slash):
    """A URI names it to a reader that must not merge its WAL; two slashes at the beginning would
    name a host there."""
    path = f"{slash}{tmp_path}/{os.fsdecode(name)}"
    for count in (1, 2):
        store = Store(path, clock)
        assert added(store) == [count]
        assert not list(check(path))
        store.close()
    assert set(os.listdir(os.fsencode(tmp_path))) == {name, name + b".lock"}


def test_readers_can_write_nothing(store, connections):
    store.pauses()
    reader, = connections.readers
    assert reader.execute("PRAGMA query_only").fetchone() == (1,)
    for statement in ("DELETE FROM jobs", "UPDATE jobs SET job = ''", "CREATE TABLE t (a)",
                      "PRAGMA user_version = 9"):
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute(statement)


def test_a_reader_sees_no_write_that_is_not_committed(store, writer):
    number = waiting(store)
    seen = []

    def see(statement):
        if statement == "COMMIT":
            seen.append(store.get(number))
    writer.before = see
    store.claim(number, "qpu")
    assert seen[0].start_time is None and store.get(number).runtime == "qpu"


def test_readers_are_as_many_as_read_at_once_and_are_used_again(store, connections):
    for _ in range(50):
        store.pauses()
    assert len(connections.readers) == 1


def test_a_wall_clock_that_jumps_back_lets_no_job_start_before_it_was_added_or_end_before_it_began(
        store, clock):
    number, other = added(store, ECHO, ECHO)
    created = clock.now()
    clock.seconds -= 30
    assert clock.now() < created
    task = store.claim(number, "qpu")
    assert store.get(number).start_time == created
    clock.seconds += 35
    store.settle([ending(task, "retry")])
    task = store.claim(number, "qpu")
    began = clock.now()
    clock.seconds -= 20
    store.settle([ending(task, "succeeded")])
    assert store.get(number)[7:] == (created, began, began)
    assert store.cancel(other) and store.get(other).end_time == created


def test_close_leaves_one_file_with_everything_in_it_and_an_empty_lock(
        opened, connections, tmp_path):
    store = opened()
    number = succeeded(store)
    assert sorted(os.listdir(tmp_path)) == ["oqc.db", "oqc.db-shm", "oqc.db-wal", "oqc.db.lock"]
    assert (tmp_path / "oqc.db.lock").read_bytes().startswith(b"in use\n")
    held = Held(store, connections.writer)
    held.ask("last", added, store)
    held.start("close", store.close)
    assert held.go() == {"last": [number + 1], "close": None}, "what stands in line is done"
    assert sorted(os.listdir(tmp_path)) == ["oqc.db", "oqc.db.lock"]
    assert (tmp_path / "oqc.db.lock").read_bytes() == b""
    assert len(rows(tmp_path)) == number + 1


def test_a_closed_store_refuses_every_write_and_waits_for_none(store):
    number = waiting(store)
    store.close()
    for write in (lambda: added(store), lambda: store.cancel(number),
                  lambda: store.claim(number, "qpu"), lambda: store.settle([]),
                  lambda: store.pause("qpu", "")):
        with pytest.raises(StoreError, match="is closed, the server is stopping"):
            write()


def test_a_database_is_one_store_s_at_a_time(opened):
    first = opened()
    with pytest.raises(StoreError, match="another oqc uses this database"):
        opened()
    first.close()
    assert added(opened()) == [1]


def killed(tmp_path):
    """Have the files be those of a server that was killed: its last job is in the WAL alone."""
    store = Store(str(tmp_path / "oqc.db"), Clock())
    added(store)
    copies = {}
    for name in ("oqc.db", "oqc.db-wal", "oqc.db.lock"):
        copies[name] = (tmp_path / name).read_bytes()
    store.close()
    for name, data in copies.items():
        (tmp_path / name).write_bytes(data)
    return copies


def test_a_check_and_a_backup_after_a_kill_leave_the_wal_to_the_next_server(opened, tmp_path):
    files = killed(tmp_path)
    path = str(tmp_path / "oqc.db")
    assert not list(check(path))
    backup(path, str(tmp_path / "copy"))
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert opened("copy").get(1) == opened().get(1)


def test_a_check_and_a_backup_of_a_closed_database_leave_nothing_beside_it(opened, tmp_path):
    opened().close()
    path = str(tmp_path / "oqc.db")
    assert not list(check(path))
    backup(path, str(tmp_path / "copy"))
    assert sorted(os.listdir(tmp_path)) == ["copy", "oqc.db", "oqc.db.lock"]


def test_a_backup_is_one_file_with_every_job_that_was_there_and_replaces_none(store, tmp_path):
    numbers = added(store, *[ECHO] * 1000)
    backup(store.path, str(tmp_path / "copy"))
    added(store)
    assert not list(check(str(tmp_path / "copy")))
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy"]
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(tmp_path / "copy")) as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (len(numbers),)
    with pytest.raises(StoreError, match="is there already"):
        backup(store.path, str(tmp_path / "copy"))


def test_a_disk_on_which_some_writes_fit_and_others_do_not_is_said_once_until_there_is_room(
        store, writer, monkeypatch, caplog):
    def most_pages(count):
        writer.execute(f"PRAGMA max_page_count = {count}").fetchall()

    def almost_full(_):
        return os.statvfs_result((4096, 4096, 100, 2, 2, 9, 9, 9, 0, 255))
    most_pages(writer.execute("PRAGMA page_count").fetchone()[0] + 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", almost_full)
        for _ in range(5):
            with pytest.raises(DiskFull, match="8 KiB of room left on the disk and in the file"):
                added(store, *[ECHO] * 1000)
            store.pause("qpu", "cold")
        assert "8 KiB of room left on the disk and in the file" in store.unusable()
        assert [record.levelname for record in caplog.records] == ["ERROR"]
    added(store)
    most_pages(1 << 30)
    added(store, *[ECHO] * 1000)
    assert store.unusable() is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_a_prune_lets_others_write_after_a_hundred_jobs(opened, connections):
    store = opened(clock=Clock())
    store.add([ECHO] * 250, "alice", outcomes=[GOOD] * 250)
    writer = connections.writer
    left = set()

    def count(statement):
        if statement == "COMMIT":
            left.add(writer.connection.execute("SELECT count(*) FROM jobs").fetchone()[0])
    writer.before = count
    assert store.prune(0) == 250
    assert left == {250, 150, 50, 0}


def test_who_adds_during_a_prune_is_let_in_before_a_few_more_batches(opened):
    """The lock of the leader knows no turns: whoever released it takes it again first."""
    store = opened(clock=Clock())
    store.add([ECHO] * 10_000, "alice", outcomes=[GOOD] * 10_000)
    batches = []
    over = threading.Event()
    slowest = []

    def go_on_adding():
        while not over.is_set():
            before = len(batches)
            added(store, VERBATIM)
            slowest.append(len(batches) - before)
    adding = threading.Thread(target=go_on_adding)
    adding.start()
    store.prune(-1, is_interrupted=lambda: batches.append(0))
    over.set()
    adding.join()
    assert len(batches) > 90 and max(slowest) < 20


def test_a_prune_that_is_interrupted_gives_back_no_more_pages_either(opened, connections):
    store = opened(clock=Clock())
    store.add([ECHO._replace(job="X(90), " * 100_000)], "alice", outcomes=[GOOD])
    interrupted = threading.Event()

    def interrupt(statement):
        if "incremental_vacuum" in statement:
            interrupted.set()
    connections.writer.before = interrupt
    before = connections.writer.connection.execute("PRAGMA freelist_count").fetchone()[0]
    assert store.prune(0, is_interrupted=interrupted.is_set) == 1
    left = connections.writer.connection.execute("PRAGMA freelist_count").fetchone()[0]
    assert interrupted.is_set() and before == 0 and left > 0
    store.prune(0)
    assert connections.writer.connection.execute("PRAGMA freelist_count").fetchone()[0] == 0


def test_no_reader_is_opened_beside_a_wal_that_is_gone(tmp_path, opened, connections):
    """It would make a new one, empty, and read the database without its last jobs."""
    store = opened()
    store.add([ECHO], "alice")
    wal = tmp_path / "oqc.db-wal"
    wal.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="oqc.db-wal: was moved, replaced, emptied or deleted"):
        store.get(1)
    assert not connections.readers and not wal.exists()
    (tmp_path / "elsewhere").rename(wal)
    assert store.get(1).id == 1


def test_a_wal_that_a_reader_made_long_becomes_short_again(tmp_path, opened, monkeypatch):
    monkeypatch.setattr("oqc.database.WAL_KEPT", 1 << 20)
    store = opened()
    added(store)
    wal = tmp_path / "oqc.db-wal"
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM jobs").fetchall()
        while wal.stat().st_size < 6 << 20:
            added(store, *[ECHO] * 2000)
    for _ in range(3):              # the first checkpoints, the second begins anew
        added(store)
    assert wal.stat().st_size == 1 << 20
