"""One save on its way: new objects are written beside the store, and moved into it when all are
there.

Invariant: an object is synced before it gets its name, and every name is synced before `place`
returns.  `undo` leaves what was there before.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final, TypeVar

from llmproto.errors import ErrorKind, RemoteError

from llmservices.store.core import Budget, Cut, Draft, PlannedTensor, entry_of
from llmservices.store.disk import Disk
from llmservices.versions.manifest import (
    OBJECTS,
    PIECE_BYTES,
    FileEntry,
    GroupEntry,
    hash_bytes,
    object_path,
)

THREADS: Final = 4
"""They read, hash and write, each its own piece of 4 MiB; more
hold one another up where other processes want the cores."""
SYNCS_A_THREAD: Final = 4
"""Threads that wait for the disk meanwhile: a file system commits what many wait for at once."""
T = TypeVar("T")


class Staging:
    """Owns one folder under `tmp`, which is empty of use when it is done."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        *,
        disk: Disk,
        budget: Budget,
        threads: int = THREADS,
        suspects: set[str] | None = None,
    ) -> None:
        """`suspects` are objects that are written again although they are there."""
        self.root = root
        self.folder = folder
        self._disk = disk
        self._budget = budget
        self._threads = threads
        self._suspects = set() if suspects is None else suspects
        self._lock = threading.Lock()
        self._local = threading.local()
        self._sync_pool = ThreadPoolExecutor(threads * SYNCS_A_THREAD, thread_name_prefix="sync")
        self._syncs: list[Future[None]] = []
        self._names: dict[str, bool] = {}
        """Objects that this save writes; whether `undo` must take them away again."""

    @property
    def bytes_new(self) -> int:
        return self._budget.taken

    def take(self, plan: Draft, sources: Sequence[int]) -> tuple[list[GroupEntry], list[FileEntry]]:
        """Hash everything and write what is new; `sources` are open files."""
        self._disk.make_folder(self.folder)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="save") as pool:
            started: list[Future[str]] = []
            tensors = {
                (group.file, tensor.name): self._start(pool, tensor, sources, started)
                for group in plan.groups
                for tensor in group.tensors
            }
            files = {name: pool.submit(self.put, content) for name, content in plan.files.items()}
            _settle([*started, *files.values()])
        self._settle_syncs()
        groups = [
            GroupEntry(
                group.file,
                [
                    entry_of(tensor, [piece.result() for piece in tensors[group.file, tensor.name]])
                    if isinstance(tensor.at, Cut)
                    else entry_of(tensor, tensor.at)
                    for tensor in group.tensors
                ],
                group.metadata,
            )
            for group in plan.groups
        ]
        entries = [
            FileEntry(name, len(plan.files[name]), future.result())
            for name, future in files.items()
        ]
        return groups, entries

    def put(self, content: bytes | bytearray | memoryview) -> str:
        """The name of the object with this content, written where it is not there yet."""
        name = hash_bytes(content)
        if self._is_there(name, len(content)):
            return name
        with self._lock:
            if name in self._names:
                return name
            self._budget.take(len(content))
            self._names[name] = False
        path = self.folder / name
        self._disk.write(path, content)
        self._sync(path)
        return name

    def place(self) -> None:
        """Give the new objects their names, durably."""
        touched: set[Path] = set()
        objects = self.root / OBJECTS
        for name in sorted(self._names):
            path = object_path(self.root, name)
            if path.parent not in touched and not path.parent.exists():
                self._disk.make_folder(path.parent)
                touched.add(objects)
            touched.add(path.parent)
            is_new = not path.exists()
            self._disk.rename(self.folder / name, path)
            self._names[name] = is_new  # In place of a damaged one it stays whatever follows.
            self._suspects.discard(name)
        for folder in sorted(touched):
            self._sync(folder)
        self._settle_syncs()

    def undo(self) -> None:
        """Remove what was placed; the folder under `tmp` goes with `close`."""
        for name, is_placed in self._names.items():
            if is_placed:
                self._disk.unlink(object_path(self.root, name))

    def close(self) -> None:
        """Nothing of it is left."""
        self._sync_pool.shutdown(cancel_futures=True)
        self._disk.remove_tree(self.folder)

    def _sync(self, path: Path) -> None:
        if self._threads == 1:
            self._disk.sync(path)
            return
        started = self._sync_pool.submit(self._disk.sync, path)
        with self._lock:
            self._syncs.append(started)

    def _settle_syncs(self) -> None:
        _settle(self._syncs)
        self._syncs.clear()

    def _start(
        self,
        pool: ThreadPoolExecutor,
        tensor: PlannedTensor,
        sources: Sequence[int],
        started: list[Future[str]],
    ) -> list[Future[str]]:
        if not isinstance(tensor.at, Cut):
            return []
        source, first = sources[tensor.at.source], tensor.at.offset
        pieces = [
            pool.submit(self._put_piece, source, first + at, min(PIECE_BYTES, tensor.bytes - at))
            for at in range(0, tensor.bytes, PIECE_BYTES)
        ]
        started += pieces
        return pieces

    def _put_piece(self, source: int, offset: int, length: int) -> str:
        # Read, not mapped: a file that shrinks meanwhile must not end this process.
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = bytearray(PIECE_BYTES)
        view = memoryview(buffer)[:length]
        at = 0
        while at < length:
            got = os.preadv(source, [view[at:]], offset + at)
            if not got:
                raise RemoteError(
                    ErrorKind.STALE,
                    f"the buffer ends at byte {offset + at}; {offset + length} are needed: "
                    "it must not change before the answer",
                )
            at += got
        return self.put(view)

    def _is_there(self, name: str, length: int) -> bool:
        if name in self._suspects:
            return False
        try:
            return object_path(self.root, name).stat().st_size == length
        except OSError:
            return False


def _settle(futures: Sequence[Future[T]]) -> None:
    """Wait for all; after a failure nothing more is begun, and the first is raised."""
    done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    wait(waiting)
    for future in done:
        future.result()
