"""Keeps the journal short: what is live is said again at its head, a slice at a time, and then what
lies before is deleted.

Invariant: until the last live fact is written nothing is deleted, so a death at any point leaves a
journal that replays to the same state.
"""

from collections.abc import Iterator
from typing import Final

from llmproto.errors import ErrorKind, RemoteError

from llmkernel import facts
from llmkernel.facts import AnyFact
from llmkernel.journal import Journal
from llmkernel.state import State

BEGIN_BYTES: Final = 12 << 20
"""A journal below this is left alone: it replays in well under a second."""
SLICE_FACTS: Final = 64
SLICE_BYTES: Final = 256 << 10
"""One slice is over in about a millisecond, so that it delays no message for long."""


class Compaction:
    """One at a time, for ever."""

    def __init__(
        self,
        journal: Journal,
        state: State,
        *,
        begin_bytes: int = BEGIN_BYTES,
        journal_bytes_max: int | None = None,
    ) -> None:
        """`journal_bytes_max`: rewriting needs room beside what is rewritten, so it begins at half
        of that at the latest."""
        self._journal = journal
        self._state = state
        self._bytes_max = journal_bytes_max
        if journal_bytes_max is not None:
            begin_bytes = min(begin_bytes, journal_bytes_max // 4)
        self._begin_bytes = begin_bytes
        self._head = 0
        self._live: Iterator[AnyFact] | None = None
        self._unwritten: bytes | None = None
        """A fact for which there was no room."""
        self._written_bytes = 0
        self._live_bytes = 0
        """What was live the last time."""

    @property
    def running(self) -> bool:
        """Between the first live fact and the last."""
        return self._live is not None

    @property
    def _threshold_bytes(self) -> int:
        twice = 2 * self._live_bytes
        if self._bytes_max is not None:
            twice = min(twice, self._bytes_max // 2)
        return max(self._begin_bytes + self._live_bytes, twice)

    def step(self) -> bool:
        """Write a slice, if it is time; True while more is to be written."""
        try:
            return self._step()
        except RemoteError as error:
            if error.kind is not ErrorKind.EXHAUSTED:
                raise
            return False  # it goes on when there is room

    def _step(self) -> bool:
        if self._live is None:
            if self._journal.bytes_used <= self._threshold_bytes:
                return False
            self._head = self._journal.mark()
            self._live = self._state.live()
            self._written_bytes = 0
        slice_bytes = 0
        for _ in range(SLICE_FACTS):
            if self._unwritten is None:
                fact = next(self._live, None)
                if fact is None:
                    self._finish()
                    return False
                self._unwritten = facts.encode(fact)
            self._journal.append(self._unwritten)
            slice_bytes += len(self._unwritten)
            self._unwritten = None
            if slice_bytes >= SLICE_BYTES:
                break
        self._written_bytes += slice_bytes
        return True

    def _finish(self) -> None:
        self._journal.drop_before(self._head)
        self._live_bytes = self._written_bytes
        self._live = None
