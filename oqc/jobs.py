"""The job as data: its pattern and members, who may become what, the outcome of an attempt."""
import json
import re
from typing import Any, Dict, List, NamedTuple, Union, Optional, Sequence, Tuple

MODES = ("verbatim", "simulation", "echo")
STATUSES = ("Starting", "Retrying", "Success", "Runtime Error")
STARTING, RETRYING, SUCCESS, RUNTIME_ERROR = STATUSES

# Who may become what. The spec has no "Running": a job runs while start_time is set and end_time
# is not.
TRANSITIONS = {
    (STARTING, "claimed"): STARTING,
    (STARTING, "retry"): RETRYING,
    (STARTING, "succeeded"): SUCCESS,
    (STARTING, "failed"): RUNTIME_ERROR,
    (RETRYING, "claimed"): RETRYING,
    (RETRYING, "retry"): RETRYING,
    (RETRYING, "succeeded"): SUCCESS,
    (RETRYING, "failed"): RUNTIME_ERROR,
}
OPEN = tuple(sorted({status for status, _ in TRANSITIONS}))     # what a job can still leave
STATES = ("waiting", "running", "ended")        # what a job does

# Return codes: the conventions of sysexits.h, of timeout(1) and of the shell.
DATAERR = 65                        # the runtime was given what is no job
SOFTWARE = 70                       # a defect of the server
TEMPFAIL = 75                       # busy: worth another attempt
PROTOCOL = 76                       # an answer that is none, or too long
TIMED_OUT = 124
NOT_EXECUTABLE = 126
NOT_FOUND = 127
CANCELLED = 128 + 2                 # as a program that Ctrl-C (SIGINT) ended
KILLED = 128 + 9                    # as a program that SIGKILL ended

# The documented pattern, with ASCII digits, and for fullmatch: `$` would accept a trailing newline.
PULSE = r"[XYZ]\([0-9]{1,3}\)"
PATTERN = re.compile(f"{PULSE}(?:, {PULSE})*")
SEPARATOR_PART = (re.compile(", "), '", " and a pulse such as X(90)')
PULSE_PARTS = (                     # of a pulse, in order, each with its name in an error message
    (re.compile(r"[XYZ]"), "a pulse such as X(90)"),
    (re.compile(r"\("), '"(" and an angle such as X(90)'),
    (re.compile(r"[0-9]{1,3}"), "an angle of 1 to 3 digits (whole degrees)"),
    (re.compile(r"\)"), '")" after an angle of 1 to 3 digits (whole degrees)'),
)
DEFAULT_SHOTS = 1000
MOST_SHOTS = 1_000_000
MOST_SEED = 2 ** 63 - 1
WHOLE_NUMBER = "expected a whole number from {} to {}"
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")       # of a key, a runtime, a tag
MOST_NOTE = 1024                    # bytes of JSON
MOST_PRIORITY = 100                 # and the least is its negative
DIGITS = re.compile("[0-9]{1,19}")  # ASCII digits; 19 hold 2**63 - 1

# Bounds of the histogram of durations, in seconds.
BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)
# Characters of job strings and results after which a page ends: a job may have megabytes, a page
# thousands of jobs.
PAGE_BYTES = 1 << 20


class Malformed(ValueError):
    """A request that is not valid; the text says what is wrong, where, and what is allowed."""


def refuse_constant(name: str) -> Any:
    """Raise Malformed: the `parse_constant` for json, which would accept NaN and Infinity."""
    raise Malformed(f"{name} is not JSON")


def whole_number(text: str, least: int, most: int) -> int:
    """Return the whole number in a text of ASCII digits, 19 at most.

    Raise ValueError, with the text of WHOLE_NUMBER, if it is out of bounds or there is none.
    """
    if not DIGITS.fullmatch(text) or not least <= int(text) <= most:
        raise ValueError(WHOLE_NUMBER.format(least, most))
    return int(text)


class UnknownJob(LookupError):
    """No job has this id."""


class Ended(Exception):
    """The job has ended, so that it cannot be changed any more; `job` is that job."""

    def __init__(self, job: "Job") -> None:
        super().__init__(f"job {job.id} has ended: {job.status}")
        self.job = job


class StoreError(Exception):
    """The database cannot be opened, or not be used now; the text says why and what to do."""


class Refused(Exception):
    """A write that was refused before it changed anything."""


class KeyReused(Refused):
    """An Idempotency-Key came again with another body."""


class DamagedRow(StoreError):
    """What is stored of one job cannot be read; of others it can."""


class DiskFull(StoreError):
    """The disk has no room for a write; nothing of it was written."""


