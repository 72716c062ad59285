"""The client for Python programs: what its methods return, what they raise, and what they do when a
connection breaks or the server is away."""
import contextlib
import csv
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import KEY, ROOT, until

import oqc
from oqc import client, commands
from oqc.client import Client
from oqc.config import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Nothing of oqc in the environment."""
    for name in list(os.environ):
        if name.startswith("OQC_"):
            monkeypatch.delenv(name)


def url(port):
    """The address of a server on this port."""
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def lab(server):
    """A client of the shared server."""
    with Client(url(server.port)) as connected:
        yield connected


def free_port():
    """A port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


# What its methods return

def test_a_job_is_added_waited_for_and_read(server, lab):
    job = lab.add("X(60)", "simulation", shots=10, seed=7, tag="one", note={"a": 1}, runtime=None)
    assert (type(job).__name__, job.job, job.status, job.end_time) == (
        "Job", "X(60)", "Starting", None)
    ended = lab.wait(job)
    assert ended == lab.get(job) == lab.get(job.id) and ended.return_code == 0
    assert ended._asdict() == server.get(job.id)
    result = lab.result(job)
    assert result == server.result(job.id).json and result["shots"] == 10
    details = lab.details(job)
    assert (details.note, details.seed, details.state) == ({"a": 1}, 7, "ended")
    assert [attempt.runtime for attempt in details.attempts] == ["simulator"]
    again = lab.rerun(ended)
    assert again.id > job.id and lab.wait(again.id).job == "X(60)"
    assert lab.result(lab.wait(lab.add("X(1)", "echo"))) is None


def test_a_sweep_is_a_table_of_records(lab):
    added = lab.add_all((f"X({angle})" for angle in (0, 60, 180)), "simulation", tag="sweep",
                        seed=5)
    assert [lab.details(job).seed for job in added] == [5, 6, 7]
    assert [job.id for job in lab.wait(added)] == [job.id for job in added]
    records = list(lab.results(tag="sweep"))
    assert [(record.id, record.p1_ideal) for record in records] == [
        (job.id, ideal) for job, ideal in zip(added, (0.0, 0.25, 1.0))]
    for record in records:
        assert record.result == lab.result(record)      # also while others are read
        assert record.p1 == record.count_1 / 1000 and record.p1_error > 0
    assert [job.id for job in lab.list(tag="sweep", order="desc", limit=2)] == [
        added[2].id, added[1].id]
    counts = lab.count(tag="sweep")
    assert (counts.succeeded, counts.done, counts.left) == (3, 3, 0)
    assert lab.count().done >= 3
    rows = csv.DictReader(io.StringIO(b"".join(lab.raw("text/csv").results(tag="sweep")).decode()))
    assert [float(row["p1"]) for row in rows] == [record.p1 for record in records]
    assert [record.job for record in lab.results(tag="sweep", cut=3, after=added[0].id)] == [
        "X(6", "X(1"]


def test_jobs_may_be_members_of_their_own(lab):
    first, second = lab.add_all([{"job": "X(1)", "mode": "echo", "return_code": 3}, "Y(2)"],
                                "echo", shots=5, tag="own")
    assert (lab.wait(first).return_code, lab.wait(second).return_code) == (3, 0)
    assert (lab.details(first).shots, lab.details(second).shots) == (5, 5)
    assert lab.add_all([]) == []


def test_many_jobs_are_waited_for_by_a_filter_with_their_progress(lab):
    seen = []
    lab.add_all(["X(1)"] * 1500, "echo", tag="many")
    counts = lab.wait(tag="many", progress=seen.append)
    assert counts == seen[-1] and counts.succeeded == 1500
    jobs = lab.list(tag="many", limit=3)
    lab.wait(jobs, progress=seen.append)
    assert [counts.left for counts in seen[-3:]] == [2, 1, 0]
    with pytest.raises(client.Failed, match="no job matches"):
        lab.wait(tag="nothing-has-it")


