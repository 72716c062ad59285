"""What the query of a request asks for: which jobs, of which page of them."""
import re
from typing import Callable, Dict, Iterator, Optional, Protocol, Sequence

from oqc import jobs
from oqc.jobs import Job, Malformed, Selection
from oqc.messages import choice, found

PAGE = 1000                         # rows read at once for a listing: what bounds its memory
MOST_LIMIT = 10_000
FILTERS = Selection._fields
AGE = re.compile("([0-9]{1,6})([dhms])")
AGE_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}        # in seconds
# A UTC time as the API writes it, or its beginning.
TIME = re.compile("[0-9]{4}(-[0-9]{2}(-[0-9]{2}(T[0-9]{2}(:[0-9]{2}(:[0-9]{2}"
                  r"(\.[0-9]{1,6})?)?)?)?)?)?Z?")
WHOLE_TIME = "0000-01-01T00:00:00.000000Z"


class Clock(Protocol):
    """What is asked of a clock here."""

    def ago(self, seconds: float) -> str:
        """Return the UTC time `seconds` before now, as the API shows it."""

    def parse(self, text: str) -> float:
        """Return the seconds since 1970 of a UTC time as the API shows it; raise ValueError."""


def selection(query: Dict[str, str], clock: Clock, me: str) -> Selection:
    """Return the jobs that the filters in these parameters select; raise Malformed. `me`: the name
    of the key that asks."""
    by = _name(query, "by")
    if by == "me":
        by = me
    return Selection(
        status=choice(query, "status", jobs.STATUSES),
        mode=choice(query, "mode", jobs.MODES),
        state=choice(query, "state", jobs.STATES),
        runtime=_name(query, "runtime"),
        tag=_name(query, "tag"),
        by=by,
        since=_time(query, "since", clock),
        until=_time(query, "until", clock))


def _name(query: Dict[str, str], name: str) -> Optional[str]:
    """Return a name in a parameter, None without it; raise Malformed. Nobody need have it: a key or
    a runtime may be gone, and its jobs are still there."""
    value = query.get(name)
    if value is not None and not jobs.NAME.fullmatch(value):
        raise Malformed(f"{name}: expected 1 to 64 letters, digits, '.', '_' or '-', beginning "
                        f"with a letter or digit, found {found(value)}")
    return value


def _time(query: Dict[str, str], name: str, clock: Clock) -> Optional[str]:
    """Return the time in a parameter, as text that sorts among the times of jobs; that of an age
    counted from now. None without it; raise Malformed."""
    value = query.get(name)
    if value is None:
        return None
    seconds = age(value)
    if seconds is not None:
        return clock.ago(seconds)
    if TIME.fullmatch(value):
        beginning = value.rstrip("Z")
        try:
            clock.parse(beginning + WHOLE_TIME[len(beginning):])
            return beginning        # it sorts before everything that begins so
        except ValueError:          # there is no such day
            pass
    raise Malformed(f"{name}: expected a UTC time such as 2026-11-23T17:19 or an age such as 90d, "
                    f"12h, 30m or 0s, found {found(value)}")


def age(text: str) -> Optional[int]:
    """Return the seconds of an age such as 90d, 12h, 30m or 0s; None if a text is none."""
    match = AGE.fullmatch(text)
    return int(match[1]) * AGE_UNITS[match[2]] if match else None


# Pages

def next_page(query: Dict[str, str], selected: Selection, last: int) -> str:
    """Return the query of the page behind the job `last`. Ages are times in it: a page later they
    would be others."""
    kept = {**query, **{name: getattr(selected, name) for name in ("since", "until")}}
    kept.pop("after", None)
    texts = [f"&{name}={value.replace(' ', '%20')}" for name, value in kept.items() if value]
    return f"after={last}" + "".join(texts)


def pages(select: Callable[[Optional[int], int], Sequence[Job]], page: Sequence[Job]
          ) -> Iterator[Sequence[Job]]:
    """Yield a page of jobs and all that follow it, of what `select(after, limit)` gives."""
    while page:
        yield page
        if not may_have_more(page, PAGE):
            return
        page = select(page[-1][0], PAGE)


def may_have_more(page: Sequence[Job], most: int) -> bool:
    """Return whether jobs may follow on a page of up to so many: it is full, or was cut because
    they are long."""
    return len(page) == most or sum(map(jobs.row_size, page)) > jobs.PAGE_BYTES
