"""Who waits for a job to end, or for anything to change, and how many may.

Each that waits holds a thread of the server, so that there is room for only so many.
"""
import threading
from typing import Dict, Iterable, List, Optional, Protocol, Sequence

from oqc.jobs import Job


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


class Waiting:
    """Who waits, for what. All methods are for any thread."""

    def __init__(self, store: Store, clock: Clock, most: int = 256) -> None:
        """`most`: how many threads may wait at once."""
        self.store = store
        self.clock = clock
        self.most = most
        self.changes = 0                # how much has happened so far
        self._stopped = False
        self._waits = 0                 # how many wait now
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

    def until_ended(self, numbers: Sequence[int], seconds: float) -> List[Job]:
        """Return these jobs as soon as all have ended, or as they are after `seconds`; none at
        all, and at once, when as many wait already as may. Raise UnknownJob."""
        if not self._enter():
            return []
        try:
            deadline = self.clock.monotonic() + seconds
            return [self._until_ended(number, deadline) for number in numbers]
        finally:
            self._leave()

    def _until_ended(self, number: int, deadline: float) -> Job:
        ended = threading.Event()
        with self._changed:
            self._waiters.setdefault(number, []).append(ended)
        try:
            job = self.store.get(number)        # only now: it cannot end unnoticed any more
            left = deadline - self.clock.monotonic()
            # `_stopped` without the lock: a stop that comes now sets the event.
            if job.end_time is None and left > 0 and not self._stopped:
                if self.clock.wait(ended, left):
                    job = self.store.get(number)
            return job
        finally:
            with self._changed:
                self._waiters[number].remove(ended)
                if not self._waiters[number]:
                    del self._waiters[number]

    def for_change(self, since: int, seconds: float) -> None:
        """Return as soon as `changes` is not `since`, or after `seconds` of real time; at once
        when as many wait already as may."""
        if not self._enter():
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: self.changes != since or self._stopped, seconds)
        finally:
            self._leave()

    def _enter(self) -> bool:
        """Take a place, if there is one."""
        with self._changed:
            if self._waits >= self.most:
                return False
            self._waits += 1
            return True

    def _leave(self) -> None:
        with self._changed:
            self._waits -= 1
