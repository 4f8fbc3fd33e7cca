"""Small tensors in packs: shared by tensor, kept while a version needs them, found damaged."""

from pathlib import Path

import pytest
import torch
from llmproto.errors import ErrorKind, RemoteError
from llmproto.versions import Save, Saved, TensorGroup, TensorPlace, VersionKind
from llmservices.store.archive import Archive
from llmservices.store.upkeep import Pins, Upkeep
from llmservices.store.verifying import Verifier
from llmservices.versions.manifest import (
    FORMAT,
    PACK_BELOW_BYTES,
    PACK_BYTES,
    GroupEntry,
    InPack,
    Manifest,
    TensorEntry,
    folder_of,
    hash_bytes,
    object_path,
    read_manifest,
)
from llmservices.versions.weights import read_tensors

from .saves import CONFIG, Tensors, check_store, objects_on_disk, random_tensors, save_of

FILE = "model.safetensors"
SIZES = (5, 300, 7, 2000)


def saved(archive: Archive, buffer: Path, tensors: Tensors) -> Saved:
    return archive.save(save_of(buffer, {FILE: tensors}), [CONFIG])


def group_of(archive: Archive, version: Saved) -> GroupEntry:
    group = archive.manifest(version.version).group(FILE)
    assert group is not None
    return group


def reads(archive: Archive, version: Saved, wanted: Tensors) -> None:
    found = read_tensors(folder_of(archive.root, version.version))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def by_digest(entry: TensorEntry, size_bytes: int) -> Save:
    place = TensorPlace("t", "F32", [size_bytes // 4], 0, size_bytes, entry.digest)
    return Save("other", VersionKind.MODEL, None, [TensorGroup(FILE, [place])])


def test_small_tensors_share_a_file_and_equal_ones_their_bytes(
    archive: Archive, tmp_path: Path
) -> None:
    tensors = random_tensors(1, *SIZES)
    tensors |= {"again": tensors["t1"].clone(), "empty": torch.zeros(0)}
    version = saved(archive, tmp_path / "b", tensors)
    assert len(objects_on_disk(archive.root)) == 2  # and the configuration
    assert version.bytes_new == sum(SIZES) * 4 + len(CONFIG)
    reads(archive, version, tensors)
    check_store(archive)


def test_packs_are_bounded_and_larger_tensors_stand_alone(archive: Archive, tmp_path: Path) -> None:
    floats = PACK_BELOW_BYTES // 4
    packs = 2
    count = packs * PACK_BYTES // PACK_BELOW_BYTES
    tensors = random_tensors(1, *[floats - 1] * count, floats)
    version = saved(archive, tmp_path / "b", tensors)
    assert len(objects_on_disk(archive.root)) == packs + 2
    entry = group_of(archive, version).find(f"t{count}")
    assert entry is not None and entry.pack is None
    reads(archive, version, tensors)
    check_store(archive)


@pytest.mark.parametrize("is_rebuilt", [False, True])
def test_a_frozen_small_tensor_is_stored_once_and_outlives_its_first_version(
    archive: Archive, tmp_path: Path, is_rebuilt: bool
) -> None:
    first_tensors = random_tensors(1, *SIZES)
    first = saved(archive, tmp_path / "b", first_tensors)
    if is_rebuilt:
        archive.rebuild()
    tensors = first_tensors | {"t3": random_tensors(2, 2000)["t0"]}
    second = saved(archive, tmp_path / "b", tensors)
    assert second.bytes_new == 8000
    assert saved(archive, tmp_path / "b", tensors).version == second.version
    upkeep = Upkeep(archive, Pins())
    upkeep.remove(first.reference, in_table={})
    upkeep.collect(living=None)
    check_store(archive)
    reads(archive, second, tensors)
    upkeep.remove(second.reference, in_table={})
    assert objects_on_disk(archive.root) == set()


def test_a_small_tensor_is_named_by_its_digest_and_its_size(
    archive: Archive, tmp_path: Path
) -> None:
    tensors = random_tensors(1, *SIZES)
    entry = group_of(archive, saved(archive, tmp_path / "b", tensors)).find("t1")
    assert entry is not None and entry.pack is not None
    version = archive.save(by_digest(entry, 1200), [])
    assert version.bytes_new == 0
    reads(archive, version, {"t": tensors["t1"]})
    for count in (800, 1600):
        with pytest.raises(RemoteError, match="send its bytes") as refused:
            archive.save(by_digest(entry, count), [])
        assert refused.value.kind is ErrorKind.STALE
    check_store(archive)


def test_a_damaged_pack_is_named_is_not_shared_and_heals(archive: Archive, tmp_path: Path) -> None:
    tensors = random_tensors(1, *SIZES)
    version = saved(archive, tmp_path / "b", tensors)
    entry = group_of(archive, version).find("t1")
    assert entry is not None and entry.pack is not None
    path = object_path(archive.root, entry.objects[0])
    content = bytearray(path.read_bytes())
    content[entry.pack.offset] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(RemoteError, match=r"tensor t1 at byte 0: .* another BLAKE3"):
        read_tensors(folder_of(archive.root, version.version))
    verifier = Verifier(archive.root)
    report = verifier.verify(archive.index.all(), {})
    assert {damage.tensor for damage in report.damage} == set(tensors)
    archive.suspects |= verifier.damaged_objects
    with pytest.raises(RemoteError, match="send its bytes"):
        archive.save(by_digest(entry, 1200), [])
    assert saved(archive, tmp_path / "b", tensors).version == version.version
    reads(archive, version, tensors)
    check_store(archive)


def test_what_a_store_of_format_1_holds_is_read_and_shared(
    archive: Archive, tmp_path: Path
) -> None:
    """A manifest as format 1 wrote it: every tensor an object of its own."""
    tensors = random_tensors(1, *SIZES)
    entries = []
    for name, tensor in tensors.items():
        content = tensor.numpy().tobytes()
        path = object_path(archive.root, hash_bytes(content))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        entries.append(
            TensorEntry(name, "F32", list(tensor.shape), len(content), [hash_bytes(content)])
        )
    old = Manifest(1, "old", VersionKind.MODEL, "generate", [], [GroupEntry(FILE, entries)])
    assert b"pack" not in old.encode()
    digest = bytes.fromhex(hash_bytes(old.encode()))
    folder = folder_of(archive.root, digest)
    folder.mkdir()
    (folder / "manifest.json").write_bytes(old.encode())
    archive.index.close()
    again = Archive(archive.root, threads=2)
    check_store(again)
    version = saved(again, tmp_path / "b", tensors)
    assert version.bytes_new == len(CONFIG)
    manifest, _ = read_manifest(folder_of(archive.root, version.version))
    assert manifest.format == FORMAT == 2
    reads(again, version, tensors)


def test_a_line_of_a_pack_is_as_it_was_first_written() -> None:
    entry = TensorEntry("w", "F32", [1], 4, ["00" * 32], InPack(8, 12, "11" * 32))
    group = GroupEntry(FILE, [entry])
    manifest = Manifest(2, "m", VersionKind.MODEL, "generate", [], [group])
    assert b'"pack":[8,12,"' + b"11" * 32 + b'"]' in manifest.encode()
    assert manifest.objects() == {"00" * 32: 12}
    assert entry.digest == bytes.fromhex("11" * 32)
