"""Which thread runs next: the queue, and the pure functions that order it.

The order is class, then priority, then age.  Fair share between tenants enters in `urgency` and
nowhere else: a smaller value runs first.
"""

import heapq
from collections.abc import Iterable, Iterator

from llmkernel.threads import Thread

Urgency = tuple[int, int, int, bytes]
HEAP_SLACK = 64


def urgency(thread: Thread) -> Urgency:
    """The sort key of a waiting thread; smaller runs first, and no two are equal."""
    return (thread.service_class, -thread.priority, thread.admitted_ns, thread.id)


def victim(residents: Iterable[Thread], candidate: Thread) -> Thread | None:
    """The resident that should make room for a waiting thread: the least urgent one of a strictly
    lower class, or nobody."""
    worst = max(residents, key=urgency, default=None)  # bounded by residents_max
    if worst is not None and worst.service_class > candidate.service_class:
        return worst
    return None


class Queue:
    """Threads that wait for a place, by model, the most urgent first.

    Invariant: a thread is in at most one heap entry that counts; entries of threads that left, or
    moved to another model, are skipped when they surface.
    """

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[Urgency, Thread]]] = {}
        self._waiting: dict[bytes, Urgency] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, thread: Thread) -> bool:
        return thread.id in self._waiting

    @property
    def entries(self) -> int:
        """What is kept in all, entries of threads that left included."""
        return sum(map(len, self._heaps.values()))

    def push(self, thread: Thread) -> None:
        """It wants to run; pushing again after a renice moves it."""
        key = urgency(thread)
        if self._waiting.get(thread.id) == key:
            return
        self._waiting[thread.id] = key
        heap = self._heaps.setdefault(thread.model, [])
        if len(heap) > 2 * len(self._waiting) + HEAP_SLACK:
            self._shrink(heap)
        heapq.heappush(heap, (key, thread))

    def _shrink(self, heap: list[tuple[Urgency, Thread]]) -> None:
        """Threads that come and go without ever surfacing leave entries behind."""
        living = {key: thread for key, thread in heap if self._waiting.get(thread.id) == key}
        heap[:] = sorted(living.items())

    def remove(self, thread: Thread) -> None:
        """It does not want to run any more, or was placed."""
        self._waiting.pop(thread.id, None)

    def models(self) -> list[str]:
        """Models that somebody waits for."""
        return [model for model in list(self._heaps) if self.first(model) is not None]

    def first(self, model: str) -> Thread | None:
        """The most urgent thread that waits for this model."""
        return next(self.waiting(model), None)

    def waiting(self, model: str) -> Iterator[Thread]:
        """Pops the threads of a model, most urgent first, as long as the caller removes each one
        that it takes; a thread that is left in stays and ends the iteration."""
        heap = self._heaps.get(model)
        while heap:
            key, thread = heap[0]
            if self._waiting.get(thread.id) != key or thread.model != model:
                heapq.heappop(heap)
                continue
            yield thread
            if self._waiting.get(thread.id) == key and thread.model == model:
                return
        self._heaps.pop(model, None)

    def all_waiting(self, model: str) -> list[Thread]:
        """Every thread that waits for a model, in order."""
        heap = self._heaps.get(model, [])
        living = {key: t for key, t in heap if self._waiting.get(t.id) == key and t.model == model}
        return [living[key] for key in sorted(living)]
