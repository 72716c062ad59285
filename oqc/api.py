"""The endpoints as functions from a request to a response: routes, keys, paging, waiting.

No sockets and no SQL. What can go wrong is raised as what it is, and becomes a response in one
place, `Api.handle`.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import re
import threading
from typing import (
    Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Optional, Protocol, Sequence,
    Tuple, Union)

from oqc import __version__, bloch, jobs, manual, queries
from oqc.documents import (
    CHEAT_SHEET, MANUAL, OPENAPI, PAGE_BODY, PAGE_HEADERS, PICTURE_HEADERS)
from oqc.jobs import (
    Addition, Attempt, Batch, DamagedRow, Details, IdempotencyKey, Job, Log, Malformed, Outcome,
    Queued, Selection, Stored, StoreError, Submission, UnknownJob)
from oqc.keys import (
    ALLOWED, KEY_HEADERS, NOBODY, NOT_HERE, OPERATOR, READER, USER, Key, Keys, is_local, may)
from oqc.messages import (
    JSON, PLAIN, Problem, Request, Response, accepts_first, array, choice, decode, failure, found,
    job_id, job_json, json_lines, json_response, number, parameters, problem_response,
    text_response, wants_text)
from oqc.queries import FILTERS, MOST_LIMIT, PAGE, may_have_more, next_page, pages
from oqc.results import record, record_json
from oqc.text import (
    LogText, details_text, job_rows, metrics_text, records_csv, records_text, result_text, table,
    whole_lines)

HEAVY = 4                           # reads of many rows at once: more only keep all others waiting
MOST_JOBS = 10_000                  # in one array
SMALL_BODY = 1 << 13                # bytes of a body that costs other clients no time
MOST_WAIT = 300                     # seconds
FOLLOW_EVERY = 0.25                 # seconds between looks at a log that is followed
MOST_REASON = 1000                  # bytes of the reason of a pause
WAITED_AT_ONCE = 1000               # jobs of a filter that are waited for before it is read again
# Of a runtime: too much for a table.
WIDE = {"device", "command", "failed_in_a_row", "last_error", "ended_per_minute"}
IN_TABLE = (*Job._fields, "submitter", "tag")       # what a table of jobs has
PAGING = ("limit", "after", "order")
MOST_CUT = 1_000_000                # characters
RECORDS = {                         # how jobs with their results are written, by media type
    JSON: (functools.partial(array, line=record_json), JSON),
    "application/x-ndjson": (functools.partial(json_lines, line=record_json),
                             "application/x-ndjson"),
    "text/csv": (records_csv, "text/csv; charset=utf-8; header=present"),
    "text/plain": (records_text, PLAIN),
}
NO_KEY = ("send the key in the header api_key, or X-API-Key, or as Authorization: Bearer; "
          "nginx drops api_key unless it is set to underscores_in_headers on")
DETAILS = (                         # the members of a job's details, in their order
    "id", "submitter", "tag", "note", "priority", "asked_runtime", "shots", "seed", "sha256",
    "state", "due_time", "ahead", "waits_for", "attempts")
CHANGE = re.compile("[0-9]+")       # as GET /status/ gives it
WANTS_HTML = re.compile(rb"\s*text/html\b")

Headers = Tuple[Tuple[str, str], ...]


class Store(Protocol):
    """What the endpoints ask of the store. Raises StoreError from everything."""

    def add_together(self, batches: Sequence[Batch]) -> List[Union[Addition, Exception]]:
        """Store batches with one commit; return what each came to, or the error."""

    def is_busy(self) -> bool:
        """Return whether a write would wait."""

    def get(self, number: int) -> Job:
        """Return a job; raise UnknownJob."""

    def page(self, after: Optional[int], limit: int, descending: bool, selection: Selection,
             members: Sequence[str]) -> List[Any]:
        """Return a page of jobs, as plain tuples of these members of Stored: a listing makes no
        Job."""

    def open_jobs(self, selection: Selection, limit: int = -1) -> List[int]:
        """Return the ids of jobs that have not ended, the newest first."""

    def count(self, selection: Selection) -> Dict[str, int]:
        """Return how many jobs wait, run and have ended."""

    def submitter(self, number: int) -> str:
        """Return the name of the key that a job came with; raise UnknownJob."""

    def submission(self, number: int) -> Submission:
        """Return a job as it would be submitted again; raise UnknownJob."""

    def details(self, number: int) -> Details:
        """Return what the members of a job do not hold."""

    def log(self, number: int, serial: int) -> Log:
        """Return what was said in an attempt that is over; the first has the serial 1."""

    def result(self, number: int) -> Tuple[Union[str, bytes], bool]:
        """Return (what a job's runtime put out, whether that is JSON)."""

    def prune(self, seconds: float, by: str, is_interrupted: Callable[[], bool]) -> int:
        """Delete the jobs that ended longer ago, as `by` asks for; return how many."""

    def status(self) -> Dict[str, Any]:
        """Return how much waits, runs and has ended."""

    def unusable(self) -> Optional[str]:
        """Return why jobs cannot be stored, or None."""


class Workers(Protocol):
    """What the endpoints ask of the workers."""

    draining: threading.Event       # no more jobs are started
    runtimes: Dict[str, Any]        # by name

    def immediate_outcome(self, submission: Submission) -> Optional[Outcome]:
        """Return the outcome of a job that ends at once, else None."""

    def take_up(self, additions: Sequence[Addition]) -> None:
        """Have new jobs run."""

    def queued(self) -> int:
        """Return how many jobs wait to be run now."""

    def cancel(self, number: int) -> Job:
        """End a job and return it; raise Ended, UnknownJob."""

    def cancel_all(self, numbers: Sequence[int]) -> int:
        """End these jobs; return how many of them had not ended by themselves."""

    def outlook(self, job: Queued, due_time: Optional[str]) -> Tuple[Optional[int], Optional[str]]:
        """Return (how many jobs are before one that waits, what it waits for)."""

    def log(self, number: int) -> Optional[Log]:
        """Return what was said so far in the attempt that runs; None if none does."""

    def pause(self, name: str, reason: str, by: str = "oqc") -> Dict[str, Any]:
        """Pause a runtime; return its description, raise KeyError."""

    def resume(self, name: str) -> Dict[str, Any]:
        """Resume a runtime; return its description, raise KeyError."""

    def describe(self, name: str) -> Dict[str, Any]:
        """Return a runtime as it is shown; raise KeyError."""

    def ended(self) -> Dict[str, int]:
        """Return how many jobs have ended of late."""

    def uptime(self) -> float:
        """Return the seconds since the server began."""

    def durations(self) -> Dict[Tuple[str, str], List[float]]:
        """Return how long attempts took, by mode and outcome."""

    def jobs(self) -> Dict[Tuple[str, str, str], int]:
        """Return how many jobs run and wait on each runtime, by mode."""

    def states(self) -> Dict[Tuple[str, str], int]:
        """Return how many runtimes of each mode are in each state."""


class Waiting(Protocol):
    """What the endpoints ask of those who wait."""

    changes: int                    # how much has happened so far

    def until_ended(self, numbers: Sequence[int], seconds: float, name: str,
                    has_left: Callable[[], bool]) -> List[Job]:
        """Return jobs when they have ended; none if there is no room to wait."""

    def for_change(self, since: int, seconds: float, name: str,
                   has_left: Callable[[], bool]) -> None:
        """Return as soon as `changes` is not `since`."""

    def place(self, name: str) -> ContextManager[bool]:
        """Hold a place for one that waits; gives whether there was one."""

    def for_more(self, number: int, seconds: float) -> bool:
        """Wait for a job to end; return whether to go on with it."""


class Clock(queries.Clock, Protocol):
    """What the endpoints ask of a clock."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""


Endpoint = Callable[..., Response]      # of an Api, a Request and what its path says


class Api:                          # pylint: disable=too-many-public-methods # one an endpoint
    """The documented API over a store and its workers."""

    def __init__(self, store: Store, workers: Workers, waiting: Waiting, keys: Keys,
                 choose_seed: Callable[[], int], clock: Clock,
                 most_waiting: int = 1_000_000) -> None:
        """`choose_seed` gives a seed from 0 to 2**63 - 1 for a job that came without one."""
        self.store = store
        self.workers = workers
        self.waiting = waiting
        self.keys = keys
        self.choose_seed = choose_seed
        self.clock = clock
        self.most_waiting = most_waiting
        self._heavy = threading.BoundedSemaphore(HEAVY)
        self._being_stored = 0                  # jobs that are, and will wait then
        self._counting = threading.Lock()       # over it

    # What the server asks

    def refuse(self, request: Request) -> Optional[Response]:
        """Return what can be refused before the body is read: no such path or method, no key, or
        one that may not; or None."""
        try:
            self._endpoint(request)
            return None
        except Problem as problem:
            return problem_response(problem)

    def is_small_add(self, request: Request) -> bool:
        """Return whether this may be answered by handle_together: it costs others no time."""
        methods, _ = route(request.path)
        return (methods.get(request.method) is Api.add and not request.query
                and len(request.body) <= SMALL_BODY
                and not request.body.lstrip().startswith(b"["))

    def is_quick(self, request: Request) -> bool:
        """Return whether `handle` returns soon enough for the thread that reads all connections."""
        methods, _ = route(request.path)
        return (methods.get(request.method) is Api.get and not request.query
                and len(request.body) <= SMALL_BODY)

    def would_wait(self) -> bool:
        """Return whether handle_together would wait for another's write, or a slow disk."""
        return self.store.is_busy()

    def handle(self, request: Request) -> Response:
        """Return the response to a request. Whatever goes wrong becomes one, too."""
        try:
            endpoint, arguments, key = self._endpoint(request)
            request = request._replace(key_name=key.name, role=key.role)
            return endpoint(self, request, *arguments)
        except Exception as error:  # pylint: disable=broad-exception-caught # `failure` logs it
            return failure(error, request)

    def handle_together(self, requests: Sequence[Request]) -> List[Response]:
        """Return the responses to small adds, stored with one commit."""
        outcomes: List[Any] = [self._parse_add(request) for request in requests]
        stored = iter(self._store_and_queue([one for one in outcomes if isinstance(one, Batch)]))
        responses = []
        for request, outcome in zip(requests, outcomes):
            if isinstance(outcome, Batch):
                outcome = next(stored)
            if isinstance(outcome, Exception):
                responses.append(failure(outcome, request))
            else:
                responses.append(_created(outcome.jobs, False, outcome.replayed))
        return responses

    def _endpoint(self, request: Request) -> Tuple[Endpoint, Tuple[str, ...], Key]:
        """Return (function, what its path says, the key); raise Problem."""
        if self.keys.are_public and not is_local(request.headers):
            raise Problem(421, NOT_HERE)
        methods, arguments = route(request.path)
        if not methods and request.path != "*":         # OPTIONS * asks about the server itself
            path = json.dumps(request.path[:80])
            raise Problem(404, f"nothing is at {path}; GET / shows what is there")
        method = "GET" if request.method == "HEAD" else request.method
        endpoint = methods.get(method)
        if not endpoint and method == "OPTIONS":
            return _options, (), NOBODY
        if not endpoint:
            allowed = allow(methods)
            raise Problem(405, f"{request.method} is not for this path; allowed: {allowed}; "
                          "GET / shows what is there", ("Allow", allowed))
        if endpoint in PUBLIC:
            return endpoint, arguments, NOBODY
        key = self.keys.find(request.headers)
        if not key:
            detail = NO_KEY
            if any(header in request.headers for header in (*KEY_HEADERS, "authorization")):
                detail = "this key is not known; " + NO_KEY
            raise Problem(401, detail, ("WWW-Authenticate", 'Bearer realm="oqc"'))
        needed = NEEDED.get(endpoint, READER)
        if not may(key.role, needed):
            raise _forbidden(key.name, key.role, needed)
        return endpoint, arguments, key

    # Adding jobs

    def add(self, request: Request) -> Response:
        """POST /jobs/add/: store a job, or all of an array or none, and have them run; 201 when
        they are on disk. `?wait=` seconds for their end."""
        seconds = number(parameters(request.query, ("wait",)), "wait", 0, MOST_WAIT)
        batch, many = self._batch(request)
        return self._add(request, batch, many, seconds)

    def rerun(self, request: Request, job_number: str) -> Response:
        """POST /jobs/{id}/rerun/: add a job that is to be run again as a new one, of whoever asks;
        201 and `?wait=` as for an add."""
        known_id = job_id(job_number)
        seconds = number(parameters(request.query, ("wait",)), "wait", 0, MOST_WAIT)
        submission = self.store.submission(known_id)
        self._check_runtime(submission)
        return self._add(request, self._prepare(request, [submission]), False, seconds)

    def _add(self, request: Request, batch: Batch, many: bool, seconds: Optional[int]) -> Response:
        """Store a batch and have its jobs run; return the 201, after the wait."""
        addition, = self._store_and_queue([batch])
        if isinstance(addition, Exception):
            raise addition
        added = addition.jobs
        headers: Headers = ()
        if seconds:
            # Whatever became of them since: they were added, and that is what the answer says.
            with contextlib.suppress(UnknownJob, StoreError):
                added, headers = self._wait_for_ends(added, seconds, request)
        return _created(added, many, addition.replayed, headers)

    def _parse_add(self, request: Request) -> Union[Batch, Exception]:
        """Return what a small add is to store, or the error for which it is refused."""
        try:
            _, _, key = self._endpoint(request)
            batch, _ = self._batch(request._replace(key_name=key.name, role=key.role))
            return batch
        except Exception as error:  # pylint: disable=broad-exception-caught # `failure` logs it
            return error

    def _batch(self, request: Request) -> Tuple[Batch, bool]:
        """Return (what a request adds, with room reserved for it; whether it came as an array).
        Raise Malformed, or Problem if there is no room."""
        value = decode(request.body)
        many = isinstance(value, list)
        submissions = self._submissions(value if many else [value], many)
        if not may(request.role, OPERATOR):
            self._forbid_raised_priority(request, submissions, many)
        return self._prepare(request, submissions), many

    @staticmethod
    def _forbid_raised_priority(request: Request, submissions: Sequence[Submission],
                                many: bool) -> None:
        for index, submission in enumerate(submissions):
            if submission.priority > 0:
                place = f"[{index}]: " if many else ""
                raise Problem(403, f"{place}priority: {request.key_name} is a {request.role}, and "
                              "may give 0 or less; above 0 takes an operator's key")

    def _prepare(self, request: Request, submissions: Sequence[Submission]) -> Batch:
        """Return what is to be stored, with room reserved for it; raise Malformed, or Problem if
        there is no room."""
        key = self._idempotency_key(request)
        if self.workers.draining.is_set():
            raise Problem(503, "the server is stopping; send the job again when it is back",
                          ("Retry-After", "10"))
        self._reserve(submissions)
        outcomes = [self.workers.immediate_outcome(submission) for submission in submissions]
        return Batch(submissions, request.key_name, key, outcomes)

    def _submissions(self, values: List[Any], many: bool) -> List[Submission]:
        """Return the checked submissions, each with a seed; raise Malformed, which names the index
        in an array."""
        if not 1 <= len(values) <= MOST_JOBS:
            raise Malformed(f"expected an array of 1 to {MOST_JOBS} jobs, found {len(values)}")
        submissions = []
        for index, value in enumerate(values):
            try:
                submission = jobs.parse(value)
                self._check_runtime(submission)
            except Malformed as error:
                if many:
                    raise Malformed(f"[{index}]: {error}") from None
                raise
            if submission.seed is None:
                submission = submission._replace(seed=self.choose_seed())
            submissions.append(submission)
        return submissions

    def _check_runtime(self, submission: Submission) -> None:
        """Raise Malformed if the runtime that a job asks for is none of its mode."""
        if submission.runtime is None:
            return
        mode = submission.mode
        names = [name for name in self.workers.runtimes
                 if mode in self.workers.describe(name)["modes"]]
        if submission.runtime not in names:
            raise Malformed(f"runtime: expected one that serves the mode {mode}: "
                            f"{' or '.join(names)}; found {found(submission.runtime)}")

    @staticmethod
    def _idempotency_key(request: Request) -> Optional[IdempotencyKey]:
        """Return the request's Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), with
        or without its quotes; raise Malformed."""
        text = request.headers.get("idempotency-key")
        if text is None:
            return None
        match = re.fullmatch(rb'"?([\x21\x23-\x7e]{1,255})"?', text)
        if not match:
            raise Malformed(
                "Idempotency-Key: expected 1 to 255 printable characters without spaces")
        what = f"{request.method} {request.path.rstrip('/')}\n".encode() + request.body
        return IdempotencyKey(match[1].decode(), hashlib.sha256(what).hexdigest())

    def _reserve(self, submissions: Sequence[Submission]) -> None:
        """Count jobs that are about to be stored, so that a crowd that comes at one moment does
        not pass --max-waiting; raise Problem if there is no room."""
        with self._counting:
            waiting = self.workers.queued() + self._being_stored
            if waiting + len(submissions) > self.most_waiting:
                raise Problem(503, f"{self.most_waiting} jobs wait already (--max-waiting); try "
                              "again later", ("Retry-After", "10"))
            self._being_stored += _count_waiting(submissions)

    def _store_and_queue(self, batches: Sequence[Batch]) -> List[Union[Addition, Exception]]:
        """Store batches and have their jobs run; return what each came to, or the error."""
        try:
            additions = self.store.add_together(batches)
            self.workers.take_up([one for one in additions if isinstance(one, Addition)])
            return additions
        finally:
            with self._counting:
                for batch in batches:
                    self._being_stored -= _count_waiting(batch.submissions)

    # Jobs

    def list(self, request: Request) -> Response:
        """GET /jobs/list/: all jobs, one a line, streamed; or a page of them."""
        query = parameters(request.query, (*PAGING, *FILTERS))
        if wants_text(request):
            return self._listing(request, query, IN_TABLE, job_rows, PLAIN)
        return self._listing(request, query, Job._fields, array, JSON)

    def results(self, request: Request) -> Response:
        """GET /jobs/results/: jobs with their results, one a line, streamed; or a page of them. As
        JSON, NDJSON, CSV or a table. `?cut=` shortens job strings to so many characters."""
        query = parameters(request.query, ("cut", *PAGING, *FILTERS))
        cut = number(query, "cut", 1, MOST_CUT)
        media_type = accepts_first(request)
        if media_type not in RECORDS:
            media_type = JSON
        write, content_type = RECORDS[media_type]
        write = functools.partial(_write_records, write, cut)
        return self._listing(request, query, Stored._fields, write, content_type)

    def _listing(self, request: Request, query: Dict[str, str], members: Sequence[str],
                 write: Callable[[Iterator[List[Any]]], Iterator[bytes]],
                 content_type: str) -> Response:
        """Return these members of the jobs that a query selects, as `write` makes bytes of pages
        of them."""
        after = number(query, "after", 0, 2 ** 63 - 1)
        limit = number(query, "limit", 1, MOST_LIMIT)
        descending = choice(query, "order", ("asc", "desc")) == "desc"
        selection = queries.selection(query, self.clock, request.key_name)
        select = functools.partial(
            self._page, descending=descending, selection=selection, members=members)
        # Now, so that a database that cannot be read is found before the answer begins.
        page = select(after, limit or PAGE)
        if limit is None:
            return Response(200, write(pages(select, page)), content_type)
        headers: Headers = ()
        if may_have_more(page, limit) and select(page[-1][0], 1):
            following = next_page(query, selection, page[-1][0])
            headers = (("Link", f'<{request.path.rstrip("/")}/?{following}>; rel="next"'),)
        return Response(200, b"".join(write(iter([page]))), content_type, headers)

    def _page(self, after: Optional[int], limit: int, descending: bool, selection: Selection,
              members: Sequence[str]) -> List[Any]:
        """Return a page of jobs; of such reads only HEAVY go on at once."""
        with self._heavy:
            return self.store.page(after, limit, descending, selection, members)

    def get(self, request: Request, job_number: str) -> Response:
        """GET /jobs/{id}/: the job, or 404 and a 0 (documented so). `?wait=` seconds for its
        end."""
        job, headers = self._job(request, job_number)
        if wants_text(request):
            details = self.store.details(job.id)
            row = (*job, details.submitter, details.tag)
            return Response(200, b"".join(job_rows([[row]])), PLAIN, headers)
        return Response(200, job_json(job), headers=headers)

    def result(self, request: Request, job_number: str) -> Response:
        """GET /jobs/{id}/result/: what the runtime put out, byte for byte, as JSON where it is
        that, else as text or, if it is no UTF-8, as bytes. JSON and text end with a line feed."""
        job, headers = self._job(request, job_number)
        if job.end_time is None:
            raise Problem(409, f"job {job.id} has not ended yet: {job.status}", *headers)
        result, is_json = self.store.result(job.id)
        if isinstance(result, bytes):
            return Response(200, result, "application/octet-stream")
        if not is_json:
            return text_response(whole_lines(result))
        if wants_text(request):
            return text_response(result_text(result, job.job))
        return Response(200, whole_lines(result).encode())

    def details(self, request: Request, job_number: str) -> Response:
        """GET /jobs/{id}/details/: what its ten members do not hold, its attempts above all."""
        known_id = job_id(job_number)
        parameters(request.query, ())
        details = self._details(self.store.get(known_id))
        if wants_text(request):
            return text_response(details_text(details))
        return json_response(details)

    def _details(self, job: Job) -> Dict[str, Any]:
        """Return a job's details, as JSON has them."""
        stored = self.store.details(job.id)
        ahead = waits_for = None
        if stored.state == "waiting":
            queued = Queued(
                job.id, job.mode, stored.priority, stored.submitter, stored.asked_runtime)
            ahead, waits_for = self.workers.outlook(queued, stored.due_time)
        details = stored._asdict()
        details["note"] = _parsed(stored.note)
        # The receipts of the attempts are to be compared with it.
        details["sha256"] = hashlib.sha256(job.job.encode()).hexdigest()
        details["ahead"] = ahead
        details["waits_for"] = waits_for
        details["attempts"] = [
            {**attempt._asdict(), "device": _parsed(attempt.device)} for attempt in stored.attempts]
        return {name: details[name] for name in DETAILS}

    def log(self, request: Request, job_number: str) -> Response:
        """GET /jobs/{id}/log/: what its runtimes wrote on standard error, attempt by attempt.
        `?follow=1` goes on until the job has ended."""
        known_id = job_id(job_number)
        follow = choice(parameters(request.query, ("follow",)), "follow", ("1",))
        self.store.get(known_id)
        pieces = self._log_pieces(known_id, request if follow else None)
        # Now, so that what is wrong is found before the response begins.
        first = next(pieces, b"")
        if not follow:
            return Response(200, first + b"".join(pieces), PLAIN)
        return Response(200, itertools.chain([first], pieces), PLAIN)

    def _log_pieces(self, number: int, follower: Optional[Request]) -> Iterator[bytes]:
        """Yield a job's log, and to a follower what is new, until it ends or they have left."""
        if follower is None:
            yield from self._new_log(LogText(), number, [])
            return
        with self.waiting.place(follower.key_name) as has_room:
            if not has_room:
                raise Problem(503, "too many requests wait or follow already; ask without follow, "
                              "or again later", ("Retry-After", "10"))
            yield b""                       # the head of the response need not wait
            text = LogText()
            over: List[Attempt] = []        # that were shown to their end
            goes_on = True
            while True:
                ended = self.store.get(number).end_time is not None     # first: then all is there
                yield from self._new_log(text, number, over)
                if ended or follower.has_left():
                    return
                if not goes_on:
                    yield b"\n(the server is stopping; the job has not ended)\n"
                    return
                goes_on = self.waiting.for_more(number, FOLLOW_EVERY)

    def _new_log(self, text: LogText, number: int, over: List[Attempt]) -> Iterator[bytes]:
        """Yield what is new in a job's log, and add to `over` the attempts that are."""
        for serial, attempt in enumerate(self.store.details(number).attempts, 1):
            if serial <= len(over):
                continue
            if attempt.end_time is None:
                said = self.workers.log(number)
                if said is None:        # it is over by now, or has not begun yet
                    return
            else:
                said = self.store.log(number, serial)
                over.append(attempt)
            piece = text.of(attempt, said)
            if piece:
                yield piece.encode()

    def picture(self, _: Request, job_number: str) -> Response:
        """GET /jobs/{id}/bloch.svg: the path of a simulation on the Bloch sphere."""
        known_id = job_id(job_number)
        job = self.store.submission(known_id)
        if job.mode != "simulation":
            raise Problem(409, f"job {known_id} has the mode {job.mode}; only a simulation has a "
                          "picture")
        svg = bloch.picture(f"Job {known_id} on the Bloch sphere", job.job)
        return Response(200, svg.encode(), "image/svg+xml", PICTURE_HEADERS)

    def _job(self, request: Request, job_number: str) -> Tuple[Job, Headers]:
        """Return the job of this path, after the wait that the query asks for, and headers; raise
        UnknownJob, Malformed."""
        known_id = job_id(job_number)
        seconds = number(parameters(request.query, ("wait",)), "wait", 0, MOST_WAIT)
        job = self.store.get(known_id)
        if not seconds or job.end_time is not None:
            return job, ()
        (job,), headers = self._wait_for_ends([job], seconds, request)
        return job, headers

    def _wait_for_ends(self, waited_for: List[Job], seconds: float,
                       request: Request) -> Tuple[List[Job], Headers]:
        """Return these jobs as soon as all have ended, or as they are after so many seconds; and
        as they are now, with a Retry-After, when there is no room for another that waits."""
        ended = self.waiting.until_ended([job.id for job in waited_for], seconds,
                                         request.key_name, request.has_left)
        if not ended:
            return waited_for, (("Retry-After", "1"),)
        return ended, ()

    def cancel(self, request: Request, job_number: str) -> Response:
        """DELETE /jobs/{id}/: end a job that has not ended; answers when it has."""
        known_id = job_id(job_number)
        if not may(request.role, OPERATOR):
            submitter = self.store.submitter(known_id)
            if submitter != request.key_name:
                raise Problem(403, f"job {known_id} came with a key of {submitter}: only that name "
                              f"or an operator may cancel it, and {request.key_name} is a "
                              f"{request.role}")
        return Response(200, job_json(self.workers.cancel(known_id)))

    def cancel_all(self, request: Request) -> Response:
        """POST /jobs/cancel/: end all jobs that a filter selects and that have not ended; answers
        when they have, with {"cancelled": how many}. A user's filter is narrowed to their own."""
        query = parameters(request.query, FILTERS)
        if not query:
            raise Malformed(f"expected a filter such as ?tag=rabi-7: {', '.join(FILTERS)}")
        selection = queries.selection(query, self.clock, request.key_name)
        narrowed = None
        if not may(request.role, OPERATOR):
            narrowed = request.key_name
            if selection.by not in (None, narrowed):
                raise Problem(403, f"by: {narrowed} is a {request.role}, and may cancel only their "
                              "own jobs; an operator may cancel all")
            selection = selection._replace(by=narrowed)
        with self._heavy:
            numbers = self.store.open_jobs(selection)
        return json_response({"cancelled": self.workers.cancel_all(numbers), "by": narrowed})

    def prune(self, request: Request) -> Response:
        """DELETE /jobs/list/?older-than=90d: forget the jobs that ended longer ago;
        {"deleted": how many}."""
        text = parameters(request.query, ("older-than",)).get("older-than", "")
        seconds = queries.age(text)
        if seconds is None:
            raise Malformed("older-than: expected a time such as 90d, 12h, 30m or 0s")
        is_stopping = self.workers.draining.is_set
        deleted = self.store.prune(seconds, request.key_name, is_stopping)
        if is_stopping():
            raise Problem(503, f"the server is stopping; {deleted} jobs are deleted so far")
        return json_response({"deleted": deleted})

    # The server

    def root(self, request: Request) -> Response:
        """GET /: what can be asked for, with the address that was asked; for a browser the page."""
        if WANTS_HTML.match(request.headers.get("accept", b"")):
            return Response(200, PAGE_BODY, "text/html; charset=utf-8", PAGE_HEADERS)
        host = request.headers.get("host", b"localhost:12021").decode()
        return text_response(CHEAT_SHEET.replace("HOST", host))

    def help(self, _: Request) -> Response:
        """GET /help/: the topics of the manual, a line each."""
        return text_response(manual.contents(MANUAL))

    def topic(self, _: Request, name: str) -> Response:
        """GET /help/{topic}/: a topic of the manual."""
        if name not in MANUAL:
            raise Problem(404, "no topic has this name; GET /help/ lists them")
        return text_response(MANUAL[name])

    def openapi(self, _: Request) -> Response:
        """GET /openapi.json: this API as OpenAPI 3.1 describes it."""
        return Response(200, OPENAPI)

    def status(self, request: Request) -> Response:
        """GET /status/: how much waits, runs and has ended, of one moment. `?wait=` seconds for a
        change, counted from that which a status before had: `?since=`. With filters: how many jobs
        they select, and `?wait=` for the end of all these."""
        query = parameters(request.query, ("wait", *FILTERS))
        seconds = number(query, "wait", 0, MOST_WAIT)
        filters = query.keys() - {"wait"}
        # Digits alone are a change, and a year only beside another filter.
        if filters - {"since"} or not CHANGE.fullmatch(query.get("since", "0")):
            return self._count(request, query, seconds)
        since = number(query, "since", 0, 2 ** 63 - 1)
        if seconds:
            if since is None:
                since = self.waiting.changes
            self.waiting.for_change(since, seconds, request.key_name, request.has_left)
        change = self.waiting.changes   # before the store is read: nothing after it goes unnoticed
        with self._heavy:
            stored = self.store.status()
        paused = [name for name in self.workers.runtimes
                  if self.workers.describe(name)["state"] == "paused"]
        status = {**stored, **self.workers.ended(), "paused": paused, "version": __version__,
                  "uptime": self.workers.uptime(), "change": change,
                  "you": {"name": request.key_name, "role": request.role}}
        if wants_text(request):
            rows = [(name, json.dumps(value)) for name, value in status.items()]
            return text_response(table(rows, ("WHAT", "VALUE")))
        return json_response(status)

    def _count(self, request: Request, query: Dict[str, str], seconds: Optional[int]) -> Response:
        """Return how many jobs these filters select, by what they do; after `seconds`, or as soon
        as none of them is open."""
        selection = queries.selection(query, self.clock, request.key_name)
        headers: Headers = ()
        if seconds:
            headers = self._wait_for_all(selection, seconds, request)
        with self._heavy:
            counts = self.store.count(selection)
        if wants_text(request):
            return text_response(table(list(counts.items()), ("WHAT", "JOBS")))
        return json_response({"jobs": counts})._replace(headers=headers)

    def _wait_for_all(self, selection: Selection, seconds: float, request: Request) -> Headers:
        """Return as soon as no job of a selection is open, or after so many seconds; at once, and
        with a Retry-After, when there is no room for another that waits."""
        deadline = self.clock.monotonic() + seconds
        while True:
            left = deadline - self.clock.monotonic()
            with self._heavy:
                numbers = self.store.open_jobs(selection, WAITED_AT_ONCE)
            if not numbers or left <= 0:
                return ()
            try:
                ended = self.waiting.until_ended(numbers, left, request.key_name,
                                                 request.has_left)
            except UnknownJob:      # it has ended, and was deleted since
                continue
            except DamagedRow:      # which nobody can wait for; the others are counted
                return (("Retry-After", "1"),)
            if not ended:
                return (("Retry-After", "1"),)
            if any(job.end_time is None for job in ended):      # the time is over, or it stops
                return ()

    def metrics(self, _: Request) -> Response:
        """GET /metrics/: the same and the durations of jobs, for Prometheus."""
        with self._heavy:
            stored = self.store.status()
        text = metrics_text(jobs.BUCKETS, stored, self.workers.durations(), self.workers.states(),
                            self.workers.jobs())
        return Response(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def health(self, _: Request) -> Response:
        """GET /health/: whether the server can take jobs and run them; or 503 with the reasons.
        Names no runtime, since it needs no key."""
        states = self.workers.states()
        reasons = []
        warnings = []
        unusable = self.store.unusable()
        if unusable:
            reasons.append(unusable)
        if self.workers.draining.is_set():
            reasons.append("the server is stopping")
        for mode in jobs.MODES:
            total = sum(states[known] for known in states if known[0] == mode)
            failing = states[mode, "failing"]
            if failing == total:
                reasons.append(f"no runtime for {mode} can be started")
            elif failing:
                warnings.append(f"{failing} of {total} runtimes for {mode} cannot be started")
        if reasons:
            return json_response({"status": "failing", "reasons": reasons}, 503)
        if warnings:
            return json_response({"status": "ok", "warnings": warnings})
        return json_response({"status": "ok"})

    # Runtimes

    def runtimes(self, request: Request) -> Response:
        """GET /runtimes/: every runtime and its state."""
        runtimes = [self.workers.describe(name) for name in self.workers.runtimes]
        if not may(request.role, OPERATOR):
            for runtime in runtimes:
                del runtime["command"]  # it may hold what is nobody else's business
        if not wants_text(request):
            return Response(200, b"".join(array([runtimes], json.dumps)))
        for runtime in runtimes:
            for name in WIDE & runtime.keys():
                del runtime[name]
        rows = [[", ".join(map(str, value)) if isinstance(value, list) else value
                 for value in runtime.values()] for runtime in runtimes]
        return text_response(table(rows, [name.upper() for name in runtimes[0]]))

    def pause(self, request: Request, name: str) -> Response:
        """POST /runtimes/{name}/pause/: let what runs on it end and start no other."""
        return self._change_runtime(self.workers.pause, name, _reason(request.body),
                                    request.key_name)

    def resume(self, _: Request, name: str) -> Response:
        """POST /runtimes/{name}/resume/: let it run jobs again."""
        return self._change_runtime(self.workers.resume, name)

    @staticmethod
    def _change_runtime(change: Callable[..., Dict[str, Any]], *arguments: str) -> Response:
        try:
            return json_response(change(*arguments))
        except KeyError:
            raise Problem(404, "no runtime has this name; GET /runtimes/ lists them") from None


def _write_records(write: Callable[[Iterator[List[Any]]], Iterator[bytes]], cut: Optional[int],
                   pages_of_jobs: Iterator[List[Any]]) -> Iterator[bytes]:
    """Return jobs with their results as `write` makes bytes of pages of records."""
    return write([record(row, cut) for row in page] for page in pages_of_jobs)


def _parsed(text: Optional[str]) -> Any:
    """Return the value of a JSON text that is stored, None for none."""
    return None if text is None else json.loads(text)


def _created(added: List[Job], many: bool, replayed: bool, headers: Headers = ()) -> Response:
    """Return the 201 for jobs that are on disk: an array if they came so."""
    if replayed:
        headers = (*headers, ("Idempotent-Replayed", "true"))
    if many:
        return Response(201, b"".join(array([added])), headers=headers)
    headers = (("Location", f"/jobs/{added[0].id}/"), *headers)
    return Response(201, job_json(added[0]), headers=headers)


def _forbidden(name: str, role: str, needed: str) -> Problem:
    """Return the answer to a request that takes another role."""
    return Problem(403, f"{name} is a {role}: only {ALLOWED[needed]}")


def _count_waiting(submissions: Sequence[Submission]) -> int:
    """Return how many of these jobs will wait for a runtime."""
    return sum(submission.mode != "echo" for submission in submissions)


def _reason(body: bytes) -> str:
    """Return the reason in the body of a pause, empty without one; raise Malformed."""
    if not body.strip():
        return ""
    value = decode(body)
    if not isinstance(value, dict) or set(value) - {"reason"}:
        raise Malformed('expected {"reason": "..."} or no body')
    reason = value.get("reason", "")
    if not isinstance(reason, str):
        raise Malformed('expected {"reason": "..."} or no body')
    try:
        size = len(reason.encode())
    except UnicodeEncodeError:
        raise Malformed("reason: half of a surrogate pair is no text") from None
    if size > MOST_REASON:
        raise Malformed(f"reason: expected {MOST_REASON} bytes of text at most")
    return reason


ROUTES = tuple((re.compile(path), methods) for path, methods in (
    (r"/jobs/add/?", {"POST": Api.add}),
    (r"/jobs/list/?", {"GET": Api.list, "DELETE": Api.prune}),
    (r"/jobs/results/?", {"GET": Api.results}),
    (r"/jobs/cancel/?", {"POST": Api.cancel_all}),
    (r"/jobs/([^/]+)/?", {"GET": Api.get, "DELETE": Api.cancel}),
    (r"/jobs/([^/]+)/rerun/?", {"POST": Api.rerun}),
    (r"/jobs/([^/]+)/result/?", {"GET": Api.result}),
    (r"/jobs/([^/]+)/details/?", {"GET": Api.details}),
    (r"/jobs/([^/]+)/log/?", {"GET": Api.log}),
    (r"/jobs/([^/]+)/bloch\.svg", {"GET": Api.picture}),
    (r"/", {"GET": Api.root}),
    (r"/help/?", {"GET": Api.help}),
    (r"/help/([^/]+)/?", {"GET": Api.topic}),
    (r"/openapi\.json", {"GET": Api.openapi}),
    (r"/health/?", {"GET": Api.health}),
    (r"/status/?", {"GET": Api.status}),
    (r"/metrics/?", {"GET": Api.metrics}),
    (r"/runtimes/?", {"GET": Api.runtimes}),
    (r"/runtimes/([^/]+)/pause/?", {"POST": Api.pause}),
    (r"/runtimes/([^/]+)/resume/?", {"POST": Api.resume}),
))
NEEDED = {                          # roles, of what takes more than a reader's
    Api.add: USER,
    Api.rerun: USER,
    Api.cancel: USER,
    Api.cancel_all: USER,
    Api.prune: OPERATOR,
    Api.pause: OPERATOR,
    Api.resume: OPERATOR,
}
PUBLIC = (Api.root, Api.help, Api.topic, Api.openapi, Api.health)   # what needs no key


@functools.lru_cache(maxsize=256)
def route(path: str) -> Tuple[Dict[str, Endpoint], Tuple[str, ...]]:
    """Return ({method: endpoint}, what the path says); no methods where nothing is."""
    for pattern, methods in ROUTES:
        match = pattern.fullmatch(path)
        if match:
            return methods, match.groups()
    return {}, ()


def allow(methods: Iterable[str]) -> str:
    """Return the value of Allow for a path with these methods."""
    allowed = {*methods, "OPTIONS"}
    if "GET" in methods:
        allowed.add("HEAD")
    return ", ".join(sorted(allowed))


def _options(_: Api, request: Request) -> Response:
    return Response(204, b"", headers=(("Allow", allow(route(request.path)[0])),))