def test_a_server_is_seen_and_changed(serve):
    with Client(url(serve().port)) as lab:
        assert lab.pause("emulator", "cable").reason == "cable"
        waiting = lab.add_all(["X(1)"] * 3, "verbatim", tag="rabi")
        status = lab.status()
        assert (status.waiting["verbatim"], status.paused) == (3, ["emulator"])
        with pytest.raises(client.NotEnded, match=f"job {waiting[0].id} has not ended yet"):
            lab.wait(waiting, timeout=0)
        with pytest.raises(client.NotEnded, match="3 jobs have not ended yet"):
            lab.wait(tag="rabi", timeout=0)
        assert lab.cancel(waiting[0]).return_code == 130
        assert lab.cancel(tag="rabi") == 2
        assert lab.resume("emulator").state == "idle"
        assert {runtime.name: runtime.modes for runtime in lab.runtimes()}["echo"] == ["echo"]
        assert lab.wait().failed == 3
        assert lab.prune("0s") == 3 and lab.list() == []


def test_a_log_is_read_and_followed(serve, script, tmp_path):
    os.mkfifo(tmp_path / "go")
    speaks = script("printf 'gr\\303\\274n\\n' >&2; " + f'cat "{tmp_path}/go"; echo "hello"')
    with Client(url(serve("--runtime", f"q={speaks}").port)) as lab:
        job = lab.add("X(1)", "verbatim")
        pieces = lab.follow(job)
        text = ""
        while "gr\u00fcn\n" not in text:
            text += next(pieces)
        (tmp_path / "go").write_text("")
        lab.wait(job)
        assert text + "".join(pieces) == lab.log(job)
        assert lab.result(job) == "hello\n"


def test_the_record_of_a_pruned_job_is_not_that_of_the_next_one(serve):
    with Client(url(serve().port)) as lab:
        lab.pause("emulator")
        pruned = lab.wait(lab.add("X(1)", "echo")).id
        lab.add("X(2)", "verbatim")
        assert commands.record_of(lab.raw(), pruned)[0].startswith(b'{"id": 1, "job": "X(1)"')
        lab.prune("0s")
        with pytest.raises(client.Failed, match="no job has the id 1"):
            commands.record_of(lab.raw(), pruned)


def test_a_filter_that_is_none_counts_as_left_out(lab):
    job = lab.wait(lab.add("X(1)", "echo"))
    assert lab.count(tag=None).done == lab.count().done > 0
    assert lab.wait(tag=None, by="me", timeout=60).left == 0
    assert job.id in [record.id for record in lab.results(tag=None)]


class Whole:
    """A whole number of another library, such as numpy's."""

    def __init__(self, number):
        self._number = number

    def __index__(self):
        return self._number


def test_an_id_may_be_a_whole_number_of_any_kind_and_nothing_else(lab):
    job = lab.wait(lab.add("X(1)", "echo"))
    number = Whole(job.id)
    assert lab.get(number) == lab.wait(number) == lab.wait([number])[0] == job
    for wrong in ("1", 1.0, None, [1]):
        with pytest.raises(TypeError):
            lab.get(wrong)


# What they raise

def test_a_refusal_has_the_status_and_the_detail(lab):
    for ask, status, detail in ((lambda: lab.get(999999), 404, "no job has the id 999999"),
                                (lambda: lab.list(limit=0), 400, "limit: expected a whole number"),
                                (lambda: list(lab.results(shots=1)), 400, "unknown or repeated"),
                                (lambda: lab.add("X(1)", None), 400, "mode: missing"),
                                (lambda: lab.pause("nothing"), 404, "no runtime has this name"),
                                (lambda: lab.add_all(["X(1)", "X(1"], "echo"), 400, "[1]: job: ")):
        with pytest.raises(client.Failed) as refused:
            ask()
        assert refused.value.status == status and refused.value.detail.startswith(detail)
        assert (refused.value.passing, refused.value.sent) == (False, False)


def test_what_was_added_before_a_refusal_is_known(lab):
    with pytest.raises(client.Failed) as refused:
        lab.add_all(["X(1)"] * client.BATCH + ["X(1"], "echo")
    assert len(refused.value.added) == client.BATCH
    assert lab.get(refused.value.added[-1]).job == "X(1)"


def test_a_key_that_is_not_known_is_an_error_of_its_own(server, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"alice:wrong\n")
    with Client(url(server.port), key_file=str(path)) as wrong:
        with pytest.raises(client.KeyRefused):
            wrong.status()
    path.write_bytes(b"alice:%b\n" % KEY.encode())
    for right in (Client(url(server.port), key_file=str(path)), Client(url(server.port), KEY)):
        with right:
            assert right.status().you["role"] == "operator"


