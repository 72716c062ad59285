#!/usr/bin/env python3
"""Measure what one server does on this machine: jobs a second, waiting times, memory.

    scripts/bench.py [--quick] [--only PART,...] [--json FILE] [--oqc COMMAND]

Every part starts a server of its own, on an empty database in a temporary folder and on a free port
of the loopback address, asks it over HTTP, and stops it. One client asks, over one connection that
is kept alive. All parts take about half a minute on two cores, and 500 MB of disk; --quick stores a
tenth of the jobs.
"""
import argparse
import contextlib
import copy
import functools
import http.client
import json
import os
import platform
import re
import resource
import shlex
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
JOB = "X(90), Y(180), X(90)"
VERBATIM = {"job": JOB, "mode": "verbatim"}
THOUSAND = [VERBATIM] * 1000
# A runtime of the protocol `lines` that answers each job at once.
INSTANT = r"""
import json, sys
for line in sys.stdin:
    sys.stdout.write('{"id": %d, "return_code": 0}\n' % json.loads(line)["id"])
    sys.stdout.flush()
"""
INSTANT_CONFIG = """
[runtime instant]
command = {python} -IS {program}
protocol = lines
"""
TRUE_CONFIG = """
[runtime true]
command = /bin/true
slots = {slots}
"""
# As many ended jobs as it is given, straight into the database: adding and running them would take
# minutes.
FILL = """
    INSERT INTO jobs (
        job, mode, status, runtime, return_code,
        created_time, start_time, end_time,
        attempts, shots, seed, echo_code, submitter)
    WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < ?)
    SELECT
        ?, 'echo', 'Success', 'echo', 0,
        '2026-01-01T00:00:00.000000Z', '2026-01-01T00:00:00.000000Z', '2026-01-01T00:00:00.000000Z',
        1, 1000, n, 0, 'bench'
    FROM count"""

# Their results, as those of simulations.
FILL_RESULTS = """
    INSERT INTO results SELECT id, replace(?, '"seed": 0', '"seed": ' || id), 1 FROM jobs"""
RESULT = """{"shots": 1000, "seed": 0, "counts": {"0": 24, "1": 976}, \
"probabilities": [0.030153689607046, 0.969846310392954], \
"statevector": [[0.17364817766693, 0.0], [0.0, -0.984807753012208]], \
"bloch": [0.0, -0.342020143325669, -0.939692620785908]}"""
NDJSON = "application/x-ndjson"
IMPORT = "import time; t = time.perf_counter(); import oqc; print(time.perf_counter() - t)"


class Figure(NamedTuple):
    """What was measured."""

    name: str
    value: float
    unit: str


