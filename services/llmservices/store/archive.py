"""The store on its disk: versions are whole or absent, whenever this process dies.

One thread at a time changes it.  A version becomes visible by one rename of its folder, after every
object and file of it has been synced; what lies under `tmp` is nobody's.
"""

import errno
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.limits import LEFT_OUT_MAX
from llmproto.versions import Save, Saved, TensorGroup

from libllm import logs
from llmservices.models.tasks import MODULES, task_of
from llmservices.store import core
from llmservices.store.disk import Disk
from llmservices.store.importing import opened, read_folder, read_small
from llmservices.store.index import Entry, Index
from llmservices.store.notes import Notes
from llmservices.store.rows import resolve
from llmservices.store.staging import Staging
from llmservices.versions.manifest import (
    FOLDER_DIGITS,
    MANIFEST,
    OBJECTS,
    PIECE_BYTES,
    STAMP,
    VERSIONS,
    FileEntry,
    Manifest,
    Stamp,
    Stored,
    check_files,
    folder_of,
    hash_bytes,
    object_path,
    read_manifest,
)
from llmservices.versions.reference import short

TMP: Final = "tmp"
INDEX: Final = "index.sqlite"
LAYOUT_BYTES_MAX: Final = 256 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Archive:
    """Everything that changes the store goes through here, or through what is given this."""

    def __init__(
        self,
        root: Path,
        *,
        disk: Disk | None = None,
        bytes_max: int | None = None,
        threads: int | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Opens what is there, and removes what an earlier life left unfinished."""
        self.root = root
        self.disk = disk or Disk()
        self.bytes_max = bytes_max
        self._threads = threads
        self._now_ns = now_ns
        self._numbers = itertools.count(1)
        self.damaged: dict[str, str] = {}
        """Folders whose manifest cannot be read, and why: not visible."""
        self.suspects: set[str] = set()
        """Objects found damaged: the next save that has their content writes them anew."""
        self.index_number = 0
        """Grows when the index is made anew: other connections then read an old file."""
        for folder in (root, *(root / name for name in (OBJECTS, VERSIONS, TMP))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.notes = Notes(root, self.disk)
        for left in (root / TMP).iterdir():
            self.disk.remove_tree(left)
        self.index = self.open_index()
        self._reconcile()

    def open_index(self) -> Index:
        """Another connection to the index, for another thread."""
        return Index(self.root / INDEX)

    def rebuild(self) -> None:
        """The index is damaged: make it anew."""
        self.index_number += 1
        self.index.close()
        self.index.remove()
        self.index = self.open_index()
        self._reconcile()

    # --- saving -----------------------------------------------------------------------------------

    def save(self, save: Save, blobs: Sequence[bytes]) -> Saved:
        """Make it a version; when this returns, it is durable."""
        inherited = None if save.inherit is None else self.manifest(save.inherit)
        groups = save.groups if save.layout is None else _read_layout(Path(save.layout))
        buffer = None if save.buffer is None else _open_buffer(Path(save.buffer))
        try:
            plan = core.draft(
                save,
                groups,
                blobs,
                read={name: _read_beside(Path(path)) for name, path in save.paths.items()},
                buffer_bytes=0 if buffer is None else os.fstat(buffer).st_size,
                inherited=inherited,
                known=self._known,
            )
            return self.store(plan, [] if buffer is None else [buffer])
        finally:
            if buffer is not None:
                os.close(buffer)

    def import_folder(self, path: Path, name: str, base: str | None) -> Saved:
        """A plain folder as a version."""
        found_base: tuple[bytes, Manifest] | None = None
        if base is not None:
            digest = bytes.fromhex(resolve(self.index, base).digest)
            found_base = (digest, self.manifest(digest))
        found = read_folder(path, name, base=found_base)
        with opened(found.sources) as sources:
            saved = self.store(found.draft, sources)
        if found.left_out:
            logs.configure("store").warning(
                "import_left_out", version=saved.reference, folder=str(path), files=found.left_out
            )
        return msgspec.structs.replace(saved, left_out=found.left_out[:LEFT_OUT_MAX])

    def store(self, plan: core.Draft, sources: Sequence[int]) -> Saved:
        """Write a draft; EXHAUSTED, with the numbers, where the disk or the quota is full, and then
        nothing has changed."""
        budget = core.Budget(self.index.bytes_total(), self.bytes_max)
        staging = Staging(
            self.root,
            self.new_tmp(),
            disk=self.disk,
            budget=budget,
            threads=self._threads,
            known=self._known,
            suspects=self.suspects,
        )
        try:
            groups, files = staging.take(plan, sources)
            task = self._task(plan)
            manifest = core.manifest_of(plan, task=task, groups=groups, files=files)
            digest = self._keep(manifest, staging, plan.keep)
        except OSError as error:
            staging.undo()
            if error.errno in _FULL:
                raise self._full(manifest_bytes(plan), staging) from None
            raise
        except sqlite3.OperationalError as error:
            staging.undo()
            raise RemoteError(ErrorKind.EXHAUSTED, f"{self.root / INDEX}: {error}") from None
        except BaseException:
            staging.undo()
            raise
        finally:
            staging.close()
        return Saved(digest, short(plan.name, digest), manifest.size_bytes, staging.bytes_new)

    def manifest(self, digest: bytes) -> Manifest:
        """Of a version that is there; INVALID otherwise."""
        if self.index.find(digest.hex()) is None:
            raise invalid(f"version {digest.hex()[:8]} is not in the store")
        return read_manifest(folder_of(self.root, digest))[0]

    def new_tmp(self) -> Path:
        """A path that nobody has."""
        return self.root / TMP / f"{os.getpid()}-{next(self._numbers)}"

    def _keep(self, manifest: Manifest, staging: Staging, keep: int) -> bytes:
        content = manifest.encode()
        digest = bytes.fromhex(hash_bytes(content))
        folder = folder_of(self.root, digest)
        if self._is_sound(folder, manifest):
            staging.place()
            return digest  # The same save again, or the same content.
        stamp = Stamp(self.index.sequence() + 1, self._now_ns(), keep)
        built = staging.folder / "version"
        self._build(built, manifest, content, stamp, staging)
        staging.place()
        if folder.exists():  # A file of it is damaged.
            self.disk.rename(folder, staging.folder / "damaged")
            self.index.drop(digest.hex())
            self.damaged.pop(folder.name, None)
        self.disk.rename(built, folder)
        try:
            self.disk.sync(folder.parent)
            self._index(digest.hex(), manifest, stamp)
        except BaseException:
            # Not known to be durable: it must not be seen either.
            folder.rename(built)
            raise
        return digest

    def _is_sound(self, folder: Path, manifest: Manifest) -> bool:
        try:
            read_manifest(folder)
            check_files(folder, manifest)
        except RemoteError:
            return False
        return True

    def _build(
        self, built: Path, manifest: Manifest, content: bytes, stamp: Stamp, staging: Staging
    ) -> None:
        """The version's folder, the manifest last; it is synced with the staged objects."""
        disk = self.disk
        disk.make_folder(built)
        inner = sorted({built / Path(file.name).parent for file in manifest.files} - {built})
        for folder in inner:
            disk.make_folder(folder)
        for file in manifest.files:
            self._link(file, built / file.name, staging)
        disk.write(built / STAMP, msgspec.json.encode(stamp))
        disk.write(built / MANIFEST, content)
        for path in (built / STAMP, built / MANIFEST, *inner, built):
            staging.sync(path)

    def _link(self, file: FileEntry, target: Path, staging: Staging) -> None:
        source = staging.path_of(file.object)
        try:
            self.disk.link(source, target)
        except OSError as error:
            if error.errno in _FULL:
                raise
            # No second names here, or too many of this file: a copy.
            self.disk.write(target, source.read_bytes())
            staging.sync(target)

    def _index(self, digest: str, manifest: Manifest, stamp: Stamp) -> Entry:
        try:
            return self.index.put(digest, manifest, stamp)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            self.rebuild()
            return self.index.put(digest, manifest, stamp)

    def _task(self, plan: core.Draft) -> str:
        small = dict(plan.files)
        for entry in plan.inherited_files:
            if entry.name.endswith(".json"):
                small[entry.name] = object_path(self.root, entry.object).read_bytes()
        try:
            return task_of(Path(plan.name), small).kind
        except RemoteError:  # It can be kept all the same; whoever would serve it is told why not.
            return "embed" if MODULES in small else "generate"

    def _known(self, digest: bytes, size_bytes: int) -> Stored | None:
        stored = self.index.tensor(digest, size_bytes)
        if stored is None or (stored.pack is None and not _covers(stored, size_bytes)):
            return None
        sizes = stored.sizes(size_bytes)
        try:
            is_whole = all(
                name not in self.suspects
                and object_path(self.root, name).stat().st_size == sizes[name]
                for name in sizes
            )
        except OSError:
            return None
        return stored if is_whole else None

    def _full(self, wanted: int, staging: Staging) -> RemoteError:
        staging.close()
        free = self.disk.free_bytes(self.root)
        return RemoteError(
            ErrorKind.EXHAUSTED,
            f"the disk of {self.root} is full: the version has {wanted} bytes of its own, "
            f"{staging.bytes_new} of them were new so far, and {free} are free: remove versions "
            "and collect, or make room",
        )

    # --- opening ----------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """Make the index say what the folders say."""
        logger = logs.configure("store")
        indexed = {digest[:FOLDER_DIGITS]: digest for digest in self.index.digests()}
        there = {folder.name: folder for folder in (self.root / VERSIONS).iterdir()}
        for name in sorted(indexed.keys() - there.keys()):
            self.index.drop(indexed[name])
        found: list[tuple[Stamp, bytes, Manifest]] = []
        for name in sorted(there.keys() - indexed.keys()):
            try:
                manifest, digest = read_manifest(there[name])
            except RemoteError as error:
                self.damaged[name] = error.detail
                logger.error("version_damaged", folder=str(there[name]), detail=error.detail)
                continue
            found.append((_read_stamp(there[name]), digest, manifest))
        for stamp, digest, manifest in sorted(found, key=lambda each: each[0].sequence):
            self.index.put(digest.hex(), manifest, stamp)
        self.notes.load(self.index)


def _covers(stored: Stored, size_bytes: int) -> bool:
    return len(stored.objects) == -(-size_bytes // PIECE_BYTES)


def manifest_bytes(plan: core.Draft) -> int:
    """Of what the draft brings itself."""
    tensors = (tensor for group in plan.groups for tensor in group.tensors)
    stored = sum(tensor.bytes for tensor in tensors if isinstance(tensor.at, core.Cut))
    return stored + sum(map(len, plan.files.values()))


def _read_stamp(folder: Path) -> Stamp:
    try:
        return msgspec.json.decode((folder / STAMP).read_bytes(), type=Stamp)
    except (OSError, msgspec.DecodeError):  # Lost: the folder's own time is the next best.
        return Stamp(0, folder.stat().st_mtime_ns)


def _open_buffer(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RemoteError(
            ErrorKind.STALE, f"buffer {path} cannot be read: {error.strerror or error}"
        ) from None


def _read_beside(path: Path) -> bytes:
    if not path.is_file():
        raise RemoteError(ErrorKind.STALE, f"{path} is no file: it must stay until the answer")
    return read_small(path)


def _read_layout(path: Path) -> list[TensorGroup]:
    try:
        if path.stat().st_size > LAYOUT_BYTES_MAX:
            raise invalid(f"{path} has more than {LAYOUT_BYTES_MAX} bytes")
        return msgspec.msgpack.decode(path.read_bytes(), type=list[TensorGroup])
    except OSError as error:
        raise RemoteError(
            ErrorKind.STALE, f"layout {path} cannot be read: {error.strerror or error}"
        ) from None
    except msgspec.DecodeError as error:
        raise invalid(f"{path} is not a list of groups: {error}") from None
