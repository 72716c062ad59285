"""The schema: what was released never changes, and `check` looks for all that it demands. A backup
that is cut short, and a disk whose room is not known."""
import contextlib
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, until

from oqc import jobs
from oqc.database import INVARIANTS, MIGRATIONS, check, disk_full_error, open_writer

# SHA-256 of the schema that each released version made, as `schema` gives it. Never edit one.
RELEASED = ["8bf7020b97686fd5b5f56a6ca882bc6c5ea0ce12548cfe00b35e5616996d58c1"]


def schema(connection):
    """Every statement that SQLite keeps of how a database was made, as one text."""
    rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL "
                              "AND name NOT LIKE 'sqlite%' ORDER BY name")
    return "\n".join(statement for statement, in rows)


def schema_of(version):
    """The schema that the migrations up to a version make."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for migration in MIGRATIONS[:version]:
            connection.executescript(migration)
        return schema(connection)


def checks(text):
    """The condition of every CHECK in a schema."""
    conditions = []
    for part in text.split("CHECK (")[1:]:
        depth = 1
        for place, character in enumerate(part):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if not depth:
                conditions.append(part[:place])
                break
    return conditions


@pytest.mark.parametrize("version, digest", list(enumerate(RELEASED, 1)))
def test_a_released_version_makes_the_schema_that_it_made_then(version, digest):
    made = schema_of(version)
    assert hashlib.sha256(made.encode()).hexdigest() == digest, made


def test_a_fresh_database_has_the_schema_of_the_last_version(tmp_path):
    with contextlib.closing(open_writer(str(tmp_path / "oqc.db"))) as connection:
        assert schema(connection) == schema_of(len(MIGRATIONS))


def test_a_check_looks_for_all_that_the_schema_demands():
    """Also when a status or a mode is added in jobs.py alone: the conditions are made of those."""
    demanded = checks(schema_of(len(MIGRATIONS)))
    assert len(demanded) == 8
    assert set(demanded) <= {condition for _, condition in INVARIANTS}


@pytest.mark.parametrize("change, wrong", [
    ("mode = 'odd'", "its mode is none of the three"),
    ("return_code = NULL", "its return code does not fit its end"),
    ("runtime = NULL", "its runtime does not fit its start"),
    ("attempts = 0", "it was started without being counted")])
def test_a_check_names_the_job_that_is_wrong_and_no_other(tmp_path, change, wrong):
    time = "2026-11-23T17:19:00.123456Z"
    row = ("X(90)", "echo", jobs.SUCCESS, "echo", 0, time, time, time, 1, 1000, 7, 0, "alice")
    with contextlib.closing(open_writer(str(tmp_path / "oqc.db"))) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        for _ in range(3):
            connection.execute(
                "INSERT INTO jobs (job, mode, status, runtime, return_code, created_time,"
                " start_time, end_time, attempts, shots, seed, echo_code, submitter)"
                f" VALUES ({', '.join('?' * len(row))})", row)
        assert not list(check(str(tmp_path / "oqc.db")))
        connection.execute(f"UPDATE jobs SET {change} WHERE id = 2")
        found = list(check(str(tmp_path / "oqc.db")))
    assert [line for line in found if line.startswith("job ")] == [f"job 2: {wrong}"]


def test_a_backup_that_is_interrupted_leaves_no_part_of_a_copy(tmp_path):
    """Ctrl-C comes while the backup waits for another program, which has the database to itself."""
    path = str(tmp_path / "oqc.db")
    copy = tmp_path / "copy.db"
    with contextlib.closing(open_writer(path)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        process = subprocess.Popen([sys.executable, "-m", "oqc", "backup", copy, "--db", path],
                                   cwd=ROOT)
        files = Path(f"/proc/{process.pid}/fd")
        until(lambda: copy.exists() and path in map(os.path.realpath, files.iterdir()))
        process.send_signal(signal.SIGINT)      # heard when SQLite has done with its step
    assert process.wait(20) == 130
    assert not copy.exists()


def test_a_file_system_that_counts_no_blocks_is_never_full():
    assert os.statvfs("/proc").f_blocks == 0
    assert disk_full_error("/proc/oqc.db") is None
