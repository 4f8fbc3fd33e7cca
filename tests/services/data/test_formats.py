"""Formats by columns: told apart, or refused with the columns' names."""

import pytest
from llmproto.errors import RemoteError
from llmproto.recipes import DataRecipe
from llmservices.data.formats import Task, detect, example_of, label_text, sorted_labels
from llmservices.data.rows import BadRow, Chat, Completion, Example, Labelled, Text, Turn, Values


@pytest.mark.parametrize(
    ("values", "task", "wanted"),
    [
        ({"text": "a"}, "generate", Text("a")),
        ({"text": "a", "id": 7}, None, Text("a")),
        (
            {"messages": [{"role": "assistant", "content": "b"}]},
            "generate",
            Chat((Turn("assistant", "b"),)),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "generate",
            Chat((Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "generate",
            Completion("a", "c", "b", instruction=True),
        ),
        ({"instruction": "a", "output": "c"}, None, Completion("a", "c", instruction=True)),
        ({"prompt": "a", "completion": "b"}, "generate", Completion("a", "b")),
        ({"question": "a", "answer": "b"}, None, Completion("a", "b")),
        ({"sentence": "a", "label": 1}, "classify", Labelled("a", None, "1")),
        ({"text": "a", "label": 1.0}, None, Labelled("a", None, "1")),
        ({"text": "a", "label": 1.5}, "regress", Labelled("a", None, None, 1.5)),
        (
            {"sentence1": "a", "sentence2": "b", "label": True},
            "classify",
            Labelled("a", "b", "true"),
        ),
        ({"premise": "a", "hypothesis": "b"}, None, Labelled("a", "b")),
        ({"column1": "a", "column2": "0"}, "classify", Labelled("a", None, "0")),
        (
            {"column1": "a", "column2": "b", "column3": "2"},
            "regress",
            Labelled("a", "b", None, 2.0),
        ),
    ],
)
def test_what_columns_say(values: Values, task: Task | None, wanted: Example) -> None:
    shape = detect(DataRecipe(), values.keys(), task)
    assert example_of(shape, values, task) == wanted


def test_named_columns_go_before_custom() -> None:
    shape = detect(DataRecipe(text="b", label="c"), ["text", "b", "c", "label"], "classify")
    assert (shape.format, shape.text, shape.label) == ("classification", "b", "c")
    assert detect(DataRecipe(text="b"), ["text", "b"], "generate").text == "b"


@pytest.mark.parametrize(
    ("recipe", "columns", "task", "match"),
    [
        (DataRecipe(), ["a", "b"], "generate", "cannot tell how to read the columns a, b"),
        (DataRecipe(), ["messages", "text"], "generate", "messages, text fit the formats chat and"),
        (DataRecipe(text="x"), ["a"], None, "there is no column 'x'; there are: a"),
        (DataRecipe(), ["text"], "classify", "the columns text for the task classify"),
        (DataRecipe(format="chat"), ["text"], "generate", 'text in the format "chat"'),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_columns(
    recipe: DataRecipe, columns: list[str], task: Task | None, match: str
) -> None:
    with pytest.raises(RemoteError, match=match):
        detect(recipe, columns, task)


@pytest.mark.parametrize(
    ("values", "task", "match"),
    [
        ({"text": 7}, "generate", "'text' must be text, it is a int"),
        ({"text": "half \ud800"}, "generate", "half a surrogate pair"),
        ({"messages": []}, "generate", "must be a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "generate", "no message is the assis"),
        ({"messages": [{"role": "user"}]}, "generate", "needs 'role' and 'content'"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "generate", "nobody knows who 'me' is"),
        ({"text": "a", "label": None}, "classify", r"the label \('label'\) is missing"),
        ({"text": "a", "label": [1]}, "classify", "a label is a text or a number"),
        ({"text": "a", "label": "x"}, "regress", "must be a finite number, it is 'x'"),
        ({"text": "a", "label": float("nan")}, "regress", "must be a finite number"),
    ],
)
def test_a_bad_row_says_why(values: Values, task: Task, match: str) -> None:
    shape = detect(DataRecipe(), values.keys(), task)
    with pytest.raises(BadRow, match=match):
        example_of(shape, values, task)


def test_labels() -> None:
    assert sorted_labels({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert sorted_labels({"b", "10", "a"}) == ["10", "a", "b"]
    assert [label_text(value) for value in (1, 1.0, " 1 ", True)] == ["1", "1", "1", "true"]
