"""The streams that this sink keeps: which thread each is, and who reads it.

Invariant (`check`): every stream leads to one thread and back.
"""

from collections.abc import Iterable

from llmproto.generation import StreamEnd, Text, TextScore

from llmservices.tokenizer.core import SinkThread, TextRow


class Live:
    """One thread in this sink."""

    __slots__ = ("acked", "session", "silent", "stream", "tenant", "text", "thread")

    def __init__(
        self, thread: bytes, text: SinkThread, *, stream: bytes, session: bytes, tenant: int
    ) -> None:
        self.thread = thread
        self.text = text
        self.stream = stream
        self.session = session
        """Whom its text goes to."""
        self.tenant = tenant
        self.acked = 0
        """Position of the last SinkAcked."""
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
