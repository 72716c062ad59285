"""The numbers of results, and the records that have them, read back by csv and json whatever a
runtime put out."""
import csv
import io
import json
import math
import sqlite3

import pytest

from oqc import messages, results, text
from oqc.clock import Clock
from oqc.jobs import Stored
from oqc.store import Store

TIME = "2026-11-23T17:19:00.123456Z"
JOB = Stored(7, "X(90), Y(180)", "verbatim", "Success", "qpu-1", 0, None, TIME, TIME, TIME, "alice",
             "rabi-7", '{"angle": 30}', 1000, '{"counts": {"0": 250, "1": 750}}', True)


@pytest.mark.parametrize("result, expected", [
    ('{"counts": {"0": 250, "1": 750}}', (250, 750, 0.75)),
    ('{"counts": {"1": 4}, "probabilities": [0.5, 0.5]}', (0, 4, 1.0)),
    ('{"counts": {"0": 4}}', (4, 0, 0.0)),
    ('{"counts": {"0": 0, "1": 0}, "probabilities": [0.25, 0.75]}', (None, None, 0.75)),
    ('{"probabilities": [0, 1]}', (None, None, 1.0)),
    ('{"counts": {"0": -1, "1": 2}}', (None, None, None)),
    ('{"counts": {"0": "1", "1": "2"}}', (None, None, None)),
    ('{"counts": {"0": true, "1": 2}}', (None, None, None)),
    ('{"counts": {"0": 1.5, "1": 2}}', (None, None, None)),
    ('{"counts": {"0": 1e999, "1": 2}}', (None, None, None)),
    ('{"counts": {"00": 1, "11": 2}}', (None, None, None)),
    ('{"counts": {"0": 10, "1": 10, "2": 20}}', (10, 10, 0.25)),
    ('{"counts": {"0": 1, "1": 1, "2": "many"}}', (None, None, None)),
    ('{"counts": [1, 2]}', (None, None, None)),
    ('{"probabilities": [0.5]}', (None, None, None)),
    ('{"probabilities": [0.5, 1.5]}', (None, None, None)),
    ('{"probabilities": [0.5, true]}', (None, None, None)),
    ('{"probabilities": "ab"}', (None, None, None)),
    ("[1, 2]", (None, None, None)), ("7", (None, None, None)), ('"text"', (None, None, None)),
    ("{}", (None, None, None)),
    ('{"counts": {"1": 4}, "x": "' + "a" * 70000 + '"}', (None, None, None)),
], ids=lambda value: str(value)[:40])
def test_p1_is_what_was_counted_else_what_the_runtime_states_else_nothing(result, expected):
    numbers = results.numbers(result)
    assert numbers[:3] == expected
    assert (numbers.p1_error is None) == (numbers.count_0 is None)


@pytest.mark.parametrize("ones, shots", [(0, 1), (1, 1), (0, 1000), (1000, 1000), (500, 1000)])
def test_the_error_is_the_deviation_of_the_posterior_and_never_0(ones, shots):
    """The variance of Beta(a, b) is ab / ((a + b)^2 (a + b + 1))."""
    a, b = ones + 1, shots - ones + 1
    expected = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))
    assert math.isclose(results.standard_error(ones, shots), expected, rel_tol=1e-12)
    assert expected > 0


@pytest.mark.parametrize("job, p1", [("X(0)", 0.0), ("X(180)", 1.0), ("X(90)", 0.5),
                                     ("X(60)", 0.25), ("X(999)", 0.421782767479885),
                                     ("Z(90), X(0)", 0.0)])
def test_the_ideal_is_that_of_a_perfect_qubit(job, p1):
    assert results.ideal(job) == p1
    assert str(results.ideal(job)) != "-0.0"


