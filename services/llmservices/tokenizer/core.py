"""The sink's part of one thread: committed tokens in, text out.

`SinkThread` is a pure function of the ids that were committed: built again from them, in any
grouping, it emits the same text at the same offsets.  Offsets count UTF-8 bytes of the stream.
"""

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import StreamEnd, TextScore, TokenScore
from llmproto.threads import END_CANCEL, END_ERROR, END_LENGTH, END_NONE, END_STOP, SinkOpen

from llmservices.tokenizer.detokenizer import open_detokenizer
from llmservices.tokenizer.sink_state import SinkState
from llmservices.tokenizer.stops import StopMatcher
from llmservices.tokenizer.vocabulary import Vocabulary

REASONS: Final = {END_STOP: "stop", END_LENGTH: "length", END_CANCEL: "cancel", END_ERROR: "error"}
FORGET_BYTES: Final = 4096  # acknowledged text is dropped in pieces of at least this size


class TextRow(msgspec.Struct, frozen=True, gc=False):
    """One row of a Text message."""

    offset: int
    text: str
    tokens: int
    """Generated tokens up to and including this row; where scores are wanted, the scored ones."""
    end: StreamEnd | None = None
    at: int | None = None
    """The last position of the thread, where a stop string ended it: for ThreadEnd."""
    scores: list[TextScore] | None = None
    prompt_scores: list[TextScore] | None = None


class Gap(msgspec.Struct, frozen=True):
    """Positions were lost on the way; the kernel sends them again."""

    expected: int
    position: int


