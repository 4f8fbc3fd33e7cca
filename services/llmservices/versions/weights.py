"""Tensors of a version, read into memory of one's own and compared with their digests on the way.

Invariant: no tensor is given out of which a byte was not compared.  An adapter's version gives its
base with the adapter merged in, in float32, rounded once to the base's precision.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from llmproto.errors import invalid

from llmservices.versions import adapters
from llmservices.versions.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_WEIGHTS,
    GroupEntry,
    Manifest,
    TensorEntry,
    read_file,
    read_manifest,
)
from llmservices.versions.pieces import pieces_of, threads_allowed

DTYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip
AHEAD_BYTES: Final = 256 << 20
"""Read before they are asked for: keeps the threads busy, bounds the memory."""


class _Group:
    """One file's tensors, read by several threads, in the file's order ahead of who asks."""

    def __init__(self, folder: Path, entry: GroupEntry, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._entry = entry
        self._pool = pool
        self.tensors = {tensor.name: tensor for tensor in entry.tensors}
        self._next = deque(entry.tensors)
        self._taken: set[str] = set()
        self._ahead: dict[str, _Reading] = {}
        self._ahead_bytes = 0

    def read(self, name: str) -> torch.Tensor:
        """As stored."""
        reading = self._ahead.pop(name, None)
        if reading is None:
            reading = self._start(self.tensors[name])
        else:
            self._ahead_bytes -= self.tensors[name].size_bytes
        self._taken.add(name)
        self._read_ahead()
        return reading.wait()

    def _read_ahead(self) -> None:
        while self._next and self._ahead_bytes < AHEAD_BYTES:
            tensor = self._next.popleft()
            if tensor.name not in self._taken:
                self._ahead[tensor.name] = self._start(tensor)
                self._ahead_bytes += tensor.size_bytes

    def _start(self, tensor: TensorEntry) -> "_Reading":
        return _Reading(self._folder, self._entry, tensor, self._pool)


class _Reading:
    """One tensor on its way into memory."""

    def __init__(
        self, folder: Path, group: GroupEntry, tensor: TensorEntry, pool: ThreadPoolExecutor
    ) -> None:
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise invalid(f"{folder}: tensor {tensor.name} has the unknown type {tensor.dtype}")
        self._tensor = torch.empty(tensor.shape, dtype=dtype)
        pieces = pieces_of(folder, group, tensor)
        self._waiting: list[Future[None]] = []
        if pieces:
            # Any: numpy declares no buffer.
            raw: Any = self._tensor.reshape(-1).view(torch.uint8).numpy()
            view = memoryview(raw)
            self._waiting = [
                pool.submit(piece.read, view[piece.offset : piece.offset + piece.length])
                for piece in pieces
            ]

    def wait(self) -> torch.Tensor:
        for future in self._waiting:
            future.result()
        return self._tensor


class VersionTensors:
    """A version's tensors by name: of its model (the adapter merged), or of one of its files."""

    def __init__(
        self,
        folder: Path,
        *,
        file: str | None = None,
        threads: int | None = None,
    ) -> None:
        """`file` None: the model.  INVALID where the version has no such tensors, or something of
        it is damaged."""
        self.folder = folder
        self.manifest, self.digest = read_manifest(folder)
        manifest = self.manifest
        self._pool = ThreadPoolExecutor(threads or threads_allowed(), thread_name_prefix="weights")
        name = file or MODEL_WEIGHTS
        entry = manifest.group(name)
        if entry is None:
            there = ", ".join(group.file for group in manifest.groups) or "none"
            raise invalid(f"version {folder.name} holds no {name}; tensor files it has: {there}")
        self._base = _Group(folder, entry, self._pool)
        self._adapter: _Group | None = None
        self._changes: dict[str, adapters.Change] = {}
        if file is None and manifest.is_adapter:
            self._adapter = self._open_adapter(manifest)
        added = [name for name in self._changes if name not in self._base.tensors]
        self.names: list[str] = [*self._base.tensors, *added]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __contains__(self, name: str) -> bool:
        return name in self._base.tensors or name in self._changes

    def entry(self, name: str) -> TensorEntry:
        """What the manifest says of the tensor; of a merged one, of the base's."""
        change = self._changes.get(name)
        if change is not None and change.replaced is not None and self._adapter is not None:
            return self._adapter.tensors[change.replaced]
        return self._base.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """In the precision it is stored in; the memory is the caller's."""
        change = self._changes.get(name)
        if change is None or self._adapter is None:
            return self._base.read(name)
        group, stored = self._base, name
        if change.replaced is not None:
            group, stored = self._adapter, change.replaced
        weight = group.read(stored)
        if change.a is None or change.b is None:
            return weight
        product = self._adapter.read(change.b).float() @ self._adapter.read(change.a).float()
        if change.transposed:
            product = product.T
        if product.shape != weight.shape:
            raise invalid(
                f"{self.folder}: {name} has shape {tuple(weight.shape)}, its adapter's product "
                f"{tuple(product.shape)}"
            )
        return (weight.float() + change.scale * product).to(weight.dtype)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, in the file's order."""
        for name in self.names:
            yield name, self.read(name)

    def _open_adapter(self, manifest: Manifest) -> _Group:
        entry = manifest.group(ADAPTER_WEIGHTS)
        file = manifest.file(ADAPTER_CONFIG)
        if entry is None or file is None:
            raise invalid(f"version {self.folder.name}: {ADAPTER_CONFIG} is missing")
        where = self.folder / ADAPTER_CONFIG
        config = adapters.read_config(read_file(self.folder, file), where)
        adapter = _Group(self.folder, entry, self._pool)
        shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
        self._changes = adapters.changes(config, shapes, self._base.tensors, where)
        return adapter


def read_tensors(
    folder: Path, file: str | None = None, *, threads: int | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of the version's model, or of one of its files."""
    with VersionTensors(folder, file=file, threads=threads) as tensors:
        return dict(tensors.items())
