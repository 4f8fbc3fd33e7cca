"""Many due times, of which the earliest is wanted.

Owns when a session must be woken. Most timers are moved later before they fire (a row arrives: the
stream is not silent), so that moving one later only writes a dict entry.
"""

import heapq
from typing import Final, NamedTuple

HEAP_SLACK: Final = 64


class Timer(NamedTuple):
    """What is due: a word for what, and of whom."""

    what: str
    whose: bytes = b""


class Timers:
    """Due times by key.

    Invariant: every key has a heap entry no later than its due time; entries of other times are
    stale.
    """

    def __init__(self) -> None:
        self._due_ns: dict[Timer, int] = {}
        self._queued_ns: dict[Timer, int] = {}
        self._heap: list[tuple[int, Timer]] = []

    def set(self, timer: Timer, at_ns: int) -> None:
        """Be woken for this at that time, and not at an earlier one."""
        self._due_ns[timer] = at_ns
        queued_ns = self._queued_ns.get(timer)
        if queued_ns is None or at_ns < queued_ns:
            self._queue(timer, at_ns)

    def drop(self, timer: Timer) -> None:
        """Never mind; a timer that is not set is no error."""
        self._due_ns.pop(timer, None)
        if len(self._heap) > 2 * len(self._due_ns) + HEAP_SLACK:
            self._rebuild()

    def is_set(self, timer: Timer) -> bool:
        """Whether it will fire."""
        return timer in self._due_ns

    def next_ns(self) -> int | None:
        """When the earliest is due."""
        while self._heap:
            at_ns, timer = self._heap[0]
            due_ns = self._due_ns.get(timer)
            if due_ns == at_ns:
                return at_ns
            heapq.heappop(self._heap)
            if self._queued_ns.get(timer) == at_ns:
                del self._queued_ns[timer]
                if due_ns is not None:
                    self._queue(timer, due_ns)
        return None

    def take_due(self, now_ns: int) -> list[Timer]:
        """Those due by now, in order of time; they are no longer set."""
        taken = []
        while (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            _, timer = heapq.heappop(self._heap)
            del self._due_ns[timer], self._queued_ns[timer]
            taken.append(timer)
        return taken

    def check(self) -> None:
        """Assert the invariant in full."""
        entries = set(self._heap)
        for timer, due_ns in self._due_ns.items():
            queued_ns = self._queued_ns[timer]
            assert queued_ns <= due_ns, timer
            assert (queued_ns, timer) in entries, timer
        assert len(self._heap) <= 4 * len(self._due_ns) + 4 * HEAP_SLACK

    def _queue(self, timer: Timer, at_ns: int) -> None:
        self._queued_ns[timer] = at_ns
        heapq.heappush(self._heap, (at_ns, timer))
        if len(self._heap) > 2 * len(self._due_ns) + HEAP_SLACK:
            self._rebuild()

    def _rebuild(self) -> None:
        self._queued_ns = dict(self._due_ns)
        self._heap = [(at_ns, timer) for timer, at_ns in self._due_ns.items()]
        heapq.heapify(self._heap)