def test_a_very_long_job_has_no_ideal():
    pulse = "X(1)"
    longest = ", ".join([pulse] * ((1 << 16) // 6))
    assert results.ideal(longest) is not None
    assert results.ideal(longest + ", X(100), X(100)") is None


HOSTILE = [
    ("text with \"quotes\", commas,\nline\rfeeds\r\n and ; and \0 and \x1b[2J", False),
    ("=1+1", False), ("NaN", False), ("", False), ("\U0001f600 \u2028 \u202e \x85", False),
    ('{\n  "counts": {\r\n"0": 1,\n"1": 3}\n}', True), ('"a\\nb"', True), ("-5", True),
    ('"\\ud800"', True), ("1e999", True), ("9" * 400, True), ("[" * 300 + "]" * 300, True),
    ("null", True), ("true", True), (None, True), ('["\u2028 \u2029 \x85"]', True),
    # damaged, or not to be read by every reader: they are given as texts
    ("{", True), ("[" * 20000 + "]" * 20000, True), ("9" * 5000, True)]
NO_READER = 3                       # how many of these there are
ERRORS = [None, "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\tx", "a,b\"c\nd", "\x1b[2J", "",
          "\0", "\r=1", "\U0001f600 \ufffd"]


def hostile():
    """Jobs with results and errors of every kind."""
    jobs = []
    for number, (result, is_json) in enumerate(HOSTILE, 1):
        jobs.append(JOB._replace(id=number, result=result, is_json=is_json))
    for number, error in enumerate(ERRORS, 100):
        jobs.append(JOB._replace(id=number, runtime_error=error, tag=None, note=None, result=None,
                                 status="Runtime Error", return_code=3, start_time=None))
    return jobs


def records(cut=None):
    """The same as pages of records."""
    rows = [results.record(job, cut) for job in hostile()]
    return iter([rows[:5], rows[5:]])


def expected_result(job):
    """What a reader of a record should find as the result."""
    if job.result is None:
        return None
    unreadable = [result for result, _ in HOSTILE[-NO_READER:]]
    if not job.is_json or job.result in unreadable:
        return job.result
    return json.loads(job.result)


def check(record, job):
    """A record as JSON has it says what the job does."""
    assert tuple(record) == results.RECORD
    assert record["result"] == expected_result(job), job.id
    assert (record["id"], record["runtime_error"]) == (job.id, job.runtime_error)
    assert record["note"] == (json.loads(job.note) if job.note else None)
    assert record["p1_ideal"] == 0.5


def test_as_ndjson_each_record_is_one_line_that_says_the_same():
    data = b"".join(messages.json_lines(records(), results.record_json)).decode()
    lines = data.splitlines()       # at more than line feeds
    assert len(lines) == len(hostile())
    for line, job in zip(lines, hostile()):
        check(json.loads(line), job)


def test_as_json_the_records_are_an_array_with_one_a_line():
    data = b"".join(messages.array(records(), results.record_json)).decode()
    assert len(data.splitlines()) == len(hostile()) + 2
    for record, job in zip(json.loads(data), hostile()):
        check(record, job)


def test_csv_has_the_same_members_in_a_line_a_record_and_runs_no_formula():
    data = b"".join(text.records_csv(records())).decode()
    assert len(data.split("\n")) == len(hostile()) + 2
    rows = list(csv.DictReader(io.StringIO(data, newline="")))
    assert len(rows) == len(hostile())
    for row, job in zip(rows, hostile()):
        assert tuple(row) == results.RECORD
        assert row["id"] == str(job.id)
        result = json.loads(row["result"]) if row["result"] else None
        assert result == expected_result(job) or job.result == "null"
        assert row["note"] == (job.note or "")
        assert not row["runtime_error"].startswith(("=", "+", "-", "@", "\t", "\r"))
        shown = (job.runtime_error or "").replace("\n", "\\x0a").replace("\t", "\\x09")
        shown = shown.replace("\x1b", "\\x1b").replace("\0", "\\x00").replace("\r", "\\x0d")
        assert row["runtime_error"].lstrip("'") == shown.lstrip("'")
    assert data.startswith(",".join(results.RECORD) + "\r\n")


def test_a_table_has_an_aligned_line_for_each_record_in_which_nothing_moves_the_cursor():
    data = b"".join(text.records_text(records())).decode()
    header, *lines = data.split("\n")[:-1]
    assert header.split() == [name.upper() for name in results.RECORD]
    assert len(lines) == len(hostile())
    for character in "\0\r\x1b\x85":
        assert character not in data
    for name, values in (("STATUS", {"Success", "Runtime Error"}), ("SHOTS", {"1000"}),
                         ("P1_IDEAL", {"0.500000"})):
        place = header.index(name)
        assert {line[place:].split("  ")[0].rstrip() for line in lines} == values


def test_a_job_string_can_be_cut():
    long = JOB._replace(job=", ".join(["X(90)"] * 100))
    record = json.loads(results.record_json(results.record(long, 20)))
    assert record["job"] == long.job[:20]
    assert record["p1_ideal"] == results.ideal(long.job)
    assert json.loads(results.record_json(results.record(long)))["job"] == long.job


@pytest.mark.parametrize("cut, size, is_there", [
    (200, 1000, True), (200, 70_000, False), (None, 70_000, True)])
def test_with_cut_a_long_result_is_left_out(cut, size, is_there):
    long = JOB._replace(result='{"counts": {"0": 4, "1": 6}, "wave": "%s"}' % ("w" * size))
    record = json.loads(results.record_json(results.record(long, cut)))
    assert (record["result"] is not None) is is_there


# The request

LINES = {"Accept": "application/x-ndjson"}
CSV = {"Accept": "text/csv"}
TEXT = {"Accept": "text/plain"}


def ndjson(server, query="", headers=()):
    """The records that a query selects."""
    answer = server.request("GET", f"/jobs/results/{query}", headers={**LINES, **dict(headers)})
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.body.splitlines()]


def test_each_format_has_the_jobs_of_a_filter_with_their_results(server):
    added = [server.add(f"X({angle})", "verbatim", tag="formats", note={"angle": angle}, seed=angle)
             for angle in (0, 90, 180)]
    failed = server.add(mode="echo", return_code=3, tag="formats")
    for job in added:
        server.wait(job)
    path = "/jobs/results/?tag=formats"
    records = server.request("GET", path).json
    assert [record["id"] for record in records] == [job["id"] for job in [*added, failed]]
    for record, angle, ideal in zip(records, (0, 90, 180), (0.0, 0.5, 1.0)):
        result = server.result(record).json
        assert record["result"] == result and record["note"] == {"angle": angle}
        assert [record["count_0"], record["count_1"]] == list(result["counts"].values())
        assert record["p1"] == result["counts"]["1"] / 1000
        assert abs(record["p1"] - ideal) < 0.1 and record["p1_ideal"] == ideal
    assert (records[-1]["return_code"], records[-1]["p1"], records[-1]["result"]) == (3, None, None)
    assert ndjson(server, "?tag=formats") == records
    answer = server.request("GET", path, headers=CSV)
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8; header=present"
    rows = list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))
    assert [json.loads(row["result"]) for row in rows[:3]] == [
        record["result"] for record in records[:3]]
    assert [row["p1"] for row in rows] == [
        *(repr(record["p1"]) for record in records[:3]), ""]
    table = server.request("GET", path, headers=TEXT)
    assert table.headers["Content-Type"].startswith("text/plain")
    assert [line.split()[0] for line in table.body.decode().splitlines()] == [
        "ID", *(str(record["id"]) for record in records)]


