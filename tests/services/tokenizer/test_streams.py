"""Which thread a stream is, and messages that fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmproto import limits, wire
from llmproto.generation import StreamEnd, TextScore
from llmservices.tokenizer import streams
from llmservices.tokenizer.core import SinkThread, TextRow
from llmservices.tokenizer.sink_state import SinkState
from llmservices.tokenizer.streams import Live, Streams, pieces_of, texts_of
from llmservices.tokenizer.vocabulary import Vocabulary

END = StreamEnd("length", 3, 1)


def live(vocabulary: Vocabulary, thread: bytes, stream: bytes) -> Live:
    state = SinkState("m", bytes(16), "/f", stream, bytes(16), 1)
    text = SinkThread(vocabulary, state, [2, 3])
    return Live(thread, text, stream=stream, session=bytes(16), tenant=1)


def test_streams_and_threads_lead_to_each_other(byte_level_vocabulary: Vocabulary) -> None:
    table = Streams()
    first = live(byte_level_vocabulary, b"a", b"1")
    table.put(first)
    table.put(live(byte_level_vocabulary, b"b", b"2"))
    table.check()
    anew = live(byte_level_vocabulary, b"a", b"1")
    table.put(anew)
    table.check()
    assert table.by_stream[b"1"] is anew
    table.drop(b"a")
    table.drop(b"a")
    table.check()
    assert list(table.by_stream) == [b"2"]


def test_a_row_that_fits_is_left_as_it_is() -> None:
    row = TextRow(3, "text", 2, END, 5)
    assert list(pieces_of(row)) == [row]


scores = st.builds(
    TextScore,
    text=st.text(max_size=4),
    token=st.integers(0, 99),
    logprob=st.floats(-9, 0),
    top_texts=st.lists(st.text(max_size=3), max_size=2),
    top_tokens=st.lists(st.integers(0, 9), max_size=2),
    top_logprobs=st.lists(st.floats(-9, 0), max_size=2),
    offset=st.integers(0, 99),
)


@given(st.text(max_size=2000), st.lists(scores, max_size=30), st.booleans())
def test_pieces_are_the_row(text: str, found: list[TextScore], ended: bool) -> None:
    """In order, without a gap, each score once, the end with the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MESSAGE_BYTES", 1024)
        row = TextRow(7, text, len(found) + 4, END if ended else None, 9, found or None, found)
        pieces = list(pieces_of(row))
    assert "".join(piece.text for piece in pieces) == text
    offset, scored = 7, 4
    for piece in pieces:
        assert piece.offset == offset
        offset += len(piece.text.encode())
        if piece.scores:
            assert piece.tokens - len(piece.scores) == scored
            scored = piece.tokens
    assert [score for piece in pieces for score in piece.scores or []] == found
    assert pieces[0].prompt_scores == found
    assert all(piece.prompt_scores is None for piece in pieces[1:])
    assert [piece.end for piece in pieces] == [None] * (len(pieces) - 1) + [row.end]
    assert pieces[-1].tokens == row.tokens


def test_many_rows_are_as_many_messages_as_they_need(byte_level_vocabulary: Vocabulary) -> None:
    one = live(byte_level_vocabulary, b"a", b"1" * 17)
    rows = [(one, TextRow(0, "日" * 1000, 1)) for _ in range(1000)]
    messages = list(texts_of(rows))
    assert 2 < len(messages) < 20
    assert sum(len(message.streams) for message in messages) == 1000
    for message in messages:
        assert len(wire.encode_body(message)) < limits.MESSAGE_BYTES_MAX
    assert list(texts_of([])) == []
