"""The options of `generate` and `chat`, and the message that they make."""

import os
from collections.abc import Mapping, Sequence
from typing import Final, TypedDict

import msgspec
from llmproto import wire
from llmproto.errors import invalid
from llmproto.generation import ChatMessage, Generate, Sampling
from llmproto.kinds import KIND_OF

SEED_BITS: Final = 48
"""Room below 2^53 for seed + index of the choice."""

Messages = Sequence[ChatMessage | Mapping[str, str]]
"""The turns of a chat: `{"role": "user", "content": "..."}`, or ChatMessage."""


class Options(TypedDict, total=False):
    """How to generate. All are optional; ranges stand in llmproto.generation (Generate and
    Sampling)."""

    model: str | None
    """Name in the model table; absent: the system's default."""
    max_tokens: int | None
    """Most tokens to generate; absent: until the context is full.  0: score the prompt only."""
    temperature: float
    """1: the model's own distribution (the default).  0: the most likely token."""
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    """Same seed, same choice among same logits.  Absent: drawn at random."""
    stop: str | Sequence[str]
    """The output ends before the first of these."""
    n: int
    """Independent continuations; choice i samples with seed + i."""
    logprobs: int | None
    """Report the log-probability of each token, and of so many alternatives; gives token ids
    too."""
    prompt_logprobs: bool
    """Those of the prompt too."""
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    ignore_eos: bool
    stop_tokens: Sequence[int]
    """Token ids that end the output, beside the model's own."""
    priority: int
    service_class: int
    """0 interactive, 1 normal (the default), 2 batch, 3 background."""
    resumable: bool
    """When nobody reads, the thread lingers for a while instead of being cancelled."""
    deadline_s: float | None
    """Everything must be there after so long."""
    wait: bool
    """Wait and try again where the system has no room (EXHAUSTED), instead of raising."""


def to_generate(
    options: Options,
    *,
    prompt: str | None = None,
    tokens: Sequence[int] | None = None,
    messages: Messages | None = None,
) -> Generate:
    """The message for these options, under a new key; RemoteError(INVALID) where a value is out of
    range."""
    if (prompt is not None) + (tokens is not None) + (messages is not None) != 1:
        raise invalid("give exactly one of a prompt, token ids and messages")
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = ", ".join(sorted(Options.__annotations__))
        raise invalid(f"unknown option {unknown[0]!r}: the options are {known}")
    seed = options.get("seed")
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "big") >> (64 - SEED_BITS)
    bias = options.get("logit_bias", {})
    stop = options.get("stop", ())
    sampling = Sampling(
        temperature=options.get("temperature", 1.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        min_p=options.get("min_p", 0.0),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        presence_penalty=options.get("presence_penalty", 0.0),
        frequency_penalty=options.get("frequency_penalty", 0.0),
        bias_tokens=list(bias.keys()),
        bias_values=list(bias.values()),
        seed=seed,
        logprobs=options.get("logprobs"),
        prompt_logprobs=options.get("prompt_logprobs", False),
        ignore_eos=options.get("ignore_eos", False),
        stop_tokens=list(options.get("stop_tokens", ())),
    )
    return checked(
        Generate(
            key=os.urandom(16),
            model=options.get("model"),
            prompt=prompt,
            prompt_tokens=None if tokens is None else list(tokens),
            messages=None if messages is None else to_messages(messages),
            output_tokens_max=options.get("max_tokens"),
            sampling=sampling,
            stops=[stop] if isinstance(stop, str) else list(stop),
            choices=options.get("n", 1),
            priority=options.get("priority", 0),
            service_class=options.get("service_class", 1),
            resumable=options.get("resumable", False),
        )
    )


def to_messages(messages: Messages) -> list[ChatMessage]:
    """The turns as they go on the wire."""
    try:
        return [
            turn
            if isinstance(turn, ChatMessage)
            else ChatMessage(role=turn["role"], content=turn["content"])
            for turn in messages
        ]
    except (KeyError, TypeError):
        raise invalid("a chat message has the texts `role` and `content`") from None


def checked(message: Generate) -> Generate:
    """The message as its receiver will see it: types and ranges are checked by the schema
    itself."""
    try:
        body = wire.encode_body(message)
    except (TypeError, OverflowError, UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise invalid(f"Generate: {error}") from None
    decoded = wire.decode_body(KIND_OF[Generate], body)
    assert isinstance(decoded, Generate)
    return decoded