@pytest.mark.parametrize("address, key, reason", [
    ("ftp://localhost", None, "expected http://"), ("http://192.0.2.1", None, "needs a key"),
    ("http://localhost", "a\nb", "key: expected a key in characters")])
def test_a_wrong_setting_is_an_error_before_anything_is_sent(address, key, reason):
    with pytest.raises(ConfigError, match=reason):
        Client(address, key)


def test_a_server_that_is_away_may_come_back_and_a_host_that_is_no_name_does_not():
    with pytest.raises(client.Unreachable) as away:
        Client(url(free_port())).status()
    assert (away.value.passing, away.value.sent, away.value.status) == (True, False, None)
    with pytest.raises(client.Unreachable) as wrong:
        Client("http://a..b", "x").status()         # the documented key goes to no other machine
    assert (wrong.value.passing, wrong.value.sent) == (False, False)


def test_an_answer_that_does_not_come_leaves_open_what_was_done():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = Client(url(listener.getsockname()[1]))
        with pytest.raises(client.Unreachable, match="timed out") as silent:
            far.ask("POST", "/jobs/add/", b"{}", once=True, seconds=0.05)
    assert (silent.value.passing, silent.value.sent) == (True, True)


def test_a_server_that_is_away_is_reported_once_until_the_deadline():
    said = []
    port = free_port()
    with pytest.raises(client.Unreachable):
        Client(url(port), report=said.append).wait(1, timeout=0.1)
    assert said == [f"http://127.0.0.1:{port}: Connection refused; trying again"]


ANSWERS = [b"<html>\n", b"7\n", b"null\n", b"[7]\n", b'"x"\n', b'{"jobs": 5}\n', b"\xff\n",
           b"[" * 100000 + b"\n"]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_that_is_none_of_oqc_is_an_error_as_any_other(answer):
    """Something else may listen at that port, which knows other JSON."""
    class Other(http.server.BaseHTTPRequestHandler):
        """What answers everything so."""

        def do_GET(self):               # pylint: disable=invalid-name # named by http.server
            """Answer."""
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer))
            self.wfile.write(answer)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_):      # pylint: disable=arguments-differ
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = Client(url(server.server_port))
        for ask in (other.status, other.runtimes, other.list, other.count,
                    lambda: other.get(1), lambda: other.add("X(1)", "echo"),
                    lambda: other.add_all(["X(1)"]), lambda: other.wait(1, timeout=0),
                    lambda: other.wait(tag="a", timeout=0), lambda: list(other.results()),
                    lambda: other.details(1), lambda: other.rerun(1), lambda: other.pause("a"),
                    lambda: other.cancel(tag="a"), lambda: other.prune("1d")):
            with contextlib.suppress(client.Failed):    # an object may pass for an older server's
                ask()
        with pytest.raises(client.Failed, match="is not oqc|nested too deeply"):
            other.count()
        server.shutdown()


# Connections that break

class Breaking:
    """What stands before a server and breaks the first connections off, in the middle of an answer
    that it has from there."""

    def __init__(self, server, times):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heads = []
        self._server = server
        self._times = times
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        for place in range(self._times + 1):
            near = self.listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", self._server.port))
            with near, far:
                request = near.recv(65536)
                while not re.search(rb"(?s)^GET.*\r\n\r\n|Length: 0\r\n|\r\n\r\n.", request):
                    request += near.recv(65536)
                self.heads.append(request.partition(b"\r\n\r\n")[0])
                far.sendall(request)
                answer = far.recv(65536)
                near.sendall(answer if place == self._times else answer[:40])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._thread.join(20)
        self.listener.close()


def test_an_add_whose_answer_broke_off_is_sent_again_and_adds_one_job(server, lab):
    with Breaking(server, 2) as breaking, Client(url(breaking.port)) as far:
        job = far.add("X(5)", "echo", tag="broken-off")
    assert [job.id] == [found.id for found in lab.list(tag="broken-off")]
    keys = {line for head in breaking.heads for line in head.split(b"\r\n")
            if line.startswith(b"Idempotency-Key: ")}
    assert len(breaking.heads) == 3 and len(keys) == 1


def test_a_question_is_asked_again_and_what_might_be_done_twice_is_not(server, lab):
    job = lab.wait(lab.add("X(5)", "echo"))
    with Breaking(server, 1) as breaking, Client(url(breaking.port)) as far:
        assert far.get(job) == job
    with Breaking(server, 0) as breaking, Client(url(breaking.port)) as far:
        assert far.get(job) == job
    with Breaking(server, 1) as breaking, Client(url(breaking.port)) as far:
        with pytest.raises(client.Broken) as broken:
            far.resume("echo")
        assert broken.value.sent and far.get(job) == job


