#!/usr/bin/env python3
"""Measure what one server does on this machine: jobs a second, waiting times, memory.

    scripts/bench.py [--quick] [--only PART,...] [--json FILE] [--oqc COMMAND]

Every part starts a server of its own, on an empty database in a temporary folder and on a free port of the loopback
address, asks it over HTTP, and stops it. One client asks, over one connection that is kept alive. All parts take
about half a minute on two cores, and 500 MB of disk; --quick stores a tenth of the jobs.
"""
import argparse
import contextlib
import functools
import json
import os
import platform
import re
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

ROOT = Path(__file__).resolve().parent.parent
KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
JOB = "X(90), Y(180), X(90)"
# A runtime of the protocol `lines` that answers each job at once.
INSTANT = r"""
import sys
for line in sys.stdin:
    sys.stdout.write('{"return_code": 0}\n')
    sys.stdout.flush()
"""
# As many ended jobs as it is given, straight into the database: adding and running them would take minutes.
FILL = """
    INSERT INTO jobs (job, mode, status, runtime, return_code, created_time, start_time, end_time, attempts, shots, seed,
                      echo_code, submitter)
    WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < ?)
    SELECT ?, 'echo', 'Success', 'echo', 0, '2026-01-01T00:00:00.000000Z', '2026-01-01T00:00:00.000000Z',
           '2026-01-01T00:00:00.000000Z', 1, 1000, n, 0, 'bench' FROM count"""


class Server:
    """A server and one kept-alive connection to it."""

    def __init__(self, command, folder, *flags):
        self.process = subprocess.Popen([*command, "--port", "0", *flags], cwd=folder, text=True,
                                        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        port = said = ""
        while not port:
            said = self.process.stderr.readline()
            if not said:
                raise SystemExit(f"{shlex.join(self.process.args)} does not start")
            port = (re.search(r"listening on .*:(\d+)/", said) or ["", ""])[1]
        # The log is on, as it is by default; somebody has to read it.
        self.reader = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        self.sock = socket.create_connection(("127.0.0.1", int(port)))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""

    def send(self, method, path, body=b""):
        """Send a request."""
        self.sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n"
                          f"Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def ask(self, method, path, body=b""):
        """The body of the answer to a request; stops at anything but success."""
        self.send(method, path, body)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.receive()
        head, _, found = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        while len(found) < length:
            found += self.receive()
        if not head.startswith(b"HTTP/1.1 20"):
            raise SystemExit(f"{method} {path}: {(head + found).decode()}")
        return found

    def receive(self):
        """Some bytes of an answer."""
        data = self.sock.recv(1 << 20)
        if not data:
            raise SystemExit("the server has closed the connection")
        return data

    def add(self, body):
        """Add jobs; what was answered."""
        return json.loads(self.ask("POST", "/jobs/add/", json.dumps(body).encode()))

    def memory(self, what="VmRSS"):
        """MiB of resident memory now, or, of VmHWM, at its peak; without its runtimes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(re.search(what + r":\s+(\d+)", status)[1]) / 1024

    def stop(self):
        """Stop it."""
        self.sock.close()
        self.process.terminate()
        self.process.wait()
        self.reader.wait()
        self.process.stderr.close()


@contextlib.contextmanager
def serving(options, *flags, stored=0):
    """A server, with so many jobs stored that have ended."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        if stored:
            server = Server(options.oqc, folder)
            server.stop()
            with contextlib.closing(sqlite3.connect(os.path.join(folder, "oqc.db"))) as connection:
                with connection:
                    connection.execute(FILL, (stored, JOB))
        server = Server(options.oqc, folder, *flags)
        try:
            yield server
        finally:
            server.stop()


def seconds(do, times):
    """The median of the seconds that `do` takes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        do()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def batch(options):
    """A thousand jobs in one add; their runtime is paused, so that nothing else is measured."""
    with serving(options) as server:
        server.ask("POST", "/runtimes/emulator/pause/")
        body = json.dumps([{"job": JOB, "mode": "verbatim"}] * 1000).encode()
        taken = seconds(functools.partial(server.ask, "POST", "/jobs/add/", body), 5 if options.quick else 30)
        yield "1,000 jobs in one add", 1000 / taken, "jobs/s"


def listing(options):
    """All stored jobs in one answer, and a page of them at both ends."""
    count = options.stored
    with serving(options, stored=count) as server:
        idle = server.memory()
        server.send("GET", "/jobs/list/")
        found, last, began = 0, b"", time.perf_counter()
        while not last.endswith(b"\r\n0\r\n\r\n"):
            data = server.receive()
            found += data.count(b'"id"')
            last = (last + data)[-16:]
        yield f"listing of {count:,} jobs", found / (time.perf_counter() - began), "jobs/s"
        if not 0.999 * count <= found <= count:         # a name that two reads share is not counted
            raise SystemExit(f"the listing has {found} of {count} jobs")
        yield "peak of its memory, above idle", server.memory("VmHWM") - idle, "MiB"
        taken = {after: [] for after in (100, count - 100)}
        for _ in range(300):        # in turns, so that a disturbance hits both
            for after, times in taken.items():
                times.append(seconds(functools.partial(server.ask, "GET", f"/jobs/list/?limit=50&after={after}"), 1))
        for after, times in taken.items():
            yield f"page of 50 at job {after:,}", statistics.median(times) * 1e6, "us"


def growth(options):
    """The same requests with a thousand jobs stored, and with all; in turns, so that a disturbance hits both."""
    sizes = (1000, options.stored)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(options, stored=size)) for size in sizes]
        body = json.dumps({"job": JOB, "mode": "verbatim"}).encode()
        for server in servers:
            server.ask("POST", "/runtimes/emulator/pause/")
        for name, request in (("add", ("POST", "/jobs/add/", body)), ("get", ("GET", "/jobs/500/")),
                              ("page of 50", ("GET", "/jobs/list/?limit=50&order=desc"))):
            taken = [[] for _ in servers]
            for _ in range(200 if options.quick else 2000):
                for server, times in zip(servers, taken):
                    times.append(seconds(functools.partial(server.ask, *request), 1))
            small, large = map(statistics.median, taken)
            yield f"{name}, {sizes[0]:,} jobs stored", small * 1e6, "us"
            yield f"{name}, {sizes[1]:,} jobs stored", large * 1e6, "us"
            yield f"{name}, {sizes[1]:,} against {sizes[0]:,}", large / small, "times"
        yield f"memory with {sizes[1]:,} jobs stored", servers[1].memory(), "MiB"
        many, before = options.stored // 10, servers[0].memory()
        for _ in range(many // 1000):       # larger arrays would show what one of them takes while it is read
            servers[0].add([{"job": JOB, "mode": "verbatim"}] * 1000)
        yield f"memory for {many:,} jobs that wait", servers[0].memory() - before, "MiB"


def lines(options):
    """A runtime of the protocol `lines` that answers at once: how soon a lone job starts, how many end a second."""
    with tempfile.TemporaryDirectory(prefix="oqc-bench-") as folder:
        program, config = Path(folder, "instant.py"), Path(folder, "oqc.ini")
        program.write_text(INSTANT, encoding="utf-8")
        config.write_text(f"[runtime instant]\ncommand = {sys.executable} -IS {program}\nprotocol = lines\n",
                          encoding="utf-8")
        with serving(options, "--config", str(config)) as server:
            job = {"job": JOB, "mode": "verbatim"}
            server.ask("GET", f"/jobs/{server.add(job)['id']}/?wait=30")       # the runtime has been started
            starts = []
            for _ in range(100 if options.quick else 1000):
                added = server.add(job)
                ended = json.loads(server.ask("GET", f"/jobs/{added['id']}/?wait=30"))
                starts.append(moment(ended["start_time"]) - moment(ended["created_time"]))
            shown = statistics.quantiles(starts, n=100)
            yield "lines: add to start, median", shown[49] * 1e3, "ms"
            yield "lines: add to start, p99", shown[98] * 1e3, "ms"
            count = 500 if options.quick else 5000
            began = time.perf_counter()
            last = server.add([job] * count)[-1]["id"]
            server.ask("GET", f"/jobs/{last}/?wait=300")
            yield "lines: jobs ended", count / (time.perf_counter() - began), "jobs/s"


def moment(text):
    """A time of the API in seconds."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").timestamp()


