"""What makes the server pleasant in a lab: waiting, arrays, requests that count once, tables,
numbers."""
import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import KEY, ROOT, until

from oqc import api, jobs, results

PACKAGE = Path(api.__file__).parent
TEXT = {"Accept": "text/plain"}


def test_a_get_with_wait_answers_when_the_job_has_ended(serve, script, tmp_path):
    gate = tmp_path / "gate"
    subprocess.run(["mkfifo", str(gate)], check=True)
    server = serve("--runtime", "q=" + script(f'cat >/dev/null; read line <"{gate}"'))
    job, found = server.add(mode="verbatim"), []
    waiting = threading.Thread(target=lambda: found.append(server.wait(job)))
    waiting.start()
    gate.write_text("go\n", encoding="utf-8")       # blocks until the runtime reads
    waiting.join(20)
    assert found[0]["status"] == "Success"


def test_a_get_with_wait_answers_with_the_job_as_it_is_after_that_time(serve, script):
    server = serve("--runtime", "q=" + script("exec sleep 60"), "--drain", "0", "--kill-grace", "0")
    job = server.add(mode="verbatim")
    assert server.request("GET", f"/jobs/{job['id']}/?wait=1").json["end_time"] is None


def test_submit_and_wait_is_one_request(server):
    answer = server.request("POST", "/jobs/add/?wait=20", {"job": "X(90)", "mode": "simulation"})
    assert (answer.status, answer.json["status"]) == (201, "Success")
    assert answer.headers["Location"] == f"/jobs/{answer.json['id']}/"


def test_a_result_can_be_waited_for(server):
    job = server.add("Y(180)", mode="simulation", shots=0)
    result = server.request("GET", f"/jobs/{job['id']}/result/?wait=20")
    assert result.json["probabilities"] == [0.0, 1.0]


@pytest.mark.parametrize("wait", ["301", "-1", "x", "", "1.5", "%31"])
def test_a_wait_that_cannot_be_meant_is_400(server, wait):
    job = server.add()
    answer = server.request("GET", f"/jobs/{job['id']}/?wait={wait}")
    assert (answer.status, "0 to 300" in answer.detail) == (400, True)


def test_waits_beyond_half_of_the_connections_are_answered_at_once(serve, script):
    server = serve("--runtime", "q=" + script("exec sleep 60"), "--max-connections", "16",
                   "--drain", "0", "--kill-grace", "0")
    job = server.add(mode="verbatim")
    looked = threading.Event()

    def wait():
        while "Retry-After" in server.request("GET", f"/jobs/{job['id']}/?wait=300").headers:
            looked.wait(20)         # the one below was quicker, and took the last place
    waiting = [threading.Thread(target=wait) for _ in range(8)]
    for thread in waiting:
        thread.start()
    there_is_room = True
    while there_is_room:            # until the eight wait, a ninth waits as well: for a second
        looked.clear()
        answer = server.request("GET", f"/jobs/{job['id']}/?wait=1")
        looked.set()
        assert answer.json["end_time"] is None
        there_is_room = "Retry-After" not in answer.headers
    text = server.request("GET", f"/jobs/{job['id']}/?wait=1", headers=TEXT)
    assert answer.headers["Retry-After"] == text.headers["Retry-After"] == "1"
    server.request("DELETE", f"/jobs/{job['id']}/")
    for thread in waiting:
        thread.join(20)


# Arrays

def test_an_array_adds_all_jobs_in_order_and_runs_them(server):
    wanted = [{"job": f"X({angle})", "mode": "echo"} for angle in range(100)]
    answer = server.request("POST", "/jobs/add/?wait=20", wanted)
    assert answer.status == 201
    assert [job["job"] for job in answer.json] == [job["job"] for job in wanted]
    numbers = [job["id"] for job in answer.json]
    assert numbers == list(range(numbers[0], numbers[0] + 100))
    assert {job["status"] for job in answer.json} == {"Success"}


def test_an_array_is_one_also_behind_a_line_feed_and_where_it_holds_one_job(server):
    answer = server.request("POST", "/jobs/add/", '\n [{"job": "X(1)", "mode": "echo"}]')
    assert answer.status == 201 and "Location" not in answer.headers
    assert [job["job"] for job in answer.json] == ["X(1)"]


def test_an_array_with_one_wrong_job_adds_none_and_names_its_index(server):
    before = server.add()["id"]
    values = [{"job": "X(1)", "mode": "echo"}] * 3 + [{"job": "X(1", "mode": "echo"}]
    answer = server.request("POST", "/jobs/add/", values)
    assert (answer.status, answer.detail[:25]) == (400, "[3]: job: at character 4:"), answer.body
    assert server.add()["id"] == before + 1


