"""The jobs in SQL: writes that are committed in groups, and connections that only read.

One connection writes and checkpoints, because SQLite 3.7.0 to 3.51.2 can corrupt a WAL that two of
them do (https://sqlite.org/wal.html, "the WAL-reset bug"). Every other one is `query_only`.

There is no writer thread. A thread that writes appends its writes to the line, then takes the lead
lock: its holder commits all that stands in line, since the disk, not SQL, is what takes time (the
scheme of LevelDB's DBImpl::Write). The next ones to take it find their writes done.
"""
import collections
import contextlib
import logging
import operator
import os
import re
import sqlite3
import threading
import zlib
from types import MappingProxyType
from typing import (
    Any, Callable, Counter, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
    Protocol, Sequence, Tuple, Union)

from oqc import jobs
from oqc.database import (
    CHECKED_AT_START, STATE, VERSION, Damaged, Watch, as_store_error, close_keeping_wal,
    connect_to, disk_full_error, inspect, is_json_text, legible, mark_in_file, mark_in_use,
    needs_check, open_locked, open_writer, refuse_damaged, resolve, sql_list, take_lock,
    unmark_in_file)
from oqc.jobs import (
    Addition, Attempt, Batch, DamagedRow, Details, DiskFull, Ending, IdempotencyKey, Job, KeyReused,
    Log, Outcome, Queued, Refused, Selection, StoreError, Submission, Task, UnknownJob)

log = logging.getLogger("oqc")

MEMBERS = ", ".join(Job._fields)
GROUP = 500                         # writes in one transaction, at most
PRUNED_AT_ONCE = 100                # jobs deleted in one transaction
PAGES_AT_ONCE = 100                 # of the file, given back to the disk in one transaction
GIVEN_WAY = 20                      # milliseconds between two writes of many, at most
LARGE = 200                         # jobs; larger adds take turns, so that others wait for one
MOST_READERS = 8                    # connections kept for the next read
SLOW = 0.01                         # seconds of a commit for which nothing else should wait
KEYS_KEPT = 86400                   # seconds that an Idempotency-Key is remembered
ROW = "job {}: what is stored of it is damaged; `oqc check` says what, a backup may have it"
CLOSED = "{}: is closed, the server is stopping"


class IllegalTransition(Refused):
    """A job was not where its transition starts: a defect. It is left as it was."""


class Clock(Protocol):
    """What the store asks of a clock; times are as the API shows them."""

    def now(self) -> str:
        """Return the UTC time."""

    def ago(self, seconds: float) -> str:
        """Return the UTC time `seconds` before now."""

    def at(self, seconds: float) -> str:
        """Return the UTC time so many seconds since 1970."""

    def parse(self, text: str) -> float:
        """Return a UTC time in seconds since 1970."""

    def unix(self) -> float:
        """Return seconds since 1970."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""


class Write:
    """Work for a transaction, and what came of it."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self.work = work
        self.arguments = arguments
        self.done = False               # set last, by the leader
        self.value: Any = None
        self.error: Optional[Exception] = None

    def finish(self, error: Optional[Exception]) -> None:
        """Note that the work is committed, or the error for which it is not."""
        self.error = error
        self.done = True


def _update(event: str, changes: str, guard: str) -> str:
    """Return the UPDATE that an event is: from the statuses, and to those, of jobs.TRANSITIONS."""
    moves = {start: end for (start, name), end in jobs.TRANSITIONS.items() if name == event}
    cases = " ".join(f"WHEN '{start}' THEN '{end}'" for start, end in moves.items())
    return (f"UPDATE jobs SET status = CASE status {cases} END, {changes} "
            f"WHERE id = ? AND status IN {sql_list(tuple(moves))} AND {guard}")


def _insert(columns: str) -> str:
    """Return the INSERT of a job with these columns. Those that have no value are left out:
    binding nulls takes an eighth of the time."""
    places = ", ".join("?" for _ in columns.split(", "))
    return f"INSERT INTO jobs ({columns}) VALUES ({places})"


# Their parameters in order: what is set, the id and, where IF_RUNNING guards, the attempt.
IF_WAITING = "start_time IS NULL"
IF_RUNNING = "start_time IS NOT NULL AND attempts = ?"
SET_RUNNING = "runtime = ?, start_time = max(created_time, ?), attempts = attempts + 1, due = NULL"
SET_WAITING = "runtime = NULL, start_time = NULL, due = ?"
SET_ENDED = ("return_code = ?, runtime_error = ?, due = NULL, "
             "end_time = max(coalesce(start_time, created_time), ?)")
CLAIM = _update("claimed", SET_RUNNING, IF_WAITING)
RETRY = _update("retry", SET_WAITING, IF_RUNNING)
# The status becomes Retrying, too, but the attempt does not count.
RELEASE = _update("retry", SET_WAITING + ", attempts = attempts - 1", IF_RUNNING)
SETTLE = {event: _update(event, SET_ENDED, IF_RUNNING) for event in ("succeeded", "failed")}
CANCEL_WAITING = _update("failed", SET_ENDED, IF_WAITING)

# The first five are the first members of a Submission, and those of EXTRA the others.
NEW = "job, mode, shots, seed, echo_code, created_time, submitter, status"
ENDED = ", runtime, return_code, runtime_error, start_time, end_time, attempts"
EXTRA = ", tag, note, asked_runtime, priority"
PLAIN_MEMBERS = 5                   # of a Submission, before those of EXTRA
NO_EXTRA = Submission("", "")[PLAIN_MEMBERS:]
INSERT = _insert(NEW)
INSERT_ENDED = _insert(NEW + ENDED)
INSERT_EXTRA = _insert(NEW + EXTRA)
INSERT_ENDED_EXTRA = _insert(NEW + ENDED + EXTRA)
GET = f"SELECT {MEMBERS} FROM jobs WHERE id = ?"
TASK = ("SELECT id, job, mode, attempts, shots, seed, echo_code, submitter, tag, note, priority, "
        "asked_runtime, status FROM jobs WHERE id = ?")
AGAIN = ("SELECT job, mode, shots, seed, echo_code, tag, NULL, asked_runtime "
         "FROM jobs WHERE id = ?")
QUEUED = "id, mode, priority, submitter, asked_runtime"     # the members of a Queued
RESULT = ("SELECT coalesce(result, 'null'), coalesce(is_json, 1) "
          "FROM jobs LEFT JOIN results USING (id) WHERE id = ?")
