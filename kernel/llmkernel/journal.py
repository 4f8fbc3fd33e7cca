"""The journal: durable facts in order, in numbered preallocated segments.

Invariant: what a replay yields is a prefix of what was appended, and holds at least every record
whose `append` returned (the process died) or whose position was synced (the machine died).  One
process writes a folder at a time.

`append` is a copy into mapped memory.  Everything slow (making the next segment, fsync, deleting)
happens on one thread beside the caller.  Sealed segments are always synced there, in order; the
header of the segment behind notes it.  A bad record in front of such a note is damage and stops
the replay; without it, it is the tail that the sync policy may lose.

Source: write-ahead logging with preallocated segments as in PostgreSQL's WAL, chapter "WAL
Internals".
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError, invalid

from llmkernel import segments
from llmkernel.segments import Reading, Segment

SyncPolicy = Literal["never", "group", "always"]
POSITION_BITS: Final = 32
ROOM_RETRY_S: Final = 0.1  # a full disk is asked again so often
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a journal is kept."""

    sync: SyncPolicy = "group"
    """`group`: every SYNC_MS while something is new; `always`: at once; `never`: only whole
    segments."""
    bytes_max: int
    """All segments together, the prepared one too."""
    segment_bytes: int = limits.SEGMENT_BYTES
    reserve_bytes: int = limits.JOURNAL_RESERVE_BYTES
    """`room` says no when a next segment cannot be had and less than this is left in the current
    one."""
    on_synced: Callable[[int], None] | None = None
    """Called with every new `synced_position`, on the journal's own thread."""


def segment_of(position: int) -> int:
    """The segment that a position lies in."""
    return position >> POSITION_BITS


