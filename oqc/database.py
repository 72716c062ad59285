"""The database file: schema, lock, what is checked before SQLite may open it, backup, check.

With store.py the only room that says SQL. It is that of SQLite 3.26: no RETURNING, STRICT, `->>` or
generated columns.
"""
import contextlib
import fcntl
import json
import logging
import os
import shutil
import sqlite3
import struct
import tempfile
import zlib
from typing import Iterator, Optional, Sequence, Tuple
from urllib.parse import quote

from oqc import jobs
from oqc.jobs import DamagedRow, DiskFull, StoreError

log = logging.getLogger("oqc")

SQLITE_VERSION = sqlite3.sqlite_version
APPLICATION_ID = 0x6F716331         # "oqc1", where file(1) looks for it
# "oqc+": a server uses the file, or was killed, so that there must be a WAL beside it. In the file
# itself, since a hard link, a bind mount or a copy has no lock file that could say so.
IN_USE_ID = 0x6F71632B
OWN_LOCK_BYTE = 0x40000200          # the first after those that SQLite locks (its os.h)
RESTORING = b"restoring "           # begins the lock file while a restore goes on
LIVE = b"\2\2"                      # bytes 18 and 19 of a file in WAL mode; a backup has 1, 1
LEAST_FREE = 4 << 20                # bytes: with fewer of them free a disk counts as full
CHECKED_AT_START = 16 << 20         # bytes of database up to which a start after a kill reads all
COPIED_AT_ONCE = 1000               # pages
WAL_KEPT = 16 << 20                 # bytes of the WAL that are not given back when it begins anew

# A migration that was released is frozen, to the byte: there are databases that were made with it.
# So no constant stands in it; a backslash joins a line that is too wide for the page. Its CHECKs
# use OR where there are more than two values: IN makes a table of them for each row that is
# written, which doubles the time of an INSERT.
VERSION_1 = """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,       -- or the id of a deleted last job is given \
out again
        job TEXT NOT NULL,
        mode TEXT NOT NULL CHECK (mode = 'verbatim' OR mode = 'simulation' OR mode = 'echo'),
        status TEXT NOT NULL CHECK (status = 'Starting' OR status = 'Retrying' \
OR status = 'Success' OR status = 'Runtime Error'),
        runtime TEXT,
        return_code INTEGER,
        runtime_error TEXT,
        created_time TEXT NOT NULL,
        start_time TEXT CHECK (start_time >= created_time),
        end_time TEXT CHECK (end_time >= coalesce(start_time, created_time)),
        attempts INTEGER NOT NULL DEFAULT 0,        -- counted before each start
        due REAL,                                   -- seconds since 1970: not before this is it \
tried again
        shots INTEGER NOT NULL,
        seed INTEGER NOT NULL,
        echo_code INTEGER NOT NULL,
        submitter TEXT NOT NULL,                    -- the name of the key it came with
        CHECK ((end_time IS NULL) = (status IN ('Retrying', 'Starting'))),
        CHECK ((end_time IS NULL) = (return_code IS NULL)),
        CHECK ((runtime IS NULL) = (start_time IS NULL)),
        CHECK (end_time IS NULL OR (status = 'Success') = (return_code = 0))
    );
    CREATE INDEX jobs_end_time ON jobs (end_time);  -- NULL first, in id order: what has not ended
    CREATE INDEX jobs_failed ON jobs (id) WHERE status = 'Runtime Error';
    CREATE TABLE results (
        id INTEGER PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
        result TEXT NOT NULL,
        is_json INTEGER NOT NULL
    );
    CREATE TABLE idempotency (
        submitter TEXT, key TEXT, digest TEXT NOT NULL, created REAL NOT NULL, \
first INTEGER NOT NULL,
        last INTEGER NOT NULL, PRIMARY KEY (submitter, key)
    );
    CREATE INDEX idempotency_created ON idempotency (created);
    CREATE TABLE pauses (runtime TEXT PRIMARY KEY, reason TEXT NOT NULL, since TEXT NOT NULL);
    """
