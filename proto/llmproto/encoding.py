"""Conversation 0x0b: encoders: texts in, vectors or scores out.

One thread is one call of several inputs.  The journal keeps that it was asked for and that it
ended; the vectors go through as raw bytes and are computed again where they were lost.
"""

from typing import Annotated

from msgspec import Meta

from llmproto import limits
from llmproto.base import Id16, Int53, Message, Name
from llmproto.generation import Thread, Token

Inputs = Annotated[list[str], Meta(min_length=1, max_length=limits.ENCODE_INPUTS_MAX)]


class Encode(Message, frozen=True):
    """Client -> `tokenizer`.  Answered by Encoded with one blob, or Failed.

    Exactly one of `texts` and `tokens` is present.
    """

    key: Id16
    """Request key, random; as with Generate."""
    model: Name | None = None
    texts: Inputs | None = None
    pairs: Inputs | None = None
    """Second texts, one for each of `texts` (premise and hypothesis, query and passage)."""
    tokens: (
        Annotated[
            list[Annotated[list[Token], Meta(min_length=1)]],
            Meta(min_length=1, max_length=limits.ENCODE_INPUTS_MAX),
        ]
        | None
    ) = None
    """Token ids as they are: nothing is added."""
    task: Annotated[str, Meta(pattern="^(embed|classify)$")] = "embed"
    """What is wanted; a model that cannot do it is INVALID."""
    truncate: bool = False
    """Cut inputs that are longer than the model's context; else they are INVALID, with both
    numbers."""
    service_class: Annotated[int, Meta(ge=0, le=3)] = 1
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0


class Encoded(Message, frozen=True):
    """`tokenizer` -> client, answers Encode.  The blob holds inputs x `width` float32, little
    endian, row by row: normalised embeddings as the folder's own pooling makes them, or logits."""

    model: Name
    width: Int53
    tokens: Annotated[list[Int53], Meta(max_length=limits.ENCODE_INPUTS_MAX)]
    """Of each input, special ones included."""
    truncated: list[Int53] = []
    """Which inputs were cut."""
    labels: list[str] = []
    """Of a classifier, one a column."""
    problem: Annotated[str, Meta(pattern="^(embedding|single_label|multi_label|regression)$")] = (
        "embedding"
    )
    """What the columns are: how logits become scores (softmax, sigmoid, or as they are)."""


class Vectors(Message, frozen=True):
    """Executor -> kernel, with one blob, when threads with `lengths` are computed; the kernel ends
    those threads and passes it to their sink, naming only those whose residency was current.
    Answered by Drop of all of them; until then the executor keeps what it computed.

    Row i of the message is bytes `offsets[i] .. offsets[i] + sizes[i]` of the blob: one float32
    vector of `width` for each input of the thread.
    """

    threads: list[Thread]
    residencies: list[Int53]
    offsets: list[Int53]
    sizes: list[Int53]
    width: Int53
