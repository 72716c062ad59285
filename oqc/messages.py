"""What comes in and what goes out: requests, responses, problem details, JSON and plain tables. No sockets, no SQL."""
import json
import logging
import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from oqc.jobs import DiskFull, Ended, Job, KeyReused, Malformed, StoreError, UnknownJob, refuse_constant

log = logging.getLogger("oqc")

PHRASES = {
    200: "OK", 201: "Created", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 414: "URI Too Long", 417: "Expectation Failed", 422: "Unprocessable Content",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable", 505: "HTTP Version Not Supported", 507: "Insufficient Storage",
}


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


# What comes in

def _members(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """The members of a JSON object; raises Malformed for one that is there twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Malformed("a member is there twice")
    return members


DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=refuse_constant)
LAST_COMMA = re.compile(r",(?=\s*\}\s*\Z)")


def decode(body: bytes) -> Any:
    """The JSON value in a body: strict UTF-8, no member twice, no NaN; raises Malformed.

    The documented example of a body has a comma before its last brace, so that one is let through.
    """
    if not body.strip():
        raise Malformed('body: empty; expected a job such as {"job": "X(90)", "mode": "simulation"}')
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


JOB_ID = re.compile("[1-9][0-9]{0,18}")


def job_id(name: str) -> int:
    """The id in a path, in its one spelling; raises UnknownJob for 07, ٣ and 2**63, as for an id never given out."""
    if not JOB_ID.fullmatch(name) or int(name) >= 2 ** 63:
        raise UnknownJob(name)
    return int(name)


def parameters(query: str, allowed: Sequence[str]) -> Dict[str, str]:
    """The parameters of a query string; raises Malformed for one that is not allowed, or there twice."""
    found: Dict[str, str] = {}
    for part in filter(None, query.split("&")) if query else ():
        name, _, value = part.partition("=")
        if name not in allowed or name in found:
            raise Malformed(f"unknown or repeated parameter {json.dumps(name[:40])}: allowed, once each, are "
                            f"{', '.join(allowed)}")
        found[name] = re.sub("%20|[+]", " ", value)
    return found


def number(query: Dict[str, str], name: str, least: int, most: int) -> Optional[int]:
    """The whole number in a parameter, None without it; raises Malformed."""
    value = query.get(name)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,19}", value) or not least <= int(value) <= most:
        raise Malformed(f"{name}: expected a whole number from {least} to {most}, found {json.dumps(value[:40])}")
    return int(value)


def choice(query: Dict[str, str], name: str, allowed: Sequence[str]) -> Optional[str]:
    """The word in a parameter, None without it; raises Malformed."""
    value = query.get(name)
    if value is not None and value not in allowed:
        raise Malformed(f"{name}: expected {' or '.join(allowed)}, found {json.dumps(value[:40])}")
    return value


# What goes out

STATUSES = ((Malformed, 400), (Ended, 409), (KeyReused, 422), (DiskFull, 507), (StoreError, 503))


def failure(error: Exception, request: Request) -> Response:
    """The answer to a request that led to this error."""
    if isinstance(error, UnknownJob):       # documented so: on error a 0 is returned
        return Response(404, b"0\n")
    if isinstance(error, Problem):
        return problem_response(error)
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    if status == 500:
        log.error("%s %r", request.method, request.path, exc_info=error)
        return problem_response(Problem(500, "a defect of the server; its log has it"))
    return problem_response(Problem(status, str(error), *([("Retry-After", "10")] if status in (503, 507) else [])))


def problem_response(problem: Problem) -> Response:
    """A problem as RFC 9457 has it."""
    body = {"type": "about:blank", "title": PHRASES[problem.status], "status": problem.status, "detail": problem.detail}
    return Response(problem.status, json.dumps(body).encode() + b"\n", "application/problem+json", problem.headers)


def job_line(job: Sequence[Any]) -> str:
    """A job as a JSON object in a line. Written out: json.dumps takes four times as long, and a listing of a million
    jobs is made of nothing else. Only runtime_error can hold what JSON has to escape."""
    number, text, mode, status, runtime, code, error, created, start, end = job
    return (f'{{"id": {number}, "job": "{text}", "mode": "{mode}", "status": "{status}", '
            f'"runtime": {_quote(runtime)}, "return_code": {"null" if code is None else code}, '
            f'"runtime_error": {"null" if error is None else json.dumps(error)}, "created_time": "{created}", '
            f'"start_time": {_quote(start)}, "end_time": {_quote(end)}}}')


def _quote(text: Optional[str]) -> str:
    return "null" if text is None else f'"{text}"'


def job_json(job: Job) -> bytes:
    """A job as the body of an answer."""
    return job_line(job).encode() + b"\n"


def array(chunks: Iterable[Sequence[Any]], line: Callable[[Any], str] = job_line) -> Iterator[bytes]:
    """A JSON array with one element a line, in pieces."""
    begin = "["
    for chunk in chunks:
        if chunk:
            yield (begin + "\n" + ",\n".join(map(line, chunk))).encode()
            begin = ","
    yield b"[]\n" if begin == "[" else b"\n]\n"


# Plain tables, for a terminal

JOB_ROW = "{:<8}  {:13}  {:<4}  {:10}  {:12}  {:19}  {}\n"
MOST_OF_A_JOB = 60                  # characters of a job string in a table
BAR = 20                            # characters of a bar from 0 to 1
PLAIN = "text/plain; charset=utf-8"
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")          # what a terminal obeys
WANTS_TEXT = re.compile(rb"\s*text/plain\b")


def wants_text(request: Request) -> bool:
    """Whether a client that can choose would rather have a table: its Accept names text/plain first."""
    return WANTS_TEXT.match(request.headers.get("accept", b"")) is not None


def json_response(value: Any, status: int = 200) -> Response:
    """A value as an answer, in one line."""
    return Response(status, json.dumps(value).encode() + b"\n")


def text_response(text: str) -> Response:
    """A table as an answer."""
    return Response(200, text.encode("utf-8", "replace"), PLAIN)        # half of a surrogate pair is no text


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned columns under a header row, the last one as long as it is."""
    text = [["" if cell is None else CONTROL.sub("?", str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*text)]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n" for row in text)


def job_rows(chunks: Iterable[Sequence[Sequence[Any]]]) -> Iterator[bytes]:
    """A table of jobs, in pieces: the widths of its columns are fixed, since it may be long."""
    yield JOB_ROW.format("ID", "STATUS", "CODE", "MODE", "RUNTIME", "CREATED", "JOB").encode()
    for chunk in chunks:
        yield "".join(map(_job_row, chunk)).encode()


def _job_row(job: Sequence[Any]) -> str:
    number, text, mode, status, runtime, code, _, created, start, end = job
    return JOB_ROW.format(number, "(running)" if start and not end else status, "" if code is None else code, mode,
                          runtime or "", created[:19].replace("T", " "),
                          text if len(text) <= MOST_OF_A_JOB else text[:MOST_OF_A_JOB - 4] + " ...")


def result_text(result: str) -> str:
    """A result as lines of text: of a simulation its Bloch vector, P(1) with a bar, and the counts. A runtime may put
    out anything: what only resembles a simulation is shown as it is."""
    try:
        found = json.loads(result)
        p1 = float(found["probabilities"][1])
        if not 0 <= p1 <= 1:
            raise ValueError("no probability")
        lines = [f"{axis:6} {value:9.6f}" for axis, value in zip("xyz", found.get("bloch", ()))]
        lines.append(f"P(1)   {p1:9.6f}  {'#' * round(p1 * BAR):.<{BAR}}")
        lines += [f"count{bit} {count:9d}" for bit, count in found.get("counts", {}).items()]
        return "\n".join(lines) + "\n"
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return whole_lines(result)


def whole_lines(text: str) -> str:
    """A text with a line feed at its end."""
    return text if text.endswith("\n") else text + "\n"


# Metrics

def metrics_text(buckets: Sequence[float], status: Dict[str, Any], durations: Dict[Tuple[str, str], List[float]],
                 states: Dict[Tuple[str, str], int]) -> str:
    """Prometheus's text format (version 0.0.4) of a status, of {(mode, outcome): jobs in each of the
    buckets of seconds, those over all of them, sum of seconds} and of {(mode, state): runtimes}."""
    lines = []

    def family(name: str, kind: str, meaning: str) -> None:
        lines.extend((f"# HELP oqc_{name} {meaning}", f"# TYPE oqc_{name} {kind}"))

    family("jobs", "gauge", "Jobs that have not ended, by mode and what they do.")
    for what in ("waiting", "running", "retrying"):
        lines.extend(f'oqc_jobs{{mode="{mode}",state="{what}"}} {count}' for mode, count in status[what].items())
    family("runtimes", "gauge", "Runtimes, by mode and state.")
    lines.extend(f'oqc_runtimes{{mode="{mode}",state="{state}"}} {count}' for (mode, state), count in states.items())
    family("oldest_waiting_seconds", "gauge", "Age of the oldest job that waits; 0 if none does.")
    lines.append(f"oqc_oldest_waiting_seconds {status['oldest_waiting_seconds'] or 0}")
    family("database_bytes", "gauge", "Size of the database and its WAL.")
    lines.append(f"oqc_database_bytes {status['database_bytes']}")
    family("job_duration_seconds", "histogram", "Seconds that the last attempt took, since the server began.")
    for (mode, outcome), (*counts, total) in durations.items():
        labels, below = f'mode="{mode}",outcome="{outcome}"', 0.0
        for bound, count in zip((*buckets, "+Inf"), counts):
            below += count
            lines.append(f'oqc_job_duration_seconds_bucket{{{labels},le="{bound}"}} {below:.0f}')
        lines.append(f"oqc_job_duration_seconds_sum{{{labels}}} {total:.6f}")
        lines.append(f"oqc_job_duration_seconds_count{{{labels}}} {below:.0f}")
    return "\n".join(lines) + "\n"