# Not released yet: it may still change. An index of one column has the id as its second.
VERSION_2 = """
    CREATE TABLE counts (               -- of the jobs that have not ended
        state TEXT, mode TEXT, jobs INTEGER NOT NULL, PRIMARY KEY (state, mode)
    ) WITHOUT ROWID;
    INSERT INTO counts
        SELECT CASE WHEN start_time IS NOT NULL THEN 'running'
                    WHEN status = 'Retrying' THEN 'retrying' ELSE 'waiting' END, mode, count(*)
        FROM jobs WHERE end_time IS NULL GROUP BY 1, 2;
    INSERT OR IGNORE INTO counts
        SELECT state, mode, 0 FROM
            (SELECT 'waiting' AS state UNION SELECT 'running' UNION SELECT 'retrying'),
            (SELECT 'verbatim' AS mode UNION SELECT 'simulation' UNION SELECT 'echo');

    ALTER TABLE jobs ADD COLUMN tag TEXT;
    ALTER TABLE jobs ADD COLUMN note TEXT;              -- a JSON object
    ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN asked_runtime TEXT;     -- only on that one, if it is not null
    ALTER TABLE pauses ADD COLUMN paused_by TEXT;       -- the name of a key

    DROP INDEX jobs_end_time;
    CREATE INDEX jobs_end_time ON jobs (end_time) WHERE end_time IS NOT NULL;
    CREATE INDEX jobs_starting ON jobs (id) WHERE status = 'Starting';
    CREATE INDEX jobs_retrying ON jobs (id) WHERE status = 'Retrying';
    CREATE INDEX jobs_succeeded ON jobs (id) WHERE status = 'Success';
    CREATE INDEX jobs_running ON jobs (id) WHERE start_time IS NOT NULL AND end_time IS NULL;
    CREATE INDEX jobs_mode ON jobs (mode);
    CREATE INDEX jobs_submitter ON jobs (submitter);
    CREATE INDEX jobs_created_time ON jobs (created_time);
    CREATE INDEX jobs_tag ON jobs (tag) WHERE tag IS NOT NULL;
    CREATE INDEX jobs_runtime ON jobs (coalesce(runtime, asked_runtime))
        WHERE coalesce(runtime, asked_runtime) IS NOT NULL;

    CREATE TABLE devices (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
    CREATE TABLE attempts (             -- that are over; not of echoes
        job INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        serial INTEGER NOT NULL,        -- counts also those that a stop of the server gave back
        attempt INTEGER NOT NULL,
        runtime TEXT NOT NULL,
        start_time TEXT NOT NULL,
        end_time TEXT NOT NULL,
        return_code INTEGER NOT NULL,
        runtime_error TEXT,
        sent_sha256 BLOB,
        device INTEGER REFERENCES devices (id),
        PRIMARY KEY (job, serial)
    ) WITHOUT ROWID;
    CREATE INDEX attempts_device ON attempts (device) WHERE device IS NOT NULL;
    CREATE TABLE logs (                 -- of the attempts that have one
        id INTEGER PRIMARY KEY,
        job INTEGER NOT NULL,
        serial INTEGER NOT NULL,
        log BLOB NOT NULL,              -- as zlib compresses it
        dropped INTEGER NOT NULL,       -- bytes that were not kept
        UNIQUE (job, serial),
        FOREIGN KEY (job, serial) REFERENCES attempts ON DELETE CASCADE
    );
    CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """
# The n-th brings a database from version n to n + 1.
MIGRATIONS = (VERSION_1, VERSION_2)
VERSION = len(MIGRATIONS)


def sql_list(values: Sequence[str]) -> str:
    """Return the values as an SQL list."""
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


def one_of(column: str, values: Sequence[str]) -> str:
    """Return the SQL condition that a column has one of the values, as a CHECK says it."""
    return " OR ".join(f"{column} = '{value}'" for value in values)


# What `check` looks for: what is wrong with a job, and the SQL that holds of all others. Each CHECK
# of the schema is among them (a test compares the two), so that the job that breaks it is named.
INVARIANTS = (
    ("its status is none of the four", one_of("status", jobs.STATUSES)),
    ("it ended before it was started", "end_time >= coalesce(start_time, created_time)"),
    ("it was started before it was added", "start_time >= created_time"),
    ("its end does not fit its status",
     f"(end_time IS NULL) = (status IN {sql_list(jobs.OPEN)})"),
    ("its return code does not fit its status",
     f"end_time IS NULL OR (status = '{jobs.SUCCESS}') = (return_code = 0)"),
    ("it was started without being counted", "start_time IS NULL OR attempts > 0"),
    ("its mode is none of the three", one_of("mode", jobs.MODES)),
    ("its return code does not fit its end", "(end_time IS NULL) = (return_code IS NULL)"),
    ("its runtime does not fit its start", "(runtime IS NULL) = (start_time IS NULL)"),
    ("a number of it is none", " AND ".join(
        f"typeof({column}) = 'integer'"
        for column in ("attempts", "shots", "seed", "echo_code", "coalesce(return_code, 0)"))),
    ("a text of it is none", " AND ".join(
        f"typeof(coalesce({column}, '')) = 'text'"
        for column in ("job", "mode", "status", "runtime", "runtime_error", "created_time",
                       "start_time", "end_time", "submitter"))),
)


