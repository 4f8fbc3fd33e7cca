"""Folders of real shapes are whole models: they load, compute, and every id has a text."""

import json
from pathlib import Path

import pytest
import torch
from llmservices.models import shapes
from llmservices.models.loading import load
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shape")
    shapes.write("tiny", made, context_tokens=256)
    return made


def test_it_loads_as_what_it_says(folder: Path) -> None:
    model = load(folder, dtype="auto", device=torch.device("cpu"))
    shape = shapes.SHAPES["tiny"]
    assert (model.context_tokens, model.vocab_tokens) == (256, shape.vocab)
    assert model.dtype == shapes.DTYPE


def test_every_id_has_a_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = shapes.SHAPES["tiny"].vocab
    assert tokenizer.get_vocab_size() == vocab
    assert all(tokenizer.decode([number]) for number in range(256, vocab))
    assert tokenizer.decode(tokenizer.encode("héllo, 世界").ids) == "héllo, 世界"


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_configurations_are_those_of_their_families(name: str) -> None:
    config = shapes.config(shapes.SHAPES[name], context_tokens=64)
    assert json.loads(json.dumps(config)) == config
    assert config["vocab_size"] == shapes.SHAPES[name].vocab


def test_the_vocabulary_has_an_end_inside_its_rows(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id(shapes.END_OF_TEXT) == shapes.SHAPES["tiny"].vocab - 1
    assert tokenizer.encode("we").tokens == ["w", "e"]
    assert tokenizer.encode(" we").tokens == ["Ġw", "e"]
