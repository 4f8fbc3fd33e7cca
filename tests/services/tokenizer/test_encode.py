"""Encode as threads: texts, pairs and token ids, cut where that is allowed, refused otherwise."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from llmproto import limits
from llmproto.encoding import Encode
from llmproto.errors import ErrorKind, RemoteError
from llmproto.models import ModelEntry
from llmservices.tokenizer.encode import check_model, prepare_inputs
from llmservices.tokenizer.folder import ModelFolder, inspect
from llmservices.tokenizer.vocabulary import Vocabulary, load_vocabulary

from ..encoders import POSITIONS, VOCABULARY, make, modules

KEY = b"k" * 16
ENTRY = ModelEntry("e", "/m/e", b"d" * 16, "BertModel", 32, 44, 1, task="embed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    made, _ = make(tmp_path_factory.mktemp("encoder"))
    return inspect(made)


@pytest.fixture(scope="module")
def vocabulary(folder: ModelFolder) -> Vocabulary:
    return load_vocabulary(Path(folder.path))


def ids(*words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words]


def test_texts(folder: ModelFolder, vocabulary: Vocabulary) -> None:
    prepared = prepare_inputs(Encode(key=KEY, texts=["w1 w2", ""]), vocabulary, folder)
    assert prepared.tokens == ids("[CLS]", "w1", "w2", "[SEP]", "[CLS]", "[SEP]")
    assert (prepared.lengths, prepared.pair_at, prepared.truncated) == ([4, 2], [], [])


def test_pairs_say_where_the_second_text_begins(
    folder: ModelFolder, vocabulary: Vocabulary
) -> None:
    encode = Encode(key=KEY, texts=["w1 w2", "w3"], pairs=["w4", ""], task="classify")
    prepared = prepare_inputs(encode, vocabulary, folder)
    assert prepared.tokens[:6] == ids("[CLS]", "w1", "w2", "[SEP]", "w4", "[SEP]")
    assert (prepared.lengths, prepared.pair_at) == ([6, 4], [4, 3])


def test_token_ids_are_taken_as_they_are(folder: ModelFolder, vocabulary: Vocabulary) -> None:
    prepared = prepare_inputs(Encode(key=KEY, tokens=[[7], [8, 9]]), vocabulary, folder)
    assert (prepared.tokens, prepared.lengths) == ([7, 8, 9], [1, 2])


@pytest.mark.parametrize("pairs", [None, ["w4 w5"]])
def test_truncation_keeps_the_frame_and_says_so(
    folder: ModelFolder, vocabulary: Vocabulary, pairs: list[str] | None
) -> None:
    encode = Encode(key=KEY, texts=[" ".join(["w1"] * 50)], pairs=pairs, truncate=True)
    prepared = prepare_inputs(encode, vocabulary, folder)
    assert (prepared.lengths, prepared.truncated) == ([POSITIONS], [0])
    assert prepared.tokens[-1] == VOCABULARY.index("[SEP]")
    if pairs:
        assert prepared.tokens[-3:-1] == ids("w4", "w5")
    again = prepare_inputs(Encode(key=KEY, texts=["w1"], truncate=True), vocabulary, folder)
    assert (again.lengths, again.truncated) == ([3], [])


def test_truncation_of_ids(folder: ModelFolder, vocabulary: Vocabulary) -> None:
    encode = Encode(key=KEY, tokens=[[7] * 50, [7]], truncate=True)
    prepared = prepare_inputs(encode, vocabulary, folder)
    assert (prepared.lengths, prepared.truncated) == ([POSITIONS, 1], [0])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "give exactly one of texts and tokens"),
        ({"texts": ["w1"], "tokens": [[1]]}, "give exactly one of texts and tokens"),
        ({"tokens": [[1]], "pairs": ["w1"]}, "pairs go with texts"),
        ({"texts": ["w1", "w2"], "pairs": ["w1"]}, "2 texts and 1 pairs"),
        ({"texts": ["w1", " ".join(["w1"] * 33)]}, "input 1 has 35 tokens, the model takes 34"),
        ({"tokens": [[3], [3, 44]]}, "input 1: token id 44 is not below"),
        ({"texts": ["\ud800"]}, "not Unicode"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    folder: ModelFolder, vocabulary: Vocabulary, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(RemoteError) as caught:
        prepare_inputs(Encode(key=KEY, **fields), vocabulary, folder)
    assert caught.value.kind is ErrorKind.INVALID
    assert says in caught.value.detail


def test_more_tokens_than_a_thread_holds_are_refused(
    folder: ModelFolder, vocabulary: Vocabulary
) -> None:
    wide = msgspec.structs.replace(folder, context_tokens=10_000)
    encode = Encode(key=KEY, tokens=[[7] * 10_000] * 20)
    with pytest.raises(
        RemoteError, match=f"200000 tokens together; .* {limits.CONTEXT_TOKENS_MAX}"
    ):
        prepare_inputs(encode, vocabulary, wide)


@pytest.mark.parametrize(
    ("task", "wanted", "fits"),
    [
        ("embed", "embed", True),
        ("classify", "classify", True),
        ("regress", "classify", True),
        ("generate", "embed", False),
        ("generate", "classify", False),
        ("embed", "classify", False),
        ("classify", "embed", False),
    ],
)
def test_the_models_task_must_fit(task: str, wanted: str, fits: bool) -> None:
    entry = msgspec.structs.replace(ENTRY, task=task)
    encode = Encode(key=KEY, model="e", texts=["w1"], task=wanted)
    if fits:
        check_model(encode, entry)
        return
    with pytest.raises(RemoteError) as caught:
        check_model(encode, entry)
    assert f"'{wanted}' is asked of 'e'; its task is '{task}'" in caught.value.detail


def test_the_digest_is_the_contents(folder: ModelFolder, vocabulary: Vocabulary) -> None:
    one = prepare_inputs(Encode(key=KEY, texts=["w1"]), vocabulary, folder)
    same = prepare_inputs(Encode(key=bytes(16), texts=["w1"]), vocabulary, folder)
    other = prepare_inputs(Encode(key=KEY, texts=["w2"]), vocabulary, folder)
    assert one.digest == same.digest != other.digest


def test_the_folder_says_task_and_longest_input(tmp_path: Path) -> None:
    plain, _ = make(tmp_path / "a")
    before = inspect(plain)
    assert (before.task.kind, before.context_tokens, before.eos_tokens) == ("embed", POSITIONS, ())
    modules(plain, {"pooling_mode_cls_token": True}, normalise=True, longest=16)
    after = inspect(plain)
    assert (after.task.pools, after.task.normalise, after.context_tokens) == (("cls",), True, 16)
    assert before.digest != after.digest
    (plain / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert inspect(plain).digest != after.digest
    roberta, _ = make(tmp_path / "b", "roberta", labels=("x",))
    found = inspect(roberta)
    assert (found.task.kind, found.context_tokens) == ("regress", POSITIONS - 2)
