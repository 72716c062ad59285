"""Who waits for a job to end, or for anything to change, and how many may.

Each that waits holds a thread of the server, so that there is room for only so many, and of one
name for only half of them.
"""
import contextlib
import threading
from typing import Callable, Counter, Dict, Iterable, Iterator, List, Optional, Protocol, Sequence

from oqc.jobs import Job

LOOK_EVERY = 1.0                    # seconds between two looks whether who waits has left


class Store(Protocol):
    """What those who wait ask of the store."""

    def get(self, number: int) -> Job:
        """Return the job with this id; raise UnknownJob."""


class Clock(Protocol):
    """What those who wait ask of a clock."""

    def monotonic(self) -> float:
        """Return seconds that never jump."""

    def wait(self, event: threading.Event, seconds: Optional[float]) -> bool:
        """Wait until `event` is set, `seconds` at most; return whether it is set."""


def _stays() -> bool:
    """Say of who waits that they have not left."""
    return False


class Waiting:
    """Who waits, for what. All methods are for any thread."""

    def __init__(self, store: Store, clock: Clock, most: int = 256) -> None:
        """`most`: how many threads may wait at once."""
        self.store = store
        self.clock = clock
        self.most = most
        self.changes = 0                # how much has happened so far
        self._stopped = False
        self._waits: Counter[str] = Counter()   # how many wait now, by their names
        self._waiters: Dict[int, List[threading.Event]] = {}    # {job: set when it has ended}
        self._changed = threading.Condition()   # its lock is over what is above

    def notify(self, ended: Iterable[int] = ()) -> None:
        """Note a change, and that these jobs have ended; after it is on disk."""
        with self._changed:
            self.changes += 1
            self._changed.notify_all()
            for number in ended:
                for event in self._waiters.get(number, ()):
                    event.set()

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            for events in self._waiters.values():
                for event in events:
                    event.set()

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[bool]:
        """Hold a place for one that waits, by the name of its key; gives whether there was one."""
        with self._changed:
            has_room = (sum(self._waits.values()) < self.most
                        and self._waits[name] < (self.most + 1) // 2)
            if has_room:
                self._waits[name] += 1
        try:
            yield has_room
        finally:
            with self._changed:
                if has_room:
                    self._waits[name] -= 1
                if not self._waits[name]:
                    del self._waits[name]

    def until_ended(self, numbers: Sequence[int], seconds: float, name: str = "",
                    has_left: Callable[[], bool] = _stays) -> List[Job]:
        """Return these jobs as soon as all have ended, or as they are after `seconds` or soon after
        who waits has left; none at all, and at once, when there is no place for another that waits.
        Raise UnknownJob."""
        with self.place(name) as has_room:
            if not has_room:
                return []
            deadline = self.clock.monotonic() + seconds
            return [self._until_ended(number, deadline, has_left) for number in numbers]

    def _until_ended(self, number: int, deadline: float,
                     has_left: Callable[[], bool] = _stays) -> Job:
        ended = threading.Event()
        with self._changed:
            self._waiters.setdefault(number, []).append(ended)
        try:
            job = self.store.get(number)        # only now: it cannot end unnoticed any more
            if job.end_time is not None:
                return job
            # `_stopped` without the lock: a stop that comes now sets the event.
            while not (ended.is_set() or self._stopped or has_left()):
                left = deadline - self.clock.monotonic()
                if left <= 0:
                    break
                self.clock.wait(ended, min(left, LOOK_EVERY))
            return self.store.get(number)
        finally:
            with self._changed:
                self._waiters[number].remove(ended)
                if not self._waiters[number]:
                    del self._waiters[number]

    def for_change(self, since: int, seconds: float, name: str = "",
                   has_left: Callable[[], bool] = _stays) -> None:
        """Return as soon as `changes` is not `since`, or after `seconds`, or soon after who waits
        has left; at once when there is no place for another that waits."""
        with self.place(name) as has_room:
            if not has_room:
                return
            deadline = self.clock.monotonic() + seconds
            with self._changed:
                while self.changes == since and not self._stopped and not has_left():
                    left = deadline - self.clock.monotonic()
                    if left <= 0:
                        return
                    self._changed.wait(min(left, LOOK_EVERY))

    def for_more(self, number: int, seconds: float) -> bool:
        """Wait for a job to end, `seconds` at most, in a place that is held; return whether there
        may be more of it: False when everybody is to stop waiting. Raise UnknownJob."""
        self._until_ended(number, self.clock.monotonic() + seconds)
        return not self._stopped
