"""What clients get: the answers of the OpenAI API as structs.

Source: OpenAI API reference (platform.openai.com/docs/api-reference).
"""

from typing import Literal

import msgspec

Finish = Literal["stop", "length"]


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all choices together; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(msgspec.Struct, frozen=True):
    """Columns, one entry a token (completions)."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    """In characters of the choice's text."""


class TextChoice(msgspec.Struct, frozen=True):
    """One completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None


class TextCompletion(msgspec.Struct, frozen=True):
    """Answer of /v1/completions, and each of its chunks."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token (chat)."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry a token (chat)."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswer(msgspec.Struct, frozen=True):
    """What the model said."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatAnswer
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """A chunk of a streamed chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | None = None


class InputUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs together, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingRow(msgspec.Struct, frozen=True):
    """The vector of one input."""

    index: int
    embedding: list[float] | str
    """Numbers, or (`encoding_format` base64) the text of their little-endian float32."""
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    """Answer of /v1/embeddings."""

    data: list[EmbeddingRow]
    model: str
    usage: InputUsage
    object: Literal["list"] = "list"


class ClassRow(msgspec.Struct, frozen=True):
    """What a classifier says of one input."""

    index: int
    label: str
    """The most likely one; of a regression its name."""
    probs: list[float]
    """One a label, in the order of `labels`; of a regression the number itself."""
    num_classes: int
    object: Literal["classification"] = "classification"


class ClassList(msgspec.Struct, frozen=True):
    """Answer of /v1/classify."""

    data: list[ClassRow]
    model: str
    labels: list[str]
    problem: Literal["single_label", "multi_label", "regression"] | str
    """What the probabilities are: of one label (they add up to 1), of each label for itself, or
    plain numbers."""
    usage: InputUsage
    object: Literal["list"] = "list"


class ModelObject(msgspec.Struct, frozen=True):
    """A model."""

    id: str
    created: int
    context_tokens: int
    chat: bool
    """It can be talked to in /v1/chat/completions."""
    state: str
    default: bool
    object: Literal["model"] = "model"
    owned_by: str = "llmos"
    task: str = "generate"
    """generate, embed, classify or regress."""


class ModelList(msgspec.Struct, frozen=True):
    """GET /v1/models"""

    data: list[ModelObject]
    object: Literal["list"] = "list"


class StreamDeleted(msgspec.Struct, frozen=True):
    """DELETE /v1/streams/ID"""

    id: str
    deleted: bool = True
    object: Literal["stream"] = "stream"


class HealthBody(msgspec.Struct, frozen=True):
    """GET /health"""

    status: Literal["ok", "unavailable"]
    reasons: list[str] = []
    """Why no request can make progress."""
