"""A client's Encode, checked and turned into what the kernel is asked to spawn."""

import hashlib
from collections.abc import Sequence

import msgspec
from llmproto import limits
from llmproto.encoding import Encode
from llmproto.errors import invalid
from llmproto.models import ModelEntry

from llmservices.tokenizer.folder import ModelFolder
from llmservices.tokenizer.vocabulary import Encoded, Vocabulary


class PreparedInputs(msgspec.Struct, frozen=True):
    """What Encode means for one model."""

    tokens: list[int]
    """Of all inputs, one behind another."""
    lengths: list[int]
    pair_at: list[int]
    """Tokens of each input before its second text; empty: there are no pairs."""
    truncated: list[int]
    """Which inputs were cut."""
    digest: bytes
    """16 bytes: the request's content without its key."""


def check_model(encode: Encode, entry: ModelEntry) -> None:
    """INVALID unless the model does what is asked."""
    does = "embed" if entry.task == "embed" else "classify"
    if entry.task == "generate" or does != encode.task:
        named = "" if encode.model is not None else ", the default, as the request names none"
        raise invalid(
            f"{encode.task!r} is asked of {entry.name!r}{named}; its task is {entry.task!r}: name "
            "a model with the right one (`llmos models` shows them)"
        )


def prepare_inputs(encode: Encode, vocabulary: Vocabulary, folder: ModelFolder) -> PreparedInputs:
    """Check and encode; INVALID with the numbers that failed."""
    if (encode.texts is None) == (encode.tokens is None):
        raise invalid("give exactly one of texts and tokens")
    longest = min(folder.context_tokens, limits.CONTEXT_TOKENS_MAX)
    if encode.tokens is not None:
        if encode.pairs is not None:
            raise invalid("pairs go with texts: tokens are taken as they are")
        inputs = [Encoded(tokens, len(tokens)) for tokens in encode.tokens]
        if encode.truncate:
            inputs = [
                Encoded(e.tokens[:longest], e.pair_at, len(e.tokens) > longest) for e in inputs
            ]
        _check_ids(inputs, folder)
    else:
        assert encode.texts is not None
        texts, pairs = encode.texts, encode.pairs
        if pairs is not None and len(pairs) != len(texts):
            raise invalid(f"{len(texts)} texts and {len(pairs)} pairs: give one for each")
        inputs = vocabulary.encode_inputs(
            texts, pairs, longest=longest if encode.truncate else None
        )
    lengths = [len(each.tokens) for each in inputs]
    _check_lengths(lengths, longest, folder)
    return PreparedInputs(
        tokens=[token for each in inputs for token in each.tokens],
        lengths=lengths,
        pair_at=[each.pair_at for each in inputs] if encode.pairs is not None else [],
        truncated=[number for number, each in enumerate(inputs) if each.cut],
        digest=_digest(encode),
    )


def text_bytes(encode: Encode) -> int:
    """About how much is to be encoded."""
    return sum(map(len, encode.texts or ())) + sum(map(len, encode.pairs or ()))


def _check_lengths(lengths: Sequence[int], longest: int, folder: ModelFolder) -> None:
    for number, tokens in enumerate(lengths):
        if not tokens:
            raise invalid(f"input {number} is empty: it has no tokens")
        if tokens > longest:
            raise invalid(
                f"input {number} has {tokens} tokens, the model takes {longest}: shorten it, or "
                "allow truncation"
            )
    if sum(lengths) > limits.CONTEXT_TOKENS_MAX:
        raise invalid(
            f"{len(lengths)} inputs have {sum(lengths)} tokens together; one call takes "
            f"{limits.CONTEXT_TOKENS_MAX}: send fewer inputs at once"
        )


def _check_ids(inputs: Sequence[Encoded], folder: ModelFolder) -> None:
    for number, each in enumerate(inputs):
        highest = max(each.tokens, default=0)
        if highest >= folder.vocab_tokens:
            raise invalid(
                f"input {number}: token id {highest} is not below the model's vocabulary of "
                f"{folder.vocab_tokens}"
            )


def _digest(encode: Encode) -> bytes:
    """Equal for equal requests, whatever their keys."""
    content = msgspec.structs.replace(encode, key=bytes(16))
    return hashlib.blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()
