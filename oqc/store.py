"""The only room that says SQL: one SQLite file, one thread that writes it in groups, and connections that only read.

One connection writes and checkpoints, because SQLite 3.7.0 to 3.51.2 can corrupt a WAL that two of them do
(https://sqlite.org/wal.html, "the WAL-reset bug"); it belongs to the writer thread. Every other one is `query_only`.
"""
import fcntl
import logging
import os
import queue
import sqlite3
import struct
import threading
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from oqc import jobs
from oqc.jobs import DiskFull, Ending, Job, StoreError, Submission, Task, UnknownJob

log = logging.getLogger("oqc")

SQLITE_VERSION = sqlite3.sqlite_version
APPLICATION_ID = 0x6F716331         # "oqc1", where file(1) looks for it
MEMBERS = ", ".join(Job._fields)
GROUP = 500                         # writes in one transaction, at most
CHECKED_AT_START = 256 << 20        # bytes of database up to which every start reads all of it


def _among(values: Sequence[str]) -> str:
    """The values as an SQL list."""
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


MIGRATIONS = (                      # the n-th brings a database from version n to n + 1
    f"""
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,       -- or the id of a deleted last job is given out again
        job TEXT NOT NULL,
        mode TEXT NOT NULL CHECK (mode IN {_among(jobs.MODES)}),
        status TEXT NOT NULL CHECK (status IN {_among(jobs.STATUSES)}),
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
        CHECK ((end_time IS NULL) = (status IN {_among(jobs.OPEN)})),
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
    CREATE TABLE pauses (runtime TEXT PRIMARY KEY, reason TEXT NOT NULL, since TEXT NOT NULL);
    """,
)
VERSION = len(MIGRATIONS)


class IllegalTransition(RuntimeError):
    """A job was not where its transition starts: a defect, and nothing was changed."""


class _Write(NamedTuple):
    """A piece of work for the writer thread, and whom to tell what came of it."""

    then: Callable[[Any, Optional[Exception]], None]
    work: Optional[Callable[..., Any]]          # None: the last one
    arguments: Tuple[Any, ...]


def _transition(event: str) -> Tuple[str, str]:
    """(`status = …`, `status IN (…)`) of an event, from the one table."""
    moves = {start: end for (start, name), end in jobs.TRANSITIONS.items() if name == event}
    cases = " ".join(f"WHEN '{start}' THEN '{end}'" for start, end in moves.items())
    return f"status = CASE status {cases} END", f"status IN {_among(tuple(moves))}"


def _claim_sql() -> str:
    change, allowed = _transition("claimed")
    return (f"UPDATE jobs SET {change}, runtime = ?, start_time = max(created_time, ?), attempts = attempts + 1, "
            f"due = NULL WHERE id = ? AND {allowed} AND start_time IS NULL")


def _retry_sql(attempts: str) -> str:
    change, allowed = _transition("retry")
    return (f"UPDATE jobs SET {change}, runtime = NULL, start_time = NULL, due = ?, attempts = {attempts} "
            f"WHERE id = ? AND attempts = ? AND {allowed} AND start_time IS NOT NULL")


def _end_sql(event: str, guard: str) -> str:
    change, allowed = _transition(event)
    return (f"UPDATE jobs SET {change}, return_code = ?, runtime_error = ?, due = NULL, "
            f"end_time = max(coalesce(start_time, created_time), ?) WHERE id = ? AND {allowed} AND {guard}")


INSERT = (f"INSERT INTO jobs (job, mode, status, created_time, shots, seed, echo_code, submitter) "
          f"VALUES (?, ?, '{jobs.STARTING}', ?, ?, ?, ?, ?)")
CLAIM = _claim_sql()
RETRY, RELEASE = _retry_sql("attempts"), _retry_sql("attempts - 1")
END = {event: _end_sql(event, "start_time IS NOT NULL AND attempts = ?") for event in ("succeeded", "failed")}
CANCEL_WAITING = _end_sql("failed", "start_time IS NULL")
TASK = "SELECT id, job, mode, attempts, shots, seed, echo_code FROM jobs WHERE id = ?"