@pytest.mark.parametrize("accept", ["", "*/*", "text/html, text/csv", "application/json, text/csv",
                                    "image/png", "%%", "text/csvx"])
def test_json_is_what_comes_unless_another_format_is_named_first(server, accept):
    answer = server.request("GET", "/jobs/results/?tag=nothing-has-it", headers={"Accept": accept})
    assert answer.headers["Content-Type"] == "application/json" and answer.body == b"[]\n"


def test_without_a_job_each_format_is_valid(server):
    path = "/jobs/results/?tag=nothing-has-it"
    assert server.request("GET", path, headers=LINES).body == b""
    header = ",".join(results.RECORD).encode() + b"\r\n"
    assert server.request("GET", path, headers=CSV).body == header
    assert server.request("GET", path, headers=TEXT).body.split() == header.upper().replace(
        b",", b" ").split()


def test_pages_follow_each_other_by_their_links(server):
    for _ in range(3):
        server.add(tag="paged")
    found = []
    following = "/jobs/results?tag=paged&limit=2&cut=3&order=desc"
    while following:
        answer = server.request("GET", following, headers=LINES)
        found += [json.loads(line) for line in answer.body.splitlines()]
        link = answer.headers.get("Link", "")
        assert link == "" or link.startswith("</jobs/results/?after=")
        following = link.partition(">")[0].strip("<")
    assert len(found) == 3 and {record["job"] for record in found} == {"X(9"}
    assert sorted((record["id"] for record in found), reverse=True) == [
        record["id"] for record in found]


