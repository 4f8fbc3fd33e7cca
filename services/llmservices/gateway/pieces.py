"""One choice of an answer: the system's rows in, pieces of text with their scores out, and the
chunks and answers that are made of them.

Pure. Offsets are UTF-8 bytes on the bus and characters in HTTP.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from libllm.events import StreamRow
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import StreamEnd, TextScore

from llmservices.gateway.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Finish,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from llmservices.gateway.errors import cancelled, of_remote

LOGPROB_MIN: Final = -9999.0
"""For what is impossible: JSON has no infinity, and this is what OpenAI says."""
PART: Final = "\ufffd"
"""A token whose text holds this is a part of a character."""


class Head(msgspec.Struct, frozen=True):
    """What all chunks of one answer say."""

    id: str
    created: int
    model: str


class Piece(msgspec.Struct, frozen=True):
    """What one row adds to a choice."""

    index: int
    text: str
    scores: list[TextScore]
    offsets: list[int]
    """Of each scored token, in characters of the choice's text."""
    finish: Finish | None = None
    end: StreamEnd | None = None


class Characters:
    """Byte offsets to character offsets, in a text that arrives in pieces.

    Offsets never fall from one question to the next, so that what lies before one is forgotten.
    """

    def __init__(self, *, offset: int = 0, characters: int = 0) -> None:
        self._tail = b""
        """Text that lies at or behind `_offset`."""
        self._offset = offset
        self._characters = characters

    def add(self, text: str) -> None:
        """The text goes on."""
        self._tail += text.encode()

    def at(self, offset: int) -> int:
        """The character at this byte, or that this byte is a part of."""
        behind = max(offset - self._offset, 0)
        before = self._tail[:behind].decode(errors="ignore")
        passed = len(before.encode())
        self._tail = self._tail[passed:]
        self._offset += passed
        self._characters += len(before)
        return self._characters

    @property
    def end(self) -> int:
        """Characters so far."""
        return self._characters + len(self._tail.decode(errors="ignore"))


class Choice:
    """One choice, from its stream's rows.

    `echo`: its text begins with the prompt, which is this text or that of the prompt's scores.
    """

    def __init__(
        self,
        index: int,
        *,
        echo: str | None = None,
        echoes_scores: bool = False,
        shows_logprobs: bool = False,
        offset: int = 0,
        characters: int = 0,
    ) -> None:
        """`offset` and `characters` are what a client that resumes has already."""
        self.index = index
        self._echo = echo
        self._echoes_scores = echoes_scores
        self._shows_logprobs = shows_logprobs
        self._characters = Characters(offset=offset, characters=characters)

    def take(self, row: StreamRow) -> Piece:
        """What this row adds; HttpError where it says that the stream broke off."""
        text, scores, offsets = self._prefix(row)
        finish = None if row.end is None else _finish(row.end)
        if self._shows_logprobs:
            self._characters.add(row.text)
            scores.extend(row.scores or ())
            offsets.extend(self._characters.at(score.offset) for score in row.scores or ())
        return Piece(self.index, text + row.text, scores, offsets, finish, row.end)

    @property
    def characters(self) -> int:
        """Of the text so far; 0 where nobody asks for offsets."""
        return self._characters.end if self._shows_logprobs else 0

    def _prefix(self, row: StreamRow) -> tuple[str, list[TextScore], list[int]]:
        """The prompt, with the first row."""
        prompt = row.prompt_scores
        if self._echo is None and not (self._echoes_scores and prompt is not None):
            return "", [], []
        text = self._echo
        if text is None:
            text = "".join(score.text for score in prompt or ())
        scores: list[TextScore] = []
        offsets: list[int] = []
        if self._shows_logprobs and prompt:
            within = Characters()
            within.add(text)
            scores = list(prompt)
            offsets = [within.at(score.offset) for score in prompt]
        self._echo = None
        self._echoes_scores = False
        self._characters = Characters(characters=len(text))
        return text, scores, offsets


def _finish(end: StreamEnd) -> Finish:
    if end.reason == "stop":
        return "stop"
    if end.reason == "length":
        return "length"
    if end.reason == "cancel":
        raise cancelled(end.detail)
    detail = end.detail or "the generation failed"
    raise of_remote(RemoteError(end.error or ErrorKind.INTERNAL, detail))


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    last = pieces[-1]
    return Piece(
        last.index,
        "".join(piece.text for piece in pieces),
        [score for piece in pieces for score in piece.scores],
        [offset for piece in pieces for offset in piece.offsets],
        last.finish,
        last.end,
    )


