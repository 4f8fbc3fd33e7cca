"""One loaded tokenizer: text to ids, and what each id adds to a text.

The ids are those that `transformers.AutoTokenizer` gives for the same folder: its post-processor is
the one in tokenizer.json (`add_bos_token` and `add_eos_token` count only where there is no
tokenizer.json, which is refused here).
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import tokenizers
from llmproto import limits
from llmproto.errors import invalid

from llmservices.texts.added_tokens import add_tokens
from llmservices.texts.templates import ChatTemplate
from llmservices.texts.tokenizer_config import TokenizerConfig, read_tokenizer_config
from llmservices.tokenizer import pieces
from llmservices.tokenizer.folder import (
    TOKENIZER,
    TOKENIZER_FILES,
    ModelFolder,
    read_small,
    tokenizer_digest,
)

VOCABULARIES_MAX: Final = 8  # a large one takes some 100 MB
LONG_CHARACTERS: Final = 2048
"""From here on a text is encoded without offsets and without the interpreter's lock: a third of the
time, and other threads go on."""


class Encoded(NamedTuple):
    """One input of an encoder."""

    tokens: list[int]
    pair_at: int
    """How many of them come before the second text; all, where there is none."""
    cut: bool = False


class Vocabulary:
    """Immutable once loaded; safe to share between threads of any number."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, config: TokenizerConfig, *, digest: bytes
    ) -> None:
        add_tokens(tokenizer, config)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.digest = digest
        self.chat_template = None
        if config.chat_template is not None:
            self.chat_template = ChatTemplate(config.chat_template, config.named)
        self.template_names = config.template_names
        self._tokenizer = tokenizer
        self._cutting: dict[int, tokenizers.Tokenizer] = {}
        """By length: tokenizers that cut."""
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        self._contents = _contents(tokenizer)
        self._visible = [None if content in special else content for content in self._contents]
        # The state of a decoder is its JSON: the only public way to see what kind it is.
        state = b"null" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        self.pieces = pieces.pieces_of(state, self._visible)

    @property
    def tokens(self) -> int:
        """One more than the highest id."""
        return len(self._contents)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the special tokens that the tokenizer puts around one."""
        return self._ids(text, add_special_tokens=True)

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a rendered chat: its template has written the special tokens already."""
        return self._ids(text, add_special_tokens=False)

    def encode_inputs(
        self, texts: Sequence[str], pairs: Sequence[str] | None, *, longest: int | None
    ) -> list[Encoded]:
        """Inputs of an encoder, alone or with a second text each, the special tokens included;
        cut to `longest` tokens where that is given (of a pair, from its longer text)."""
        tokenizer = self._tokenizer if longest is None else self._cutter(longest)
        inputs: list[str] | list[tuple[str, str]] = list(texts)
        if pairs is not None:
            inputs = list(zip(texts, pairs, strict=True))
        try:
            found = tokenizer.encode_batch_fast(inputs, add_special_tokens=True)
        except TypeError as error:  # how the library answers a string that has no UTF-8
            raise invalid("a text is not Unicode; send no lone surrogates") from error
        return [
            Encoded(
                list(each.ids),
                len(each.ids) if pairs is None else _first_of_second(each.type_ids),
                bool(each.overflowing),
            )
            for each in found
        ]

    def _cutter(self, longest: int) -> tokenizers.Tokenizer:
        """A copy, as cutting is a tokenizer's own state."""
        found = self._cutting.get(longest)
        if found is None:
            found = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            found.enable_truncation(longest, strategy="longest_first")
            self._cutting[longest] = found
        return found

    def decode(self, tokens: list[int]) -> str:
        """The text of these ids alone, without the hidden ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def is_visible(self, token: int) -> bool:
        """Whether the id adds to a text at all."""
        return token < len(self._visible) and self._visible[token] is not None

    def content(self, token: int) -> str | None:
        """How the tokenizer itself spells the id; None for a hole."""
        return self._contents[token]

    def token_text(self, token: int) -> str:
        """How one token is shown by itself: hidden ones by name, parts of characters as U+FFFD."""
        if token >= len(self._contents) or (content := self._contents[token]) is None:
            return ""
        if self._visible[token] is None:
            return content
        if self.pieces is None:
            return self.decode([token])
        text = self.pieces.texts[token]
        return self.pieces.raws[token].decode(errors="replace") if text is None else text

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        tokenizer = self._tokenizer
        try:
            if len(text) >= LONG_CHARACTERS:
                (long,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return list(long.ids)
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # how the library answers a string that has no UTF-8
            raise invalid("the text is not Unicode; send no lone surrogates") from error


class Vocabularies:
    """Loaded vocabularies by digest, the least recently used forgotten first.

    Invariant: at most `count_max`.
    """

    def __init__(self, count_max: int = VOCABULARIES_MAX) -> None:
        self._count_max = count_max
        self._loaded: OrderedDict[bytes, Vocabulary] = OrderedDict()

    def get(self, folder: ModelFolder) -> Vocabulary:
        """The folder's vocabulary, loaded if it is not there."""
        vocabulary = self._loaded.get(folder.tokenizer_digest)
        if vocabulary is None:
            vocabulary = load_vocabulary(Path(folder.path))
        self.put(folder.tokenizer_digest, vocabulary)
        return vocabulary

    def put(self, digest: bytes, vocabulary: Vocabulary) -> None:
        """This one is loaded, and the latest used."""
        self._loaded.pop(digest, None)
        self._loaded[digest] = vocabulary
        if len(self._loaded) > self._count_max:
            self._loaded.popitem(last=False)

    def find(self, digest: bytes) -> Vocabulary | None:
        """The vocabulary with this tokenizer digest, if it is loaded."""
        return self._loaded.get(digest)

    def __len__(self) -> int:
        return len(self._loaded)

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._loaded) <= self._count_max


def _first_of_second(types: Sequence[int]) -> int:
    return next((at for at, kind in enumerate(types) if kind), len(types))


def load_vocabulary(folder: Path) -> Vocabulary:
    """Read a folder's tokenizer files; the rest of the folder need not be there."""
    small = read_small(folder, TOKENIZER_FILES)
    if TOKENIZER not in small:
        raise invalid(
            f"{folder / TOKENIZER}: is missing; fetch it, or convert the model's older "
            "tokenizer once"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(small[TOKENIZER])
    except Exception as error:  # the library raises nothing narrower
        raise invalid(f"{folder / TOKENIZER}: is broken ({error}); fetch it again") from error
    config = read_tokenizer_config(folder, small)
    return Vocabulary(tokenizer, config, digest=tokenizer_digest(small))


def _contents(tokenizer: tokenizers.Tokenizer) -> list[str | None]:
    """The token of each id; ids without one exist where a vocabulary has holes."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest > limits.TOKEN_ID_MAX:
        raise invalid(
            f"{TOKENIZER} has the token id {highest}; at most {limits.TOKEN_ID_MAX} is supported"
        )
    return [tokenizer.id_to_token(id_) for id_ in range(highest + 1)]
