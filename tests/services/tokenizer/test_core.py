"""SinkThread: the text is a function of the ids; made again, it is the same."""

import os
import subprocess
import sys
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import StreamEnd, TextScore, TokenScore
from llmproto.threads import END_CANCEL, END_ERROR, END_LENGTH, END_STOP, SinkOpen
from llmservices.tokenizer.core import Gap, SinkThread, TextRow, reopen
from llmservices.tokenizer.sink_state import SinkState, decode_sink_state
from llmservices.tokenizer.vocabulary import Vocabulary

Vocabularies = dict[str, Vocabulary]
STATE = SinkState(
    model="m",
    tokenizer_digest=bytes(16),
    folder="/m",
    stream=bytes(17),
    session=bytes(16),
    tenant=0,
    hidden=[2],
)
PROMPT = [1, 260]


def state(
    *, stops: tuple[str, ...] = (), scores: bool = False, prompt_scores: bool = False
) -> SinkState:
    return SinkState(
        model="m",
        tokenizer_digest=bytes(16),
        folder="/m",
        stream=bytes(17),
        session=bytes(16),
        tenant=0,
        stops=list(stops),
        hidden=[2],
        wants_scores=scores,
        wants_prompt_scores=prompt_scores,
    )


def ids(vocabulary: Vocabulary, *contents: str) -> list[int]:
    known = {vocabulary.content(token): token for token in range(vocabulary.tokens)}
    return [known[content] for content in contents]


def opened(
    vocabulary: Vocabulary, tokens: list[int], *, end: int = 0, stops: tuple[str, ...] = ()
) -> SinkThread:
    message = SinkOpen(
        thread=bytes(8),
        tenant=0,
        session=bytes(16),
        sink_state=b"",
        prompt_tokens=len(PROMPT),
        tokens=array("I", PROMPT + tokens).tobytes(),
        acked=0,
        end=end,
    )
    return reopen(vocabulary, state(stops=stops), message)


