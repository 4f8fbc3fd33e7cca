"""The weight files of a model folder: which there must be, whether they are whole, and what is
hashed of them.

Reads headers and samples, never a tensor.  Format: the safetensors specification (8 bytes of header
length, little endian; a JSON header; then the data that the header's offsets span).
"""

import hashlib
import json
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError, invalid

from llmservices.versions.manifest import check_files, is_version, read_manifest

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
HEADER_BYTES_MAX: Final = 100_000_000  # the specification's own bound
WHOLE_BYTES_MAX: Final = 32 << 20  # a file up to this size is hashed whole: tens of milliseconds
SAMPLES: Final = 64  # evenly spaced pieces of a larger file, the first and the last included
SAMPLE_BYTES: Final = 1 << 16

DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WeightIndex(msgspec.Struct):
    """The part of model.safetensors.index.json that names the shards."""

    weight_map: dict[str, str]


class Version(msgspec.Struct, frozen=True):
    """What is read of a version of the store: its manifest, and no object."""

    digest: bytes
    files: "list[WeightFile]"


class WeightFile(msgspec.Struct, frozen=True):
    """One whole safetensors file."""

    name: str
    header: bytes
    size_bytes: int
    dtype: str | None
    """The element type of its first tensor, in the words of config.json."""


def read_version(folder: Path) -> Version | None:
    """Of a version's folder, its small files compared with its manifest; None for a plain folder.

    An adapter weighs what its base does: it is merged in when it is loaded.
    """
    if not is_version(folder):
        return None
    manifest, digest = read_manifest(folder)
    check_files(folder, manifest)
    group = manifest.group(WEIGHTS)
    if group is None:
        raise invalid(f"{folder}: the version has no {WEIGHTS}: it is no model that can be served")
    dtype = DTYPES.get(group.tensors[0].dtype) if group.tensors else None
    file = WeightFile(name=WEIGHTS, header=b"", size_bytes=group.size_bytes, dtype=dtype)
    return Version(digest, [file])


def unreadable(path: Path, error: OSError) -> RemoteError:
    """What to answer when the operating system refuses a file of the folder."""
    return invalid(
        f"{path}: cannot be read ({error.strerror or error}); check that it is there "
        "and its permissions"
    )


def weight_names(folder: Path) -> list[str]:
    """Names of the files that the weights consist of, sorted; all of them exist."""
    if (folder / INDEX).exists():
        return _indexed(folder)
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    others = sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf"}
    )
    if others:
        raise invalid(
            f"{folder}: holds {others[0]} but no {WEIGHTS}: weights are read from "
            "safetensors only; convert the model"
        )
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if shards:
        raise invalid(
            f"{folder}: holds {shards[0]} but neither {WEIGHTS} nor {INDEX}: fetch the missing file"
        )
    raise invalid(
        f"{folder}: has no weights: neither {WEIGHTS} nor {INDEX} is there; fetch "
        "the rest of the folder"
    )


def read_weight_file(folder: Path, name: str) -> WeightFile:
    """Its header, after checking that header and data are all there."""
    path = folder / name
    try:
        bytes_there = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(HEADER_BYTES_MAX, bytes_there - 8):
                raise invalid(
                    f"{path}: not a whole safetensors file ({bytes_there} bytes); fetch it again"
                )
            header = file.read(header_bytes)
    except OSError as error:
        raise unreadable(path, error) from error
    data_bytes, dtype = _read_header(path, header)
    if 8 + header_bytes + data_bytes != bytes_there:
        raise invalid(
            f"{path}: has {bytes_there} bytes, its header names "
            f"{8 + header_bytes + data_bytes}; fetch it again"
        )
    return WeightFile(name=name, header=header, size_bytes=bytes_there, dtype=dtype)


def add_samples(hasher: "hashlib.blake2b", path: Path, bytes_there: int) -> None:
    """Feed a file: whole up to WHOLE_BYTES_MAX, else SAMPLES pieces of SAMPLE_BYTES at even
    distances.

    Piece i of n begins at floor(i * (size - SAMPLE_BYTES) / (n - 1)).
    """
    with path.open("rb") as file:
        if bytes_there <= WHOLE_BYTES_MAX:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
            return
        for index in range(SAMPLES):
            file.seek(index * (bytes_there - SAMPLE_BYTES) // (SAMPLES - 1))
            hasher.update(file.read(SAMPLE_BYTES))


def _indexed(folder: Path) -> list[str]:
    path = folder / INDEX
    try:
        index = msgspec.json.decode(path.read_bytes(), type=WeightIndex)
    except OSError as error:
        raise unreadable(path, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"{path}: is not a safetensors index ({error}); fetch it again") from error
    names = sorted(set(index.weight_map.values()))
    outside = [
        name for name in names if Path(name).name != name or not name.endswith(".safetensors")
    ]
    if outside:
        raise invalid(f"{path}: names {outside[0]!r}, which is no safetensors file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        shown = ", ".join(missing[:8])
        raise invalid(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: "
            f"{shown}; fetch them"
        )
    return names


def _read_header(path: Path, header: bytes) -> tuple[int, str | None]:
    """Bytes of data that the header spans, and the first tensor's element type."""
    try:
        entries = json.loads(header)
        tensors = [entry for name, entry in sorted(entries.items()) if name != "__metadata__"]
        data_bytes = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        dtype = DTYPES.get(tensors[0]["dtype"]) if tensors else None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise invalid(
            f"{path}: its safetensors header is broken ({error!r}); fetch it again"
        ) from error
    return data_bytes, dtype