class Store:
    """The jobs on disk. Every method is for any thread; one that writes returns when it is on disk.

    Raises StoreError from everything when the database cannot be used, DiskFull when there is no room.
    """

    def __init__(self, path: str, clock: Any) -> None:
        """Open `path`, creating it where there is none; raises StoreError and leaves the file as it was."""
        self.path, self.clock = path, clock
        self._lock_file = _locked(path)
        try:
            _inspect(path)
            self._writer = _prepared(path)
            self._readers: List[sqlite3.Connection] = []
        except (OSError, sqlite3.Error, StoreError) as error:
            os.close(self._lock_file)
            raise (error if isinstance(error, StoreError) else _explained(path, error)) from None
        os.pwrite(self._lock_file, b"in use\n", 0)
        self._closed = False
        self.trouble: Optional[StoreError] = None       # why the last write, or a read since, did not succeed
        self._writes: "queue.SimpleQueue[_Write]" = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_groups, name="writer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the writer thread after what it was given; merge the WAL into the file; give up the lock."""
        self._write(None)
        self._closed = True
        self._thread.join()
        for reader in self._readers:
            reader.close()
        self._writer.close()        # last: the connection that is closed last checkpoints, and it is the one that may
        os.ftruncate(self._lock_file, 0)
        os.close(self._lock_file)

    # What reads

    def get(self, number: int) -> Job:
        """The job with this id; raises UnknownJob."""
        rows = self._read(f"SELECT {MEMBERS} FROM jobs WHERE id = ?", (number,))
        if not rows:
            raise UnknownJob(number)
        return Job._make(rows[0])

    def page(self, after: Optional[int], limit: int, descending: bool = False, **equal: Optional[str]) -> List[Job]:
        """Up to `limit` jobs, as plain tuples of Job's members, that follow the id `after` in id order, or in
        descending order; `status=`, `mode=` keep only the jobs that have it. By keyset: a page deep in the list
        costs what the first one does."""
        terms = [(f"{column} = ?", value) for column, value in equal.items() if value is not None]
        if after is not None:
            terms.append(("id < ?" if descending else "id > ?", after))
        where = " AND ".join(term for term, _ in terms) or "1"
        # the index of the failed is used only where the statement itself names that status
        where = where.replace("status = ?", f"status = '{jobs.RUNTIME_ERROR}' AND status = ?"
                              if equal.get("status") == jobs.RUNTIME_ERROR else "status = ?")
        return self._read(f"SELECT {MEMBERS} FROM jobs WHERE {where} ORDER BY id {'DESC' if descending else 'ASC'} "
                          "LIMIT ?", (*(value for _, value in terms), limit))

    def result(self, number: int) -> Tuple[Job, Optional[str], bool]:
        """(job, what its runtime put out or None, whether that is JSON); raises UnknownJob."""
        job = self.get(number)
        rows = self._read("SELECT result, is_json FROM results WHERE id = ?", (number,))
        return (job, rows[0][0], bool(rows[0][1])) if rows else (job, None, True)

    def waiting(self) -> Iterator[List[Tuple[int, str, Optional[float]]]]:
        """Pages of (id, mode, due) of the jobs that wait, in id order."""
        return self._open_pages("id, mode, due", "start_time IS NULL")

    def running(self) -> Iterator[List[Tuple[int, int, str, str]]]:
        """Pages of (id, attempt, mode, runtime) of the jobs that run; at a start: those that a crash cut off."""
        return self._open_pages("id, attempts, mode, runtime", "start_time IS NOT NULL")

    def pauses(self) -> Dict[str, Tuple[str, str]]:
        """{runtime: (reason, since)} of the paused ones."""
        return {name: (reason, since) for name, reason, since in self._read("SELECT * FROM pauses")}

    # What writes

    def add(self, submissions: Sequence[Submission], submitter: str,
            then: Callable[[Any, Optional[Exception]], None]) -> None:
        """Store new jobs, all of them or none; when they are on disk, the writer thread calls `then(jobs, None)`, or
        else `then(None, error)`. The only write that does not wait: a thread for each would be most of its cost."""
        self._write_later(then, self._add, submissions, submitter)

    def claim(self, numbers: Sequence[int], runtime: str) -> List[Task]:
        """Start an attempt at each of these jobs that still waits, and count it."""
        return self._write(self._claim, numbers, runtime)

    def settle(self, endings: Sequence[Ending]) -> None:
        """End these attempts; raises IllegalTransition for one that does not run."""
        self._write(self._settle, endings)

    def cancel(self, number: int) -> bool:
        """End a job that waits as cancelled; False if it does not wait."""
        return self._write(self._cancel, number)

    def pause(self, runtime: str, reason: str) -> str:
        """Remember that a runtime is paused, and why; gives back since when."""
        return self._write(self._pause, runtime, reason)

    def resume(self, runtime: str) -> None:
        """Forget that a runtime is paused."""
        self._write(self._resume, runtime)

    def probe(self) -> None:
        """Write something that changes nothing; raises StoreError."""
        self._write(lambda: self._writer.execute(f"PRAGMA user_version = {VERSION}"))

    # What the writer thread does

    def _add(self, submissions: Sequence[Submission], submitter: str) -> List[Job]:
        now, execute, added = self.clock.now(), self._writer.execute, []
        for job, mode, shots, seed, echo_code in submissions:
            number = execute(INSERT, (job, mode, now, shots, seed, echo_code, submitter)).lastrowid
            added.append(Job(number, job, mode, jobs.STARTING, None, None, None, now, None, None))
        return added

    def _claim(self, numbers: Sequence[int], runtime: str) -> List[Task]:
        now, execute = self.clock.now(), self._writer.execute
        claimed = [number for number in numbers if execute(CLAIM, (runtime, now, number)).rowcount]
        return [Task._make(execute(TASK, (number,)).fetchone()) for number in claimed]

    def _settle(self, endings: Sequence[Ending]) -> None:
        now, execute, illegal = self.clock.now(), self._writer.execute, []
        for task, event, outcome, delay in endings:
            if event in END:
                changed = execute(END[event], (outcome.return_code, outcome.runtime_error, now, task.id, task.attempt))
            else:
                changed = execute(RELEASE if event == "release" else RETRY,
                                  (self.clock.unix() + delay, task.id, task.attempt))
            if not changed.rowcount:
                illegal.append(f"job {task.id}, attempt {task.attempt}: {event}")
            elif event in END and outcome.result is not None:
                execute("INSERT INTO results VALUES (?, ?, ?)", (task.id, outcome.result, outcome.is_json))
        if illegal:
            raise IllegalTransition("; ".join(illegal))

    def _cancel(self, number: int) -> bool:
        values = (jobs.CANCELLED, "cancelled", self.clock.now(), number)
        return bool(self._writer.execute(CANCEL_WAITING, values).rowcount)

    def _pause(self, runtime: str, reason: str) -> str:
        since = self.clock.now()
        self._writer.execute("INSERT OR REPLACE INTO pauses VALUES (?, ?, ?)", (runtime, reason, since))
        return since

    def _resume(self, runtime: str) -> None:
        self._writer.execute("DELETE FROM pauses WHERE runtime = ?", (runtime,))

    def _write(self, work: Optional[Callable[..., Any]], *arguments: Any) -> Any:
        """Have the writer thread do `work` in its next transaction; return or raise what came of it, committed."""
        done, came = threading.Lock(), []
        done.acquire()              # pylint: disable=consider-using-with # `tell` releases it

        def tell(value: Any, error: Optional[Exception]) -> None:
            came.append((value, error))
            done.release()
        self._write_later(tell, work, *arguments)
        done.acquire()              # pylint: disable=consider-using-with # waits
        value, error = came[0]
        if error is not None:
            raise error
        return value

    def _write_later(self, then: Callable[[Any, Optional[Exception]], None], work: Optional[Callable[..., Any]],
                     *arguments: Any) -> None:
        if self._closed:
            then(None, StoreError(f"{self.path}: is closed, the server is stopping"))
        else:
            self._writes.put(_Write(then, work, arguments))

    def _write_groups(self) -> None:
        """The writer thread: whatever waits goes into one transaction, since the disk, not SQL, is what takes time."""
        running = True
        while running:
            group = [self._writes.get()]
            while len(group) < GROUP and not self._writes.empty():
                group.append(self._writes.get())
            running = all(write.work for write in group)
            for write, (value, error) in zip(group, self._commit(group)):
                try:
                    write.then(value, error)
                except Exception:   # pylint: disable=broad-exception-caught # not the store's: the thread goes on
                    log.exception("after a write")

    def _commit(self, group: List[_Write]) -> List[Tuple[Any, Optional[Exception]]]:
        """Do all of a group and commit it, or undo it all; a (value, error) each. What one work alone did wrong is not
        the others' fault."""
        came: List[Tuple[Any, Optional[Exception]]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for write in group:
                try:
                    came.append((write.work(*write.arguments) if write.work else None, None))
                except IllegalTransition as error:              # what it did not find, it did not change
                    came.append((None, error))
            self._writer.execute("COMMIT")
            if self.trouble:
                log.warning("the database can be written again")
                self.trouble = None
            return came
        except Exception as error:  # pylint: disable=broad-exception-caught # whoever waits gets it; the thread goes on
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) or len(group) == 1:
                return [(None, self._noted(error))] * len(group)
            return [self._commit([write])[0] for write in group]

    def _read(self, statement: str, values: Sequence[Any] = ()) -> List[Any]:
        """All rows of one SELECT, on a connection that nobody else uses meanwhile."""
        try:
            reader = self._readers.pop() if self._readers else _connected(self.path)
        except IndexError:          # another thread took the last one
            reader = _connected(self.path)
        try:
            return reader.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._noted(error) from error
        finally:
            self._readers.append(reader)

    def _noted(self, error: Exception) -> Exception:
        """What an error means; an error of the database is remembered, and said once."""
        explained = _explained(self.path, error)
        if isinstance(explained, StoreError):
            if not self.trouble:
                log.error("database: %s", explained)
            self.trouble = explained
        return explained

    def _open_pages(self, columns: str, condition: str) -> Iterator[List[Any]]:
        """Pages of these columns (the id first) of the jobs that have not ended."""
        page: List[Any] = [(0,)]
        while page:
            page = self._read(f"SELECT {columns} FROM jobs WHERE end_time IS NULL AND {condition} AND id > ? "
                              "ORDER BY id LIMIT 1000", (page[-1][0],))
            if page:
                yield page


