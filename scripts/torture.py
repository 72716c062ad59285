#!/usr/bin/env python3
"""Kill the server N times at random moments, while clients add and cancel jobs; check what is left.

    scripts/torture.sh N [SEED]

It is killed with SIGKILL. What must hold: every job that was answered 201 is there, no id was given
out twice, what a client once saw as ended never changes again, every job ends, start_time <=
end_time, and SQLite's integrity_check finds nothing.

In every fifth round a person does what a person does: removes the WAL, has a second server on
another name of the file, copies a backup over the database or restores it, fills the disk (of a
small tmpfs, where one may be mounted), or sets the clock ten years ahead (where libfaketime is
installed). Then jobs may be lost, but never in silence: the next start is refused, or the command
was one that says so.
"""
import argparse
import contextlib
import glob
import http.client
import json
import os
import random
import re
import shutil
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
ACTS = ("remove_wal", "stop_without_wal", "link", "copy_backup_over", "restore", "fill", "clock")
DISK = "256m"                       # of the tmpfs
FAKETIME = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
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

    def forget(self, there, kept=()):
        """Forget what was lost and announced: all but the jobs of a listing; `kept` are the ids of
        those that had to stay."""
        there = {job["id"]: job for job in there}
        for number in kept:
            if number not in there:
                self.wrong.append(f"job {number} was in the backup and is lost")
        self.added = {number: sent for number, sent in self.added.items() if number in there}
        self.ended = {}

    def note(self, job):
        """Note a job that was shown."""
        number = job["id"]
        with self.lock:
            if job["end_time"]:
                self.ended.setdefault(number, job)
            before = self.ended.get(number, job)
            if before != job:
                self.wrong.append(f"job {number} had ended, and changed: {before} then {job}")


class Refused(Exception):
    """A server did not start; the text is what it said."""


def start(folder, runtime, *flags, environment=None):
    """Start a server on the jobs of this folder; return its process and its port."""
    command = [
        sys.executable, "-m", "oqc", "--port", "0", "--runtime", f"tiny={runtime}",
        "--log-level", "info", "--kill-grace", "0.2", "--drain", "1", *flags,
    ]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})})
    log = []
    for line in process.stderr:
        log.append(line)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", line)
        if found:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, int(found[1])
    process.wait()
    process.stderr.close()
    raise Refused("".join(log))


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


