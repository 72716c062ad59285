"""The one room that asks what time it is: wall clock, monotonic clock, a wait for an event."""
import threading
import time
from datetime import datetime, timezone
from typing import Optional


class Clock:
    """The machine's clocks. Tests hand in one that they move by hand."""

    def __init__(self) -> None:
        # the second of the last `now`, and its text: isoformat takes 3 times as long
        self._second = (0, "")

    def now(self) -> str:
        """Return the UTC time as the API shows it, `2026-11-23T17:19:00.123456Z`.

        The texts of times sort as the times do.
        """
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        last, text = self._second
        if seconds != last:
            text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))
            self._second = (seconds, text)
        return f"{text}{microseconds:06d}Z"

    @staticmethod
    def at(seconds: float) -> str:
        """Return the UTC time so many seconds since 1970, as `now` writes it."""
        moment = datetime.fromtimestamp(max(0.0, seconds), timezone.utc)
        return moment.isoformat(timespec="microseconds")[:26] + "Z"

    def ago(self, seconds: float) -> str:
        """Return the UTC time `seconds` before now, as `now` writes it."""
        return self.at(self.unix() - seconds)

    @staticmethod
    def parse(text: str) -> float:
        """Return the seconds since 1970 of a time as `now` writes it."""
        return datetime.strptime(text + "+0000", "%Y-%m-%dT%H:%M:%S.%fZ%z").timestamp()

    @staticmethod
    def date() -> str:
        """Return the UTC time as an HTTP date (RFC 9110, section 5.6.7)."""
        return datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")

    @staticmethod
    def unix() -> float:
        """Return the seconds since 1970, which jump when somebody sets the clock.

        For nothing but what outlives this process.
        """
        return time.time()

    @staticmethod
    def monotonic() -> float:
        """Return seconds that never jump: for each deadline, delay and duration in this process."""
        return time.monotonic()

    @staticmethod
    def wait(event: threading.Event, seconds: Optional[float]) -> bool:
        """Wait for `event`, for `seconds` at most (None: for ever); return whether it is set."""
        return event.wait(seconds)
