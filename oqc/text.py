"""Tables and Prometheus's format: what a person or a scraper reads, as text."""
import json
import re
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

JOB_ROW = "{:<8}  {:13}  {:<4}  {:10}  {:12}  {:19}  {}\n"
MOST_OF_A_JOB = 60                  # characters of a job string in a table
BAR = 20                            # characters of a bar from 0 to 1
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")          # what a terminal obeys


# Tables

def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return aligned columns under a header row; the last column is as long as it is."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells]
    return "".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else CONTROL.sub("?", str(value))


def job_rows(chunks: Iterable[Sequence[Sequence[Any]]]) -> Iterator[bytes]:
    """Yield a table of jobs, a piece for each chunk of them.

    The table may be long, so that it is not read twice: the widths of its columns are fixed.
    """
    yield JOB_ROW.format("ID", "STATUS", "CODE", "MODE", "RUNTIME", "CREATED (UTC)", "JOB").encode()
    for chunk in chunks:
        yield "".join(map(_job_row, chunk)).encode()


def _job_row(row: Sequence[Any]) -> str:
    number, job, mode, status, runtime, code, _, created, start, end = row
    if start and not end:
        status = "(running)"
    if code is None:
        code = ""
    if len(job) > MOST_OF_A_JOB:
        job = job[:MOST_OF_A_JOB - 4] + " ..."
    created = created[:19].replace("T", " ")
    return JOB_ROW.format(number, status, code, mode, runtime or "", created, job)


# Results

def result_text(result: str) -> str:
    """Return a result as lines of text.

    Of a simulation these are its Bloch vector, P(1) with a bar, and its counts. A runtime may put
    out anything: what only resembles a simulation is returned as it is.
    """
    try:
        return _simulation_text(json.loads(result))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return whole_lines(result)


def _simulation_text(result: Any) -> str:
    """Return the numbers of a simulation; raise any of several errors for another result."""
    p1 = float(result["probabilities"][1])
    if not 0 <= p1 <= 1:
        raise ValueError("not a probability")
    filled = "#" * round(p1 * BAR)
    lines = [f"{axis:6} {value:9.6f}" for axis, value in zip("xyz", result.get("bloch", ()))]
    lines.append(f"P(1)   {p1:9.6f}  {filled:.<{BAR}}")
    lines += [f"count{bit} {count:9d}" for bit, count in result.get("counts", {}).items()]
    return "\n".join(lines) + "\n"


def whole_lines(text: str) -> str:
    """Return a text with a line feed at its end."""
    return text if text.endswith("\n") else text + "\n"


# Metrics

Durations = Dict[Tuple[str, str], List[float]]


def metrics_text(buckets: Sequence[float], status: Dict[str, Any], durations: Durations,
                 states: Dict[Tuple[str, str], int]) -> str:
    """Return the metrics of a server in Prometheus's text format, version 0.0.4.

    `buckets`: the upper bounds, in seconds, of the histogram of durations.
    `status`: how much waits and runs, as the store counts it.
    `durations`: {(mode, outcome): [jobs in each bucket, jobs above them all, sum of all seconds]}.
    `states`: {(mode, state): number of runtimes}.
    """
    jobs = [f'{{mode="{mode}",state="{state}"}} {count}'
            for state in ("waiting", "running", "retrying")
            for mode, count in status[state].items()]
    runtimes = [f'{{mode="{mode}",state="{state}"}} {count}'
                for (mode, state), count in states.items()]
    oldest = status["oldest_waiting_seconds"] or 0
    return "".join((
        _family(
            "jobs", "gauge",
            "Jobs that have not ended, by mode and what they do.",
            jobs),
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
