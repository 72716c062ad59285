"""The protocol `lines` as bytes: what each line means that a runtime has put out.

A line that answers is an object with a `return_code`. It is read leniently, since libraries print
to the same pipe: whatever is no answer and announces nothing is noise. No processes here.
"""
import json
import re
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

from oqc import jobs
from oqc.jobs import Outcome

MOST_ERROR = 2048                   # bytes of a runtime_error that are kept
MOST_DEVICE = 64 << 10              # bytes of the JSON of a device
BESIDE_RESULT = 128 << 10           # bytes that an answer's line may have beside its result

END = re.compile(rb"[\r\n]+")       # progress bars write a carriage return
OBJECT = re.compile(rb'\{\s*["}]')  # as JSON begins one
NEXT_OBJECT = re.compile(OBJECT.pattern.decode())
NOT_BLANK = re.compile(r"[^ \t]")
# Of what is not JSON, or was cut: whether it was to be an answer, and to which question.
RETURN_CODE = re.compile(rb'"return_code"\s*:')
RESULT = re.compile(rb'"result"\s*:\s*')
ID = re.compile(rb'"id"\s*:\s*(-?[0-9]{1,19})\s*[,}]')
FIRST_MEMBER = re.compile(rb'\s*\{\s*"(id|return_code|runtime_error|result)"\s*:')
STRICT = json.JSONDecoder(parse_constant=jobs.refuse_constant)
LENIENT = json.JSONDecoder()        # takes NaN
HALF_A_CHARACTER = re.compile("[\udcc2-\udcf4][\udc80-\udcbf]{0,2}\\Z")     # as it is decoded
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Answer(NamedTuple):
    """A line that answers a question."""

    id: Optional[int]               # of the question; None: it has none that is an integer
    outcome: Outcome
    noise: bytes = b""              # what stands before it on its line, such as a progress bar


class Announcement(NamedTuple):
    """A line by which a process says that it is ready, or what its device is."""

    ready: bool
    device: Optional[str]           # JSON of an object


class Lines:
    """Takes the lines out of what a process has put out."""

    def __init__(self, most: int) -> None:
        """`most`: bytes that a line may have."""
        self.most = most
        self._searched = 0              # bytes of the unfinished line without an end in them
        self.is_skipping = False          # the rest of a line that is too long

    def take(self, output: bytearray) -> Iterator[Tuple[bytes, bool]]:
        """Remove the lines that are finished from `output`; yield each, and whether it is whole.

        One that is too long is yielded, cut, as soon as it is. Blank lines are left out.
        """
        while True:
            end = END.search(output, self._searched)
            if end is None:
                break
            line = bytes(output[:end.start()])
            del output[:end.end()]
            self._searched = 0
            if self.is_skipping:
                self.is_skipping = False
            elif line.strip():
                yield line[:self.most], len(line) <= self.most
        if self.is_skipping:
            output.clear()
        elif len(output) > self.most:
            line = bytes(output[:self.most])
            output.clear()
            self.is_skipping = True
            yield line, False
        self._searched = len(output)


def read(
    line: bytes,
    result_bytes: int,
    retry_codes: Sequence[int],
) -> Union[Answer, Announcement, None]:
    """Return what a whole line means; None for noise."""
    first = OBJECT.search(line)
    if first is None:
        return None
    begin = first.start()
    try:
        text = line[begin:].decode("utf-8")
        value, place = _object_at_end(text)
        noise = (line[:begin] + text[:place].encode()).strip()
        if noise == BYTE_ORDER_MARK:
            raise ValueError("JSON has none (RFC 8259, section 8.1)")
    except (ValueError, RecursionError):
        return _read_broken(line, begin, result_bytes)
    if "return_code" not in value:
        return _announcement(value)
    number = value.get("id")
    if type(number) is not int:     # pylint: disable=unidiomatic-typecheck # True is an int too
        number = None
    if number is None and noise:
        return None                 # what a library prints of itself
    outcome = _outcome(value, result_bytes, retry_codes)
    if outcome is None:
        outcome = _no_answer(line, result_bytes)
    if number is None:
        outcome = _without_id(line, result_bytes)
    return Answer(number, outcome, noise)


def read_cut(line: bytes, asked: Optional[int], result_bytes: int) -> Optional[Answer]:
    """Return what the beginning of a line means that is too long; None for noise.

    It answers what was asked, unless it names another question before its result.
    """
    is_object = line.lstrip().startswith(b"{")
    if not FIRST_MEMBER.match(line) and not (is_object and RETURN_CODE.search(line)):
        return None
    result = RESULT.search(line)
    head = line
    if result:
        head = line[:result.start()]
        line = line[result.end():]
    match = ID.search(head)
    number = int(match[1]) if match else asked
    return Answer(number, too_long(line, result_bytes))


