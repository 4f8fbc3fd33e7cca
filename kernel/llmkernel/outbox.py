"""What leaves the kernel, and what it depends on: nothing leaves before the facts in front of it
are safe.

Invariant: messages leave in the order in which they were given, and each behind every record that
was given before it.  Safe means written, or on disk where the policy is `always`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from llmproto.errors import ErrorKind, RemoteError

from llmkernel.journal import Journal

Frames = tuple[bytes, ...]
HELD_MAX: Final = 65_536
"""Messages that wait for the disk.  Beyond it the kernel ends and starts anew from its journal:
nobody was told anything that is not in it."""
HELD_BYTES_MAX: Final = 256 << 20
"""The same, of their bytes."""


class Outbox:
    """Records in, messages out."""

    def __init__(
        self, journal: Journal, deliver: Callable[[bytes, Frames], None], *, wait_for_sync: bool
    ) -> None:
        """`deliver` gets a connection and the frames for it."""
        self._journal = journal
        self._deliver = deliver
        self._wait_for_sync = wait_for_sync
        self._given = 0
        """Records so far; their numbers are what messages wait for."""
        self._safe = 0
        self._unwritten: deque[tuple[int, bytes]] = deque()
        """Records for which the journal had no room, in order."""
        self._unsynced: deque[tuple[int, int]] = deque()
        """Number of a record, and the position behind it (`always` only)."""
        self._held: deque[tuple[int, bytes, Frames]] = deque()
        self._held_bytes = 0

    @property
    def stuck(self) -> bool:
        """The journal lacks something that was decided already."""
        return bool(self._unwritten)

    @property
    def held(self) -> int:
        """Messages that wait."""
        return len(self._held)

    def record(self, records: Sequence[bytes]) -> None:
        """Journal these; what is sent from now on depends on them."""
        for record in records:
            self._given += 1
            self._unwritten.append((self._given, record))
        if records:
            self._write()

    def send(self, peer: bytes, frames: Frames) -> None:
        """Send, now or when everything in front of it is safe."""
        if self._safe == self._given:
            self._deliver(peer, frames)
            return
        self._held_bytes += sum(map(len, frames))
        waiting = f"{len(self._held)} messages, {self._held_bytes} bytes, wait for the disk"
        assert len(self._held) < HELD_MAX and self._held_bytes < HELD_BYTES_MAX, waiting
        self._held.append((self._given, peer, frames))

    def retry(self) -> None:
        """There may be room again."""
        if self._unwritten:
            self._write()

    def synced(self, position: int) -> None:
        """The journal is on disk up to here."""
        while self._unsynced and self._unsynced[0][1] <= position:
            self._safe = self._unsynced.popleft()[0]
        self._release()

    def _write(self) -> None:
        while self._unwritten:
            number, record = self._unwritten[0]
            try:
                position = self._journal.append(record)
            except RemoteError as error:
                if error.kind is not ErrorKind.EXHAUSTED:
                    raise
                return
            self._unwritten.popleft()
            if self._wait_for_sync:
                self._unsynced.append((number, position))
            else:
                self._safe = number
        self._release()

    def _release(self) -> None:
        while self._held and self._held[0][0] <= self._safe:
            _, peer, frames = self._held.popleft()
            self._held_bytes -= sum(map(len, frames))
            self._deliver(peer, frames)
