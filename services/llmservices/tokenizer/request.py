"""A client's request, checked and turned into what the kernel is asked to spawn."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import msgspec
from llmproto import limits
from llmproto.errors import invalid
from llmproto.generation import ChatMessage, Generate, Sampling

from llmservices.tokenizer.folder import ModelFolder
from llmservices.tokenizer.vocabulary import Vocabulary

SEEDS: Final = 1 << 53
STOP_TOKENS_MAX: Final = 64  # what `Sampling.stop_tokens` takes


class Prepared(msgspec.Struct, frozen=True):
    """What Generate means for one model."""

    tokens: list[int]
    """Of the prompt; at least one."""
    output_tokens_max: int
    sampling: Sampling
    """Of choice 0; see `sampling_of`."""
    hidden: list[int]
    """For SinkState."""
    digest: bytes
    """16 bytes: the request's content without its key."""
    prompt_texts: list[str]
    """The text of each prompt token, where the request gave text and asked for the prompt's scores.
    """

    def sampling_of(self, choice: int) -> Sampling:
        """Choice i samples with seed + i."""
        return msgspec.structs.replace(self.sampling, seed=(self.sampling.seed + choice) % SEEDS)


def prepare(
    generate: Generate, vocabulary: Vocabulary, folder: ModelFolder, *, now: datetime
) -> Prepared:
    """Check and encode; INVALID with the numbers that failed.  `now` is for templates that print
    the date.
    """
    sampling = generate.sampling
    _check_stops(generate.stops)
    _check_bias(sampling, folder)
    tokens = _prompt_tokens(generate, vocabulary, folder, now)
    texts = (
        generate.prompt_tokens is None
        and sampling.prompt_logprobs
        and sampling.logprobs is not None
    )
    return Prepared(
        tokens=tokens,
        output_tokens_max=_output_tokens_max(generate, len(tokens), context_tokens(folder)),
        sampling=_with_ends(sampling, folder),
        hidden=sorted({*folder.eos_tokens, *sampling.stop_tokens}),
        digest=content_digest(generate),
        prompt_texts=[vocabulary.token_text(token) for token in tokens] if texts else [],
    )


def encode_prompt(
    vocabulary: Vocabulary,
    folder: ModelFolder,
    *,
    prompt: str | None,
    messages: Sequence[ChatMessage] | None,
    now: datetime,
) -> list[int]:
    """The ids of a text or of a chat, whichever is there.  For TokenizeAsk too."""
    if (prompt is None) == (messages is None):
        raise invalid("give exactly one of prompt and messages")
    if messages is not None:
        return vocabulary.encode_rendered(_rendered(messages, vocabulary, folder, now))
    assert prompt is not None
    _check_text_bytes(len(prompt.encode(errors="surrogatepass")))
    return vocabulary.encode(prompt)


def content_digest(generate: Generate) -> bytes:
    """Equal for equal requests, whatever their keys: BLAKE2b of the MessagePack with the key
    zeroed.
    """
    content = msgspec.structs.replace(generate, key=bytes(16))
    return hashlib.blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()


def context_tokens(folder: ModelFolder) -> int:
    """The model's context, or what a message carries, whichever is less."""
    return min(folder.context_tokens, limits.CONTEXT_TOKENS_MAX)


def _prompt_tokens(
    generate: Generate, vocabulary: Vocabulary, folder: ModelFolder, now: datetime
) -> list[int]:
    given = [generate.prompt, generate.prompt_tokens, generate.messages]
    there = sum(value is not None for value in given)
    if there != 1:
        raise invalid(f"give exactly one of prompt, prompt_tokens and messages; {there} were given")
    tokens = generate.prompt_tokens
    if tokens is None:
        tokens = encode_prompt(
            vocabulary, folder, prompt=generate.prompt, messages=generate.messages, now=now
        )
    if not tokens:
        raise invalid("the prompt is empty: it has no tokens; send at least one")
    _check_ids("the prompt", tokens, folder)
    return tokens


def _rendered(
    messages: Sequence[ChatMessage], vocabulary: Vocabulary, folder: ModelFolder, now: datetime
) -> str:
    if not messages:
        raise invalid("the chat is empty; send at least one message")
    _check_text_bytes(
        sum(len(message.content.encode(errors="surrogatepass")) for message in messages)
    )
    if vocabulary.chat_template is not None:
        return vocabulary.chat_template.render(messages, now=now)
    if vocabulary.template_names:
        named = ", ".join(vocabulary.template_names)
        raise invalid(
            f"{folder.path}: its chat templates are {named}, none of them `default`; "
            "send prompt instead"
        )
    raise invalid(
        f"{folder.path}: the model has no chat template; send prompt instead, or use a chat model"
    )


def _output_tokens_max(generate: Generate, prompt_tokens: int, context: int) -> int:
    """How many tokens may be generated; never cut in silence."""
    room = context - prompt_tokens
    asked = generate.output_tokens_max
    if room < 0:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens, the model's context {context}; "
            "shorten the prompt"
        )
    if asked is None:
        if not room:
            raise invalid(
                f"the prompt's {prompt_tokens} tokens fill the context of {context}; shorten "
                "the prompt"
            )
        return room
    if asked > room:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens and {asked} more are asked for, together "
            f"{prompt_tokens + asked}; the model's context is {context}; ask for at most {room}"
        )
    return asked


def _with_ends(sampling: Sampling, folder: ModelFolder) -> Sampling:
    """The model's own ends among the stop tokens, unless it is to go on after them."""
    _check_ids("stop_tokens", sampling.stop_tokens, folder)
    if sampling.ignore_eos:
        return sampling
    stops = list(dict.fromkeys([*sampling.stop_tokens, *folder.eos_tokens]))
    if len(stops) > STOP_TOKENS_MAX:
        raise invalid(
            f"{len(stops)} stop tokens with the model's own, more than "
            f"{STOP_TOKENS_MAX}; send fewer"
        )
    return msgspec.structs.replace(sampling, stop_tokens=stops)


def _check_stops(stops: Sequence[str]) -> None:
    for stop in stops:
        stop_bytes = len(stop.encode(errors="surrogatepass"))
        if not 1 <= stop_bytes <= limits.STOP_BYTES_MAX:
            raise invalid(
                f"a stop string has {stop_bytes} bytes; it must have 1 to {limits.STOP_BYTES_MAX}"
            )
    if len(stops) > limits.STOPS_MAX:
        raise invalid(f"{len(stops)} stop strings, more than {limits.STOPS_MAX}")


def _check_bias(sampling: Sampling, folder: ModelFolder) -> None:
    biases, values = len(sampling.bias_tokens), len(sampling.bias_values)
    if biases != values:
        raise invalid(
            f"{biases} bias_tokens but {values} bias_values; give one value for each token"
        )
    _check_ids("bias_tokens", sampling.bias_tokens, folder)


def _check_ids(where: str, tokens: Sequence[int], folder: ModelFolder) -> None:
    highest = max(tokens, default=0)
    if highest >= folder.vocab_tokens:
        raise invalid(
            f"{where}: token id {highest} is not below the model's vocabulary of "
            f"{folder.vocab_tokens}"
        )


def _check_text_bytes(text_bytes: int) -> None:
    if text_bytes > limits.PROMPT_BYTES_MAX:
        raise invalid(
            f"the text has {text_bytes} bytes, more than {limits.PROMPT_BYTES_MAX}; shorten it"
        )
