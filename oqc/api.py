"""The endpoints as functions from a request to a response: routes, keys, paging, JSON, problem details.

No sockets and no SQL. What can go wrong is raised as what it is, and becomes an answer in one place, `Api.handle`.
"""
import functools
import hashlib
import json
import logging
import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from oqc import jobs
from oqc.jobs import DiskFull, Ended, Job, Malformed, StoreError, UnknownJob

log = logging.getLogger("oqc")

PHRASES = {
    200: "OK", 201: "Created", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 414: "URI Too Long", 417: "Expectation Failed", 422: "Unprocessable Content",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable", 505: "HTTP Version Not Supported", 507: "Insufficient Storage",
}
PAGE = 1000                         # rows read at once for a listing: what bounds its memory
MOST_LIMIT = 10_000
QUICK_BODY = 1 << 16             # bytes of a body that is parsed in no time
MOST_WAIT = 300                     # seconds
KEY_HEADERS = ("api_key", "x-api-key")
NO_KEY = ("send the key in the header api_key, or X-API-Key, or as Authorization: Bearer; "
          "nginx drops api_key unless it is set to underscores_in_headers on")


class Problem(Exception):
    """A request that is answered with a problem detail (RFC 9457)."""

    def __init__(self, status: int, detail: str, *headers: Tuple[str, str]) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class Request(NamedTuple):
    """What came over the wire, parsed. Header names are in lower case, values are bytes."""

    method: str
    path: str
    query: str
    headers: Dict[str, bytes]
    body: bytes = b""
    key_name: str = ""              # of the key that it came with; empty where none is needed


class Response(NamedTuple):
    """What goes back. A body that is not bytes is sent piece by piece."""

    status: int
    body: Union[bytes, Iterable[bytes]]
    content_type: str = "application/json"
    headers: Tuple[Tuple[str, str], ...] = ()


class Keys:
    """The API keys: who a request comes from."""

    def __init__(self, keys: Dict[str, bytes]) -> None:
        """`keys`: {name: key}, the keys being any bytes that a header can carry."""
        self.names = {self._digest(key): name for name, key in keys.items()}

    def name(self, headers: Dict[str, bytes]) -> Optional[str]:
        """The name of the request's key, or None. Digests are looked up, not keys: how long that takes tells nothing
        about where a wrong key differs, and does not depend on how many keys there are."""
        for header in KEY_HEADERS:
            if header in headers:
                return self.names.get(self._digest(headers[header]))
        scheme, _, token = headers.get("authorization", b"").partition(b" ")
        return self.names.get(self._digest(token.strip(b" "))) if scheme.lower() == b"bearer" else None

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()


# What an endpoint gives: the answer, or what gives it (or an error) to a function later, from another thread
Later = Callable[[Callable[[Union[Response, Exception]], None]], None]
Endpoint = Callable[..., Union[Response, Later]]


