#!/usr/bin/env python3
"""Kill the server N times at random moments, while clients add and cancel jobs; check what is left.

    scripts/torture.sh N [SEED]

It is killed with SIGKILL. What must hold: every job that was answered 201 is there, no id was given
out twice, what a client once saw as ended never changes again, every job ends, start_time <=
end_time, and SQLite's integrity_check finds nothing.
"""
import argparse
import contextlib
import http.client
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
CLIENTS = 4
JOBS = (
    {"mode": "echo"},
    {"mode": "echo", "return_code": 3},
    {"mode": "simulation", "shots": 10},
    {"mode": "verbatim"},
)
RUNTIME = """#!/bin/sh
read -r job
echo "\\"$job\\""
"""


class Book:
    """What the clients were told."""

    def __init__(self):
        self.lock = threading.Lock()
        self.added = {}             # id: the job as it was sent
        self.ended = {}             # id: the job as it was first seen ended
        self.wrong = []

    def note_added(self, job):
        """Note a job that was answered 201."""
        with self.lock:
            if job["id"] in self.added:
                self.wrong.append(f"id {job['id']} was given out twice")
            self.added[job["id"]] = (job["job"], job["mode"])

    def note(self, job):
        """Note a job that was shown."""
        number = job["id"]
        with self.lock:
            if job["end_time"]:
                self.ended.setdefault(number, job)
            before = self.ended.get(number, job)
            if before != job:
                self.wrong.append(f"job {number} had ended, and changed: {before} then {job}")


def start(folder, runtime):
    """Start a server on the jobs of this folder; return its process and its port."""
    command = [
        sys.executable, "-m", "oqc", "--port", "0", "--runtime", f"tiny={runtime}",
        "--log-level", "info", "--kill-grace", "0.2",
    ]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    log = []
    for line in process.stderr:
        log.append(line)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", line)
        if found:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, int(found[1])
    raise SystemExit("the server did not start:\n" + "".join(log))


def ask(connection, method, path, body=None):
    """Return the status and the decoded body of the answer to a request."""
    text = json.dumps(body) if body else None
    connection.request(method, path, text, {"api_key": KEY})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def client(port, book, dice):
    """Add, look at and cancel jobs until the server is gone."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    gone = (OSError, http.client.HTTPException)
    with contextlib.suppress(*gone), contextlib.closing(connection):
        while True:
            add_and_look(connection, book, dice)


def add_and_look(connection, book, dice):
    """Add some jobs, and look at one of them, or cancel it."""
    count = dice.choice((1, 1, 1, 5))
    jobs = [{"job": f"X({dice.randrange(1000)})", **dice.choice(JOBS)} for _ in range(count)]
    status, added = ask(connection, "POST", "/jobs/add/", jobs)
    if status != 201:
        return
    for job in added:
        book.note_added(job)
    path = f"/jobs/{dice.choice(added)['id']}/"
    if dice.random() < 0.4:
        status, job = ask(connection, "DELETE", path)
        if status == 200:
            book.note(job)
    else:
        _, job = ask(connection, "GET", path)
        book.note(job)


def check(folder, port, book):
    """Wait until every job has ended, and hold the jobs against the book; return how many."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        if not all_ended(connection):
            book.wrong.append("300 s after the last start not every job has ended")
        _, jobs = ask(connection, "GET", "/jobs/list/")
    there = {job["id"]: job for job in jobs}
    for number, sent in book.added.items():
        job = there.get(number)
        if job is None:
            book.wrong.append(f"job {number} was answered 201 and is lost")
        elif (job["job"], job["mode"]) != sent:
            book.wrong.append(f"job {number} is not what was sent: {job}")
    for job in jobs:
        book.note(job)
        begin = job["start_time"] or job["created_time"]
        if not job["end_time"] or begin > job["end_time"]:
            book.wrong.append(f"job {job['id']} has wrong times: {job}")
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "oqc.db"))) as database:
        database.execute("PRAGMA query_only = 1")
        found = database.execute("PRAGMA integrity_check").fetchone()[0]
    if found != "ok":
        book.wrong.append(f"integrity_check: {found}")
    return len(there)


def all_ended(connection):
    """Wait until every job has ended, for 300 s at most; return whether it has."""
    deadline = time.monotonic() + 300
    _, status = ask(connection, "GET", "/status/")
    while not status["idle"] and time.monotonic() < deadline:
        _, status = ask(connection, "GET", f"/status/?wait=10&since={status['change']}")
    return status["idle"]


def kill_once(folder, runtime, book, dice):
    """Start the server and clients, and kill it after a moment."""
    process, port = start(folder, runtime)
    threads = []
    for _ in range(CLIENTS):
        arguments = (port, book, random.Random(dice.random()))
        threads.append(threading.Thread(target=client, args=arguments))
    for thread in threads:
        thread.start()
    time.sleep(dice.uniform(0.0, 0.4))
    process.kill()
    process.wait()
    for thread in threads:
        thread.join()


def arguments_given():
    """Return N and SEED of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", metavar="N", type=int, help="how often the server is killed")
    parser.add_argument("seed", metavar="SEED", type=int, nargs="?",
                        default=random.SystemRandom().randrange(10 ** 6),
                        help="of the dice; printed, so that a run can be repeated")
    return parser.parse_args()


def main():
    """Run the loop; return the exit status."""
    options = arguments_given()
    dice = random.Random(options.seed)
    book = Book()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        runtime = Path(folder) / "tiny"
        runtime.write_text(RUNTIME, encoding="utf-8")
        runtime.chmod(0o755)
        for kill in range(1, options.kills + 1):
            kill_once(folder, runtime, book, dice)
            if sys.stderr.isatty() or kill % 20 == 0:
                progress = f"{kill} kills, {len(book.added)} jobs acknowledged"
                print(progress, file=sys.stderr, flush=True)
            if book.wrong:
                break
        process, port = start(folder, runtime)
        there = check(folder, port, book)
        process.terminate()
        if process.wait(60):
            book.wrong.append(f"the server ended with {process.returncode}")
        process.stderr.close()
    print(f"{options.kills} kills, {len(book.added)} jobs acknowledged, {there} stored, "
          f"{len(book.ended)} seen ended")
    print("\n".join(book.wrong[:20]) or "nothing lost, nothing twice, integrity_check ok")
    return 1 if book.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
