"""Inputs as calls, answers as vectors and scores."""

import array
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libllm.vectors import (
    CALL_BYTES,
    Inputs,
    Part,
    calls,
    classifications,
    embeddings,
    inputs_of,
)
from llmproto import limits
from llmproto.encoding import Encoded
from llmproto.errors import ErrorKind, RemoteError


def part(*rows: tuple[float, ...], **fields: Any) -> Part:
    answer = Encoded("m", len(rows[0]), [3] * len(rows), **fields)
    return Part(answer, array.array("f", [number for row in rows for number in row]))


@given(st.lists(st.text(max_size=40), min_size=1, max_size=120), st.integers(1, 400))
def test_calls_hold_every_input_once_in_order(texts: list[str], repeat: int) -> None:
    texts = [text * repeat for text in texts]
    made = calls(Inputs(texts=texts, pairs=texts[::-1]))
    assert [text for call in made for text in call.texts or ()] == texts
    assert [text for call in made for text in call.pairs or ()] == texts[::-1]
    assert len({call.key for call in made}) == len(made)
    for call in made:
        assert call.texts is not None and call.pairs is not None
        assert len(call.texts) <= limits.ENCODE_INPUTS_MAX
        size = sum(len(t.encode(errors="surrogatepass")) for t in (*call.texts, *call.pairs))
        assert len(call.texts) == 1 or size <= CALL_BYTES


def test_calls_of_token_ids() -> None:
    made = calls(Inputs(tokens=[[1, 2]] * 40, model="m", truncate=True, priority=2))
    assert [len(call.tokens or ()) for call in made] == [32, 8]
    assert all((call.model, call.truncate, call.priority) == ("m", True, 2) for call in made)


@pytest.mark.parametrize(
    ("given_", "texts", "tokens"),
    [
        ("a", ["a"], None),
        (["a", "b"], ["a", "b"], None),
        ([1, 2], None, [[1, 2]]),
        ([[1], (2, 3)], None, [[1], [2, 3]]),
        (("a",), ["a"], None),
    ],
)
def test_every_shape_of_input(
    given_: Any, texts: list[str] | None, tokens: list[list[int]] | None
) -> None:
    assert inputs_of(given_) == (texts, tokens)


@pytest.mark.parametrize("given_", [[], ["a", 1], [1, [2]], ["a", [2]]])
def test_empty_and_mixed_input_is_refused(given_: Any) -> None:
    with pytest.raises(RemoteError) as caught:
        inputs_of(given_)
    assert caught.value.kind is ErrorKind.INVALID


def test_embeddings_of_several_calls() -> None:
    found = embeddings(
        [part((1, 2), (3, 4), truncated=[1]), part((5, 6), truncated=[0])], dimensions=None
    )
    assert [vector.tolist() for vector in found] == [[1, 2], [3, 4], [5, 6]]
    assert (found.tokens, found.truncated, found.width, len(found)) == (9, [1, 2], 2, 3)
    assert found[1].tolist() == [3, 4]


def test_fewer_dimensions_have_length_one() -> None:
    found = embeddings([part((3, 4, 9), (0, 0, 1))], dimensions=2)
    assert found[0].tolist() == pytest.approx([0.6, 0.8])
    assert found[1].tolist() == [0, 0]
    for dimensions in (0, 4):
        with pytest.raises(RemoteError, match=f"{dimensions} dimensions .* gives 3"):
            embeddings([part((3, 4, 9))], dimensions=dimensions)


def test_scores_by_what_the_columns_mean() -> None:
    labels = ["a", "b"]
    (one,) = classifications([part((1, 3), labels=labels, problem="single_label")])
    assert one.scores == pytest.approx({"a": 1 / (1 + math.e**2), "b": 1 / (1 + math.e**-2)})
    assert (one.label, one.score) == ("b", one.scores["b"])
    (many,) = classifications([part((-800, 0), labels=labels, problem="multi_label")])
    assert many.scores == pytest.approx({"a": 0.0, "b": 0.5})
    (number,) = classifications([part((2.5,), labels=["x"], problem="regression")])
    assert (number.label, number.score) == ("x", 2.5)
    (steep,) = classifications([part((900, -900), labels=labels, problem="single_label")])
    assert steep.scores == {"a": 1.0, "b": 0.0}
