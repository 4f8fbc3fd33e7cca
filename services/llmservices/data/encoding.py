"""From texts to token ids, many rows at once; no Python for each token.

The ids are those of the tokenizer's own `encode`.  A token is learned when any character of it
belongs to what is learned.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers
from blake3 import blake3
from llmproto.errors import invalid

from llmservices.data.rendering import Rendered, Span
from llmservices.texts.added_tokens import add_tokens
from llmservices.texts.templates import ChatTemplate
from llmservices.texts.tokenizer_config import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    read_tokenizer_config,
)

TOKENIZER: Final = "tokenizer.json"
FILES: Final = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE)
LONG_CHARACTERS: Final = 1 << 17
"""A longer plain text is encoded in pieces, on all cores, where that makes no difference."""

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Uint8s = npt.NDArray[np.uint8]


class Encoded(NamedTuple):
    """Rows of tokens, flat."""

    ids: Int32s
    lengths: Int64s
    learned: Uint8s | None
    """1 for each token that is to be predicted; None: all."""
    types: Uint8s | None


class Encoder:
    """One folder's tokenizer.  Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        contents = _contents(folder)
        self.digest = _digest(contents)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(contents[TOKENIZER])
        except Exception as error:  # the library raises nothing narrower
            raise invalid(f"{folder / TOKENIZER}: is broken ({error}); fetch it again") from None
        config = read_tokenizer_config(folder, contents)
        add_tokens(self._tokenizer, config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        source = config.chat_template
        self.template = None if source is None else ChatTemplate(source, config.named)
        self._before, self._after = _around(self._tokenizer)
        self.bos = self._id(config.named.get("bos_token"))
        self.end = self._id(config.named.get("eos_token"))
        self.unknown = self._id(config.named.get("unk_token"))
        if self.unknown == self.end:
            self.unknown = None  # some vocabularies know everything, and name another token here
        self._ends = self.end is not None and self.end not in self._after[-1:]
        self._in_pieces = _joins(self._tokenizer)

    def encode(self, rows: Sequence[Rendered]) -> Encoded:
        """The tokens of these rows."""
        first = rows[0]
        plain = len(rows) == 1 and first.spans is None and first.pair is None
        if plain and self._in_pieces and len(first.text) > LONG_CHARACTERS:
            return self._encode_long(first)
        special = first.special
        assert all(row.special == special for row in rows)  # rows of one format
        texts = [row.text if row.pair is None else (row.text, row.pair) for row in rows]
        masked = any(row.spans is not None for row in rows)
        if masked:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=special)
        else:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        ends = [(self.end,) if row.end and self._ends else () for row in rows]
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(rows))
        lengths += np.fromiter(map(len, ends), np.int64, len(rows))
        flat = itertools.chain.from_iterable(itertools.chain.from_iterable(zip(ids, ends)))
        return Encoded(
            np.fromiter(flat, np.int32, int(lengths.sum())),
            lengths,
            _learned(rows, encodings, lengths) if masked else None,
            _types(rows, encodings) if first.pair is not None else None,
        )

    def truncated(self, row: Rendered, tokens: int) -> Encoded:
        """The row cut to so many tokens: texts that are judged keep their special tokens, others
        their beginning."""
        if row.spans is None and not row.end and row.special:
            special = self._tokenizer.num_special_tokens_to_add(row.pair is not None)
            least = special + (1 if row.pair is None else 2)
            if tokens < least:
                raise invalid(
                    f"a context of {tokens} tokens has no room for a text: with the special tokens "
                    f"around it, it takes at least {least}"
                )
            self._tokenizer.enable_truncation(tokens)
            try:
                return self.encode([row])
            finally:
                self._tokenizer.no_truncation()
        whole = self.encode([row])
        cut = np.minimum(whole.lengths, tokens)
        learned = None if whole.learned is None else whole.learned[:tokens]
        types = None if whole.types is None else whole.types[:tokens]
        return Encoded(whole.ids[:tokens], cut, learned, types)

    def _encode_long(self, row: Rendered) -> Encoded:
        pieces = self._tokenizer.encode_batch_fast(
            cut_at_lines(row.text, LONG_CHARACTERS), add_special_tokens=False
        )
        parts = [np.array(piece.ids, np.int32) for piece in pieces]
        before, after = (self._before, self._after) if row.special else ([], [])
        end = [self.end] if row.end and self._ends else []
        ids = np.concatenate(
            [np.array(before, np.int32), *parts, np.array([*after, *end], np.int32)]
        )
        return Encoded(ids, np.array([len(ids)], np.int64), None, None)

    def _id(self, token: str | None) -> int | None:
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    @property
    def vocabulary(self) -> int:
        """Ids are below it."""
        highest: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return highest + 1

    @property
    def ends(self) -> bool:
        """Whether documents get an end token."""
        return self._ends


