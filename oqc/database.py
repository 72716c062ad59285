"""The database file: its tables, its lock, what is looked at before SQLite may touch it, backup and check.

With store.py the only room that says SQL: of SQLite 3.26, so no RETURNING, STRICT, `->>` or generated columns.
"""
import contextlib
import fcntl
import os
import sqlite3
import struct
from typing import Iterator, Optional, Sequence
from urllib.parse import quote

from oqc import jobs
from oqc.jobs import DiskFull, StoreError

SQLITE_VERSION = sqlite3.sqlite_version
APPLICATION_ID = 0x6F716331         # "oqc1", where file(1) looks for it
LEAST_FREE = 4 << 20                # bytes on the disk below which it counts as full, whatever still fits
CHECKED_AT_START = 256 << 20        # bytes of database up to which every start reads all of it


class Damaged(StoreError):
    """The file is not what was written into it."""


def among(values: Sequence[str]) -> str:
    """The values as an SQL list."""
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


def either(column: str, values: Sequence[str]) -> str:
    """That a column has one of the values, as a CHECK: IN makes a table of its values for each row that is written if
    they are more than two, which doubles the time of an INSERT."""
    return " OR ".join(f"{column} = '{value}'" for value in values)


MIGRATIONS = (                      # the n-th brings a database from version n to n + 1
    f"""
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,       -- or the id of a deleted last job is given out again
        job TEXT NOT NULL,
        mode TEXT NOT NULL CHECK ({either("mode", jobs.MODES)}),
        status TEXT NOT NULL CHECK ({either("status", jobs.STATUSES)}),
        runtime TEXT,
        return_code INTEGER,
        runtime_error TEXT,
        created_time TEXT NOT NULL,
        start_time TEXT CHECK (start_time >= created_time),
        end_time TEXT CHECK (end_time >= coalesce(start_time, created_time)),
        attempts INTEGER NOT NULL DEFAULT 0,        -- counted before each start
        due REAL,                                   -- seconds since 1970: not before this is it tried again
        shots INTEGER NOT NULL,
        seed INTEGER NOT NULL,
        echo_code INTEGER NOT NULL,
        submitter TEXT NOT NULL,                    -- the name of the key it came with
        CHECK ((end_time IS NULL) = (status IN {among(jobs.OPEN)})),
        CHECK ((end_time IS NULL) = (return_code IS NULL)),
        CHECK ((runtime IS NULL) = (start_time IS NULL)),
        CHECK (end_time IS NULL OR (status = '{jobs.SUCCESS}') = (return_code = 0))
    );
    CREATE INDEX jobs_end_time ON jobs (end_time);  -- NULL first, in id order: what has not ended
    CREATE INDEX jobs_failed ON jobs (id) WHERE status = '{jobs.RUNTIME_ERROR}';
    CREATE TABLE results (
        id INTEGER PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
        result TEXT NOT NULL,
        is_json INTEGER NOT NULL
    );
    CREATE TABLE idempotency (
        submitter TEXT, key TEXT, digest TEXT NOT NULL, created REAL NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, PRIMARY KEY (submitter, key)
    );
    CREATE INDEX idempotency_created ON idempotency (created);
    CREATE TABLE pauses (runtime TEXT PRIMARY KEY, reason TEXT NOT NULL, since TEXT NOT NULL);
    """,
)
VERSION = len(MIGRATIONS)
INVARIANTS = (                      # what `check` looks for beyond the constraints, as SQL that holds of a sound job
    ("its status is none of the four", f"status IN {among(jobs.STATUSES)}"),
    ("it ended before it was started", "end_time >= coalesce(start_time, created_time)"),
    ("it was started before it was added", "start_time >= created_time"),
    ("its end does not fit its status", f"(end_time IS NULL) = (status IN {among(jobs.OPEN)})"),
    ("its return code does not fit its status", f"end_time IS NULL OR (status = '{jobs.SUCCESS}') = (return_code = 0)"),
    ("it was started without being counted", "start_time IS NULL OR attempts > 0"),
)


def resolved(path: str) -> str:
    """The file that a link names: SQLite keeps the WAL beside that."""
    return os.path.realpath(path) if os.path.islink(path) else path


def connected(path: str, read_only: bool = True, mode: str = "rw") -> sqlite3.Connection:
    """A connection in autocommit mode, for one thread at a time; raises StoreError."""
    name = quote(os.fsencode(os.path.abspath(path)))
    try:
        connection = sqlite3.connect(f"file://{name}?mode={mode}", uri=True, isolation_level=None,
                                     check_same_thread=False, timeout=10)
        connection.execute(f"PRAGMA query_only = {int(read_only)}")
        return connection
    except sqlite3.Error as error:
        raise explained(path, error) from error


def observing(path: str) -> sqlite3.Connection:
    """A connection that leaves the file and its WAL as they are. One that is only query_only merges them if it is
    closed last, after a crash before the next server has seen them; one to a file without a WAL has to make one."""
    return connected(path, mode="ro" if os.path.exists(path + "-wal") else "rw")


def locked(path: str) -> int:
    """The descriptor of the lock file beside the database, held until it is closed or this process dies."""
    if os.path.isdir(path):
        raise StoreError(f"{path}: is a directory; --db names a file")
    try:
        lock_file = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}.lock: {error.strerror}; the database needs a directory that oqc may write") from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock_file)
        raise StoreError(f"{path}: another oqc uses this database; stop it, or name another file with --db") from error
    except OSError as error:
        os.close(lock_file)
        raise StoreError(f"{path}: its file system has no locks ({error.strerror}); "
                         "name a file on a local disk with --db") from error
    return lock_file


