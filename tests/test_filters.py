"""Which jobs a filter selects, in a list, a count and a cancel; and what a page of them costs."""
import itertools
import json
import re
import sqlite3
import threading
from urllib.parse import quote

import pytest
from conftest import Server, until

from oqc.api import Api
from oqc.clock import Clock
from oqc.jobs import OPEN, Job, Selection, Stored, Submission
from oqc.keys import Key, Keys
from oqc.messages import Request
from oqc.store import Store

COLUMNS = Job._fields + ("submitter", "tag", "asked_runtime")
MOST = 1500                         # jobs in the database whose pages are followed
TEXT = {"Accept": "text/plain"}


def fill(path, count):
    """Make a database of so many jobs, of all kinds; times go back once and stand still often."""
    Store(str(path), Clock()).close()
    with sqlite3.connect(path, isolation_level=None) as database:
        database.execute("BEGIN")
        database.execute("""
            WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?)
            INSERT INTO jobs (job, mode, status, runtime, return_code, created_time, start_time,
                              end_time, attempts, shots, seed, echo_code, submitter, tag,
                              asked_runtime)
            SELECT 'X(1)', CASE n % 3 WHEN 0 THEN 'verbatim' ELSE 'simulation' END,
                   CASE WHEN n % 10 = 0 THEN 'Starting' WHEN n % 10 = 1 THEN 'Retrying'
                        WHEN n % 10 = 2 THEN 'Runtime Error' ELSE 'Success' END,
                   CASE WHEN n % 10 > 1 OR n % 70 = 1 THEN 'q' || (n % 2) END,
                   CASE WHEN n % 10 = 2 THEN 3 WHEN n % 10 > 2 THEN 0 END,
                   printf('2026-11-23T%02d:%02d:%02d.%06dZ', CASE WHEN n % 50 = 7 THEN 3 ELSE 17 END,
                          n / 600 % 60, n / 10 % 60, 0),
                   CASE WHEN n % 10 > 1 OR n % 70 = 1 THEN '2027' END,
                   CASE WHEN n % 10 > 1 THEN '2027' END, 1, 1000, n, 0,
                   'user' || (n % 4), CASE WHEN n % 2 THEN 'sweep-' || (n / 100) END,
                   CASE n % 5 WHEN 0 THEN 'q1' END
            FROM n""", (count,))
        database.execute("""
            INSERT OR REPLACE INTO counts
            SELECT CASE WHEN start_time IS NOT NULL THEN 'running'
                        WHEN status = 'Retrying' THEN 'retrying' ELSE 'waiting' END, mode, count(*)
            FROM jobs WHERE end_time IS NULL GROUP BY 1, 2""")
        rows = database.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs ORDER BY id").fetchall()
        database.execute("COMMIT")
    database.close()
    return [dict(zip(COLUMNS, row)) for row in rows]


def state_of(job):
    """What a job does."""
    if job["end_time"]:
        return "ended"
    return "running" if job["start_time"] else "waiting"


# What each filter means, said anew.
MEANS = {
    "status": lambda job, value: job["status"] == value,
    "mode": lambda job, value: job["mode"] == value,
    "state": lambda job, value: state_of(job) == value,
    "runtime": lambda job, value: (job["runtime"] or job["asked_runtime"]) == value,
    "tag": lambda job, value: job["tag"] == value,
    "by": lambda job, value: job["submitter"] == value,
    "since": lambda job, value: job["created_time"] >= value,
    "until": lambda job, value: job["created_time"] < value,
}
VALUES = {
    "status": ("Starting", "Retrying", "Success", "Runtime Error"),
    "mode": ("verbatim", "echo"),
    "state": ("waiting", "running", "ended"),
    "runtime": ("q1", "gone"),
    "tag": ("sweep-3", "none"),
    "by": ("user2",),
    "since": ("2026-11-23T17:01", "2027"),
    "until": ("2026-11-23T17:01:30.0", "2026-11-23T17:00:07"),
}
SINGLE = [{name: value} for name, values in VALUES.items() for value in values]
PAIRS = [{**first, **second} for first, second in itertools.combinations(SINGLE, 2)
         if first.keys() != second.keys()]
TRIPLES = [{"tag": "sweep-3", "by": "user1", "state": "waiting"},
           {"status": "Retrying", "by": "user1", "runtime": "q1"},
           {"since": "2026-11-23T17:00:30", "until": "2026-11-23T17:01:30", "mode": "verbatim"}]


