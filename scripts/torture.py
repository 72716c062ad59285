#!/usr/bin/env python3
"""Kill the server N times with SIGKILL at random moments while clients add and cancel jobs, and check what is left.

    scripts/torture.sh N [SEED]

What must hold: every job that was answered 201 is there, no id was given out twice, what a client once saw as ended
never changes again, every job ends, start_time <= end_time, and SQLite's integrity_check finds nothing.
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
JOBS = ({"mode": "echo"}, {"mode": "echo", "return_code": 3}, {"mode": "simulation", "shots": 10}, {"mode": "verbatim"})


class Book:
    """What the clients were told."""

    def __init__(self):
        self.lock = threading.Lock()
        self.added = {}             # id: the job as it was sent
        self.ended = {}             # id: the job as it was first seen ended
        self.wrong = []

    def note_added(self, job):
        """A job was answered 201."""
        with self.lock:
            if job["id"] in self.added:
                self.wrong.append(f"id {job['id']} was given out twice")
            self.added[job["id"]] = (job["job"], job["mode"])

    def note(self, job):
        """A job was shown."""
        with self.lock:
            before = self.ended.setdefault(job["id"], job) if job["end_time"] else self.ended.get(job["id"])
            if before and before != job:
                self.wrong.append(f"job {job['id']} had ended, and changed: {before} then {job}")


def start(folder, runtime):
    """(process, port) of a server on the jobs of this folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "oqc", "--port", "0", "--runtime", f"tiny={runtime}", "--log-level", "info",
         "--kill-grace", "0.2"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stderr:
        seen.append(line)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", line)
        if found:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, int(found[1])
    raise SystemExit("the server did not start:\n" + "".join(seen))


def ask(connection, method, path, body=None):
    """(status, decoded body) of a request."""
    connection.request(method, path, json.dumps(body) if body else None, {"api_key": KEY})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def client(port, book, dice):
    """Add, look at and cancel jobs until the server is gone."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        while True:
            count = dice.choice((1, 1, 1, 5))
            jobs = [{"job": f"X({dice.randrange(1000)})", **dice.choice(JOBS)} for _ in range(count)]
            status, added = ask(connection, "POST", "/jobs/add/", jobs)
            if status != 201:
                continue
            for job in added:
                book.note_added(job)
            number = dice.choice(added)["id"]
            if dice.random() < 0.4:
                status, job = ask(connection, "DELETE", f"/jobs/{number}/")
                if status == 200:
                    book.note(job)
            else:
                book.note(ask(connection, "GET", f"/jobs/{number}/")[1])


def check(folder, port, book):
    """Wait until every job has ended, and hold the jobs against the book."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    deadline = time.monotonic() + 300
    while not ask(connection, "GET", "/status/")[1]["idle"]:
        if time.monotonic() > deadline:
            book.wrong.append("300 s after the last start not every job has ended")
            break
        time.sleep(0.1)
    there = {job["id"]: job for job in ask(connection, "GET", "/jobs/list/")[1]}
    connection.close()
    for number, sent in book.added.items():
        if number not in there:
            book.wrong.append(f"job {number} was answered 201 and is lost")
        elif (there[number]["job"], there[number]["mode"]) != sent:
            book.wrong.append(f"job {number} is not what was sent: {there[number]}")
    for job in there.values():
        book.note(job)
        if not job["end_time"] or (job["start_time"] or job["created_time"]) > job["end_time"]:
            book.wrong.append(f"job {job['id']} has wrong times: {job}")
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "oqc.db"))) as database:
        database.execute("PRAGMA query_only = 1")
        found = database.execute("PRAGMA integrity_check").fetchone()[0]
    if found != "ok":
        book.wrong.append(f"integrity_check: {found}")
    return len(there)


def main():
    """Run the loop; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", metavar="N", type=int, help="how often the server is killed")
    parser.add_argument("seed", metavar="SEED", type=int, nargs="?", default=random.SystemRandom().randrange(10 ** 6),
                        help="of the dice; printed, so that a run can be repeated")
    options = parser.parse_args()
    dice, book = random.Random(options.seed), Book()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        runtime = Path(folder) / "tiny"
        runtime.write_text("#!/bin/sh\nread -r job\necho \"\\\"$job\\\"\"\n", encoding="utf-8")
        runtime.chmod(0o755)
        for kill in range(options.kills):
            process, port = start(folder, runtime)
            threads = [threading.Thread(target=client, args=(port, book, random.Random(dice.random())))
                       for _ in range(CLIENTS)]
            for thread in threads:
                thread.start()
            time.sleep(dice.uniform(0.0, 0.4))
            process.kill()
            process.wait()
            for thread in threads:
                thread.join()
            if sys.stderr.isatty() or kill % 20 == 19:
                print(f"{kill + 1} kills, {len(book.added)} jobs acknowledged", file=sys.stderr, flush=True)
            if book.wrong:
                break
        process, port = start(folder, runtime)
        there = check(folder, port, book)
        process.terminate()
        if process.wait(60):
            book.wrong.append(f"the server ended with {process.returncode}")
        process.stderr.close()
    print(f"{options.kills} kills, {len(book.added)} jobs acknowledged, {there} stored, {len(book.ended)} seen ended")
    print("\n".join(book.wrong[:20]) or "nothing lost, nothing twice, integrity_check ok")
    return 1 if book.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