def inspect(path: str, in_use: bool) -> None:
    """Raise StoreError for a file that is not oqc's to open, before SQLite touches it.

    `in_use`: the lock file says that a server was killed while it used it, so that there must be a WAL. The offsets are
    those of https://sqlite.org/fileformat2.html, section 1.3.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(100)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        header = b""
        if in_use or os.path.exists(path + "-wal"):
            raise StoreError(f"{path}: is missing, but a server used it; put the file back, or remove {path}.lock "
                             f"and {path}-wal to begin with no jobs") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if not header:
        return
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StoreError(f"{path}: is not a database; name another file with --db")
    page_size, pages, version, application = struct.unpack_from(">16xH10xI28xI4xI", header)
    if application != APPLICATION_ID:
        raise StoreError(f"{path}: is another program's database; name another file with --db")
    if version > VERSION:
        raise StoreError(f"{path}: was written by a newer oqc (version {version} of the database, this one knows "
                         f"{VERSION}); run that one")
    wal, whole = os.path.exists(path + "-wal"), (65536 if page_size == 1 else page_size) * pages
    if not wal and size < whole:
        raise StoreError(f"{path}: is truncated, {size} bytes of {whole}; put a backup in its place")
    if in_use and not wal:
        raise StoreError(f"{path}-wal: is missing, and the jobs accepted last were in it; put it back, or remove "
                         f"{path}.lock to go on without them")


def prepared(path: str) -> sqlite3.Connection:
    """The writer's connection to a database that has this version's tables; raises StoreError, sqlite3.Error."""
    if os.path.exists(path) and 0 < os.path.getsize(path) <= CHECKED_AT_START:
        with contextlib.closing(observing(path)) as reader:     # before a writer merges the WAL into a damaged file
            found = reader.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise Damaged(f"{path}: is damaged ({found.splitlines()[-1]}); put a backup in its place")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    writer = connected(path, read_only=False)
    version = writer.execute("PRAGMA user_version").fetchone()[0]
    for number in range(version, VERSION):
        # before the WAL is there, so that the header names the program even after a kill in the middle of this
        writer.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA application_id = {APPLICATION_ID}; "
                             f"PRAGMA user_version = {number + 1}; COMMIT;")
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA synchronous = FULL")
    writer.execute("PRAGMA foreign_keys = 1")
    writer.execute("SELECT 1 FROM jobs LIMIT 1")        # makes the WAL, which from here on has to be there after a kill
    return writer


def explained(path: str, error: BaseException) -> BaseException:
    """What an error of SQLite means to an operator; any other is given back as it is."""
    if isinstance(error, OSError):
        return StoreError(f"{path}: {error.strerror}")
    if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):    # the others are defects of the caller
        return error
    text = str(error)
    if "full" in text or ("I/O" in text and no_room(path)):         # the index of the WAL has no error of its own
        return DiskFull(f"{path}: no room on the disk")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"{path}: cannot be written now ({text})")
    if "malformed" in text or "not a database" in text:
        return Damaged(f"{path}: is damaged ({text}); stop the server and put a backup in its place")
    return StoreError(f"{path}: {text}")


def no_room(path: str) -> Optional[DiskFull]:
    """That the disk is as good as full, or None."""
    try:
        disk = os.statvfs(os.path.dirname(os.path.abspath(path)))
    except OSError:                 # it is gone, or a server is that it lies on: that is another trouble
        return None
    free = disk.f_bavail * disk.f_frsize
    if not disk.f_blocks or free >= LEAST_FREE:             # no blocks at all: a file system that does not count them
        return None
    return DiskFull(f"{path}: {free >> 10} KiB of room left on the disk")


def moved(path: str, file: os.stat_result) -> Optional[StoreError]:
    """That the database at this path is not this file any more, or None: what is written into one without a name is
    lost when it is closed."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), file):
            return None
    return StoreError(f"{path}: was moved, replaced or deleted while the server uses it; put it back, or stop the "
                      f"server and remove {path}.lock and {path}-wal to go on with what is there now")


def _known(path: str) -> str:
    """The database that a command is to read; raises StoreError."""
    if not os.path.exists(path):
        raise StoreError(f"{path}: no such database")
    path = resolved(path)
    inspect(path, in_use=False)
    return path


def backup(path: str, target: str) -> None:
    """Copy the database to a new file while a server uses it; raises StoreError. All in one step: a copy some pages at
    a time begins again at every write (https://sqlite.org/c3ref/backup_finish.html), and so might never end."""
    path = _known(path)
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise StoreError(f"{target}: is there already; a backup never replaces a file") from None
    except OSError as error:
        raise StoreError(f"{target}: {error.strerror}") from None
    try:
        with contextlib.closing(observing(path)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
            source.backup(copy, pages=-1)
            copy.execute("PRAGMA journal_mode = DELETE")        # one file, without a WAL beside it
    except BaseException as error:          # Ctrl-C as well: a part of a copy is no backup
        os.unlink(target)
        raise explained(path, error) from error


def check(path: str) -> Iterator[str]:
    """What is wrong with a database, a line each: SQLite's integrity_check, and what must hold of every job. A server
    may use it meanwhile. Raises StoreError."""
    path = _known(path)
    try:
        with contextlib.closing(observing(path)) as reader:
            yield from (line for row in reader.execute("PRAGMA integrity_check") for line in row[0].splitlines()
                        if line != "ok")
            for what, condition in INVARIANTS:
                for number, in reader.execute(f"SELECT id FROM jobs WHERE NOT coalesce({condition}, 1)"):
                    yield f"job {number}: {what}"
    except sqlite3.Error as error:
        raise explained(path, error) from error
