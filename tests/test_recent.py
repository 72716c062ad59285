"""How many jobs have ended of late: by the second, by the minute, and after a restart."""
import pytest

from oqc.recent import MINUTE, SECOND, Recent


class HandClock:
    """A clock whose times are numbers, so that they can be compared."""

    def __init__(self):
        self.seconds = 100_000.0
        self.wall = 1_800_000_000.0

    @staticmethod
    def at(seconds):
        return f"{seconds:020.6f}"

    def unix(self):
        return self.wall

    def monotonic(self):
        return self.seconds

    def move(self, seconds):
        self.seconds += seconds
        self.wall += seconds


@pytest.fixture(name="clock")
def a_clock_moved_by_hand():
    return HandClock()


def ended_at(*times):
    """What a store says of jobs that ended at these times, each on a runtime."""
    def ended(since, until):
        counts = {}
        for runtime, seconds in times:
            if since <= HandClock.at(seconds) < until:
                counts[runtime] = counts.get(runtime, 0) + 1
        return counts
    return ended


def test_what_ended_is_counted_for_a_minute_and_for_an_hour(clock):
    recent = Recent(clock)
    recent.count("q", 3)
    recent.count(None)
    clock.move(58)
    assert (recent.total(SECOND), recent.total(MINUTE)) == (4, 4)
    clock.move(2)
    assert (recent.total(SECOND), recent.total(MINUTE)) == (0, 4)
    clock.move(59 * 60)
    assert recent.total(MINUTE) == 0


def test_each_runtime_has_its_minutes_from_the_first_in_which_a_job_ended(clock):
    recent = Recent(clock)
    assert recent.per_minute("q") == []
    recent.count("q", 2)
    clock.move(180)
    recent.count("q")
    recent.count("other", 7)
    assert (recent.per_minute("q"), recent.per_minute("other")) == ([2, 0, 0, 1], [7])
    clock.move(56 * 60)
    assert recent.per_minute("q") == [2, 0, 0, 1] + [0] * 56
    clock.move(60)
    assert recent.per_minute("q") == [1] + [0] * 57
    clock.move(10 ** 7)
    assert (recent.per_minute("q"), recent.total(MINUTE)) == ([], 0)


def test_after_a_restart_what_ended_before_it_is_counted_and_nothing_twice(clock):
    began = clock.wall
    recent = Recent(clock)
    clock.move(5)
    recent.count("q")           # before the rest is read
    recent.load(ended_at(
        ("q", began - 0.001), ("q", began - 61), ("gone", began - 130), (None, began - 2),
        ("q", began + 5),       # counted already
        ("q", began + 500),     # the clock was set back since
        ("q", began - 3700)), bool)
    assert (recent.total(SECOND), recent.total(MINUTE)) == (3, 5)
    assert sum(recent.per_minute("q")) == 3 and recent.per_minute("q")[-1] == 2
    assert sum(recent.per_minute("gone")) == 1


def test_a_wall_clock_that_is_set_back_loses_and_doubles_nothing(clock):
    recent = Recent(clock)
    recent.count("q")
    clock.wall -= 86400
    recent.count("q")
    recent.load(ended_at(), bool)
    assert (recent.total(SECOND), recent.total(MINUTE)) == (2, 2)


def test_a_stop_does_not_wait_until_the_last_hour_is_read(clock):
    asked = []
    Recent(clock).load(lambda since, until: asked.append(since) or {}, lambda: len(asked) == 3)
    assert len(asked) == 3
