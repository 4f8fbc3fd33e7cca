"""What generating gives to its caller."""

import msgspec
from llmproto.generation import TextScore


class Usage(msgspec.Struct, frozen=True):
    """What was computed, in tokens."""

    prompt_tokens: int
    output_tokens: int
    """Of all choices together."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """The next text of one choice."""

    text: str
    """May be empty: a token need not show anything yet."""
    index: int = 0
    """Which choice."""
    finish_reason: str | None = None
    """`stop`, `length` or `cancel` with the last piece of a choice."""
    scores: list[TextScore] | None = None
    """Log-probabilities, where they were asked for."""
    prompt_scores: list[TextScore] | None = None
    """Those of the prompt, with the first piece that has any."""
    stream: bytes = b""
    """Names the stream, for `resume`."""
    offset: int = 0
    """UTF-8 bytes of the stream up to and including this piece, for `resume`."""
    tokens: int = 0
    """Generated tokens of this choice up to and including this piece."""
    stop: str | None = None
    """The stop string that ended it, where one did."""
    usage: Usage | None = None
    """Of this choice, with its last piece."""


class Choice(msgspec.Struct, frozen=True):
    """One finished continuation."""

    text: str
    index: int
    finish_reason: str
    stop: str | None
    tokens: list[int] | None
    """Ids of the generated tokens, where logprobs were asked for (0 suffices)."""
    scores: list[TextScore] | None
    prompt_scores: list[TextScore] | None
    output_tokens: int


class Completion(msgspec.Struct, frozen=True):
    """Everything that one request came to; the fields of text are those of the first choice."""

    text: str
    finish_reason: str
    tokens: list[int] | None
    scores: list[TextScore] | None
    usage: Usage
    choices: list[Choice]
    model: str
    """The resolved name."""


class Gathering:
    """The pieces of one choice, put together."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._scores: list[TextScore] | None = None
        self._prompt_scores: list[TextScore] | None = None
        self._last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """The next one."""
        self._texts.append(piece.text)
        if piece.scores is not None:
            self._scores = [*(self._scores or ()), *piece.scores]
        if piece.prompt_scores is not None:
            self._prompt_scores = piece.prompt_scores
        self._last = piece

    def choice(self) -> Choice:
        """All of it, once the last piece came."""
        last = self._last
        assert last is not None and last.finish_reason is not None and last.usage is not None
        return Choice(
            text="".join(self._texts),
            index=self._index,
            finish_reason=last.finish_reason,
            stop=last.stop,
            tokens=None if self._scores is None else [score.token for score in self._scores],
            scores=self._scores,
            prompt_scores=self._prompt_scores,
            output_tokens=last.usage.output_tokens,
        )

    @property
    def prompt_tokens(self) -> int:
        """As the last piece tells."""
        return (
            0 if self._last is None or self._last.usage is None else self._last.usage.prompt_tokens
        )


def completion(gatherings: list[Gathering], model: str) -> Completion:
    """The choices of one request as its answer."""
    choices = [gathering.choice() for gathering in gatherings]
    first = choices[0]
    return Completion(
        text=first.text,
        finish_reason=first.finish_reason,
        tokens=first.tokens,
        scores=first.scores,
        usage=Usage(
            prompt_tokens=gatherings[0].prompt_tokens,
            output_tokens=sum(choice.output_tokens for choice in choices),
        ),
        choices=choices,
        model=model,
    )