# Texts that `check` reads, beside those of the jobs: since which version of the database, whose,
# (job, text, whether it is JSON). A result of bytes is what a program put out, no damage.
CHECKED_TEXTS = (
    (1, "result",
     "SELECT id, result, is_json FROM results WHERE typeof(result) = 'text' OR is_json"),
    (2, "note", "SELECT id, note, 1 FROM jobs WHERE note IS NOT NULL"),
    (2, "attempt", "SELECT job, runtime || coalesce(runtime_error, ''), 0 FROM attempts"),
    (2, "device", "SELECT job, text, 1 FROM attempts JOIN devices ON devices.id = device"),
)
# What a job that has not ended does, as it is counted.
STATE = f"""CASE WHEN start_time IS NOT NULL THEN 'running'
                WHEN status = '{jobs.RETRYING}' THEN 'retrying' ELSE 'waiting' END"""


class Damaged(StoreError):
    """The file is not as SQLite wrote it."""


def resolve(path: str) -> str:
    """Return the path of the file that a link names: SQLite keeps the WAL beside that file."""
    return os.path.realpath(path) if os.path.islink(path) else path


def connect_to(path: str, read_only: bool = True, mode: str = "rw") -> sqlite3.Connection:
    """Return a connection in autocommit mode, for one thread at a time; raise StoreError."""
    name = quote(os.fsencode(os.path.abspath(path)))
    try:
        connection = sqlite3.connect(
            f"file://{name}?mode={mode}", uri=True, isolation_level=None, timeout=10,
            check_same_thread=False)
        connection.execute(f"PRAGMA query_only = {int(read_only)}")
        return connection
    except sqlite3.Error as error:
        raise as_store_error(path, error) from error


def open_observer(path: str) -> sqlite3.Connection:
    """Return a connection that leaves the file and its WAL as they are.

    A connection that is only query_only merges them if it is closed last, after a crash and before
    the next server has seen them. Where there is no WAL, a connection has to make one, or, where
    nothing can be written, to be told that the file does not change.
    """
    mode = "rw"
    if os.path.exists(path + "-wal"):
        mode = "ro"
    elif not _may_write(path):
        mode = "ro&immutable=1"
    return connect_to(path, mode=mode)


@contextlib.contextmanager
def observed(path: str) -> Iterator[sqlite3.Connection]:
    """Give a connection as open_observer does; of a copy, where the index of the WAL is missing
    and cannot be made."""
    has_index = os.path.exists(path + "-shm")
    with contextlib.ExitStack() as stack:
        if os.path.exists(path + "-wal") and not has_index and not _may_write(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            copy = os.path.join(folder, "copy.db")
            for suffix in ("", "-wal"):
                shutil.copyfile(path + suffix, copy + suffix)
            path = copy
        yield stack.enter_context(contextlib.closing(open_observer(path)))


def _may_write(path: str) -> bool:
    """Return whether files can be made beside this one, and it can be written."""
    folder = os.path.dirname(os.path.abspath(path))
    return os.access(folder, os.W_OK) and os.access(path, os.W_OK)


def take_lock(path: str) -> int:
    """Return the descriptor of the lock file beside the database; raise StoreError.

    The lock is held until the descriptor is closed or this process dies.
    """
    if os.path.isdir(path):
        raise StoreError(f"{path}: is a directory; --db names a file")
    try:
        lock_file = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}.lock: {error.strerror}; "
                         "the database needs a directory that oqc may write") from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock_file)
        raise StoreError(f"{path}: another oqc uses this database; "
                         "stop it, or name another file with --db") from error
    except OSError as error:
        os.close(lock_file)
        raise StoreError(f"{path}: its file system has no locks ({error.strerror}); "
                         "name a file on a local disk with --db") from error
    return lock_file


