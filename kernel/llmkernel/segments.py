"""One file of the journal: its format, and how one is made, read and opened for writing.

A segment is preallocated and mapped, so that a record is written by a copy into memory: it
survives the death of its process without a system call.  All numbers are little-endian.

    header   magic 8, format u32, reserved u32, number u64, created u64 (ns since 1970), crc32 of
             those u32, previous_synced u8 (set once the segment before it is known to be on disk),
             zeros up to 64
    record   crc32 u32, length u32, payload;  the crc starts from a value made of segment number
             and length, so that bytes of another segment are never a record of this one
    seal     like a record with the length 0xFFFFFFFF and no payload: the segment was ended in order
    zeros    nothing written yet
"""

import errno
import mmap
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llmproto.errors import ErrorKind, RemoteError

MAGIC: Final = b"llmosJNL"
FORMAT: Final = 1
HEADER_BYTES: Final = 64
RECORD_HEADER_BYTES: Final = 8
SEAL_LENGTH: Final = 0xFFFF_FFFF
UNFINISHED: Final = "unfinished-"
_HEADER: Final = struct.Struct("<8sIIQQ")
_CRC: Final = struct.Struct("<I")
_RECORD: Final = struct.Struct("<II")
_SYNCED_AT: Final = _HEADER.size + _CRC.size
_NAME: Final = re.compile(r"segment-(\d{16})")

_datasync: Final = os.fdatasync if hasattr(os, "fdatasync") else os.fsync


def path_of(folder: Path, number: int) -> Path:
    """Where the segment of this number stands; names sort like numbers."""
    return folder / f"segment-{number:016d}"


