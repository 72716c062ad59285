"""What the tests share: a real server in a process of its own, a client that asks it, and a clock moved by hand; and
three processes to run them, a module at a time."""
import http.client
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = ROOT / "tests" / "runtimes"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # hundreds of servers start here: each would compile itself anew
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell has its jobs in the background ignore it, and
                                                             # they their children, whose Ctrl-C is tried here
# What the tests of the running server start: this checkout, or the single file that OQC_PYZ names.
PROGRAM = (sys.executable, *((os.environ["OQC_PYZ"],) if "OQC_PYZ" in os.environ else ("-m", "oqc")))
WORKERS = 3                         # processes that run the tests: with one more than cores, none of these has to wait
KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="


def until(condition):
    """Wait until something holds that nothing announces."""
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "not within 20 s"
        time.sleep(0.001)


class Answer:
    """An answer over HTTP."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, dict(response.getheaders()), response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def detail(self):
        return self.json["detail"]


class Server:
    """`python -m oqc` on a free port, and its log as it comes."""

    def __init__(self, folder, *flags, environment=None, command=PROGRAM, wait=True):
        self.folder, self.lines = Path(folder), []
        self._more = threading.Condition()
        self._closed = False
        env = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
        env.update({"PYTHONPATH": str(ROOT)}, **(environment or {}))
        defaults = [] if "--port" in flags else ["--port", "0"]
        self.process = subprocess.Popen([*command, *defaults, *map(str, flags)], cwd=folder, env=env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.port = int(re.search(r":(\d+)/", self.line("listening on"))[1])

    def _read(self):
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self._closed = True
            self._more.notify_all()

    def line(self, text, timeout=20):
        """The first line of the log that holds `text`, as soon as it is there."""
        with self._more:
            assert self._more.wait_for(lambda: self._closed or any(text in line for line in self.lines), timeout), (
                f"no line with {text!r} within {timeout} s in", self.lines)
            found = [line for line in self.lines if text in line]
            assert found, (f"the server ended without a line with {text!r}", self.lines)
            return found[0]

    @property
    def log(self):
        return "\n".join(self.lines)

    def request(self, method, path, body=None, key=KEY, headers=None, timeout=60):
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            body = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, body, {**({"api_key": key} if key else {}), **(headers or {})})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def add(self, job="X(90)", mode="echo", **members):
        """Add a job; its object."""
        answer = self.request("POST", "/jobs/add/", {"job": job, "mode": mode, **members})
        assert answer.status == 201, (answer.status, answer.body)
        return answer.json

    def get(self, job):
        """The job as it is now."""
        return self.request("GET", f"/jobs/{_id(job)}/").json

    def wait(self, job, seconds=30):
        """The job as soon as it has ended."""
        ended = self.request("GET", f"/jobs/{_id(job)}/?wait={seconds}").json
        assert ended["end_time"], ("not ended in time", ended, self.log)
        return ended

    def result(self, job):
        return self.request("GET", f"/jobs/{_id(job)}/result/")

    def runtime(self, name):
        return next(one for one in self.request("GET", "/runtimes/").json if one["name"] == name)

    def children(self):
        """The ids of all processes below the server, zombies included."""
        return descendants(self.process.pid)

    def stop(self, number=signal.SIGTERM, timeout=40):
        """End it by a signal; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout)
        self._reader.join(10)
        self.process.stderr.close()
        return status


def _id(job):
    return job["id"] if isinstance(job, dict) else job


def descendants(pid):
    """The ids of all processes below one, in /proc."""
    found = []
    for number in [pid, *found]:
        try:
            tasks = list(Path(f"/proc/{number}/task").iterdir())
            below = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            below = []
        found += below + [deeper for child in below for deeper in descendants(child)]
    return sorted(set(found))


@pytest.fixture
def serve(tmp_path):
    """serve(*flags): a new server; several in a row use the same folder and so the same oqc.db."""
    started = []

    def start(*flags, **options):
        started.append(Server(tmp_path, *flags, **options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server with nothing configured, for all tests that leave it as it is."""
    running = Server(tmp_path_factory.mktemp("server"), "--drain", "1")
    yield running
    assert running.stop() == 0


@pytest.fixture
def script(tmp_path):
    """script(text): the path of an executable sh script with these lines."""
    written = []

    def write(text):
        path = tmp_path / f"runtime-{len(written)}"
        path.write_text("#!/bin/sh\n" + text + "\n", encoding="utf-8")
        path.chmod(0o755)
        written.append(path)
        return str(path)
    return write


class HandClock:
    """A clock that stands still until it is moved, and whose waits move it."""

    def __init__(self):
        self.seconds, self.wall = 1000.0, 1_800_000_000.0

    def now(self):
        return f"2027-01-15T08:00:{self.seconds % 60:09.6f}Z"

    def unix(self):
        return self.wall

    def monotonic(self):
        return self.seconds

    def wait(self, event, seconds):
        """Move on at once if nothing has happened; wait for real where no time is given."""
        if seconds is None:
            return event.wait(20)
        self.seconds += 0 if event.is_set() else seconds
        self.wall += 0 if event.is_set() else seconds
        return event.is_set()


@pytest.fixture
def clock():
    return HandClock()


class Worker:
    """One of the processes that run the tests, forked once they are collected: most of them wait for a server that
    starts, and on two cores this takes less than half the time. It keeps a module's reports for who prints them."""

    config, modules, reports = None, [], []     # modules: the tests of each; which one to run is said by its number

    @classmethod
    def start(cls):
        """Have an output of its own, so that neither takes what a test of the other prints, and print nothing."""
        plugins = cls.config.pluginmanager
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        cls.config.get_terminal_writer().write = lambda *_, **__: None
        plugins.register(cls, "worker")

    @classmethod
    def run(cls, number):
        """Run the tests of a module; their reports, as what a pipe can carry."""
        cls.reports.clear()
        for item, following in itertools.zip_longest(cls.modules[number], cls.modules[number][1:]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        as_data = cls.config.hook.pytest_report_to_serializable
        return [as_data(config=cls.config, report=report) for report in cls.reports]

    @classmethod
    def pytest_runtest_logreport(cls, report):
        cls.reports.append(report)


def pytest_runtestloop(session):
    """Run the tests in several processes, a module at a time, unless one is to be looked at (--pdb, -s, -x)."""
    option, hook = session.config.option, session.config.hook
    modules = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    plain = option.usepdb or option.maxfail or option.capture == "no"
    if plain or option.collectonly or session.testsfailed or len(modules) < 2:
        return None                 # pytest's own loop
    modules.sort(key=lambda items: -sum("serve" in item.fixturenames for item in items))    # those that take long
    Worker.config, Worker.modules = session.config, modules
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"), Worker.start) as pool:
        try:
            for module in as_completed([pool.submit(Worker.run, number) for number in range(len(modules))]):
                for data in module.result():
                    report = hook.pytest_report_from_serializable(config=session.config, data=data)
                    if report.when == "setup":
                        hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
                    hook.pytest_runtest_logreport(report=report)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return True