def selected(jobs, filters):
    """The ids that filters select, in the order of a list."""
    matching = [job for job in jobs
                if all(MEANS[name](job, value) for name, value in filters.items())]
    if {"since", "until"} & filters.keys():
        matching.sort(key=lambda job: (job["created_time"], job["id"]))
    return [job["id"] for job in matching]


@pytest.fixture(name="filled", scope="module")
def a_store_with_jobs_of_all_kinds(tmp_path_factory):
    """(a store of 1,500 jobs, these)."""
    path = tmp_path_factory.mktemp("filled") / "oqc.db"
    jobs = fill(path, MOST)
    store = Store(str(path), Clock())
    yield store, jobs
    store.close()


def through(store, selection, descending, limit, members=Job._fields):
    """The ids of all pages."""
    found = []
    after = None
    while page := store.page(after, limit, descending, selection, members):
        found += [row[0] for row in page]
        after = found[-1]
        assert len(found) <= MOST, "it goes round"
    return found


@pytest.mark.parametrize("filters", [{}, *SINGLE, *TRIPLES], ids=str)
@pytest.mark.parametrize("descending", [False, True])
def test_the_pages_of_a_filter_have_each_job_that_matches_once_in_order(
        filled, filters, descending):
    store, jobs = filled
    expected = selected(jobs, filters)[::-1 if descending else 1]
    for limit, members in ((1000, Job._fields), (13, Job._fields), (1000, Stored._fields)):
        assert through(store, Selection(**filters), descending, limit, members) == expected, limit


def test_every_pair_of_filters_selects_what_matches_both_in_lists_counts_and_cancels(filled):
    store, jobs = filled
    for filters in (*SINGLE, *PAIRS, *TRIPLES):
        selection = Selection(**filters)
        expected = selected(jobs, filters)
        for descending in (False, True):
            found = through(store, selection, descending, 400)
            assert found == expected[::-1 if descending else 1], (filters, descending)
        matching = [jobs[number - 1] for number in expected]
        still_open = [job["id"] for job in matching if job["status"] in OPEN]
        found = store.open_jobs(selection)
        assert found == still_open[::-1], filters
        assert store.open_jobs(selection, 7) == found[:7], filters
        counts = store.count(selection)
        assert sum(counts.values()) == len(expected), filters
        assert counts["failed"] == sum(job["status"] == "Runtime Error" for job in matching)
        assert counts["running"] == sum(state_of(job) == "running" for job in matching)
        assert counts["waiting"] + counts["retrying"] == sum(
            state_of(job) == "waiting" for job in matching)


@pytest.mark.parametrize("descending", [False, True])
def test_a_page_goes_on_where_its_last_job_was_deleted(tmp_path, descending):
    path = tmp_path / "oqc.db"
    fill(path, 300)
    store = Store(str(path), Clock())
    in_time = Selection(since="2026-11-23T17:00:05", until="2026-11-23T17:00:20")
    everything = through(store, in_time, descending, 1000)
    first = [row[0] for row in store.page(None, 60, descending, in_time)]
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM jobs WHERE id = ?", (first[-1],))
    database.close()
    following = [row[0] for row in store.page(first[-1], 1000, descending, in_time)]
    assert first + following == everything and following
    store.close()


# What it costs

class Steps:
    """How many instructions SQLite takes for reads, in tens."""

    def __init__(self, path):
        self.count = 0
        self.store = Store(str(path), Clock(), connect=self._connect)

    def _connect(self, path):
        reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        reader.set_progress_handler(self._step, 10)
        return reader

    def _step(self):
        self.count += 1

    def of(self, *arguments):
        """The steps for a page of 100 jobs, and how many there were."""
        self.count = 0
        page = self.store.page(*arguments)
        return self.count, len(page)


def test_a_page_of_any_single_filter_costs_at_most_twice_a_plain_one(tmp_path):
    """At 100,000 jobs: a scan of a tenth of them would cost a hundred times as much."""
    fill(tmp_path / "oqc.db", 100_000)
    steps = Steps(tmp_path / "oqc.db")
    full = 0
    filters = [*SINGLE, {"tag": "sweep-500"}, {"since": "2026-11-23T17:30"},
               {"until": "2026-11-23T17:30"}]
    for descending, after in itertools.product((False, True), (None, 50_000)):
        plain, length = steps.of(after, 100, descending)
        assert length == 100
        for one in filters:
            taken, length = steps.of(after, 100, descending, Selection(**one))
            assert taken <= 2 * plain + 5, (one, descending, after, taken, plain)
            full += length == 100
    assert full > 40, "most of these pages are full"
    steps.store.close()


