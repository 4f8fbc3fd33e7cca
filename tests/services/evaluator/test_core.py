"""What an evaluation asks, row by row."""

import math

import pytest
from llmproto.data import DataRow
from llmproto.errors import RemoteError
from llmproto.generation import ChatMessage, TextScore
from llmservices.evaluator import core

NOTHING = -100


@pytest.mark.parametrize(
    ("metrics", "task", "looks"),
    [
        (["f1", "loss"], "classify", ["labels"]),
        (["spearman"], "regress", ["values"]),
        (["spearman"], "embed", ["similarities"]),
        (["loss"], "generate", ["scores"]),
        (["bleu"], "generate", ["answers"]),
        (["bleu", "perplexity", "chrf"], "generate", ["scores", "answers"]),
    ],
)
def test_looks(metrics: list[str], task: str, looks: list[str]) -> None:
    assert core.looks(metrics, task) == looks


def test_the_kernel_keeps_few_reports() -> None:
    assert core.batch_rows(1) == core.batch_rows(32_000) == 16
    assert core.batch_rows(1_000_000) == 500


def test_labels_by_name_and_by_number() -> None:
    assert core.place_of("yes", ["no", "yes"]) == 1
    assert core.place_of("1", ["LABEL_0", "LABEL_1"]) == 1
    assert core.place_of("maybe", ["no", "yes"]) is None
    refusal = core.unknown_label(3, "maybe", ["no", "yes"])
    assert "row 3: the label 'maybe' is none of the model's: no, yes" in refusal.detail


def test_questions() -> None:
    row = DataRow(prompt="q", completion="a")
    assert core.question_of(row, 1, chat=True) == ("q", "a")
    row = DataRow(prompt="q", completion="a", instruction=True)
    assert core.question_of(row, 1, chat=True) == ([ChatMessage("user", "q")], "a")
    assert core.question_of(row, 1, chat=False) == ("q\n\n", "a")
    turns = [ChatMessage("user", "q"), ChatMessage("assistant", "a"), ChatMessage("user", "x")]
    assert core.question_of(DataRow(messages=turns), 1, chat=True) == (turns[:1], "a")
    with pytest.raises(RemoteError, match="row 7 is plain text"):
        core.question_of(DataRow(text="x"), 7, chat=True)
    with pytest.raises(RemoteError, match="row 7: the chat has no answer"):
        core.question_of(DataRow(messages=turns[1:]), 7, chat=True)


def test_what_is_scored() -> None:
    assert core.sequence_of([5, 6, 7], [NOTHING, 7, NOTHING], nothing=NOTHING) == [5, 6, 7]
    assert core.sequence_of([5, 6], [6, 9], nothing=NOTHING) == [5, 6, 9]
    scores = [
        TextScore("", 5, None),
        TextScore("", 6, -1.0),
        TextScore("", 7, -2.0),
        TextScore("", 9, -4.0),
    ]
    assert core.surprise(scores, [6, NOTHING, 9], nothing=NOTHING) == (-5.0, 2)


def test_cosine() -> None:
    assert core.cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(1 / math.sqrt(2))
    assert core.cosine([0.0, 0.0], [1.0, 1.0]) == 0.0
