"""Reads a model folder: `config.json` as typed values, weights as checked tensors.

The folder is a plain Hugging Face one, or a version's: then every byte of the weights is compared
with its digest, and an adapter is merged in.

Must never run anything from the folder; whatever is wrong with it is INVALID and names the path.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import msgspec
import torch
from llmproto.errors import RemoteError, invalid
from safetensors import SafetensorError, safe_open

from llmservices.versions.manifest import check_files, is_version
from llmservices.versions.weights import VersionTensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Config:
    """One JSON object with typed access; wrong types are INVALID with the key's name."""

    def __init__(self, values: dict[str, object], source: str) -> None:
        self._values = values
        self.source = source

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def error(self, detail: str) -> RemoteError:
        return invalid(f"{self.source}: {detail}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} is {value!r}; want an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} is {value!r}; want a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self else None

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}; want true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} is {value!r}; want a string")
        return value

    def items(self, key: str) -> Sequence[object]:
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self.error(f"{key} is {value!r}; want a list")
        return value

    def nested(self, key: str) -> "Config":
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self.error(f"{key} is {value!r}; want an object")
        return Config(value, f"{self.source} {key}")

    def keys(self) -> list[str]:
        return list(self._values)

    def refuse(self, key: str, allowed: object) -> None:
        """INVALID unless `key` is absent or has the only value that is implemented."""
        value = self._values.get(key)
        if value is not None and value != allowed:
            raise self.error(f"{key} = {value!r} is not implemented; only {allowed!r} is")

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        return value


def read_config(folder: Path) -> Config:
    """The folder's config."""
    path = folder / CONFIG
    values = _read_json(path, f"{folder} is not a model folder: it has no {CONFIG}")
    return Config(values, str(path))


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...


class _SafeFile(Protocol):
    """What is used of `safetensors.safe_open`, which comes without types."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Slice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class _Source(Protocol):
    """Where a folder's tensors come from."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> list[int]: ...

    def read(self, name: str) -> torch.Tensor:
        """As stored; a view of the file where `is_own` is false."""

    is_own: bool

    def close(self) -> None: ...


class _Plain:
    """One safetensors file."""

    is_own = False

    def __init__(self, path: Path) -> None:
        try:
            self._file: _SafeFile = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise invalid(f"{path} is torn or not a safetensors file: {error}") from error
        self._path = path

    def names(self) -> list[str]:
        return self._file.keys()

    def shape(self, name: str) -> list[int]:
        return self._file.get_slice(name).get_shape()

    def read(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise invalid(f"{self._path}: tensor {name} cannot be read: {error}") from error

    def close(self) -> None:
        """The file ends with this object."""


class _Version:
    """A version of the store."""

    is_own = True

    def __init__(self, folder: Path) -> None:
        self._tensors = VersionTensors(folder)
        check_files(folder, self._tensors.manifest)

    def names(self) -> list[str]:
        return self._tensors.names

    def shape(self, name: str) -> list[int]:
        return self._tensors.entry(name).shape

    def read(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)

    def close(self) -> None:
        self._tensors.close()


class Tensors:
    """The folder's tensors by name, read one at a time.

    Invariant: every shard that the index names exists and is whole, or construction has failed
    with its path.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype | None, device: torch.device, lent: bool = False
    ) -> None:
        """`dtype` None: as stored.  `lent`: what is taken may be a view of its file."""
        self._lent = lent
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._open: list[_Source] = (
            [_Version(folder)] if is_version(folder) else [_Plain(path) for path in _shards(folder)]
        )
        self._where = {name: source for source in self._open for name in source.names()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._where.clear()
        for source in self._open:
            source.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor, in the wanted precision, on the device; INVALID with both shapes where
        they differ."""
        source = self._where.get(name)
        if source is None:
            raise invalid(f"{self._folder}: tensor {name} is missing")
        found = tuple(source.shape(name))
        if found != shape:
            raise invalid(f"{self._folder}: tensor {name} has shape {found}; config says {shape}")
        tensor = source.read(name)
        if not tensor.is_floating_point():
            raise invalid(f"{self._folder}: tensor {name} is {tensor.dtype}; want floating point")
        # What comes from a plain file is a view of its memory map.
        dtype = self._dtype or tensor.dtype
        return tensor.to(device=self._device, dtype=dtype, copy=not (source.is_own or self._lent))

    def read(self, name: str) -> torch.Tensor:
        """The tensor as `take` gives it, whatever its shape and type."""
        source = self._where[name]
        tensor = source.read(name)
        dtype = self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self._device, dtype=dtype, copy=not source.is_own)

    def names(self) -> list[str]:
        """Of all there are."""
        return list(self._where)

    def optional(self, name: str, *shape: int) -> torch.Tensor | None:
        return self.take(name, *shape) if name in self else None


def _read_json(path: Path, missing: str) -> dict[str, object]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise invalid(missing) from error
    except OSError as error:
        raise invalid(f"{path}: {error.strerror}") from error
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise invalid(f"{path} is not a JSON object: {error}") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).exists():
            pickled = next(iter(sorted(folder.glob("*.bin"))), None)
            hint = f" ({pickled.name} is a pickle, which is never read)" if pickled else ""
            raise invalid(f"{folder / WEIGHTS} is missing{hint}; weights must be safetensors")
        return [folder / WEIGHTS]
    names = Config(_read_json(index, ""), str(index)).nested("weight_map")
    shards = sorted({names.text(key) for key in names.keys()})  # noqa: SIM118
    for shard in shards:
        if Path(shard).name != shard:
            raise invalid(f"{index} names {shard!r}, which is not a file of this folder")
        if not (folder / shard).exists():
            raise invalid(f"{folder / shard} is missing; {INDEX} names {len(shards)} shards")
    return [folder / shard for shard in shards]
