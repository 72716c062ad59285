"""Requests and responses: parameters, JSON, problem details. No sockets, no SQL."""
import json
import logging
import re
from typing import (
    Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union)

from oqc.jobs import (
    DamagedRow, DiskFull, Ended, Job, KeyReused, Malformed, StoreError, UnknownJob, refuse_constant,
    whole_number)

log = logging.getLogger("oqc")

PHRASES = {
    200: "OK",
    201: "Created",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}
JSON = "application/json"
PLAIN = "text/plain; charset=utf-8"


class Problem(Exception):
    """A request that is answered with a problem detail (RFC 9457)."""

    def __init__(self, status: int, detail: str, *headers: Tuple[str, str]) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def _stays() -> bool:
    """Say of a client that it has not left."""
    return False


class Request(NamedTuple):
    """An HTTP request, parsed. Header names are in lower case, values are bytes."""

    method: str
    path: str
    query: str
    headers: Dict[str, bytes]
    body: bytes = b""
    key_name: str = ""              # of the key that it came with; empty where none is needed
    role: str = ""                  # of that key
    has_left: Callable[[], bool] = _stays       # whether its client has, for who makes it wait


class Response(NamedTuple):
    """An HTTP response. A body that is not bytes is sent piece by piece."""

    status: int
    body: Union[bytes, Iterable[bytes]]
    content_type: str = JSON
    headers: Tuple[Tuple[str, str], ...] = ()


# Requests

def _members(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """Return the members of a JSON object; raise Malformed if one is there twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Malformed("a member is there twice")
    return members


DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=refuse_constant)
LAST_COMMA = re.compile(r",(?=\s*\}\s*\Z)")


def decode(body: bytes) -> Any:
    """Return the JSON value in a body; raise Malformed.

    JSON is strict here: UTF-8, no member twice, no NaN. But the documented example of a body has a
    comma before its last brace, so that one is accepted.
    """
    if not body.strip():
        raise Malformed("body: empty; expected a job such as "
                        '{"job": "X(90)", "mode": "simulation"}')
    try:
        text = body.decode("utf-8")
        try:
            return DECODER.decode(text)
        except json.JSONDecodeError:
            without_comma = LAST_COMMA.sub("", text)
            if without_comma == text:
                raise
            return DECODER.decode(without_comma)
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


JOB_ID = re.compile("[1-9][0-9]{0,18}")


def job_id(name: str) -> int:
    """Return the id in a path; raise UnknownJob unless it is an id in its one spelling.

    07, ٣ and 2**63 are answered as an id is that was never given out.
    """
    if not JOB_ID.fullmatch(name) or int(name) >= 2 ** 63:
        raise UnknownJob(name)
    return int(name)


def parameters(query: str, allowed: Sequence[str]) -> Dict[str, str]:
    """Return the parameters of a query string; raise Malformed if one is unknown or repeated."""
    values: Dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name not in allowed or name in values:
            known = f"allowed, once each, are {', '.join(allowed)}" if allowed else "none is known"
            raise Malformed(f"unknown or repeated parameter {json.dumps(name[:40])}: {known}")
        # Neither is part of anything else that is allowed.
        values[name] = re.sub("%20|[+]", " ", value).replace("%3A", ":")
    return values


def found(value: str) -> str:
    """Return a value as an error message shows it."""
    return json.dumps(value[:40])


def number(query: Dict[str, str], name: str, least: int, most: int) -> Optional[int]:
    """Return the whole number in a parameter, None without it; raise Malformed."""
    value = query.get(name)
    if value is None:
        return None
    try:
        return whole_number(value, least, most)
    except ValueError as error:
        raise Malformed(f"{name}: {error}, found {found(value)}") from None


def choice(query: Dict[str, str], name: str, allowed: Sequence[str]) -> Optional[str]:
    """Return the word in a parameter, None without it; raise Malformed."""
    value = query.get(name)
    if value is not None and value not in allowed:
        raise Malformed(f"{name}: expected {' or '.join(allowed)}, found {found(value)}")
    return value


MEDIA_TYPE = re.compile(rb"\s*([a-z-]+/[a-z-]+)", re.IGNORECASE)


def accepts_first(request: Request) -> str:
    """Return the media type that a client's Accept names first, in lower case; "" without one."""
    match = MEDIA_TYPE.match(request.headers.get("accept", b""))
    return match[1].decode().lower() if match else ""


def wants_text(request: Request) -> bool:
    """Return whether a client prefers a table to JSON: its Accept names text/plain first."""
    return accepts_first(request) == "text/plain"


# Responses

STATUSES = ((Malformed, 400), (Ended, 409), (KeyReused, 422), (DiskFull, 507), (DamagedRow, 500),
            (StoreError, 503))


def failure(error: Exception, request: Request) -> Response:
    """Return the answer to a request that led to this error; log a defect."""
    if isinstance(error, UnknownJob):       # documented so: on error a 0 is returned
        return Response(404, b"0\n")
    if isinstance(error, Problem):
        return problem_response(error)
    for kind, status in STATUSES:
        if isinstance(error, kind):
            retry = [("Retry-After", "10")] if kind in (DiskFull, StoreError) else []
            return problem_response(Problem(status, str(error), *retry))
    log.error("%s %r", request.method, request.path, exc_info=error)
    return problem_response(Problem(500, "a defect of the server; its log has it"))


def problem_response(problem: Problem) -> Response:
    """Return a problem as a response, in JSON as RFC 9457 has it."""
    body = {
        "type": "about:blank",
        "title": PHRASES[problem.status],
        "status": problem.status,
        "detail": problem.detail,
    }
    return Response(problem.status, json.dumps(body).encode() + b"\n",
                    "application/problem+json", problem.headers)


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as a response, in one line of JSON."""
    return Response(status, json.dumps(value).encode() + b"\n")


def text_response(text: str) -> Response:
    """Return a text as a response; half of a surrogate pair becomes a question mark."""
    return Response(200, text.encode("utf-8", "replace"), PLAIN)


def job_line(job: Sequence[Any]) -> str:
    """Return a job as a JSON object in one line.

    Written out because json.dumps takes four times as long, and a listing of a million jobs is made
    of nothing else. Only runtime_error can hold what JSON has to escape.
    """
    number, text, mode, status, runtime, code, error, created, start, end = job
    return (
        f'{{"id": {number}, "job": "{text}", "mode": "{mode}", "status": "{status}", '
        f'"runtime": {_quoted(runtime)}, '
        f'"return_code": {"null" if code is None else code}, '
        f'"runtime_error": {"null" if error is None else json.dumps(error)}, '
        f'"created_time": "{created}", '
        f'"start_time": {_quoted(start)}, "end_time": {_quoted(end)}}}')


def _quoted(text: Optional[str]) -> str:
    return "null" if text is None else f'"{text}"'


def job_json(job: Job) -> bytes:
    """Return a job as the body of a response."""
    return job_line(job).encode() + b"\n"


def array(chunks: Iterable[Sequence[Any]],
          line: Callable[[Any], str] = job_line) -> Iterator[bytes]:
    """Yield a JSON array with one element a line, a piece for each chunk of elements."""
    before = "["
    for chunk in chunks:
        if chunk:
            yield (before + "\n" + ",\n".join(map(line, chunk))).encode()
            before = ","
    yield b"[]\n" if before == "[" else b"\n]\n"


def json_lines(chunks: Iterable[Sequence[Any]], line: Callable[[Any], str]) -> Iterator[bytes]:
    """Yield elements as JSON, one a line, a piece for each chunk of them."""
    for chunk in chunks:
        yield "".join(line(element) + "\n" for element in chunk).encode()
