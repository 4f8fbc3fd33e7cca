"""Rows to pieces: offsets in characters, ends, log-probabilities."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libllm.events import StreamRow
from llmproto.errors import ErrorKind
from llmproto.generation import StreamEnd, TextScore
from llmservices.gateway.errors import HttpError
from llmservices.gateway.pieces import (
    LOGPROB_MIN,
    Characters,
    Choice,
    Piece,
    chat_logprobs,
    joined,
    text_logprobs,
)

STREAM = bytes(17)


def row(text: str, until: int, tokens: int, end: StreamEnd | None = None) -> StreamRow:
    """A row without scores."""
    return StreamRow(STREAM, text, until, tokens, end)


def test_a_choice_to_its_end() -> None:
    choice = Choice(3)
    end = StreamEnd("stop", 2, 1)
    pieces = [choice.take(row("a", 1, 1)), choice.take(row("é", 3, 2, end))]
    assert joined(pieces) == Piece(3, "aé", [], [], "stop", end)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (StreamEnd("cancel", 1, 1), 499),
        (StreamEnd("error", 1, 1, None, ErrorKind.DEADLINE, "late"), 504),
        (StreamEnd("error", 1, 1), 500),
    ],
)
def test_broken_ends(end: StreamEnd, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        Choice(0).take(row("", 0, 1, end))
    assert caught.value.status == status


def test_echo_comes_with_the_first_row() -> None:
    choice = Choice(0, echo="äb", echoes_scores=True)
    assert [choice.take(row("c", 1, 1)).text, choice.take(row("d", 2, 2)).text] == ["äbc", "d"]


def test_scores_of_an_echoed_prompt() -> None:
    choice = Choice(0, echo="äb", echoes_scores=True, shows_logprobs=True)
    prompt = [TextScore("ä", 1, None, offset=0), TextScore("b", 2, -1.0, offset=2)]
    score = TextScore("c", 3, float("-inf"), ["d", "d"], [4, 5], [-1.0, -2.0])
    piece = choice.take(StreamRow(STREAM, "c", 1, 1, None, [score], prompt))
    assert piece.text == "äbc"
    logprobs = text_logprobs(piece)
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [None, -1.0, LOGPROB_MIN]
    assert logprobs.top_logprobs == [None, {"b": -1.0}, {"d": -1.0, "c": LOGPROB_MIN}]


def test_parts_of_characters_have_no_bytes() -> None:
    scores = [TextScore("\ufffd", 1, -1.0), TextScore("é", 2, -1.0)]
    piece = Piece(0, "é", scores, [0, 0])
    assert [token.bytes for token in chat_logprobs(piece).content] == [None, [195, 169]]


@given(st.lists(st.text(max_size=4), max_size=8), st.data())
def test_characters_of_bytes(texts: list[str], data: st.DataObject) -> None:
    """In pieces of any size: the character that each byte is a part of."""
    whole = "".join(texts)
    starts = [0, *itertools.accumulate(len(character.encode()) for character in whole)]
    characters = Characters()
    fed = 0
    asked = 0
    for text in texts:
        characters.add(text)
        fed += len(text.encode())
        for offset in data.draw(st.lists(st.integers(asked, fed), max_size=3).map(sorted)):
            expected = max(number for number, start in enumerate(starts) if start <= offset)
            assert characters.at(offset) == expected
            asked = offset
    assert characters.end == len(whole)