def numbers_in(folder: Path) -> list[int]:
    """The segments of a folder, ascending."""
    found = (_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def seed_of(number: int) -> int:
    """What every crc of this segment starts from."""
    return zlib.crc32(number.to_bytes(8, "little"))


def pack_record(payload: bytes, seed: int) -> bytes:
    """The 8 bytes in front of a payload."""
    length = len(payload)
    return _RECORD.pack(zlib.crc32(payload, seed + length), length)


def pack_seal(seed: int) -> bytes:
    """The mark behind the last record of an ended segment."""
    return _RECORD.pack(zlib.crc32(b"", seed + SEAL_LENGTH), SEAL_LENGTH)


def pack_header(number: int, created_ns: int) -> bytes:
    """The first 64 bytes."""
    fixed = _HEADER.pack(MAGIC, FORMAT, 0, number, created_ns)
    return (fixed + _CRC.pack(zlib.crc32(fixed))).ljust(HEADER_BYTES, b"\0")


def damaged(path: Path, offset: int, what: str) -> RemoteError:
    """What is raised where the journal cannot be trusted."""
    return RemoteError(
        ErrorKind.INTERNAL,
        f"journal {path} is damaged at byte {offset}: {what}. Restore the file from a copy; or, "
        "giving up every accepted thread, move the journal folder away and start anew",
    )


class Reading:
    """The records of one segment as they stand on disk, and how they end."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.number = number
        self._data = path.read_bytes()
        self.end = HEADER_BYTES
        """Behind the last good record, once `payloads` is exhausted."""
        self.sealed = False
        self._check_header()

    @property
    def empty(self) -> bool:
        """Nothing was ever written behind the header."""
        return not any(self._data[HEADER_BYTES : HEADER_BYTES + RECORD_HEADER_BYTES])

    @property
    def previous_synced(self) -> bool:
        """The segment before this one was known to be on disk."""
        return self._data[_SYNCED_AT] == 1

    @property
    def clean(self) -> bool:
        """Behind the good records there is only the seal or nothing at all."""
        return self.sealed or not self._data[self.end :].strip(b"\0")

    def payloads(self) -> Iterator[bytes]:
        """Each payload up to the first thing that is no record."""
        data, seed = self._data, seed_of(self.number)
        at, last = HEADER_BYTES, len(self._data) - RECORD_HEADER_BYTES
        crc32, unpack = zlib.crc32, _RECORD.unpack_from  # crc32 takes its start modulo 2^32
        while at <= last:
            crc, length = unpack(data, at)
            if length == SEAL_LENGTH:
                self.sealed = data[at : at + RECORD_HEADER_BYTES] == pack_seal(seed)
                break
            start = at + RECORD_HEADER_BYTES
            end = start + length
            payload = data[start:end]
            if crc != crc32(payload, seed + length) or not payload or end > len(data):
                break
            at = end
            yield payload
        self.end = at

    def _check_header(self) -> None:
        if len(self._data) < HEADER_BYTES:
            raise damaged(self.path, len(self._data), f"a header has {HEADER_BYTES} bytes")
        magic, version, _, number, _ = _HEADER.unpack_from(self._data)
        (crc,) = _CRC.unpack_from(self._data, _HEADER.size)
        if magic != MAGIC or crc != zlib.crc32(self._data[: _HEADER.size]):
            raise damaged(self.path, 0, "the header is not one of a journal")
        if version > FORMAT:
            raise RemoteError(
                ErrorKind.INTERNAL,
                f"journal {self.path} has format {version}, this program reads up to {FORMAT}: "
                "use the newer program",
            )
        if number != self.number:
            raise damaged(self.path, 0, f"it says number {number} and is named {self.number}")


class Segment:
    """A segment mapped for writing.  Invariant: everything from `end` on is zero."""

    def __init__(self, folder: Path, number: int, end: int = HEADER_BYTES) -> None:
        self.path = path_of(folder, number)
        self.number = number
        self.seed = seed_of(number)
        self.end = end
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self.bytes = os.fstat(self._descriptor).st_size
        self.map = mmap.mmap(self._descriptor, self.bytes)
        self.limit = self.bytes - RECORD_HEADER_BYTES
        """Records end here at the latest; the seal fits behind."""

    @classmethod
    def create(cls, folder: Path, number: int, bytes_total: int) -> "Segment":
        """A new, empty segment, on disk with its name before this returns.  OSError where there is
        no room."""
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=UNFINISHED)
        try:
            with os.fdopen(descriptor, "r+b") as file:
                _allocate(file.fileno(), bytes_total)
                os.pwrite(file.fileno(), pack_header(number, time.time_ns()), 0)
                os.fsync(file.fileno())
            os.rename(name, path_of(folder, number))
        except OSError:
            os.unlink(name)
            raise
        sync_folder(folder)
        return cls(folder, number)

    def put(self, payload: bytes) -> None:
        """Write a record that fits.  Its header goes last: a death in between leaves no record."""
        start = self.end
        at = start + RECORD_HEADER_BYTES
        end = at + len(payload)
        self.map[at:end] = payload
        self.map[start:at] = pack_record(payload, self.seed)
        self.end = end

    def seal(self) -> None:
        """End the segment in order."""
        self.map[self.end : self.end + RECORD_HEADER_BYTES] = pack_seal(self.seed)

    def clear_tail(self) -> None:
        """Zero what a torn write left behind `end`, so that it can never follow a new record."""
        self.map[self.end :] = bytes(self.bytes - self.end)
        self.sync()

    def note_previous_synced(self) -> None:
        """From now on a bad record in the segment before is damage, not an unsynced tail."""
        self.map[_SYNCED_AT] = 1

    def sync(self) -> None:
        """Return when everything written so far is on disk."""
        _datasync(self._descriptor)

    def close(self) -> None:
        """Unmap; the file stays."""
        if not self.map.closed:
            self.map.close()
            os.close(self._descriptor)


def sync_folder(folder: Path) -> None:
    """Make names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, bytes_total: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, bytes_total)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    zeros = bytes(1 << 20)
    for at in range(0, bytes_total, len(zeros)):
        part = zeros[: bytes_total - at]
        written = os.pwrite(descriptor, part, at)
        if written != len(part):  # the last bytes of a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
