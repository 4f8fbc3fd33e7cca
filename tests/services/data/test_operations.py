"""Copies and reports of data files: what is in them, whole or absent."""

import json
from pathlib import Path
from typing import Any

import pytest
from llmproto.data import DataAugment, DataClean, DataInspect
from llmproto.errors import RemoteError
from llmproto.recipes import AugmentOptions, CleanOptions, DataRecipe
from llmservices.data.operations import augment_files, clean_files, inspect_files

from .conftest import Bench


def idle(rows: int) -> None:
    """Nobody watches."""


def lines(path: str) -> list[Any]:  # Any: rows of every kind
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_cleaned_copy_keeps_other_columns_and_reports_each_row(bench: Bench) -> None:
    rows = [
        {"id": 1, "text": "Ã©tÃ©"},
        {"id": 2, "text": ""},
        {"id": 3, "text": "plain"},
        {"id": 4, "text": "plain"},
    ]
    path = bench.jsonl("in.jsonl", *rows)
    output = str(bench.root / "out.jsonl")
    report = clean_files(DataClean([path], output, CleanOptions(), rows=True), idle)
    assert lines(output) == [{"id": 1, "text": "été"}, {"id": 3, "text": "plain"}]
    assert (report.rows_in, report.rows_out, report.format) == (4, 2, "text")
    assert report.dropped == {"too_few_characters": 1, "duplicate": 1}
    assert report.changed == {"repaired": 1}
    assert lines(f"{output}.dropped.jsonl") == [
        {"reason": "too_few_characters", "file": path, "line": 2, "row": rows[1]},
        {"reason": "duplicate", "file": path, "line": 4, "row": rows[3]},
    ]


def test_chats_and_instructions_are_cleaned_where_their_texts_stand(bench: Bench) -> None:
    options = CleanOptions(mask=["email"])
    asked: dict[str, object] = {"role": "user", "content": "a@b.org", "n": 1}
    turns = [asked, {"role": "assistant", "content": "x"}]
    chat = bench.jsonl("chat.jsonl", {"messages": turns, "id": 1})
    instructions = {"instruction": "a@b.org\n\nx", "input": "b@c.org", "output": "c"}
    alpaca = bench.jsonl("alpaca.jsonl", instructions)
    output = str(bench.root / "out.jsonl")
    clean_files(DataClean([chat], output, options), idle)
    assert lines(output) == [{"messages": [asked | {"content": "<email>"}, turns[1]], "id": 1}]
    clean_files(DataClean([alpaca], output, options, overwrite=True), idle)
    assert lines(output) == [{"instruction": "<email>\n\nx", "input": "<email>", "output": "c"}]


def test_an_output_is_whole_or_absent(bench: Bench) -> None:
    path = bench.file("in.jsonl", '{"text": "a"}\n{"text": "b"\n')
    output = bench.root / "out.jsonl"
    ask = DataClean([path], str(output), CleanOptions(), rows=True)
    with pytest.raises(RemoteError, match=r"in\.jsonl:2: is no JSON"):
        clean_files(ask, idle)
    assert [file.name for file in bench.root.iterdir() if "out" in file.name] == []
    skipping = DataClean([path], str(output), CleanOptions(), data=DataRecipe(bad_rows="skip"))
    report = clean_files(skipping, idle)
    assert report.dropped == {"malformed": 1}
    assert report.bad[0].startswith(f"{path}:2: is no JSON")
    with pytest.raises(RemoteError, match="is there already"):
        clean_files(skipping, idle)
    with pytest.raises(RemoteError, match=r"ending in \.jsonl"):
        clean_files(DataClean([path], str(bench.root / "out.csv"), CleanOptions()), idle)
    with pytest.raises(RemoteError, match="is no folder"):
        clean_files(DataClean([path], str(bench.root / "no" / "a.jsonl"), CleanOptions()), idle)
    empty = bench.jsonl("empty.jsonl", {"text": ""})
    with pytest.raises(RemoteError, match=r"holds no rows \(dropped: 1 too_few_characters\)"):
        clean_files(DataClean([empty], str(bench.root / "b.jsonl"), CleanOptions()), idle)
    assert not (bench.root / "b.jsonl").exists()


def test_a_file_may_be_replaced_by_its_own_cleaned_copy(bench: Bench) -> None:
    path = bench.jsonl("in.jsonl", {"text": "a"}, {"text": "a"})
    clean_files(DataClean([path], path, CleanOptions(), overwrite=True), idle)
    assert lines(path) == [{"text": "a"}]


def test_an_augmented_copy(bench: Bench) -> None:
    path = bench.file("in.tsv", "text\tlabel\none two three four\tpos\nfive six seven eight\tneg\n")
    output = str(bench.root / "out.jsonl")
    ask = DataAugment([path], output, AugmentOptions(copies=2, delete=0.4, seed=1))
    report = augment_files(ask, idle)
    found = lines(output)
    assert report.rows_in == 2 and report.rows_out == len(found) == 2 + report.changed["augmented"]
    assert {row["label"] for row in found} == {"pos", "neg"}
    augment_files(DataAugment([path], f"{output}2.jsonl", ask.augment), idle)
    assert lines(f"{output}2.jsonl") == found
    with pytest.raises(RemoteError, match="take their words from a file"):
        augment_files(DataAugment([path], output, AugmentOptions(replace=0.1)), idle)


def test_what_is_in_files(bench: Bench) -> None:
    rows: list[dict[str, object]] = [
        {"text": "x" * number, "label": number % 2, "id": number} for number in range(1, 21)
    ]
    path = bench.jsonl("in.jsonl", *rows, {"label": 1}, [])
    report = inspect_files(DataInspect([path], tokenizer=str(bench.tokenizer)), idle)
    assert (report.format, report.rows_in, report.rows_out) == ("classification", 22, 21)
    text, label, number = report.columns
    assert (text.name, text.type, text.missing) == ("text", "str", 1)
    assert text.characters == [1, 11, 19, 20]
    assert label.values == {"1": 11, "0": 10}
    assert number.values == {}
    assert report.tokens == sum(range(1, 21)) + 20  # each with <|bos|>
    assert report.dropped["malformed"] == 2
    assert json.loads(report.examples[0]) == rows[0]
    unknown = inspect_files(DataInspect([bench.jsonl("b.jsonl", {"a": 1})]), idle)
    assert unknown.format.startswith("unknown: cannot tell how to read the columns a")
    assert inspect_files(DataInspect([bench.file("c.jsonl", "")]), idle).format == "empty"