class Job(NamedTuple):
    """A job as the API shows it: the ten documented members in the documented order."""

    id: int
    job: str
    mode: str
    status: str
    runtime: Optional[str]
    return_code: Optional[int]
    runtime_error: Optional[str]
    created_time: str
    start_time: Optional[str]
    end_time: Optional[str]


class Stored(NamedTuple):
    """A job with what it put out, and what else belongs with its data."""

    id: int
    job: str
    mode: str
    status: str
    runtime: Optional[str]
    return_code: Optional[int]
    runtime_error: Optional[str]
    created_time: str
    start_time: Optional[str]
    end_time: Optional[str]
    submitter: str
    tag: Optional[str]
    note: Optional[str]             # a JSON object as text
    shots: int
    result: Union[str, bytes, None]         # None if it put out nothing, bytes if no UTF-8
    is_json: bool                   # whether `result` is JSON, or else text


class Record(NamedTuple):
    """A job with its result and the numbers in it, as the API shows them together."""

    id: int
    job: str
    mode: str
    status: str
    return_code: Optional[int]
    runtime_error: Optional[str]
    runtime: Optional[str]
    submitter: str
    tag: Optional[str]
    note: Any                       # an object
    created_time: str
    start_time: Optional[str]
    end_time: Optional[str]
    shots: int                      # as they were asked for
    count_0: Optional[int]          # as the runtime counted them
    count_1: Optional[int]
    p1: Optional[float]             # counted ones over all counts, else as the runtime states it
    p1_error: Optional[float]       # None without counts
    p1_ideal: Optional[float]       # of a perfect qubit after these pulses
    result: Any                     # what the runtime put out


RESULT_PLACE = Stored._fields.index("result")


def row_size(row: Sequence[Any]) -> int:
    """Return the characters of what may be long in the members of a Job or of a Stored."""
    size = len(str(row[1]))         # a number, where a row is damaged
    if len(row) > RESULT_PLACE:
        size += len(row[RESULT_PLACE] or "")
    return size


class Submission(NamedTuple):
    """A job as a client submitted it, checked."""

    job: str
    mode: str
    shots: int = DEFAULT_SHOTS
    seed: Optional[int] = None      # None: the server chooses and stores one
    return_code: int = 0            # of an echo
    tag: Optional[str] = None       # what it belongs to, such as a sweep
    note: Optional[str] = None      # a JSON object as text: what belongs with its data
    runtime: Optional[str] = None   # only on this one
    priority: int = 0               # a higher one is started before


class Selection(NamedTuple):
    """Which jobs a request asks for: those of which all of these hold that are not None."""

    status: Optional[str] = None
    mode: Optional[str] = None
    state: Optional[str] = None     # of STATES
    runtime: Optional[str] = None   # it ran on that one, or has not yet and asks for it
    tag: Optional[str] = None
    by: Optional[str] = None        # the name of the key that it came with
    since: Optional[str] = None     # created then or later
    until: Optional[str] = None     # created before


class Addition(NamedTuple):
    """The jobs that a batch added, or that its Idempotency-Key added the first time it came."""

    jobs: List[Job]
    replayed: bool = False          # they were added before
    endings: Sequence["Ending"] = ()        # of those that ended with it
    queued: Sequence["Queued"] = ()         # those that wait


class IdempotencyKey(NamedTuple):
    """What makes a request that is sent twice count once."""

    key: str
    digest: str                     # of the body


class Task(NamedTuple):
    """One attempt at a job: what a runtime is told."""

    id: int
    job: str
    mode: str
    attempt: int                    # 1 is the first
    shots: int
    seed: int
    return_code: int
    submitter: str = ""             # the name of the key that the job came with
    tag: Optional[str] = None
    note: Optional[str] = None      # a JSON object as text
    priority: int = 0
    asked_runtime: Optional[str] = None     # only on that one


class Queued(NamedTuple):
    """A job that waits, as the queue knows it."""

    id: int
    mode: str
    priority: int = 0               # the highest is started first
    submitter: str = ""
    runtime: Optional[str] = None   # only on that one


