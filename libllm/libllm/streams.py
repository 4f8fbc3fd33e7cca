"""The client's half of streams: each byte and each score exactly once, in order, whatever the
network did.

Owns how far each stream was received and consumed, and which ends were taken. A row says where it
begins, so what was received before is cut away and what is missing is noticed; text is a function
of the thread's tokens, so a byte that comes twice is the same byte.
"""

from enum import Enum
from typing import Final, NamedTuple

from llmproto import limits
from llmproto.generation import StreamEnd, Text, TextScore

from libllm.events import StreamRow

FINISHED_MAX: Final = limits.THREADS_PER_TENANT_MAX
"""Finished streams that are remembered, to acknowledge their ends again."""
FINISHED_NS: Final = limits.LINGER_MS * 1_000_000


class Gap(Enum):
    """Why a row was not taken."""

    MISSING = 1
    """Something before it is missing: ask for it."""
    KNOWN = 2
    """All of it was received before."""
    BROKEN = 3
    """It contradicts what was received."""


class Row(NamedTuple):
    """One stream's part of a Text."""

    stream: bytes
    offset: int
    text: str
    tokens: int
    end: StreamEnd | None
    scores: list[TextScore] | None
    prompt_scores: list[TextScore] | None


def rows_of(message: Text) -> list[Row]:
    """The columns of a Text as rows; none where they differ in length, which no sink sends."""
    count = len(message.streams)
    none: list[list[TextScore] | None] = [None] * count
    scores = none if message.scores is None else message.scores
    prompt_scores = none if message.prompt_scores is None else message.prompt_scores
    columns = (message.offsets, message.texts, message.tokens, message.ends, scores, prompt_scores)
    if any(len(column) != count for column in columns):
        return []
    return [
        Row(*row)
        for row in zip(
            message.streams,
            message.offsets,
            message.texts,
            message.tokens,
            message.ends,
            scores,
            prompt_scores,
            strict=True,
        )
    ]


class Stream:
    """How far one stream was received and consumed.

    Invariant: consumed <= received, in bytes and in tokens; nothing is received after the end.
    """

    def __init__(self, *, offset: int = 0, scores: int = 0, wants_prompt_scores: bool) -> None:
        self.offset = offset
        """Bytes received."""
        self.tokens = 0
        """Generated tokens received."""
        self.scores = scores
        """Scored tokens received."""
        self.wants_prompt_scores = wants_prompt_scores
        self.ended = False
        self.consumed_offset = offset
        self.consumed_tokens = 0
        self.acked_tokens = 0
        self.accepted = False
        """Its thread exists, and its end did not come yet."""
        self.thread: bytes | None = None
        self.resumable = False
        self.attaching: bytes | None = None
        """Id of the Attach that is on its way."""
        self.silences = 0
        """Times in a row that nothing had come for too long."""
        self.tenant: int | None = None
        self.deadline_ns: int | None = None

    def take(self, row: Row) -> StreamRow | Gap:
        """The part of this row that is new, as it goes to the caller."""
        if self.ended:
            return Gap.KNOWN
        if row.offset > self.offset:
            return Gap.MISSING
        text, until = row.text, self.offset
        if text:
            data = text.encode()
            until = row.offset + len(data)
            if until < self.offset:
                return Gap.KNOWN if row.end is None else Gap.BROKEN
            if row.offset < self.offset:
                try:
                    text = data[self.offset - row.offset :].decode()
                except UnicodeDecodeError:
                    return Gap.BROKEN
        elif row.offset < self.offset:
            return Gap.KNOWN if row.end is None else Gap.BROKEN
        if self.wants_prompt_scores and row.prompt_scores is None:
            return Gap.MISSING
        scores = row.scores
        if scores:
            first = row.tokens - len(scores)
            if first > self.scores:
                return Gap.MISSING
            scores = scores[self.scores - first :]
        if not (text or scores or row.end is not None or row.tokens > self.tokens):
            return Gap.KNOWN
        prompt_scores = row.prompt_scores if self.wants_prompt_scores else None
        self.wants_prompt_scores = False
        self.offset = until
        self.tokens = max(self.tokens, row.tokens)
        self.scores += len(scores or ())
        self.ended = row.end is not None
        return StreamRow(
            row.stream, text, until, self.tokens, row.end, scores or None, prompt_scores
        )

    def consume(self, until: int, tokens: int) -> None:
        """The caller took everything up to here."""
        assert until <= self.offset, (until, self.offset)
        assert tokens <= self.tokens, (tokens, self.tokens)
        self.consumed_offset = max(self.consumed_offset, until)
        self.consumed_tokens = max(self.consumed_tokens, tokens)

    @property
    def is_urgent(self) -> bool:
        """Half the credit is used and not given back."""
        return self.consumed_tokens - self.acked_tokens >= limits.CREDIT_TOKENS // 2


class Finished(NamedTuple):
    """What is remembered of a stream that nobody listens to any more."""

    at_ns: int
    offset: int
    tokens: int
    cancelled: bool
    """Its thread must end as soon as it is known."""


class FinishedStreams:
    """The youngest streams that are over for the caller, so that an end that comes again is
    acknowledged again.

    Invariant: at most FINISHED_MAX, none much older than FINISHED_NS, in order of age.
    """

    def __init__(self) -> None:
        self._by_stream: dict[bytes, Finished] = {}

    def add(self, stream: bytes, finished: Finished) -> None:
        """Remember; forgets what is old."""
        self._by_stream[stream] = finished
        while self._by_stream:
            oldest = next(iter(self._by_stream))
            young = self._by_stream[oldest].at_ns > finished.at_ns - FINISHED_NS
            if young and len(self._by_stream) <= FINISHED_MAX:
                break
            del self._by_stream[oldest]

    def find(self, stream: bytes) -> Finished | None:
        """What is remembered of it."""
        return self._by_stream.get(stream)

    def drop(self, stream: bytes) -> None:
        """Somebody listens to it again."""
        self._by_stream.pop(stream, None)

    def all(self) -> list[bytes]:
        """Every one that is remembered, oldest first."""
        return list(self._by_stream)
