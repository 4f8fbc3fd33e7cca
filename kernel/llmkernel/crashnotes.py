"""What an executor was computing when it died: a small mapped file that survives it.

Format: a little-endian u32 count, then for each thread its 8 bytes and its position as u64.  The
count is written last and set to 0 while rows change, so that a torn note names nobody.
"""

import struct
from pathlib import Path
from typing import Final

from llmkernel.events import Suspect

_COUNT: Final = struct.Struct("<I")
_ROW: Final = struct.Struct("<8sQ")
ROWS_MAX: Final = 65_536


def read_note(path: Path) -> tuple[Suspect, ...]:
    """The rows of a note, which is then removed; nothing where there is none or it is torn."""
    try:
        note = path.read_bytes()
        path.unlink()
    except OSError:
        return ()
    if len(note) < _COUNT.size:
        return ()
    (count,) = _COUNT.unpack_from(note)
    end = _COUNT.size + count * _ROW.size
    if count > ROWS_MAX or end > len(note):
        return ()
    rows = _ROW.iter_unpack(note[_COUNT.size : end])
    return tuple(Suspect(thread, position) for thread, position in rows)
