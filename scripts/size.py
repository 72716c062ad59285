#!/usr/bin/env python3
"""Measure what a large store costs: a million jobs stored and as many waiting, against a thousand.

    scripts/size.py [JOBS]

Both stores are written straight into database files in a temporary folder; each has a server of its
own, and both are asked in turns, over one connection that is kept alive. The stored jobs are of 30
people, in sweeps of 181; one of 50 has failed; three alone have a tag, a submitter and a runtime.
It takes about two minutes on two cores, and 2 GB of disk.
"""
import contextlib
import functools
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import VERBATIM, Server, list_all, medians, seconds

FEW = 1000
SWEEP = 181
OQC = [sys.executable, "-m", "oqc"]
FILL = """
    WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < :jobs)
    INSERT INTO jobs (
        job, mode, status, runtime, return_code, runtime_error, created_time, start_time, end_time,
        attempts, shots, seed, echo_code, submitter, tag)
    SELECT
        'X(90), Y(180), X(90)',
        CASE n % 3 WHEN 0 THEN 'verbatim' WHEN 1 THEN 'simulation' ELSE 'echo' END,
        CASE n % 50 WHEN 7 THEN 'Runtime Error' ELSE 'Success' END,
        CASE WHEN n > :jobs - 3 THEN 'rare'
             WHEN n % 3 = 0 THEN 'emulator' WHEN n % 3 = 1 THEN 'simulator' ELSE 'echo' END,
        CASE n % 50 WHEN 7 THEN 3 ELSE 0 END,
        CASE n % 50 WHEN 7 THEN 'no signal' END,
        time, time, time, 1, 1000, n, 0,
        CASE WHEN n > :jobs - 3 THEN 'rare' ELSE 'user-' || (n % 30) END,
        CASE WHEN n > :jobs - 3 THEN 'rare' ELSE 'sweep-' || (n / 181) END
    FROM (SELECT n, strftime('%Y-%m-%dT%H:%M:%S.000000Z', 1767225600 + n, 'unixepoch') AS time
          FROM count)"""
RESULTS = """
    INSERT INTO results SELECT id, '{"counts": {"0": 512, "1": 488}}', 1 FROM jobs"""
WAITING = """
    WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < :jobs)
    INSERT INTO jobs (job, mode, status, created_time, shots, seed, echo_code, submitter, tag)
    SELECT 'X(90), Y(180), X(90)', 'verbatim', 'Starting', :now, 1000, n, 0, 'user-' || (n % 30),
           CASE WHEN n <= :cancelled THEN 'rabi-7' END
    FROM count"""
COUNTS = "UPDATE counts SET jobs = :jobs WHERE state = 'waiting' AND mode = 'verbatim'"
PAUSE = "INSERT INTO pauses VALUES ('emulator', 'measured', :now, 'oqc')"
FILTERS = (
    "status=Starting", "status=Retrying", "status=Success", "status=Runtime%20Error",
    "mode=verbatim", "mode=simulation", "mode=echo", "state=waiting", "state=running",
    "state=ended", "runtime=emulator", "runtime=rare", "runtime=none", "tag=sweep-3", "tag=rare",
    "tag=none", "by=user-3", "by=rare", "by=none", "since=2026-01-01T00:05", "since=0s",
    "until=2026-01-01T00:05", "until=0s")
PAIRS = (
    "tag=sweep-3&status=Success", "by=user-3&state=waiting", "by=user-3&status=Runtime%20Error",
    "runtime=emulator&by=user-3", "mode=echo&status=Runtime%20Error", "tag=sweep-3&by=user-3",
    "state=ended&mode=verbatim", "since=2026-01-01T00:05&by=user-3")


