"""Files that people get: written beside their final name, synced, renamed when whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec
from blake3 import blake3
from llmproto.errors import invalid

from llmservices.data.cache import disk, sync

ENDINGS: Final = (".jsonl", ".ndjson")
_encoder: Final = msgspec.json.Encoder()


class JsonLines:
    """Rows on their way into a file; `digest` is of its content so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hasher = blake3()
        self.rows = 0

    def write(self, row: object) -> None:
        """One more line."""
        line = _encoder.encode(row) + b"\n"
        self._file.write(line)
        self._hasher.update(line)
        self.rows += 1

    @property
    def digest(self) -> bytes:
        """BLAKE3 of all lines."""
        return self._hasher.digest()


def check_output(path: Path, *, overwrite: bool) -> None:
    """INVALID where the file cannot be written as asked."""
    if path.suffix.lower() not in ENDINGS:
        raise invalid(f"{path}: rows are written as JSON lines, give it a name ending in .jsonl")
    if path.exists() and not overwrite:
        raise invalid(f"{path}: is there already; name another, or set overwrite")
    if not path.parent.is_dir():
        raise invalid(f"{path.parent}: is no folder; make it")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[JsonLines]:
    """A file that appears whole when the block ends well, and not at all otherwise."""
    making = path.with_name(f".{path.name}.{os.getpid()}.making")
    try:
        with disk():
            try:
                with making.open("wb") as file:
                    yield JsonLines(file)
            except PermissionError as error:
                raise invalid(f"{path}: cannot be written ({error.strerror})") from None
            sync(making)
            os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)