def mark_in_use(lock_file: int) -> Tuple[str, int]:
    """Write into the lock file that a server uses the database; return that server's instance and
    which run of it this is.

    The instance stays the same from a kill to the next start; a copy of the file is another one,
    also in the copy of a whole file system, where it has the same inode.
    """
    words = os.pread(lock_file, 100, 0).split()
    run = 1
    if len(words) == 4 and words[3].isdigit():          # "in use", instance, run
        instance = words[2].decode("ascii", "replace")
        run += int(words[3])
    else:
        instance = os.urandom(8).hex()
    os.pwrite(lock_file, f"in use\n{instance} {run}\n".encode(), 0)
    stat = os.fstat(lock_file)
    return f"{instance}-{stat.st_dev:x}.{stat.st_ino:x}", run


def open_locked(path: str) -> int:
    """Return a descriptor of the database itself, locked, and created where there is none; raise
    StoreError.

    A hard link or a bind mount of the file has a lock file of its own, but not a file of its own.
    The descriptor is to be closed after SQLite's: closing any other of the same file drops the
    locks that SQLite has on it (https://sqlite.org/howtocorrupt.html, section 2.2).
    """
    create = 0
    if not _was_used(path):
        create = os.O_CREAT
    try:
        file = os.open(path, os.O_RDWR | create | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        _refuse_half_restored(path)
        raise _missing(path) from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if hasattr(fcntl, "F_OFD_SETLK"):           # Linux: a lock of the descriptor, not the process
        lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, OWN_LOCK_BYTE, 1, 0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        except (BlockingIOError, PermissionError) as error:
            os.close(file)
            raise StoreError(f"{path}: another oqc uses this database, by another name of the "
                             "file; stop it, or name another file with --db") from error
    return file


def mark_in_file(writer: sqlite3.Connection) -> None:
    """Have the file itself say that a server uses it. That is the first frame of the WAL, so that
    one that is empty later is not the server's."""
    if writer.execute("PRAGMA application_id").fetchone()[0] != IN_USE_ID:  # else: after a kill
        writer.execute(f"PRAGMA application_id = {IN_USE_ID}")
    writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def unmark_in_file(writer: sqlite3.Connection) -> bool:
    """Have the file itself say that no server uses it; return whether that and all that is in the
    WAL is in the file now. Raise sqlite3.Error."""
    # First what is in the WAL, so that it begins anew: on a full disk it cannot grow.
    writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    _, frames, merged = writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return bool(frames == merged)


def close_keeping_wal(writer: sqlite3.Connection, path: str) -> None:
    """Close the connection that writes, but leave the WAL: the connection that is closed last
    merges and removes it, unless it may not write."""
    with contextlib.suppress(sqlite3.Error, StoreError):
        with contextlib.closing(connect_to(path, mode="ro")) as last:
            last.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            writer.close()
    writer.close()


def _was_used(path: str) -> bool:
    """Return whether what lies beside the database says that a server used it."""
    return _size(path + "-wal") > 0 or _size(path + ".lock") > 0


def _refuse_half_restored(path: str) -> None:
    """Raise StoreError where a restore was killed."""
    kept = _kept_name(path)
    if kept:
        raise StoreError(f"{path}: a restore of it was interrupted, run it again; what it replaces "
                         f"is in {path} or {kept}")


def _kept_name(path: str) -> str:
    """Return the name, from the lock file, that a restore was giving to what it replaces when it
    was killed; empty without one."""
    with contextlib.suppress(OSError):
        with open(path + ".lock", "rb") as file:
            text = file.read()
        if text.startswith(RESTORING):
            return os.fsdecode(text[len(RESTORING):])
    return ""


def _missing(path: str) -> StoreError:
    return StoreError(f"{path}: is missing or empty, but a server used it; put the file back, or "
                      f"remove {path}.lock and {path}-wal to begin with no jobs")


def _size(path: str) -> int:
    """Return the size of a file, 0 where there is none."""
    with contextlib.suppress(OSError):
        return os.path.getsize(path)
    return 0


def inspect(path: str, whole: bool = True) -> None:
    """Raise StoreError for a file that is not oqc's to open, before SQLite touches it; if it is to
    be `whole`, also where its last jobs are elsewhere.

    The offsets are those of https://sqlite.org/fileformat2.html, section 1.3.
    """
    wal = _size(path + "-wal")
    if whole:
        _refuse_half_restored(path)
    try:
        with open(path, "rb") as file:
            header = file.read(100)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        header = b""
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if not header:
        if _was_used(path):             # SQLite would remove the WAL of an empty file
            raise _missing(path)
        return
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StoreError(f"{path}: is not a database; name another file with --db")
    page_size, mode, pages, version, application = struct.unpack_from(">16xH2s8xI28xI4xI", header)
    if application not in (APPLICATION_ID, IN_USE_ID):
        raise StoreError(f"{path}: is another program's database; name another file with --db")
    if version > VERSION:
        raise StoreError(f"{path}: was written by a newer oqc (version {version} of the database, "
                         f"this one knows {VERSION}); run that one")
    if wal and mode != LIVE:
        raise StoreError(f"{path}: is a backup, and {path}-wal belongs to what was here before; "
                         f"remove {path}-wal and {path}-shm to go on with the backup")
    if whole and not wal and mode == LIVE and (_was_used(path) or application == IN_USE_ID):
        raise StoreError(f"{path}-wal: is missing or empty, and the jobs accepted last were in it; "
                         f"put it back, or go on without them: oqc restore {path}")
    if page_size == 1:              # stands for 65536, which has no place in two bytes
        page_size = 65536
    if not wal and size < page_size * pages:
        raise StoreError(f"{path}: is truncated, {size} bytes of {page_size * pages}; "
                         "put a backup in its place")


def open_writer(path: str) -> sqlite3.Connection:
    """Return the writer's connection to a database, brought to this version's schema.

    Raise StoreError or sqlite3.Error.
    """
    if needs_check(path) and _size(path) <= CHECKED_AT_START:
        # before a writer merges the WAL into a damaged file
        with contextlib.closing(open_observer(path)) as reader:
            refuse_damaged(path, reader)
    writer = connect_to(path, read_only=False, mode="rwc")
    version = writer.execute("PRAGMA user_version").fetchone()[0]
    if version < VERSION:
        _migrate(writer, path, version)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA synchronous = FULL")
    writer.execute("PRAGMA foreign_keys = 1")
    writer.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}")
    # Debian's SQLite would write zeros over all that is deleted, through the WAL: a prune of long
    # jobs would need as much room on the disk as it frees.
    writer.execute("PRAGMA secure_delete = FAST")
    # makes the WAL, which has to be there after a kill from here on
    writer.execute("SELECT 1 FROM jobs LIMIT 1")
    return writer


