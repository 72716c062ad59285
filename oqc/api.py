"""The endpoints as functions from a request to a response: routes, keys, paging, waiting.

No sockets and no SQL. What can go wrong is raised as what it is, and becomes an answer in one place, `Api.handle`.
"""
import base64
import contextlib
import functools
import hashlib
import json
import pkgutil
import re
import threading
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

from oqc import __version__, bloch, jobs
from oqc.jobs import Addition, IdempotencyKey, Job, Malformed, StoreError, Submission, UnknownJob
from oqc.messages import (
    PLAIN, Problem, Request, Response, array, choice, decode, failure, job_id, job_json, json_response, number,
    parameters, problem_response, text_response, wants_text)
from oqc.text import job_rows, metrics_text, result_text, table, whole_lines

PAGE = 1000                         # rows read at once for a listing: what bounds its memory
MOST_LIMIT = 10_000
HEAVY = 4                           # reads of many rows at once: more only keep each other, and all others, waiting
MOST_JOBS = 10_000                  # in one array
QUICK_BODY = 1 << 13                # bytes of a body that costs other clients no time
MOST_WAIT = 300                     # seconds
KEY_HEADERS = ("api_key", "x-api-key")
NO_KEY = ("send the key in the header api_key, or X-API-Key, or as Authorization: Bearer; "
          "nginx drops api_key unless it is set to underscores_in_headers on")


def _data(name: str) -> bytes:
    """A file that lies beside this one, also inside the .pyz; read at start, since that may be replaced."""
    found = pkgutil.get_data("oqc", name)
    assert found is not None
    return found


