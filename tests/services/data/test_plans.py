"""Prepare and segments end to end, without a service."""

from pathlib import Path

import pytest
from llmproto.errors import RemoteError
from llmproto.recipes import DataRecipe
from llmservices.data.plans import Planned
from llmservices.data.segments import make_segment
from llmservices.texts.segments import Batch, SegmentFile

from .conftest import Bench, byte_tokenizer

BYTES = byte_tokenizer()


def batches(bench: Bench, planned: Planned) -> list[Batch]:
    """Those of the first epoch."""
    made = make_segment(bench.cache, planned.plan, planned.prepared.plan, 0)
    file = SegmentFile(made.path)
    assert len(file) == planned.prepared.segment_batches
    return [file.batch(index) for index in range(planned.prepared.batches)]


def spelled(tokens: list[int]) -> str:
    """The text of tokens, special ones by name."""
    return str(BYTES.decode(tokens, skip_special_tokens=False))


def rows_of(batches: list[Batch]) -> list[tuple[str, str]]:
    """Each row's text, and what is learned of it."""
    rows = []
    for batch in batches:
        for row in range(batch.rows):
            labels = [label for label in batch.labels.row(row).tolist() if label != -100]
            rows.append((spelled(batch.ids.row(row).tolist()), spelled(labels)))
    return rows


def test_text_is_learned_from_its_second_token_to_its_end(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "one"}, {"text": "two!"}, {"text": "three"})
    planned = bench.plan(DataRecipe(train=[path]), shuffle=False)
    assert (planned.prepared.rows, planned.prepared.batches) == (3, 2)
    assert rows_of(batches(bench, planned)) == [
        ("<|bos|>one<|end|>", "one<|end|>"),
        ("<|bos|>two!<|end|>", "two!<|end|>"),
        ("<|bos|>three<|end|>", "three<|end|>"),
    ]
    assert planned.prepared.tokens == len("onetwo!three") + 6


def test_labels_stand_under_the_token_before(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "abc"})
    (batch,) = batches(bench, bench.plan(DataRecipe(train=[path])))
    ids, labels = batch.ids.row(0).tolist(), batch.labels.row(0).tolist()
    assert labels == [*ids[1:], -100]
    assert batch.documents.row(0).tolist() == [len(ids)]


def test_of_a_completion_the_answer_alone_is_learned(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"prompt": "Say é: ", "completion": "日本"})
    recipe = DataRecipe(train=[path])
    assert rows_of(batches(bench, bench.plan(recipe))) == [
        ("<|bos|>Say é: 日本<|end|>", "日本<|end|>")
    ]
    everything = DataRecipe(train=[path], loss="all")
    assert rows_of(batches(bench, bench.plan(everything))) == [
        ("<|bos|>Say é: 日本<|end|>", "Say é: 日本<|end|>")
    ]


def test_of_a_chat_the_assistants_turns_are_learned(bench: Bench) -> None:
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "Q"), ("assistant", "A")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = bench.jsonl("a.jsonl", {"messages": messages})
    assert rows_of(batches(bench, bench.plan(DataRecipe(train=[path])))) == [
        (
            "<|user|>Hi<|end|><|assistant|>Yo<|end|><|user|>Q<|end|><|assistant|>A<|end|>",
            "Yo<|end|>A<|end|>",
        )
    ]


def test_a_classifier_gets_ids_of_sorted_labels(bench: Bench) -> None:
    path = bench.file("a.tsv", "good film\tpos\nbad film\tneg\nso so\tneutral\nfine\tpos\n")
    planned = bench.plan(DataRecipe(train=[path]), task="classify", shuffle=False)
    assert planned.prepared.labels == ["neg", "neutral", "pos"]
    found = batches(bench, planned)
    assert [batch.labels.flat.tolist() for batch in found] == [[2, 0], [1, 2]]
    assert spelled(found[0].ids.row(0).tolist()) == "<|bos|>good film"


def test_a_regression_of_pairs_gets_values_and_types(bench: Bench) -> None:
    path = bench.file("a.csv", 'a,"b, c",2.5\nd,e,0\n')
    planned = bench.plan(DataRecipe(train=[path]), task="regress", shuffle=False)
    (batch,) = batches(bench, planned)
    assert batch.value is not None and batch.value.tolist() == [2.5, 0.0]
    assert spelled(batch.ids.row(0).tolist()) == "<|bos|>a<|end|>b, c"
    assert batch.types is not None and batch.types.row(0).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_asked_again_nothing_is_made_and_all_is_equal(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", *({"text": f"text {number}"} for number in range(50)))
    first = bench.plan(DataRecipe(train=[path]))
    rows = [file.stat().st_ino for file in Path(bench.root).rglob("rows.arrow")]
    again = bench.plan(DataRecipe(train=[path]))
    assert again.prepared == first.prepared
    assert [file.stat().st_ino for file in Path(bench.root).rglob("rows.arrow")] == rows
    made = [make_segment(bench.cache, plan.plan, b"p" * 32, 0).digest for plan in (first, again)]
    assert made[0] == made[1]


def test_another_content_is_another_dataset(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "one"})
    first = bench.plan(DataRecipe(train=[path]))
    bench.jsonl("a.jsonl", {"text": "two"})
    assert bench.plan(DataRecipe(train=[path])).prepared.dataset != first.prepared.dataset


def test_windows_are_cut_from_all_text(bench: Bench) -> None:
    path = bench.file("a.txt", "0123456789" * 20)
    recipe = DataRecipe(train=[path], sampling="windows")
    planned = bench.plan(recipe, context_tokens=8, batch=4)
    for batch in batches(bench, planned):
        assert batch.rows == 4
        for row in range(4):
            ids, labels = batch.ids.row(row).tolist(), batch.labels.row(row).tolist()
            assert len(ids) == 8 and ids[1:] == labels[:-1]
    ordered = batches(bench, bench.plan(recipe, context_tokens=8, batch=4, shuffle=False))
    text = "".join(spelled(batch.labels.flat.tolist()) for batch in ordered)
    assert text == "0123456789" * 20


def test_a_tokenizer_that_is_not_there_is_named(bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "one"})
    with pytest.raises(RemoteError, match=r"tokenizer\.json: is missing"):
        bench.plan(DataRecipe(train=[path]), tokenizer=str(bench.root))
