"""What was made already, on disk: tokenised rows and segments, whole or absent.

A thing is made under a temporary name and renamed when it is whole and written out; a process that
dies leaves temporary names alone, which the next one removes.  Everything here can be made again,
so nothing is kept beyond the bound: the least recently used rows go first.
"""

import contextlib
import errno
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3
from llmproto.errors import ErrorKind, RemoteError

from llmservices.data.dataset import META_FILE, ROWS_FILE, Meta

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
THERE: Final = frozenset({errno.EEXIST, errno.ENOTEMPTY})
FULL_RETRY_MS: Final = 5_000
"""Disks are emptied by people."""
RECENT_NS: Final = 60_000_000_000
"""Rows that were asked for so lately may be about to be used."""
TEMPORARY: Final = "making-"


class Cache:
    """The folder of one data service; `rows/DIGEST/` and `segments/PLAN/INDEX.arrow`.

    Invariant: what stands under its final name is whole.
    """

    def __init__(self, root: Path, *, bytes_max: int) -> None:
        self._root = root
        self._bytes_max = bytes_max
        self._numbers = itertools.count()
        self._verified: set[str] = set()

    def open(self) -> None:
        """Make the folders; remove what dead processes left.  Segments of theirs are made anew:
        whether one survived a crash of the machine whole cannot be told from its name."""
        with disk():
            for folder in (self._root, self._rows, self._segments):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._root.glob(f"{TEMPORARY}*"):
                _remove(left)
            for plan in self._segments.iterdir():
                _remove(plan)

    @property
    def _rows(self) -> Path:
        return self._root / "rows"

    @property
    def _segments(self) -> Path:
        return self._root / "segments"

    @contextlib.contextmanager
    def making(self) -> Iterator[Path]:
        """An empty folder of its own, removed at the end whatever happened."""
        folder = self._root / f"{TEMPORARY}{os.getpid()}-{next(self._numbers)}"
        with disk():
            folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _remove(folder)

    def find_rows(self, digest: str) -> tuple[Path, Meta] | None:
        """Rows that were made before, marked as used now; verified once a process."""
        folder = self._rows / digest
        try:
            meta = msgspec.json.decode((folder / META_FILE).read_bytes(), type=Meta)
            if digest not in self._verified and file_digest(folder / ROWS_FILE) != meta.digest:
                _remove(folder)
                return None
            os.utime(folder / META_FILE)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        self._verified.add(digest)
        return folder, meta

    def keep_rows(
        self, digest: str, made: Path, meta: Meta, in_use: Callable[[], set[str]]
    ) -> None:
        """Take a folder with whole rows; gives up other rows for it, but none in use."""
        with disk():
            self._make_room(meta.bytes, in_use())
            (made / META_FILE).write_bytes(msgspec.json.encode(meta))
            sync(made / META_FILE)
            try:
                os.rename(made, self._rows / digest)
            except OSError as error:
                if error.errno not in THERE:  # somebody else made the same
                    raise
        self._verified.add(digest)

    def segment_path(self, plan: bytes, index: int) -> Path:
        """Where a segment stands once it is made."""
        return self._segments / plan.hex() / f"{index}.arrow"

    def drop_segments(self, plan: bytes, *, below: int) -> None:
        """These are not needed any more; who has them mapped keeps them."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self._segments / plan.hex()).iterdir():
                if path.stem.isdecimal() and int(path.stem) < below:
                    path.unlink(missing_ok=True)

    def _make_room(self, needed: int, in_use: set[str]) -> None:
        if needed > self._bytes_max:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"the tokenised rows take {needed} bytes, the cache may have {self._bytes_max}: "
                "raise cache_bytes_max in [data] of config.toml",
            )
        kept = []
        for folder in self._rows.iterdir():
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_size for file in folder.iterdir())
                kept.append(((folder / META_FILE).stat().st_mtime_ns, size, folder))
        total = sum(size for _, size, _ in kept)
        recent_ns = time.time_ns() - RECENT_NS
        for used_ns, size, folder in sorted(kept):
            if total + needed <= self._bytes_max:
                return
            if folder.name not in in_use and used_ns < recent_ns:
                self._verified.discard(folder.name)
                _remove(folder)
                total -= size
        if total + needed > self._bytes_max:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"the tokenised rows take {needed} bytes, others in use {total}, the cache may "
                f"have {self._bytes_max}: raise cache_bytes_max in [data] of config.toml",
                retry_after_ms=FULL_RETRY_MS,
            )


@contextlib.contextmanager
def disk() -> Iterator[None]:
    """Inside, a full disk is EXHAUSTED; any other failure of the disk is what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise RemoteError(
            ErrorKind.EXHAUSTED,
            f"no room on the disk for prepared data{where}: make some, it is tried again",
            retry_after_ms=FULL_RETRY_MS,
        ) from None


def file_digest(path: Path) -> str:
    """BLAKE3 of a file, hexadecimal."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def sync(path: Path) -> None:
    """Written out, so that a renamed file is never empty after a crash of the machine."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Contents:
    """Digests of files, remembered for as long as the file looks the same.

    A file that was changed a moment before it was read may change again without looking different:
    it is read again.
    """

    SETTLED_NS: Final = 2_000_000_000
    KNOWN_MAX: Final = 16_384

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}

    def digest(self, path: Path) -> str:
        """BLAKE3 of its content."""
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        found = self._known.get(key)
        if found is None:
            found = file_digest(path)
            if time.time_ns() - status.st_mtime_ns > self.SETTLED_NS:
                if len(self._known) >= self.KNOWN_MAX:
                    self._known.clear()
                self._known[key] = found
        return found
