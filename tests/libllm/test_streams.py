"""Exactly once, whatever is lost, repeated or reordered."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from libllm.events import StreamRow
from libllm.streams import (
    FINISHED_MAX,
    FINISHED_NS,
    Finished,
    FinishedStreams,
    Gap,
    Row,
    Stream,
    rows_of,
)
from llmproto.generation import StreamEnd, Text, TextScore

NAME = bytes(17)
END = StreamEnd("stop", 3, 2)


def row(
    offset: int,
    text: str,
    tokens: int,
    end: StreamEnd | None = None,
    scores: list[TextScore] | None = None,
    prompt_scores: list[TextScore] | None = None,
) -> Row:
    """A row of the one stream."""
    return Row(NAME, offset, text, tokens, end, scores, prompt_scores)


def score(number: int) -> TextScore:
    """The score of the token with this number."""
    return TextScore("x", number, -1.0)


def test_rows_are_taken_in_order_once() -> None:
    stream = Stream(wants_prompt_scores=False)
    assert stream.take(row(0, "añ", 1)) == StreamRow(NAME, "añ", 3, 1)
    assert stream.take(row(0, "añ", 1)) is Gap.KNOWN
    assert stream.take(row(4, "c", 3)) is Gap.MISSING
    assert stream.take(row(0, "añb", 2)) == StreamRow(NAME, "b", 4, 2)
    assert stream.take(row(4, "", 3)) == StreamRow(NAME, "", 4, 3)
    assert stream.take(row(4, "", 3)) is Gap.KNOWN
    assert stream.take(row(0, "añb", 3, END)) == StreamRow(NAME, "", 4, 3, END)
    assert stream.take(row(4, "", 3, END)) is Gap.KNOWN


def test_a_row_that_cuts_a_character_or_ends_too_early_is_broken() -> None:
    stream = Stream(offset=1, wants_prompt_scores=False)
    assert stream.take(row(0, "ñb", 1)) is Gap.BROKEN
    assert stream.take(row(0, "", 1, END)) is Gap.BROKEN


def test_a_missing_score_is_asked_for() -> None:
    stream = Stream(wants_prompt_scores=False)
    assert stream.take(row(0, "a", 1, scores=[score(0)])) is not Gap.MISSING
    late = row(1, "c", 3, scores=[score(2)])
    assert stream.take(late) is Gap.MISSING
    assert stream.take(row(1, "bc", 3, scores=[score(1), score(2)])) == StreamRow(
        NAME, "bc", 3, 3, None, [score(1), score(2)]
    )
    assert stream.take(row(3, "", 5, scores=[score(4)])) is Gap.MISSING
    taken = stream.take(row(3, "", 5, scores=[score(3), score(4)]))
    assert isinstance(taken, StreamRow) and taken.scores == [score(3), score(4)]


def test_scores_of_the_prompt_come_with_the_first_row_or_are_asked_for() -> None:
    stream = Stream(wants_prompt_scores=True)
    assert stream.take(row(0, "a", 1)) is Gap.MISSING
    taken = stream.take(row(0, "a", 1, prompt_scores=[score(7)]))
    assert isinstance(taken, StreamRow) and taken.prompt_scores == [score(7)]
    again = stream.take(row(0, "ab", 2, prompt_scores=[score(7)]))
    assert isinstance(again, StreamRow) and again.prompt_scores is None


class Sink:
    """A sink's kept text, from which it sends any part again."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def since(self, offset: int, scores: int) -> Row:
        """All that follows."""
        text = "".join(self.pieces)
        rest = text.encode()[offset:].decode()
        count = len(self.pieces)
        kept = [score(number) for number in range(scores, count)]
        return row(offset, rest, count, StreamEnd("stop", count, 1), kept)

    def rows(self, cuts: list[int]) -> list[Row]:
        """The stream in rows that end after these numbers of tokens."""
        rows, begin = [], 0
        bounds = sorted({*(cut % len(self.pieces) for cut in cuts), len(self.pieces)} - {0})
        for bound in bounds:
            before = "".join(self.pieces[:begin])
            last = bound == len(self.pieces)
            rows.append(
                row(
                    len(before.encode()),
                    "".join(self.pieces[begin:bound]),
                    bound,
                    StreamEnd("stop", bound, 1) if last else None,
                    [score(number) for number in range(begin, bound)],
                )
            )
            begin = bound
        return rows


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text(alphabet="aé✓🙂", max_size=3), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 50), max_size=8),
    recuts=st.lists(st.integers(0, 50), max_size=8),
    seed=st.integers(0, 2**32),
)
def test_any_network_gives_the_exact_text_once(
    pieces: list[str], cuts: list[int], recuts: list[int], seed: int
) -> None:
    sink, stream, network = Sink(pieces), Stream(wants_prompt_scores=False), random.Random(seed)
    flying = [row for row in sink.rows(cuts) + sink.rows(recuts) if network.random() < 0.7]
    network.shuffle(flying)
    got: list[StreamRow] = []
    while not stream.ended:
        # When nothing flies any more the client notices silence, and asks.
        taken = stream.take(flying.pop() if flying else sink.since(stream.offset, stream.scores))
        assert taken is not Gap.BROKEN
        if taken is Gap.MISSING and network.random() < 0.5:
            flying.append(sink.since(stream.offset, stream.scores))
        if isinstance(taken, StreamRow):
            got.append(taken)
    assert "".join(row.text for row in got) == "".join(pieces)
    tokens = [score.token for row in got for score in row.scores or ()]
    assert tokens == list(range(len(pieces)))
    assert [row.end is not None for row in got] == [False] * (len(got) - 1) + [True]
    assert [row.until for row in got] == sorted(row.until for row in got)


def test_columns_of_different_lengths_are_no_rows() -> None:
    assert rows_of(Text([NAME], [0], ["a"], [1], [None])) == [row(0, "a", 1)]
    assert rows_of(Text([NAME], [0], ["a"], [1], [])) == []


def test_finished_streams_are_forgotten_by_age_and_number() -> None:
    finished = FinishedStreams()
    for number in range(FINISHED_MAX + 10):
        finished.add(number.to_bytes(17, "big"), Finished(number, 0, 0, False))
    assert len(finished.all()) == FINISHED_MAX
    finished.add(NAME, Finished(FINISHED_NS + FINISHED_MAX + 10, 0, 0, True))
    assert finished.all() == [NAME]
