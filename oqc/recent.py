"""How many jobs have ended of late: on each runtime, in each second of the last minute and in each
minute of the last hour. In memory, since a busy hour has millions of jobs."""
import collections
import threading
from typing import Callable, Deque, Dict, List, Optional, Protocol, Tuple

SPANS = 60                          # that are kept
SECOND, MINUTE = 1, 60              # the length of a span
Ended = Dict[Optional[str], int]    # how many jobs ended on each runtime; None: on none


class Clock(Protocol):
    """What is asked of a clock here."""

    def at(self, seconds: float) -> str:
        """Return the UTC time so many seconds since 1970, as the API shows it."""

    def unix(self) -> float:
        """Return seconds since 1970."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""


class Spans:
    """A count for each of the last SPANS spans of time, which are numbered."""

    def __init__(self) -> None:
        self._newest = 0                # its number
        self._counts: Deque[int] = collections.deque([0] * SPANS, SPANS)

    def add(self, span: int, count: int) -> None:
        """Add to the count of a span, unless it is too old."""
        if span > self._newest:
            self._counts.extend([0] * min(span - self._newest, SPANS))
            self._newest = span
        if span > self._newest - SPANS:
            self._counts[span - self._newest - 1] += count

    def counts(self, newest: int) -> List[int]:
        """Return the counts of the spans up to this one, the oldest first."""
        self.add(newest, 0)
        return list(self._counts)


class Recent:
    """How many jobs have ended of late. For any thread."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._began = clock.monotonic()
        # When the monotonic clock was 0, by the wall clock of now.
        self._zero = clock.unix() - self._began
        self._spans: Dict[Tuple[int, Optional[str]], Spans] = collections.defaultdict(Spans)
        self._second = 0                # the one that is counted apart: an add must cost nothing
        self._current: Dict[Optional[str], int] = collections.defaultdict(int)      # in it
        self._lock = threading.Lock()   # over all of these

    def count(self, runtime: Optional[str], jobs: int = 1) -> None:
        """Count jobs that have ended now; None: on no runtime."""
        now = int(self.clock.monotonic())
        with self._lock:
            if now != self._second:
                self._begin(now)
            self._current[runtime] += jobs

    def load(self, ended: Callable[[str, str], Ended], is_interrupted: Callable[[], bool]) -> None:
        """Count what ended before this began, the newest first. `ended` gives what ended from one
        UTC time until before another."""
        for seconds in (SECOND, MINUTE):
            newest = int(self._began // seconds)
            for span in range(newest, newest - SPANS, -1):
                if is_interrupted():
                    return
                since = self.clock.at(self._zero + span * seconds)
                # And no more, though the clock may have been set back: that is counted already.
                until = self.clock.at(self._zero + min((span + 1) * seconds, self._began))
                counts = ended(since, until)
                with self._lock:
                    for runtime, jobs in counts.items():
                        self._spans[seconds, runtime].add(span, jobs)

    def per_minute(self, runtime: str) -> List[int]:
        """Return how many jobs ended on a runtime in each minute of the last hour, from the first
        in which one did; the last one is not over."""
        now = int(self.clock.monotonic())
        with self._lock:
            self._begin(now)
            counts = self._spans[MINUTE, runtime].counts(now // MINUTE)
        while counts and not counts[0]:
            del counts[0]
        return counts

    def total(self, seconds: int) -> int:
        """Return how many jobs ended in the last SPANS spans of so many seconds, on any runtime."""
        now = int(self.clock.monotonic())
        with self._lock:
            self._begin(now)
            return sum(sum(spans.counts(now // seconds))
                       for (length, _), spans in self._spans.items() if length == seconds)

    def _begin(self, second: int) -> None:
        """Enter what was counted apart, and begin a second. Under the lock."""
        for runtime, jobs in self._current.items():
            for seconds in (SECOND, MINUTE):
                self._spans[seconds, runtime].add(self._second // seconds, jobs)
        self._current.clear()
        self._second = second
