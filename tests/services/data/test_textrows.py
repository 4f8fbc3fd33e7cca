"""Rows as text: what an evaluator gets of each format, and what is refused."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from blake3 import blake3
from llmproto.data import DataRow, Rows, RowsAsk
from llmproto.errors import RemoteError
from llmproto.generation import ChatMessage
from llmproto.recipes import DataRecipe
from llmservices.data.textrows import FILES_MAX, make_rows

if TYPE_CHECKING:
    from tests.services.data.conftest import Bench


def made(bench: "Bench", recipe: DataRecipe, task: str = "generate") -> Rows:
    return make_rows(
        RowsAsk(data=recipe, task=task),
        folder=bench.root / "texts",
        cache=bench.cache,
        progress=lambda rows: None,
    )


def read(found: Rows) -> list[DataRow]:
    content = Path(found.path).read_bytes()
    assert blake3(content).digest() == found.digest
    rows = [msgspec.json.decode(line, type=DataRow) for line in content.splitlines()]
    assert len(rows) == found.rows
    return rows


def test_each_format(bench: "Bench") -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = [ChatMessage("user", "a"), ChatMessage("assistant", "b")]
    for name, row, task, wanted in (
        ("t", {"text": "x"}, "generate", DataRow(text="x")),
        ("c", {"messages": chat}, "generate", DataRow(messages=turns)),
        (
            "p",
            {"prompt": "q", "completion": "r"},
            "generate",
            DataRow(prompt="q", completion="r"),
        ),
        (
            "i",
            {"instruction": "q", "input": "", "output": "r"},
            "generate",
            DataRow(prompt="q", completion="r", instruction=True),
        ),
        ("l", {"text": "x", "label": 1}, "classify", DataRow(text="x", label="1")),
        (
            "s",
            {"sentence1": "x", "sentence2": "y", "score": 0.5},
            "regress",
            DataRow(text="x", pair="y", value=0.5),
        ),
    ):
        recipe = DataRecipe(train=[bench.jsonl(f"{name}.jsonl", row)])
        assert read(made(bench, recipe, task)) == [wanted], name


def test_the_same_data_give_the_same_file(bench: "Bench") -> None:
    recipe = DataRecipe(train=[bench.jsonl("a.jsonl", *({"text": str(n)} for n in range(20)))])
    assert made(bench, recipe) == made(bench, recipe)


def test_labels(bench: "Bench") -> None:
    rows = [{"text": "x", "label": label} for label in (10, 9, 10)]
    recipe = DataRecipe(train=[bench.jsonl("a.jsonl", *rows)])
    assert made(bench, recipe, "classify").labels == ["9", "10"]
    some = msgspec.structs.replace(recipe, labels=["9"], unknown_labels="skip")
    found = made(bench, some, "classify")
    assert (found.labels, found.rows, found.dropped) == (["9"], 1, {"unknown_label": 2})


def test_what_is_refused(bench: "Bench") -> None:
    with pytest.raises(RemoteError, match="names no train data"):
        made(bench, DataRecipe())
    with pytest.raises(RemoteError, match=r"a\.jsonl:2: "):
        made(bench, DataRecipe(train=[bench.jsonl("a.jsonl", {"text": "x"}, {"text": 3})]))
    with pytest.raises(RemoteError, match="holds no rows"):
        made(bench, DataRecipe(train=[bench.file("b.jsonl", "")]))


def test_few_files_are_kept(bench: "Bench") -> None:
    last = None
    for number in range(FILES_MAX + 3):
        rows = {"text": str(number)}
        last = made(bench, DataRecipe(train=[bench.jsonl(f"{number}.jsonl", rows)]))
    assert last is not None
    assert Path(last.path).exists()
    assert len(list((bench.root / "texts").iterdir())) == FILES_MAX
