"""A plain Hugging Face folder as the draft of a version.

Weights are safetensors alone, whatever shards they come in; they become one `model.safetensors`.
Pickles and weights of other frameworks are left where they are, and named; where nothing else has
the weights, the folder is refused.  Folders inside are taken where sentence-transformers'
modules.json names them.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from llmproto.errors import RemoteError, invalid
from llmproto.versions import Lineage, VersionKind

from llmservices.models.tasks import CONFIG, MODULES
from llmservices.store.core import Cut, Draft, PlannedGroup, PlannedTensor, check_file_name
from llmservices.versions import adapters
from llmservices.versions.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MODEL_WEIGHTS,
    STAMP,
    Manifest,
    is_version,
)
from llmservices.versions.reference import check_name
from llmservices.versions.safetensors_file import read_header

WEIGHT_INDEX: Final = "model.safetensors.index.json"
FILE_BYTES_MAX: Final = 256 << 20
"""Of a small file: the largest tokenizer.json in use has about 35 MB."""
FILES_MAX: Final = 1000
OTHER_WEIGHTS: Final = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf", ".ggml", ".msgpack", ".onnx", ".ot", ".tflite",
     ".mlmodel", ".pkl", ".pickle", ".npz", ".safetensors"}
)  # fmt: skip


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


class _Module(msgspec.Struct):
    path: str = ""


class Found(msgspec.Struct, frozen=True):
    """A folder, read but for its tensors."""

    draft: Draft
    sources: list[Path]
    """The files that the draft's cuts refer to."""
    left_out: list[str]
    """Weights and pickles of the folder that the draft does not hold."""


def read_folder(path: Path, name: str, *, base: tuple[bytes, Manifest] | None) -> Found:
    """INVALID, with the path, for what is not a whole model folder, or an adapter without its
    base."""
    check_name(name)
    if not path.is_absolute() or not path.is_dir():
        raise invalid(f"{path} is no folder: give the absolute path of a Hugging Face folder")
    if is_version(path):
        raise invalid(f"{path} is a version of a store already")
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    if is_adapter and base is None:
        raise invalid(
            f"{path} holds an adapter ({ADAPTER_CONFIG}): import its base first and name it"
        )
    if base is not None and not is_adapter:
        raise invalid(f"{path} has no {ADAPTER_CONFIG}: only an adapter has a base")
    if not is_adapter and not (path / CONFIG).is_file():
        raise invalid(f"{path} is not a model folder: it has no {CONFIG}")
    shards = [path / ADAPTER_WEIGHTS] if is_adapter else _shards(path)
    inner = _module_folders(path)
    grouped = {ADAPTER_WEIGHTS if is_adapter else MODEL_WEIGHTS: shards}
    for folder in inner:
        if (path / folder / MODEL_WEIGHTS).is_file():
            grouped[f"{folder}/{MODEL_WEIGHTS}"] = [path / folder / MODEL_WEIGHTS]
        else:
            _check_none_lost(path / folder)
    sources: list[Path] = []
    groups = [_group(file, files, sources) for file, files in grouped.items()]
    files = _small_files(path, inner)
    inherited: Manifest | None = None
    lineage = Lineage()
    if base is not None:
        lineage = Lineage(parent=base[0])
        inherited = base[1]
        check_base(inherited)
        # Read for its refusals: what it cannot be merged with is said now.
        adapters.changes(
            adapters.read_config(files[ADAPTER_CONFIG], path / ADAPTER_CONFIG),
            {tensor.name: tensor.shape for tensor in groups[0].tensors},
            [tensor.name for group in _model(inherited) for tensor in group.tensors],
            path,
        )
    draft = Draft(
        name=name,
        kind=VersionKind.MODEL,
        groups=groups,
        files=files,
        inherited_groups=[] if inherited is None else inherited.groups,
        inherited_files=[]
        if inherited is None
        else [file for file in inherited.files if file.name not in files],
        lineage=lineage,
        metrics={},
    )
    return Found(draft, sources, _left_out(path, inner, sources))


def check_base(manifest: Manifest) -> None:
    """INVALID for what cannot be the base of an adapter."""
    if manifest.is_adapter:
        raise invalid(
            f"{manifest.name} is an adapter itself: export it merged, import that, and name it as "
            "the base"
        )
    if not _model(manifest):
        raise invalid(f"{manifest.name} holds no {MODEL_WEIGHTS}: it cannot be an adapter's base")


