"""The memory that a checkpoint is copied into; the store takes it from there during training.

Invariant: between one `settle` and the next `write` nothing changes in it.  Its pages are touched
when it is made, so that a copy costs what memory costs and no page fault.  The file is locked by
its process: one that nobody has locked is the leftover of a killed one.

`write` is what training waits for, so it only copies: matrices that are published transposed are
turned by `settle`, which may take place during the next steps.  Its threads take pieces of all
tensors and meet once; torch's own meet after each tensor, which on busy cores costs a time slice
each (20 times the copy, measured).
"""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from llmproto.versions import TensorGroup, TensorPlace

ALIGNMENT: Final = 64
LAYOUT_BYTES_MAX: Final = 256 << 10
"""A longer description goes through a file: a message holds 1 MiB."""
FILES_BYTES_MAX: Final = 128 << 10
"""Small files go in a message up to this, all of them together."""
PREFIX: Final = "llmos-save-"
PIECE_BYTES: Final = 4 << 20
Piece = tuple[Any, Any]  # Any: arrays of bytes, whose type numpy leaves open
"""To and from."""

NAMES: Final = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' words."""

Groups = dict[str, dict[str, torch.Tensor]]
"""Tensors by name, by file."""


class Written(msgspec.Struct, frozen=True):
    """What stands in the buffer, as Save says it."""

    buffer: str
    groups: list[TensorGroup]
    layout: str | None
    bytes: int


def bytes_of(groups: Groups) -> int:
    """How long a buffer must be."""
    return sum(_aligned(each.nbytes) for group in groups.values() for each in group.values())


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


class SaveBuffer:
    """One file of shared memory."""

    def __init__(self, path: Path, length: int) -> None:
        """Raises OSError where there is no room for it."""
        self.path = path
        self.length = max(length, mmap.PAGESIZE)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._beside: dict[Path, bytes] = {}
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="copy")
        self._turned: list[tuple[torch.Tensor, int]] = []
        """Tensors like those that stand transposed, and where."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, self.length)
            whole = mmap.mmap(self._file, self.length)
        except OSError:
            os.close(self._file)
            path.unlink()
            raise
        self._bytes = torch.frombuffer(whole, dtype=torch.uint8)
        self._bytes.zero_()

    def write(self, groups: Groups) -> Written:
        """Copy all tensors; blocks for as long as that takes."""
        assert bytes_of(groups) <= self.length, "the buffer is made for the largest checkpoint"
        offset = 0
        said: list[TensorGroup] = []
        pieces: list[Piece] = []
        self._turned.clear()
        for file, tensors in groups.items():
            places: list[TensorPlace] = []
            for name, tensor in tensors.items():
                size = tensor.nbytes
                if size:
                    self._copy(tensor, offset, pieces)
                shape = list(tensor.shape)
                places.append(TensorPlace(name, NAMES[tensor.dtype], shape, offset, size))
                offset += _aligned(size)
            said.append(TensorGroup(file, places, {"format": "pt"}))
        self._move(pieces)
        encoded = msgspec.msgpack.encode(said)
        if len(encoded) <= LAYOUT_BYTES_MAX:
            return Written(str(self.path), said, None, offset)
        return Written(str(self.path), [], self._put("layout", encoded), offset)

    def _copy(self, tensor: torch.Tensor, offset: int, pieces: list[Piece]) -> None:
        """Now, or as pieces of bytes."""
        if not tensor.is_contiguous() and tensor.dim() == 2 and tensor.t().is_contiguous():
            self._turned.append((torch.empty_like(tensor, device="meta"), offset))
            tensor = tensor.t()
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            self._place(tensor, offset).copy_(tensor)
            return
        # One element may have any stride, and no view as bytes then.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        source = flat.view(torch.uint8).numpy()
        target = self._bytes[offset : offset + tensor.nbytes].numpy()
        pieces += [
            (target[at : at + PIECE_BYTES], source[at : at + PIECE_BYTES])
            for at in range(0, tensor.nbytes, PIECE_BYTES)
        ]

    def _move(self, pieces: Sequence[Piece]) -> None:
        """Each thread an equal part of the bytes."""
        if self._threads == 1:
            _move(pieces)
            return
        shares: list[list[Piece]] = [[] for _ in range(self._threads)]
        total, before = sum(len(to) for to, _ in pieces), 0
        for piece in pieces:
            shares[before * self._threads // total].append(piece)
            before += len(piece[0])
        for done in [self._pool.submit(_move, share) for share in shares]:
            done.result()

    def settle(self) -> None:
        """Turn what stands transposed; on any thread."""
        for like, offset in self._turned:
            whole = self._bytes[offset : offset + like.nbytes].view(like.dtype)
            turned = whole.view(like.shape[1], like.shape[0]).clone()
            whole.view(like.shape).copy_(turned.t())
        self._turned.clear()

    def beside(self, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, str]]:
        """Those that fit into a message, and where the others stand."""
        small: dict[str, bytes] = {}
        paths: dict[str, str] = {}
        room = FILES_BYTES_MAX
        for name, content in files.items():
            if len(content) <= room:
                small[name] = content
                room -= len(content)
            else:
                paths[name] = self._put(f"file{len(paths)}", content)
        return small, paths

    def _put(self, suffix: str, content: bytes) -> str:
        path = self.path.with_suffix(f".{suffix}")
        if self._beside.get(path) != content:
            path.write_bytes(content)
            self._beside[path] = content
        return str(path)

    def read(self, groups: Groups) -> None:
        """The inverse, into tensors of the same names, shapes and order."""
        offset = 0
        for tensors in groups.values():
            for tensor in tensors.values():
                if tensor.nbytes:
                    tensor.copy_(self._place(tensor, offset))
                offset += _aligned(tensor.nbytes)

    def _place(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        return self._bytes[offset : offset + like.nbytes].view(like.dtype).view(like.shape)

    def close(self) -> None:
        """Give the memory back."""
        self._pool.shutdown()
        del self._bytes
        self.unlink()
        os.close(self._file)

    def unlink(self) -> None:
        """No name is left of it; the memory stays until it is closed, or the process ends."""
        for path in (self.path, *self._beside):
            path.unlink(missing_ok=True)


def _move(pieces: Sequence[Piece]) -> None:
    for to, source in pieces:
        np.copyto(to, source)


def sweep(folder: Path) -> None:
    """Remove the buffers of killed processes."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.suffix:
            continue
        with contextlib.suppress(OSError):  # somebody else's, or removed by another one
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for each in (*folder.glob(f"{path.name}.*"), path):
                    each.unlink()
            finally:
                os.close(file)


def folder_for(length: int, run: Path) -> Path:
    """Where shared memory of this size has room: /dev/shm, else the home's run folder."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        found = os.statvfs(shared)
        if found.f_bavail * found.f_frsize > 2 * length:
            return shared
    return run