def simulation(_options):
    """The simulator's own work: from the job string to the state, without the server."""
    sys.path.insert(0, str(ROOT))
    from oqc import qubit   # pylint: disable=import-outside-toplevel # only here, and not from a .pyz
    for pulses in (10, 1000, 100_000):
        string = ", ".join(f"{'XYZ'[place % 3]}({place * 37 % 1000})" for place in range(pulses))
        taken = seconds(functools.partial(qubit.amplitudes, string), max(3, 20_000 // pulses))
        yield f"simulation of {pulses:,} pulses", taken * 1e6, "us"
        yield f"simulation of {pulses:,}, a pulse", taken / pulses * 1e9, "ns"
    yield "simulation", pulses / taken, "pulses/s"


PARTS = {"batch": batch, "listing": listing, "growth": growth, "lines": lines, "simulation": simulation}


def progress(text):
    """Show on a terminal how far it is."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def parts(text):
    """The parts that --only names."""
    unknown = set(text.split(",")) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no part is called {sorted(unknown)[0]}; there are {', '.join(PARTS)}")
    return text.split(",")


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="parts:\n" + "\n".join(f"  {name:11}{part.__doc__.splitlines()[0]}"
                                                                   for name, part in PARTS.items()))
    parser.add_argument("--quick", action="store_true", help="a tenth of the stored jobs, and fewer repetitions")
    parser.add_argument("--only", type=parts, default=list(PARTS), metavar="PART,...", help="these parts")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    parser.add_argument("--oqc", type=shlex.split, default=[sys.executable, "-m", "oqc"], metavar="COMMAND",
                        help="what starts the server, such as: python3 oqc.pyz")
    options = parser.parse_args()
    options.stored = 100_000 if options.quick else 1_000_000
    figures = []
    for place, name in enumerate(options.only, 1):
        progress(f"{place}/{len(options.only)} {name}")
        for figure in PARTS[name](options):
            figures.append(figure)
            progress(f"{place}/{len(options.only)} {name}: {figure[0]}")
    progress("")
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
          f"SQLite {sqlite3.sqlite_version}")
    for name, value, unit in figures:
        print(f"{name:45} {value:15,.{0 if value >= 100 else 2}f} {unit}")
    if options.json:
        Path(options.json).write_text(json.dumps([{"name": name, "value": value, "unit": unit}
                                                  for name, value, unit in figures], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
