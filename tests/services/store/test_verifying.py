"""Bit rot: found by a verification and at load, named, and never served."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmproto.errors import RemoteError
from llmservices.models.folder import Tensors as FolderTensors
from llmservices.store.archive import Archive
from llmservices.store.rows import resolve
from llmservices.store.verifying import Verifier
from llmservices.tokenizer.folder import inspect
from llmservices.versions.manifest import folder_of, object_path, read_manifest
from llmservices.versions.weights import read_tensors

from .saves import PIECE_FLOATS, Tensors, check_store, random_tensors, small_save


def flip(path: Path, at: int) -> None:
    """One bit."""
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def verified(archive: Archive) -> Verifier:
    verifier = Verifier(archive.root)
    verifier.verify(archive.index.all(), archive.damaged)
    return verifier


def test_a_flipped_bit_of_a_tensor_is_found_and_named(archive: Archive, tmp_path: Path) -> None:
    saved = small_save(archive, tmp_path / "b", 1)
    folder = folder_of(archive.root, saved.version)
    group = read_manifest(folder)[0].group("model.safetensors")
    assert group is not None
    tensor = group.find("t2")
    assert tensor is not None
    path = object_path(archive.root, tensor.objects[1])
    flip(path, 17)
    report = Verifier(archive.root).verify(archive.index.all(), {})
    (damage,) = report.damage
    assert (report.versions, report.objects) == (1, 4)
    assert (damage.reference, damage.file, damage.tensor, damage.object) == (
        saved.reference, "model.safetensors", "t2", str(path),
    )  # fmt: skip
    for read in (
        lambda: read_tensors(folder),
        lambda: FolderTensors(folder, dtype=None, device=torch.device("cpu")).take(
            "t2", PIECE_FLOATS + 100
        ),
    ):
        with pytest.raises(RemoteError) as refused:
            read()
        for part in (saved.version.hex()[:8], "model.safetensors", "tensor t2", str(path)):
            assert part in refused.value.detail
    small_save(archive, tmp_path / "b", 1)  # It looks whole: it is not known to be damaged.
    assert verified(archive).damaged_objects == {tensor.objects[1]}
    archive.suspects |= {tensor.objects[1]}
    small_save(archive, tmp_path / "b", 1)
    check_store(archive)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_an_object_of_another_length_is_found(
    archive: Archive, tmp_path: Path, change: str
) -> None:
    saved = small_save(archive, tmp_path / "b", 1)
    folder = folder_of(archive.root, saved.version)
    group = read_manifest(folder)[0].group("model.safetensors")
    assert group is not None
    path = object_path(archive.root, group.tensors[1].objects[0])
    path.chmod(0o600)
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if change == "shorter" else bytes(2000))
    assert len(verified(archive).damaged_objects) == 1
    with pytest.raises(RemoteError, match=r"tensor t[01]"):
        read_tensors(folder)
    small_save(archive, tmp_path / "b", 1)  # What is plainly torn is written again.
    check_store(archive)


def test_a_flipped_bit_of_a_small_file_is_found_wherever_it_is_read(
    archive: Archive, plain_folder: Callable[[str, Tensors], Path]
) -> None:
    tensors = random_tensors(1, 10)
    source = plain_folder("plain", tensors)
    saved = archive.import_folder(source, "plain", None)
    folder = folder_of(archive.root, saved.version)
    flip(folder / "tokenizer.json", 0)
    (damage,) = Verifier(archive.root).verify(archive.index.all(), {}).damage
    assert (damage.file, damage.tensor) == ("tokenizer.json", "")
    for read in (
        lambda: FolderTensors(folder, dtype=None, device=torch.device("cpu")),
        lambda: inspect(folder),
    ):
        with pytest.raises(RemoteError, match=r"tokenizer\.json is damaged"):
            read()
    archive.suspects |= verified(archive).damaged_objects
    archive.import_folder(source, "plain", None)  # heals it
    check_store(archive)
    assert (folder / "tokenizer.json").read_bytes() == b"{}"


def test_a_flipped_bit_of_a_manifest_is_found(archive: Archive, tmp_path: Path) -> None:
    saved = small_save(archive, tmp_path / "b", 1)
    folder = folder_of(archive.root, saved.version)
    flip(folder / "manifest.json", 9)
    (damage,) = Verifier(archive.root).verify(archive.index.all(), {}).damage
    assert (damage.file, damage.object) == ("manifest.json", str(folder / "manifest.json"))
    with pytest.raises(RemoteError, match=r"manifest\.json is damaged"):
        read_tensors(folder)


@pytest.mark.parametrize("damage", ["gone", "garbage", "torn"])
def test_the_index_is_made_anew_from_the_manifests(
    archive: Archive, tmp_path: Path, damage: str
) -> None:
    saved = [small_save(archive, tmp_path / "b", seed) for seed in range(3)]
    before = (archive.index.all(), archive.index.bytes_total())
    archive.index.close()
    path = archive.root / "index.sqlite"
    for beside in ("index.sqlite-wal", "index.sqlite-shm"):
        (archive.root / beside).unlink(missing_ok=True)
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"garbage" * 1000 if damage == "garbage" else content[:9000])
    again = Archive(archive.root)
    assert (again.index.all(), again.index.bytes_total()) == before
    assert resolve(again.index, "model").digest == saved[-1].version.hex()
    check_store(again)


def test_an_index_damaged_at_work_is_made_anew(archive: Archive, tmp_path: Path) -> None:
    small_save(archive, tmp_path / "b", 1)
    other = sqlite3.connect(archive.root / "index.sqlite")
    other.execute("drop table refs")
    other.close()
    with pytest.raises(sqlite3.DatabaseError):
        archive.index.bytes_own(archive.index.all()[0].digest)
    archive.rebuild()
    assert archive.index.bytes_own(archive.index.all()[0].digest) > 0
