"""What a process was computing when it died: a small mapped file that survives it.

Format: a little-endian u32 count, then for each thread its 8 bytes and its position as u64.  The
count is written last and is 0 while rows change, so that a torn note names nobody.
"""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_COUNT: Final = struct.Struct("<I")
_ROW: Final = struct.Struct("<8sQ")
ROWS_MAX: Final = 16_384
"""Threads in one step at most: limits.THREADS_MAX, all that there may be."""


class CrashNote:
    """The writer's side; one for each incarnation of a process."""

    def __init__(self, path: Path) -> None:
        with path.open("wb+") as file:
            file.truncate(_COUNT.size + ROWS_MAX * _ROW.size)
            self._map = mmap.mmap(file.fileno(), 0)

    def write(self, rows: Sequence[tuple[bytes, int]]) -> None:
        """These are being computed from now on."""
        _COUNT.pack_into(self._map, 0, 0)
        at = _COUNT.size
        for thread, position in rows[:ROWS_MAX]:
            _ROW.pack_into(self._map, at, thread, position)
            at += _ROW.size
        _COUNT.pack_into(self._map, 0, min(len(rows), ROWS_MAX))

    def clear(self) -> None:
        """Nothing is being computed."""
        _COUNT.pack_into(self._map, 0, 0)


def read_note(path: Path) -> list[tuple[bytes, int]]:
    """The rows of a dead process's note; nothing where there is none or it is torn."""
    try:
        note = path.read_bytes()
    except OSError:
        return []
    if len(note) < _COUNT.size:
        return []
    (count,) = _COUNT.unpack_from(note)
    end = _COUNT.size + count * _ROW.size
    if count > ROWS_MAX or end > len(note):
        return []
    return [(thread, position) for thread, position in _ROW.iter_unpack(note[_COUNT.size : end])]