class RuntimeSpec(NamedTuple):
    """A runtime as it is configured."""

    name: str
    command: Optional[Tuple[str, ...]]          # None: a built-in one
    modes: Tuple[str, ...] = ("verbatim",)
    protocol: str = "exec"          # or "lines"; or "echo", which needs no process
    slots: int = 1                  # how many of it run at once
    timeout: float = 60.0           # seconds an attempt may take
    retry_codes: Tuple[int, ...] = (TEMPFAIL,)
    interrupted: str = "retry"      # or "fail": a job that a crash of the server cut off
    start_timeout: float = 60.0     # seconds more for the first answer of a process, over `lines`
    warm: bool = False              # over `lines`: started with the server, not at its first job
    attempts: int = 5               # that a job gets; with 1 it never runs twice
    pause_after: int = 0            # jobs that fail in a row, until it is paused; 0: never
    result_bytes: int = 1 << 20     # that a result may have
    log_bytes: int = 1 << 16        # of its standard error that are kept, an attempt
    cwd: Optional[str] = None       # its current directory; None: the server's


class Log(NamedTuple):
    """What a runtime wrote on standard error during one attempt: the last of it."""

    text: bytes = b""
    dropped: int = 0                # bytes that came before it and were not kept


class Outcome(NamedTuple):
    """How one attempt ended."""

    return_code: int
    runtime_error: Optional[str] = None
    result: Optional[str] = None    # what the runtime put out; as `result_bytes` takes it
    is_json: bool = False           # whether `result` is JSON, or else text
    transient: bool = False         # worth another attempt
    started: bool = True            # False: the runtime could not be started
    interrupted: bool = False       # ended because somebody wanted that: no code of its own
    log: Log = Log()
    sent_sha256: Optional[bytes] = None     # of the job's bytes as they were written, if all were
    device: Optional[str] = None    # JSON: what the runtime said of itself, as the attempt began
    pause: Optional[str] = None     # why the runtime must be given no other job


class Attempt(NamedTuple):
    """One attempt at a job, as its details show it."""

    attempt: int                    # 1 is the first
    runtime: str
    start_time: str
    end_time: Optional[str] = None          # None: it runs, and the rest is not known yet
    return_code: Optional[int] = None
    runtime_error: Optional[str] = None
    sent_sha256: Optional[str] = None       # hexadecimal
    device: Optional[str] = None    # JSON


class Details(NamedTuple):
    """What the ten members of a job do not hold."""

    id: int
    submitter: str
    tag: Optional[str]
    note: Optional[str]             # a JSON object as text
    priority: int
    asked_runtime: Optional[str]
    shots: int
    seed: int
    state: str                      # waiting, running or ended
    due_time: Optional[str]         # not before this is it tried again
    attempts: List[Attempt]         # as they were made


class Ending(NamedTuple):
    """An attempt that is over and the event that it is for its job: "retry", "succeeded" or
    "failed"; or "release", a retry that costs no attempt."""

    task: Task
    event: str
    outcome: Outcome
    delay: float = 0.0              # seconds until it is due again
    seconds: float = 0.0            # that the attempt took


class Batch(NamedTuple):
    """The jobs of one request, of which all are added or none."""

    submissions: Sequence[Submission]
    submitter: str                  # the name of the key that it came with
    key: Optional[IdempotencyKey] = None
    outcomes: Sequence[Optional[Outcome]] = ()      # known on arrival, of each that ends at once


class RetryPolicy(NamedTuple):
    """How often a job with a transient outcome is tried again, and after what backoff."""

    attempts: int = 5
    first: float = 0.5              # seconds before the second attempt
    most: float = 30.0              # seconds at which the delay stops doubling

    def delay(self, attempt: int, dice: float) -> float:
        """Return the seconds from the end of the `attempt`-th attempt (1 is the first) to the next.

        They double with each attempt. `dice` is from 0 to 1: 0 takes half of them off, 1 nothing,
        so that jobs that failed together do not come back together.
        """
        doubled = self.first * 2 ** min(attempt - 1, 30)
        return min(self.most, doubled) * (0.5 + dice / 2)


def decide(outcome: Outcome, attempt: int, policy: RetryPolicy) -> str:
    """Return the event of TRANSITIONS for a job after its `attempt`-th attempt (1 is the first).

    A transient outcome is tried again until `policy.attempts` is reached; any other is final.
    """
    if outcome.transient and attempt < policy.attempts:
        return "retry"
    return "failed" if outcome.return_code else "succeeded"


def echo(return_code: int, retry_codes: Sequence[int]) -> Outcome:
    """Return the outcome of a runtime that ends with this return code and does nothing."""
    if not return_code:
        return Outcome(0)
    error = f"echo of return code {return_code}"
    return Outcome(return_code, error, transient=return_code in retry_codes)


def result_bytes(result: str) -> bytes:
    """Return the bytes of an outcome's result: what is no UTF-8 in them stands there escaped, as in
    names of files (PEP 383)."""
    return result.encode("utf-8", "surrogateescape")


