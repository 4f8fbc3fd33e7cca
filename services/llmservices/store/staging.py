"""One save on its way: new objects are written beside the store, and moved into it when all are
there.

Invariant: an object is synced before it gets its name, and every name is synced before `place`
returns.  `undo` leaves what was there before.

Syncing takes longest, and by the file rather than by the byte: so small tensors share files, and
each file is synced by a thread of its own as soon as it is written.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final, TypeVar

from blake3 import blake3
from llmproto.errors import ErrorKind, RemoteError

from llmservices.store.core import Budget, Cut, Draft, Known, PlannedGroup, PlannedTensor, entry_of
from llmservices.store.disk import Disk
from llmservices.versions.manifest import (
    OBJECTS,
    PACK_BELOW_BYTES,
    PACK_BYTES,
    PIECE_BYTES,
    FileEntry,
    GroupEntry,
    InPack,
    Stored,
    hash_bytes,
    object_path,
)
from llmservices.versions.pieces import threads_allowed

SYNCS: Final = 16
"""Threads that wait for the disk meanwhile: a file system commits what many wait for at once."""
CHUNK_BYTES: Final = 1 << 20
"""Read and hashed at once: it is still in the processor's cache when it is hashed."""
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
        threads: int | None = None,
        known: Known,
        suspects: set[str] | None = None,
    ) -> None:
        """`suspects` are objects that are written again although they are there; `known` is asked
        by the thread that calls `take`.  `threads` read, hash and write, each its own piece; of
        one, everything happens in a fixed order."""
        self.root = root
        self.folder = folder
        self._disk = disk
        self._budget = budget
        self._threads = threads or max(2, threads_allowed())
        self._known = known
        self._suspects = set() if suspects is None else suspects
        self._lock = threading.Lock()
        self._local = threading.local()
        self._sync_pool = ThreadPoolExecutor(SYNCS, thread_name_prefix="sync")
        self._syncs: list[Future[None]] = []
        self._names: dict[str, bool] = {}
        """Objects that this save writes; whether `undo` must take them away again."""

    @property
    def bytes_new(self) -> int:
        return self._budget.taken

    def take(self, plan: Draft, sources: Sequence[int]) -> tuple[list[GroupEntry], list[FileEntry]]:
        """Hash everything and write what is new; `sources` are open files.  It need not be synced
        yet when this returns."""
        self._disk.make_folder(self.folder)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="save") as pool:
            started: list[Future[str]] = []
            tensors = {
                (group.file, tensor.name): self._start(pool, tensor, sources, started)
                for group in plan.groups
                for tensor in group.tensors
                if not _is_small(tensor)
            }
            files = {name: pool.submit(self.put, content) for name, content in plan.files.items()}
            small = {group.file: self._put_small(group, sources) for group in plan.groups}
            _settle([*started, *files.values()])
        groups = [
            GroupEntry(
                group.file,
                [
                    entry_of(tensor, small[group.file][tensor.name])
                    if _is_small(tensor)
                    else entry_of(tensor, _stored(tensor, tensors[group.file, tensor.name]))
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
        return self._put(hash_bytes(content), content)

    def path_of(self, name: str) -> Path:
        """Where an object lies until `place`."""
        return self.folder / name if name in self._names else object_path(self.root, name)

    def sync(self, path: Path) -> None:
        """Before `place` gives any name."""
        if self._threads == 1:
            self._disk.sync(path)
            return
        started = self._sync_pool.submit(self._disk.sync, path)
        with self._lock:
            self._syncs.append(started)

    def _put(self, name: str, content: bytes | bytearray | memoryview) -> str:
        if self._is_there(name, len(content)):
            return name
        with self._lock:
            if name in self._names:
                return name
            self._budget.take(len(content))
            self._names[name] = False
        path = self.folder / name
        self._disk.write(path, content)
        self.sync(path)
        return name

    def place(self) -> None:
        """Give the new objects their names, durably, when all is synced."""
        self._settle_syncs()
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
            self.sync(folder)
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
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = bytearray(PIECE_BYTES)
        view = memoryview(buffer)[:length]
        return self._put(_read(source, offset, view), view)

    def _put_small(self, group: PlannedGroup, sources: Sequence[int]) -> dict[str, Stored]:
        """The group's small tensors: where they lie already, or one after another in packs."""
        found: dict[str, Stored] = {}
        pack = _Pack()
        for tensor in group.tensors:
            if not _is_small(tensor):
                continue
            assert isinstance(tensor.at, Cut)
            content = bytearray(tensor.bytes)
            digest = _read(sources[tensor.at.source], tensor.at.offset, memoryview(content))
            stored = self._known(bytes.fromhex(digest), tensor.bytes)
            if stored is not None:
                found[tensor.name] = stored
                continue
            if len(pack.content) + len(content) > PACK_BYTES:
                found |= pack.places(self.put(pack.content))
                pack = _Pack()
            pack.add(tensor.name, digest, content)
        if pack.content:
            found |= pack.places(self.put(pack.content))
        return found

    def _is_there(self, name: str, length: int) -> bool:
        if name in self._suspects:
            return False
        try:
            return object_path(self.root, name).stat().st_size == length
        except OSError:
            return False


class _Pack:
    """Small tensors one after another, equal ones once."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._offsets: dict[str, int] = {}
        self._digests: dict[str, str] = {}

    def add(self, tensor: str, digest: str, content: bytearray) -> None:
        self._digests[tensor] = digest
        if digest not in self._offsets:
            self._offsets[digest] = len(self.content)
            self.content += content

    def places(self, name: str) -> dict[str, Stored]:
        """Of each tensor, in the object of this name; a pack of one content is a plain object."""
        size = len(self.content)
        if len(self._offsets) == 1:
            return dict.fromkeys(self._digests, Stored([name]))
        return {
            tensor: Stored([name], InPack(self._offsets[digest], size, digest))
            for tensor, digest in self._digests.items()
        }


def _is_small(tensor: PlannedTensor) -> bool:
    return isinstance(tensor.at, Cut) and 0 < tensor.bytes < PACK_BELOW_BYTES


def _stored(tensor: PlannedTensor, pieces: Sequence[Future[str]]) -> Stored:
    if isinstance(tensor.at, Cut):
        return Stored([piece.result() for piece in pieces])
    return tensor.at


def _read(source: int, offset: int, view: memoryview) -> str:
    """Fill the view, and its BLAKE3.

    Read, not mapped: a file that shrinks meanwhile must not end this process.
    """
    hasher = blake3()
    at = 0
    while at < len(view):
        got = os.preadv(source, [view[at : at + CHUNK_BYTES]], offset + at)
        if not got:
            raise RemoteError(
                ErrorKind.STALE,
                f"the buffer ends at byte {offset + at}; {offset + len(view)} are needed: "
                "it must not change before the answer",
            )
        hasher.update(view[at : at + got])
        at += got
    return hasher.hexdigest()


def _settle(futures: Sequence[Future[T]]) -> None:
    """Wait for all; after a failure nothing more is begun, and the first is raised."""
    done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    wait(waiting)
    for future in done:
        future.result()
