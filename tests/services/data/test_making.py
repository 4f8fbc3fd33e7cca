"""Tokenizers of training data: what is in them, the same each time, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llmproto.data import TokenizerMade, TokenizerMake
from llmproto.errors import RemoteError
from llmproto.recipes import DataRecipe, TokenizerRecipe
from llmservices.data.making import make_tokenizer
from llmservices.tokenizer.vocabulary import load_vocabulary

from .conftest import TEMPLATE, Bench

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind\n" * 20


def make(bench: Bench, name: str, **recipe: Any) -> TokenizerMade:  # Any: its own fields
    path = bench.file("corpus.txt", TEXT)
    ask = TokenizerMake(DataRecipe(train=[path]), TokenizerRecipe(**recipe), str(bench.root / name))
    return make_tokenizer(ask, cache=bench.cache)


def contents(made: TokenizerMade) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(made.path).iterdir()}


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_the_same_texts_give_the_same_files(bench: Bench, kind: str) -> None:
    recipe: dict[str, Any] = {"kind": kind, "vocabulary": 300, "chat_template": TEMPLATE}
    first, second = make(bench, "a", **recipe), make(bench, "b", **recipe)
    assert contents(first) == contents(second)
    assert set(contents(first)) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    again = make(bench, "a", **recipe)
    assert (again, contents(again)) == (first, contents(second))


def test_bpe_has_every_byte_and_special_tokens_first(bench: Bench) -> None:
    made = make(bench, "a", kind="bpe", vocabulary=300, special=["<|user|>"])
    assert (made.vocabulary, made.bos, made.end) == (300, 0, 1)
    vocabulary = load_vocabulary(Path(made.path))
    assert vocabulary.encode("<|user|>")[1] == 2
    ids = vocabulary.encode("no such text é日 before")
    assert ids[0] == 0
    assert vocabulary.decode(ids) == "no such text é日 before"


def test_a_character_is_a_token_and_others_are_told(bench: Bench) -> None:
    made = make(bench, "a", kind="characters")
    assert made.vocabulary == len(set(TEXT)) + 3
    vocabulary = load_vocabulary(Path(made.path))
    ids = vocabulary.encode("To be\n")
    assert len(ids) == 6 and vocabulary.decode(ids) == "To be\n"
    planned = bench.plan(
        DataRecipe(train=[bench.file("other.txt", "To be 77" * 40)], sampling="windows"),
        tokenizer=made.path,
        context_tokens=8,
    )
    assert planned.prepared.changed == {"unknown_tokens": 80}


def test_tokens_of_a_long_text_are_those_of_the_whole(bench: Bench) -> None:
    """Long texts are encoded in pieces."""
    made = make(bench, "a", kind="bpe", vocabulary=300)
    path = bench.file("long.txt", text := TEXT * 100)
    planned = bench.plan(
        DataRecipe(train=[path], packing="joined"), tokenizer=made.path, shuffle=False, batch=1
    )
    whole = tokenizers.Tokenizer.from_file(f"{made.path}/tokenizer.json").encode(text).ids
    rows, _ = planned.plan.segment(0)
    assert rows.ids[: len(whole)].tolist() == whole
    assert planned.prepared.tokens == len(whole) + 1


def test_a_folders_tokenizer_is_copied(bench: Bench) -> None:
    output = bench.root / "copy"
    ask = TokenizerMake(
        DataRecipe(), TokenizerRecipe(kind="folder", path=str(bench.tokenizer)), str(output)
    )
    made = make_tokenizer(ask, cache=bench.cache)
    assert (output / "tokenizer.json").read_bytes() == (
        bench.tokenizer / "tokenizer.json"
    ).read_bytes()
    assert json.loads((output / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert made.end == 1


def test_refusals(bench: Bench) -> None:
    with pytest.raises(RemoteError, match="100 tokens is too small: 2 special ones and 256 bytes"):
        make(bench, "a", kind="bpe", vocabulary=100)
    with pytest.raises(RemoteError, match="named twice"):
        make(bench, "a", kind="characters", special=["<|bos|>"])
    with pytest.raises(RemoteError, match="names no train data"):
        ask = TokenizerMake(DataRecipe(), TokenizerRecipe(), str(bench.root / "a"))
        make_tokenizer(ask, cache=bench.cache)
    assert not (bench.root / "a").exists()
