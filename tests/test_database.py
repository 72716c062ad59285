"""The schema: what was released never changes, and `check` looks for all that it demands. A backup
that is cut short, and a disk whose room is not known."""
import contextlib
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, until

from oqc import jobs
from oqc.database import (
    INVARIANTS, MIGRATIONS, VERSION, backup, check, disk_full_error, mark_in_file, mark_in_use,
    open_writer)

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


class BusySource(sqlite3.Connection):
    """A connection whose copy takes many steps, between which somebody writes."""

    write = print
    steps = 0

    def backup(self, target, *, pages=-1, progress=None, **_):
        """Copy all."""
        def step(*arguments):
            self.write()
            self.steps += 1
            assert self.steps < 1000, "it begins again and again"
            if progress:
                progress(*arguments)
        super().backup(target, pages=min(pages, 2), progress=step)


def test_a_backup_during_steady_writes_ends_and_is_of_one_moment(tmp_path, monkeypatch):
    path = str(tmp_path / "oqc.db")
    connect = sqlite3.connect
    with contextlib.closing(open_writer(path)) as writer:
        mark_in_file(writer)
        writer.execute("INSERT INTO notes VALUES ('a', 0)")
        writer.execute("INSERT INTO notes VALUES ('b', ?)", ("b" * 100_000,))
        writer.execute("INSERT INTO notes VALUES ('z', 0)")
        BusySource.write = lambda _: writer.execute("UPDATE notes SET value = value + 1 "
                                                    "WHERE name IN ('a', 'z')")
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=BusySource, **k))
            backup(path, str(tmp_path / "copy.db"))
    with contextlib.closing(connect(tmp_path / "copy.db")) as copy:
        values = copy.execute("SELECT value FROM notes WHERE name IN ('a', 'z')").fetchall()
        assert values == [("0",), ("0",)]
    assert not list(check(str(tmp_path / "copy.db")))


# From version 1

@pytest.fixture
def version_1(tmp_path):
    """The path of a database as the release with version 1 left it when it was killed."""
    return shutil.copy(ROOT / "tests" / "version_1.db", str(tmp_path / "oqc.db"))


def everything(path, columns="*"):
    """All jobs, or these columns of them, and all results and pauses, without a writer."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [connection.execute(f"SELECT {names} FROM {table} ORDER BY 1").fetchall()
                for names, table in ((columns, "jobs"), ("*", "results"),
                                     ("runtime, reason, since", "pauses"))]


@contextlib.contextmanager
def writing(path):
    """Another program's connection, which commits what it did."""
    connection = sqlite3.connect(path)
    with contextlib.closing(connection), connection:
        yield connection


def version_of(path):
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


COLUMNS_1 = ("id, job, mode, status, runtime, return_code, runtime_error, created_time, "
             "start_time, end_time, attempts, due, shots, seed, echo_code, submitter")


def test_a_database_of_version_1_is_brought_to_the_last_one_with_all_that_is_in_it(
        version_1, caplog):
    before = everything(version_1)
    with contextlib.closing(open_writer(version_1)) as connection:
        assert schema(connection) == schema_of(len(MIGRATIONS))
        counts = connection.execute(
            "SELECT state, mode, jobs FROM counts WHERE jobs > 0 ORDER BY state").fetchall()
        others = connection.execute("SELECT count(*) FROM counts WHERE jobs = 0").fetchone()
    assert everything(version_1, COLUMNS_1) == before
    assert counts == [("retrying", "verbatim", 1), ("running", "verbatim", 1),
                      ("waiting", "verbatim", 1)]
    assert others == (6,)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        f"has version 1 of the database and is brought to version {VERSION}; a million jobs take "
        "some seconds", f"is of version {VERSION} now"]
    assert not list(check(version_1))


def test_a_fresh_database_says_nothing_of_versions_and_can_give_room_back(tmp_path, caplog):
    with contextlib.closing(open_writer(str(tmp_path / "oqc.db"))) as connection:
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)      # incremental
    assert not caplog.records


def test_a_check_and_a_backup_read_version_1_and_leave_it_as_it_is(version_1, tmp_path):
    before = everything(version_1)
    assert not list(check(version_1))
    backup(version_1, str(tmp_path / "copy.db"))
    assert version_of(version_1) == version_of(tmp_path / "copy.db") == 1
    assert everything(tmp_path / "copy.db") == before
    with writing(version_1) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        connection.execute("UPDATE jobs SET mode = 'odd' WHERE id = 4")
    assert "job 4: its mode is none of the three" in list(check(version_1))


MORE_JOBS = """
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 100000)
    INSERT INTO jobs (job, mode, status, runtime, return_code, created_time, start_time, end_time,
                      attempts, shots, seed, echo_code, submitter)
    SELECT 'X(90)', 'echo', 'Success', 'echo', 0, '2027', '2027', '2027', 1, 1, n, 0, 'bob' FROM n
    """
MIGRATE = "import sys; from oqc.database import open_writer; open_writer(sys.argv[1])"


@pytest.mark.slow                   # four seconds
def test_a_migration_that_is_killed_has_changed_nothing_and_the_next_one_does_it(version_1):
    with writing(version_1) as connection:
        connection.execute(MORE_JOBS)
    before = everything(version_1)
    wal = Path(version_1 + "-wal")
    for size in (0, 1 << 20, 4 << 20):
        process = subprocess.Popen([sys.executable, "-c", MIGRATE, version_1], cwd=ROOT)
        # Nothing but the migration writes so much.
        until(lambda: wal.exists() and wal.stat().st_size >= size)      # pylint: disable=cell-var-from-loop # called at once
        process.kill()
        assert process.wait(20) == -signal.SIGKILL
        assert version_of(version_1) == 1
        assert everything(version_1) == before
    subprocess.run([sys.executable, "-c", MIGRATE, version_1], cwd=ROOT, check=True, timeout=60)
    assert version_of(version_1) == VERSION
    assert everything(version_1, COLUMNS_1) == before
    assert not list(check(version_1))


@pytest.mark.parametrize("change", ["UPDATE counts SET jobs = 2 WHERE state = 'waiting'",
                                    "DELETE FROM counts WHERE state = 'waiting'",
                                    "DELETE FROM jobs WHERE id = 7"])
def test_a_check_compares_the_kept_counts_with_the_jobs(version_1, change):
    with contextlib.closing(open_writer(version_1)) as connection:
        connection.execute(change)
        assert any(line.startswith("counts: ") and "waiting" in line for line in check(version_1))


def test_the_instance_of_a_server_is_that_of_its_lock_file_on_its_file_system(tmp_path):
    """A copied file has another inode; in a copied file system it has the same one."""
    path = tmp_path / "oqc.db.lock"
    path.touch()
    with open(path, "r+b") as file:
        stat = os.fstat(file.fileno())
        first, run = mark_in_use(file.fileno())
        assert (first.endswith(f"-{stat.st_dev:x}.{stat.st_ino:x}"), run) == (True, 1)
        assert mark_in_use(file.fileno()) == (first, 2)
    shutil.copy(path, tmp_path / "copy.lock")
    with open(tmp_path / "copy.lock", "r+b") as file:
        copied, _ = mark_in_use(file.fileno())
    assert copied != first and copied.split("-")[0] == first.split("-")[0]


def test_a_file_system_that_counts_no_blocks_is_never_full():
    assert os.statvfs("/proc").f_blocks == 0
    assert disk_full_error("/proc/oqc.db") is None