@pytest.mark.parametrize("count", [0, 10_001])
def test_an_array_has_from_one_to_ten_thousand_jobs(server, count):
    answer = server.request("POST", "/jobs/add/", [{"job": "X(1)", "mode": "echo"}] * count)
    assert answer.status == 400 and f"found {count}" in answer.detail


# Idempotency-Key

JOB = {"job": "X(1)", "mode": "echo"}


def test_the_same_key_and_body_again_answers_the_first_job_after_a_restart_too(serve):
    server = serve()
    headers = {"Idempotency-Key": '"4711"'}
    first = server.request("POST", "/jobs/add/", JOB, headers=headers)
    assert first.status == 201 and "Idempotent-Replayed" not in first.headers
    assert server.stop() == 0
    server = serve()
    again = server.request("POST", "/jobs/add/", JOB, headers=headers)
    assert (again.status, again.json["id"]) == (201, first.json["id"])
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(server.request("GET", "/jobs/list/").json) == 1


def test_the_same_key_with_another_body_is_422_and_adds_nothing(server):
    headers = {"Idempotency-Key": "once"}
    first = server.request("POST", "/jobs/add/", JOB, headers=headers).json["id"]
    other = {"job": "X(2)", "mode": "echo"}
    assert server.request("POST", "/jobs/add/", other, headers=headers).status == 422
    assert server.add()["id"] == first + 1


