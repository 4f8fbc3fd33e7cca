"""What a save becomes, and what is refused."""

import msgspec
import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmproto.versions import Lineage, Save, TensorGroup, TensorPlace, VersionKind
from llmservices.store import core
from llmservices.versions.manifest import FileEntry, GroupEntry, LineageEntry, Manifest, TensorEntry

TENSOR = TensorPlace("w", "F32", [2, 3], 0, 24)


def drafted(
    *places: TensorPlace,
    file: str = "model.safetensors",
    files: list[str] | None = None,
    inherited: Manifest | None = None,
    name: str = "model",
) -> core.Draft:
    names = ["config.json"] if files is None else files
    save = Save(
        name, VersionKind.MODEL, "/b", files=names, inherit=bytes(32) if inherited else None
    )
    groups = [TensorGroup(file, list(places))] if places else []
    blobs = [b"x"] * len(names)
    return core.draft(
        save,
        groups,
        blobs,
        read={},
        buffer_bytes=64,
        inherited=inherited,
        known=lambda digest, size_bytes: None,
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (TensorPlace("w", "F33", [2], 0, 8), "type 'F33'"),
        (TensorPlace("w", "F32", [2], 0, 9), r"has 8 bytes, not 9"),
        (TensorPlace("w", "F32", [2], 8, 8), "a multiple of 64"),
        (TensorPlace("w", "F32", [17], 0, 68), "not in a buffer of 64"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_invalid(place: TensorPlace, message: str) -> None:
    with pytest.raises(RemoteError, match=message) as error:
        drafted(place)
    assert error.value.kind is ErrorKind.INVALID


def test_a_tensor_by_digest_that_is_not_there_is_stale() -> None:
    with pytest.raises(RemoteError, match="send its bytes") as error:
        drafted(TensorPlace("w", "F32", [2], 0, 8, bytes(32)))
    assert error.value.kind is ErrorKind.STALE


@pytest.mark.parametrize(
    "name", ["manifest.json", "stamp.json", "../x", "/x", "a/b/c", ".hidden", "a//b", "a/../b", ""]
)
def test_a_file_of_a_version_has_a_plain_name(name: str) -> None:
    with pytest.raises(RemoteError, match="cannot be the name"):
        core.check_file_name(name)


@pytest.mark.parametrize("name", ["a@b", "a:b", "", "-a", "a..b", "x" * 129])
def test_a_name_can_stand_in_a_reference(name: str) -> None:
    with pytest.raises(RemoteError):
        drafted(TENSOR, name=name)


def test_nothing_is_given_twice() -> None:
    with pytest.raises(RemoteError, match="a tensor is given twice"):
        drafted(TENSOR, TENSOR)
    with pytest.raises(RemoteError, match=r"config\.json is given twice"):
        drafted(TENSOR, files=["config.json", "config.json"])
    with pytest.raises(RemoteError, match="without any file"):
        drafted(files=[])
    with pytest.raises(RemoteError, match=r"\.safetensors file"):
        drafted(TENSOR, file="model.bin")


def base() -> Manifest:
    tensors = [TensorEntry("w", "F32", [1], 4, ["00" * 32])]
    files = ["adapter_config.json", "config.json", "losses.bin", "state.json", "tokenizer.json"]
    groups = ["adapter_model.safetensors", "model.safetensors", "optimizer.safetensors"]
    return Manifest(
        format=1,
        name="base",
        kind=VersionKind.CHECKPOINT,
        task="generate",
        files=[FileEntry(name, 1, "11" * 32) for name in files],
        groups=[GroupEntry(name, tensors) for name in groups],
        lineage=LineageEntry(losses="losses.bin"),
    )


def names(draft: core.Draft) -> tuple[list[str], list[str]]:
    return (
        [file.name for file in draft.inherited_files],
        [group.file for group in draft.inherited_groups],
    )


def test_new_weights_inherit_neither_an_adapter_nor_what_a_checkpoint_alone_has() -> None:
    draft = drafted(TENSOR, inherited=base())
    assert names(draft) == (["tokenizer.json"], [])
    assert draft.lineage == Lineage(parent=bytes(32))


def test_an_adapter_inherits_the_weights() -> None:
    draft = drafted(TENSOR, file="adapter_model.safetensors", inherited=base())
    assert names(draft) == (["adapter_config.json", "tokenizer.json"], ["model.safetensors"])


def test_an_adapter_on_an_adapter_needs_the_merged_weights() -> None:
    under = msgspec.structs.replace(base(), kind=VersionKind.MODEL)
    with pytest.raises(RemoteError, match="is an adapter itself"):
        drafted(TENSOR, file="adapter_model.safetensors", inherited=under)
    assert names(drafted(TENSOR, inherited=under))[1] == []


def test_of_checkpoints_as_many_as_asked_and_one_more_stay() -> None:
    assert core.superseded(["e", "d", "c", "b", "a"], keep=2) == ["b", "a"]
    assert core.superseded(["b", "a"], keep=1) == []


def test_a_swap_is_refused_where_the_tag_stands_elsewhere() -> None:
    core.check_swap("n:t", None, expected=None, compare=True)
    core.check_swap("n:t", "aa", expected=None, compare=False)
    for current, expected in (("aa", None), (None, "aa"), ("bb", "aa")):
        with pytest.raises(RemoteError) as error:
            core.check_swap("n:t", current, expected=expected, compare=True)
        assert error.value.kind is ErrorKind.STALE


def test_equal_content_is_the_same_manifest() -> None:
    one, two = base(), base()
    assert one.encode() == two.encode()
    assert one.objects() == {"00" * 32: 4, "11" * 32: 1}
