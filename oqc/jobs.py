"""The job as data: its pattern, modes and statuses, who may become what, and what becomes of it after an attempt."""
import json
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

MODES = ("verbatim", "simulation", "echo")
STARTING, RETRYING, SUCCESS, RUNTIME_ERROR = STATUSES = ("Starting", "Retrying", "Success", "Runtime Error")

# Who may become what. The spec has no "Running": a job runs while start_time is set and end_time is not.
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
OPEN = tuple(sorted({status for status, _ in TRANSITIONS}))     # the statuses that a job can still leave

# Return codes: the conventions of the shell, of timeout(1) and of sysexits.h.
DATAERR, SOFTWARE, TEMPFAIL, PROTOCOL = 65, 70, 75, 76
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND, CANCELLED = 124, 126, 127, 130
KILLED = 128 + 9

# The documented pattern, with ASCII digits, and for fullmatch: `$` would let a trailing newline in.
PULSE = r"[XYZ]\([0-9]{1,3}\)"
PATTERN = re.compile(f"{PULSE}(?:, {PULSE})*")
PULSE_PARTS = (                     # what a pulse is made of, in order, and what to call it where it is missing
    (re.compile(r"[XYZ]"), "a pulse such as X(90)"),
    (re.compile(r"\("), '"(" and an angle such as X(90)'),
    (re.compile(r"[0-9]{1,3}"), "an angle of 1 to 3 digits (whole degrees)"),
    (re.compile(r"\)"), '")" after an angle of 1 to 3 digits (whole degrees)'),
)
BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)      # seconds, of the durations that are counted
PAGE_BYTES = 4 << 20                # of job strings after which a page ends: a job may have megabytes, a page thousands
MOST_SHOTS, DEFAULT_SHOTS, MOST_SEED = 1_000_000, 1000, 2 ** 63 - 1


class Malformed(ValueError):
    """What was sent is not a job; the text says what is wrong, where, and what is allowed."""


def refuse_constant(name: str) -> Any:
    """What json is to do with NaN, Infinity and -Infinity, which Python reads and JSON has not; raises Malformed."""
    raise Malformed(f"{name} is not JSON")


class UnknownJob(LookupError):
    """No job has this id."""


class Ended(Exception):
    """The job has ended, so that nothing can be changed about it; carries the job."""

    def __init__(self, job: "Job") -> None:
        super().__init__(f"job {job.id} has ended: {job.status}")
        self.job = job


class StoreError(Exception):
    """The database cannot be opened, or cannot be used now; the text says why and what to do."""


class Refused(Exception):
    """A write that found something wrong before it changed anything."""


class KeyReused(Refused):
    """An Idempotency-Key came again with another body."""


class DiskFull(StoreError):
    """There is no room for what was to be written; nothing of it was."""


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


class Submission(NamedTuple):
    """What a client asked for, checked."""

    job: str
    mode: str
    shots: int = DEFAULT_SHOTS
    seed: Optional[int] = None      # None: to be chosen and stored, so that every run can be repeated
    return_code: int = 0            # of an echo


class Addition(NamedTuple):
    """What came of adding jobs: them, or those of the first time that the same Idempotency-Key came."""

    jobs: List[Job]
    replayed: bool = False
    endings: Sequence["Ending"] = ()        # of those that ended with it


class IdempotencyKey(NamedTuple):
    """What makes a request that comes twice count once."""

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


class RuntimeSpec(NamedTuple):
    """A runtime as it is configured. A command of None is a built-in one."""

    name: str
    command: Optional[Tuple[str, ...]]
    modes: Tuple[str, ...] = ("verbatim",)
    protocol: str = "exec"          # or "lines"; or "echo", which needs no process
    slots: int = 1                  # how many of it run at once
    timeout: float = 60.0           # seconds an attempt may take
    retry_codes: Tuple[int, ...] = (TEMPFAIL,)
    interrupted: str = "retry"      # what becomes of a job that a crash of the server cut off: retry, or fail


class Outcome(NamedTuple):
    """How one attempt ended."""

    return_code: int
    runtime_error: Optional[str] = None
    result: Optional[str] = None    # what the runtime put out
    is_json: bool = False           # whether `result` is JSON, or else text
    transient: bool = False         # worth another attempt
    started: bool = True            # False: the runtime could not even be started


class Ending(NamedTuple):
    """An attempt that is over and what becomes of its job."""

    task: Task
    event: str                      # "retry", "succeeded" or "failed"; or "release": a retry that costs no attempt
    outcome: Outcome
    delay: float = 0.0              # seconds until it is due again
    seconds: float = 0.0            # that the attempt took


class Foregone(NamedTuple):
    """The one attempt at a job that takes no time and has no result, so that its end is known when the job comes in."""

    runtime: str
    event: str                      # "succeeded" or "failed"
    outcome: Outcome