def test_a_key_that_comes_many_times_at_once_adds_one_job(server):
    found = []
    headers = {"Idempotency-Key": "all-at-once"}

    def add():
        answer = server.request("POST", "/jobs/add/", [JOB] * 2, headers=headers)
        found.append(answer.json[1]["id"])
    threads = [threading.Thread(target=add) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 12 and len(set(found)) == 1


@pytest.mark.parametrize("key", ["", "two words", "x" * 256])
def test_a_key_that_cannot_be_one_is_400(server, key):
    headers = {"Idempotency-Key": key}
    assert server.request("POST", "/jobs/add/", JOB, headers=headers).status == 400


# Tables

def test_a_listing_as_text_is_an_aligned_table(server):
    failed = server.wait(server.add("X(90), " * 20 + "X(1)", return_code=3))
    text = server.request("GET", f"/jobs/list/?after={failed['id'] - 1}", headers=TEXT)
    assert text.headers["Content-Type"].startswith("text/plain")
    header, row = text.body.decode().splitlines()[:2]
    place = header.index("STATUS")
    assert row[place:].startswith("Runtime Error") and row[header.index("CODE"):].split()[0] == "3"
    assert row.startswith(f"{failed['id']} ")
    assert row[header.index("JOB"):] == (
        "X(90), X(90), X(90), X(90), X(90), X ...  echo of return code 3")
    assert header.index("ERROR") == row.index("echo of")


def test_a_job_and_the_runtimes_and_the_status_as_text_are_tables(server):
    job = server.wait(server.add())
    shown = server.request("GET", f"/jobs/{job['id']}/", headers=TEXT).body
    assert shown.split()[:2] == [b"ID", b"STATUS"]
    runtimes = server.request("GET", "/runtimes/", headers=TEXT).body.decode()
    names = [line.split()[0] for line in runtimes.splitlines()]
    assert names == ["NAME", "emulator", "simulator", "echo"]
    assert b"\nidle " in server.request("GET", "/status/", headers=TEXT).body


def test_a_simulation_as_text_shows_its_vector_and_p1_with_a_bar(server):
    job = server.wait(server.add("X(90)", mode="simulation", seed=1))
    text = server.request("GET", f"/jobs/{job['id']}/result/", headers=TEXT).body.decode()
    lines = text.splitlines()
    assert lines[:4] == ["x         0.000000", "y        -1.000000", "z         0.000000",
                         "P(1)      0.500000  ##########.........."]
    assert [line.split()[0] for line in lines[4:]] == [
        "count0", "count1", "p1", "p1_error", "p1_ideal"]


def test_nothing_in_a_table_moves_the_terminal(serve):
    server = serve()
    said = server.request("POST", "/runtimes/emulator/pause/", {"reason": "a\x1b[2J\nb\x9b"})
    assert said.json["reason"] == "a\x1b[2J\nb\x9b"
    text = server.request("GET", "/runtimes/", headers=TEXT).body.decode()
    assert r"  a\x1b[2J\x0ab\x9b  " in text and len(text.splitlines()) == 4


@pytest.mark.parametrize("said", [
    '{"probabilities": [0.4, 0.6], "fidelity": NaN}', '{"probabilities": [0, Infinity]}'])
def test_what_is_no_json_is_given_back_as_the_runtime_put_it_out(serve, script, said):
    server = serve("--runtime", "qpu=" + script(f"cat <<'END'\n{said}\nEND"))
    number = server.add("X(90)", "verbatim")["id"]
    server.wait(number)
    for headers in ({}, TEXT):
        answer = server.request("GET", f"/jobs/{number}/result/", headers=headers)
        assert (answer.status, answer.body.decode()) == (200, said + "\n")
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_json_is_what_a_client_gets_that_does_not_ask(server):
    assert isinstance(server.request("GET", "/jobs/list/", headers={"Accept": "*/*"}).json, list)


# The sheet, and the API for programs

def test_the_sheet_shows_the_address_that_was_asked_and_every_path(server):
    answer = server.request("GET", "/", key=None)
    text = answer.body.decode()
    assert answer.status == 200 and f"http://127.0.0.1:{server.port}/jobs/add/" in text
    for pattern, methods in api.ROUTES:
        path = pattern.pattern.replace("/?", "/").replace("\\", "")
        path = path.replace("/jobs/([^/]+)", "/jobs/7").replace("([^/]+)", "NAME")
        for method in methods:
            line = rf"(?m)^{method} +{re.escape(path)}"
            assert path == "/" or re.search(line, text), (method, path)


def test_the_sheet_points_to_the_manual_which_needs_no_key(server):
    text = server.request("GET", "/", key=None).body.decode()
    assert f"curl http://127.0.0.1:{server.port}/help/\n" in text
    assert re.search(r"(?m)^GET +/help/ .*needs no key", text)


def test_what_is_wrong_points_to_the_sheet(server):
    assert "GET / shows" in server.request("GET", "/nothing/").detail
    assert "GET / shows" in server.request("PUT", "/jobs/list/").detail


def test_openapi_is_served_as_written_and_describes_every_route_and_no_other(server):
    answer = server.request("GET", "/openapi.json", key=None)
    assert answer.body == (PACKAGE / "openapi.json").read_bytes()
    described = set()
    for path, methods in answer.json["paths"].items():
        for method in methods.keys() - {"parameters"}:
            described.add((method.upper(), re.sub("{[^}]*}", "x", path)))
    there = set()
    for pattern, methods in api.ROUTES:
        path = pattern.pattern.replace("([^/]+)", "x").replace("/?", "/").replace("\\", "")
        there.update((method, path) for method in methods)
    assert described == there


def test_openapi_describes_the_members_of_a_job_and_of_a_submission(server):
    schemas = server.request("GET", "/openapi.json").json["components"]["schemas"]
    members = {name: list(schema.get("properties", ())) for name, schema in schemas.items()}
    assert members["Job"] == list(server.wait(server.add()))
    assert set(members["Submission"]) == set(jobs.Submission._fields)
    assert schemas["Submission"]["dependentSchemas"] == {
        "return_code": {"properties": {"mode": {"const": "echo"}}}}
    assert members["Runtime"] == list(server.runtime("echo"))
    assert members["Details"] == list(server.request("GET", "/jobs/1/details/").json)
    assert members["Attempt"] == list(jobs.Attempt._fields)
    assert members["Record"] == list(results.RECORD)
    assert members["ServerStatus"] == list(server.request("GET", "/status/").json)


def test_what_openapi_refers_to_is_there_and_nothing_else(server):
    document = server.request("GET", "/openapi.json").json
    components = document["components"]
    there = {f"#/components/{kind}/{name}" for kind in components for name in components[kind]}
    used = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    for scheme in document["security"]:
        used.update(f"#/components/securitySchemes/{name}" for name in scheme)
    assert there == used


# The page checks a job string as it is typed, before it is sent

def test_the_page_names_the_parts_of_a_pulse_as_the_server_does():
    page = (PACKAGE / "page.html").read_text("utf-8")
    for part, name in jobs.PULSE_PARTS:
        quote = "'" if '"' in name else '"'
        assert f"\n  [/{part.pattern}/y, {quote}{name}{quote}],\n" in page
    assert f"\nconst PULSES = /^{jobs.PATTERN.pattern.replace('?:', '')}/;\n" in page


# Numbers

def test_the_status_counts_what_waits_runs_and_ended(serve, script, tmp_path):
    started = tmp_path / "started"
    os.mkfifo(started)
    runtime = script(f'echo yes >"{started}"; exec sleep 60')
    server = serve("--runtime", f"q={runtime}", "--drain", "0", "--kill-grace", "0")
    assert server.request("GET", "/status/").json["idle"] is True
    server.wait(server.add(mode="echo"))
    server.add(mode="verbatim")
    server.add(mode="verbatim")
    assert started.read_text("ascii") == "yes\n"
    server.request("POST", "/runtimes/echo/pause/")
    status = server.request("GET", "/status/").json
    assert (status["running"]["verbatim"], status["waiting"]["verbatim"]) == (1, 1)
    assert (status["ended_last_minute"], status["ended_last_hour"]) == (1, 1)
    assert (status["idle"], status["paused"]) == (False, ["echo"])
    assert status["oldest_waiting_seconds"] >= 0
    assert status["database_bytes"] > 0 and status["uptime"] > 0


def test_what_ended_in_the_last_hour_is_known_also_after_a_restart(serve):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    waits = server.add(mode="verbatim")["id"]
    server.request("DELETE", f"/jobs/{waits}/")
    waits = server.add(mode="verbatim", tag="more")["id"]
    server.request("POST", "/jobs/cancel/?tag=more")
    server.request("POST", "/jobs/add/", [{"job": "X(1)", "mode": "echo"}] * 3)
    server.wait(server.add(mode="simulation"))
    before = server.request("GET", "/status/").json
    assert (before["ended_last_minute"], before["ended_last_hour"]) == (6, 6)
    shown = {name: sum(server.runtime(name)["ended_per_minute"])
             for name in ("emulator", "simulator", "echo")}
    assert shown == {"emulator": 0, "simulator": 1, "echo": 3}, "nothing ran the cancelled ones"
    assert server.stop() == 0
    server = serve()
    until(lambda: server.request("GET", "/status/").json["ended_last_hour"] == 6)
    until(lambda: sum(server.runtime("echo")["ended_per_minute"]) == 3)


LINE = re.compile(r'[a-z_]+(?:\{[a-z]+="[^"\\\n]*"(?:,[a-z]+="[^"\\\n]*")*\})? [0-9.+eE-]+')


def test_the_metrics_keep_to_prometheus_s_format(server):
    server.wait(server.add(return_code=3))
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = server.request("GET", "/metrics/", headers=headers, key=None)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    family, families, buckets = None, [], {}
    for line in answer.body.decode().splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in families       # a family stands once, all its lines together
            families.append(family)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == family and kind in ("counter", "gauge", "histogram")
        else:
            assert LINE.fullmatch(line) and line.startswith(family), line
            labels = re.search(r'mode="(\w+)",outcome="(\w+)",le="([^"]+)"', line)
            if labels:
                count = int(line.split()[-1])
                buckets.setdefault(labels.groups()[:2], []).append((labels[3], count))
    assert answer.body.endswith(b"\n") and ("echo", "failed") in buckets
    for histogram in buckets.values():
        bounds, counts = zip(*histogram)
        assert bounds[-1] == "+Inf" and list(counts) == sorted(counts)


def test_the_metrics_say_what_runs_and_waits_on_which_runtime_and_not_whose_it_is(
        serve, script, tmp_path):
    started = tmp_path / "started"
    os.mkfifo(started)
    runtime = script(f'echo yes >"{started}"; exec sleep 60')
    server = serve("--runtime", f"q={runtime}", "--drain", "0", "--kill-grace", "0")
    server.add(mode="verbatim")
    assert started.read_text("ascii") == "yes\n"
    server.request("POST", "/jobs/add/", [{"job": "X(1)", "mode": "verbatim"}] * 3)
    server.request("POST", "/jobs/add/", [{"job": "X(1)", "mode": "verbatim", "runtime": "q"}] * 2)
    text = server.request("GET", "/metrics/").body.decode()
    counts = dict(re.findall(r"^oqc_runtime_jobs(\{.*\}) ([0-9]+)$", text, re.M))
    assert counts['{runtime="q",mode="verbatim",state="running"}'] == "1"
    assert counts['{runtime="q",mode="verbatim",state="waiting"}'] == "2"
    assert counts['{runtime="",mode="verbatim",state="waiting"}'] == "3"
    assert counts['{runtime="simulator",mode="simulation",state="running"}'] == "0"
    assert sum(map(int, counts.values())) == 6
    assert "documented" not in text, "names of keys are without bound"


def test_health_warns_of_a_warm_runtime_that_cannot_start_beside_one_that_can(serve, tmp_path):
    (tmp_path / "lab.ini").write_text("""
[runtime away]
command = false
protocol = lines
modes = verbatim
warm = yes
[runtime near]
command = cat
modes = verbatim
""", encoding="utf-8")
    server = serve("--config", "lab.ini")
    server.line("runtime away is set aside")
    health = server.request("GET", "/health/", key=None)
    assert health.status == 200
    warning = "1 of 2 runtimes for verbatim cannot be started"
    assert health.json == {"status": "ok", "warnings": [warning]}


def test_health_needs_no_key(server):
    answer = server.request("GET", "/health/", key=None)
    assert (answer.status, answer.json) == (200, {"status": "ok"})


# Forgetting

def test_pruning_deletes_what_ended_longer_ago_with_its_result_and_nothing_else(serve):
    server = serve()
    server.request("POST", "/runtimes/emulator/pause/")
    waits = server.add(mode="verbatim")
    ended = server.wait(server.add("X(90)", mode="simulation"))
    assert server.request("DELETE", "/jobs/list/?older-than=1h").json == {"deleted": 0}
    assert server.request("DELETE", "/jobs/list/?older-than=0s").json == {"deleted": 1}
    assert [job["id"] for job in server.request("GET", "/jobs/list/").json] == [waits["id"]]
    assert server.result(ended).status == 404
    assert server.add()["id"] > ended["id"]         # an id is never given out again


def test_keep_days_deletes_by_itself_what_ended_longer_ago(serve, tmp_path):
    server = serve()
    old = server.wait(server.add())["id"]
    new = server.wait(server.add())["id"]
    assert server.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "oqc.db", isolation_level=None)) as database:
        database.execute("UPDATE jobs SET created_time = '2020', start_time = '2020',"
                         " end_time = '2020' WHERE id = ?", (old,))
    server = serve("--keep-days", "30")
    line = server.line("1 jobs that ended before ")
    assert line.endswith("Z are deleted, as --keep-days asks for")
    assert [job["id"] for job in server.request("GET", "/jobs/list/").json] == [new]