def filled(folder, jobs):
    """Write a database of so many stored and as many waiting jobs; return its folder."""
    folder.mkdir()
    Server(OQC, folder).stop()
    database = sqlite3.connect(folder / "oqc.db")
    values = {"jobs": jobs, "now": moment(time.time()), "cancelled": min(jobs // 2, 10_000)}
    with contextlib.closing(database), database:
        database.execute(FILL, values)
        database.execute(RESULTS)
        database.execute(WAITING, values)
        database.execute(COUNTS, values)
        database.execute(PAUSE, values)
    return folder


def moment(unix):
    """Return a time as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(unix))


def report(name, value, unit, most=None):
    """Print a figure, and whether it is within what is asked of it."""
    verdict = "" if most is None else f"at most {most:g}: {'yes' if value <= most else 'NO'}"
    print(f"{name:56} {value:12,.2f} {unit:6} {verdict}".rstrip(), flush=True)


def starts(small, large, waiting):
    """Report how soon a server answers, with few and with many jobs that wait."""
    taken = medians(5, small=functools.partial(start, small), large=functools.partial(start, large))
    report("start to first answer, few", taken["small"] * 1e3, "ms")
    report(f"start to first answer, {waiting:,} waiting", taken["large"] * 1e3, "ms",
           1.5e3 * taken["small"] + 100)


def start(folder):
    """Start a server, ask it once, and stop it by force: a stop takes time of its own."""
    server = Server(OQC, folder)
    server.ask("GET", "/health/")
    server.process.kill()
    server.stop()


def compare(servers, requests, most, times, most_ms=None):
    """Report each request on the large store, against the same on the small one."""
    for request in requests:
        taken = medians(times, **{name: functools.partial(server.ask, "GET", request)
                                  for name, server in servers.items()})
        ratio = taken["large"] / taken["small"]
        report(f"{request}, against few", ratio, "times", most)
        if most_ms:
            report(f"{request}", taken["large"] * 1e3, "ms", most_ms)


def adds(servers):
    """Report an add on the large store against one on the small store."""
    body = json.dumps(VERBATIM).encode()
    taken = medians(300, **{name: functools.partial(server.ask, "POST", "/jobs/add/", body)
                            for name, server in servers.items()})
    report("POST /jobs/add/, against few", taken["large"] / taken["small"], "times", 1.3)


def pages(servers, kind, filters, most):
    """Report the filters whose first page costs most, against the plain page of the small store."""
    path = f"/jobs/{kind}/?limit=50"
    plain = medians(50, small=functools.partial(servers["small"].ask, "GET", path))["small"]
    taken = medians(15, **{
        f"{one} {order}": functools.partial(
            servers["large"].ask, "GET", f"{path}&order={order}&{one}".rstrip("&"))
        for order in ("asc", "desc") for one in ("", *filters)})
    worst = sorted(taken, key=taken.get, reverse=True)
    for name in worst[:3]:
        report(f"{kind}, page of 50: {name}", taken[name] / plain, "times", most)
    report(f"{kind}, {len(taken)} pages: within that", sum(
        value <= most * plain for value in taken.values()), "pages")


def streams(server):
    """Report what the memory of a server grows by while all is listed."""
    for path in ("/jobs/list/", "/jobs/results/"):
        before = server.memory("VmHWM")
        began = time.perf_counter()
        listed = list_all(server, path)
        rate = listed / (time.perf_counter() - began)
        report(f"{path} of all", rate, "jobs/s")
        report(f"{path} of all: peak of memory, more", server.memory("VmHWM") - before, "MiB", 16)


@contextlib.contextmanager
def adding(server, taken):
    """Add jobs one by one meanwhile, by a client of its own; the seconds go to `taken`."""
    client = server.another()
    over = threading.Event()
    body = json.dumps({"job": "X(90)", "mode": "echo"}).encode()

    def go_on():
        while not over.is_set():
            taken.append(seconds(functools.partial(client.ask, "POST", "/jobs/add/", body)))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        client.sock.close()


def cancels(server, count):
    """Report a cancel by tag, and adds meanwhile."""
    taken = []
    with adding(server, taken):
        cancel = seconds(functools.partial(server.ask, "POST", "/jobs/cancel/?tag=rabi-7"))
    report(f"cancel by tag of {count:,}", cancel, "s", 0.3)
    report("an add meanwhile, the slowest", max(taken) * 1e3, "ms", 20)


def prunes(server, folder, jobs):
    """Report a prune of all that has ended, adds meanwhile, and what the file gives back."""
    before = os.path.getsize(folder / "oqc.db")
    taken = []
    with adding(server, taken):
        prune = seconds(functools.partial(server.ask, "DELETE", "/jobs/list/?older-than=1d"))
    report(f"prune of {jobs:,}", prune, "s")
    report("an add meanwhile, p99", statistics.quantiles(taken, n=100)[98] * 1e3, "ms", 20)
    report("the file after it, of before", os.path.getsize(folder / "oqc.db") / before, "")


def measure(folder, jobs):
    """Measure and print the table."""
    small, large = filled(folder / "small", FEW), filled(folder / "large", jobs)
    starts(small, large, jobs)
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, home in (("small", small), ("large", large)):
            servers[name] = Server(OQC, home, "--max-waiting", str(2 * jobs))
            stack.callback(servers[name].stop)
        before = servers["small"].memory()
        time.sleep(5)               # until all that wait are in the queue
        compare(servers, ("/status/", "/metrics/", "/runtimes/", "/health/"), 1.5, 100, 3)
        adds(servers)
        compare(servers, [f"/jobs/500/{part}" for part in ("", "result/", "details/")], 1.3, 300)
        for kind in ("list", "results"):
            pages(servers, kind, FILTERS, 2)
            pages(servers, kind, PAIRS, 3)
        grown = servers["large"].memory() - before
        report("memory of a waiting job, all that the server grew", grown * 2 ** 20 / jobs, "bytes",
               60)
        cancels(servers["large"], min(jobs // 2, 10_000))
        streams(servers["large"])
        prunes(servers["large"], large, jobs)


def main():
    """Measure."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
          f"SQLite {sqlite3.sqlite_version}; {jobs:,} stored and {jobs:,} waiting")
    with tempfile.TemporaryDirectory(prefix="oqc-size-") as folder:
        measure(Path(folder), jobs)


if __name__ == "__main__":
    main()
