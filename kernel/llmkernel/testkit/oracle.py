"""What a model of the simulated world says: the next token is a checksum of the whole context.

One wrong, missing or repeated token anywhere in a context changes every token after it, so that an
undisturbed twin is enough to notice it.  Texts hold letters of one and two bytes, and nothing.
"""

import zlib
from typing import Final, NamedTuple

from llmproto import wire
from llmproto.threads import END_LENGTH, END_STOP

VOCABULARY: Final = 1000
END_EVERY: Final = 97
"""Tokens that end a sequence: one in so many."""
POISON: Final = 666
"""A prompt that begins with it kills its executor at its third token."""
HANGS: Final = 667
"""A prompt that begins with it makes its executor hang there."""
PAIR: Final = 668
"""Two threads whose prompts begin with it kill their executor in company."""
BITTER: Final = 669
"""A request whose prompt begins with it kills the sink that reads it."""
POISON_TOKENS: Final = 2
"""Tokens that such a thread generates before."""


class Context:
    """The ids of a sequence, and the state from which the next one follows."""

    __slots__ = ("state", "tokens")

    def __init__(self, packed: bytes, seed: int) -> None:
        self.tokens = len(packed) // 4
        self.state = zlib.crc32(packed, seed)

    def next(self, salt: int = 0) -> int:
        """The next token; it is in the context from now on.  With another salt it is another one,
        as where the last bits of logits depend on the batch."""
        token = (self.state ^ self.state >> 15 ^ salt) % VOCABULARY
        self.push(token)
        return token

    def push(self, token: int) -> None:
        """Take a token that is known."""
        self.state = zlib.crc32(token.to_bytes(4, "little"), self.state)
        self.tokens += 1


def piece(token: int) -> str:
    """The text of a token."""
    if token % 11 == 0:
        return ""
    letter = chr(97 + token % 26)
    return letter + "é" if token % 7 == 0 else letter


class Twin(NamedTuple):
    """A stream as it is when nothing disturbs it."""

    text: str
    reason: str
    tokens: int


def undisturbed(prompt: list[int], *, seed: int, output_tokens_max: int, stop: str) -> Twin:
    """What must come of a request; `stop` is one letter, or nothing."""
    context = Context(wire.pack_tokens(prompt), seed)
    text = ""
    for number in range(1, output_tokens_max + 1):
        token = context.next()
        said = piece(token)
        if stop and stop in said:
            return Twin(text + said[: said.index(stop)], "stop", number)
        text += said
        end = end_of(token, number, output_tokens_max)
        if end:
            return Twin(text, "stop" if end == END_STOP else "length", number)
    return Twin("", "length", 0)


def end_of(token: int, output_tokens: int, output_tokens_max: int) -> int:
    """Why a sequence ends with this token, or 0."""
    if token % END_EVERY == 0:
        return END_STOP
    return END_LENGTH if output_tokens == output_tokens_max else 0