def _policy(page: bytes) -> str:
    """The Content-Security-Policy that lets the browser run the script and the style that stand in the page, and
    speak to this server, and nothing else (CSP level 3, section 2.3.1 has the hashes)."""
    hashes = {name: base64.b64encode(hashlib.sha256(page.split(b"<%b>" % name)[1].split(b"</%b>" % name)[0]).digest())
              for name in (b"script", b"style")}
    return (f"default-src 'none'; script-src 'sha256-{hashes[b'script'].decode()}'; style-src "
            f"'sha256-{hashes[b'style'].decode()}'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


CHEAT_SHEET, OPENAPI, PAGE_BODY = _data("cheatsheet.txt").decode(), _data("openapi.json"), _data("page.html")
PAGE_HEADERS = (("Content-Security-Policy", _policy(PAGE_BODY)), ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache"), ("Vary", "Accept"))


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
        self._heavy = threading.BoundedSemaphore(HEAVY)
        self._coming, self._counting = 0, threading.Lock()      # jobs that are being stored and will wait then

    def refuse(self, request: Request) -> Optional[Response]:
        """What can be refused before the body is read: no such path or method, no key; or None."""
        try:
            self._endpoint(request)
            return None
        except Problem as problem:
            return problem_response(problem)

    def is_quick(self, request: Request) -> bool:
        """Whether `handle` returns soon enough for the thread that reads all connections; an array may not."""
        endpoint = route(request.path)[0].get(request.method)
        return (endpoint in (Api.add, Api.get) and not request.query and len(request.body) <= QUICK_BODY
                and not request.body.startswith(b"["))

    def handle(self, request: Request, answer: Callable[[Response], None]) -> None:
        """Have `answer` called once with the answer to a request, now or, from another thread, when the store has it.
        Whatever goes wrong becomes an answer, too."""
        try:
            endpoint, arguments, name = self._endpoint(request)
            made = endpoint(self, Request(*request[:-1], name), *arguments)
        except Exception as error:      # pylint: disable=broad-exception-caught # `failure` logs a surprise
            made = failure(error, request)
        if isinstance(made, Response):
            answer(made)
        else:
            made(lambda response: answer(response if isinstance(response, Response) else failure(response, request)))

    def flush(self) -> None:
        """Write what requests wait for; called when no other is there to be handled at once."""
        self.store.flush()

    def _endpoint(self, request: Request) -> Tuple[Endpoint, Tuple[str, ...], str]:
        """(function, what its path says, name of the key); raises Problem."""
        methods, arguments = route(request.path)
        if not methods and request.path != "*":         # OPTIONS * asks about the server itself
            raise Problem(404, f"nothing is at {json.dumps(request.path[:80])}; GET / shows what is there")
        endpoint = methods.get("GET" if request.method == "HEAD" else request.method)
        if request.method == "OPTIONS" and not endpoint:
            return _options, (), ""
        if not endpoint:
            allowed = allow(methods)
            raise Problem(405, f"{request.method} is not for this path; allowed: {allowed}; GET / shows what is there",
                          ("Allow", allowed))
        name = self.keys.name(request.headers) or ""
        if not name and endpoint not in PUBLIC:
            wrong = any(header in request.headers for header in (*KEY_HEADERS, "authorization"))
            raise Problem(401, "this key is not known; " * wrong + NO_KEY, ("WWW-Authenticate", 'Bearer realm="oqc"'))
        return endpoint, arguments, name

    # Jobs

    def add(self, request: Request) -> Union[Response, Later]:
        """POST /jobs/add/: store a job, or all of an array or none, and have them run; 201 when they are on disk.
        `?wait=` seconds for their end."""
        seconds = number(parameters(request.query, ("wait",)), "wait", 0, MOST_WAIT)
        value = decode(request.body)
        many = isinstance(value, list)
        submissions = self._submissions(value if many else [value], many)
        key = self._idempotency_key(request)
        if self.workers.draining.is_set():
            raise Problem(503, "the server is stopping; send the job again when it is back", ("Retry-After", "10"))
        coming = len([one for one in submissions if one.mode != "echo"])
        with self._counting:
            if self.workers.waiting() + self._coming + len(submissions) > self.most_waiting:
                raise Problem(503, f"{self.most_waiting} jobs wait already (--max-waiting); try again later",
                              ("Retry-After", "10"))
            self._coming += coming

        def stored(added: Optional[Addition]) -> None:
            if added:
                self.workers.take_up(added)
            with self._counting:
                self._coming -= coming

        def response(added: Addition, wait: float = 0) -> Response:
            found, headers = added.jobs, ()
            if wait:
                with contextlib.suppress(UnknownJob, StoreError):   # whatever became of them since: they were added
                    found, headers = self._ended(added.jobs, wait)
            headers += (("Idempotent-Replayed", "true"),) if added.replayed else ()
            if many:
                return Response(201, b"".join(array([found])), headers=headers)
            return Response(201, job_json(found[0]), headers=(("Location", f"/jobs/{found[0].id}/"), *headers))

        if not self.is_quick(request):          # in a thread of its own, which may wait
            added = None
            try:
                added = self.store.add(submissions, request.key_name, key, self.workers.foregone)
            finally:
                stored(added)
            return response(added, seconds or 0)

        def later(answer: Callable[[Union[Response, Exception]], None]) -> None:
            def then(added: Optional[Addition], error: Optional[Exception]) -> None:
                stored(added)
                answer(response(added) if added else error)
            self.store.add_soon(submissions, request.key_name, key, then, self.workers.foregone)
        return later

    def _submissions(self, values: List[Any], many: bool) -> List[Submission]:
        """The checked submissions, each with a seed; raises Malformed, which names the index in an array."""
        if not 1 <= len(values) <= MOST_JOBS:
            raise Malformed(f"expected an array of 1 to {MOST_JOBS} jobs, found {len(values)}")
        found = []
        for index, value in enumerate(values):
            try:
                submission = jobs.parse(value)
            except Malformed as error:
                raise (Malformed(f"[{index}]: {error}") if many else error) from None
            found.append(submission if submission.seed is not None else submission._replace(seed=self.choose_seed()))
        return found

    @staticmethod
    def _idempotency_key(request: Request) -> Optional[IdempotencyKey]:
        """The request's Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), with or without its quotes."""
        text = request.headers.get("idempotency-key")
        if text is None:
            return None
        match = re.fullmatch(rb'"?([\x21\x23-\x7e]{1,255})"?', text)
        if not match:
            raise Malformed("Idempotency-Key: expected 1 to 255 printable characters without spaces")
        return IdempotencyKey(match[1].decode(), hashlib.sha256(request.body).hexdigest())

    def list(self, request: Request) -> Response:
        """GET /jobs/list/: all jobs, one a line, streamed; or a page of them."""
        query = parameters(request.query, ("limit", "after", "order", "status", "mode"))
        after = number(query, "after", 0, 2 ** 63 - 1)
        limit = number(query, "limit", 1, MOST_LIMIT)
        order = choice(query, "order", ("asc", "desc")) or "asc"
        equal = {"status": choice(query, "status", jobs.STATUSES), "mode": choice(query, "mode", jobs.MODES)}

        def select(after: Optional[int], most: int) -> List[Job]:
            with self._heavy:
                return self.store.page(after, most, order == "desc", **equal)   # type: ignore[no-any-return]

        page = select(after, limit or PAGE)     # now, so that a database that cannot be read is found before the answer
        chunks, headers = iter([page]), ()
        if limit is None:
            chunks = pages(select, page)
        elif may_go_on(page, limit) and select(page[-1][0], 1):
            kept = "".join(f"&{name}={value.replace(' ', '%20')}" for name, value in query.items() if name != "after")
            headers = (("Link", f'</jobs/list/?after={page[-1][0]}{kept}>; rel="next"'),)
        text = wants_text(request)
        pieces = job_rows(chunks) if text else array(chunks)
        body: Union[bytes, Iterator[bytes]] = pieces if limit is None else b"".join(pieces)
        return Response(200, body, PLAIN if text else "application/json", headers)

    def get(self, request: Request, name: str) -> Response:
        """GET /jobs/{id}/: the job, or 404 and a 0 (documented so). `?wait=` seconds for its end."""
        job, headers = self._job(request, name)
        if wants_text(request):
            return Response(200, b"".join(job_rows([[job]])), PLAIN, headers)
        return Response(200, job_json(job), headers=headers)

    def result(self, request: Request, name: str) -> Response:
        """GET /jobs/{id}/result/: what the runtime put out, as JSON where it is that, else as text."""
        job, headers = self._job(request, name)
        if job.end_time is None:
            raise Problem(409, f"job {job.id} has not ended yet: {job.status}", *headers)
        result, is_json = self.store.result(job.id)
        if is_json and not wants_text(request):
            return Response(200, result.encode() + b"\n")
        return text_response(result_text(result) if is_json else whole_lines(result))

    def picture(self, _: Request, name: str) -> Response:
        """GET /jobs/{id}/bloch.svg: the path of a simulation on the Bloch sphere."""
        job = self.store.get(job_id(name))
        if job.mode != "simulation":
            raise Problem(409, f"job {job.id} has the mode {job.mode}; only a simulation has a path that is known")
        return Response(200, bloch.picture(f"Job {job.id} on the Bloch sphere", job.job).encode(), "image/svg+xml",
                        (("Content-Security-Policy", "default-src 'none'"), ("X-Content-Type-Options", "nosniff")))

    def _job(self, request: Request, name: str) -> Tuple[Job, Tuple[Tuple[str, str], ...]]:
        """The job of this path, after the wait that the query asks for; raises UnknownJob, Malformed."""
        known = job_id(name)
        seconds = number(parameters(request.query, ("wait",)), "wait", 0, MOST_WAIT)
        job: Job = self.store.get(known)
        if not seconds or job.end_time is not None:
            return job, ()
        found, headers = self._ended([job], seconds)
        return found[0], headers

    def _ended(self, waited_for: List[Job], seconds: float) -> Tuple[List[Job], Tuple[Tuple[str, str], ...]]:
        """These jobs as soon as all have ended, or as they are after so many seconds; and as they are now, with a
        Retry-After, when the server has no room for another request that waits."""
        found = self.workers.wait([job.id for job in waited_for], seconds)
        return (found, ()) if found else (waited_for, (("Retry-After", "1"),))

    def cancel(self, _: Request, name: str) -> Response:
        """DELETE /jobs/{id}/: end a job that has not ended; answers when it has."""
        return Response(200, job_json(self.workers.cancel(job_id(name))))

    def prune(self, request: Request) -> Response:
        """DELETE /jobs/list/?older-than=90d: forget the jobs that ended longer ago; {"deleted": how many}."""
        age = parameters(request.query, ("older-than",)).get("older-than", "")
        match = re.fullmatch("([0-9]{1,6})([dhms])", age)
        if not match:
            raise Malformed("older-than: expected a time such as 90d, 12h, 30m or 0s")
        seconds = int(match[1]) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[match[2]]
        return json_response({"deleted": self.store.prune(seconds)})

    # The server

    def root(self, request: Request) -> Response:
        """GET /: what can be asked for, with the address that was asked; for a browser the page."""
        if re.match(rb"\s*text/html\b", request.headers.get("accept", b"")):
            return Response(200, PAGE_BODY, "text/html; charset=utf-8", PAGE_HEADERS)
        host = request.headers.get("host", b"localhost:12021").decode()
        return text_response(CHEAT_SHEET.replace("HOST", host))

    def openapi(self, _: Request) -> Response:
        """GET /openapi.json: this API as OpenAPI 3.1 describes it."""
        return Response(200, OPENAPI)

    def status(self, request: Request) -> Response:
        """GET /status/: how much waits, runs and has ended, of one moment. `?wait=` seconds for a change, counted from
        that which a status before had: `?since=`."""
        query = parameters(request.query, ("wait", "since"))
        since = number(query, "since", 0, 2 ** 63 - 1)
        self.workers.wait_for_change(self.workers.changes if since is None else since,
                                     number(query, "wait", 0, MOST_WAIT) or 0)
        change = self.workers.changes           # before the store is read: nothing after it goes unnoticed
        with self._heavy:
            stored = self.store.status()
        paused = [name for name in self.workers.runtimes if self.workers.describe(name)["state"] == "paused"]
        found = {**stored, "paused": paused, "version": __version__, "uptime": self.workers.uptime(), "change": change}
        if wants_text(request):
            return text_response(table([(name, json.dumps(value)) for name, value in found.items()], ("WHAT", "VALUE")))
        return json_response(found)

    def metrics(self, _: Request) -> Response:
        """GET /metrics/: the same and the durations of jobs, for Prometheus."""
        with self._heavy:
            stored = self.store.status()
        text = metrics_text(jobs.BUCKETS, stored, self.workers.durations(), self.workers.states())
        return Response(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def health(self, _: Request) -> Response:
        """GET /health/: whether the server can take jobs and run them; or 503 with the reasons. Needs no key."""
        states, unusable = self.workers.states(), self.store.unusable()
        reasons = [unusable] if unusable else []
        reasons += ["the server is stopping"] if self.workers.draining.is_set() else []
        reasons += [f"no runtime for {mode} can be started" for mode in jobs.MODES
                    if all(state == "failing" for known, state in states if known == mode)]
        body = {"status": "failing", "reasons": reasons} if reasons else {"status": "ok"}
        return json_response(body, 503 if reasons else 200)

    # Runtimes

    def runtimes(self, request: Request) -> Response:
        """GET /runtimes/: every runtime and how it fares."""
        found = [self.workers.describe(name) for name in self.workers.runtimes]
        if wants_text(request):
            rows = [[", ".join(map(str, value)) if isinstance(value, list) else value for value in one.values()]
                    for one in found]
            return text_response(table(rows, [name.upper() for name in found[0]]))
        return Response(200, b"".join(array([found], json.dumps)))

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
            return json_response(change(*arguments))
        except KeyError:
            raise Problem(404, "no runtime has this name; GET /runtimes/ lists them") from None


ROUTES = tuple((re.compile(path), methods) for path, methods in (
    (r"/jobs/add/?", {"POST": Api.add}),
    (r"/jobs/list/?", {"GET": Api.list, "DELETE": Api.prune}),
    (r"/jobs/([^/]+)/?", {"GET": Api.get, "DELETE": Api.cancel}),
    (r"/jobs/([^/]+)/result/?", {"GET": Api.result}),
    (r"/jobs/([^/]+)/bloch\.svg", {"GET": Api.picture}),
    (r"/", {"GET": Api.root}),
    (r"/openapi\.json", {"GET": Api.openapi}),
    (r"/health/?", {"GET": Api.health}),
    (r"/status/?", {"GET": Api.status}),
    (r"/metrics/?", {"GET": Api.metrics}),
    (r"/runtimes/?", {"GET": Api.runtimes}),
    (r"/runtimes/([^/]+)/pause/?", {"POST": Api.pause}),
    (r"/runtimes/([^/]+)/resume/?", {"POST": Api.resume}),
))
PUBLIC = (Api.root, Api.openapi, Api.health)    # what needs no key


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


def pages(select: Callable[[Optional[int], int], List[Job]], page: List[Job]) -> Iterator[List[Job]]:
    """A page of jobs and all that follow it, of what `select(after, limit)` gives."""
    while page:
        yield page
        page = select(page[-1][0], PAGE) if may_go_on(page, PAGE) else []


def may_go_on(page: List[Job], most: int) -> bool:
    """Whether jobs may follow on a page of up to so many: it is full, or was cut because they are long."""
    return len(page) == most or sum(len(job[1]) for job in page) > jobs.PAGE_BYTES
