"""Saves and imports, and what is there afterwards."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from llmproto.errors import ErrorKind, RemoteError
from llmproto.versions import Lineage, TensorGroup, TensorPlace, VersionKind
from llmservices.store.archive import Archive
from llmservices.store.rows import resolve, row
from llmservices.versions.manifest import folder_of, read_manifest
from llmservices.versions.weights import read_tensors

from .saves import (
    CONFIG,
    Tensors,
    bytes_used,
    check_store,
    random_tensors,
    save_of,
    small_save,
)


def equal(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def test_a_save_is_read_back_bit_for_bit(archive: Archive, tmp_path: Path) -> None:
    big = (9 << 20) // 4
    tensors = random_tensors(0, 7, big) | {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "n": torch.tensor(7),
        "empty": torch.zeros(0),
    }
    state = {"m": torch.ones(3), "step": torch.tensor(5)}
    groups = {"model.safetensors": tensors, "optimizer.safetensors": state}
    saved = archive.save(save_of(tmp_path / "b", groups), [CONFIG])
    folder = folder_of(archive.root, saved.version)
    assert equal(read_tensors(folder), tensors)
    assert equal(read_tensors(folder, "optimizer.safetensors"), state)
    assert (folder / "config.json").read_bytes() == CONFIG
    assert saved.reference == f"model@{saved.version.hex()[:8]}"
    assert (
        saved.bytes
        == saved.bytes_new
        == sum(t.nbytes for t in [*tensors.values(), *state.values()]) + len(CONFIG)
    )


def test_files_at_paths_are_taken_from_there(archive: Archive, tmp_path: Path) -> None:
    large = bytes(range(256)) * 8192
    (tmp_path / "beside").write_bytes(large)
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(0, 7)})
    save = msgspec.structs.replace(save, paths={"tokenizer.json": str(tmp_path / "beside")})
    folder = folder_of(archive.root, archive.save(save, [CONFIG]).version)
    assert (folder / "tokenizer.json").read_bytes() == large
    (tmp_path / "beside").unlink()
    with pytest.raises(RemoteError, match="beside is no file") as caught:
        archive.save(save, [CONFIG])
    assert caught.value.kind is ErrorKind.STALE


def test_the_same_save_again_is_the_same_version(archive: Archive, tmp_path: Path) -> None:
    first = small_save(archive, tmp_path / "b", 1)
    again = small_save(Archive(archive.root), tmp_path / "b", 1)
    assert (again.version, again.bytes_new) == (first.version, 0)
    assert archive.index.listed(None, checkpoints=True, limit=9)[1] == 1


def test_the_newest_version_of_a_name_is_what_the_name_means(
    archive: Archive, tmp_path: Path
) -> None:
    saved = [small_save(archive, tmp_path / "b", seed) for seed in range(3)]
    found = row(archive.index, archive.root, resolve(archive.index, "model"))
    assert found.version == saved[-1].version
    assert found.bytes_own == saved[-1].bytes - len(CONFIG)
    digits = saved[0].version.hex()
    assert resolve(archive.index, f"@{digits[:12]}").digest == digits
    assert resolve(archive.index, f"model@{digits[:6]}").digest == digits


def test_a_buffer_that_is_gone_or_too_short_is_stale_or_invalid(
    archive: Archive, tmp_path: Path
) -> None:
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(0, 100)})
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(RemoteError) as short:
        archive.save(save, [CONFIG])
    (tmp_path / "b").unlink()
    with pytest.raises(RemoteError) as gone:
        archive.save(save, [CONFIG])
    assert (short.value.kind, gone.value.kind) == (ErrorKind.INVALID, ErrorKind.STALE)
    assert list((archive.root / "tmp").iterdir()) == []


def test_a_plain_folder_is_imported(
    archive: Archive, plain_folder: Callable[[str, Tensors], Path]
) -> None:
    tensors = random_tensors(3, 10, 2000)
    saved = archive.import_folder(plain_folder("plain", tensors), "plain", None)
    folder = folder_of(archive.root, saved.version)
    manifest, digest = read_manifest(folder)
    assert digest == saved.version
    assert manifest.kind is VersionKind.MODEL
    assert [file.name for file in manifest.files] == ["config.json", "tokenizer.json"]
    assert equal(read_tensors(folder), tensors)


def test_ten_checkpoints_of_an_adapter_run_cost_a_fifth_of_their_base(
    archive: Archive, tmp_path: Path
) -> None:
    """Half of them name frozen tensors by digest, as a trainer does that saves whole models."""
    base_tensors = random_tensors(0, *[600_000] * 4, 100, 200)
    first = archive.save(save_of(tmp_path / "b", {"model.safetensors": base_tensors}), [CONFIG])
    base = bytes_used(archive.root)
    group = archive.manifest(first.version).group("model.safetensors")
    assert group is not None
    frozen = [
        TensorPlace(t.name, t.dtype, t.shape, 0, t.size_bytes, t.digest) for t in group.tensors
    ]
    for step in range(1, 11):
        trained = random_tensors(step, *[2_000] * 4)
        moments = random_tensors(100 + step, *[2_000] * 8)
        save = save_of(
            tmp_path / "b",
            {"adapter_model.safetensors": trained, "optimizer.safetensors": moments},
            kind=VersionKind.CHECKPOINT,
            lineage=Lineage(job=b"12345678", step=step),
        )
        if step % 2:
            save = msgspec.structs.replace(save, inherit=first.version)
        else:
            whole = TensorGroup("model.safetensors", frozen)
            save = msgspec.structs.replace(save, groups=[*save.groups, whole])
        saved = archive.save(save, [CONFIG])
        assert saved.bytes > first.bytes
        folder = folder_of(archive.root, saved.version)
        assert equal(read_tensors(folder, "model.safetensors"), base_tensors)
    used = bytes_used(archive.root)
    assert used < 1.2 * base, (used, base)
    check_store(archive)


def test_very_many_tensors_are_described_beside_the_buffer(
    archive: Archive, tmp_path: Path
) -> None:
    tensors = random_tensors(1, *range(1, 40))
    save = save_of(tmp_path / "b", {"model.safetensors": tensors})
    (tmp_path / "layout").write_bytes(msgspec.msgpack.encode(save.groups))
    save = msgspec.structs.replace(save, groups=[], layout=str(tmp_path / "layout"))
    saved = archive.save(save, [CONFIG])
    assert equal(read_tensors(folder_of(archive.root, saved.version)), tensors)
