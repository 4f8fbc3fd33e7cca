"""What a folder says, and a refusal that names the file for each way of being broken."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmservices.tokenizer import weights
from llmservices.tokenizer.folder import inspect

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def safetensors(data: bytes = bytes(8), dtype: str = "F32") -> bytes:
    """One tensor of these bytes."""
    entry = {"dtype": dtype, "shape": [len(data) // 4], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"a": "b"}, "w": entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "config.json", CONFIG)
    write(folder, "generation_config.json", {"eos_token_id": 9})
    write(folder, "tokenizer.json", {})
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_what_a_folder_says(model: Path) -> None:
    found = inspect(model)
    assert (found.architecture, found.model_type) == ("LlamaForCausalLM", "llama")
    assert (found.context_tokens, found.vocab_tokens) == (64, 32)
    assert (found.eos_tokens, found.bos_token) == ((2, 7, 9), 1)
    assert (found.dtype, found.has_chat_template) == ("bfloat16", False)
    assert found.weight_files == ("model.safetensors",)
    assert found.weight_bytes == (model / "model.safetensors").stat().st_size
    assert (len(found.digest), len(found.tokenizer_digest)) == (16, 16)
    assert found == inspect(model)


@pytest.mark.parametrize(
    ("config", "context", "vocab", "eos"),
    [
        ({"n_positions": 16, "vocab_size": 5, "eos_token_id": 3}, 16, 5, (3, 9)),
        ({"n_ctx": 16, "vocab_size": 5, "eos_token_id": None}, 16, 5, (9,)),
        (
            {
                "eos_token_id": [1, 106],
                "text_config": {"max_position_embeddings": 8, "vocab_size": 6},
            },
            8,
            6,
            (1, 9, 106),
        ),
        ({"text_config": {"model_type": "gemma3_text"}}, 131_072, 262_208, (9,)),
    ],
)
def test_families_name_things_differently(
    model: Path, config: object, context: int, vocab: int, eos: tuple[int, ...]
) -> None:
    write(model, "config.json", config)
    found = inspect(model)
    assert (found.context_tokens, found.vocab_tokens, found.eos_tokens) == (context, vocab, eos)
    assert found.dtype == "float32"


def test_shards(model: Path) -> None:
    (model / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(model, "model.safetensors.index.json", {"weight_map": dict(zip("ab", names))})
    (model / names[0]).write_bytes(safetensors())
    assert refusal(model).endswith(f"1 of 2 weight files are missing: {names[1]}; fetch them")
    (model / names[1]).write_bytes(safetensors())
    assert inspect(model).weight_files == tuple(names)
    write(model, "model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}})
    assert "../x.safetensors" in refusal(model)


def refusal(folder: Path) -> str:
    with pytest.raises(RemoteError) as caught:
        inspect(folder)
    assert caught.value.kind is ErrorKind.INVALID
    return caught.value.detail


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "broken json": (lambda f: (f / "config.json").write_text("{"), "config.json: is broken"),
    "not an object": (lambda f: write(f, "config.json", [1]), "config.json: is broken"),
    "not utf-8": (
        lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff"}'),
        "config.json: is",
    ),
    "deep": (lambda f: (f / "config.json").write_text("[" * 9999), "config.json: is broken"),
    "no context": (lambda f: write(f, "config.json", {"vocab_size": 3}), "max_position_embeddings"),
    "no vocabulary": (lambda f: write(f, "config.json", {"n_ctx": 3}), "vocab_size"),
    "context of 0": (
        lambda f: write(f, "config.json", {"n_ctx": 0, "vocab_size": 3}),
        "is 0; it must be at least 1",
    ),
    "wrong eos": (
        lambda f: write(f, "generation_config.json", {"eos_token_id": "x"}),
        "generation_config.json: is broken",
    ),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors()[:-1]),
        "its header names",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole"),
    "cut header": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors()[:20]),
        "not a whole",
    ),
    "huge header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + safetensors()),
        "not a whole",
    ),
    "broken header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        "header is broken",
    ),
    "git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
        "not a whole",
    ),
    "broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "not a safetensors index",
    ),
    "broken template": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template.jinja: is not UTF-8",
    ),
    "a folder for a file": (
        lambda f: (f / "tokenizer_config.json").mkdir(),
        "tokenizer_config.json: cannot be read",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_half_a_folder(name: str, model: Path) -> None:
    breakage, said = BREAKAGES[name]
    breakage(model)
    assert said in refusal(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_other_weights_are_refused(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    assert "safetensors only" in refusal(model)
    assert name in refusal(model)


def test_lone_shards_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    assert "model.safetensors.index.json" in refusal(model)


def test_what_is_no_folder(model: Path) -> None:
    assert "is a file" in refusal(model / "config.json")
    assert "is not there" in refusal(model / "nowhere")
    assert "is not a path" in refusal(Path("a\0b"))
    assert refusal(model / ("x" * 5000))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_permissions(model: Path) -> None:
    (model / "config.json").chmod(0)
    assert "config.json: cannot be read" in refusal(model)


def test_the_digest_follows_what_makes_the_model(model: Path) -> None:
    before = inspect(model)
    (model / "README.md").write_text("words")
    assert inspect(model) == before
    (model / "model.safetensors").write_bytes(safetensors(b"\1" * 8))
    weights_changed = inspect(model)
    assert weights_changed.digest != before.digest
    assert weights_changed.tokenizer_digest == before.tokenizer_digest
    (model / "chat_template.jinja").write_text("x")
    template_changed = inspect(model)
    assert template_changed.has_chat_template
    assert template_changed.digest != weights_changed.digest
    assert template_changed.tokenizer_digest != before.tokenizer_digest
    write(model, "config.json", {**CONFIG, "rope_theta": 2})
    assert inspect(model).digest != template_changed.digest
    assert inspect(model).tokenizer_digest == template_changed.tokenizer_digest


def test_large_files_are_sampled(model: Path) -> None:
    size = 2 * weights.WHOLE_BYTES_MAX
    path = model / "model.safetensors"
    path.write_bytes(safetensors(b""))
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    before = inspect(model).digest
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert inspect(model).digest != before