@pytest.mark.parametrize("query", [
    "", "?older-than=", "?older-than=90", "?older-than=-1d", "?older-than=1y", "?x=1"])
def test_pruning_needs_an_age(server, query):
    answer = server.request("DELETE", "/jobs/list/" + query)
    assert answer.status == 400 and json.loads(answer.body)["detail"]


def test_a_runtime_of_one_slot_runs_one_job_at_a_time_also_a_built_in_one(server):
    five = [{"job": "X(90)", "mode": "simulation"}] * 5
    ended = server.request("POST", "/jobs/add/?wait=20", five).json
    assert len(ended) == 5
    for first, second in zip(ended, ended[1:]):
        assert first["end_time"] <= second["start_time"]


# Backup and check

def command(folder, *arguments):
    """(exit status, standard output, standard error) of an oqc command."""
    done = subprocess.run([sys.executable, "-m", "oqc", *arguments], cwd=folder, timeout=30,
                          env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_backup_while_the_server_writes_has_every_job_that_was_answered_before(serve, tmp_path):
    server, stop = serve(), threading.Event()

    def add():
        while not stop.is_set():
            server.add()
    writer = threading.Thread(target=add)
    writer.start()
    before = server.add()["id"]
    assert command(tmp_path, "backup", "copy.db") == (0, "", "")
    stop.set()
    writer.join()
    assert command(tmp_path, "check", "--db", "copy.db") == (0, "copy.db: ok\n", "")
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "copy.db-wal").exists()
    assert server.stop() == 0
    copy = serve("--db", "copy.db")
    assert copy.get(before)["id"] == before and copy.wait(before)["status"] == "Success"


def test_a_backup_replaces_no_file_and_needs_a_database(server, tmp_path):
    there = tmp_path / "there"
    there.write_text("mine", encoding="ascii")
    status, _, error = command(tmp_path, "backup", "there", "--db", str(server.folder / "oqc.db"))
    assert status == 1 and "never replaces" in error
    assert there.read_text("ascii") == "mine"
    status, _, error = command(tmp_path, "backup", "copy.db")
    assert status == 1 and error == "oqc: oqc.db: no such database\n"
    assert not (tmp_path / "copy.db").exists()


def test_a_check_finds_what_cannot_be(serve, tmp_path):
    server = serve()
    job = server.wait(server.add())["id"]
    assert server.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "oqc.db", isolation_level=None)) as database:
        database.execute("PRAGMA ignore_check_constraints = 1")
        database.execute(
            "UPDATE jobs SET status = 'Starting', end_time = '2001' WHERE id = ?", (job,))
    status, found, _ = command(tmp_path, "check")
    assert status == 1 and f"job {job}: it ended before it was started" in found
    assert f"job {job}: its end does not fit its status" in found
