"""The jobs in SQL: one thread that writes them in groups, and connections that only read.

One connection writes and checkpoints, because SQLite 3.7.0 to 3.51.2 can corrupt a WAL that two of them do
(https://sqlite.org/wal.html, "the WAL-reset bug"); it belongs to whoever has the turn. Every other one is `query_only`.
"""
import contextlib
import logging
import os
import queue
import sqlite3
import threading
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from oqc import jobs
from oqc.database import (
    VERSION, Damaged, connected, disk_full, file_gone, inspect, locked, prepared, resolved, sql_list, translated)
from oqc.jobs import (
    Addition, DiskFull, Ending, Foregone, IdempotencyKey, Job, KeyReused, Refused, StoreError, Submission, Task,
    UnknownJob)

log = logging.getLogger("oqc")

MEMBERS = ", ".join(Job._fields)
GROUP = 500                         # writes in one transaction, at most
PRUNED_AT_ONCE = 500                # jobs deleted in one transaction
LARGE = 200                         # jobs in one add for which others would wait
MOST_READERS = 8                    # connections kept for the next read
SLOW = 0.01                         # seconds of a commit for which nothing else should wait
KEYS_KEPT = 86400                   # seconds that an Idempotency-Key is remembered


class IllegalTransition(Refused):
    """A job was not where its transition starts: a defect, and nothing was changed."""


class _Write(NamedTuple):
    """A piece of work for a transaction, and whom to tell what came of it."""

    then: Callable[[Any, Optional[Exception]], None]
    work: Optional[Callable[..., Any]]          # None: the last one
    arguments: Tuple[Any, ...] = ()


def _update(event: str, changes: str, guard: str) -> str:
    """What an event does to a job: from the statuses, and to the status, that the one table has for it."""
    moves = {start: end for (start, name), end in jobs.TRANSITIONS.items() if name == event}
    cases = " ".join(f"WHEN '{start}' THEN '{end}'" for start, end in moves.items())
    return (f"UPDATE jobs SET status = CASE status {cases} END, {changes} "
            f"WHERE id = ? AND status IN {sql_list(tuple(moves))} AND {guard}")


# The values of each: what changes, in the order that it stands in; then the id and, of a job that runs, the attempt
WAITS, RUNS = "start_time IS NULL", "start_time IS NOT NULL AND attempts = ?"
ENDS = "return_code = ?, runtime_error = ?, due = NULL, end_time = max(coalesce(start_time, created_time), ?)"
WAITS_AGAIN = "runtime = NULL, start_time = NULL, due = ?"
CLAIM = _update("claimed", "runtime = ?, start_time = max(created_time, ?), attempts = attempts + 1, due = NULL", WAITS)
RETRY = _update("retry", WAITS_AGAIN, RUNS)
RELEASE = _update("retry", WAITS_AGAIN + ", attempts = attempts - 1", RUNS)
END = {event: _update(event, ENDS, RUNS) for event in ("succeeded", "failed")}
CANCEL_WAITING = _update("failed", ENDS, WAITS)
NEW = "job, mode, shots, seed, echo_code, created_time, submitter, status"
INSERT = f"INSERT INTO jobs ({NEW}) VALUES (?, ?, ?, ?, ?, ?, ?, '{jobs.STARTING}')"   # binding nulls takes an eighth
INSERT_ENDED = (f"INSERT INTO jobs ({NEW}, runtime, return_code, runtime_error, start_time, end_time, attempts) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)")
ENDED = {event: jobs.TRANSITIONS[jobs.TRANSITIONS[jobs.STARTING, "claimed"], event]     # after one attempt
         for event in ("succeeded", "failed")}
GET = f"SELECT {MEMBERS} FROM jobs WHERE id = ?"
PRUNE = "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE end_time < ? LIMIT ?)"
TASK = "SELECT id, job, mode, attempts, shots, seed, echo_code FROM jobs WHERE id = ?"


def _up_to(rows: sqlite3.Cursor) -> List[Any]:
    """The first of these jobs, until their strings have more than jobs.PAGE_BYTES."""
    found: List[Any] = []
    size = 0
    for row in rows:
        found.append(row)
        size += len(row[1])
        if size > jobs.PAGE_BYTES:
            break
    rows.close()
    return found