@pytest.mark.parametrize("query", ["cut=0", "cut=x", "cut=1&cut=2", "shots=3", "limit=0",
                                   "tag=_", "status=success"])
def test_a_wrong_parameter_is_refused(server, query):
    answer = server.request("GET", f"/jobs/results/?{query}", headers=CSV)
    assert answer.status == 400 and query.partition("=")[0] in answer.detail


def test_a_page_of_long_results_ends_early_and_all_pages_come(tmp_path):
    """Memory is bounded by what a page holds."""
    store = Store(str(tmp_path / "oqc.db"), Clock())
    with sqlite3.connect(tmp_path / "oqc.db", isolation_level=None) as database:
        database.executemany(
            "INSERT INTO jobs (id, job, mode, status, created_time, attempts, shots, seed, "
            "echo_code, submitter) VALUES (?, 'X(1)', 'verbatim', 'Starting', '2026', 1, 1, 1, 0, "
            "'ann')", [(number,) for number in range(1, 13)])
        database.executemany("INSERT INTO results VALUES (?, ?, 0)",
                             [(number, "x" * (1 << 18)) for number in range(1, 13)])
    database.close()
    page = store.page(None, 1000, members=Stored._fields)
    assert [row[0] for row in page] == [1, 2, 3, 4]
    assert [row[0] for row in store.page(10, 1000, members=Stored._fields)] == [11, 12]
    assert len(store.page(None, 1000)) == 12
    store.close()


def test_the_numbers_stand_in_the_table_of_a_single_result(server, serve, script):
    job = server.wait(server.add("X(60)", "verbatim", seed=3))
    ones = server.result(job).json["counts"]["1"]
    shown = server.request("GET", f"/jobs/{job['id']}/result/", headers=TEXT).body.decode()
    error = results.standard_error(ones, 1000)
    assert [line.split() for line in shown.splitlines()[-3:]] == [
        ["p1", f"{ones / 1000:.6f}"], ["p1_error", f"{error:.6f}"], ["p1_ideal", "0.250000"]]
    own = serve("--runtime", "q=" + script("""echo '{"counts": {"1": 5}}'"""),
                "--runtime", "z=" + script("echo hello"))
    for name, expected in (("q", '{"counts": {"1": 5}}\np1        1.000000\n'
                            'p1_error  0.123718\np1_ideal  0.000000\n'), ("z", "hello\n")):
        job = own.wait(own.add("X(0)", "verbatim", runtime=name))
        shown = own.request("GET", f"/jobs/{job['id']}/result/", headers=TEXT).body.decode()
        assert shown == expected