@contextlib.contextmanager
def opened(paths: list[Path]) -> Iterator[list[int]]:
    """The files, open."""
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise _unreadable(path, error) from None
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _model(manifest: Manifest) -> list[PlannedGroup]:
    group = manifest.group(MODEL_WEIGHTS)
    if group is None:
        return []
    tensors = [
        PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes, tensor.stored)
        for tensor in group.tensors
    ]
    return [PlannedGroup(group.file, tensors)]


def _group(file: str, paths: list[Path], sources: list[Path]) -> PlannedGroup:
    """Of several shards one, in their order."""
    tensors: list[PlannedTensor] = []
    metadata: dict[str, str] = {}
    seen: set[str] = set()
    for path in paths:
        header = read_header(path)
        metadata |= header.metadata
        for place in header.places:
            if place.name in seen:
                raise invalid(f"{path}: tensor {place.name} stands in another shard too")
            seen.add(place.name)
            at = Cut(len(sources), place.offset)
            tensors.append(PlannedTensor(place.name, place.dtype, place.shape, place.bytes, at))
        sources.append(path)
    return PlannedGroup(file, tensors, dict(sorted(metadata.items())))


def _shards(folder: Path) -> list[Path]:
    index = folder / WEIGHT_INDEX
    if not index.is_file():
        if (folder / MODEL_WEIGHTS).is_file():
            return [folder / MODEL_WEIGHTS]
        others = _foreign(folder)
        there = f": {others[0].name} is there, which is never read" if others else ""
        raise invalid(f"{folder / MODEL_WEIGHTS} is missing{there}; weights must be safetensors")
    try:
        names = msgspec.json.decode(index.read_bytes(), type=_WeightIndex).weight_map
    except (OSError, msgspec.DecodeError) as error:
        raise invalid(f"{index} cannot be read: {error}") from None
    for name in set(names.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise invalid(f"{index} names {name!r}, which is no shard of this folder")
    shards = [folder / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise invalid(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}"
        )
    return shards


def _module_folders(folder: Path) -> list[str]:
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules = msgspec.json.decode(path.read_bytes(), type=list[_Module])
    except (OSError, msgspec.DecodeError) as error:
        raise invalid(f"{path} cannot be read: {error}") from None
    named = [module.path for module in modules if module.path]
    for name in named:
        check_file_name(name)
        if "/" in name:
            raise invalid(f"{path} names {name!r}, which is no folder of this one")
    return [name for name in named if (folder / name).is_dir()]


def _small_files(folder: Path, inner: list[str]) -> dict[str, bytes]:
    """All that is neither weights nor hidden."""
    left_out = {MANIFEST, STAMP, WEIGHT_INDEX}
    found: dict[str, bytes] = {}
    for place in (folder, *(folder / name for name in inner)):
        for path in sorted(place.iterdir()):
            name = str(path.relative_to(folder))
            skipped = path.name.startswith(".") or path.suffix in OTHER_WEIGHTS or name in left_out
            if skipped or not path.is_file():
                continue
            found[check_file_name(name)] = read_small(path)
            if len(found) > FILES_MAX:
                raise invalid(f"{folder} has more than {FILES_MAX} files")
    return found


def _foreign(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix in OTHER_WEIGHTS)


def _check_none_lost(folder: Path) -> None:
    """A module's weights that are there in another form alone would be missing from the model."""
    others = _foreign(folder)
    if others:
        raise invalid(
            f"{folder / MODEL_WEIGHTS} is missing: {others[0].name} is there, which is never read; "
            "weights must be safetensors"
        )


def _left_out(folder: Path, inner: list[str], sources: list[Path]) -> list[str]:
    places = (folder, *(folder / name for name in inner))
    found = [path for place in places for path in _foreign(place) if path not in sources]
    return [str(path.relative_to(folder)) for path in found]


def read_small(path: Path) -> bytes:
    """A file beside the weights, whole; INVALID where it is too large, or cannot be read."""
    try:
        count = path.stat().st_size
        if count > FILE_BYTES_MAX:
            raise invalid(
                f"{path} has {count} bytes, more than the {FILE_BYTES_MAX} of a file beside the "
                "weights"
            )
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> RemoteError:
    return invalid(f"{path} cannot be read: {error.strerror or error}")
