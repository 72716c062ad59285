"""The numbers of a result: counts, P(1), its error, what a perfect qubit gives; and the record of a
job that has them, as JSON."""
import json
import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

from oqc import qubit
from oqc.jobs import Record, Stored

MOST_IDEAL = 1 << 16                # characters of a job string for which the ideal is worked out
MOST_PARSED = 1 << 16               # characters of a result in which numbers are looked for
RECORD = Record._fields
LINE_ENDS = {ord("\n"): " ", ord("\r"): " ", 0x85: "\\u0085", 0x2028: "\\u2028",
             0x2029: "\\u2029"}


class Numbers(NamedTuple):
    """What was counted, and the probability of reading 1; None where there is none."""

    count_0: Optional[int] = None
    count_1: Optional[int] = None
    p1: Optional[float] = None      # counted ones over shots, else what the runtime states
    p1_error: Optional[float] = None        # only of what was counted


NONE = Numbers()


def numbers(result: str) -> Numbers:
    """Return the numbers in a result, which is JSON; none of them in one that has no counts and no
    probabilities, and in a very long one. Raise ValueError or RecursionError if it cannot be
    read."""
    if len(result) > MOST_PARSED:
        return NONE
    value = json.loads(result)
    if not isinstance(value, dict):
        return NONE
    counts = value.get("counts")
    if isinstance(counts, dict) and all(map(_is_count, counts.values())):
        zeros = counts.get("0", 0)
        ones = counts.get("1", 0)
        if zeros + ones:
            shots = sum(counts.values())        # a device may read more than 0 and 1
            return Numbers(zeros, ones, ones / shots, standard_error(ones, shots))
    return Numbers(p1=_stated(value.get("probabilities")))


def standard_error(ones: int, shots: int) -> float:
    """Return the standard deviation of P(1) after so many ones in so many shots.

    It is that of the posterior under a uniform prior, Beta(k + 1, n - k + 1), and so never 0, which
    would break a fit (Gelman et al., Bayesian Data Analysis, third edition, section 2.4).
    """
    mean = (ones + 1) / (shots + 2)
    return math.sqrt(mean * (1 - mean) / (shots + 3))


def ideal(job: str) -> Optional[float]:
    """Return P(1) of a perfect qubit after the pulses of a job; None for a very long one, and for
    one that is damaged."""
    if len(job) > MOST_IDEAL:
        return None
    try:
        _, b = qubit.amplitudes(job)
    except (ValueError, LookupError):
        return None
    return round(b.real * b.real + b.imag * b.imag, qubit.DECIMALS)


def _is_count(value: Any) -> bool:
    """Return whether it is a number of shots. True is none, and a float can hold none beyond."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2 ** 53


def _stated(probabilities: Any) -> Optional[float]:
    """Return the probability of reading 1 that a runtime states, or None."""
    if not isinstance(probabilities, list) or len(probabilities) != 2:
        return None
    p1 = probabilities[1]
    if isinstance(p1, bool) or not isinstance(p1, (int, float)) or not 0 <= p1 <= 1:
        return None
    return float(p1)


def record(row: Sequence[Any], cut: Optional[int] = None) -> List[Any]:
    """Return the members of RECORD of a row of Stored's members. `note` and `result` are JSON texts
    in one line, None for none; with `cut` the job string has at most so many characters, and a
    result in which no numbers are looked for is left out."""
    job = Stored._make(row)
    result = job.result
    note = job.note
    found = NONE
    if result is not None:
        result, found = _read(result, job.is_json)
        if cut is not None and len(result) > MOST_PARSED:
            result = None
    if note is not None:
        note = _in_one_line(note)
    return [job.id, job.job[:cut], job.mode, job.status, job.return_code, job.runtime_error,
            job.runtime, job.submitter, job.tag, note, job.created_time, job.start_time,
            job.end_time, job.shots, *found, ideal(job.job), result]


def _read(result: Union[str, bytes], is_json: bool) -> Tuple[str, Numbers]:
    """Return (a result as JSON in one line, the numbers in it); a text as a string, with U+FFFD for
    what is no UTF-8."""
    if isinstance(result, bytes):
        result = result.decode("utf-8", "replace")
    if is_json:
        try:
            return _in_one_line(result), numbers(result)
        except (ValueError, RecursionError):
            pass        # damaged, a number of too many digits, or nested too deeply for a reader
    return json.dumps(result), NONE


def _in_one_line(text: str) -> str:
    """Return JSON without the characters at which programs end a line. A line feed in it stands
    between two parts, the others within a string (RFC 8259, sections 2 and 7)."""
    if text.isascii() and "\n" not in text and "\r" not in text:
        return text
    return text.translate(LINE_ENDS)


QUOTED = tuple(RECORD.index(name) for name in (
    "job", "mode", "status", "runtime", "submitter", "tag", "created_time", "start_time",
    "end_time"))                    # texts in which nothing has to be escaped
ERROR_PLACE = RECORD.index("runtime_error")
TEMPLATE = "{" + ", ".join(f'"{name}": %s' for name in RECORD) + "}"


def record_json(values: Sequence[Any]) -> str:
    """Return a record as a JSON object in one line; what is JSON is copied as it is.

    json.dumps for the whole of a record would take four times as long.
    """
    texts = list(values)
    for place in QUOTED:
        if texts[place] is not None:
            texts[place] = f'"{texts[place]}"'
    if texts[ERROR_PLACE] is not None:
        texts[ERROR_PLACE] = json.dumps(texts[ERROR_PLACE])
    return TEMPLATE % tuple("null" if text is None else text for text in texts)
