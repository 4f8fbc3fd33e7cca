"""Init's own log lines, and the size of everybody's log files."""

import datetime
import os
import shutil
from pathlib import Path
from typing import Final

import msgspec

LOG_BYTES_MAX: Final = 16 << 20
KEPT: Final = 2
"""Older files beside the current one: NAME.1 and NAME.2."""


class Log:
    """One JSON object a line on standard error, in the fields that all processes use."""

    def info(self, event: str, **fields: str | int | None) -> None:
        """Something happened."""
        self._write("info", event, fields)

    def error(self, event: str, **fields: str | int | None) -> None:
        """Something happened that should not have."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, str | int | None]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat()
        line = {"event": event, "level": level, "timestamp": now, "process": "init", **fields}
        try:
            os.write(2, msgspec.json.encode(line) + b"\n")
        except OSError:  # a full disk or a closed terminal is no reason to end
            return


def rotate(folder: Path, bytes_max: int = LOG_BYTES_MAX) -> list[str]:
    """Move what is too large aside; the names of those files.

    Writers append, so that after the cut they go on at the start; what they write during the copy
    is lost.
    """
    rotated: list[str] = []
    for path in sorted(folder.glob("*.log")):
        try:
            if path.stat().st_size > bytes_max:
                _rotate(path)
                rotated.append(path.name)
        except OSError:  # gone meanwhile, or no room for a copy: tried again next time
            continue
    return rotated


def _rotate(path: Path) -> None:
    for age in range(KEPT - 1, 0, -1):
        older = path.with_name(f"{path.name}.{age}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{age + 1}"))
    shutil.copyfile(path, path.with_name(f"{path.name}.1"))
    os.truncate(path, 0)