def usage(ends: Iterable[StreamEnd], prompt_tokens: int) -> Usage:
    """Of choices that ended; `prompt_tokens` are those of all prompts."""
    output = sum(end.output_tokens for end in ends)
    return Usage(prompt_tokens, output, prompt_tokens + output)


# --- /v1/completions ------------------------------------------------------------------------------


def text_completion(
    head: Head, choices: Sequence[Piece], told: Usage, *, shows_logprobs: bool
) -> TextCompletion:
    """The whole answer."""
    return TextCompletion(
        head.id,
        head.created,
        head.model,
        [
            TextChoice(
                piece.index,
                piece.text,
                text_logprobs(piece) if shows_logprobs else None,
                piece.finish,
            )
            for piece in choices
        ],
        usage=told,
    )


def text_chunk(head: Head, piece: Piece) -> TextCompletion:
    """What one piece adds, its end aside."""
    logprobs = text_logprobs(piece) if piece.scores else None
    choice = TextChoice(piece.index, piece.text, logprobs)
    return TextCompletion(head.id, head.created, head.model, [choice])


def text_finish(head: Head, piece: Piece) -> TextCompletion:
    """That a choice ended, and why."""
    choice = TextChoice(piece.index, "", None, piece.finish)
    return TextCompletion(head.id, head.created, head.model, [choice])


def text_logprobs(piece: Piece) -> TextLogprobs:
    """The legacy columns."""
    return TextLogprobs(
        tokens=[score.text for score in piece.scores],
        token_logprobs=[
            None if score.logprob is None else _finite(score.logprob) for score in piece.scores
        ],
        top_logprobs=[_top(score) for score in piece.scores],
        text_offset=piece.offsets,
    )


def _top(score: TextScore) -> dict[str, float] | None:
    """Alternatives by their text, the token itself among them; of equal texts the likeliest."""
    if score.logprob is None:
        return None
    top: dict[str, float] = {}
    for text, logprob in zip(score.top_texts, score.top_logprobs):
        top[text] = max(_finite(logprob), top.get(text, LOGPROB_MIN))
    top[score.text] = max(_finite(score.logprob), top.get(score.text, LOGPROB_MIN))
    return top


# --- /v1/chat/completions -------------------------------------------------------------------------


def chat_completion(
    head: Head, choices: Sequence[Piece], told: Usage, *, shows_logprobs: bool
) -> ChatCompletion:
    """The whole answer."""
    return ChatCompletion(
        head.id,
        head.created,
        head.model,
        [
            ChatChoice(
                piece.index,
                ChatAnswer(piece.text),
                piece.finish or "stop",
                chat_logprobs(piece) if shows_logprobs else None,
            )
            for piece in choices
        ],
        usage=told,
    )


def chat_role(head: Head, index: int) -> ChatChunk:
    """The first chunk of a choice."""
    return _chat_chunk(head, ChatChunkChoice(index, ChatDelta(role="assistant", content="")))


def chat_chunk(head: Head, piece: Piece) -> ChatChunk:
    """What one piece adds, its end aside."""
    logprobs = chat_logprobs(piece) if piece.scores else None
    return _chat_chunk(head, ChatChunkChoice(piece.index, ChatDelta(content=piece.text), logprobs))


def chat_finish(head: Head, piece: Piece) -> ChatChunk:
    """That a choice ended, and why."""
    return _chat_chunk(head, ChatChunkChoice(piece.index, ChatDelta(), None, piece.finish))


def _chat_chunk(head: Head, choice: ChatChunkChoice) -> ChatChunk:
    return ChatChunk(head.id, head.created, head.model, [choice])


def chat_logprobs(piece: Piece) -> ChatLogprobs:
    """One entry a token."""
    return ChatLogprobs(
        [
            TokenLogprob(
                score.text,
                _finite(score.logprob),
                _bytes(score.text),
                [
                    TopLogprob(text, _finite(logprob), _bytes(text))
                    for text, logprob in zip(score.top_texts, score.top_logprobs)
                ],
            )
            for score in piece.scores
        ]
    )


def _bytes(text: str) -> list[int] | None:
    return None if PART in text else list(text.encode())


def _finite(logprob: float | None) -> float:
    return LOGPROB_MIN if logprob is None else max(logprob, LOGPROB_MIN)