class SinkThread:
    """The text of one thread.

    Invariants (`check`): text is kept from `_text_base` to the last emitted byte;
    `_emitted_after[i]` is the stream's length after position `_position_base + i`, never falling;
    nothing follows the end.
    """

    def __init__(self, vocabulary: Vocabulary, state: SinkState, prompt: Sequence[int]) -> None:
        self.state: Final = state
        self.prompt_tokens: Final = len(prompt)
        self.end: StreamEnd | None = None
        self._vocabulary = vocabulary
        self._prompt = prompt if state.wants_prompt_scores else ()
        self._detokenizer = open_detokenizer(vocabulary, prompt)
        self._matcher = StopMatcher(state.stops) if state.stops else None
        self._hidden = frozenset(state.hidden)
        self._next = len(prompt)
        self._text = bytearray()
        self._text_base = 0
        self._emitted = 0
        self._acked = 0
        self._decoded = 0
        self._position_base = len(prompt)
        self._emitted_after = array("Q")
        self._waiting: deque[tuple[int, TextScore]] = deque()
        """Scores whose text is held back, with the offset behind it."""
        self._scores: deque[tuple[int, TextScore]] = deque()
        """Scores that were sent, with `tokens` of their row."""
        self._scores_base = 0
        self._prompt_scores: list[TextScore] | None = None

    @property
    def emitted(self) -> int:
        """Bytes of the stream that exist by now."""
        return self._emitted

    @property
    def next_position(self) -> int:
        """The position that `push` takes next."""
        return self._next

    @property
    def tokens(self) -> int:
        """Generated tokens so far."""
        return self._next - self.prompt_tokens

    @property
    def delivered_tokens(self) -> int:
        """As rows count them: where scores are wanted, those whose score was released, so that a
        client can tell which scores of a row it has.
        """
        if not self.state.wants_scores:
            return self.tokens
        return self._scores_base + len(self._scores)

    @property
    def kept_bytes(self) -> int:
        """Memory that grows with the stream: text, and 8 bytes a position."""
        return len(self._text) + self._emitted_after.itemsize * len(self._emitted_after)

    def push(
        self,
        position: int,
        token: int | None,
        end: int = END_NONE,
        score: TokenScore | None = None,
        *,
        prompt_scores: list[TokenScore] | None = None,
        error: str = "",
    ) -> TextRow | Gap | None:
        """Take one committed row; give what is to be sent, if anything.

        A position that was seen is a duplicate: None.  A row without a token only ends the thread.
        """
        if self.end is not None:
            return None
        expected = self._next
        if position != expected:
            if position > expected:
                return Gap(expected, position)
            if token is not None:
                return None
        if prompt_scores is not None and self._prompt_scores is None:
            self._prompt_scores = self._of_prompt(prompt_scores)
        if token is None and end == END_NONE:
            return None
        text, stop = self._take(token, score) if token is not None else ("", None)
        if end != END_NONE and stop is None:
            rest, stop = self._finished()
            text += rest
        if stop is not None:
            self.end = self._ended(END_STOP, stop, "")
        elif end != END_NONE:
            self.end = self._ended(end, None, error)
        elif not text and score is None and prompt_scores is None:
            self._emitted_after.append(self._emitted)
            return None
        return self._row(text, token is not None, stop is not None, prompt_scores is not None)

    def ack(self, offset: int, tokens: int = 0) -> int | None:
        """The client has consumed so much: forget it.  The position for SinkAcked, None before the
        first.

        `tokens` is that of the last row that it consumed; scores of earlier rows are forgotten.
        Of a resumable thread nothing is forgotten.
        """
        if offset > self._emitted:
            raise self._stale(offset)
        self._acked = max(self._acked, offset)
        if self.state.resumable:
            return self.acked_position()
        if self._acked - self._text_base >= FORGET_BYTES:
            del self._text[: self._acked - self._text_base]
            self._text_base = self._acked
        while self._scores and self._scores[0][0] < tokens:
            self._scores.popleft()
            self._scores_base += 1
        return self.acked_position()

    def acked_position(self) -> int | None:
        """`position_at` the acknowledged offset; it grows while tokens without text follow."""
        position = self.position_at(self._acked)
        if position is not None and position - self._position_base >= FORGET_BYTES:
            del self._emitted_after[: position - self._position_base]
            self._position_base = position
        return position

    def position_at(self, offset: int) -> int | None:
        """The last generated position after which the stream is no longer than this offset; None if
        there is none.

        Text that is held back counts for nothing: so a thread whose tokens say nothing yet still
        gets credit.
        """
        index = bisect_right(self._emitted_after, offset) - 1
        return self._position_base + index if index >= 0 else None

    def offset_after(self, position: int) -> int:
        """The stream's length after this position; what is kept of it where that is forgotten."""
        index = position - self._position_base
        if index < 0 or not self._emitted_after:
            return self._text_base
        return self._emitted_after[min(index, len(self._emitted_after) - 1)]

    def since(self, offset: int, scores: int = 0) -> TextRow:
        """All that follows what a client holds: text from this byte, scores from this count.

        STALE, with both numbers, beyond what exists or before what is kept; INVALID inside a
        character.
        """
        if not self._text_base <= offset <= self._emitted:
            raise self._stale(offset)
        sent = self._scores_base + len(self._scores)
        if not self._scores_base <= scores <= sent:
            raise RemoteError(
                ErrorKind.STALE,
                f"{scores} scored tokens are asked for; {self._scores_base} to {sent} are kept",
            )
        rest = self._text[offset - self._text_base :]
        if rest and rest[0] & 0xC0 == 0x80:
            raise invalid(f"offset {offset} is inside a character; ask from its first byte")
        wanted = self.state.wants_scores
        kept = (
            [score for _, score in list(self._scores)[scores - self._scores_base :]]
            if wanted
            else None
        )
        prompt_scores = self._prompt_scores if offset == 0 and scores == 0 else None
        at = self._next - 1 if self.end is not None and self.end.stop is not None else None
        delivered = self.delivered_tokens
        return TextRow(offset, rest.decode(), delivered, self.end, at, kept, prompt_scores)

    def check(self) -> None:
        """Assert the invariants."""
        assert self._text_base + len(self._text) == self._emitted <= self._decoded
        assert self._text_base <= self._acked <= self._emitted
        assert self._position_base + len(self._emitted_after) == self._next
        assert all(a <= b for a, b in zip(self._emitted_after, self._emitted_after[1:]))
        assert not self._emitted_after or self._emitted_after[-1] <= self._emitted
        assert self.end is None or not self._waiting

    def _take(self, token: int, score: TokenScore | None) -> tuple[str, str | None]:
        """The certain text of one token, and the stop string that it completes."""
        self._next += 1
        begin = self._decoded
        text = "" if token in self._hidden else self._detokenizer.push(token)
        if text:
            self._decoded += len(text) if text.isascii() else len(text.encode())
        if score is not None:
            self._waiting.append((self._decoded, self._scored(score, begin)))
        if self._matcher is None or not text:
            return text, None
        return self._matcher.push(text)

    def _finished(self) -> tuple[str, str | None]:
        """What was held back, at the end."""
        rest = self._detokenizer.finish()
        self._decoded += len(rest.encode())
        if self._matcher is None:
            return rest, None
        text, stop = self._matcher.push(rest)
        return (text, stop) if stop is not None else (text + self._matcher.finish(), None)

    def _row(self, text: str, has_token: bool, stopped: bool, has_prompt_scores: bool) -> TextRow:
        """Record the text as emitted, and put the row together."""
        offset = self._emitted
        if text:
            data = text.encode()
            self._text += data
            self._emitted += len(data)
        if has_token:
            self._emitted_after.append(self._emitted)
        released = self._released()
        return TextRow(
            offset,
            text,
            self.delivered_tokens,
            self.end,
            self._next - 1 if stopped else None,
            released,
            self._prompt_scores if has_prompt_scores else None,
        )

    def _released(self) -> list[TextScore] | None:
        """Scores of tokens whose text is no longer held back; at the end, those of the text before
        it.
        """
        if not self.state.wants_scores:
            return None
        released: list[TextScore] = []
        while self._waiting:
            behind, score = self._waiting[0]
            if behind > self._emitted and (self.end is None or score.offset >= self._emitted):
                break
            self._waiting.popleft()
            released.append(score)
        if self.end is not None:
            self._waiting.clear()
        delivered = self.delivered_tokens + len(released)
        self._scores.extend((delivered, score) for score in released)
        return released or None

    def _ended(self, end: int, stop: str | None, error: str) -> StreamEnd:
        kind, _, detail = error.partition(": ")
        failed = end == END_ERROR
        return StreamEnd(
            reason=REASONS[end],
            output_tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            stop=stop,
            error=error_kind(kind) if failed else None,
            detail=(detail or error) if failed else "",
        )

    def _scored(self, score: TokenScore, offset: int) -> TextScore:
        shown = self._vocabulary.token_text
        return TextScore(
            text=shown(score.token),
            token=score.token,
            logprob=score.logprob,
            top_texts=[shown(token) for token in score.top_tokens],
            top_tokens=score.top_tokens,
            top_logprobs=score.top_logprobs,
            offset=offset,
        )

    def _of_prompt(self, scores: list[TokenScore]) -> list[TextScore]:
        """With offsets in the text of the prompt."""
        detokenizer = open_detokenizer(self._vocabulary, ())
        offset = 0
        scored: list[TextScore] = []
        for score in scores:
            scored.append(self._scored(score, offset))
            offset += len(detokenizer.push(score.token).encode())
        return scored

    def _stale(self, offset: int) -> RemoteError:
        return RemoteError(
            ErrorKind.STALE,
            f"offset {offset} is asked for; the stream has {self._emitted} bytes, kept "
            f"from {self._text_base}",
        )


def reopen(vocabulary: Vocabulary, state: SinkState, message: SinkOpen) -> SinkThread:
    """The thread as it was, from what the kernel keeps of it; all of its text is there again."""
    tokens = array("I", message.tokens)
    thread = SinkThread(vocabulary, state, tokens[: message.prompt_tokens])
    scores = message.scores or []
    last = len(tokens) - 1
    if message.prompt_scores is not None:
        thread.push(thread.next_position, None, prompt_scores=message.prompt_scores)
    error = f"{message.error}: {message.detail}" if message.error is not None else message.detail
    for position in range(message.prompt_tokens, len(tokens)):
        index = position - message.prompt_tokens
        end = message.end if position == last else END_NONE
        score = scores[index] if index < len(scores) else None
        thread.push(position, tokens[position], end, score, error=error)
    if message.end != END_NONE and thread.end is None:
        thread.push(thread.next_position, None, message.end, error=error)
    return thread


def error_kind(name: str) -> ErrorKind:
    """The kind in `KIND: detail`; INTERNAL where it is none."""
    return ErrorKind(name) if name in ErrorKind.__members__ else ErrorKind.INTERNAL
