"""Tables, logs and Prometheus's format: what a person or a scraper reads, as text."""
import codecs
import csv
import io
import json
import re
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from oqc import results
from oqc.jobs import Attempt, Log

JOB_ROW = "{:<8}  {:13}  {:<4}  {:10}  {:12}  {:19}  {:12}  {:16}  {:40}  {}"
MOST_OF_A_JOB = 40                  # characters of a job string in a table of jobs
MOST_OF_AN_ERROR = 200              # characters of a runtime_error there
RECORD_WIDTHS = (8, 24, 10, 13, 11, 40, 12, 12, 16, 16, 27, 27, 27, 7, 7, 7, 8, 8, 8,
                 MOST_OF_AN_ERROR)  # of the members of results.RECORD in a table
FORMULA = ("=", "+", "-", "@", "\t", "\r")      # what a formula begins with
BAR = 20                            # characters of a bar from 0 to 1
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")          # what a terminal obeys
CONTROL_IN_LINES = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")        # without tab and line feed
ESCAPES = {chr(code): f"\\x{code:02x}" for code in range(0xa0)}     # not a string each


def escaped(text: str, control: "re.Pattern[str]" = CONTROL_IN_LINES) -> str:
    """Return a text with each control character but tab and line feed as `\\x1b`."""
    return control.sub(lambda match: ESCAPES[match[0]], text)


# Tables

def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return aligned columns under a header row; the last column is as long as it is."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells]
    return "".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else escaped(str(value), CONTROL)


def job_rows(chunks: Iterable[Sequence[Sequence[Any]]]) -> Iterator[bytes]:
    """Yield a table of jobs, each with its submitter and its tag behind its members, a piece for
    each chunk of them.

    The table may be long, so that it is not read twice: the widths of its columns are fixed.
    """
    header = JOB_ROW.format(
        "ID", "STATUS", "CODE", "MODE", "RUNTIME", "CREATED (UTC)", "BY", "TAG", "JOB", "ERROR")
    yield header.encode() + b"\n"
    for chunk in chunks:
        yield "".join(map(_job_row, chunk)).encode()


def _job_row(row: Sequence[Any]) -> str:
    number, job, mode, status, runtime, code, error, created, start, end, submitter, tag = row
    if start and not end:
        status = "(running)"
    if code is None:
        code = ""
    if len(job) > MOST_OF_A_JOB:
        job = job[:MOST_OF_A_JOB - 4] + " ..."
    created = created[:19].replace("T", " ")
    error = escaped((error or "")[:MOST_OF_AN_ERROR], CONTROL)
    line = JOB_ROW.format(number, status, code, mode, runtime or "", created, submitter, tag or "",
                          job, error)
    return line.rstrip() + "\n"


# Records: jobs with their results

def records_csv(chunks: Iterable[Sequence[List[Any]]]) -> Iterator[bytes]:
    """Yield records as CSV (RFC 4180), with a header, a piece for each chunk of them. Each is one
    line, whatever a runtime put out."""
    yield _csv([results.RECORD])
    for chunk in chunks:
        yield _csv(map(_csv_cells, chunk))


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def _csv_cells(record: List[Any]) -> List[Any]:
    """Return the cells of a record. A runtime's text that a spreadsheet would run as a formula gets
    an apostrophe before it (OWASP, CSV Injection)."""
    error = record[results.ERROR_PLACE]
    if error:
        text = escaped(error, CONTROL)
        record[results.ERROR_PLACE] = "'" + text if error.startswith(FORMULA) else text
    return record


def records_text(chunks: Iterable[Sequence[List[Any]]]) -> Iterator[bytes]:
    """Yield records as a table, a piece for each chunk of them. As in a table of jobs the widths
    of its columns are fixed: what is longer is cut, and the result has as many characters as an
    error there."""
    yield _record_row(map(str.upper, results.RECORD)).encode()
    for chunk in chunks:
        yield "".join(map(_record_row, chunk)).encode("utf-8", "replace")


def _record_row(record: Iterable[Any]) -> str:
    cells = []
    for value, width in zip(record, RECORD_WIDTHS):
        if isinstance(value, float):
            value = f"{value:.6f}"
        elif isinstance(value, str):
            value = _cell(value[:width + 1])
            if len(value) > width:
                value = value[:width - 4] + " ..."
        cells.append(_cell(value).ljust(width))
    return "  ".join(cells).rstrip() + "\n"


# Results

def result_text(result: str, job: str) -> str:
    """Return a result, which is JSON, as lines of text.

    Of a simulation these are its Bloch vector, P(1) with a bar, and its counts. A runtime may put
    out anything: what only resembles a simulation is returned as it is. Behind either stands P(1)
    as it was counted, its error, and P(1) of a perfect qubit after the pulses of this job, if the
    result has a P(1) at all.
    """
    try:
        value = json.loads(result)
        found = results.numbers(result)
    except (ValueError, RecursionError):
        return whole_lines(result)
    try:
        text = _simulation_text(value)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        text = whole_lines(result)
    if found.p1 is None:
        return text
    rows = (("p1", found.p1), ("p1_error", found.p1_error), ("p1_ideal", results.ideal(job)))
    return text + "".join(f"{name:8} {number:9.6f}\n" for name, number in rows
                          if number is not None)