PRUNE = "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE end_time < ? LIMIT ?)"
WAITS = f"SELECT {QUEUED}, {STATE} FROM jobs WHERE id = ? AND end_time IS NULL AND {IF_WAITING}"
COUNT = "UPDATE counts SET jobs = jobs + ? WHERE state = ? AND mode = ?"
STATUS = f"""
    SELECT state, mode, jobs, '' FROM counts
    UNION ALL SELECT 'oldest', '', 0, (
        SELECT created_time FROM jobs WHERE status = '{jobs.STARTING}' AND start_time IS NULL
        ORDER BY id LIMIT 1)"""
ENDED_ON = ("SELECT runtime, count(*) FROM jobs WHERE end_time >= ? AND end_time < ? "
            "GROUP BY runtime")

# Which jobs a Selection is. RAN_ON: or was asked to run, and has not yet.
RAN_ON = "coalesce(runtime, asked_runtime)"
IS_OPEN = "end_time IS NULL"
FIRST_TIME, LAST_TIME = "", "~"     # before and behind the texts of all times
EQUAL = {"tag": "tag", "by": "submitter", "mode": "mode", "runtime": RAN_ON}
IN_STATE = {
    "open": IS_OPEN,
    "waiting": f"{IS_OPEN} AND {IF_WAITING}",
    "running": f"{IS_OPEN} AND start_time IS NOT NULL",
    "ended": "end_time IS NOT NULL",
}
# The jobs of each status and state by the indexes that find them, in the order of their ids, and
# the SQL that goes with it.
Walk = List[Tuple[str, str]]
WHOLE: Walk = [("", "1")]           # the whole table, by id
WALK_OF_STATUS: Dict[str, Walk] = {
    jobs.STARTING: [("jobs_starting", f"status = '{jobs.STARTING}'")],
    jobs.RETRYING: [("jobs_retrying", f"status = '{jobs.RETRYING}'")],
    jobs.SUCCESS: [("jobs_succeeded", f"status = '{jobs.SUCCESS}'")],
    jobs.RUNTIME_ERROR: [("jobs_failed", f"status = '{jobs.RUNTIME_ERROR}'")],
}
WALK_OF_STATE: Dict[str, Walk] = {
    "open": WALK_OF_STATUS[jobs.STARTING] + WALK_OF_STATUS[jobs.RETRYING],
    "waiting": [("jobs_starting", f"status = '{jobs.STARTING}' AND {IF_WAITING}"),
                ("jobs_retrying", f"status = '{jobs.RETRYING}' AND {IF_WAITING}")],
    "running": [("jobs_running", IN_STATE["running"])],
    "ended": WALK_OF_STATUS[jobs.SUCCESS] + WALK_OF_STATUS[jobs.RUNTIME_ERROR],
}
COUNTED = f"""CASE WHEN {IS_OPEN} THEN ({STATE})
                   WHEN status = '{jobs.SUCCESS}' THEN 'succeeded' ELSE 'failed' END"""

# An attempt that is over, copied from its job before that becomes something else.
ATTEMPT = """
    INSERT INTO attempts
    SELECT id, (SELECT coalesce(max(serial), 0) + 1 FROM attempts WHERE job = jobs.id), attempts,
           runtime, start_time, max(start_time, ?), ?, ?, ?, ?
    FROM jobs WHERE id = ? AND start_time IS NOT NULL AND attempts = ?"""
LAST_ATTEMPT = "SELECT max(serial) FROM attempts WHERE job = ? AND attempt = ?"
LOG = "INSERT OR REPLACE INTO logs (job, serial, log, dropped) VALUES (?, ?, ?, ?)"
UNUSED_DEVICES = ("DELETE FROM devices "
                  "WHERE NOT EXISTS (SELECT 1 FROM attempts WHERE device = devices.id)")
DETAIL_COLUMNS = 14                 # of DETAILS, that are of the job
# A row for each attempt that is over, after the members of its job; nulls if there is none.
DETAILS = """
    SELECT jobs.id, submitter, tag, note, priority, asked_runtime, shots, seed,
           CASE WHEN jobs.end_time IS NOT NULL THEN 'ended'
                WHEN jobs.start_time IS NULL THEN 'waiting' ELSE 'running' END,
           due, mode, attempts, jobs.runtime, jobs.start_time,
           attempt, done.runtime, done.start_time, done.end_time, done.return_code,
           done.runtime_error, nullif(lower(hex(sent_sha256)), ''), text
    FROM jobs LEFT JOIN attempts AS done ON done.job = jobs.id
    LEFT JOIN devices ON devices.id = device
    WHERE jobs.id = ? ORDER BY serial"""


# Members of a Stored that an answer holds as they are, those of a Job; and what else is of one
# kind, but where a row is damaged.
PLAIN = frozenset(("job", "mode", "status", "runtime", "created_time", "start_time", "end_time",
                   "submitter", "tag"))
PLAIN_OF_JOB = operator.itemgetter(*(place for place, name in enumerate(Job._fields)
                                     if name in PLAIN))
NUMBER = frozenset((int, type(None)))
TEXT = frozenset((str, type(None)))
KINDS = {"return_code": NUMBER, "shots": NUMBER, "runtime_error": TEXT}
UNQUOTABLE = re.compile(r"[^ -~]|[\"\\]")           # in a job string, which is printable ASCII
Values = Union[Sequence[Any], Dict[str, Any]]
Fetch = Callable[[sqlite3.Cursor], List[Any]]


def _compressed(said: Log) -> bytes:
    """Return what was said as it is stored, empty for nothing. Not while others wait for a
    commit: a MiB takes 10 ms."""
    return zlib.compress(said.text) if said.text else b""


def _stored(result: str) -> Union[str, bytes]:
    """Return a result as it is stored: text, or bytes that are no UTF-8."""
    try:
        result.encode()
        return result
    except UnicodeEncodeError:
        return jobs.result_bytes(result)


def _event(outcome: Outcome) -> str:
    """Return the event of jobs.TRANSITIONS that an outcome is which ends its job."""
    return "failed" if outcome.return_code else "succeeded"


class Place(NamedTuple):
    """Where in a selection a page begins: its SQL, and the values in it."""

    terms: Sequence[str] = ()
    values: Mapping[str, Any] = MappingProxyType({})


def _is_by_time(selection: Selection) -> bool:
    """Return whether the jobs of a selection are in the order of (created_time, id)."""
    return selection.since is not None or selection.until is not None