class Store:                        # pylint: disable=too-many-instance-attributes # each has a line that says why
    """The jobs on disk. Methods are for any thread, but add_soon and flush; one that writes returns when it is on disk.

    Raises StoreError from everything when the database cannot be used, DiskFull when there is no room.
    """

    def __init__(self, path: str, clock: Any) -> None:
        """Open `path`, creating it where there is none; raises StoreError and leaves the file as it was."""
        path = resolved(path)
        self.path, self.clock = path, clock
        self._lock_file = locked(path)
        try:
            inspect(path, in_use=os.path.getsize(path + ".lock") > 0)
            self._writer, self._file = prepared(path), os.stat(path)
            self._readers: List[sqlite3.Connection] = []
            os.pwrite(self._lock_file, b"in use\n", 0)
        except (OSError, sqlite3.Error, StoreError) as error:
            os.close(self._lock_file)
            raise (error if isinstance(error, StoreError) else translated(path, error)) from None
        self._closed, self._gate = False, threading.Lock()      # nothing is put on the queue after the last write
        self.trouble: Optional[StoreError] = None       # why the last write, or a read since, did not succeed
        self._writes: "queue.SimpleQueue[_Write]" = queue.SimpleQueue()
        self._soon: List[_Write] = []           # for the next flush; of the one thread that calls it
        self._turn = threading.Lock()           # held by whoever uses the writing connection
        self._large = threading.Lock()          # held by whose large add is next, so that a small write waits for one
        self._commit_seconds = 0.0              # that the last commit took
        self._thread = threading.Thread(target=self._write_groups, name="writer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the writer thread after what it was given; merge the WAL into the file; give up the lock."""
        self._put(_Write(lambda value, error: None, None))
        self._thread.join()
        for reader in self._readers:
            reader.close()
        with contextlib.suppress(OSError):      # a kill from here on leaves a WAL that may be there, or may not
            os.ftruncate(self._lock_file, 0)
        self._writer.close()        # last: the connection that is closed last checkpoints, and it is the one that may
        os.close(self._lock_file)

    # What reads

    def get(self, number: int) -> Job:
        """The job with this id; raises UnknownJob."""
        rows = self._read(GET, (number,))
        if not rows:
            raise UnknownJob(number)
        return Job._make(rows[0])

    def page(self, after: Optional[int], limit: int, descending: bool = False, **equal: Optional[str]) -> List[Job]:
        """Up to `limit` jobs, fewer if they are long, as plain tuples of Job's members, that follow the id `after` in
        id order, or in descending order; `status=`, `mode=` keep only the jobs that have it. By keyset: a page deep in
        the list costs what the first one does."""
        terms: Dict[str, Any] = {f"{column} = ?": value for column, value in equal.items() if value is not None}
        if after is not None:
            terms["id < ?" if descending else "id > ?"] = after
        where = list(terms) or ["1"]
        if equal.get("status") == jobs.RUNTIME_ERROR:   # its index is used only where the statement itself names it
            where.append(f"status = '{jobs.RUNTIME_ERROR}'")
        return self._read(f"SELECT {MEMBERS} FROM jobs WHERE {' AND '.join(where)} "
                          f"ORDER BY id {'DESC' if descending else 'ASC'} LIMIT ?", (*terms.values(), limit), _up_to)

    def result(self, number: int) -> Tuple[str, bool]:
        """(what a job's runtime put out, whether that is JSON); a null if it put out nothing. Raises UnknownJob."""
        rows = self._read("SELECT coalesce(result, 'null'), coalesce(is_json, 1) "
                          "FROM jobs LEFT JOIN results USING (id) WHERE id = ?", (number,))
        if not rows:
            raise UnknownJob(number)
        return rows[0][0], bool(rows[0][1])

    def waiting(self) -> Iterator[List[Tuple[int, str, Optional[float]]]]:
        """Pages of (id, mode, due) of the jobs that wait, in id order."""
        return self._open_pages("id, mode, due", "start_time IS NULL")

    def running(self) -> Iterator[List[Tuple[int, int, str, str]]]:
        """Pages of (id, attempt, mode, runtime) of the jobs that run; at a start: those that a crash cut off."""
        return self._open_pages("id, attempts, mode, runtime", "start_time IS NOT NULL")

    def pauses(self) -> Dict[str, Tuple[str, str]]:
        """{runtime: (reason, since)} of the paused ones."""
        return {name: (reason, since) for name, reason, since in self._read("SELECT * FROM pauses")}

    def status(self) -> Dict[str, Any]:
        """How much waits, runs and has ended, all of one moment: one statement is one snapshot."""
        minute, hour, now = self.clock.ago(60), self.clock.ago(3600), self.clock.unix()
        rows = self._read("""
            SELECT CASE WHEN start_time IS NOT NULL THEN 'running' WHEN status = ? THEN 'retrying' ELSE 'waiting' END,
                   mode, count(*), min(created_time) FROM jobs WHERE end_time IS NULL GROUP BY 1, 2
            UNION ALL SELECT 'minute', '', count(*), '' FROM jobs WHERE end_time >= ?
            UNION ALL SELECT 'hour', '', count(*), '' FROM jobs WHERE end_time >= ?""", (jobs.RETRYING, minute, hour))
        found: Dict[str, Any] = {what: {mode: 0 for mode in jobs.MODES} for what in ("waiting", "running", "retrying")}
        for what, mode, count, _ in rows:
            if what in found:
                found[what][mode] = count
        oldest = min((created for what, _, _, created in rows if what == "waiting"), default=None)
        return {"idle": not any(what in found for what, *_ in rows), **found,
                "oldest_waiting_seconds": oldest and max(0.0, round(now - self.clock.parse(oldest), 3)),
                "ended_last_minute": next(count for what, _, count, _ in rows if what == "minute"),
                "ended_last_hour": next(count for what, _, count, _ in rows if what == "hour"),
                "database_bytes": sum(os.path.getsize(path) for path in (self.path, self.path + "-wal")
                                      if os.path.exists(path))}

    # What writes

    def add(self, submissions: Sequence[Submission], submitter: str, key: Optional[IdempotencyKey] = None,
            foregone: Callable[[Submission], Optional[Foregone]] = lambda submission: None) -> Addition:
        """Store new jobs, all of them or none; as ended those of which `foregone` says how they end. With a key that
        came before, give back the jobs of that time; raises KeyReused if it came with another body."""
        with self._large if len(submissions) > LARGE else contextlib.nullcontext():
            return self._write(self._add, submissions, submitter, key, foregone)

    def add_soon(self, submissions: Sequence[Submission], submitter: str, key: Optional[IdempotencyKey],
                 then: Callable[[Any, Optional[Exception]], None],
                 foregone: Callable[[Submission], Optional[Foregone]] = lambda submission: None) -> None:
        """add, but without waiting: with the next `flush`, and when it is on disk, `then(addition, None)` is called, or
        else `then(None, error)`. For one thread, the one that calls flush."""
        self._soon.append(_Write(then, self._add, (submissions, submitter, key, foregone)))

    def flush(self) -> None:
        """Write what add_soon was given: here, since handing it to another thread and back takes as long as the disk
        does; by the writer thread if that is at work already, or the disk is slow."""
        group, self._soon = self._soon, []
        if group and self._commit_seconds < SLOW and self._turn.acquire(blocking=False):
            self._commit_in_turn(group)
        else:
            for write in group:
                self._put(write)

    def prune(self, seconds: float) -> int:
        """Delete the jobs that ended longer ago than that, some at a time, so that others can write; how many."""
        cutoff, deleted = self.clock.ago(seconds), 0
        while True:
            batch = self._change(PRUNE, cutoff, PRUNED_AT_ONCE)
            deleted += batch
            if batch < PRUNED_AT_ONCE:
                return deleted

    def claim(self, number: int, runtime: str) -> Optional[Task]:
        """Start an attempt at a job, and count it; None if it does not wait any more."""
        return self._write(self._claim, number, runtime)

    def settle(self, endings: Sequence[Ending]) -> None:
        """End these attempts; raises IllegalTransition for one that does not run."""
        self._write(self._settle, endings)

    def cancel(self, number: int) -> bool:
        """End a job that waits as cancelled; False if it does not wait."""
        return bool(self._change(CANCEL_WAITING, jobs.CANCELLED, "cancelled", self.clock.now(), number))

    def pause(self, runtime: str, reason: str) -> str:
        """Remember that a runtime is paused, and why; gives back since when."""
        since: str = self.clock.now()
        self._change("INSERT OR REPLACE INTO pauses VALUES (?, ?, ?)", runtime, reason, since)
        return since

    def resume(self, runtime: str) -> None:
        """Forget that a runtime is paused."""
        self._change("DELETE FROM pauses WHERE runtime = ?", runtime)

    def unusable(self) -> Optional[str]:
        """Why jobs cannot be stored, or soon cannot be, or None. Trouble that may have passed since is tried again."""
        full = disk_full(self.path)
        if self.trouble and not full:
            with contextlib.suppress(StoreError):       # write something that changes nothing
                self._change(f"PRAGMA user_version = {VERSION}")
        trouble = self.trouble or full or file_gone(self.path, self._file)
        return str(trouble) if trouble else None

    # What is done in a transaction, by whoever has the turn

    def _add(self, submissions: Sequence[Submission], submitter: str, key: Optional[IdempotencyKey],
             foregone: Callable[[Submission], Optional[Foregone]]) -> Addition:
        replay = self._replay(submitter, key) if key else None
        if replay:
            return replay
        now, execute, added, endings = self.clock.now(), self._writer.execute, [], []
        for submission in submissions:
            job, mode, *asked = submission      # shots, seed, return_code: as a Task ends
            end = foregone(submission)
            new = (*submission, now, submitter)
            number = (execute(INSERT_ENDED, (*new, ENDED[end.event], end.runtime, end.outcome.return_code,
                                             end.outcome.runtime_error, now, now)) if end else
                      execute(INSERT, new)).lastrowid or 0
            added.append(Job(number, job, mode, jobs.STARTING, None, None, None, now, None, None))
            if end:
                endings.append(Ending(Task(number, job, mode, 1, *asked), end.event, end.outcome))
        if key:
            execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?, ?)",
                    (submitter, *key, self.clock.unix(), added[0].id, added[-1].id))
        return Addition(added, endings=endings)

    def _replay(self, submitter: str, key: IdempotencyKey) -> Optional[Addition]:
        """The jobs that were added when this key came before, if it did; raises KeyReused."""
        execute = self._writer.execute
        execute("DELETE FROM idempotency WHERE created < ?", (self.clock.unix() - KEYS_KEPT,))
        before = execute("SELECT digest, first, last FROM idempotency WHERE submitter = ? AND key = ?",
                         (submitter, key.key)).fetchone()
        if not before:
            return None
        if before[0] != key.digest:
            raise KeyReused("this Idempotency-Key came before, with another body; take a new one for a new request")
        rows = execute(f"SELECT {MEMBERS} FROM jobs WHERE id BETWEEN ? AND ? ORDER BY id", before[1:]).fetchall()
        return Addition([Job._make(row) for row in rows], replayed=True) if rows else None

    def _claim(self, number: int, runtime: str) -> Optional[Task]:
        execute = self._writer.execute
        claimed = execute(CLAIM, (runtime, self.clock.now(), number)).rowcount
        return Task._make(execute(TASK, (number,)).fetchone()) if claimed else None

    def _settle(self, endings: Sequence[Ending]) -> None:
        now, execute, illegal = self.clock.now(), self._writer.execute, []
        for task, event, outcome, delay, _ in endings:
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

    def _change(self, statement: str, *values: Any) -> int:
        """How many rows one statement changed, in the next transaction."""
        return self._write(lambda: self._writer.execute(statement, values).rowcount)

    def _write(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Have `work` done in the next transaction. Returns or raises what came of it, committed."""
        came: "queue.SimpleQueue[Tuple[Any, Optional[Exception]]]" = queue.SimpleQueue()
        self._put(_Write(lambda value, error: came.put((value, error)), work, arguments))
        value, error = came.get()
        if error is not None:
            raise error
        return value

    def _put(self, write: _Write) -> None:
        """Give the writer thread something to do."""
        with self._gate:
            if not self._closed:
                self._closed = write.work is None
                self._writes.put(write)
                return
        write.then(None, StoreError(f"{self.path}: is closed, the server is stopping"))

    def _write_groups(self) -> None:
        """The writer thread: whatever waits goes into one transaction, since the disk, not SQL, is what takes time."""
        running = True
        while running:
            group = [self._writes.get()]
            self._turn.acquire()    # pylint: disable=consider-using-with # _commit_in_turn releases it
            while len(group) < GROUP and not self._writes.empty():
                group.append(self._writes.get())
            running = all(write.work for write in group)
            self._commit_in_turn(group)

    def _commit_in_turn(self, group: List[_Write]) -> None:
        """Commit a group, give up the turn, and tell everybody."""
        began = self.clock.monotonic()
        try:
            came = self._commit(group)
        except Exception as error:  # pylint: disable=broad-exception-caught # or nobody ever gets the turn again
            log.exception("commit")
            came = [(None, self._noted(error))] * len(group)
        self._commit_seconds = self.clock.monotonic() - began
        self._turn.release()
        for write, (value, error) in zip(group, came):
            try:
                write.then(value, error)
            except Exception:       # pylint: disable=broad-exception-caught # not the store's: the thread goes on
                log.exception("after a write")

    def _commit(self, group: List[_Write]) -> List[Tuple[Any, Optional[Exception]]]:
        """Do all of a group and commit it, or undo it all; a (value, error) each. What one work alone did wrong is not
        the others' fault."""
        came: List[Tuple[Any, Optional[Exception]]] = []
        if isinstance(self.trouble, Damaged):       # what is written into a damaged file may never be found again
            return [(None, self.trouble)] * len(group)
        try:
            gone = file_gone(self.path, self._file)
            if gone:
                raise gone
            self._writer.execute("BEGIN IMMEDIATE")
            for write in group:
                try:
                    came.append((write.work(*write.arguments) if write.work else None, None))
                except Refused as error:
                    came.append((None, error))
            self._writer.execute("COMMIT")
        except Exception as error:  # pylint: disable=broad-exception-caught # whoever waits gets it; the thread goes on
            with contextlib.suppress(sqlite3.Error):    # then the next BEGIN fails, and this is tried again
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) or len(group) == 1:
                return [(None, self._noted(error))] * len(group)
            return [self._commit([write])[0] for write in group]
        if self.trouble and not (isinstance(self.trouble, DiskFull) and disk_full(self.path)):
            log.warning("the database can be written again")
            self.trouble = None
        return came

    def _read(self, statement: str, values: Sequence[Any] = (),
              fetch: Callable[[sqlite3.Cursor], List[Any]] = sqlite3.Cursor.fetchall) -> List[Any]:
        """The rows of one SELECT, on a connection that nobody else uses meanwhile."""
        try:
            reader = self._readers.pop()
        except IndexError:          # all are in use
            gone = file_gone(self.path, self._file)
            if gone:                # or it would read another file
                raise self._noted(gone) from None
            reader = connected(self.path)
        try:
            return fetch(reader.execute(statement, values))
        except sqlite3.Error as error:
            raise self._noted(error) from error
        finally:
            if len(self._readers) < MOST_READERS:
                self._readers.append(reader)
            else:
                reader.close()

    def _noted(self, error: Exception) -> Exception:
        """What an error means; an error of the database is remembered, and said once; damage until the next start."""
        meaning = translated(self.path, error)
        if isinstance(meaning, StoreError) and not isinstance(self.trouble, Damaged):
            if not self.trouble or isinstance(meaning, Damaged):
                log.error("database: %s", meaning)
            self.trouble = meaning
        return meaning

    def _open_pages(self, columns: str, condition: str) -> Iterator[List[Any]]:
        """Pages of these columns (the id first) of the jobs that have not ended."""
        last = 0
        while page := self._read(f"SELECT {columns} FROM jobs WHERE end_time IS NULL AND {condition} AND id > ? "
                                 "ORDER BY id LIMIT 1000", (last,)):
            yield page
            last = page[-1][0]