class Api:
    """The documented API over a store and its workers."""

    def __init__(self, store: Any, workers: Any, keys: Keys, choose_seed: Callable[[], int],
                 most_waiting: int = 1_000_000) -> None:
        """`choose_seed` gives a seed from 0 to 2**63 - 1 for a job that came without one."""
        self.store, self.workers, self.keys, self.choose_seed = store, workers, keys, choose_seed
        self.most_waiting = most_waiting

    def refuse(self, request: Request) -> Optional[Response]:
        """What can be refused before the body is read: no such path or method, no key; or None."""
        try:
            self._endpoint(request)
            return None
        except Problem as problem:
            return problem_response(problem)

    def is_quick(self, request: Request) -> bool:
        """Whether `handle` returns soon enough for the thread that reads all connections."""
        endpoint = route(request.path)[0].get(request.method)
        return endpoint in (Api.add, Api.get) and not request.query and len(request.body) <= QUICK_BODY

    def handle(self, request: Request, answer: Callable[[Response], None]) -> None:
        """Have `answer` called once with the answer to a request, now or, from another thread, when the store has it.
        One of the two places where a surprise is caught and logged."""
        try:
            endpoint, arguments, name = self._endpoint(request)
            made = endpoint(self, request._replace(key_name=name), *arguments)
        except Exception as error:      # pylint: disable=broad-exception-caught # see above
            made = failure(error, request)
        if isinstance(made, Response):
            answer(made)
        else:
            made(lambda response: answer(response if isinstance(response, Response) else failure(response, request)))

    def _endpoint(self, request: Request) -> Tuple[Endpoint, Tuple[str, ...], str]:
        """(function, what its path says, name of the key); raises Problem."""
        methods, arguments = route(request.path)
        if not methods:
            raise Problem(404, f"nothing is at {json.dumps(request.path[:80])}")
        endpoint = methods.get("GET" if request.method == "HEAD" else request.method)
        if request.method == "OPTIONS" and not endpoint:
            return _options, (), ""
        if not endpoint:
            allowed = allow(methods)
            raise Problem(405, f"{request.method} is not for this path; allowed: {allowed}", ("Allow", allowed))
        name = self.keys.name(request.headers) or ""
        if not name and endpoint not in PUBLIC:
            raise Problem(401, NO_KEY, ("WWW-Authenticate", 'Bearer realm="oqc"'))
        return endpoint, arguments, name

    # Jobs

    def add(self, request: Request) -> "Later":
        """POST /jobs/add/: store a job, and have it run; 201 when it is on disk."""
        value = decode(request.body)
        if self.workers.draining.is_set():
            raise Problem(503, "the server is stopping; send the job again when it is back", ("Retry-After", "10"))
        if self.workers.waiting() >= self.most_waiting:
            raise Problem(503, f"{self.most_waiting} jobs wait already (--max-waiting); try again later",
                          ("Retry-After", "10"))
        submission = jobs.parse(value)
        if submission.seed is None:
            submission = submission._replace(seed=self.choose_seed())

        def later(answer: Callable[[Union[Response, Exception]], None]) -> None:
            def stored(added: List[Job], error: Optional[Exception]) -> None:
                if error is None:
                    self.workers.enqueue(submission.mode, [job.id for job in added])
                answer(error or Response(201, job_json(added[0]), headers=(("Location", f"/jobs/{added[0].id}/"),)))
            self.store.add((submission,), request.key_name, stored)
        return later

    def list(self, request: Request) -> Response:
        """GET /jobs/list/: all jobs, one a line, streamed; or a page of them."""
        query = parameters(request.query, ("limit", "after", "order", "status", "mode"))
        after = _number(query, "after", 0, 2 ** 63 - 1)
        limit = _number(query, "limit", 1, MOST_LIMIT)
        order = _choice(query, "order", ("asc", "desc")) or "asc"
        select = functools.partial(self.store.page, descending=order == "desc",
                                   status=_choice(query, "status", jobs.STATUSES),
                                   mode=_choice(query, "mode", jobs.MODES))
        if limit is None:
            return Response(200, array(pages(select, after)))
        page = select(after, limit + 1)
        headers: Tuple[Tuple[str, str], ...] = ()
        if len(page) > limit:
            kept = "".join(f"&{name}={value.replace(' ', '%20')}" for name, value in query.items() if name != "after")
            headers = (("Link", f'</jobs/list/?after={page[limit - 1][0]}{kept}>; rel="next"'),)
        return Response(200, b"".join(array([page[:limit]])), headers=headers)

    def get(self, request: Request, number: str) -> Response:
        """GET /jobs/{id}/: the job, or 404 and a 0 (documented so). `?wait=` seconds for its end."""
        return Response(200, job_json(self._job(request, number)))

    def result(self, request: Request, number: str) -> Response:
        """GET /jobs/{id}/result/: what the runtime put out, as JSON where it is that, else as text."""
        job = self._job(request, number)
        if job.end_time is None:
            raise Problem(409, f"job {job.id} has not ended yet: {job.status}")
        _, result, is_json = self.store.result(job.id)
        if is_json:
            return Response(200, ((result or "null") + "\n").encode())
        return Response(200, (result if result.endswith("\n") else result + "\n").encode(), "text/plain; charset=utf-8")

    def cancel(self, _: Request, number: str) -> Response:
        """DELETE /jobs/{id}/: end a job that has not ended; answers when it has."""
        return Response(200, job_json(self.workers.cancel(job_id(number))))

    def _job(self, request: Request, number: str) -> Job:
        """The job of this path, after the wait that the query asks for; raises UnknownJob, Problem."""
        known = job_id(number)
        seconds = _number(parameters(request.query, ("wait",)), "wait", 0, MOST_WAIT)
        job: Job = self.workers.wait(known, seconds) if seconds else self.store.get(known)
        return job

    # The server

    def health(self, _: Request) -> Response:
        """GET /health/: whether the server can take jobs and run them; or 503 with the reasons. Needs no key."""
        if self.store.trouble:
            try:
                self.store.probe()      # it may have passed, and nobody has written since
            except StoreError:
                pass
        states = self.workers.states()
        reasons = [str(self.store.trouble)] if self.store.trouble else []
        reasons += ["the server is stopping"] if self.workers.draining.is_set() else []
        reasons += [f"no runtime for {mode} can be started" for mode in jobs.MODES
                    if all(state == "failing" for known, state in states if known == mode)]
        body = {"status": "failing", "reasons": reasons} if reasons else {"status": "ok"}
        return Response(503 if reasons else 200, json.dumps(body).encode() + b"\n")

    # Runtimes

    def runtimes(self, _: Request) -> Response:
        """GET /runtimes/: every runtime and how it fares."""
        return Response(200, b"".join(array([[self.workers.describe(name) for name in self.workers.runtimes]],
                                            lambda state: json.dumps(state))))  # pylint: disable=unnecessary-lambda

    def pause(self, request: Request, name: str) -> Response:
        """POST /runtimes/{name}/pause/: let what runs on it end and start no other."""
        reason = ""
        if request.body.strip():
            value = decode(request.body)
            if not isinstance(value, dict) or set(value) - {"reason"} or not isinstance(value.get("reason", ""), str):
                raise Malformed('expected {"reason": "..."} or no body')
            reason = value.get("reason", "")
            try:
                if len(reason.encode()) > 1000:
                    raise Malformed("reason: expected 1000 bytes of text at most")
            except UnicodeEncodeError:
                raise Malformed("reason: half of a surrogate pair is no text") from None
        return self._runtime(self.workers.pause, name, reason)

    def resume(self, _: Request, name: str) -> Response:
        """POST /runtimes/{name}/resume/: let it run jobs again."""
        return self._runtime(self.workers.resume, name)

    @staticmethod
    def _runtime(change: Callable[..., Dict[str, Any]], *arguments: str) -> Response:
        try:
            return Response(200, json.dumps(change(*arguments)).encode() + b"\n")
        except KeyError:
            raise Problem(404, "no runtime has this name; GET /runtimes/ lists them") from None


