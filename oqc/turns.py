"""Whose turn it is: the queue of the jobs that are due, from which each runtime takes the next.

A runtime takes, among the jobs that it may run: of the highest priority; within it the submitters
take turns, next is whom this runtime served longest ago; of one submitter the oldest job.
"""
import bisect
import collections
import heapq
import queue
from array import array
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

from oqc.jobs import Queued

TIDY = 1000                         # taken places at the beginning of a lane that it forgets
Kind = Tuple[str, Optional[str]]    # a mode, and the runtime that was asked for


class Lane:
    """The ids of jobs of one mode, the oldest first: 8 bytes each."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._ids = array("q")          # ascending; those before _head are taken
        self._head = 0
        self._back: List[int] = []      # a heap: ids older than the head that have come back

    def __len__(self) -> int:
        return len(self._ids) - self._head + len(self._back)

    def add(self, number: int) -> None:
        """Add an id that is not in the lane."""
        if not self._ids or number > self._ids[-1]:
            self._ids.append(number)
        elif self._head < len(self._ids) and number > self._ids[self._head]:
            bisect.insort(self._ids, number, self._head)
        else:
            heapq.heappush(self._back, number)

    def first(self) -> int:
        """Return the oldest id; the lane must not be empty."""
        if self._back:
            return self._back[0]
        return self._ids[self._head]

    def take(self) -> int:
        """Return the oldest id and take it out; the lane must not be empty."""
        if self._back:
            return heapq.heappop(self._back)
        number = self._ids[self._head]
        self._head += 1
        if self._head > TIDY and self._head > len(self._ids) // 2:
            del self._ids[:self._head]
            self._head = 0
        return number

    def remove(self, numbers: Iterable[int]) -> Set[int]:
        """Take ids out; return those that were in the lane.

        To take one out moves all that are younger, 0.3 ms of a million: so ids that stand beside
        each other, as those of a sweep do, go at once.
        """
        removed = set()
        begin = end = len(self._ids)        # of those that are found, and not taken out yet
        for number in sorted(numbers, reverse=True):
            place = bisect.bisect_left(self._ids, number, self._head, begin)
            if place < begin and self._ids[place] == number:
                if place + 1 < begin:
                    del self._ids[begin:end]
                    end = place + 1
                begin = place
                removed.add(number)
            elif number in self._back:
                self._back.remove(number)
                heapq.heapify(self._back)
                removed.add(number)
        del self._ids[begin:end]
        return removed

    def before(self, number: int) -> int:
        """Return how many ids are older than this one."""
        behind_head = bisect.bisect_left(self._ids, number, self._head) - self._head
        back = sum(one < number for one in self._back)
        return behind_head + back


class _Turns:
    """Whose turn it is on one runtime at one priority."""

    def __init__(self) -> None:
        # (count of takes when it was served last, its place among all submitters, its name)
        self.heap: List[Tuple[int, int, str]] = []
        self.present: Set[str] = set()      # who is in the heap


class _Runtime:
    """What the queue knows of a runtime: what it may run, and whom it served when."""

    def __init__(self, name: str, modes: Sequence[str]) -> None:
        self.kinds = frozenset((mode, asked) for mode in modes for asked in (None, name))
        # {(submitter, priority): the count of takes when it was served last}
        self.served: Dict[Tuple[str, int], int] = {}
        self.takes = 0
        self.turns: Dict[int, _Turns] = {}      # by priority


class TurnQueue(queue.Queue):       # type: ignore[type-arg,unused-ignore]
    """The jobs that are due. `take` is for any thread, as `put` and `qsize` are; `get` takes for
    the first runtime that may run one."""

    def __init__(self, runtimes: Dict[str, Sequence[str]]) -> None:
        """`runtimes`: {name: modes}."""
        self._modes = runtimes
        super().__init__()

    # What queue.Queue calls, holding its mutex

    def _init(self, maxsize: int) -> None:
        self._runtimes = {name: _Runtime(name, modes) for name, modes in self._modes.items()}
        # {(submitter, priority): {(mode, runtime that was asked for): lane}}
        self._lanes: Dict[Tuple[str, int], Dict[Kind, Lane]] = {}
        self._seen: Dict[str, int] = {}         # {submitter: its place among all, the first is 0}
        self._counts = collections.Counter()    # {mode: how many jobs}

    def _qsize(self) -> int:
        return sum(self._counts.values())

    def _put(self, item: Queued) -> None:
        submitter = item.submitter
        kind = (item.mode, item.runtime)
        lanes = self._lanes.setdefault((submitter, item.priority), {})
        lane = lanes.get(kind)
        if lane is None:
            lane = lanes[kind] = Lane(item.mode)
        lane.add(item.id)
        self._counts[item.mode] += 1
        self._seen.setdefault(submitter, len(self._seen))
        for runtime in self._runtimes.values():
            if kind in runtime.kinds:
                turns = runtime.turns.get(item.priority)
                if turns is None:
                    turns = runtime.turns[item.priority] = _Turns()
                if submitter not in turns.present:
                    turns.present.add(submitter)
                    turn = self._turn(runtime, submitter, item.priority)
                    heapq.heappush(turns.heap, turn)

    def _get(self) -> int:
        for runtime in self._runtimes.values():
            number = self._take(runtime)
            if number is not None:
                return number
        raise queue.Empty

    # Beyond queue.Queue

    def take(self, runtime: str) -> Optional[int]:
        """Return the id of the job that this runtime is to run next, and take it out; None if there
        is none for it."""
        with self.mutex:
            return self._take(self._runtimes[runtime])

    def remove(self, jobs: Iterable[Queued]) -> Set[int]:
        """Take jobs out; return the ids of those that were in the queue."""
        alike: Dict[Queued, List[int]] = collections.defaultdict(list)
        for job in jobs:
            alike[job._replace(id=0)].append(job.id)
        removed: Set[int] = set()
        with self.mutex:
            for job, numbers in alike.items():
                lanes = self._lanes.get((job.submitter, job.priority), {})
                lane = lanes.get((job.mode, job.runtime))
                if lane is not None:
                    found = lane.remove(numbers)
                    self._counts[job.mode] -= len(found)
                    removed |= found
        return removed

    def count(self, mode: str) -> int:
        """Return how many jobs of this mode are in the queue."""
        return self._counts[mode]

    def waiting(self) -> Dict[Kind, int]:
        """Return {(mode, runtime that was asked for): how many jobs}."""
        counts: Dict[Kind, int] = collections.Counter()
        with self.mutex:
            for lanes in self._lanes.values():
                for kind, lane in lanes.items():
                    counts[kind] += len(lane)
        return counts

    def ahead(self, job: Queued, runtime: str) -> int:
        """Return how many jobs this runtime would take before one in the queue, if no other came
        and no other runtime took any."""
        with self.mutex:
            server = self._runtimes[runtime]
            own = sum(lane.before(job.id)
                      for lane in self._lanes_for(server, job.submitter, job.priority))
            turn = self._turn(server, job.submitter, job.priority)
            ahead = own
            for submitter, priority in self._lanes:
                count = sum(map(len, self._lanes_for(server, submitter, priority)))
                if priority == job.priority and submitter != job.submitter:
                    # As many turns as it has before that one, and one more if it is the first.
                    goes_first = self._turn(server, submitter, priority) < turn
                    ahead += min(count, own + goes_first)
                elif priority > job.priority:
                    ahead += count
            return ahead

    def _take(self, runtime: _Runtime) -> Optional[int]:
        for priority in sorted(runtime.turns, reverse=True):
            number = self._take_at(runtime, priority)
            if number is not None:
                return number
            del runtime.turns[priority]
        return None

    def _take_at(self, runtime: _Runtime, priority: int) -> Optional[int]:
        """Take a job of this priority; return None if there is none."""
        turns = runtime.turns[priority]
        while turns.heap:
            _, _, submitter = turns.heap[0]
            lanes = self._lanes_for(runtime, submitter, priority)
            if not lanes:               # another runtime took them, or they were removed
                heapq.heappop(turns.heap)
                turns.present.remove(submitter)
            else:
                lane = min(lanes, key=Lane.first)
                runtime.takes += 1
                runtime.served[submitter, priority] = runtime.takes
                heapq.heapreplace(turns.heap, self._turn(runtime, submitter, priority))
                self._counts[lane.mode] -= 1
                return lane.take()
        return None

    def _lanes_for(self, runtime: _Runtime, submitter: str, priority: int) -> List[Lane]:
        """Return the lanes of a submitter that have a job for this runtime."""
        lanes = self._lanes.get((submitter, priority), {})
        return [lane for kind, lane in lanes.items() if kind in runtime.kinds and len(lane)]

    def _turn(self, runtime: _Runtime, submitter: str, priority: int) -> Tuple[int, int, str]:
        """Return what submitters are ordered by: who was served longest ago is the least."""
        served = runtime.served.get((submitter, priority), 0)
        place = self._seen.get(submitter, len(self._seen))      # the first job is on its way here
        return served, place, submitter