def _first_place(selection: Selection) -> Place:
    """Return where the first page of a selection begins."""
    if not _is_by_time(selection):
        return Place()
    return _between((selection.since or FIRST_TIME, 0), (selection.until or LAST_TIME, 0))


def _between(lower: Tuple[str, int], upper: Tuple[str, int]) -> Place:
    """Return the place between two (created_time, id), which are not in it."""
    return Place(("(created_time, id) > (:lower_time, :lower_id)",
                  "(created_time, id) < (:upper_time, :upper_id)"),
                 {"lower_time": lower[0], "lower_id": lower[1],
                  "upper_time": upper[0], "upper_id": upper[1]})


def _walk(selection: Selection, state: Optional[str]) -> Walk:
    """Return by which indexes the jobs of a selection are read, each with the condition that lets
    SQLite use it. The first filter of this list that is given decides; the others leave jobs
    out."""
    of_status = WALK_OF_STATUS.get(selection.status or "", WHOLE)
    of_state = WALK_OF_STATE.get(state or "", WHOLE)
    walks = (
        (_is_by_time(selection), [("jobs_created_time", "1")]),
        (selection.tag, [("jobs_tag", "1")]),
        (state not in (None, "ended"), of_state),
        (selection.status in jobs.OPEN, of_status),
        (selection.by, [("jobs_submitter", "1")]),
        (selection.runtime, [("jobs_runtime", f"{RAN_ON} IS NOT NULL")]),
        (selection.status, of_status),
        (state, of_state),
        (selection.mode, [("jobs_mode", "1")]),
        (True, WHOLE),
    )
    return next(walk for given, walk in walks if given)


def _select(columns: str, selection: Selection, state: Optional[str], place: Optional[Place] = None,
            group: str = "", join: str = "") -> Tuple[str, Dict[str, Any]]:
    """Return (the SELECT of the jobs of a selection that are in `state`, the values in it)."""
    terms = []
    values: Dict[str, Any] = {}
    for name, column in EQUAL.items():
        value = getattr(selection, name)
        if value is not None:
            terms.append(f"{column} = :{name}")
            values[name] = value
    walk = _walk(selection, state)
    if selection.status and walk is not WALK_OF_STATUS[selection.status]:
        terms.append(f"status = '{selection.status}'")
    if state and walk is not WALK_OF_STATE[state]:
        terms.append(IN_STATE[state])
    place = place or _first_place(selection)
    terms += place.terms
    values.update(place.values)
    parts = []
    for index, condition in walk:
        by_index = f"INDEXED BY {index}" if index else ""
        where = " AND ".join([condition, *terms])
        parts.append(f"SELECT {columns} FROM jobs {by_index} {join} WHERE {where} {group}")
    return " UNION ALL ".join(parts), values


def _are_plain(texts: Iterable[Any]) -> bool:
    """Return whether texts are as JSON has them between quotes: an answer holds them so."""
    try:
        text = "".join(filter(None, texts))
    except TypeError:               # bytes or a number, in a row that is damaged
        return False
    return text.isprintable() and '"' not in text and "\\" not in text


def _are_sound(rows: Sequence[Any], members: Sequence[str]) -> bool:
    """Return whether rows of these members of a Stored can be shown as they are."""
    for name, values in zip(members, zip(*rows)):
        if name in PLAIN and not _are_plain(values):
            return False
        if name in KINDS and not KINDS[name].issuperset(map(type, values)):
            return False
        if name == "note" and not all(map(_is_note, values)):
            return False
    return True


def _is_note(value: Any) -> bool:
    """Return whether this is JSON, or none."""
    return value is None or isinstance(value, str) and is_json_text(value)


def _refuse_damaged_row(row: Sequence[Any]) -> None:
    """Raise DamagedRow if the members of a Job cannot be shown as they are."""
    is_sound = type(row[5]) in NUMBER and type(row[6]) in TEXT
    if not is_sound or not _are_plain(PLAIN_OF_JOB(row)):
        raise DamagedRow(ROW.format(row[0]))


def _refuse_damaged_job(number: int, job: Sequence[Any], note: Optional[str] = None) -> None:
    """Raise DamagedRow if these are no job string, mode and numbers of a job, or that is no
    note."""
    text, mode, *numbers = job
    is_job = isinstance(text, str) and jobs.PATTERN.fullmatch(text) and mode in jobs.MODES
    if not is_job or not all(isinstance(one, int) for one in numbers) \
            or not _is_note(note):
        raise DamagedRow(ROW.format(number))


def _mended(row: Sequence[Any], members: Sequence[str]) -> Tuple[Any, ...]:
    """Return a row that is damaged as it can be shown."""
    return tuple(map(_legible_value, members, row))


def _legible_value(name: str, value: Any) -> Any:
    """Return a member as it can be shown: None for a number or a note that is none."""
    is_sound = name not in PLAIN and type(value) in KINDS.get(name, (type(value),))
    if name == "note":
        is_sound = _is_note(value)
    if value is None or is_sound:
        return value
    if name not in PLAIN and name != "runtime_error":
        return None
    text = legible(value) if isinstance(value, bytes) else str(value)
    return UNQUOTABLE.sub("\ufffd", text)


def _up_to_page_bytes(rows: sqlite3.Cursor) -> List[Any]:
    """Return the first of these jobs, until their texts have more than jobs.PAGE_BYTES."""
    page: List[Any] = []
    size = 0
    for row in rows:
        page.append(row)
        size += len(row[1])
        if len(row) > jobs.RESULT_PLACE:        # as jobs.row_size does, without a call for each
            size += len(row[jobs.RESULT_PLACE] or "")
        if size > jobs.PAGE_BYTES:
            break
    rows.close()
    return page


