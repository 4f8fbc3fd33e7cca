"""Tags, metrics, removal, collection."""

from pathlib import Path

import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmproto.versions import Lineage, TagRemove, TagSet
from llmservices.store.archive import Archive
from llmservices.store.rows import resolve, row
from llmservices.store.upkeep import Pins, Upkeep
from llmservices.versions.manifest import folder_of

from .saves import (
    CONFIG,
    check_store,
    checkpoint,
    objects_on_disk,
    random_tensors,
    save_of,
    small_save,
)


@pytest.fixture
def upkeep(archive: Archive) -> Upkeep:
    return Upkeep(archive, Pins())


def checkpoints(archive: Archive) -> list[int]:
    """Steps of those that are there, oldest first."""
    return [entry.lineage.step for entry in archive.index.all() if entry.kind == "checkpoint"]


def test_a_tag_moves_only_from_where_the_caller_thinks_it_stands(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    first, second = (small_save(archive, tmp_path / "b", seed) for seed in (1, 2))
    upkeep.set_tag(TagSet(first.reference, "prod", None, True))
    assert resolve(archive.index, "model:prod").digest == first.version.hex()
    with pytest.raises(RemoteError, match=first.version.hex()) as stale:
        upkeep.set_tag(TagSet(second.reference, "prod", second.version, True))
    assert stale.value.kind is ErrorKind.STALE
    with pytest.raises(RemoteError) as absent:
        upkeep.set_tag(TagSet(second.reference, "prod", None, True))
    assert absent.value.kind is ErrorKind.STALE
    upkeep.set_tag(TagSet(second.reference, "prod", first.version, True))
    again = Archive(archive.root)
    assert resolve(again.index, "model:prod").digest == second.version.hex()
    upkeep.remove_tag(TagRemove("model", "prod"))
    with pytest.raises(RemoteError, match="no tag 'prod'; tags: none"):
        resolve(archive.index, "model:prod")


def test_recorded_metrics_belong_to_the_version(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    saved = small_save(archive, tmp_path / "b", 1)
    upkeep.record("model", {"accuracy": 0.5, "loss": 1.0})
    upkeep.record("model", {"accuracy": 0.75})
    again = Archive(archive.root)
    found = row(again.index, again.root, resolve(again.index, saved.reference))
    assert found.metrics == {"accuracy": 0.75, "loss": 1.0}
    with pytest.raises(RemoteError, match="f1 is nan"):
        upkeep.record("model", {"f1": float("nan")})


def test_a_removed_version_takes_only_its_own_objects(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    shared = random_tensors(1, 1000)
    versions = [
        archive.save(
            save_of(
                tmp_path / "b", {"model.safetensors": shared | {"own": random_tensors(n, 50)["t0"]}}
            ),
            [CONFIG],
        )
        for n in (2, 3)
    ]
    upkeep.record(versions[1].reference, {"loss": 1.0})
    upkeep.remove(versions[1].reference, in_table={})
    check_store(archive)
    assert len(objects_on_disk(archive.root)) == 2
    assert not list((archive.root / "metrics").iterdir())
    with pytest.raises(RemoteError, match="is no version"):
        resolve(archive.index, versions[1].reference)


def test_what_something_stands_on_is_not_removed(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    saved = small_save(archive, tmp_path / "b", 1)
    with pytest.raises(RemoteError, match="in the model table as served"):
        upkeep.remove("model", in_table={saved.version: "served"})
    upkeep.set_tag(TagSet("model", "prod"))
    with pytest.raises(RemoteError, match="has the tags prod"):
        upkeep.remove("model", in_table={})
    upkeep.remove_tag(TagRemove("model", "prod"))
    pins = Pins()
    with pins.hold(saved.version.hex()), pytest.raises(RemoteError) as read:
        Upkeep(archive, pins).remove("model", in_table={})
    assert read.value.kind is ErrorKind.UNAVAILABLE
    upkeep.remove("model", in_table={})
    assert objects_on_disk(archive.root) == set()


def test_superseded_checkpoints_go_and_one_more_than_asked_stays(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    job = b"12345678"
    for step in range(1, 6):
        checkpoint(archive, tmp_path / "b", step)
        upkeep.retire(job, 2)
        checkpoint(archive, tmp_path / "b", step + 100, job=b"another!")
    assert checkpoints(archive) == [101, 102, 3, 103, 4, 104, 5, 105]
    check_store(archive)


def test_a_collection_keeps_what_a_job_may_be_continued_from(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    living, over = b"living!!", b"over!!!!"
    saved = [checkpoint(archive, tmp_path / "b", step, job=living) for step in range(1, 5)]
    for step in range(11, 14):
        checkpoint(archive, tmp_path / "b", step, job=over)
    upkeep.set_tag(TagSet(f"@{archive.index.checkpoints(over.hex())[0]}", "keep"))
    stray = archive.root / "objects" / "ab"
    stray.mkdir(exist_ok=True)
    (stray / ("ab" * 32)).write_bytes(b"nobody's")
    collected = upkeep.collect(living={living.hex()}, wanted={saved[0].version.hex()})
    assert checkpoints(archive) == [1, 3, 4, 13]
    assert (collected.versions, collected.objects) == (3, 1)
    check_store(archive)
    assert upkeep.collect(living=None).versions == 1
    assert checkpoints(archive) == [3, 4, 13]


def test_nothing_is_collected_while_a_manifest_cannot_be_read(
    archive: Archive, upkeep: Upkeep, tmp_path: Path
) -> None:
    saved = small_save(archive, tmp_path / "b", 1)
    folder = folder_of(archive.root, saved.version)
    path = folder / "manifest.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b'"model"', b'"modem"', 1))
    (archive.root / "index.sqlite").unlink()
    again = Archive(archive.root)
    assert again.index.all() == []
    keeper = Upkeep(again, Pins())
    with pytest.raises(RemoteError, match="nobody knows which objects it needs"):
        keeper.collect(living=None)
    assert objects_on_disk(archive.root)
    keeper.remove(f"@{folder.name[:8]}", in_table={})
    keeper.collect(living=None)
    assert objects_on_disk(archive.root) == set()
    assert not folder.exists()


def test_lineage_is_told(archive: Archive, tmp_path: Path) -> None:
    lineage = Lineage(bytes(32), "d1", "name = 'x'", "1.0", b"12345678", 7, 8, "losses.bin")
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(1, 3)}, lineage=lineage)
    archive.save(save, [CONFIG])
    assert row(archive.index, archive.root, resolve(archive.index, "model")).lineage == lineage
