"""What a save becomes, decided before anything is written; and which versions may go.

Pure: takes messages and manifests, gives values.  Reading and writing stand in `archive.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.versions import Lineage, Save, TensorGroup, TensorPlace, VersionKind

from llmservices.versions.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DTYPE_BYTES,
    FORMAT,
    MANIFEST,
    MODEL_WEIGHTS,
    OPTIMIZER,
    STAMP,
    STATE,
    FileEntry,
    GroupEntry,
    LineageEntry,
    Manifest,
    Stored,
    TensorEntry,
)
from llmservices.versions.reference import check_name

ALIGNMENT: Final = 64
ADAPTER_FILES: Final = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS})
OWN_FILES: Final = frozenset({OPTIMIZER, STATE})
"""Of one checkpoint alone: never inherited."""
CHECKPOINTS_SPARE: Final = 1
"""Kept beyond what is asked: the kernel may not know of the newest yet."""

Known = Callable[[bytes, int], Stored | None]
"""Where a tensor lies that the store has, by its digest and its bytes."""


class Cut(msgspec.Struct, frozen=True):
    """Where the bytes of a tensor stand."""

    source: int
    """Index of an open file."""
    offset: int


class PlannedTensor(msgspec.Struct, frozen=True):
    """One tensor: to be stored, or known to be there."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    at: Cut | Stored


class PlannedGroup(msgspec.Struct, frozen=True):
    """One file of tensors."""

    file: str
    tensors: list[PlannedTensor]
    metadata: dict[str, str] = {}


class Draft(msgspec.Struct, frozen=True):
    """A version before its contents are hashed."""

    name: str
    kind: VersionKind
    groups: list[PlannedGroup]
    files: dict[str, bytes]
    """Small files to be stored."""
    inherited_groups: list[GroupEntry]
    inherited_files: list[FileEntry]
    lineage: Lineage
    metrics: dict[str, float]
    keep: int = 1


def draft(
    save: Save,
    groups: Sequence[TensorGroup],
    blobs: Sequence[bytes],
    *,
    read: Mapping[str, bytes],
    buffer_bytes: int,
    inherited: Manifest | None,
    known: Known,
) -> Draft:
    """A save, checked: INVALID for what contradicts itself, STALE for a tensor that is not there
    any more.  `read` is what stands at its paths."""
    check_name(save.name)
    if len(blobs) != len(save.files):
        raise invalid(f"{len(save.files)} files are named, {len(blobs)} blobs came")
    files = {check_file_name(name): blob for name, blob in zip(save.files, blobs)}
    files |= {check_file_name(name): content for name, content in read.items()}
    planned = [_group(group, buffer_bytes, known) for group in groups]
    names = [*save.files, *read, *(group.file for group in planned)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid(f"{twice} is given twice")
    if not names and inherited is None:
        raise invalid("a version without any file")
    if inherited is not None and inherited.kind is VersionKind.MODEL and inherited.is_adapter:
        _check_whole(inherited, set(names))
    lineage = save.lineage
    if lineage.parent is None and save.inherit is not None:
        lineage = msgspec.structs.replace(lineage, parent=save.inherit)
    return Draft(
        name=save.name,
        kind=save.kind,
        groups=planned,
        files=files,
        inherited_groups=_inherited_groups(inherited, set(names)),
        inherited_files=_inherited_files(inherited, set(names)),
        lineage=lineage,
        metrics=check_metrics(save.metrics),
        keep=save.keep,
    )


def manifest_of(
    plan: Draft, *, task: str, groups: list[GroupEntry], files: list[FileEntry]
) -> Manifest:
    """Of the draft, its own groups and files hashed."""
    return Manifest(
        format=FORMAT,
        name=plan.name,
        kind=plan.kind,
        task=task,
        files=sorted([*plan.inherited_files, *files], key=lambda file: file.name),
        groups=sorted([*plan.inherited_groups, *groups], key=lambda group: group.file),
        lineage=LineageEntry.of(plan.lineage),
        metrics=dict(sorted(plan.metrics.items())),
    )


def check_file_name(name: str) -> str:
    """The name of a file of a version: relative, and not one of the store's own."""
    parts = name.split("/")
    if (
        any(part in {"", ".", ".."} or part.startswith(".") for part in parts)
        or "\0" in name
        or len(parts) > 2
        or name in {MANIFEST, STAMP}
    ):
        raise invalid(f"{name!r} cannot be the name of a version's file")
    return name


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Finite numbers alone: a gate must be able to compare them."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise invalid(f"metric {name} is {value}; want a finite number")
    return dict(metrics)


def superseded(newest_first: Sequence[str], *, keep: int) -> list[str]:
    """Of a job's checkpoints, those that may go."""
    return list(newest_first[max(1, keep) + CHECKPOINTS_SPARE :])


def check_swap(where: str, current: str | None, *, expected: str | None, compare: bool) -> None:
    """STALE, naming what there is, where a tag does not stand on what the caller thinks."""
    if compare and current != expected:
        stands = f"stands on {current}" if current else "is not set"
        wanted = expected or "nothing"
        raise RemoteError(ErrorKind.STALE, f"{where} {stands}, and not on {wanted}")


class Budget:
    """The quota during one save.  Not safe for threads."""

    def __init__(self, used: int, bytes_max: int | None) -> None:
        self._used = used
        self._max = bytes_max
        self.taken = 0

    def take(self, count: int) -> None:
        """EXHAUSTED, with both numbers, beyond the quota."""
        total = self._used + self.taken + count
        if self._max is not None and total > self._max:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"the store has {self._used} bytes, this version needs {self.taken + count} or more"
                f" beside them, and [store] bytes_max is {self._max}: remove versions and collect, "
                "or raise it",
            )
        self.taken += count


