"""The one room that asks what time it is: the wall clock, the monotonic clock, and a wait that a stop interrupts."""
import threading
import time
from datetime import datetime, timezone
from typing import Optional


class Clock:
    """The machine's clocks. Tests hand in one whose time they move by hand."""

    def __init__(self) -> None:
        self._second = (0, "")      # the last one asked for, written out: isoformat takes 3 times as long

    def now(self) -> str:
        """The UTC time as the API shows it, `2026-11-23T17:19:00.123456Z`: text that sorts as time does."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        known, text = self._second
        if seconds != known:
            text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))
            self._second = (seconds, text)
        return f"{text}{microseconds:06d}Z"

    @staticmethod
    def ago(seconds: float) -> str:
        """The UTC time `seconds` before now, written as `now` writes it."""
        moment = datetime.fromtimestamp(max(0.0, time.time() - seconds), timezone.utc)
        return moment.isoformat(timespec="microseconds")[:26] + "Z"

    @staticmethod
    def parse(text: str) -> float:
        """What `now` wrote, in seconds since 1970."""
        return datetime.strptime(text + "+0000", "%Y-%m-%dT%H:%M:%S.%fZ%z").timestamp()

    @staticmethod
    def date() -> str:
        """The UTC time as an HTTP date (RFC 9110, section 5.6.7)."""
        return datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")

    @staticmethod
    def unix() -> float:
        """Seconds since 1970: only for what has to outlive this process, since it jumps when somebody sets it."""
        return time.time()

    @staticmethod
    def monotonic() -> float:
        """Seconds that never jump: for every deadline, delay and duration inside this process."""
        return time.monotonic()

    @staticmethod
    def wait(event: threading.Event, seconds: Optional[float]) -> bool:
        """Wait until `event` is set, `seconds` at most (None: as long as it takes). True if it is set."""
        return event.wait(seconds)
