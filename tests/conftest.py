"""What the tests share: a real server in a process of its own, a client that asks it, and a clock
moved by hand; an end to tests that hang; and three processes to run them, a module at a time."""
import faulthandler
import http.client
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = ROOT / "tests" / "runtimes"
# Hundreds of servers start here: each would compile itself anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# What the tests of the running server start: this checkout, or the single file that OQC_PYZ names.
PROGRAM = (sys.executable,
           *((os.environ["OQC_PYZ"],) if "OQC_PYZ" in os.environ else ("-m", "oqc")))
WORKERS = 3         # processes that run the tests: one more than cores, so that none of these waits
SLOW = 10           # a slow test may take so many times as long as another
KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="


def heed_signals():
    """Catch what whoever started the tests has ignored: nohup SIGHUP, a shell SIGINT and SIGQUIT
    for its jobs in the background. What is ignored stays so in a child, such as a server that a
    test sends this signal; what is caught does not (execve(2))."""
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)


heed_signals()


def until(condition):
    """Wait until something holds that nothing announces."""
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "not within 20 s"
        time.sleep(0.001)


class Answer:
    """An answer over HTTP."""

    def __init__(self, response):
        self.status = response.status
        self.headers = dict(response.getheaders())
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def detail(self):
        return self.json["detail"]


class Server:
    """`python -m oqc` on a free port, and its log as it comes."""

    def __init__(self, folder, *flags, environment=None, command=PROGRAM, wait=True):
        self.folder = Path(folder)
        self.lines = []
        self._more = threading.Condition()
        self._closed = False
        if "--port" not in flags:
            flags = ("--port", "0", *flags)
        env = {name: value for name, value in os.environ.items() if not name.startswith("OQC_")}
        env.update({"PYTHONPATH": str(ROOT)}, **(environment or {}))
        self.process = subprocess.Popen(
            [*command, *map(str, flags)], cwd=folder, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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
        def found():
            return [line for line in self.lines if text in line]

        with self._more:
            in_time = self._more.wait_for(lambda: self._closed or found(), timeout)
            assert in_time, (f"no line with {text!r} within {timeout} s in", self.lines)
            assert found(), (f"the server ended without a line with {text!r}", self.lines)
            return found()[0]

    @property
    def log(self):
        return "\n".join(self.lines)

    def request(self, method, path, body=None, key=KEY, headers=None, timeout=60):
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if isinstance(body, (dict, list)):
                body = json.dumps(body)
            fields = {"api_key": key} if key else {}
            connection.request(method, path, body, {**fields, **(headers or {})})
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
        runtimes = self.request("GET", "/runtimes/").json
        return next(runtime for runtime in runtimes if runtime["name"] == name)

    def keeper(self):
        """The id of its keeper, the one child that is a fork of it and so has its command line.
        The kernel's list of children is not exact while some of them come and go."""
        found = []

        def look():
            ours = command_line(self.process.pid)
            found[:] = [pid for pid in descendants(self.process.pid) if command_line(pid) == ours]
            return found

        until(look)
        return found[0]

    def children(self):
        """The ids of all processes below the server but its keeper, zombies included."""
        ours = command_line(self.process.pid)
        below = descendants(self.process.pid)
        return [pid for pid in below if not ours or command_line(pid) != ours]

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


def need(*programs):
    """Skip where one of these is missing; in CI fail."""
    missing = [program for program in programs
               if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing and os.environ.get("OQC_CI"):
        pytest.fail(f"missing: {missing}")
    if missing:
        pytest.skip(f"not installed: {missing}")


def command_line(pid):
    """The command line of a process, as bytes; none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid):
    """The ids of all processes below one, in /proc."""
    found = []
    for number in [pid, *found]:
        try:
            lists = list(Path(f"/proc/{number}/task").glob("*/children"))
            below = [int(child) for one in lists for child in one.read_text().split()]
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


@pytest.fixture
def public():
    """A folder that any user may reach. That of tmp_path is closed to them by each pytest that
    starts, also while others run."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


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
        self.seconds = 1000.0
        self.wall = 1_800_000_000.0

    def now(self):
        return f"2027-01-15T08:00:{self.seconds % 60:09.6f}Z"

    @staticmethod
    def parse(text):
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()

    @staticmethod
    def at(seconds):
        return f"at {seconds:.3f}"

    def unix(self):
        return self.wall

    def monotonic(self):
        return self.seconds

    def wait(self, event, seconds):
        """Move on at once if nothing has happened; wait for real where no time is given."""
        if seconds is None:
            return event.wait(20)
        if not event.is_set():
            self.seconds += seconds
            self.wall += seconds
        return event.is_set()


@pytest.fixture
def clock():
    return HandClock()


# Tests that hang

class Alarm:
    """Ends what hangs in the main thread, where pytest runs the tests: it raises there. Where no
    signal is heard, in a function written in C, it ends the process some time later."""

    stderr = None       # a descriptor of the standard error of pytest, not of a test

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._ring)
        # Again and again: what hangs may catch everything, and its `finally` may hang as well.
        signal.setitimer(signal.ITIMER_REAL, self.seconds, self.seconds)
        # In place of pytest's own, which would look at the threads at the moment when this rings:
        # it does so without holding the interpreter lock, and crashes if they go on meanwhile.
        faulthandler.dump_traceback_later(3.5 * self.seconds, exit=True, file=self.stderr)

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_):
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        pytest.fail(f"not ended within {self.seconds:g} s; where its threads are:\n{stacks}")