KINDS = {                           # what JSON calls the types of decoded values
    dict: "an object", list: "an array", str: "text", bool: "true or false",
    int: "a number", float: "a number with a fraction", type(None): "null",
}


def parse(value: Any) -> Submission:
    """Return the submission that a decoded JSON value is; raise Malformed if it is none."""
    if not isinstance(value, dict):
        raise Malformed(f"expected an object with job and mode, found {KINDS[type(value)]}")
    for name in value:
        if name not in Submission._fields:
            raise Malformed(f"unknown member {json.dumps(name)[:80]}: "
                            f"allowed are {', '.join(Submission._fields)}")
    job = _text(value, "job")
    mode = _text(value, "mode")
    if not PATTERN.fullmatch(job):
        raise Malformed(explain(job))
    if mode not in MODES:
        raise Malformed("mode: expected verbatim, simulation or echo, "
                        f"found {json.dumps(mode)[:80]}")
    if "return_code" in value and mode != "echo":
        raise Malformed("return_code: allowed only with the mode echo")
    seed = _whole(value, "seed", MOST_SEED) if "seed" in value else None
    shots = _whole(value, "shots", MOST_SHOTS, DEFAULT_SHOTS)
    return_code = _whole(value, "return_code", 255, 0)
    priority = _whole(value, "priority", MOST_PRIORITY, least=-MOST_PRIORITY)
    return Submission(job, mode, shots, seed, return_code, _tag(value), _note(value),
                      _runtime(value), priority)


def explain(job: str) -> str:
    """Return where a job string leaves the pattern, and what is expected there.

    Characters are counted from 1.
    """
    place = 0
    parts = PULSE_PARTS
    valid = PATTERN.match(job)
    if valid:
        place = valid.end()
        parts = (SEPARATOR_PART, *PULSE_PARTS)
    for part, expected in parts:
        match = part.match(job, place)
        if not match:
            break
        place = match.end()
    found = json.dumps(job[place]) if place < len(job) else "the end"
    return f"job: at character {place + 1}: expected {expected}, found {found}"


def _text(value: Dict[str, Any], name: str) -> str:
    """Return the text member `name`; raise Malformed."""
    text = value.get(name)
    if isinstance(text, str):
        return text
    if name not in value:
        raise Malformed(f"{name}: missing; a job has the members job and mode")
    raise Malformed(f"{name}: expected text, found {KINDS[type(text)]}")


def _tag(value: Dict[str, Any]) -> Optional[str]:
    """Return the member tag, None without it; raise Malformed."""
    if "tag" not in value:
        return None
    tag = value["tag"]
    if not isinstance(tag, str) or not NAME.fullmatch(tag):
        found = json.dumps(tag)[:80] if isinstance(tag, str) else KINDS[type(tag)]
        raise Malformed("tag: expected 1 to 64 letters, digits, '.', '_' or '-', beginning with a "
                        f"letter or digit, found {found}")
    return tag


def _runtime(value: Dict[str, Any]) -> Optional[str]:
    """Return the member runtime, None without it; raise Malformed."""
    return _text(value, "runtime") if "runtime" in value else None


def _note(value: Dict[str, Any]) -> Optional[str]:
    """Return the member note, a JSON object, as text, None without it; raise Malformed."""
    if "note" not in value:
        return None
    note = value["note"]
    if not isinstance(note, dict):
        raise Malformed(f"note: expected an object, found {KINDS[type(note)]}")
    try:
        text = json.dumps(note, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except UnicodeEncodeError:
        raise Malformed("note: half of a surrogate pair is no text") from None
    except (ValueError, RecursionError):        # 1e999 is read as infinity
        raise Malformed("note: a number is too large, or it is nested too deeply") from None
    if size > MOST_NOTE:
        raise Malformed(f"note: expected {MOST_NOTE} bytes of JSON at most, found {size}")
    return text


def _whole(value: Dict[str, Any], name: str, most: int, default: int = 0, least: int = 0) -> int:
    """Return the member `name`, a whole number from `least` to `most`; raise Malformed."""
    number = value.get(name, default)
    if isinstance(number, float) and number.is_integer():
        number = int(number)        # 1.0 is whole (JSON Schema Validation 2020-12, section 6.1.1)
    whole = type(number) is int     # pylint: disable=unidiomatic-typecheck # True is an int too
    if whole and least <= number <= most:
        return number
    found = str(number)[:40] if whole else KINDS[type(number)]
    raise Malformed(f"{name}: {WHOLE_NUMBER.format(least, most)}, found {found}")