def _inherited_groups(inherited: Manifest | None, given: set[str]) -> list[GroupEntry]:
    if inherited is None:
        return []
    dropped = given | _dropped(inherited, given)
    return [group for group in inherited.groups if group.file not in dropped]


def _inherited_files(inherited: Manifest | None, given: set[str]) -> list[FileEntry]:
    if inherited is None:
        return []
    dropped = given | _dropped(inherited, given)
    return [file for file in inherited.files if file.name not in dropped]


def _check_whole(inherited: Manifest, given: set[str]) -> None:
    """An adapter that was learned on top of another is none of their base."""
    if ADAPTER_WEIGHTS in given and MODEL_WEIGHTS not in given:
        raise invalid(
            f"{inherited.name} is an adapter itself: another one on top of it needs the merged "
            f"weights as {MODEL_WEIGHTS} too"
        )


def _dropped(inherited: Manifest, given: set[str]) -> set[str]:
    """What belongs to the inherited version alone; whole new weights replace an adapter too."""
    dropped = {*OWN_FILES, inherited.lineage.losses}
    return dropped | ADAPTER_FILES if MODEL_WEIGHTS in given else dropped


def _group(group: TensorGroup, buffer_bytes: int, known: Known) -> PlannedGroup:
    check_file_name(group.file)
    if not group.file.endswith(".safetensors"):
        raise invalid(f"tensors go to a .safetensors file, not {group.file!r}")
    names = {place.name for place in group.tensors}
    if len(names) != len(group.tensors):
        raise invalid(f"{group.file}: a tensor is given twice")
    tensors = [_tensor(group.file, place, buffer_bytes, known) for place in group.tensors]
    return PlannedGroup(group.file, tensors, dict(sorted(group.metadata.items())))


def _tensor(file: str, place: TensorPlace, buffer_bytes: int, known: Known) -> PlannedTensor:
    where = f"{file}: tensor {place.name}"
    one = DTYPE_BYTES.get(place.dtype)
    if one is None:
        raise invalid(f"{where}: type {place.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
    if math.prod(place.shape) * one != place.bytes:
        raise invalid(
            f"{where}: {place.dtype} of shape {place.shape} has "
            f"{math.prod(place.shape) * one} bytes, not {place.bytes}"
        )
    at: Cut | Stored = Cut(0, place.offset)
    if place.digest is not None:
        stored = known(place.digest, place.bytes)
        if stored is None:
            raise RemoteError(
                ErrorKind.STALE,
                f"{where}: the store has no tensor {place.digest.hex()[:8]} of {place.bytes} "
                "bytes: send its bytes",
            )
        at = stored
    elif place.offset % ALIGNMENT or place.offset + place.bytes > buffer_bytes:
        raise invalid(
            f"{where}: {place.bytes} bytes at {place.offset} (a multiple of {ALIGNMENT}) are not "
            f"in a buffer of {buffer_bytes}"
        )
    return PlannedTensor(place.name, place.dtype, list(place.shape), place.bytes, at)


def entry_of(tensor: PlannedTensor, stored: Stored) -> TensorEntry:
    """The manifest's line."""
    return TensorEntry(
        tensor.name, tensor.dtype, tensor.shape, tensor.bytes, stored.objects, stored.pack
    )