def test_results_are_asked_for_again_when_their_connection_breaks_off(server, lab):
    job = lab.wait(lab.add("X(5)", "echo", tag="asked-again"))
    with Breaking(server, 1) as breaking, Client(url(breaking.port)) as far:
        assert [record.id for record in far.results(tag="asked-again", limit=5)] == [job.id]


def test_a_loop_over_results_holds_no_connection_and_goes_on_after_a_restart(serve):
    server = serve()
    with Client(url(server.port)) as lab:
        lab.wait(lab.add_all(["X(1)"] * (client.BATCH + 1), "echo", tag="a")[-1])
        for order in ("asc", "desc"):
            records = lab.results(tag="a", since="1h", order=order)
            seen = [next(records).id]
            if order == "asc":
                server.process.kill()
                server.process.wait()
                serve("--port", server.port)
                lab.wait(lab.add("X(1)", "echo", tag="a"))      # was not asked for yet
            seen += [record.id for record in records]
            assert len(seen) == len(set(seen)) == client.BATCH + 2
            assert seen == sorted(seen, reverse=order == "desc")


def test_a_wait_goes_on_through_a_restart_of_the_server(serve):
    server = serve()
    said = []
    with Client(url(server.port), report=said.append) as lab:
        lab.pause("emulator")
        job, by_tag = lab.add("X(1)", "verbatim"), lab.add("X(2)", "verbatim", tag="rabi")
        with ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(lab.wait, job), pool.submit(lab.wait, tag="rabi")]
            server.process.kill()
            until(lambda: len(said) == 2)
            serve("--port", server.port)
            with Client(url(server.port)) as other:
                other.resume("emulator")
            assert waits[0].result().status == "Success"
            assert waits[1].result().succeeded == 1
        assert lab.get(by_tag).status == "Success"


# Connections

def test_several_threads_use_one_client(lab):
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda angle: lab.wait(lab.add(f"X({angle})", "echo")), range(80)))
    assert [job.job for job in jobs] == [f"X({angle})" for angle in range(80)]
    assert len({job.id for job in jobs}) == 80


def test_an_iterator_that_is_left_costs_no_connection(lab):
    """A socket that nobody closed would fail the test."""
    lab.wait(lab.add_all(["X(1)"] * 2000, "echo", tag="left"), timeout=60)
    for records in (lab.results(tag="left"), lab.raw().list(tag="left")):
        assert next(records)
        del records
        assert lab.count(tag="left").done == 2000


def test_one_connection_is_used_again_also_after_the_server_closed_it(serve):
    server = serve("--log-level", "debug")
    with Client(url(server.port)) as lab:
        for _ in range(3):
            lab.status()
        assert server.stop() == 0
        server = serve("--port", server.port)
        assert lab.status().idle
        assert lab.add("X(1)", "echo").id == 1


# How it is imported

def modules(statement):
    """The modules of oqc that a statement imports, and those of the standard library that take
    long."""
    shown = (f"{statement}; import sys; print(*sorted(name for name in sys.modules "
             "if 'oqc' in name or name in ('typing', 'json', 'http.client', 'random', 'sqlite3')))")
    start = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; "
    done = subprocess.run([sys.executable, "-IS", "-c", start + shown], capture_output=True,
                          text=True, check=True)
    return done.stdout.split()


def test_the_package_imports_nothing_until_it_is_used():
    assert modules("import oqc") == ["oqc"]
    assert "sqlite3" not in modules("from oqc import Client")


def test_what_the_package_offers_is_the_client_and_its_errors():
    assert oqc.Client is Client and oqc.Failed is client.Failed
    assert issubclass(oqc.Unreachable, oqc.Failed) and issubclass(oqc.NotEnded, oqc.Failed)
    with pytest.raises(AttributeError, match="has no attribute 'Server'"):
        getattr(oqc, "Server")
    names = {}
    exec("from oqc import *", names)        # pylint: disable=exec-used # as a notebook does
    assert names["Client"] is Client and names["ConfigError"] is ConfigError
    assert "PUBLIC" not in names and {"Client", "NotEnded", "__version__"} < set(dir(oqc))
