"""The safetensors format, as far as headers go: read one, make one.

Source: the safetensors specification: 8 bytes of header length, little endian; a JSON object of
name -> {dtype, shape, data_offsets}, with `__metadata__`; then the data, without holes.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError, invalid

from llmservices.versions.manifest import DTYPE_BYTES, TensorEntry

HEADER_BYTES_MAX: Final = 100_000_000
"""The specification's own bound."""


class Place(msgspec.Struct, frozen=True):
    """One tensor in a file."""

    name: str
    dtype: str
    shape: list[int]
    offset: int
    """From the file's beginning."""
    bytes: int


class Header(msgspec.Struct, frozen=True):
    """Of a whole file."""

    places: list[Place]
    """In the order of their data."""
    metadata: dict[str, str]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> Header:
    """INVALID, with the path, for a file that is torn or of another format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(HEADER_BYTES_MAX, size - 8):
                raise _torn(path, f"it has {size} bytes")
            content = file.read(length)
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        entries = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        metadata = entries.pop("__metadata__", msgspec.Raw(b"{}"))
        named = msgspec.json.decode(metadata, type=dict[str, str])
        tensors = {
            name: msgspec.json.decode(entry, type=_Tensor) for name, entry in entries.items()
        }
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _torn(path, str(error)) from None
    return Header(_places(path, tensors, first=8 + length, size=size), named)


def _places(path: Path, tensors: dict[str, _Tensor], *, first: int, size: int) -> list[Place]:
    places = []
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = tensor.data_offsets
        one = DTYPE_BYTES.get(tensor.dtype)
        if one is None:
            raise invalid(f"{path}: tensor {name} has the unknown type {tensor.dtype!r}")
        count = one
        for dimension in tensor.shape:
            count *= dimension
        if begin != at or end - begin != count or min(tensor.shape, default=0) < 0:
            raise _torn(path, f"tensor {name} is not where it should be")
        places.append(Place(name, tensor.dtype, tensor.shape, first + begin, count))
        at = end
    if first + at != size:
        raise _torn(path, f"it has {size} bytes, its header names {first + at}")
    return places


def _torn(path: Path, detail: str) -> RemoteError:
    return invalid(f"{path} is torn or not a safetensors file ({detail}): fetch it again")


def ordered(tensors: Sequence[TensorEntry]) -> list[TensorEntry]:
    """As they stand in a file: larger element types first, so that all are aligned."""
    return sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))


def make_header(tensors: Sequence[TensorEntry], metadata: dict[str, str]) -> bytes:
    """Everything before the data of these tensors, which follows in this order."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.size_bytes],
        }
        at += tensor.size_bytes
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def write_all(fd: int, content: bytes | bytearray | memoryview) -> None:
    """All of it, however often it takes."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
