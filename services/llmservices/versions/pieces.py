"""Reads objects of a store, comparing every byte with the name of the object it came from."""

import os
from pathlib import Path
from typing import Final

from blake3 import blake3
from llmproto.errors import RemoteError

from llmservices.versions.manifest import (
    PIECE_BYTES,
    GroupEntry,
    PieceEntry,
    TensorEntry,
    damaged,
    hash_bytes,
    object_path,
    store_of,
)

CHUNK_BYTES: Final = 1 << 20
"""Read and hashed at once: it is still in the processor's cache when it is hashed."""
THREADS_MAX: Final = 4
"""More do not read faster: memory is the limit."""


def threads_allowed() -> int:
    """How many threads this process may read and hash with: its cores, at most THREADS_MAX."""
    if hasattr(os, "sched_getaffinity"):
        return min(THREADS_MAX, len(os.sched_getaffinity(0)))
    return min(THREADS_MAX, os.cpu_count() or 1)


def fill(path: Path, name: str, view: memoryview, *, offset: int | None = None) -> str | None:
    """Read the object into `view`, which has its size, or (`offset`) a part of it that has this
    BLAKE3; what is wrong with it, or None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    hasher = blake3()
    try:
        found = os.fstat(fd).st_size
        if offset is None and found != len(view):
            return f"has {found} bytes instead of {len(view)}"
        first = offset or 0
        at = 0
        while at < len(view):
            chunk = view[at : at + CHUNK_BYTES]
            got = os.preadv(fd, [chunk], first + at)
            if not got:
                return f"ends at byte {first + at} of {first + len(view)}"
            hasher.update(chunk[:got])
            at += got
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    finally:
        os.close(fd)
    return None if hasher.hexdigest() == name else "its content has another BLAKE3 than its name"


def check(path: Path, name: str, length: int, buffer: bytearray) -> str | None:
    """As `fill`, for the comparison alone; the buffer has PIECE_BYTES or more."""
    if length <= len(buffer):
        return fill(path, name, memoryview(buffer)[:length])
    try:
        content = path.read_bytes()  # a small file that is larger than a piece
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if len(content) != length:
        return f"has {len(content)} bytes instead of {length}"
    return None if hash_bytes(content) == name else "its content has another BLAKE3 than its name"


def new_buffer() -> bytearray:
    """Room for one piece."""
    return bytearray(PIECE_BYTES)


class Piece:
    """One piece of a tensor of a version, to be read and compared."""

    __slots__ = ("_entry", "_folder", "_group", "_tensor")

    def __init__(
        self, folder: Path, group: GroupEntry, tensor: TensorEntry, entry: PieceEntry
    ) -> None:
        self._folder = folder
        self._group = group
        self._tensor = tensor
        self._entry = entry

    @property
    def offset(self) -> int:
        """In the tensor."""
        return self._entry.at

    @property
    def length(self) -> int:
        return self._entry.size_bytes

    @property
    def path(self) -> Path:
        return object_path(store_of(self._folder), self._entry.object)

    def read(self, view: memoryview) -> None:
        """Fill `view`; INVALID, naming version, file, tensor and object, where it is damaged."""
        entry = self._entry
        part = entry.offset if self._tensor.pack is not None else None
        wrong = fill(self.path, entry.digest, view, offset=part)
        if wrong is not None:
            raise self.error(wrong)

    def error(self, wrong: str) -> RemoteError:
        return damaged(
            self._folder,
            self._group.file,
            f"tensor {self._tensor.name} at byte {self.offset}: object {self.path} {wrong}",
        )


def pieces_of(folder: Path, group: GroupEntry, tensor: TensorEntry) -> list[Piece]:
    """All pieces of a tensor."""
    return [Piece(folder, group, tensor, entry) for entry in tensor.pieces()]
