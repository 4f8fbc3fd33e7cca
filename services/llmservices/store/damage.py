"""Every object of a version, read and compared with its name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llmproto import limits
from llmproto.errors import RemoteError
from llmproto.versions import Damage

from llmservices.versions.manifest import (
    MANIFEST,
    Manifest,
    check_files,
    folder_of,
    object_path,
    read_manifest,
)
from llmservices.versions.pieces import check, new_buffer
from llmservices.versions.reference import short

DAMAGE_MAX: Final = 100
"""Of one version: who has lost more has lost all."""


def damage_of(root: Path, digest: bytes) -> list[Damage]:
    """What is wrong with a version, at most DAMAGE_MAX; each object is read once."""
    folder = folder_of(root, digest)
    reference = f"@{digest.hex()[:8]}"
    try:
        manifest, _ = read_manifest(folder)
        reference = short(manifest.name, digest)
        check_files(folder, manifest)
    except RemoteError as error:
        return [Damage(reference, MANIFEST, "", str(folder), _cut(error.detail))]
    buffer = new_buffer()
    found: list[Damage] = []
    seen: set[str] = set()
    for file, tensor, name, length in _objects(manifest):
        if name in seen:
            continue
        seen.add(name)
        path = object_path(root, name)
        wrong = check(path, name, length, buffer)
        if wrong is not None:
            found.append(Damage(reference, file, tensor, str(path), _cut(wrong)))
            if len(found) >= DAMAGE_MAX:
                break
    return found


def _objects(manifest: Manifest) -> Iterator[tuple[str, str, str, int]]:
    """(file, tensor, object, bytes) of each."""
    for file in manifest.files:
        yield file.name, "", file.object, file.size_bytes
    for group in manifest.groups:
        for tensor in group.tensors:
            for name, _, length in tensor.pieces():
                yield group.file, tensor.name, name, length


def _cut(detail: str) -> str:
    return detail[: limits.DETAIL_BYTES_MAX]