def pytest_configure():
    """Keep the standard error, before a test has another."""
    Alarm.stderr = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Have a test fail that takes longer than `faulthandler_timeout` seconds."""
    seconds = float(item.config.getini("faulthandler_timeout"))
    if item.get_closest_marker("slow"):
        seconds *= SLOW
    with Alarm(seconds):
        return (yield)


# What hangs in a fixture as well.
pytest_runtest_setup = pytest_runtest_teardown = pytest_runtest_call


def pytest_enter_pdb():
    """Let who debugs a test take their time."""
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)


# The processes that run the tests

class Worker:
    """One of the processes that run the tests, forked once they are collected: most of them wait
    for a server that starts, and on two cores this takes less than half the time. It keeps a
    module's reports for who prints them."""

    config = None
    modules = []        # the tests of each; which one to run is said by its number
    reports = []

    @classmethod
    def start(cls):
        """Have an output of its own, so that neither takes what a test of the other prints, and
        print nothing."""
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
        items = cls.modules[number]
        for item, following in itertools.zip_longest(items, items[1:]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        as_data = cls.config.hook.pytest_report_to_serializable
        return [as_data(config=cls.config, report=report) for report in cls.reports]

    @classmethod
    def pytest_runtest_logreport(cls, report):
        cls.reports.append(report)


def servers_of(items):
    """How many servers these tests start, about."""
    return sum("serve" in item.fixturenames for item in items)


def pytest_runtestloop(session):
    """Run the tests in several processes, a module at a time, unless one is to be looked at
    (--pdb, -s, -x)."""
    option = session.config.option
    modules = [list(items) for _, items in itertools.groupby(session.items, lambda one: one.path)]
    plain = option.usepdb or option.maxfail or option.capture == "no"
    if plain or option.collectonly or session.testsfailed or len(modules) < 2:
        return None                 # pytest's own loop
    modules.sort(key=servers_of, reverse=True)      # those first that take long
    Worker.config = session.config
    Worker.modules = modules
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, forked, Worker.start) as pool:
        try:
            for module in as_completed(pool.submit(Worker.run, n) for n in range(len(modules))):
                show(session.config, module.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return True


def show(config, reports):
    """Have pytest show the reports of a module that a worker has run."""
    for data in reports:
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        if report.when == "setup":
            config.hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        config.hook.pytest_runtest_logreport(report=report)
