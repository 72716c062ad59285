"""The job contract as a competent developer writes it in an afternoon, shared by every peer.

One SQLite connection under a lock, WAL with synchronous=FULL, one transaction for each job added,
one worker thread that ends echo jobs. The peers differ only in what serves HTTP.
"""
import json
import queue
import re
import sqlite3
import sys
import threading
from datetime import datetime, timezone

API_KEY = "$YboMhcaz7U+3;;M(~t|BX-~ 2kw|ZII2e+s$pw5sBqf$?g]-BYlq.! R/qMR/V="
JOB = re.compile(r"[XYZ]\([0-9]{1,3}\)(, [XYZ]\([0-9]{1,3}\))*")
MODES = ("verbatim", "simulation", "echo")
FIELDS = ("id", "job", "mode", "status", "runtime", "return_code", "runtime_error",
          "created_time", "start_time", "end_time")
COLUMNS = ", ".join(FIELDS)
TABLE = """
    CREATE TABLE IF NOT EXISTS jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT, mode TEXT, status TEXT, runtime TEXT,
        return_code INTEGER, runtime_error TEXT, created_time TEXT, start_time TEXT, end_time TEXT)
"""


def now():
    """Return the UTC time as an ISO 8601 string."""
    return datetime.now(timezone.utc).isoformat()


def port_and_database():
    """Return the two arguments that every peer takes: PORT DATABASE."""
    return int(sys.argv[1]), sys.argv[2]


class Jobs:
    """The jobs in a database, and a worker thread that ends each as an echo."""

    def __init__(self, database):
        self.lock = threading.Lock()
        self.connection = sqlite3.connect(database, check_same_thread=False, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute(TABLE)
        self.waiting = queue.Queue()
        threading.Thread(target=self.work, daemon=True).start()

    def add(self, body):
        """Return (status, object): 201 and the job, or 400 and an error."""
        try:
            data = json.loads(body)
            job, mode = data["job"], data["mode"]
        except (ValueError, KeyError, TypeError):
            return 400, {"error": "malformed body"}
        if not isinstance(job, str) or not JOB.fullmatch(job) or mode not in MODES:
            return 400, {"error": "bad job or mode"}
        with self.lock:
            cursor = self.connection.execute(
                "INSERT INTO jobs (job, mode, status, created_time) VALUES (?, ?, 'Starting', ?)",
                (job, mode, now()))
            number = cursor.lastrowid
        self.waiting.put(number)
        return 201, {"id": number, "job": job, "mode": mode, "status": "Starting"}

    def get(self, number):
        """Return (status, object): 200 and the job, or 404 and 0."""
        with self.lock:
            row = self.connection.execute(
                f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (number,)).fetchone()
        if row is None:
            return 404, 0
        return 200, dict(zip(FIELDS, row))

    def list(self):
        """Return (200, every job)."""
        with self.lock:
            rows = self.connection.execute(f"SELECT {COLUMNS} FROM jobs ORDER BY id").fetchall()
        return 200, [dict(zip(FIELDS, row)) for row in rows]

    def work(self):
        """End each job that waits: one transaction for its start, one for its end."""
        while True:
            number = self.waiting.get()
            with self.lock:
                self.connection.execute(
                    "UPDATE jobs SET runtime='echo', start_time=? WHERE id=?", (now(), number))
            with self.lock:
                self.connection.execute(
                    "UPDATE jobs SET status='Success', return_code=0, end_time=? WHERE id=?",
                    (now(), number))