class RetryPolicy(NamedTuple):
    """How often, and after what delays, a transient outcome is tried again."""

    attempts: int = 5
    first: float = 0.5              # seconds before the second attempt
    most: float = 30.0              # seconds the doubling stops at

    def delay(self, attempt: int, dice: float) -> float:
        """Seconds from the end of the `attempt`-th attempt to the next: doubling, and from half to the whole of it
        by `dice` (0 to 1), so that jobs that failed together do not come back together."""
        return min(self.most, self.first * 2 ** min(attempt - 1, 30)) * (0.5 + dice / 2)


def decide(outcome: Outcome, attempt: int, policy: RetryPolicy) -> str:
    """What becomes of a job after its `attempt`-th attempt (1 is the first): the event of TRANSITIONS.

    A transient outcome is tried again until `policy.attempts` is reached; any other outcome is final.
    """
    if outcome.transient and attempt < policy.attempts:
        return "retry"
    return "failed" if outcome.return_code else "succeeded"


def echo(return_code: int, retry_codes: Sequence[int]) -> Outcome:
    """What a runtime would have come to that ends with this return code and does nothing."""
    if not return_code:
        return Outcome(0)
    return Outcome(return_code, f"echo of return code {return_code}", transient=return_code in retry_codes)


def foregone(return_code: int, spec: RuntimeSpec, policy: RetryPolicy) -> Optional[Foregone]:
    """How an echo of this return code ends, unless it is to be tried again."""
    outcome = echo(return_code, spec.retry_codes)
    event = decide(outcome, 1, policy)
    return None if event == "retry" else Foregone(spec.name, event, outcome)


def parse(value: Any) -> Submission:
    """The submission in one decoded JSON value; raises Malformed."""
    if type(value) is not dict:     # pylint: disable=unidiomatic-typecheck # JSON makes exact types, and True is an int
        raise Malformed(f"expected an object with job and mode, found {_kind(value)}")
    for name in value:
        if name not in Submission._fields:
            raise Malformed(f"unknown member {json.dumps(name)[:80]}: allowed are {', '.join(Submission._fields)}")
    job, mode = _text(value, "job"), _text(value, "mode")
    if not PATTERN.fullmatch(job):
        raise Malformed(explain(job))
    if mode not in MODES:
        raise Malformed(f"mode: expected verbatim, simulation or echo, found {json.dumps(mode)[:80]}")
    if "return_code" in value and mode != "echo":
        raise Malformed("return_code: only an echo can be asked for one")
    seed = _whole(value, "seed", MOST_SEED) if "seed" in value else None
    return Submission(job, mode, _whole(value, "shots", MOST_SHOTS, DEFAULT_SHOTS), seed,
                      _whole(value, "return_code", 255, 0))


def whole_number(text: str, least: int, most: int) -> int:
    """Return the whole number that a text is; raise ValueError whose text is
    'expected a whole number from LEAST to MOST', to which the caller adds where and what it found."""
    # int() also takes 1_0, blanks, signs, digits of other scripts, and any number of digits.
    if not re.fullmatch("[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise ValueError(f"expected a whole number from {least} to {most}")
    return int(text)


def explain(job: str) -> str:
    """Where a job string leaves the documented pattern, counting characters from 1, and what is allowed there."""
    whole = PATTERN.match(job)
    place = whole.end() if whole else 0
    expected = '", " and a pulse such as X(90)'
    if not whole or job.startswith(", ", place):
        place += 2 if whole else 0
        for part, expected in PULSE_PARTS:
            found = part.match(job, place)
            if not found:
                break
            place = found.end()
    found_there = json.dumps(job[place]) if place < len(job) else "the end"
    return f"job: at character {place + 1}: expected {expected}, found {found_there}"


def _text(value: Dict[str, Any], name: str) -> str:
    """The text member `name`; raises Malformed."""
    text = value.get(name)
    if not isinstance(text, str):
        raise Malformed(f"{name}: expected text, found {_kind(text)}" if name in value else
                        f"{name}: missing; a job has the members job and mode")
    return text


def _whole(value: Dict[str, Any], name: str, most: int, default: int = 0) -> int:
    """The whole number `name` from 0 to `most`; raises Malformed."""
    number = value.get(name, default)
    if isinstance(number, float) and number.is_integer():
        number = int(number)        # JSON does not tell 1.0 from 1 (JSON Schema Validation 2020-12, section 6.1.1)
    if type(number) is not int:     # pylint: disable=unidiomatic-typecheck # True is an int to isinstance
        raise Malformed(f"{name}: expected a whole number from 0 to {most}, found {_kind(number)}")
    if not 0 <= number <= most:
        raise Malformed(f"{name}: expected a whole number from 0 to {most}, found {str(number)[:40]}")
    return number


def _kind(value: Any) -> str:
    """What JSON calls the type of a decoded value."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", int: "a number",
             float: "a number with a fraction", type(None): "null"}
    return names[type(value)]
