"""The log files of a home: which there are, their last lines, and what is appended to them.

Files hold one JSON object a line; lines that do not (a traceback of an interpreter) are text.
Rotation copies a file to NAME.1 and truncates it, so that a follower sees it shrink.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from llmproto.errors import ErrorKind, RemoteError, invalid

POLL_S: Final = 0.2
LINE_BYTES_MAX: Final = 1 << 20
"""A longer line is shown in pieces."""
TAIL_BYTES_MAX: Final = 8 << 20
"""Looked at for the last lines of a file."""
_KNOWN: Final = ("timestamp", "level", "event")


class LogLine:
    """One line, with the time that it states (empty where it states none)."""

    def __init__(self, process: str, raw: str) -> None:
        self.process = process
        self.raw = raw
        self.fields: dict[str, object] | None = None
        try:
            parsed = json.loads(raw)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            self.fields = parsed

    @property
    def timestamp(self) -> str:
        """ISO time in UTC, which sorts as text."""
        return str((self.fields or {}).get("timestamp", ""))

    @property
    def message(self) -> str:
        """What happened, without time and place."""
        if self.fields is None:
            return self.raw
        event = str(self.fields.get("event", ""))
        rest = " ".join(
            f"{key}={_compact(value)}"
            for key, value in self.fields.items()
            if key not in _KNOWN and (key, value) != ("process", self.process)
        )
        return f"{event}  {rest}" if rest else event

    def document(self) -> dict[str, object]:
        """For --json: the line's own object; a line of text as one."""
        if self.fields is None:
            return {"process": self.process, "event": self.raw}
        return {"process": self.process, **self.fields}

    def text(self) -> str:
        """For people: time, process, level, event, then the other fields."""
        if self.fields is None:
            return f"{'':12} {self.process:<12} {self.raw}"
        time_of_day = self.timestamp[11:23].rstrip("Z+")
        level = str(self.fields.get("level", ""))
        return f"{time_of_day:<12} {self.process:<12} {level:<7} {self.message}"


def files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The log files of these processes, of all without a name; INVALID names those there are.

    A name stands for the processes that begin with it, too: `executor` for `executor-1`.
    """
    try:
        found = sorted(folder.glob("*.log"))
    except PermissionError as error:
        raise RemoteError(ErrorKind.DENIED, f"{folder} cannot be read: {error.strerror}") from None
    if not names:
        return found
    chosen = [
        path
        for path in found
        if any(path.stem == name or path.stem.startswith(f"{name}-") for name in names)
    ]
    for name in names:
        if not any(path.stem == name or path.stem.startswith(f"{name}-") for path in chosen):
            known = ", ".join(path.stem for path in found) or "none"
            raise invalid(f"{folder} has no log of {name!r}; there are: {known}")
    return chosen


def last_lines(paths: Sequence[Path], count: int) -> list[LogLine]:
    """The last lines of all files together, in the order of their times.

    A line without a time stays behind the line before it.
    """
    dated: list[tuple[str, LogLine]] = []
    for path in paths:
        timestamp = ""
        for line in _tail(path, count):
            timestamp = line.timestamp or timestamp
            dated.append((timestamp, line))
    dated.sort(key=lambda pair: pair[0])
    return [line for _, line in dated[max(0, len(dated) - count) :]]


class Follower:
    """Reads what is appended to the logs, files that appear included.

    Invariant: every byte after the start is read once; where a file shrank it is read from its
    start.
    """

    def __init__(self, find: Callable[[], list[Path]]) -> None:
        self._find = find
        self._offsets = {path: path.stat().st_size for path in find()}
        self._rests: dict[Path, bytes] = {}

    def read(self) -> list[LogLine]:
        """The whole lines that came since."""
        lines: list[LogLine] = []
        for path in self._find():
            lines += self._read(path)
        lines.sort(key=lambda line: line.timestamp)
        return lines

    def _read(self, path: Path) -> list[LogLine]:
        offset = self._offsets.get(path, 0)
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < offset:
                    offset = 0
                    self._rests.pop(path, None)
                file.seek(offset)
                data = file.read(TAIL_BYTES_MAX)
        except FileNotFoundError:
            return []
        self._offsets[path] = offset + len(data)
        *whole, rest = (self._rests.pop(path, b"") + data).split(b"\n")
        if len(rest) >= LINE_BYTES_MAX:
            whole, rest = [*whole, rest], b""
        if rest:
            self._rests[path] = rest
        return [LogLine(path.stem, line.decode(errors="replace")) for line in whole if line]


def follow(follower: Follower, pause: Callable[[float], None] = time.sleep) -> Iterator[LogLine]:
    """Lines as they come, without end."""
    while True:
        yield from follower.read()
        pause(POLL_S)


def _tail(path: Path, count: int) -> list[LogLine]:
    """Of the file, and of the one before it where the file was rotated lately."""
    lines: list[bytes] = []
    for part in (path, path.with_name(f"{path.name}.1")):
        if len(lines) >= count:
            break
        lines = [*_last(part, count - len(lines)), *lines]
    return [LogLine(path.stem, line.decode(errors="replace")) for line in lines]


def _last(path: Path, count: int) -> list[bytes]:
    if count <= 0:
        return []
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            begin = max(0, end - TAIL_BYTES_MAX)
            file.seek(begin)
            lines = [line for line in file.read(end - begin).split(b"\n") if line]
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise RemoteError(ErrorKind.DENIED, f"{path} cannot be read: {error.strerror}") from None
    return lines[-count:]


def _compact(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if " " in text and isinstance(value, str) else text