def _connected(path: str, read_only: bool = True) -> sqlite3.Connection:
    """A connection in autocommit mode, for one thread at a time; raises StoreError."""
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        connection.execute(f"PRAGMA query_only = {int(read_only)}")
        return connection
    except sqlite3.Error as error:
        raise _explained(path, error) from error


def _locked(path: str) -> int:
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


def _inspect(path: str) -> None:
    """Raise StoreError for a file that is not oqc's to open, before SQLite touches it.

    The offsets are those of https://sqlite.org/fileformat2.html, section 1.3.
    """
    in_use = os.path.getsize(path + ".lock") > 0
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
    version, application = struct.unpack_from(">I", header, 60)[0], struct.unpack_from(">I", header, 68)[0]
    if application != APPLICATION_ID:
        raise StoreError(f"{path}: is another program's database; name another file with --db")
    if version > VERSION:
        raise StoreError(f"{path}: was written by a newer oqc (version {version} of the database, this one knows "
                         f"{VERSION}); run that one")
    wal = os.path.exists(path + "-wal")
    page_size, pages = struct.unpack_from(">H", header, 16)[0], struct.unpack_from(">I", header, 28)[0]
    if not wal and size < (65536 if page_size == 1 else page_size) * pages:
        raise StoreError(f"{path}: is truncated, {size} bytes of {page_size * pages}; put a backup in its place")
    if in_use and not wal:
        raise StoreError(f"{path}-wal: is missing, and the jobs accepted last were in it; put it back, or remove "
                         f"{path}.lock to go on without them")


