"""The streams that this sink keeps: which thread each is, and who reads it.

Invariant (`check`): every stream leads to one thread and back.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
from llmproto import limits
from llmproto.generation import StreamEnd, Text, TextScore

from llmservices.tokenizer.core import SinkThread, TextRow

MESSAGE_BYTES: Final = limits.MESSAGE_BYTES_MAX // 2
"""A Text is no larger than this, by an estimate from above; a row is cut into pieces of that."""
ROW_BYTES: Final = 256
"""A row beside its text and scores: stream, offset, count, end, and the detail of a failure is
small change beside what is kept free."""
SCORE_BYTES: Final = 48
"""A score beside its texts, and each alternative in it."""


class Live:
    """One thread in this sink."""

    __slots__ = (
        "acked", "began_s", "given_up", "reminders", "session", "silent", "stream", "tenant",
        "text", "thread",
    )  # fmt: skip

    def __init__(
        self, thread: bytes, text: SinkThread, *, stream: bytes, session: bytes, tenant: int
    ) -> None:
        self.thread = thread
        self.text = text
        self.stream = stream
        self.session = session
        """Whom its text goes to."""
        self.tenant = tenant
        """Who reads it, and pays."""
        self.began_s: float | None = None
        """When its request came, until its first text."""
        self.given_up = False
        """Its reader wants neither more text nor the end."""
        self.acked = 0
        """Position of the last SinkAcked."""
        self.reminders = 0
        """Times that its end was found unacknowledged."""
        self.silent = 0
        """Tokens since the last that made text."""

    @property
    def position(self) -> int:
        """What the Beat says of it: the last position received, one more with the end."""
        return self.text.next_position - (0 if self.text.end is not None else 1)


class Streams:
    """By thread, and by stream."""

    def __init__(self) -> None:
        self.by_thread: dict[bytes, Live] = {}
        self.by_stream: dict[bytes, Live] = {}

    def put(self, live: Live) -> None:
        """A thread is new here, or was made anew."""
        self.drop(live.thread)
        self.by_thread[live.thread] = live
        self.by_stream[live.stream] = live

    def drop(self, thread: bytes) -> None:
        """The thread is over, or forgotten."""
        live = self.by_thread.pop(thread, None)
        if live is not None and self.by_stream.get(live.stream) is live:
            del self.by_stream[live.stream]

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self.by_stream) == len(self.by_thread)
        for thread, live in self.by_thread.items():
            assert live.thread == thread
            assert self.by_stream[live.stream] is live


def texts_of(rows: Iterable[tuple[Live, TextRow]]) -> Iterator[Text]:
    """The rows of one reader, in order, as messages none of which is too large."""
    batch: list[tuple[Live, TextRow]] = []
    batch_bytes = 0
    for live, whole in rows:
        for row in pieces_of(whole):
            row_bytes = _bytes_of(row)
            if batch and batch_bytes + row_bytes > MESSAGE_BYTES:
                yield text_of(batch)
                batch, batch_bytes = [], 0
            batch.append((live, row))
            batch_bytes += row_bytes
    if batch:
        yield text_of(batch)


def pieces_of(row: TextRow) -> Iterator[TextRow]:
    """The same as several rows where it is too large for one: first text, then scores, and the end
    with the last.

    Each row says how many tokens were scored up to its own scores, so that they are counted once.
    """
    if _bytes_of(row) <= MESSAGE_BYTES:
        yield row
        return
    scores = row.scores or []
    first = row.tokens - len(scores)
    made: list[TextRow] = []
    offset = row.offset
    for text in _cut(row.text):
        made.append(TextRow(offset, text, first if scores else row.tokens))
        offset += len(text.encode())
    made[0] = msgspec.structs.replace(made[0], prompt_scores=row.prompt_scores)
    for chunk in _chunks(scores):
        first += len(chunk)
        made.append(TextRow(offset, "", first, scores=chunk))
    yield from made[:-1]
    yield msgspec.structs.replace(made[-1], end=row.end, at=row.at)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MESSAGE_BYTES, at least one."""
    characters = (MESSAGE_BYTES - ROW_BYTES) // 4
    yield text[:characters]
    for at in range(characters, len(text), characters):
        yield text[at : at + characters]


def _chunks(scores: list[TextScore]) -> Iterator[list[TextScore]]:
    chunk: list[TextScore] = []
    chunk_bytes = ROW_BYTES
    for score in scores:
        score_bytes = _bytes_of_score(score)
        if chunk and chunk_bytes + score_bytes > MESSAGE_BYTES:
            yield chunk
            chunk, chunk_bytes = [], ROW_BYTES
        chunk.append(score)
        chunk_bytes += score_bytes
    if chunk:
        yield chunk


def _bytes_of(row: TextRow) -> int:
    """At most so many in a message."""
    total = ROW_BYTES + 4 * len(row.text)
    for scores in (row.scores, row.prompt_scores):
        if scores:
            total += sum(map(_bytes_of_score, scores))
    return total


def _bytes_of_score(score: TextScore) -> int:
    return SCORE_BYTES * (1 + len(score.top_texts)) + 4 * (
        len(score.text) + sum(map(len, score.top_texts))
    )


def text_of(rows: Iterable[tuple[Live, TextRow]]) -> Text:
    """The rows of one reader as one message."""
    streams: list[bytes] = []
    offsets: list[int] = []
    texts: list[str] = []
    tokens: list[int] = []
    ends: list[StreamEnd | None] = []
    scores: list[list[TextScore] | None] = []
    prompt_scores: list[list[TextScore] | None] = []
    for live, row in rows:
        streams.append(live.stream)
        offsets.append(row.offset)
        texts.append(row.text)
        tokens.append(row.tokens)
        ends.append(row.end)
        scores.append(row.scores)
        prompt_scores.append(row.prompt_scores)
    scored = any(item is not None for item in scores)
    prompted = any(item is not None for item in prompt_scores)
    return Text(
        streams,
        offsets,
        texts,
        tokens,
        ends,
        scores if scored else None,
        prompt_scores if prompted else None,
    )