class Round:
    """A start, clients, perhaps what a person does, and a kill."""

    def __init__(self, folder, runtime, book, dice):
        self.folder = Path(folder)
        self.runtime = runtime
        self.book = book
        self.dice = dice
        self.process = None
        self.kept = ()              # ids of the jobs that a backup has

    def run(self, act=None):
        """Do it all."""
        clock = {}
        if act == "clock":
            clock = {"LD_PRELOAD": FAKETIME[0], "FAKETIME": "+10y",
                     "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        flags = ("--keep-days", "30") if clock else ()
        self.process, port = start(self.folder, self.runtime, *flags, environment=clock)
        threads = []
        for _ in range(CLIENTS):
            arguments = (port, self.book, random.Random(self.dice.random()))
            threads.append(threading.Thread(target=client, args=arguments))
        for thread in threads:
            thread.start()
        time.sleep(self.dice.uniform(0.0, 0.4))
        if act and not clock:
            getattr(self, act)()
        time.sleep(self.dice.uniform(0.0, 0.1))
        self.process.kill()
        self.process.wait()
        for thread in threads:
            thread.join()
        if act and hasattr(self, "after_" + act):
            getattr(self, "after_" + act)()

    # What a person does, while the server runs and after it was killed

    def remove_wal(self):
        """After which the jobs in it are lost by a kill, and the next start says so."""
        self.command("backup", "backup.db")
        (self.folder / "oqc.db-wal").unlink()

    def after_remove_wal(self):
        """Go on with what is in the file, or, where the kill came while the WAL was merged into
        it, with the backup."""
        self.refused("-wal: is missing or empty")
        said = self.command("restore", "oqc.db", may_say="is damaged (")
        if "is damaged (" in said:
            self.command("restore", "backup.db")
        (self.folder / "backup.db").unlink()
        self.forget()

    def stop_without_wal(self):
        """After which a stop saves all of them."""
        (self.folder / "oqc.db-wal").unlink()
        self.process.terminate()
        self.process.wait(60)

    def link(self):
        """Have a second server on another name of the file."""
        other = self.folder / "other"
        other.mkdir(exist_ok=True)
        os.link(self.folder / "oqc.db", other / "oqc.db")
        self.refused("another oqc uses this database", "--db", "other/oqc.db")

    def after_link(self):
        """And after the kill, when its WAL is elsewhere."""
        self.refused("-wal: is missing or empty", "--db", "other/oqc.db")
        shutil.rmtree(self.folder / "other")

    def restore(self):
        """Back up."""
        with self.book.lock:
            self.kept = tuple(self.book.added)
        self.command("backup", "backup.db")

    def after_restore(self):
        """Go on with the backup, as the command says."""
        self.command("restore", "backup.db")
        (self.folder / "backup.db").unlink()
        self.forget()

    copy_backup_over = restore

    def after_copy_backup_over(self):
        """Beside the WAL of what was there."""
        shutil.copy(self.folder / "backup.db", self.folder / "oqc.db")
        self.refused("is a backup, and oqc.db-wal belongs to what was here before")
        self.after_restore()

    def fill(self):
        """Fill the disk, or leave so much that only writes of jobs that are there fit."""
        free = shutil.disk_usage(self.folder).free - self.dice.choice((0, 0, 1 << 20))
        with open(self.folder / "filler", "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                for _ in range(free // 4096 + 1):
                    file.write(bytes(4096))

    def after_fill(self):
        """Make room again."""
        (self.folder / "filler").unlink()

    # What it takes

    def refused(self, reason, *flags):
        """Note it as wrong if a server starts, or says another reason."""
        try:
            process, _ = start(self.folder, self.runtime, *flags)
        except Refused as refusal:
            if reason not in str(refusal):
                self.book.wrong.append(f"expected {reason!r}, found {refusal}")
            return
        process.kill()
        process.wait()
        self.book.wrong.append(f"a server started in silence, expected {reason!r}")

    def command(self, *arguments, may_say="\n\n"):
        """Return what a command said; note it as wrong if it fails, and may not say that."""
        done = subprocess.run(
            [sys.executable, "-m", "oqc", *arguments], cwd=self.folder, check=False,
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode and may_say not in done.stderr:
            self.book.wrong.append(f"{arguments}: {done.stderr}")
        return done.stderr

    def forget(self):
        """Begin anew with what is there after a loss that was announced, and resume what the
        restore has paused."""
        process, port = start(self.folder, self.runtime)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            _, jobs = ask(connection, "GET", "/jobs/list/")
            self.book.forget(jobs, self.kept)
            for name in ("tiny", "simulator"):
                ask(connection, "POST", f"/runtimes/{name}/resume/")
        process.terminate()
        process.wait(60)
        for path in self.folder.glob("oqc.db.replaced-*"):
            path.unlink()


@contextlib.contextmanager
def small_disk(folder):
    """Have the folder be a disk of its own; gives whether it is."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


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
    done = dict.fromkeys(ACTS, 0)
    with tempfile.TemporaryDirectory() as folder, small_disk(folder) as mounted:
        if not mounted:
            del done["fill"]
        if not FAKETIME:
            del done["clock"]
        runtime = Path(folder) / "tiny"
        runtime.write_text(RUNTIME, encoding="utf-8")
        runtime.chmod(0o755)
        for kill in range(1, options.kills + 1):
            act = None
            if kill % 5 == 0:
                act = dice.choice(list(done))
                done[act] += 1
            Round(folder, runtime, book, dice).run(act)
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
    print("acts of a person: " + ", ".join(f"{act} {count}" for act, count in done.items()))
    print("\n".join(book.wrong[:20]) or "nothing lost, nothing twice, integrity_check ok")
    return 1 if book.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