def cut_at_lines(text: str, characters: int) -> list[str]:
    """Pieces of about so many characters, each cut where a line that is not blank begins; a text
    without such a place stays whole."""
    pieces = []
    start = 0
    while len(text) - start > characters:
        cut = start + characters
        while True:
            cut = text.find("\n", cut) + 1
            if cut == 0 or cut >= len(text) or not text[cut].isspace():
                break
        if cut == 0 or cut >= len(text):
            break
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    return pieces


def _learned(rows: Sequence[Rendered], encodings: Sequence[Any], lengths: Int64s) -> Uint8s:
    """1 for tokens with a character in a span, and for end tokens."""
    learned = np.zeros(int(lengths.sum()), np.uint8)
    begin = 0
    for row, encoding, length in zip(rows, encodings, lengths.tolist(), strict=True):
        if row.spans is None:
            learned[begin : begin + length] = 1
        else:
            tokens = len(encoding)
            for span in row.spans:
                first, last = _tokens_of(encoding, span, len(row.text))
                learned[begin + first : begin + last] = 1
            learned[begin + tokens : begin + length] = 1
        begin += length
    return learned


def _tokens_of(encoding: Any, span: Span, characters: int) -> tuple[int, int]:
    """The tokens that hold the characters of a span; the tokenizer may have dropped some of them.

    Bounded by the characters of the text, which are asked for one by one only where they were
    dropped.
    """
    start, stop = span
    first = last = None
    for place in range(start, stop):
        first = encoding.char_to_token(place)
        if first is not None:
            break
    if first is None:
        return 0, 0
    for place in range(stop - 1, start - 1, -1):
        last = encoding.char_to_token(place)
        if last is not None:
            break
    assert last is not None
    # A character may be spelled by several tokens; what follows tells where the last of them is.
    for place in range(stop, characters):
        following = encoding.char_to_token(place)
        if following is not None:
            return first, max(int(following), int(last) + 1)
    offsets = encoding.offsets
    past = int(last) + 1
    while past < len(offsets) and offsets[past][0] < stop and offsets[past] != (0, 0):
        past += 1
    return first, past


def _types(rows: Sequence[Rendered], encodings: Sequence[Any]) -> Uint8s | None:
    """Token types, where the tokenizer tells the two texts of a pair apart."""
    flat = itertools.chain.from_iterable(encoding.type_ids for encoding in encodings)
    return np.fromiter(flat, np.uint8)


def _contents(folder: Path) -> dict[str, bytes]:
    contents = {}
    for name in FILES:
        try:
            contents[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise invalid(f"{folder / name}: cannot be read ({error.strerror})") from None
    if TOKENIZER not in contents:
        raise invalid(f"{folder / TOKENIZER}: is missing; name a folder with a tokenizer")
    return contents


def _digest(contents: dict[str, bytes]) -> str:
    hasher = blake3()
    for name, content in sorted(contents.items()):
        hasher.update(msgspec.msgpack.encode([name, len(content)]))
        hasher.update(content)
    return hasher.hexdigest()


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    inside = [place for place, special in enumerate(mask) if not special]
    if not inside:
        return list(encoding.ids), []
    return list(encoding.ids[: inside[0]]), list(encoding.ids[inside[-1] + 1 :])


def _joins(tokenizer: Any) -> bool:
    """Whether a text's tokens are those of its lines: so it is unless something is put before each
    text, as some tokenizers do with a space."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return all(
        ids(left + right) == ids(left) + ids(right)
        for left, right in (("a\n", "b"), ("a b.\n\n", "The c"), ("x \n", "<y"), ("1\n", "2"))
    )