class Server:
    """A server and one kept-alive connection to it."""

    def __init__(self, command, folder, *flags):
        self.process = subprocess.Popen(
            [*command, "--port", "0", *flags], cwd=folder, text=True, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)})
        self.port = self.named_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # The log is on, as it is by default; somebody has to read it.
        self.reader = subprocess.Popen(
            ["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        self.sock = socket.create_connection(("127.0.0.1", self.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def named_port(self):
        """Return the port that its log names; exit if it ends without."""
        for line in self.process.stderr:
            found = re.search(r"listening on .*:(\d+)/", line)
            if found:
                return int(found[1])
        raise SystemExit(f"{shlex.join(self.process.args)} does not start")

    def send(self, method, path, body=b"", accept="*/*"):
        """Send a request."""
        head = (f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n"
                f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n")
        self.sock.sendall(head.encode() + body)

    def ask(self, method, path, body=b""):
        """Return the body of the answer to a request; exit at anything but success."""
        self.send(method, path, body)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.receive()
        head, _, answer = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        while len(answer) < length:
            answer += self.receive()
        if not head.startswith(b"HTTP/1.1 20"):
            raise SystemExit(f"{method} {path}: {(head + answer).decode()}")
        return answer

    def receive(self):
        """Return some bytes of an answer."""
        data = self.sock.recv(1 << 20)
        if not data:
            raise SystemExit("the server has closed the connection")
        return data

    def add(self, body):
        """Add jobs; return what was answered."""
        return json.loads(self.ask("POST", "/jobs/add/", json.dumps(body).encode()))

    def memory(self, kind="VmRSS"):
        """Return its MiB of resident memory, or, of VmHWM, the peak; without its runtimes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(re.search(kind + r":\s+(\d+)", status)[1]) / 1024

    def threads(self):
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def another(self):
        """Return a second client of the same server."""
        client = copy.copy(self)
        client.sock = socket.create_connection(self.sock.getpeername())
        return client

    def stop(self):
        """Stop it."""
        self.sock.close()
        self.process.terminate()
        self.process.wait()
        self.reader.wait()
        self.process.stderr.close()


@contextlib.contextmanager
def serving(options, *flags, stored=0, result=None):
    """Run a server that has so many ended jobs stored, with this result if there is one."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        if stored:
            server = Server(options.oqc, folder)
            server.stop()
            database = sqlite3.connect(os.path.join(folder, "oqc.db"))
            with contextlib.closing(database), database:
                database.execute(FILL, (stored, JOB))
                if result:
                    database.execute(FILL_RESULTS, (result,))
        server = Server(options.oqc, folder, *flags)
        try:
            yield server
        finally:
            server.stop()


def seconds(do, times=1):
    """Return the median of the seconds that `do` takes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        do()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def medians(times, **calls):
    """Return {name: median of the seconds that the call takes}.

    They are called in turns, so that a disturbance hits all of them.
    """
    taken = {name: [] for name in calls}
    for _ in range(times):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in taken.items()}


def batch(options):
    """A thousand jobs in one add; their runtime is paused, so that nothing else is measured."""
    with serving(options) as server:
        server.ask("POST", "/runtimes/emulator/pause/")
        add = functools.partial(
            server.ask, "POST", "/jobs/add/", json.dumps(THOUSAND).encode())
        taken = seconds(add, 5 if options.quick else 30)
        yield Figure("1,000 jobs in one add", 1000 / taken, "jobs/s")


def listing(options):
    """All stored jobs in one answer, and a page of them at both ends."""
    count = options.stored
    with serving(options, stored=count) as server:
        idle = server.memory()
        began = time.perf_counter()
        listed = list_all(server, "/jobs/list/")
        taken = time.perf_counter() - began
        yield Figure(f"listing of {count:,} jobs", listed / taken, "jobs/s")
        if not 0.999 * count <= listed <= count:
            raise SystemExit(f"the listing has {listed} of {count} jobs")
        peak = server.memory("VmHWM") - idle
        yield Figure("peak of its memory, above idle", peak, "MiB")

        first, last = 100, count - 100
        page = functools.partial(server.ask, "GET")
        taken = medians(
            300,
            first=functools.partial(page, f"/jobs/list/?limit=50&after={first}"),
            last=functools.partial(page, f"/jobs/list/?limit=50&after={last}"))
        yield Figure(f"page of 50 at job {first:,}", taken["first"] * 1e6, "us")
        yield Figure(f"page of 50 at job {last:,}", taken["last"] * 1e6, "us")


def results(options):
    """All stored jobs with their results, as NDJSON, with P(1) of a perfect qubit."""
    count = options.stored // 10
    with serving(options, stored=count, result=RESULT) as server:
        idle = server.memory()
        taken = seconds(functools.partial(list_all, server, "/jobs/results/", NDJSON), 3)
        yield Figure(f"results of {count:,} jobs as NDJSON", count / taken, "records/s")
        peak = server.memory("VmHWM") - idle
        yield Figure("peak of memory for results, above idle", peak, "MiB")


def client(options):
    """The client for Python programs: its import, and an add against one of bare http.client."""
    imports = [float(subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, check=True,
                                    capture_output=True).stdout) for _ in range(9)]
    yield Figure("import oqc", statistics.median(imports) * 1e3, "ms")
    sys.path.insert(0, str(ROOT))
    from oqc.client import Client   # pylint: disable=import-outside-toplevel # only here, as below
    with serving(options) as server, Client(server.url, KEY) as lab:
        lab.pause("emulator")
        bare = http.client.HTTPConnection("127.0.0.1", server.port)
        taken = medians(300 if options.quick else 3000,
                        client=functools.partial(lab.add, JOB, "verbatim"),
                        bare=functools.partial(add_bare, bare))
        bare.close()
    yield Figure("add by the client", taken["client"] * 1e6, "us")
    yield Figure("add by http.client", taken["bare"] * 1e6, "us")
    yield Figure("add by the client against http.client", taken["client"] / taken["bare"], "times")


def add_bare(connection):
    """Add a job by http.client; return it."""
    connection.request("POST", "/jobs/add/", json.dumps(VERBATIM), {"api_key": KEY})
    return json.loads(connection.getresponse().read())


def list_all(server, path, accept="application/json"):
    """Read a listing to its end; return its jobs, without those whose "id" two reads share."""
    server.send("GET", path, accept=accept)
    listed = 0
    end = b""
    while not end.endswith(b"\r\n0\r\n\r\n"):
        data = server.receive()
        listed += data.count(b'"id"')
        end = (end + data)[-16:]
    return listed


def growth(options):
    """The same requests with a thousand jobs stored, and with all; in turns."""
    few, many = 1000, options.stored
    requests = {
        "add": ("POST", "/jobs/add/", json.dumps(VERBATIM).encode()),
        "get": ("GET", "/jobs/500/"),
        "page of 50": ("GET", "/jobs/list/?limit=50&order=desc"),
    }
    with serving(options, stored=few) as small, serving(options, stored=many) as large:
        for server in (small, large):
            server.ask("POST", "/runtimes/emulator/pause/")
        for name, request in requests.items():
            taken = medians(
                200 if options.quick else 2000,
                small=functools.partial(small.ask, *request),
                large=functools.partial(large.ask, *request))
            ratio = taken["large"] / taken["small"]
            yield Figure(f"{name}, {few:,} jobs stored", taken["small"] * 1e6, "us")
            yield Figure(f"{name}, {many:,} jobs stored", taken["large"] * 1e6, "us")
            yield Figure(f"{name}, {many:,} against {few:,}", ratio, "times")
        yield Figure(f"memory with {many:,} jobs stored", large.memory(), "MiB")

        before = small.memory()
        waiting = many // 10
        for _ in range(waiting // 1000):    # a larger array would show what reading it takes
            small.add(THOUSAND)
        grown = small.memory() - before
        yield Figure(f"memory for {waiting:,} jobs that wait", grown, "MiB")


def instant(folder):
    """Write an INI file with a runtime that answers at once; return its name."""
    program = Path(folder, "instant.py")
    program.write_text(INSTANT, encoding="utf-8")
    config = Path(folder, "oqc.ini")
    config.write_text(
        INSTANT_CONFIG.format(python=sys.executable, program=program), encoding="utf-8")
    return str(config)


def lines(options):
    """A runtime of the protocol `lines` that answers at once: how soon a lone job starts, how many
    end a second."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        with serving(options, "--config", instant(folder)) as server:
            seconds_to_start(server)        # the runtime is started, too
            starts = [seconds_to_start(server) for _ in range(100 if options.quick else 1000)]
            percentiles = statistics.quantiles(starts, n=100)
            yield Figure("lines: add to start, median", percentiles[49] * 1e3, "ms")
            yield Figure("lines: add to start, p99", percentiles[98] * 1e3, "ms")

            count = 500 if options.quick else 5000
            began = time.perf_counter()
            last = server.add([VERBATIM] * count)[-1]["id"]
            server.ask("GET", f"/jobs/{last}/?wait=300")
            taken = time.perf_counter() - began
            yield Figure("lines: jobs ended", count / taken, "jobs/s")


def programs(options):
    """A runtime of the protocol `exec` that does nothing, in one slot and in four; and how often a
    bare loop runs the same program."""
    count = 100 if options.quick else 500
    bare, run = [], {1: [], 4: []}
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        servers = {}
        with contextlib.ExitStack() as stack:
            for slots in run:
                config = Path(folder, f"{slots}.ini")
                config.write_text(TRUE_CONFIG.format(slots=slots), encoding="utf-8")
                servers[slots] = stack.enter_context(serving(options, "--config", str(config)))
            for _ in range(3):      # in turns, so that a disturbance hits all of them
                bare.append(seconds(functools.partial(run_bare, count)))
                for slots, server in servers.items():
                    run[slots].append(seconds(functools.partial(run_jobs, server, count)))
    loop = count / statistics.median(bare)
    yield Figure("exec: /bin/true in a bare loop", loop, "runs/s")
    for slots, taken in run.items():
        rate = count / statistics.median(taken)
        yield Figure(f"exec: jobs of /bin/true, slots = {slots}", rate, "jobs/s")
        yield Figure(f"exec: the same against the bare loop, {slots}", rate / loop, "times")


def run_bare(count):
    """Run a program that does nothing so many times."""
    for _ in range(count):
        subprocess.run(["/bin/true"], check=True)


def run_jobs(server, count):
    """Add so many jobs, and wait until they have ended."""
    jobs = server.add([VERBATIM] * count)
    for job in jobs[-4:]:           # with several slots the last one may not end last
        server.ask("GET", f"/jobs/{job['id']}/?wait=300")


def waits(options):
    """How soon a request that waits hears of the end of its job; a thousand that wait at once."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        with serving(options, "--config", instant(folder)) as server:
            seconds_to_hear(server)         # the runtime is started, too
            count = 100 if options.quick else 1000
            heard = statistics.quantiles([seconds_to_hear(server) for _ in range(count)], n=100)
            bare = seconds(functools.partial(server.ask, "GET", "/jobs/1/"), count)
            yield Figure("wait: end to answer, median", heard[49] * 1e3, "ms")
            yield Figure("wait: end to answer, p99", heard[98] * 1e3, "ms")
            yield Figure("wait: a get that does not wait, median", bare * 1e3, "ms")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    # One key's name has room for a quarter of the connections.
    with serving(options, "--max-connections", "4100") as server:
        yield from many_waits(server, 100 if options.quick else 1000)


def many_waits(server, count):
    """Yield what so many requests cost that wait at once, and how soon all hear of the end."""
    server.ask("POST", "/runtimes/emulator/pause/")
    number = server.add(VERBATIM)["id"]
    idle = server.memory()
    idle_threads = server.threads()
    clients = [server.another() for _ in range(count)]
    for client in clients:
        client.send("GET", f"/jobs/{number}/?wait=300")
    while server.threads() < idle_threads + count - 1:      # a resting thread takes one
        time.sleep(0.01)
    yield Figure(f"wait: memory of {count:,} at once", server.memory() - idle, "MiB")
    yield Figure(f"wait: threads of {count:,} at once", server.threads() - idle_threads, "threads")
    began = time.perf_counter()
    server.ask("DELETE", f"/jobs/{number}/")
    for client in clients:
        client.receive()
    yield Figure(f"wait: until all {count:,} are answered", time.perf_counter() - began, "s")
    for client in clients:
        client.sock.close()


def seconds_to_hear(server):
    """Add a job and wait for it; return the seconds from its end to the answer."""
    ended = json.loads(
        server.ask("POST", "/jobs/add/?wait=30", json.dumps(VERBATIM).encode()))
    return time.time() - moment(ended["end_time"])


def starts(options):
    """From the start of a server to its first answer: of the folder, whose bytecode is kept, and of
    the single file; and a Python that does nothing."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        build = [sys.executable, str(ROOT / "scripts" / "build.py"), folder]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        single = Path(folder, "oqc.pyz")
        taken = medians(
            5 if options.quick else 20,
            bare=lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
            folder=functools.partial(start_and_ask, [sys.executable, "-m", "oqc"]),
            single=functools.partial(start_and_ask, [sys.executable, str(single)]))
    yield Figure("start: a Python that does nothing", taken["bare"] * 1e3, "ms")
    yield Figure("start: to the first answer, the folder", taken["folder"] * 1e3, "ms")
    yield Figure("start: to the first answer, the single file", taken["single"] * 1e3, "ms")


def start_and_ask(command):
    """Start a server, ask it once, and stop it by force: a stop takes time of its own."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        server = Server(command, folder)
        server.ask("GET", "/health/")
        server.process.kill()
        server.stop()


def seconds_to_start(server):
    """Add a job; return the seconds from then to its start, when it has ended."""
    number = server.add(VERBATIM)["id"]
    ended = json.loads(server.ask("GET", f"/jobs/{number}/?wait=30"))
    return moment(ended["start_time"]) - moment(ended["created_time"])


def moment(text):
    """Return a time of the API in seconds."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").timestamp()


def simulation(_options):
    """The simulator's own work: from the job string to the state, without the server."""
    sys.path.insert(0, str(ROOT))
    from oqc import qubit   # pylint: disable=import-outside-toplevel # only here, not from a .pyz
    for pulses in (10, 1000, 100_000):
        parts = [f"{'XYZ'[place % 3]}({place * 37 % 1000})" for place in range(pulses)]
        simulate = functools.partial(qubit.amplitudes, ", ".join(parts))
        taken = seconds(simulate, max(3, 20_000 // pulses))
        yield Figure(f"simulation of {pulses:,} pulses", taken * 1e6, "us")
        yield Figure(f"simulation of {pulses:,}, a pulse", taken / pulses * 1e9, "ns")
    yield Figure("simulation", pulses / taken, "pulses/s")


PARTS = {
    "batch": batch,
    "listing": listing,
    "results": results,
    "client": client,
    "growth": growth,
    "lines": lines,
    "programs": programs,
    "waits": waits,
    "starts": starts,
    "simulation": simulation,
}


def progress(text):
    """Show on a terminal how far it is."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def part_names(text):
    """Return the parts that --only names."""
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            known = ", ".join(PARTS)
            raise argparse.ArgumentTypeError(f"no part is called {name}; there are {known}")
    return names


def arguments():
    """Return the options of the command line."""
    parts = [f"  {name:11}{part.__doc__.splitlines()[0]}" for name, part in PARTS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["parts:", *parts]))
    parser.add_argument("--quick", action="store_true",
                        help="a tenth of the stored jobs, and fewer repetitions")
    parser.add_argument("--only", type=part_names, default=list(PARTS), metavar="PART,...",
                        help="these parts")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    parser.add_argument("--oqc", type=shlex.split, default=[sys.executable, "-m", "oqc"],
                        metavar="COMMAND",
                        help="what starts the server, such as: python3 /usr/local/bin/oqc.pyz")
    return parser.parse_args()


def measure(options):
    """Return the figures of all parts that were asked for."""
    figures = []
    for place, name in enumerate(options.only, 1):
        title = f"{place}/{len(options.only)} {name}"
        progress(title)
        for figure in PARTS[name](options):
            figures.append(figure)
            progress(f"{title}: {figure.name}")
    progress("")
    return figures


def main():
    """Measure and print the table."""
    options = arguments()
    options.stored = 100_000 if options.quick else 1_000_000
    figures = measure(options)
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
          f"SQLite {sqlite3.sqlite_version}")
    for name, value, unit in figures:
        digits = 0 if value >= 100 else 2
        print(f"{name:45} {value:15,.{digits}f} {unit}")
    if options.json:
        data = [figure._asdict() for figure in figures]
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