def too_long(output: bytes, result_bytes: int) -> Outcome:
    """Return the outcome of an attempt whose result is too long."""
    return Outcome(jobs.PROTOCOL, cut(None, result_bytes), beginning(output, result_bytes))


def cut(error: Optional[str], result_bytes: int) -> str:
    """Return the error of an attempt whose result is too long, behind that which it had."""
    line = f"a result longer than result_bytes ({result_bytes}); its beginning is kept"
    return f"{error}; {line}" if error else line


def beginning(output: bytes, most: int) -> str:
    """Return the first bytes of a result as an Outcome has it, `most` of them. Half a character at
    the place of the cut is left out."""
    text = output[:most].decode("utf-8", "surrogateescape")
    return HALF_A_CHARACTER.sub("", text) if len(output) > most else text


def last_line(text: str) -> Optional[str]:
    """Return the last line that is not blank, or None if all are."""
    lines = text.replace("\0", "\ufffd").strip().splitlines()
    return lines[-1].strip() if lines else None


def is_object(line: bytearray) -> bool:
    """Return whether a line without an end is whole: an object to its last byte."""
    try:
        return isinstance(LENIENT.decode(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _object_at_end(text: str) -> Tuple[Dict[str, Any], int]:
    """Return the object with which a text ends that begins with one, and where it begins; raise
    ValueError without one. What stands before it must be no answer."""
    begin = 0
    while True:
        value, end = STRICT.raw_decode(text, begin)
        if not NOT_BLANK.search(text, end):
            return value, begin
        following = NEXT_OBJECT.search(text, end)
        if "return_code" in value or not following:
            raise ValueError("no object stands at the end")
        begin = following.start()


def _read_broken(line: bytes, begin: int, result_bytes: int) -> Optional[Answer]:
    """Return the answer that a line was to be which is not JSON; None for noise."""
    if not RETURN_CODE.search(line, begin):
        return None
    number = _id_in(line, begin)
    if number is not None:
        return Answer(number, _no_answer(line, result_bytes))
    if begin and not line.startswith(BYTE_ORDER_MARK):
        return None
    return Answer(None, _without_id(line, result_bytes))


def _id_in(line: bytes, begin: int) -> Optional[int]:
    """Return the id in what is no strict JSON: by Python's reader, which also takes NaN and finds
    that of the object itself; else the first that stands there."""
    try:
        number = LENIENT.raw_decode(line[begin:].decode("utf-8", "replace"))[0].get("id")
    except (ValueError, RecursionError):
        match = ID.search(line)
        number = int(match[1]) if match else None
    return number if type(number) is int else None  # pylint: disable=unidiomatic-typecheck # True


def _announcement(value: Dict[str, Any]) -> Optional[Announcement]:
    ready = value.get("ready") is True
    device = value.get("device")
    if not isinstance(device, dict):
        return Announcement(True, None) if ready else None
    try:
        text = json.dumps(device, allow_nan=False)
    except (ValueError, RecursionError):        # 1e999 is read as infinity
        return None
    if len(text) > MOST_DEVICE:
        return None
    return Announcement(ready, text)


def _outcome(
    answer: Dict[str, Any],
    result_bytes: int,
    retry_codes: Sequence[int],
) -> Optional[Outcome]:
    """Return the outcome in an answer, None if a member of it is not what it has to be."""
    code = answer["return_code"]
    error = answer.get("runtime_error")
    result = answer.get("result")
    if isinstance(code, bool) or not isinstance(code, int) or not 0 <= code <= 255:
        return None
    if not isinstance(error, (str, type(None))):
        return None
    text = ""
    if result is not None:
        try:
            text = json.dumps(result, allow_nan=False)
        except (ValueError, RecursionError):    # 1e999 is read as infinity
            return None
    is_cut = len(text) > result_bytes
    if code == 0 and not is_cut:
        return Outcome(0, None, text or None, True)
    if code == 0:
        return too_long(text.encode(), result_bytes)
    error = last_line(error or "") or f"return code {code}"
    error = error.encode("utf-8", "replace")[:MOST_ERROR].decode("utf-8", "ignore")
    if is_cut:
        text = text[:result_bytes]
        error = cut(error, result_bytes)
    return Outcome(code, error, text or None, not is_cut, transient=code in retry_codes)


def _no_answer(line: bytes, result_bytes: int) -> Outcome:
    error = f"not an answer: {_quoted(line)}"
    return Outcome(jobs.PROTOCOL, error, beginning(line, result_bytes))


def _without_id(line: bytes, result_bytes: int) -> Outcome:
    """Return the outcome of an answer without an id, which any job's might be."""
    error = f"an answer without the id of its question: {_quoted(line)}"
    reason = "its answers do not carry the id of their question, see help runtimes"
    return Outcome(jobs.PROTOCOL, error, beginning(line, result_bytes), pause=reason)


def _quoted(line: bytes) -> str:
    return json.dumps(line[:80].decode("utf-8", "replace"))
