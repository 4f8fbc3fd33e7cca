"""Vocabulary: the ids of transformers for the same folder."""

import json
from pathlib import Path

import pytest
import transformers
from llmproto.errors import ErrorKind, RemoteError
from llmservices.tokenizer import folder as folders
from llmservices.tokenizer.vocabulary import Vocabularies, Vocabulary, load_vocabulary
from tokenizers import processors

TEXTS = [
    "Once upon a time",
    " leading and  double spaces ",
    "",
    "naïve café, 日本語, \U0001f600\n\ttabs",
    "</s> and <s>",
    "<|endoftext|>x",
]


@pytest.mark.parametrize("asset", ["stories", "gpt2"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(
    asset: str, text: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(asset)
    assert_same(path, text)


def assert_same(path: Path, text: str) -> None:
    """Ids with and without special tokens, and the text again."""
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = load_vocabulary(path)
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.encode_rendered(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": "<s>", "add_bos_token": False},
        {"eos_token": "<new>", "extra_special_tokens": ["<tool>"]},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>"}, "image_token": "<img>"},
        {"additional_special_tokens": ["ab"]},
        {
            "added_tokens_decoder": {
                "400": {"content": "<late>", "special": False, "normalized": False},
                "401": {"content": "<later>", "special": True},
            }
        },
    ],
)
@pytest.mark.parametrize("with_bos", [False, True])
def test_ids_with_all_kinds_of_configuration(
    config: dict[str, object],
    with_bos: bool,
    tmp_path: Path,
    byte_level_file: str,
) -> None:
    content = json.loads(byte_level_file)
    if with_bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        content["post_processor"] = json.loads(template.__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    for text in ("the <s> cab <new><tool> x <pad><img>", "<late> a <later>", "two words"):
        assert_same(tmp_path, text)


def test_token_text(vocabularies: dict[str, Vocabulary]) -> None:
    fallback = vocabularies["fallback"]
    shown = [fallback.token_text(token) for token in (1, 3 + 0xE6, 3 + 0x41, 260, 10_000)]
    assert shown == ["<s>", "\ufffd", "A", "a", ""]
    assert vocabularies["word_piece"].token_text(2) == "hello"


def test_a_lone_surrogate_is_refused(vocabularies: dict[str, Vocabulary]) -> None:
    with pytest.raises(RemoteError, match="surrogate"):
        vocabularies["byte_level"].encode("\ud800")


def test_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"tokenizer\.json: is missing"):
        load_vocabulary(tmp_path)
    for content in ("{", "[]", "{}", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(RemoteError, match=r"tokenizer\.json: is broken") as caught:
            load_vocabulary(tmp_path)
        assert caught.value.kind is ErrorKind.INVALID


def test_the_least_recently_used_is_forgotten(tmp_path: Path, byte_level_file: str) -> None:
    table = Vocabularies(count_max=2)
    models = []
    for name in "abc":
        path = tmp_path / name
        path.mkdir()
        (path / "tokenizer.json").write_text(byte_level_file + " " * ord(name))
        small = folders.read_small(path, folders.TOKENIZER_FILES)
        models.append((path, folders.tokenizer_digest(small)))
    folder = [model_folder(path, digest) for path, digest in models]
    first = table.get(folder[0])
    table.get(folder[1])
    assert table.get(folder[0]) is first
    table.get(folder[2])
    table.check()
    assert len(table) == 2
    assert table.find(folder[0].tokenizer_digest) is first
    assert first.digest == folder[0].tokenizer_digest
    assert table.find(folder[1].tokenizer_digest) is None


def model_folder(path: Path, tokenizer_digest: bytes) -> folders.ModelFolder:
    return folders.ModelFolder(
        path=str(path),
        architecture="",
        model_type="",
        context_tokens=1,
        vocab_tokens=1,
        eos_tokens=(),
        bos_token=None,
        dtype="float32",
        weight_bytes=0,
        weight_files=(),
        has_chat_template=False,
        digest=bytes(16),
        tokenizer_digest=tokenizer_digest,
    )