# pylint: disable-next=too-many-instance-attributes, too-many-public-methods # each says why
class Store:
    """The jobs on disk. All methods are for any thread; one that writes returns when it is on disk.

    Every method raises StoreError when the database cannot be used, DiskFull when there is no room.
    """

    def __init__(self, path: str, clock: Clock,
                 prepare: Callable[[str], sqlite3.Connection] = open_writer,
                 connect: Callable[[str], sqlite3.Connection] = connect_to) -> None:
        """Open `path`, creating it where there is none; raise StoreError and leave the file as it
        was. `prepare` gives the connection that writes, `connect` one that reads."""
        path = resolve(path)
        self.path = path
        self.clock = clock
        self.connect = connect
        self._lock_file = take_lock(path)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock_file)
            try:
                self._file = open_locked(path)
                inspect(path)
                self.is_unchecked = needs_check(path) and os.path.getsize(path) > CHECKED_AT_START
                self._writer = prepare(path)
                # Not closed otherwise: that would remove the WAL, and leave the marks.
                undo.callback(close_keeping_wal, self._writer, path)
                mark_in_file(self._writer)
                self._watch = Watch(path, self._file)
                self.instance, self.run = mark_in_use(self._lock_file)
            except (OSError, sqlite3.Error) as error:
                raise as_store_error(path, error) from None
            undo.pop_all()
        self.trouble: Optional[StoreError] = None   # why the last write failed, or a read since
        self._readers: List[sqlite3.Connection] = []    # that nobody uses now
        self._line: Deque[Write] = collections.deque()  # appended to by all, emptied by the leader
        self._lead = threading.Lock()           # of the leader; over _writer and what is below
        self._outside: Deque[None] = collections.deque()    # one for each thread that waits for it
        self._closed = False
        self._commit_seconds = 0.0              # that the last commit took
        self._counted: Counter = collections.Counter()      # {(state, mode): change} of it so far
        self._full: Optional[DiskFull] = None   # why the adds of this commit are refused
        self._checking = threading.Lock()       # held while the whole database is read
        self._checker: Optional[sqlite3.Connection] = None
        self._large = threading.Lock()          # held by an add that is LARGE

    def close(self) -> None:
        """Commit what stands in line; merge the WAL into the file; give up the lock. Once."""
        with self._lead:
            if self._closed:
                return
            while self._line:
                self._commit_line()
            self._closed = True
        while self._readers:
            self._readers.pop().close()
        while not self._checking.acquire(timeout=0.05):
            with contextlib.suppress(sqlite3.ProgrammingError, AttributeError):     # not open
                self._checker.interrupt()
        lost = self._watch.error()
        merged = self._close_writer()
        if merged and self._watch.is_in_place():
            with contextlib.suppress(OSError):      # else the next start asks for the WAL
                os.ftruncate(self._lock_file, 0)
        if lost and merged:
            log.warning("database: %s; at this stop all jobs were saved in the file", lost)
        elif lost:
            log.error("database: %s; at this stop the jobs accepted last were not saved", lost)
        os.close(self._file)        # after SQLite's, as open_locked says
        os.close(self._lock_file)

    def _close_writer(self) -> bool:
        """Close the connection that writes; return whether all that it wrote is in the file."""
        merged = False
        if not self._watch.is_overwritten():
            with contextlib.suppress(sqlite3.Error):
                merged = unmark_in_file(self._writer)
        if merged:
            self._writer.close()
        else:
            close_keeping_wal(self._writer, self.path)
        return merged

    # Reads

    def get(self, number: int) -> Job:
        """Return the job with this id; raise UnknownJob."""
        rows = self._read_job(GET, number)
        _refuse_damaged_row(rows[0])
        return Job._make(rows[0])

    def page(self, after: Optional[int], limit: int, descending: bool = False,
             selection: Selection = Selection(),
             members: Sequence[str] = Job._fields) -> List[Any]:
        """Return up to `limit` jobs of a selection, fewer if they are long, that follow the id
        `after` in id order or, if so asked, in descending order; as plain tuples of these members
        of Stored. With since or until the order is that of (created_time, id).
        A job that is damaged is among them, with U+FFFD in place of what is no text.

        By keyset: a page deep in the list costs what the first one does.
        """
        order = "DESC" if descending else "ASC"
        order_by = f"id {order}"
        if _is_by_time(selection):
            order_by = f"created_time {order}, id {order}"
        place = None
        if after is not None:
            place = self._place(selection, after, descending)
        join = "LEFT JOIN results USING (id)" if "result" in members else ""
        statement, values = _select(", ".join(members), selection, selection.state, place,
                                    join=join)
        rows = self._read_many(f"{statement} ORDER BY {order_by} LIMIT :limit",
                               {**values, "limit": limit}, _up_to_page_bytes)
        if _are_sound(rows, members):
            return rows
        return [row if _are_sound([row], members) else _mended(row, members) for row in rows]

    def _place(self, selection: Selection, after: int, descending: bool) -> Place:
        """Return where the page begins that follows this job."""
        if not _is_by_time(selection):
            comparison = "<" if descending else ">"
            return Place((f"id {comparison} :after",), {"after": after})
        lower = (selection.since or FIRST_TIME, 0)
        upper = (selection.until or LAST_TIME, 0)
        # One bound, since SQLite looks up no second one in its index.
        last = (self._created_time(after, descending), after)
        if descending:
            return _between(lower, min(upper, last))
        return _between(max(lower, last), upper)

    def _created_time(self, number: int, descending: bool) -> str:
        """Return when a job was created; if it was deleted since, the one before it in a list."""
        comparison, order = (">=", "ASC") if descending else ("<=", "DESC")
        rows = self._read_many(f"SELECT created_time FROM jobs WHERE id {comparison} ? "
                               f"ORDER BY id {order} LIMIT 1", (number,))
        if rows:
            return str(rows[0][0])
        return LAST_TIME if descending else FIRST_TIME

    def open_jobs(self, selection: Selection, limit: int = -1) -> List[int]:
        """Return the ids of up to `limit` jobs of a selection that have not ended, the newest
        first."""
        if selection.state == "ended":
            return []
        statement, values = _select("id", selection, selection.state or "open")
        order_by = "id DESC"
        if _is_by_time(selection):
            order_by = "created_time DESC, id DESC"
        rows = self._read(f"{statement} ORDER BY {order_by} LIMIT :limit",
                          {**values, "limit": limit})
        return [number for number, in rows]

    def count(self, selection: Selection) -> Dict[str, int]:
        """Return how many jobs of a selection wait, run and have ended, and how."""
        statement, values = _select(f"{COUNTED}, count(*)", selection, selection.state,
                                    group="GROUP BY 1")
        counts = dict.fromkeys(("waiting", "running", "retrying", "succeeded", "failed"), 0)
        for state, count in self._read(statement, values):
            counts[state] += count
        return counts

    def submitter(self, number: int) -> str:
        """Return the name of the key that a job came with; raise UnknownJob."""
        rows = self._read_job("SELECT submitter FROM jobs WHERE id = ?", number)
        return str(rows[0][0])

    def submission(self, number: int) -> Submission:
        """Return a job as it would be submitted again, without its note and its priority; raise
        UnknownJob."""
        submission = Submission(*self._read_job(AGAIN, number)[0])
        _refuse_damaged_job(number, submission[:PLAIN_MEMBERS])
        return submission

    def result(self, number: int) -> Tuple[Union[str, bytes], bool]:
        """Return (what a job's runtime put out, whether that is JSON); null if it put out nothing,
        and bytes if it is no UTF-8. Raise UnknownJob."""
        result, is_json = self._read_job(RESULT, number)[0]
        if is_json and not is_json_text(result):
            raise DamagedRow(ROW.format(number))
        return result, bool(is_json)

    def details(self, number: int) -> Details:
        """Return what the members of a job do not hold, its attempts above all; raise
        UnknownJob."""
        rows = self._read_job(DETAILS, number)
        *members, due, mode, attempt, runtime, start_time = rows[0][:DETAIL_COLUMNS]
        attempts = [Attempt(*row[DETAIL_COLUMNS:]) for row in rows
                    if row[DETAIL_COLUMNS] is not None]
        if members[-1] == "running" and mode != "echo":
            attempts.append(Attempt(attempt, runtime, start_time))
        due_time = None
        if due is not None:
            due_time = self.clock.at(due)
        details = Details(*members, due_time, attempts)
        texts = [details.note, *(attempt.device for attempt in attempts)]
        if any(isinstance(value, bytes) for row in rows for value in row) \
                or not all(text is None or is_json_text(text) for text in texts):
            raise DamagedRow(ROW.format(number))
        return details

    def log(self, number: int, serial: int) -> Log:
        """Return what was said in an attempt of a job that is over, the first having the serial 1;
        an empty Log if that is nothing."""
        rows = self._read("SELECT log, dropped FROM logs WHERE job = ? AND serial = ?",
                          (number, serial))
        if not rows:
            return Log()
        compressed, dropped = rows[0]
        try:
            return Log(zlib.decompress(compressed), dropped)
        except zlib.error as error:
            raise DamagedRow(ROW.format(number)) from error

    def waiting(self) -> Iterator[List[Tuple[Queued, Optional[float]]]]:
        """Yield pages of (job, when it is due) of the jobs that wait, in id order."""
        for page in self._pages(f"{QUEUED}, due", "waiting"):
            yield [(Queued(*row[:-1]), row[-1]) for row in page]

    def running(self) -> Iterator[List[Tuple[int, int, str, str]]]:
        """Yield pages of (id, attempt, mode, runtime) of the jobs that run; at a start: of those
        that a crash cut off."""
        return self._pages("id, attempts, mode, runtime", "running")

    def _pages(self, columns: str, state: str) -> Iterator[List[Any]]:
        """Yield pages of these columns, the id first, of the jobs in a state, in id order."""
        statement, _ = _select(columns, Selection(), state, Place(("id > :last",)))
        last = 0
        while page := self._read_many(f"{statement} ORDER BY id LIMIT 1000", {"last": last}):
            yield page
            last = page[-1][0]

    def pauses(self) -> Dict[str, Tuple[str, str, Optional[str]]]:
        """Return {runtime: (reason, since, by whose key)} of the paused ones."""
        rows = self._read_many("SELECT runtime, reason, since, paused_by FROM pauses")
        return {name: (reason, since, by) for name, reason, since, by in rows}

    def status(self) -> Dict[str, Any]:
        """Return how much waits and runs, all of one moment: one statement is one snapshot."""
        now = self.clock.unix()
        rows = self._read_many(STATUS)
        open_jobs = {state: {mode: 0 for mode in jobs.MODES}
                     for state in ("waiting", "running", "retrying")}
        oldest = None
        for state, mode, count, time in rows:
            if state in open_jobs:
                open_jobs[state][mode] = count
            else:
                oldest = time
        idle = not any(sum(modes.values()) for modes in open_jobs.values())
        age = None
        if oldest:
            with contextlib.suppress(ValueError):       # it is damaged
                age = max(0.0, round(now - self.clock.parse(oldest), 3))
        files = [path for path in (self.path, self.path + "-wal") if os.path.exists(path)]
        return {"idle": idle, **open_jobs, "oldest_waiting_seconds": age,
                "database_bytes": sum(map(os.path.getsize, files))}

    def ended(self, since: str, until: str) -> Dict[Optional[str], int]:
        """Return how many jobs ended on each runtime, from one UTC time until before another."""
        return dict(self._read_many(ENDED_ON, (since, until)))

    def _read_job(self, statement: str, number: int) -> List[Any]:
        """Return the rows of a SELECT of one job; raise UnknownJob without any, DamagedRow."""
        try:
            rows = self._read(statement, (number,))
        except DamagedRow as error:
            raise DamagedRow(ROW.format(number)) from error
        if not rows:
            raise UnknownJob(number)
        return rows

    def _read_many(self, statement: str, values: Values = (),
                   fetch: Fetch = sqlite3.Cursor.fetchall) -> List[Any]:
        """Return the rows of one SELECT. One that is damaged costs no other: what is no UTF-8 in it
        comes as U+FFFD."""
        try:
            return self._read(statement, values, fetch)
        except DamagedRow:
            return self._read(statement, values, fetch, legible)

    def _read(self, statement: str, values: Values = (), fetch: Fetch = sqlite3.Cursor.fetchall,
              texts: Callable[[bytes], str] = str) -> List[Any]:
        """Return the rows of one SELECT, on a connection that nobody else uses meanwhile. `texts`:
        str, or what makes text of bytes. Raise DamagedRow."""
        try:
            reader = self._readers.pop()
        except IndexError:          # all are in use
            if self._closed:
                raise StoreError(CLOSED.format(self.path)) from None
            gone = self._watch.error()
            if gone:                # or it would read another file
                raise self._noted(gone) from None
            reader = self.connect(self.path)
        reader.text_factory = texts
        try:
            return fetch(reader.execute(statement, values))
        except sqlite3.Error as error:
            raise self._noted(error) from error
        finally:
            self._readers.append(reader)
            # After it was put back: else a close at this moment might not see it.
            if self._closed or len(self._readers) > MOST_READERS:
                with contextlib.suppress(IndexError):
                    self._readers.pop().close()

    # Writes

    def add(self, submissions: Sequence[Submission], submitter: str,
            key: Optional[IdempotencyKey] = None,
            outcomes: Sequence[Optional[Outcome]] = ()) -> Addition:
        """Store new jobs, all of them or none; as ended those whose outcome is known. With a key
        that came before, return the jobs of that time; raise KeyReused if it came with another
        body."""
        addition, = self.add_together([Batch(submissions, submitter, key, outcomes)])
        if isinstance(addition, Exception):
            raise addition
        return addition

    def add_together(self, batches: Sequence[Batch]) -> List[Union[Addition, Exception]]:
        """Do `add` for each batch, with one commit; return what each came to, or the error."""
        writes = [Write(self._add, batch) for batch in batches]
        large = any(len(batch.submissions) > LARGE for batch in batches)
        with self._large if large else contextlib.nullcontext():
            self._write_until_done(writes)
        return [write.error or write.value for write in writes]

    def prune(self, seconds: float, by: str = "oqc",
              is_interrupted: Callable[[], bool] = bool) -> int:
        """Delete the jobs that ended longer ago than that, some at a time, so that others can
        write, and give their room back to the disk; return how many. `by`: who asks for it."""
        cutoff = self.clock.ago(seconds)
        self.note_seen()
        deleted = 0
        batch = PRUNED_AT_ONCE
        try:
            while batch == PRUNED_AT_ONCE and not is_interrupted():
                batch = self._change(PRUNE, cutoff, PRUNED_AT_ONCE)
                deleted += batch
                self._give_way()
            self._change(UNUSED_DEVICES)
            while not is_interrupted() and self._write(self._give_room_back):
                self._give_way()
            self._shorten()
        finally:
            if deleted:
                log.info("%d jobs that ended before %s are deleted, as %s asks for", deleted,
                         cutoff, by)
        return deleted

    def _give_room_back(self) -> bool:
        """Shorten the file by some pages; return whether there may be more. A file that began with
        version 1 of the database keeps them for new jobs."""
        before = self._writer.execute("PRAGMA freelist_count").fetchone()
        for _ in range(PAGES_AT_ONCE):      # it gives back one page a step, and Python does one
            self._writer.execute("PRAGMA incremental_vacuum(1)").fetchall()
        return bool(self._writer.execute("PRAGMA freelist_count").fetchone() < before)

    def _shorten(self) -> None:
        """Have the file become as short as it is by now: that waits for a checkpoint."""
        with self._lead:
            if not self._closed:
                with contextlib.suppress(sqlite3.Error):        # then the next one does it
                    self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def note_seen(self) -> None:
        """Remember that the server runs now."""
        self._change("INSERT OR REPLACE INTO notes VALUES ('seen', ?)", self.clock.now())

    def seconds_since_seen(self) -> float:
        """Return how long ago, by the wall clock, a server ran last, as far as is known."""
        seen = self._note("seen")
        if seen is None:                # as in a database that was brought to this version
            (seen,), = self._read("SELECT max(created_time) FROM jobs")
        if seen is None:
            return 0.0
        try:
            return self.clock.unix() - self.clock.parse(seen)
        except ValueError as error:
            raise DamagedRow(f"{self.path}: when a server ran last is damaged ({error}); a prune "
                             "by hand writes it anew") from error

    def claim(self, number: int, runtime: str) -> Optional[Task]:
        """Start an attempt at a job, and count it; return None if it does not wait any more. Raise
        DamagedRow if it is no job: it goes on waiting."""
        return self._write(self._claim, number, runtime)

    def settle(self, endings: Sequence[Ending]) -> None:
        """End these attempts and keep what was said in them; raise IllegalTransition for one that
        does not run."""
        logs = [_compressed(ending.outcome.log) for ending in endings]
        self._write(self._settle, endings, logs)

    def keep_log(self, number: int, attempt: int, said: Log) -> None:
        """Replace what was said in the last attempt that has this number and is over."""
        self._write(self._keep_log, number, attempt, _compressed(said), said.dropped)

    def settle_and_claim(self, ending: Ending, number: int, runtime: str) -> Optional[Task]:
        """End an attempt and start the one that follows it, in one transaction; as `settle` and
        `claim`."""
        compressed = _compressed(ending.outcome.log)
        return self._write(self._settle_and_claim, ending, compressed, number, runtime)

    def cancel(self, number: int, code: int = jobs.CANCELLED,
               error: str = "cancelled") -> Optional[Queued]:
        """End a job that waits as cancelled, or with another return code, and return it; None if it
        does not wait."""
        return self._write(self._cancel, number, code, error)

    def cancel_together(self, numbers: Sequence[int]) -> List[Queued]:
        """End those of these jobs that wait as cancelled, in one transaction; return them."""
        cancelled: List[Queued] = self._write(self._cancel_together, numbers)
        self._give_way()
        return cancelled

    def pause(self, runtime: str, reason: str, by: str = "oqc") -> str:
        """Remember that a runtime is paused, why, and by whose key; return since when."""
        since = self.clock.now()
        self._change("INSERT OR REPLACE INTO pauses VALUES (?, ?, ?, ?)", runtime, reason, since,
                     by)
        return since

    def resume(self, runtime: str) -> None:
        """Forget that a runtime is paused."""
        self._change("DELETE FROM pauses WHERE runtime = ?", runtime)

    def pause_restored(self, runtimes: Sequence[str]) -> None:
        """Pause these if the database was restored from a backup with open jobs, which may have
        run since."""
        reason = self._note("restored")
        if reason:
            self._write(self._pause_restored, runtimes, reason)
            log.warning("every runtime but echo is paused: %s", reason)

    def _pause_restored(self, runtimes: Sequence[str], reason: str) -> None:
        now = self.clock.now()
        self._writer.executemany("INSERT OR REPLACE INTO pauses VALUES (?, ?, ?, 'oqc')",
                                 [(runtime, reason, now) for runtime in runtimes])
        self._writer.execute("DELETE FROM notes WHERE name = 'restored'")

    def _note(self, name: str) -> Optional[str]:
        """Return what is kept under a name, if anything is."""
        rows = self._read("SELECT value FROM notes WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def unusable(self) -> Optional[str]:
        """Return why jobs cannot be stored, or soon cannot be, or None. Trouble that may have
        passed since is tried again."""
        try:
            full = self._disk_full()
        except StoreError as error:
            return str(error)
        if self.trouble and not full:
            with contextlib.suppress(StoreError):       # write something that changes nothing
                self._change(f"PRAGMA user_version = {VERSION}")
        trouble = self.trouble or full or self._watch.error()
        return str(trouble) if trouble else None

    def _disk_full(self) -> Optional[DiskFull]:
        """Return why no job is taken where room is short, so that it is left for those that are
        there; else None."""
        if not disk_full_error(self.path):
            return None
        (pages,), = self._read("PRAGMA freelist_count")
        (size,), = self._read("PRAGMA page_size")
        return disk_full_error(self.path, pages * size)

    def check_rest(self) -> None:
        """Read the whole database, if that is to be done; what is wrong is trouble until the next
        start."""
        if not self.is_unchecked:
            return
        with self._checking:
            try:
                self._checker = self.connect(self.path)
                with contextlib.closing(self._checker):
                    refuse_damaged(self.path, self._checker)
            except (sqlite3.Error, StoreError) as error:
                if not self._closed:    # else close has interrupted it
                    self._noted(error)

    # What is done in a transaction, by the leader

    def _add(self, batch: Batch) -> Addition:
        if batch.key:
            replay = self._replay(batch.submitter, batch.key)
            if replay:
                return replay
        if self._full:
            raise self._full
        now = self.clock.now()
        added = []
        endings = []
        queued = []
        outcomes = batch.outcomes or [None] * len(batch.submissions)
        for submission, outcome in zip(batch.submissions, outcomes):
            values = (*submission[:PLAIN_MEMBERS], now, batch.submitter)
            number = self._insert(submission, values, outcome)
            job, mode, *asked = submission      # asked: shots, seed, return_code, tag, note
            if outcome is None:
                self._counted["waiting", mode] += 1
                queued.append(Queued(number, mode, submission.priority, batch.submitter,
                                     submission.runtime))
            else:
                task = Task(number, job, mode, 1, *asked[:3])
                endings.append(Ending(task, _event(outcome), outcome))
            # Also one that has ended is answered as it was when it came in.
            added.append(Job(number, job, mode, jobs.STARTING, None, None, None, now, None, None))
        if batch.key:
            self._writer.execute(
                "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?, ?)",
                (batch.submitter, *batch.key, self.clock.unix(), added[0].id, added[-1].id))
        return Addition(added, endings=endings, queued=queued)

    def _insert(self, submission: Submission, values: Tuple[Any, ...],
                outcome: Optional[Outcome]) -> int:
        """Insert a job with these values of NEW but the status; return its id."""
        extra = submission[PLAIN_MEMBERS:]
        has_extra = extra != NO_EXTRA
        statement = INSERT_EXTRA if has_extra else INSERT
        status = jobs.STARTING
        ended: Tuple[Any, ...] = ()
        if outcome is not None:
            statement = INSERT_ENDED_EXTRA if has_extra else INSERT_ENDED
            status = jobs.TRANSITIONS[jobs.STARTING, _event(outcome)]
            now = values[PLAIN_MEMBERS]
            # an echo's runtime is "echo"
            ended = (submission.mode, outcome.return_code, outcome.runtime_error, now, now, 1)
        if has_extra:
            ended += extra
        return self._writer.execute(statement, (*values, status, *ended)).lastrowid or 0

    def _replay(self, submitter: str, key: IdempotencyKey) -> Optional[Addition]:
        """Return the jobs that were added when this key came before, if it did; raise KeyReused."""
        execute = self._writer.execute
        execute("DELETE FROM idempotency WHERE created < ?", (self.clock.unix() - KEYS_KEPT,))
        before = execute("SELECT digest, first, last FROM idempotency "
                         "WHERE submitter = ? AND key = ?", (submitter, key.key)).fetchone()
        if not before:
            return None
        digest, *range_of_ids = before
        if digest != key.digest:
            raise KeyReused("this Idempotency-Key came before, with another body; "
                            "take a new one for a new request")
        rows = execute(f"SELECT {MEMBERS} FROM jobs WHERE id BETWEEN ? AND ? ORDER BY id",
                       range_of_ids).fetchall()
        if not rows:
            return None
        for row in rows:
            _refuse_damaged_row(row)
        return Addition([Job._make(row) for row in rows], replayed=True)

    def _claim(self, number: int, runtime: str) -> Optional[Task]:
        values = (runtime, self.clock.now(), number)
        if not self._writer.execute(CLAIM, values).rowcount:
            return None
        *members, status = self._legible_row(TASK, number)
        task = Task(*members)
        about = (task.job, task.mode, task.attempt, task.shots, task.seed, task.return_code)
        _refuse_damaged_job(number, about, task.note)       # nothing of it reaches a device
        if not _are_plain((task.submitter, task.tag)):
            raise DamagedRow(ROW.format(number))
        before = "retrying" if status == jobs.RETRYING else "waiting"
        self._counted[before, task.mode] -= 1
        self._counted["running", task.mode] += 1
        return task

    def _legible_row(self, statement: str, number: int) -> Any:
        """Return the row of a job, also of one that is damaged: it can be ended all the same; None
        without one."""
        try:
            return self._writer.execute(statement, (number,)).fetchone()
        except sqlite3.OperationalError as error:
            if not isinstance(as_store_error(self.path, error), DamagedRow):
                raise
        self._writer.text_factory = legible
        try:
            return self._writer.execute(statement, (number,)).fetchone()
        finally:
            self._writer.text_factory = str

    def _cancel(self, number: int, code: int = jobs.CANCELLED,
                error: str = "cancelled") -> Optional[Queued]:
        row = self._legible_row(WAITS, number)
        if row is None:
            return None
        *members, state = row
        queued = Queued(*members)
        self._writer.execute(CANCEL_WAITING, (code, error, self.clock.now(), number))
        self._counted[state, queued.mode] -= 1
        return queued

    def _settle_and_claim(self, ending: Ending, compressed: bytes, number: int,
                          runtime: str) -> Optional[Task]:
        self._settle([ending], [compressed])
        return self._claim(number, runtime)

    def _cancel_together(self, numbers: Sequence[int]) -> List[Queued]:
        return [queued for queued in map(self._cancel, numbers) if queued]

    def _settle(self, endings: Sequence[Ending], logs: Sequence[bytes]) -> None:
        now = self.clock.now()
        illegal = []
        for ending, compressed in zip(endings, logs):
            task = ending.task
            if not self._end(ending, now, compressed):
                illegal.append(f"job {task.id}, attempt {task.attempt}: {ending.event}")
                continue
            self._counted["running", task.mode] -= 1
            if ending.event not in SETTLE:
                self._counted["retrying", task.mode] += 1
        if illegal:
            raise IllegalTransition("; ".join(illegal))

    def _end(self, ending: Ending, now: str, compressed: bytes) -> bool:
        """End an attempt and record it; return False, changing nothing, if it does not run."""
        task, event, outcome, delay, _ = ending
        if task.mode != "echo" and (event != "release" or outcome.started):
            if not self._record(ending, now, compressed):
                return False
        if event in SETTLE:
            statement = SETTLE[event]
            values = (outcome.return_code, outcome.runtime_error, now)
        else:
            statement = RELEASE if event == "release" else RETRY
            values = (self.clock.unix() + delay,)
        changed = self._writer.execute(statement, (*values, task.id, task.attempt)).rowcount
        if changed and event in SETTLE and outcome.result is not None:
            self._writer.execute("INSERT INTO results VALUES (?, ?, ?)",
                                 (task.id, _stored(outcome.result), outcome.is_json))
        return bool(changed)

    def _record(self, ending: Ending, now: str, compressed: bytes) -> bool:
        """Record an attempt, before its job is changed; return False if it does not run."""
        task = ending.task
        outcome = ending.outcome
        device = None
        if outcome.device is not None:
            device = self._device(outcome.device)
        values = (now, outcome.return_code, outcome.runtime_error, outcome.sent_sha256, device)
        recorded = self._writer.execute(ATTEMPT, (*values, task.id, task.attempt)).rowcount
        if recorded and compressed:
            self._keep_log(task.id, task.attempt, compressed, outcome.log.dropped)
        return bool(recorded)

    def _device(self, text: str) -> int:
        """Return the id under which this description of a device is kept."""
        select = "SELECT id FROM devices WHERE text = ?"
        rows = self._writer.execute(select, (text,)).fetchall()
        if rows:
            return int(rows[0][0])
        return self._writer.execute("INSERT INTO devices (text) VALUES (?)", (text,)).lastrowid or 0

    def _keep_log(self, number: int, attempt: int, compressed: bytes, dropped: int) -> None:
        serial, = self._writer.execute(LAST_ATTEMPT, (number, attempt)).fetchone()
        if serial is not None:          # else its job was deleted meanwhile
            self._writer.execute(LOG, (number, serial, compressed, dropped))

    # The line of those who write

    def in_line(self) -> int:
        """Return how many writes wait for a commit that has not begun."""
        return len(self._line)

    def is_busy(self) -> bool:
        """Return whether a write would wait: for another's commit, or for a disk that is slow."""
        return self._lead.locked() or bool(self._line) or self._commit_seconds >= SLOW

    def _change(self, statement: str, *values: Any) -> int:
        """Return how many rows one statement changed, in the next transaction."""
        return self._write(lambda: self._writer.execute(statement, values).rowcount)

    def _write(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Have `work` done in the next transaction. Return or raise what it came to, committed."""
        write = Write(work, *arguments)
        self._write_until_done([write])
        if write.error is not None:
            raise write.error
        return write.value

    def _write_until_done(self, writes: Sequence[Write]) -> None:
        """Stand in line with these; take the lead if the leader before has not done them."""
        self._line.extend(writes)
        self._outside.append(None)
        with self._lead:
            self._outside.pop()
            while not all(write.done for write in writes):
                self._commit_line()

    def _give_way(self) -> None:
        """Let those in who wait for the lead, if only to learn that their writes are done. A lock
        knows no turns: who does one write after another takes it again before anybody has woken."""
        for _ in range(GIVEN_WAY):
            if not self._outside:
                return
            threading.Event().wait(0.001)       # which nobody sets: a pause

    def _commit_line(self) -> None:
        """Commit the writes that stand in line now, and note in each what came of it."""
        group = [self._line.popleft() for _ in range(min(GROUP, len(self._line)))]
        if self._closed:
            for write in group:
                write.finish(StoreError(CLOSED.format(self.path)))
            return
        began = self.clock.monotonic()
        try:
            self._commit(group)
        except Exception as error:  # pylint: disable=broad-exception-caught # or nobody is told
            log.exception("commit")
            for write in group:
                write.finish(self._noted(error))
        self._commit_seconds = self.clock.monotonic() - began

    def _commit(self, group: Sequence[Write]) -> None:
        """Do all of a group and commit it, or undo it all and do each alone: what is wrong with
        one is not the others' fault."""
        try:
            self._refuse_if_lost()
            self._writer.execute("BEGIN IMMEDIATE")
            self._counted.clear()
            self._full = self._disk_full()
            refusals = [self._refusal(write) for write in group]
            self._keep_counts()
            self._writer.execute("COMMIT")
        except Exception as error:  # pylint: disable=broad-exception-caught # each write gets it
            self._undo()
            meaning = as_store_error(self.path, error)
            if len(group) > 1 and (isinstance(meaning, DamagedRow)
                                   or not isinstance(meaning, StoreError)):
                for write in group:
                    self._commit([write])
                return
            refusals = [self._noted(error)] * len(group)
        else:
            self._note_success()
        for write, refusal in zip(group, refusals):
            write.finish(refusal)

    def _refuse_if_lost(self) -> None:
        """Raise StoreError where what is written now may never be found again."""
        if isinstance(self.trouble, Damaged):
            raise self.trouble
        gone = self._watch.error()
        if gone:
            raise gone

    def _refusal(self, write: Write) -> Optional[Exception]:
        """Do a write; return what was wrong with it before it changed anything, or None."""
        try:
            write.value = write.work(*write.arguments)
            return None
        except Refused as error:
            return error
        except DiskFull as error:
            return self._noted(error)

    def _keep_counts(self) -> None:
        """Bring the counts in the database up to what this transaction did."""
        for (state, mode), change in self._counted.items():
            if change:
                self._writer.execute(COUNT, (change, state, mode))

    def _undo(self) -> None:
        with contextlib.suppress(sqlite3.Error):    # then the next BEGIN fails, and tries again
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")

    def _noted(self, error: Exception) -> Exception:
        """Return what an error means. One of the database is remembered, and said once; damage
        until the next start."""
        meaning = as_store_error(self.path, error)
        if isinstance(meaning, DamagedRow):
            return meaning
        if isinstance(meaning, StoreError) and not isinstance(self.trouble, Damaged):
            if not self.trouble or isinstance(meaning, Damaged):
                log.error("database: %s", meaning)
            self.trouble = meaning
        return meaning

    def _note_success(self) -> None:
        """Forget the trouble, unless it is damage, or a full disk on which this just fitted."""
        if not self.trouble or isinstance(self.trouble, Damaged):
            return
        if isinstance(self.trouble, DiskFull) and self._full:
            return
        log.warning("the database can be written again")
        self.trouble = None