def _simulation_text(result: Any) -> str:
    """Return the numbers of a simulation; raise any of several errors for another result."""
    p1 = float(result["probabilities"][1])
    if not 0 <= p1 <= 1:
        raise ValueError("not a probability")
    filled = "#" * round(p1 * BAR)
    lines = [f"{axis:8} {value:9.6f}" for axis, value in zip("xyz", result.get("bloch", ()))]
    lines.append(f"P(1)     {p1:9.6f}  {filled:.<{BAR}}")
    for bit, count in result.get("counts", {}).items():
        lines.append(f"{'count' + escaped(bit, CONTROL):8} {count:9d}")
    return "\n".join(lines) + "\n"


def whole_lines(text: str) -> str:
    """Return a text with a line feed at its end."""
    return text if text.endswith("\n") else text + "\n"


# The record of a job

def details_text(details: Dict[str, Any]) -> str:
    """Return a job's details, as GET /jobs/{id}/details/ has them, as a table, and another of its
    attempts."""
    members = dict(details)
    attempts = members.pop("attempts")
    if members["note"] is not None:
        members["note"] = json.dumps(members["note"], ensure_ascii=False)
    text = table(list(members.items()), ("WHAT", "VALUE"))
    if not attempts:
        return text
    rows = [[json.dumps(value) if isinstance(value, dict) else value for value in row.values()]
            for row in attempts]
    header = [name.upper() for name in attempts[0]]
    return text + "\n" + table(rows, header)


class LogText:
    """What was said in the attempts at a job, as text: each call gives what is new."""

    def __init__(self) -> None:
        self._start_time: Optional[str] = None  # of the attempt that is shown
        self._shown = 0                 # bytes of what was said in it
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_line = False           # the text ends in the middle of a line

    def of(self, attempt: Attempt, said: Log) -> str:
        """Return what is new in this attempt's log; its heading first, if it is another one."""
        text = ""
        if attempt.start_time != self._start_time:
            self._start_time = attempt.start_time
            self._shown = 0
            if self._in_line:
                text = "\n"
            text += f"== attempt {attempt.attempt} on {attempt.runtime}, {attempt.start_time}\n"
        lost = said.dropped - self._shown
        if lost > 0:
            text += f"({lost} bytes are not kept)\n"
            self._shown = said.dropped
        new = said.text[self._shown - said.dropped:]
        self._shown += len(new)
        text += escaped(self._decoder.decode(new, final=attempt.end_time is not None))
        if text:
            self._in_line = not text.endswith("\n")
        return text


# Metrics

Durations = Dict[Tuple[str, str], List[float]]


def metrics_text(buckets: Sequence[float], status: Dict[str, Any], durations: Durations,
                 states: Dict[Tuple[str, str], int],
                 of_runtimes: Dict[Tuple[str, str, str], int]) -> str:
    """Return the metrics of a server in Prometheus's text format, version 0.0.4.

    `buckets`: the upper bounds, in seconds, of the histogram of durations.
    `status`: how much waits and runs, as the store counts it.
    `durations`: {(mode, outcome): [jobs in each bucket, jobs above them all, sum of all seconds]}.
    `states`: {(mode, state): number of runtimes}.
    `of_runtimes`: {(runtime, mode, state): number of jobs}.
    """
    jobs = [f'{{mode="{mode}",state="{state}"}} {count}'
            for state in ("waiting", "running", "retrying")
            for mode, count in status[state].items()]
    runtimes = [f'{{mode="{mode}",state="{state}"}} {count}'
                for (mode, state), count in states.items()]
    on_runtimes = [f'{{runtime="{name}",mode="{mode}",state="{state}"}} {count}'
                   for (name, mode, state), count in sorted(of_runtimes.items())]
    oldest = status["oldest_waiting_seconds"] or 0
    return "".join((
        _family(
            "jobs", "gauge",
            "Jobs that have not ended, by mode and what they do.",
            jobs),
        _family(
            "runtime_jobs", "gauge",
            "Jobs that run on a runtime, or are due and asked for it; waiting for any: no name.",
            on_runtimes),
        _family(
            "runtimes", "gauge",
            "Runtimes, by mode and state.",
            runtimes),
        _family(
            "oldest_waiting_seconds", "gauge",
            "Age of the oldest job that waits; 0 if none does.",
            [f" {oldest}"]),
        _family(
            "database_bytes", "gauge",
            "Size of the database and its WAL.",
            [f" {status['database_bytes']}"]),
        _family(
            "job_duration_seconds", "histogram",
            "Seconds that the last attempt took, since the server began.",
            _histogram(buckets, durations)),
    ))


def _family(name: str, kind: str, meaning: str, samples: Iterable[str]) -> str:
    """Return the lines of one metric. A sample is what follows its name in a line."""
    lines = [f"# HELP oqc_{name} {meaning}", f"# TYPE oqc_{name} {kind}"]
    lines += [f"oqc_{name}{sample}" for sample in samples]
    return "\n".join(lines) + "\n"


def _histogram(buckets: Sequence[float], durations: Durations) -> Iterator[str]:
    """Yield the samples of the durations; a bucket counts those below it too."""
    for (mode, outcome), (*counts, seconds) in durations.items():
        labels = f'mode="{mode}",outcome="{outcome}"'
        total = 0.0
        for bound, count in zip((*buckets, "+Inf"), counts):
            total += count
            yield f'_bucket{{{labels},le="{bound}"}} {total:.0f}'
        yield f"_sum{{{labels}}} {seconds:.6f}"
        yield f"_count{{{labels}}} {total:.0f}"