def test_rows(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback_strip"]
    thread = SinkThread(vocabulary, STATE, PROMPT)
    a, first, second, eos = ids(vocabulary, "▁a", "<0xC3>", "<0xA9>", "</s>")
    assert thread.push(2, a) == TextRow(0, " a", 1)
    assert thread.push(3, first) is None
    assert thread.push(2, a) is None  # a duplicate
    assert thread.push(6, a) == Gap(expected=4, position=6)
    assert thread.push(4, second) == TextRow(2, "é", 3)
    end = StreamEnd(reason="stop", output_tokens=4, prompt_tokens=2)
    assert thread.push(5, eos, END_STOP) == TextRow(4, "", 4, end)
    assert thread.push(6, a) is None  # nothing follows an end
    assert [thread.position_at(offset) for offset in (0, 1, 2, 3, 4)] == [None, None, 3, 3, 5]
    assert thread.since(0) == TextRow(0, " aé", 4, end)
    thread.check()


def test_a_stop_string_ends_the_thread(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    thread = SinkThread(vocabulary, state(stops=("ab", "b b")), PROMPT)
    b, a, word = ids(vocabulary, "b", "a", "▁ab")
    assert thread.push(2, a) is None  # held back
    assert thread.position_at(0) == 2
    assert thread.push(3, a) == TextRow(0, "a", 2)
    end = StreamEnd(reason="stop", output_tokens=3, prompt_tokens=2, stop="ab")
    assert thread.push(4, b) == TextRow(1, "", 3, end, at=4)
    assert thread.since(0) == TextRow(0, "a", 3, end, at=4)
    thread.check()
    assert thread.push(5, word) is None


@pytest.mark.parametrize(
    ("end", "error", "expected"),
    [
        (END_LENGTH, "", StreamEnd("length", 1, 2)),
        (END_CANCEL, "", StreamEnd("cancel", 1, 2)),
        (
            END_ERROR,
            "EXHAUSTED: no blocks: 1 of 2",
            StreamEnd("error", 1, 2, error=ErrorKind.EXHAUSTED, detail="no blocks: 1 of 2"),
        ),
        (END_ERROR, "boom", StreamEnd("error", 1, 2, error=ErrorKind.INTERNAL, detail="boom")),
    ],
)
def test_ends_without_a_token_release_what_was_held(
    end: int, error: str, expected: StreamEnd, vocabularies: Vocabularies
) -> None:
    vocabulary = vocabularies["fallback"]
    for position in (2, 3):
        thread = SinkThread(vocabulary, state(stops=("ab",)), PROMPT)
        assert thread.push(2, ids(vocabulary, "a")[0]) is None
        row = thread.push(position, None, end, error=error)
        assert row == TextRow(0, "a", 1, expected)
        thread.check()


def test_half_a_character_at_the_end(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["byte_level"]
    (half,) = ids(vocabulary, "Ã")
    thread = SinkThread(vocabulary, STATE, [0])
    row = thread.push(1, half, END_LENGTH)
    assert row == TextRow(0, "\ufffd", 1, StreamEnd("length", 1, 1))


def test_no_output_at_all(vocabularies: Vocabularies) -> None:
    thread = SinkThread(vocabularies["fallback"], STATE, [3 + 0xC3])
    row = thread.push(1, None, END_LENGTH)
    assert row == TextRow(0, "", 0, StreamEnd("length", 0, 1))
    assert thread.position_at(0) is None


def test_scores_wait_for_their_text(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    thread = SinkThread(vocabulary, state(stops=("abé",), scores=True), PROMPT)
    a, b = ids(vocabulary, "a", "b")
    first = TextScore("a", a, -1.0, ["b"], [b], [-2.0], 0)
    second = TextScore("b", b, -0.5, offset=1)
    third = TextScore("b", b, -0.25, offset=2)
    assert thread.push(2, a, score=TokenScore(a, -1.0, [b], [-2.0])) == TextRow(0, "", 0)
    assert thread.push(3, b, score=TokenScore(b, -0.5)) == TextRow(0, "", 0)
    row = thread.push(4, b, score=TokenScore(b, -0.25))
    assert row == TextRow(0, "abb", 3, scores=[first, second, third])
    assert thread.since(0).scores == [first, second, third]
    assert thread.since(2, scores=2) == TextRow(2, "b", 3, scores=[third])
    with pytest.raises(RemoteError, match="4 scored tokens"):
        thread.since(3, scores=4)


def test_scores_of_a_stop_string_are_dropped(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    a, b, word = ids(vocabulary, "a", "b", "▁a")
    thread = SinkThread(vocabulary, state(stops=("ab",), scores=True), PROMPT)
    thread.push(2, word, score=TokenScore(word, -1.0))
    row = thread.push(3, b, score=TokenScore(b, -2.0))
    assert isinstance(row, TextRow)
    assert row.end is not None
    # The first token's text begins before the stop string, the second's inside it.
    assert (row.offset, row.text, row.end.stop) == (1, "", "ab")
    assert thread.since(0).scores == [TextScore(" a", word, -1.0, offset=0)]
    assert thread.since(0).text == " "
    assert a


def test_prompt_scores_come_with_the_first_row(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback_strip"]
    (a,) = ids(vocabulary, "▁a")
    thread = SinkThread(vocabulary, state(scores=True, prompt_scores=True), [1, a, a])
    given_scores = [TokenScore(1, None), TokenScore(a, -1.0), TokenScore(a, -2.0)]
    expected = [
        TextScore("<s>", 1, None, offset=0),
        TextScore(" a", a, -1.0, offset=0),
        TextScore(" a", a, -2.0, offset=1),
    ]
    row = thread.push(3, None, END_LENGTH, prompt_scores=given_scores)
    assert row == TextRow(0, "", 0, StreamEnd("length", 0, 3), prompt_scores=expected)
    assert thread.since(0).prompt_scores == expected


def test_since_refuses_what_is_not_there(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    thread = SinkThread(vocabulary, STATE, PROMPT)
    thread.push(2, ids(vocabulary, "é")[0])
    for offset, kind, said in (
        (3, ErrorKind.STALE, "offset 3 is asked for; the stream has 2 bytes"),
        (1, ErrorKind.INVALID, "inside a character"),
    ):
        with pytest.raises(RemoteError, match=said) as caught:
            thread.since(offset)
        assert caught.value.kind is kind
    with pytest.raises(RemoteError, match="offset 3"):
        thread.ack(3)


def test_acknowledged_text_is_forgotten(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    (word,) = ids(vocabulary, "▁ab")
    thread = SinkThread(vocabulary, state(scores=True), PROMPT)
    for position in range(2, 10_002):
        thread.push(position, word, score=TokenScore(word, -1.0))
        assert thread.ack(thread.emitted, thread.tokens) == position
    thread.check()
    assert thread.emitted == 30_000
    assert thread.since(30_000, scores=10_000) == TextRow(30_000, "", 10_000, scores=[])
    with pytest.raises(RemoteError, match="kept from"):
        thread.since(0)
    assert thread.kept_bytes < 100_000


def test_a_resumable_thread_forgets_nothing(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    (word,) = ids(vocabulary, "▁ab")
    resumable = msgspec.structs.replace(state(scores=True), resumable=True)
    thread = SinkThread(vocabulary, resumable, PROMPT)
    for position in range(2, 5_002):
        thread.push(position, word, score=TokenScore(word, -1.0))
        assert thread.ack(thread.emitted, thread.tokens) == position
    thread.check()
    whole = thread.since(0)
    assert len(whole.text) == 15_000
    assert whole.scores is not None
    assert len(whole.scores) == 5_000


def test_tokens_without_text_are_acknowledged(vocabularies: Vocabularies) -> None:
    thread = SinkThread(vocabularies["fallback"], STATE, PROMPT)
    for position in range(2, 302):
        assert thread.push(position, 1) is None
    assert thread.acked_position() == 301


@given(data=st.data())
def test_made_again_it_is_the_same(data: st.DataObject, vocabularies: Vocabularies) -> None:
    kind = data.draw(st.sampled_from(sorted(vocabularies)))
    vocabulary = vocabularies[kind]
    tokens = data.draw(st.lists(st.integers(0, vocabulary.tokens - 1), max_size=20))
    stops = tuple(data.draw(st.lists(st.text("ab é", min_size=1, max_size=3), max_size=2)))
    end = data.draw(st.sampled_from([END_STOP, END_LENGTH]))
    thread = SinkThread(vocabulary, state(stops=stops), PROMPT)
    client, positions = "", list[int]()
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        row = thread.push(2 + index, token, end if last else 0)
        thread.check()
        if isinstance(row, TextRow):
            assert row.offset == len(client.encode())
            client += row.text
        positions.append(thread.position_at(thread.emitted) or 0)
        if thread.end is None:
            again = opened(vocabulary, tokens[: index + 1], stops=stops)
            assert again.since(0).text == client
    assert thread.since(0).text == client
    assert opened(vocabulary, tokens, end=end if tokens else 0, stops=stops).since(0) == (
        thread.since(0)
    )
    if thread.end is not None and thread.end.stop is not None:
        kept = tokens[: thread.end.output_tokens]  # what the kernel keeps after ThreadEnd
        assert opened(vocabulary, kept, end=END_STOP, stops=stops).since(0) == thread.since(0)
    assert positions == sorted(positions)
    for stop in stops:
        assert stop not in client or thread.end is None
    offset = len(client[: data.draw(st.integers(0, len(client)))].encode())
    assert thread.since(offset).text == client.encode()[offset:].decode()


def test_reopened_with_scores_and_an_error(vocabularies: Vocabularies) -> None:
    vocabulary = vocabularies["fallback"]
    (word,) = ids(vocabulary, "▁ab")
    message = SinkOpen(
        thread=bytes(8),
        tenant=0,
        session=bytes(16),
        sink_state=b"",
        prompt_tokens=1,
        tokens=array("I", [1, word, word]).tobytes(),
        acked=1,
        end=END_ERROR,
        error=ErrorKind.INTERNAL,
        detail="a: b",
        scores=[TokenScore(word, -1.0), TokenScore(word, -2.0)],
        prompt_scores=[TokenScore(1, None)],
    )
    thread = reopen(vocabulary, state(scores=True, prompt_scores=True), message)
    thread.check()
    assert thread.since(0) == TextRow(
        0,
        " ab ab",
        2,
        StreamEnd("error", 2, 1, error=ErrorKind.INTERNAL, detail="a: b"),
        scores=[TextScore(" ab", word, -1.0), TextScore(" ab", word, -2.0, offset=3)],
        prompt_scores=[TextScore("<s>", 1, None)],
    )


def test_the_sink_state_is_bounded() -> None:
    full = state(stops=("x" * 256,) * 16)
    assert decode_sink_state(full.encode()) == full
    with pytest.raises(RemoteError, match="16384"):
        state(stops=("x" * 2048,) * 16).encode()


@given(garbage=st.binary(max_size=64))
def test_garbage_is_no_sink_state(garbage: bytes) -> None:
    with pytest.raises(RemoteError) as caught:
        decode_sink_state(garbage)
    assert caught.value.kind is ErrorKind.INVALID


def test_heavy_libraries_stay_out() -> None:
    code = (
        "import sys, llmservices.tokenizer.core, llmservices.tokenizer.request; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