def needs_check(path: str) -> bool:
    """Return whether a database was not left as a server leaves it that stops: after a kill, or
    put there by hand."""
    try:
        with open(path, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return False
    if not header:
        return False
    return _was_used(path) or header[18:20] != LIVE


def refuse_damaged(path: str, reader: sqlite3.Connection) -> None:
    """Read the whole database; raise Damaged, or sqlite3.Error."""
    verdict = reader.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise Damaged(f"{path}: is damaged ({verdict.splitlines()[-1]}); "
                      "stop the server and put a backup in its place")


def _migrate(writer: sqlite3.Connection, path: str, version: int) -> None:
    """Bring a database from this version to the last one, whole or not at all."""
    if version:
        log.warning("%s: has version %d of the database and is brought to version %d; a million "
                    "jobs take some seconds", path, version, VERSION)
    else:
        writer.execute("PRAGMA auto_vacuum = INCREMENTAL")      # while there are no tables yet
    # A new file has no WAL yet: so its header names the program even after a kill meanwhile.
    writer.executescript(f"""
        BEGIN IMMEDIATE;
        {"".join(MIGRATIONS[version:])}
        PRAGMA application_id = {APPLICATION_ID};
        PRAGMA user_version = {VERSION};
        COMMIT;""")
    if version:
        log.warning("%s: is of version %d now", path, VERSION)


def as_store_error(path: str, error: BaseException) -> BaseException:
    """Return the StoreError that an error of SQLite or of the system means to an operator.

    Any other error is a defect of the caller, and is returned as it is.
    """
    if isinstance(error, OSError):
        return StoreError(f"{path}: {error.strerror}")
    if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):    # no subclass
        return error
    text = str(error)
    # the index of the WAL has no error of its own for a full disk
    if "full" in text or ("I/O" in text and disk_full_error(path)):
        return DiskFull(f"{path}: no room on the disk")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"{path}: cannot be written now ({text})")
    if "decode" in text:            # invalid UTF-8
        return DamagedRow(f"{path}: a row is damaged ({text}); check names it")
    if "malformed" in text or "not a database" in text:
        return Damaged(f"{path}: is damaged ({text}); "
                       "stop the server and put a backup in its place")
    return StoreError(f"{path}: {text}")


