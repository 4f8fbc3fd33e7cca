"""The memory that a checkpoint is copied into; the store takes it from there during training.

Invariant: between `write` and `release` nothing changes in it.  Its pages are touched when it is
made, so that a copy costs what memory costs and no page fault.
"""

import mmap
import os
from pathlib import Path
from typing import Final

import msgspec
import torch
from llmproto.versions import TensorGroup, TensorPlace

ALIGNMENT: Final = 64
LAYOUT_BYTES_MAX: Final = 256 << 10
"""A longer description goes through a file: a message holds 1 MiB."""

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
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, self.length)
            self._map = mmap.mmap(file, self.length)
        finally:
            os.close(file)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._bytes.zero_()

    def write(self, groups: Groups) -> Written:
        """Copy all tensors; blocks for as long as that takes."""
        assert bytes_of(groups) <= self.length, "the buffer is made for the largest checkpoint"
        offset = 0
        said: list[TensorGroup] = []
        for file, tensors in groups.items():
            places: list[TensorPlace] = []
            for name, tensor in tensors.items():
                size = tensor.nbytes
                if size:
                    self._place(tensor, offset).copy_(tensor)
                shape = list(tensor.shape)
                places.append(TensorPlace(name, NAMES[tensor.dtype], shape, offset, size))
                offset += _aligned(size)
            said.append(TensorGroup(file, places, {"format": "pt"}))
        encoded = msgspec.msgpack.encode(said)
        if len(encoded) <= LAYOUT_BYTES_MAX:
            return Written(str(self.path), said, None, offset)
        layout = self.path.with_suffix(".layout")
        layout.write_bytes(encoded)
        return Written(str(self.path), [], str(layout), offset)

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
        del self._bytes
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".layout").unlink(missing_ok=True)


def folder_for(length: int, run: Path) -> Path:
    """Where shared memory of this size has room: /dev/shm, else the home's run folder."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        found = os.statvfs(shared)
        if found.f_bavail * found.f_frsize > 2 * length:
            return shared
    return run
