"""Token ids to text, one at a time: never half a character, never a retraction, no second look at
the context.

The pieces and `finish()` together are what `decode(prompt + output)` adds to the text of the
prompt, hidden tokens left out.  One exception, without which nothing could be emitted before its
run ends: where bytes of a byte-fallback vocabulary are broken UTF-8, `decode` replaces the whole
run of byte tokens by U+FFFD; here the whole characters among them stay, and each other byte becomes
one U+FFFD.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Final, Protocol

from llmservices.tokenizer.pieces import REPLACEMENT, Pieces
from llmservices.tokenizer.vocabulary import Vocabulary

CHARACTER_BYTES_MAX: Final = 4
ESCAPED_BYTE: Final = re.compile("[\udc80-\udcff]")  # how `surrogateescape` spells one broken byte
WINDOW_TOKENS: Final = 8  # context that a decoder without a table sees on the left of a new token
HELD_TOKENS_MAX: Final = (
    8  # a character has at most four bytes; more tokens than this cannot complete one
)


class Detokenizer(Protocol):
    """The text of one output.  A function of prompt and tokens: grouping does not matter."""

    def push(self, token: int) -> str:
        """What this token adds, as far as it is certain."""

    def finish(self) -> str:
        """What was held back: an unfinished character, as U+FFFD."""


def open_detokenizer(vocabulary: Vocabulary, prompt: Sequence[int]) -> Detokenizer:
    """At the end of the prompt.  Reads only the prompt's last tokens and its first visible ones."""
    if vocabulary.pieces is None:
        return WindowDetokenizer(vocabulary, prompt)
    return TableDetokenizer(vocabulary.pieces, prompt)


class TableDetokenizer:
    """For vocabularies with a table.

    Invariant: `_pending` is what `utf_8_decode` leaves for later: at most three bytes.
    """

    __slots__ = ("_pending", "_per_byte", "_pushed", "_raws", "_strip_left", "_texts", "_tokens")

    def __init__(self, pieces: Pieces, prompt: Sequence[int]) -> None:
        self._texts = pieces.texts
        self._raws = pieces.raws
        self._tokens = len(pieces.texts)
        self._per_byte = pieces.per_byte
        self._strip_left = self._stripped_after(prompt, pieces.strip_left)
        self._pending = b""
        self._pushed = False
        self._decoded(self._tail(prompt))

    def push(self, token: int) -> str:
        """See Detokenizer."""
        text = self._texts[token] if token < self._tokens else ""
        if text == "":
            return ""
        if not self._pushed:
            self._begin(self._raws[token][:1] if text is None else b"")
        if text is None:
            text = self._decoded(self._pending + self._raws[token])
        elif self._pending:
            text = self._broken() + text
        if self._strip_left and text:
            text = self._stripped(text)
        return text

    def finish(self) -> str:
        """See Detokenizer.  What the prompt alone left unfinished belongs to the prompt."""
        return self._broken() if self._pushed else ""

    def _decoded(self, data: bytes, *, final: bool = False) -> str:
        """The whole characters of the data; the rest stays pending, unless nothing can follow."""
        errors = "surrogateescape" if self._per_byte else "replace"
        text, consumed = codecs.utf_8_decode(data, errors, final)
        self._pending = data[consumed:]
        return ESCAPED_BYTE.sub(REPLACEMENT, text) if self._per_byte else text

    def _begin(self, first: bytes) -> None:
        """Forget what the prompt left unfinished, unless the first byte goes on with it."""
        self._pushed = True
        try:
            goes_on = first and codecs.utf_8_decode(self._pending + first, "strict", False)
        except UnicodeDecodeError:
            goes_on = None
        if not goes_on:
            self._pending = b""

    def _broken(self) -> str:
        """Give up on the pending character (or on ED A0, which Python holds back as well)."""
        return self._decoded(self._pending, final=True)

    def _stripped(self, text: str) -> str:
        spaces = min(self._strip_left, len(text) - len(text.lstrip(" ")))
        self._strip_left = self._strip_left - spaces if spaces == len(text) else 0
        return text[spaces:]

    def _stripped_after(self, prompt: Sequence[int], strip_left: int) -> int:
        """How much the beginning may still lose behind this prompt: nothing once it shows anything
        else.
        """
        self._strip_left = strip_left
        for token in prompt:
            if not self._strip_left:
                break
            text = self._texts[token] if token < self._tokens else ""
            self._stripped(REPLACEMENT if text is None else text)
        return self._strip_left

    def _tail(self, prompt: Sequence[int]) -> bytes:
        """The last bytes that are not whole characters; enough of them to find where a character
        begins.
        """
        tail = b""
        for token in reversed(prompt):
            text = self._texts[token] if token < self._tokens else ""
            if text is None:
                tail = self._raws[token] + tail
            if text or len(tail) >= CHARACTER_BYTES_MAX:
                break
        return tail


class WindowDetokenizer:
    """For any other decoder: the difference that a token makes behind a few tokens of context.

    Invariant: `_shown` is the text of `_window[: -held]`, all of which was emitted.
    """

    __slots__ = ("_held", "_shown", "_vocabulary", "_window")

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window = list(reversed(list(self._last_visible(prompt))))
        self._shown = vocabulary.decode(self._window)
        self._held = 0

    def push(self, token: int) -> str:
        """See Detokenizer."""
        if not self._vocabulary.is_visible(token):
            return ""
        self._window.append(token)
        self._held += 1
        text = self._vocabulary.decode(self._window)
        if text.endswith(REPLACEMENT) and self._held < HELD_TOKENS_MAX:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """See Detokenizer."""
        return self._advance(self._vocabulary.decode(self._window)) if self._held else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._held = 0
        self._window = self._window[-WINDOW_TOKENS:]
        self._shown = self._vocabulary.decode(self._window)
        return new

    def _last_visible(self, prompt: Sequence[int]) -> Sequence[int]:
        last: list[int] = []
        for token in reversed(prompt):
            if len(last) == WINDOW_TOKENS:
                break
            if self._vocabulary.is_visible(token):
                last.append(token)
        return last
