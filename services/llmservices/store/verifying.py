"""Reads every object of versions and compares it with its name.  Changes nothing."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from llmproto.errors import RemoteError
from llmproto.limits import DETAIL_BYTES_MAX
from llmproto.versions import Damage, Verified

from llmservices.store.index import Entry
from llmservices.versions.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    folder_of,
    object_path,
    read_file,
    read_manifest,
)
from llmservices.versions.pieces import check, new_buffer, threads_allowed
from llmservices.versions.reference import short

DAMAGE_MAX: Final = 500
"""What one answer can carry."""


class Verifier:
    """One verification; an object that several versions share is read once, and its damage is
    reported for each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checked: dict[str, str | None] = {}
        self.damaged_objects: set[str] = set()
        """To be written anew by the next save that has their content."""
        self._damage: list[Damage] = []
        self._bytes = 0
        self._local = threading.local()
        self._versions = 0

    def verify(self, entries: Sequence[Entry], damaged: dict[str, str]) -> Verified:
        """`damaged` are folders whose manifest could not even be read."""
        for name, detail in sorted(damaged.items()):
            self._report(f"@{name[:8]}", MANIFEST, "", name, detail)
        with ThreadPoolExecutor(threads_allowed(), thread_name_prefix="verify") as pool:
            for entry in entries:
                self._version(entry, pool)
        self.damaged_objects = {name for name, wrong in self._checked.items() if wrong is not None}
        shown = self._damage[:DAMAGE_MAX]
        if len(self._damage) > DAMAGE_MAX:
            more = len(self._damage) - DAMAGE_MAX
            shown.append(Damage("", "", "", "", f"and {more} more"))
        return Verified(self._versions, len(self._checked), self._bytes, shown)

    def _version(self, entry: Entry, pool: ThreadPoolExecutor) -> None:
        reference = short(entry.name, bytes.fromhex(entry.digest))
        folder = folder_of(self._root, bytes.fromhex(entry.digest))
        self._versions += 1
        try:
            manifest, _ = read_manifest(folder)
        except RemoteError as error:
            self._report(reference, MANIFEST, "", str(folder / MANIFEST), error.detail)
            return
        self._read(manifest, pool)
        for file in manifest.files:
            self._file(reference, folder, file)
        for group in manifest.groups:
            for tensor in group.tensors:
                for piece in tensor.pieces():
                    wrong = self._checked[piece.object]
                    if wrong is not None:
                        path = str(self._path(piece.object))
                        detail = f"bytes from {piece.at}: {wrong}"
                        self._report(reference, group.file, tensor.name, path, detail)

    def _read(self, manifest: Manifest, pool: ThreadPoolExecutor) -> None:
        new = {name: n for name, n in manifest.objects().items() if name not in self._checked}
        results = pool.map(self._check, new, new.values())
        for name, wrong in zip(new, results):
            self._checked[name] = wrong
            self._bytes += new[name]

    def _check(self, name: str, length: int) -> str | None:
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = new_buffer()
        return check(self._path(name), name, length, buffer)

    def _file(self, reference: str, folder: Path, file: FileEntry) -> None:
        wrong = self._checked[file.object]
        if wrong is None:
            try:
                read_file(folder, file)  # A copy, where there can be no second name.
            except RemoteError as error:
                wrong = error.detail
        if wrong is not None:
            self._report(reference, file.name, "", str(self._path(file.object)), wrong)

    def _report(self, reference: str, file: str, tensor: str, path: str, detail: str) -> None:
        self._damage.append(Damage(reference, file, tensor, path, detail[:DETAIL_BYTES_MAX]))

    def _path(self, name: str) -> Path:
        return object_path(self._root, name)