def disk_full_error(path: str, reusable: int = 0) -> Optional[DiskFull]:
    """Return DiskFull if less than LEAST_FREE bytes are free, else None. `reusable`: bytes of the
    file that can be used again."""
    try:
        disk = os.statvfs(os.path.dirname(path) or ".")
    except OSError:                 # the disk is away, which is another trouble
        return None
    if not disk.f_blocks:           # a file system that does not count its blocks
        return None
    free = disk.f_bavail * disk.f_frsize + reusable
    if free >= LEAST_FREE:
        return None
    return DiskFull(f"{path}: {free >> 10} KiB of room left on the disk and in the file; the last "
                    f"{LEAST_FREE >> 10} KiB are for jobs that are there already")


class Watch:
    """The files of a database in use: what is written into one without a name is lost when it is
    closed, and with another WAL or index SQLite's connections see different jobs."""

    def __init__(self, path: str, file: int) -> None:
        """`file`: a descriptor of the database."""
        self.path = path
        self.file = file
        self.opened = {name: _inode(name) for name in (path, path + "-wal", path + "-shm")}

    def error(self) -> Optional[StoreError]:
        """Return StoreError if one of the files is not the one that was opened, else None."""
        for name, inode in self.opened.items():
            if _inode(name) != inode:
                return StoreError(
                    f"{name}: was moved, replaced, emptied or deleted while the server uses it; "
                    "put it back, or stop the server, which then saves what it can")
        if self.is_overwritten():
            return StoreError(f"{self.path}: was overwritten while the server uses it; stop the "
                              "server and restore a backup")
        return None

    def is_overwritten(self) -> bool:
        """Return whether something else was copied into the file, such as a backup."""
        return os.pread(self.file, 2, 18) != LIVE

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the file."""
        return _inode(self.path) == self.opened[self.path]


def _inode(path: str) -> Tuple[int, int]:
    """Return what tells a file from all others, whatever its name; (0, 0) where there is none, or
    an empty one, which none of a server's is."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    if not stat.st_size:
        return 0, 0
    return stat.st_dev, stat.st_ino