ROUTES = tuple((re.compile(path), methods) for path, methods in (
    (r"/jobs/add/?", {"POST": Api.add}),
    (r"/jobs/list/?", {"GET": Api.list}),
    (r"/jobs/([^/]+)/?", {"GET": Api.get, "DELETE": Api.cancel}),
    (r"/jobs/([^/]+)/result/?", {"GET": Api.result}),
    (r"/health/?", {"GET": Api.health}),
    (r"/runtimes/?", {"GET": Api.runtimes}),
    (r"/runtimes/([^/]+)/pause/?", {"POST": Api.pause}),
    (r"/runtimes/([^/]+)/resume/?", {"POST": Api.resume}),
))


PUBLIC = (Api.health,)              # what needs no key


@functools.lru_cache(maxsize=256)
def route(path: str) -> Tuple[Dict[str, Endpoint], Tuple[str, ...]]:
    """({method: endpoint}, what the path says); no methods where nothing is."""
    for pattern, methods in ROUTES:
        match = pattern.fullmatch(path)
        if match:
            return methods, match.groups()
    return {}, ()


def allow(methods: Iterable[str]) -> str:
    """The value of Allow for a path with these methods."""
    return ", ".join(sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


def _options(_: Api, request: Request) -> Response:
    return Response(204, b"", headers=(("Allow", allow(route(request.path)[0])),))


# What comes in

def _members(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Malformed("a member is there twice")
    return members


def _constant(name: str) -> Any:
    raise Malformed(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_constant)
LAST_COMMA = re.compile(r",(?=\s*\}\s*\Z)")


def decode(body: bytes) -> Any:
    """The JSON value in a body: strict UTF-8, no member twice, no NaN; raises Malformed.

    The documented example of a body has a comma before its last brace, so that one is let through.
    """
    try:
        text = body.decode("utf-8")
        try:
            return DECODER.decode(text)
        except json.JSONDecodeError:
            without = LAST_COMMA.sub("", text)
            if without == text:
                raise
            return DECODER.decode(without)
    except UnicodeDecodeError as error:
        raise Malformed(f"body: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"body: not JSON: {error}") from None
    except RecursionError:
        raise Malformed("body: nested too deeply") from None
    except Malformed:
        raise
    except ValueError:              # a number of more digits than Python reads
        raise Malformed("body: a number is too long") from None


def job_id(number: str) -> int:
    """The id in a path, in its one spelling; raises UnknownJob for 07, ٣ and 2**63, as for an id never given out."""
    if not re.fullmatch("[1-9][0-9]{0,18}", number) or int(number) >= 2 ** 63:
        raise UnknownJob(number)
    return int(number)


def parameters(query: str, allowed: Sequence[str]) -> Dict[str, str]:
    """The parameters of a query string; raises Malformed for one that is not allowed, or there twice."""
    found: Dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name not in allowed or name in found:
            raise Malformed(f"unknown or repeated parameter {json.dumps(name[:40])}: allowed, once each, are "
                            f"{', '.join(allowed)}")
        found[name] = re.sub("%20|[+]", " ", value)
    return found


def _number(query: Dict[str, str], name: str, least: int, most: int) -> Optional[int]:
    value = query.get(name)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,19}", value) or not least <= int(value) <= most:
        raise Malformed(f"{name}: expected a whole number from {least} to {most}, found {json.dumps(value[:40])}")
    return int(value)


def _choice(query: Dict[str, str], name: str, allowed: Sequence[str]) -> Optional[str]:
    value = query.get(name)
    if value is not None and value not in allowed:
        raise Malformed(f"{name}: expected {' or '.join(allowed)}, found {json.dumps(value[:40])}")
    return value


# What goes out

def failure(error: Exception, request: Request) -> Response:
    """The answer to a request that led to this error."""
    problem = error if isinstance(error, Problem) else None
    if isinstance(error, UnknownJob):       # documented so: on error a 0 is returned
        return Response(404, b"0\n")
    if isinstance(error, Malformed):
        problem = Problem(400, str(error))
    elif isinstance(error, Ended):
        problem = Problem(409, str(error))
    elif isinstance(error, StoreError):
        problem = Problem(507 if isinstance(error, DiskFull) else 503, str(error), ("Retry-After", "10"))
    elif problem is None:
        log.error("%s %r", request.method, request.path, exc_info=error)
        problem = Problem(500, "a defect of the server; its log has it")
    return problem_response(problem)


def problem_response(problem: Problem) -> Response:
    """A problem as RFC 9457 has it."""
    body = {"type": "about:blank", "title": PHRASES[problem.status], "status": problem.status, "detail": problem.detail}
    return Response(problem.status, json.dumps(body).encode() + b"\n", "application/problem+json", problem.headers)


def job_line(job: Sequence[Any]) -> str:
    """A job as a JSON object in a line. Written out: json.dumps takes four times as long, and a listing of a million
    jobs is made of nothing else. Only runtime_error can hold what JSON has to escape."""
    number, text, mode, status, runtime, code, error, created, start, end = job
    return (f'{{"id": {number}, "job": "{text}", "mode": "{mode}", "status": "{status}", '
            f'"runtime": {"null" if runtime is None else _quote(runtime)}, '
            f'"return_code": {"null" if code is None else code}, '
            f'"runtime_error": {"null" if error is None else json.dumps(error)}, "created_time": "{created}", '
            f'"start_time": {"null" if start is None else _quote(start)}, '
            f'"end_time": {"null" if end is None else _quote(end)}}}')


def _quote(text: str) -> str:
    return f'"{text}"'


def job_json(job: Job) -> bytes:
    """A job as the body of an answer."""
    return job_line(job).encode() + b"\n"


def pages(select: Callable[[Optional[int], int], List[Job]], after: Optional[int]) -> Iterator[List[Job]]:
    """All that `select(after, limit)` gives, a page at a time. The first is read at once, so that a database that
    cannot be read is found before the answer begins."""
    first = select(after, PAGE)

    def rest() -> Iterator[List[Job]]:
        page = first
        while page:
            yield page
            page = select(page[-1][0], PAGE) if len(page) == PAGE else []
    return rest()


def array(chunks: Iterable[Sequence[Any]], line: Callable[[Any], str] = job_line) -> Iterator[bytes]:
    """A JSON array with one element a line, in pieces."""
    begin = "["
    for chunk in chunks:
        if chunk:
            yield (begin + "\n" + ",\n".join(map(line, chunk))).encode()
            begin = ","
    yield b"[]\n" if begin == "[" else b"\n]\n"