def _prepared(path: str) -> sqlite3.Connection:
    """The writer's connection to a database that has this version's tables; raises StoreError, sqlite3.Error."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    writer = _connected(path, read_only=False)
    version = writer.execute("PRAGMA user_version").fetchone()[0]
    for number in range(version, VERSION):
        # before the WAL is there, so that the header names the program even after a kill in the middle of this
        writer.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA application_id = {APPLICATION_ID}; "
                             f"PRAGMA user_version = {number + 1}; COMMIT;")
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA synchronous = FULL")
    writer.execute("PRAGMA foreign_keys = 1")
    if os.path.getsize(path) <= CHECKED_AT_START:
        found = writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            writer.close()
            raise StoreError(f"{path}: is damaged ({found.splitlines()[-1]}); put a backup in its place")
    return writer


def _explained(path: str, error: Exception) -> Exception:
    """What an error of SQLite means to an operator; any other is given back as it is."""
    if not isinstance(error, sqlite3.Error):
        return error
    text = str(error)
    if "full" in text:
        return DiskFull(f"{path}: no room on the disk")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"{path}: cannot be written now ({text})")
    if "malformed" in text or "not a database" in text:
        return StoreError(f"{path}: is damaged ({text}); stop the server and put a backup in its place")
    return StoreError(f"{path}: {text}")