def _copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Copy a whole database, as it is now, while others may write.

    By some pages at a time, so that a signal is heard between two. Without a transaction that
    begins before the first, such a copy would begin again at every write, and might never end
    (https://sqlite.org/c3ref/backup_finish.html).
    """
    source.execute("BEGIN")
    source.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
    source.backup(target, pages=COPIED_AT_ONCE, progress=_hear_signals)
    source.execute("COMMIT")


def _hear_signals(*_: int) -> None:
    """Do nothing: the interpreter handles signals as it calls this."""


def backup(path: str, target: str) -> None:
    """Copy the database to a new file while a server may use it; raise StoreError."""
    path = _existing(path)
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise StoreError(f"{target}: is there already; a backup never replaces a file") from None
    except OSError as error:
        raise StoreError(f"{target}: {error.strerror}") from None
    try:
        with observed(path) as source, \
                contextlib.closing(sqlite3.connect(target)) as copy:
            _copy(source, copy)
            copy.execute(f"PRAGMA application_id = {APPLICATION_ID}")       # nobody uses it
            copy.execute("PRAGMA journal_mode = DELETE")        # one file, without a WAL beside it
    except BaseException as error:          # Ctrl-C as well: a part of a copy is no backup
        os.unlink(target)
        raise as_store_error(path, error) from error


@contextlib.contextmanager
def _unused(path: str) -> Iterator[int]:
    """Hold the locks of a database that no server uses; gives the lock file's descriptor. Raises
    StoreError, also for an error of SQLite or of the system."""
    descriptors = [take_lock(path)]
    try:
        if os.path.exists(path):
            descriptors.append(open_locked(path))
        yield descriptors[0]
    except (OSError, sqlite3.Error) as error:
        raise as_store_error(path, error) from error
    finally:
        for descriptor in descriptors[::-1]:
            os.close(descriptor)


def restore(path: str, backup_file: str) -> str:
    """Put a copy of a backup in the place of the database; return what was done. Raise StoreError.

    What is replaced is moved, with its WAL, under a name that was not used. Until all is done the
    lock file says so, and no server starts: after a kill the restore is run again.
    """
    path = resolve(path)
    source = resolve(backup_file)
    if not os.path.exists(source):
        raise StoreError(f"{backup_file}: no such file")
    with _unused(path) as lock_file:
        copy = path + ".restoring"
        try:
            open_jobs = _copy_to_restore(source, copy, os.path.basename(backup_file))
            _give_owner(path, (copy, path + ".lock"))
            kept = _replace(path, copy, lock_file)
        finally:
            for suffix in ("", "-wal", "-shm"):
                _remove(copy + suffix)
    done = f"{path}: restored from {backup_file}"
    if kept:
        done += f"; what was there is {kept} now"
    if open_jobs:
        done += (f"; {open_jobs} jobs were waiting or running, so every runtime but echo is paused "
                 "at the next start: resume runs them again")
    return done


def _copy_to_restore(source: str, copy: str, name: str) -> int:
    """Copy a backup, check it, and bring it to this version; return how many jobs in it are
    open."""
    inspect(source, whole=False)
    _remove(copy)
    with observed(source) as reader, \
            contextlib.closing(sqlite3.connect(copy)) as target:
        _copy(reader, target)
        verdict = target.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise Damaged(f"{source}: is damaged ({verdict.splitlines()[-1]}); "
                          "restore another backup")
    with contextlib.closing(open_writer(copy)) as writer:
        open_jobs = writer.execute("SELECT count(*) FROM jobs WHERE end_time IS NULL").fetchone()[0]
        if open_jobs:
            reason = (f"restored from {name}: {open_jobs} jobs were waiting or running; "
                      "resume runs them again")
            writer.execute("INSERT OR REPLACE INTO notes VALUES ('restored', ?)", (reason,))
        writer.execute(f"PRAGMA application_id = {APPLICATION_ID}")     # nobody uses it
        writer.execute("PRAGMA journal_mode = DELETE")
    return int(open_jobs)


def _give_owner(path: str, files: Sequence[str]) -> None:
    """Give new files the owner and the mode of the database, or the owner of its folder: they may
    be made by root, but the server is not."""
    mode = 0o600
    try:
        like = os.stat(path)
        mode = like.st_mode & 0o777
    except FileNotFoundError:
        like = os.stat(os.path.dirname(os.path.abspath(path)))
    for name in files:
        os.chmod(name, mode)
        if os.geteuid() == 0:
            os.chown(name, like.st_uid, like.st_gid)


def _replace(path: str, copy: str, lock_file: int) -> str:
    """Move the database and its WAL away and the copy in their place; return the new name of what
    was there, empty if nothing was."""
    kept = _kept_name(path)
    if os.path.exists(path) or not kept:        # else its WAL is still to follow it
        number = 1
        while os.path.lexists(kept := f"{path}.replaced-{number}"):
            number += 1
    mark = RESTORING + os.fsencode(kept)
    os.ftruncate(lock_file, 0)
    os.pwrite(lock_file, mark, 0)
    os.fsync(lock_file)
    for suffix in ("", "-wal"):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, kept + suffix)
    _remove(path + "-shm")
    os.rename(copy, path)
    _sync_folder(path)
    os.ftruncate(lock_file, 0)
    return kept if os.path.exists(kept) else ""


def _sync_folder(path: str) -> None:
    """Have the names in the folder of a file on disk."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def compact(path: str) -> str:
    """Give the room of deleted jobs in a database that no server uses back to the disk, and have
    it give back what is deleted later; return what came of it. Raise StoreError."""
    path = _existing(path)
    before = os.path.getsize(path)
    os.environ["SQLITE_TMPDIR"] = os.path.dirname(os.path.abspath(path))    # /tmp may be small
    with _unused(path):
        inspect(path)
        with contextlib.closing(open_writer(path)) as writer:
            mark_in_file(writer)
            writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
            writer.execute("VACUUM")
            unmark_in_file(writer)
        _give_owner(path, (path + ".lock",))
    return f"{path}: {before} bytes before, {os.path.getsize(path)} now"


def check(path: str) -> Iterator[str]:
    """Yield what is wrong with a database, a line each; raise StoreError.

    That is what SQLite's integrity_check finds, each job whose texts, result or log are not what a
    server writes, and each that breaks one of INVARIANTS. The server may use the database
    meanwhile.
    """
    path = _existing(path)
    sound = " AND ".join(f"coalesce({condition}, 1)" for _, condition in INVARIANTS)
    try:
        with observed(path) as reader:
            for report, in reader.execute("PRAGMA integrity_check"):
                yield from (line for line in report.splitlines() if line != "ok")
            version = reader.execute("PRAGMA user_version").fetchone()[0]
            if version >= 2:
                yield from _wrong_counts(reader)
            yield from _wrong_texts(reader, version)
            if not reader.execute(f"SELECT 1 FROM jobs WHERE NOT ({sound}) LIMIT 1").fetchone():
                return              # one scan of the table, where each of the following takes one
            for wrong, condition in INVARIANTS:
                broken = f"SELECT id FROM jobs WHERE NOT coalesce({condition}, 1)"
                for number, in reader.execute(broken):
                    yield f"job {number}: {wrong}"
    except sqlite3.Error as error:
        raise as_store_error(path, error) from error


def _wrong_texts(reader: sqlite3.Connection, version: int) -> Iterator[str]:
    """Yield which jobs have texts, or a result or a log, that are not what a server writes."""
    reader.text_factory = bytes     # or an invalid one would end the loop
    rows = reader.execute("SELECT * FROM jobs")
    job_column = [name for name, *_ in rows.description].index("job")
    for row in rows:
        if not all(map(_is_utf_8, row)):
            yield f"job {row[0]}: a text of it is no UTF-8"
        elif not _is_job(row[job_column]):
            yield f"job {row[0]}: its job string does not fit the pattern"
    for least_version, name, statement in CHECKED_TEXTS:
        if least_version <= version:
            yield from _wrong_ones(name, reader.execute(statement))
    if version >= 2:
        for number, compressed in reader.execute("SELECT job, log FROM logs"):
            try:
                zlib.decompress(compressed)
            except zlib.error:
                yield f"job {number}: a log of it is damaged"
    reader.text_factory = str


def _is_job(text: object) -> bool:
    """Return whether this is a job string, as UTF-8."""
    return isinstance(text, bytes) and bool(jobs.PATTERN.fullmatch(text.decode()))


def _wrong_ones(name: str, rows: sqlite3.Cursor) -> Iterator[str]:
    """Yield which of these (job, text, whether it is JSON) are not what they should be."""
    for number, text, is_json in rows:
        if not _is_utf_8(text):
            yield f"job {number}: its {name} is no UTF-8"
        elif is_json and not is_json_text(text.decode()):
            yield f"job {number}: its {name} is no JSON"


def _is_utf_8(value: object) -> bool:
    """Return whether a text is one, as bytes; what is no text is not looked at."""
    if not isinstance(value, bytes) or value.isascii():
        return True
    try:
        value.decode()
        return True
    except UnicodeDecodeError:
        return False


def legible(text: bytes) -> str:
    """Return the text of a row that may be damaged, with U+FFFD in place of what is no UTF-8."""
    return text.decode("utf-8", "replace")


def is_json_text(text: str) -> bool:
    """Return whether a text is JSON."""
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def _wrong_counts(reader: sqlite3.Connection) -> Iterator[str]:
    """Yield where the kept counts are not those of the jobs."""
    kept = dict(reader.execute("SELECT state || ' ' || mode, jobs FROM counts"))
    counted = dict(reader.execute(f"SELECT {STATE} || ' ' || mode, count(*) FROM jobs "
                                  "WHERE end_time IS NULL GROUP BY 1"))
    for name in sorted({*kept, *counted}):
        if kept.get(name, 0) != counted.get(name, 0):
            yield f"counts: {name}: {kept.get(name, 0)} are kept, {counted.get(name, 0)} are there"


def _existing(path: str) -> str:
    """Return the resolved path of a database that a command may read; raise StoreError."""
    if not os.path.exists(path):
        raise StoreError(f"{path}: no such database")
    path = resolve(path)
    inspect(path)
    return path