class Journal:
    """Appends records and deletes segments; see the module for what it promises."""

    def __init__(self, folder: Path, options: Options) -> None:
        """Only for `open`."""
        self._folder = folder
        self._options = options
        self._current: Segment | None = None
        self._spare: Segment | None = None
        self._sealed: list[Segment] = []
        self._numbers: list[int] = []
        self._blocked = False
        self._retry_at = 0.0
        self._failure: OSError | None = None
        self._drop_before = 0
        self._dirty = False
        self._whole = False
        self._closing = False
        self._lazy = options.sync == "never"
        self._condition = threading.Condition()
        self._spare_lock = (
            threading.Lock()
        )  # taken before the condition; held while a segment is made
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self.synced_position = 0
        """Everything up to here survives the machine."""
        self.replaying = 0
        """The segment of the payload that the replay yielded last."""
        self.notices: list[str] = []
        """What the replay found that a person should read."""

    @classmethod
    def open(cls, folder: Path, options: Options) -> tuple["Journal", Iterator[bytes]]:
        """The journal and its payloads so far, oldest first.  Nothing may be appended before the
        last one is taken.

        The replay raises RemoteError(INTERNAL), naming file and offset, where the journal is
        damaged.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in folder.glob(f"{segments.UNFINISHED}*"):
            leftover.unlink()
        journal = cls(folder, options)
        return journal, journal._replay()

    # --- writing ----------------------------------------------------------------------------------

    def append(self, payload: bytes) -> int:
        """Write one record and return the position behind it; it survives this process from here
        on.

        RemoteError: INVALID for a record that is empty or larger than RECORD_BYTES_MAX, EXHAUSTED
        without room.
        """
        segment = self._writable()
        end = segment.end + segments.RECORD_HEADER_BYTES + len(payload)
        if not payload or end > segment.limit or len(payload) > limits.RECORD_BYTES_MAX:
            segment = self._make_room(len(payload))
        segment.put(payload)
        if not self._dirty and not self._lazy:
            self._wake()
        return segment.number << POSITION_BITS | segment.end

    @property
    def position(self) -> int:
        """Behind the last record."""
        segment = self._writable()
        return segment.number << POSITION_BITS | segment.end

    def room(self) -> bool:
        """False when the disk or `bytes_max` refuses a next segment and the current one is down to
        the reserve."""
        if self._spare is not None or not self._blocked:
            return True
        segment = self._writable()
        return segment.limit - segment.end >= self._options.reserve_bytes

    @property
    def bytes_used(self) -> int:
        """What all segments take on disk."""
        return len(self._numbers) * self._options.segment_bytes

    @property
    def oldest(self) -> int:
        """The lowest segment that still stands."""
        return self._numbers[0]

    @property
    def can_mark(self) -> bool:
        """The next segment is there: `mark` cannot fail for want of room."""
        return self._spare is not None or self._writable().end == segments.HEADER_BYTES

    def mark(self) -> int:
        """The number of a segment that holds nothing yet; what is appended from now on stands
        there or later.

        RemoteError(EXHAUSTED) when there is no room for one.
        """
        segment = self._writable()
        return segment.number if segment.end == segments.HEADER_BYTES else self._advance().number

    def drop_before(self, number: int) -> None:
        """Delete every segment below this one, ascending, once all that is appended so far is on
        disk."""
        with self._condition:
            self._drop_before = max(self._drop_before, min(number, self._writable().number))
            self._dirty = self._whole = True
            self._condition.notify_all()

    def wait_synced(self, position: int) -> None:
        """Block until this position is on disk, whatever the policy."""
        with self._condition:
            self._dirty = self._whole = True
            self._condition.notify_all()
            while self.synced_position < position:
                self._check_failure()
                self._condition.wait()

    def close(self) -> None:
        """Write everything to disk and end the thread."""
        if self._current is None:
            return
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()
        self._current.sync()
        for segment in (*self._sealed, self._current, self._spare):
            if segment is not None:
                segment.close()

    def _writable(self) -> Segment:
        if self._failure is not None:
            self._check_failure()
        assert self._current is not None, "the replay has not been read to its end"
        return self._current

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise RemoteError(
                ErrorKind.INTERNAL,
                f"journal {self._folder} cannot be written: {self._failure}. Nothing after "
                f"position {self.synced_position} is known to be on disk; "
                "repair the disk, then start again",
            )

    def _wake(self) -> None:
        with self._condition:
            self._dirty = True
            self._condition.notify_all()

    def _make_room(self, payload_bytes: int) -> Segment:
        largest = min(
            limits.RECORD_BYTES_MAX,
            self._options.segment_bytes - segments.HEADER_BYTES - 2 * segments.RECORD_HEADER_BYTES,
        )
        if not 0 < payload_bytes <= largest:
            raise invalid(f"a record has 1 to {largest} bytes, this one {payload_bytes}")
        return self._advance()

    def _advance(self) -> Segment:
        """Seal the current segment and go on in the next, made here if the thread has not got to
        it."""
        old = self._writable()
        with self._spare_lock:
            try:
                new = self._spare or self._create(old.number + 1)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self._blocked = True
                raise self._exhausted(error) from None
            self._spare = None
            with self._condition:
                old.seal()
                self._sealed.append(old)
                self._current = new
                self._dirty = True
                self._condition.notify_all()
        return new

    def _exhausted(self, error: OSError) -> RemoteError:
        return RemoteError(
            ErrorKind.EXHAUSTED,
            f"journal {self._folder}: no room for a segment of {self._options.segment_bytes} bytes "
            f"beside {self.bytes_used} ({error.strerror}): free space there, or raise the limit",
            retry_after_ms=int(ROOM_RETRY_S * 1000),
        )

    def _create(self, number: int) -> Segment:
        if self.bytes_used + self._options.segment_bytes > self._options.bytes_max:
            raise OSError(errno.EDQUOT, f"at most {self._options.bytes_max} bytes are allowed")
        segment = Segment.create(self._folder, number, self._options.segment_bytes)
        self._numbers.append(number)
        return segment

    # --- replay -----------------------------------------------------------------------------------

    def _replay(self) -> Iterator[bytes]:
        self._numbers = segments.numbers_in(self._folder)
        for number, following in zip(self._numbers, self._numbers[1:]):
            if following != number + 1:
                path = segments.path_of(self._folder, number + 1)
                raise segments.damaged(path, 0, f"the file is missing, {following} is there")
        last: Reading | None = None
        for number in self._numbers:
            reading = Reading(segments.path_of(self._folder, number), number)
            if last is not None and not last.sealed:
                self._lose_tail(last)
                break
            self.replaying = number
            yield from reading.payloads()
            last = reading
        self._start(last)

    def _lose_tail(self, torn: Reading) -> None:
        """The machine died before the torn segment was on disk: what stands behind the tear never
        counted."""
        behind = [
            Reading(segments.path_of(self._folder, number), number)
            for number in self._numbers
            if number > torn.number
        ]
        if behind[0].previous_synced:
            raise segments.damaged(torn.path, torn.end, "no record, though it was on disk in whole")
        if dropped := [reading.number for reading in behind if not reading.empty]:
            self.notices.append(
                f"journal {torn.path} ends at byte {torn.end}, segments {dropped} behind it are "
                "dropped: the machine stopped before they were synced"
            )

    def _start(self, last: Reading | None) -> None:
        """Go on behind the last good record; everything that stands beyond it goes away, the
        highest first."""
        end = last.number if last is not None else 0
        prepared = self._delete_behind(end)
        if last is None or last.sealed:
            self._current = prepared or self._first(end + 1)
            before, noted = end, False
        else:
            self._current, self._spare = Segment(self._folder, end, last.end), prepared
            before, noted = end - 1, last.previous_synced
            if not last.clean:
                self.notices.append(f"{last.path}: torn tail behind byte {last.end} cleared")
                self._current.clear_tail()
        if before in self._numbers and not noted:
            self._sealed.append(Segment(self._folder, before))  # only to be synced
        self._dirty = True  # what a dead process wrote may not be on disk yet
        self._thread.start()

    def _delete_behind(self, end: int) -> Segment | None:
        """Delete what stands beyond the end, but for an empty segment right behind it."""
        kept = None
        for number in reversed([number for number in self._numbers if number > end]):
            path = segments.path_of(self._folder, number)
            reading = Reading(path, number)
            if number == end + 1 and reading.empty and not reading.previous_synced:
                kept = Segment(self._folder, number)
            else:
                path.unlink()
                self._numbers.remove(number)
        segments.sync_folder(self._folder)
        return kept

    def _first(self, number: int) -> Segment:
        try:
            return self._create(number)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise self._exhausted(error) from None

    # --- the thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        failure = OSError(errno.EIO, "its thread ended")
        try:
            while self._wait_for_work():
                self._prepare_spare()
                self._delete_before(self._sync())
        except OSError as error:
            failure = error
        finally:
            # A failed fsync may have lost pages for good: nothing more is written, the process
            # starts anew.
            with self._condition:
                if not self._closing:
                    self._failure = failure
                self._condition.notify_all()

    def _wait_for_work(self) -> bool:
        """Sleep until something is to do; False when the journal closes."""
        with self._condition:
            while not self._closing and not self._dirty:
                if self._spare is None and not self._blocked:
                    return True
                if not self._condition.wait(ROOM_RETRY_S if self._blocked else None):
                    return True  # ask for room again
            if self._options.sync == "group":
                # One sync takes all that is appended meanwhile.
                until = time.monotonic() + limits.SYNC_MS / 1000
                while not self._closing and (left := until - time.monotonic()) > 0:
                    self._condition.wait(left)
            return not self._closing

    def _prepare_spare(self) -> None:
        with self._spare_lock:
            assert self._current is not None
            if self._spare is not None or time.monotonic() < self._retry_at:
                return
            try:
                self._spare = self._create(self._current.number + 1)
                self._blocked = False
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self._blocked = True
                self._retry_at = time.monotonic() + ROOM_RETRY_S

    def _sync(self) -> int:
        """Put on disk what the policy asks for; the number below which segments may be deleted
        then."""
        with self._condition:
            if not self._dirty:
                return 0
            whole = self._whole or not self._lazy
            self._dirty = self._whole = False
            drop_before, self._drop_before = self._drop_before, 0
            current = self._current
            assert current is not None
            offset = current.end if whole else 0
            sealed = list(self._sealed)
        for segment, following in zip(sealed, [*sealed[1:], current]):
            segment.sync()
            following.note_previous_synced()
            segment.close()
        if whole:
            current.sync()
        with self._condition:
            del self._sealed[: len(sealed)]
            self.synced_position = current.number << POSITION_BITS | offset
            self._condition.notify_all()
        if self._options.on_synced is not None:
            self._options.on_synced(self.synced_position)
        return drop_before

    def _delete_before(self, number: int) -> None:
        while self._numbers[0] < number:
            segments.path_of(self._folder, self._numbers[0]).unlink()
            segments.sync_folder(self._folder)
            del self._numbers[0]
            self._retry_at = 0.0