def test_a_tag_or_a_time_beside_another_filter_costs_what_it_costs_alone(tmp_path):
    """Whatever SQLite guesses: without being told it reads a third of all jobs for some pairs."""
    fill(tmp_path / "oqc.db", 20_000)
    steps = Steps(tmp_path / "oqc.db")
    for first, other in itertools.product(({"since": "2027"}, {"tag": "none"}), SINGLE):
        if other.keys() & {"since", "until", "tag"}:
            continue
        for descending in (False, True):
            taken, length = steps.of(None, 100, descending, Selection(**first, **other))
            assert (length, taken < 100) == (0, True), (first, other, descending, taken)
        for read in (steps.store.open_jobs, steps.store.count):
            steps.count = 0
            read(Selection(**first, **other))
            assert steps.count < 100, (first, other, read, steps.count)
    steps.store.close()


def test_what_ended_in_a_minute_is_read_without_the_other_jobs(tmp_path):
    fill(tmp_path / "oqc.db", 20_000)
    steps = Steps(tmp_path / "oqc.db")
    assert not steps.store.ended("2026", "2027") and steps.count < 100
    assert sum(steps.store.ended("2027", "2028").values()) == 16_000
    steps.store.close()


# Over HTTP

JOBS = 60


@pytest.fixture(name="lab", scope="module")
def a_server_with_jobs_of_two_names(tmp_path_factory):
    """A server with jobs that wait: each third is bob's, and twenty in a row have a tag."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab-keys").write_text("ann:ann-key\nbob:user:bob-key\n", encoding="ascii")
    (folder / "lab-keys").chmod(0o600)
    store = Store(str(folder / "oqc.db"), Clock())
    for name in ("emulator", "simulator"):
        store.pause(name, "for this test")
    for number in range(JOBS):
        job = Submission("X(1)", ("verbatim", "simulation")[number % 2], seed=number,
                         tag=f"sweep-{number // 20}", runtime="emulator" if number == 8 else None)
        store.add([job], ("ann", "bob")[number % 3 == 0])
    store.close()
    running = Server(folder, "--keys-file", "lab-keys")
    yield running
    assert running.stop() == 0


def ask(server, method, path, body=None, key="ann-key", headers=None):
    return server.request(method, path, body, key=key, headers=headers)


def ids(answer):
    assert answer.status == 200, answer.body
    return [job["id"] for job in answer.json]


def test_a_list_takes_all_filters_and_me_is_who_asks(lab):
    assert ids(ask(lab, "GET", "/jobs/list/?tag=sweep-1")) == list(range(21, 41))
    bobs = list(range(1, JOBS + 1, 3))
    assert ids(ask(lab, "GET", "/jobs/list/?by=bob")) == bobs
    assert ids(ask(lab, "GET", "/jobs/list/?by=me", key="bob-key")) == bobs
    assert ids(ask(lab, "GET", "/jobs/list/?runtime=emulator")) == [9]
    assert ids(ask(lab, "GET", "/jobs/list/?runtime=gone&state=ended")) == []
    assert ids(ask(lab, "GET", "/jobs/list/?by=me&tag=sweep-0&mode=verbatim&status=Starting"
                               "&state=waiting&since=1h&until=0s", key="bob-key")) == [1, 7, 13, 19]


def test_times_are_taken_to_any_precision_also_encoded_and_with_ages(lab):
    times = [job["created_time"] for job in ask(lab, "GET", "/jobs/list/").json]
    for text in (times[30], times[30][:-1], quote(times[30])):
        assert ids(ask(lab, "GET", f"/jobs/list/?since={text}"))[0] == 31
        assert ids(ask(lab, "GET", f"/jobs/list/?until={text}"))[-1] == 30
    for length in (4, 7, 10, 13, 16, 19, 21, 25):
        begin = times[0][:length]
        expected = [number for number, time in enumerate(times, 1) if time >= begin]
        assert ids(ask(lab, "GET", f"/jobs/list/?since={begin}")) == expected
        assert ids(ask(lab, "GET", f"/jobs/list/?since={begin}Z")) == expected
    assert ids(ask(lab, "GET", "/jobs/list/?until=9d")) == []
    assert len(ids(ask(lab, "GET", "/jobs/list/?since=9d"))) == JOBS


@pytest.mark.parametrize("query", ["tag=sweep-1", "by=bob", "since=1h", "until=0s&by=bob",
                                   "since=1h&order=desc&tag=sweep-2", "status=Starting"])
def test_following_the_links_shows_every_job_once_and_ages_become_times(lab, query):
    path = f"/jobs/list/?{query}&limit=7"
    whole = ids(ask(lab, "GET", f"/jobs/list/?{query}"))
    found = []
    while path:
        answer = ask(lab, "GET", path)
        found += ids(answer)
        link = answer.headers.get("Link", "")
        assert "=1h" not in link and "=0s" not in link
        path = link[1:link.index(">")] if link else None
    assert found == whole and len(whole) > 7


def test_tables_of_jobs_show_by_and_tag(lab):
    for path in ("/jobs/list/?tag=sweep-1&limit=1", "/jobs/21/"):
        header, row = ask(lab, "GET", path, headers=TEXT).body.decode().splitlines()
        assert row[header.index("BY"):].split()[:3] == ["ann", "sweep-1", "X(1)"]
    assert len(ask(lab, "GET", "/jobs/21/").json) == 10


WRONG = {
    "tag=": "tag: expected 1 to 64 letters", "tag=-x": "tag: expected", "by=a%20b": "by: expected",
    "runtime=" + "x" * 65: "runtime: expected", "state=open": "state: expected waiting or running",
    "since=12": "since: expected a UTC time such as 2026-11-23T17:19 or an age",
    "since=2026-13": "since: expected", "since=2026-02-30": "since: expected",
    "until=2026-11-23T17:60": "until: expected", "until=1w": "until: expected",
    "until=2026-11-23T17:19:00.1234567": "until: expected", "tag=a&tag=b": "unknown or repeated",
    "submitter=x": 'unknown or repeated parameter "submitter"',
}


@pytest.mark.parametrize("query", WRONG)
@pytest.mark.parametrize("method, path", [
    ("GET", "/jobs/list/"), ("GET", "/status/"), ("POST", "/jobs/cancel/")])
def test_a_wrong_filter_is_400_and_says_what_is_allowed(lab, method, path, query):
    if path == "/status/" and query == "since=12":
        query += "&mode=echo"       # alone it is a change
    answer = ask(lab, method, f"{path}?{query}")
    assert answer.status == 400, answer.body
    assert answer.detail.startswith(WRONG[query.partition("&mode")[0]])


def test_a_status_with_filters_counts_what_matches(lab):
    assert ask(lab, "GET", "/status/?tag=sweep-2").json == {
        "jobs": {"waiting": 20, "running": 0, "retrying": 0, "succeeded": 0, "failed": 0}}
    text = ask(lab, "GET", "/status/?by=bob", headers=TEXT).body.decode()
    assert re.match(r"WHAT +JOBS\nwaiting +20\n", text)
    assert "idle" in ask(lab, "GET", "/status/?since=12").json, "a change"
    assert ask(lab, "GET", "/status/?since=2026-11&wait=0").json["jobs"]["waiting"] == JOBS
    began = ask(lab, "GET", "/status/?tag=sweep-2&wait=1").json
    assert began["jobs"]["waiting"] == 20, "after a second"


# Waiting and cancelling

@pytest.fixture(name="own")
def a_server_of_its_own(tmp_path, script):
    """A server whose runtime runs each verbatim job for a minute."""
    (tmp_path / "lab-keys").write_text("ann:ann-key\nbob:user:bob-key\n", encoding="ascii")
    (tmp_path / "lab-keys").chmod(0o600)
    program = script("exec sleep 60")
    server = Server(tmp_path, "--keys-file", "lab-keys", "--runtime", f"q={program}",
                    "--drain", "0", "--kill-grace", "0")
    yield server
    assert server.stop() == 0


def jobs_of(count, tag, mode="verbatim"):
    return [{"job": "X(1)", "mode": mode, "tag": tag}] * count


def test_a_status_with_wait_answers_when_no_job_that_matches_is_open(own):
    ask(own, "POST", "/jobs/add/", jobs_of(3, "slow"))
    ask(own, "POST", "/jobs/add/", jobs_of(5, "quick", "simulation"))
    counts = ask(own, "GET", "/status/?tag=quick&wait=60").json["jobs"]
    assert counts == {"waiting": 0, "running": 0, "retrying": 0, "succeeded": 5, "failed": 0}
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(ask(own, "GET", "/status/?tag=slow&wait=60").json["jobs"]))
    waiting.start()
    assert ask(own, "POST", "/jobs/cancel/?tag=slow").json == {"cancelled": 3, "by": None}
    waiting.join(20)
    assert found == [{"waiting": 0, "running": 0, "retrying": 0, "succeeded": 0, "failed": 3}]


class Ending:
    """Those who wait: what they wait for ends at once, by a cancel."""

    def __init__(self, store):
        self.store = store
        self.waited_for = []

    def until_ended(self, numbers, *_):
        """The jobs, ended."""
        self.waited_for.append(list(numbers))
        self.store.cancel_together(numbers)
        return [self.store.get(number) for number in numbers]


def test_a_status_waits_for_more_jobs_than_are_waited_for_at_once(tmp_path):
    store = Store(str(tmp_path / "oqc.db"), Clock())
    store.add([Submission("X(1)", "verbatim", seed=1, tag="many")] * 2500, "ann")
    waiting = Ending(store)
    api = Api(store, None, waiting, Keys([Key("ann", "reader", b"k")]), None, Clock())
    answer = api.handle(Request("GET", "/status/", "tag=many&wait=60", {"api_key": b"k"}))
    assert json.loads(answer.body)["jobs"]["failed"] == 2500
    assert json.loads(answer.body)["jobs"]["waiting"] == 0
    assert sum(waiting.waited_for, []) == list(range(2500, 0, -1))
    store.close()


def test_a_cancel_by_filter_ends_what_matches_and_is_open_and_nothing_else(own):
    mine = ask(own, "POST", "/jobs/add/", jobs_of(4, "a")).json
    ask(own, "POST", "/jobs/add/", jobs_of(3, "a"), key="bob-key")
    ended = ask(own, "POST", "/jobs/add/?wait=20", jobs_of(2, "a", "simulation")).json
    other = ask(own, "POST", "/jobs/add/", jobs_of(2, "b")).json
    until(lambda: ask(own, "GET", "/jobs/list/?state=running").json)
    assert ask(own, "POST", "/jobs/cancel/?tag=a&by=ann", key="bob-key").status == 403
    said = ask(own, "POST", "/jobs/cancel/?tag=a&state=ended", key="bob-key").json
    assert said == {"cancelled": 0, "by": "bob"}
    said = ask(own, "POST", "/jobs/cancel/?tag=a", key="bob-key").json
    assert said == {"cancelled": 3, "by": "bob"}, "narrowed to their own"
    assert [job["return_code"] for job in ask(own, "GET", "/jobs/list/?by=bob").json] == [130] * 3
    assert all(own_job["end_time"] is None for own_job in
               ask(own, "GET", "/jobs/list/?tag=a&by=ann&mode=verbatim").json)
    said = ask(own, "POST", "/jobs/cancel/?tag=a").json
    assert said == {"cancelled": len(mine), "by": None}, "the one that ran, too"
    shown = ask(own, "GET", "/jobs/list/?tag=a&by=ann").json
    assert [job["return_code"] for job in shown] == [130] * 4 + [0] * 2
    assert [job["id"] for job in shown if job["return_code"] == 0] == [job["id"] for job in ended]
    assert ask(own, "POST", "/jobs/cancel/?tag=a").json["cancelled"] == 0
    still = ask(own, "GET", "/jobs/list/?tag=b").json
    assert [job["id"] for job in still] == [job["id"] for job in other]
    assert all(job["end_time"] is None for job in still)
    newest_first = [job["end_time"] for job in shown[1:4]]
    assert shown[0]["end_time"] >= max(newest_first), "what ran ended last"


@pytest.mark.parametrize("query", ["", "?limit=5", "?order=desc", "?after=1", "?wait=1"])
def test_a_cancel_needs_a_filter_and_the_parameters_of_a_page_are_none(lab, query):
    answer = ask(lab, "POST", "/jobs/cancel/" + query)
    assert answer.status == 400 and "tag" in answer.detail
    assert ask(lab, "GET", "/status/?state=waiting").json["jobs"]["waiting"] == JOBS


def test_a_thousand_and_more_are_cancelled_together_and_counted_by_the_status(own):
    ask(own, "POST", "/runtimes/q/pause/")
    for _ in range(3):
        ask(own, "POST", "/jobs/add/", jobs_of(900, "many"))
    assert ask(own, "POST", "/jobs/cancel/?tag=many&since=1h").json["cancelled"] == 2700
    status = ask(own, "GET", "/status/").json
    assert (status["idle"], status["waiting"]["verbatim"]) == (True, 0)
    assert json.loads(ask(own, "GET", "/status/?tag=many").body)["jobs"]["failed"] == 2700
