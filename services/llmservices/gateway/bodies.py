"""What clients send: the bodies of the OpenAI API as structs, and what is asked of their fields.

A field is in the struct, or harmless (accepted and ignored), or refused unless it says what happens
anyway, or unknown and refused by name: nothing that a client asks for is dropped in silence.
Source: OpenAI API reference (platform.openai.com/docs/api-reference), completions and chat.
"""

import re
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from llmproto import limits
from llmproto.base import Name
from llmproto.generation import Token
from msgspec import Meta, Raw

from llmservices.gateway.errors import HttpError, invalid_field

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Stop = Annotated[str, Meta(min_length=1, max_length=limits.STOP_BYTES_MAX)]
Stops = Annotated[list[Stop], Meta(max_length=limits.STOPS_MAX)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
INPUTS_MAX: Final = 2048
"""Of one request to an encoder; OpenAI's own limit."""
OutputTokens = Annotated[int, Meta(ge=0, le=limits.CONTEXT_TOKENS_MAX)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`"""

    include_usage: bool | None = False
    """A last chunk tells the usage."""
    include_obfuscation: bool | None = False
    """Accepted; nothing is added to a stream here."""


class SamplingBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request share.  null means absent everywhere."""

    model: Name | None = None
    """Name in the model table.  Absent: the system's default model."""
    n: Annotated[int, Meta(ge=1, le=limits.CHOICES_MAX)] | None = 1
    """Independent choices for each prompt."""
    stop: Stop | Stops | None = None
    """Output ends before the first of these."""
    stop_token_ids: Annotated[list[Token], Meta(max_length=64)] | None = None
    """Token ids that end the output (not in OpenAI's API)."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    """Absent: random."""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = 1.0
    top_p: Probability | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=limits.LOGIT_BIASES_MAX)] | None = None
    """Token id, in decimal, to what is added to its logit."""
    top_k: Annotated[int, Meta(ge=-1, le=limits.TOKEN_ID_MAX)] | None = 0
    """0 or -1: all (not in OpenAI's API; neither are those below)."""
    min_p: Probability | None = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = 1.0
    ignore_eos: bool | None = False
    priority: Annotated[int, Meta(ge=-8, le=7)] | None = 0
    """Higher runs first."""


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions"""

    prompt: str | Annotated[list[str | Token | list[Token]], Meta(max_length=1024)]
    """Text, several texts, token ids, or several lists of token ids."""
    max_tokens: OutputTokens | None = 16
    echo: bool | None = False
    """The prompt comes before the output."""
    logprobs: Annotated[int, Meta(ge=0, le=limits.LOGPROBS_MAX)] | None = None
    """Alternatives a token, beside the log-probability of the token itself."""
    best_of: Annotated[int, Meta(ge=1, le=limits.CHOICES_MAX)] | None = None
    """Only what `n` says."""


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class MessageBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a chat.  Fields of tool calls and sound are there so that an answer can be sent
    back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is what newer clients call `system`."""
    content: str | list[TextPart] | None = None
    name: str | None = None
    """Accepted; templates do not show it."""
    refusal: str | None = None
    annotations: list[Raw] | None = None
    tool_calls: Annotated[list[Raw], Meta(max_length=0)] | None = None
    function_call: None = None
    audio: None = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[MessageBody], Meta(min_length=1, max_length=65_536)]
    max_tokens: OutputTokens | None = None
    """Absent: until the context is full."""
    max_completion_tokens: OutputTokens | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.LOGPROBS_MAX)] | None = None


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings"""

    input: str | Annotated[list[str | Token | list[Token]], Meta(max_length=INPUTS_MAX)]
    """Text, several texts, token ids, or several lists of token ids."""
    model: Name | None = None
    """Name of an embedding model in the model table."""
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """Keep so many numbers of each vector, brought back to length 1."""
    truncate: bool | None = False
    """Cut inputs that are longer than the model takes (not in OpenAI's API); else they are
    refused."""


class ClassifyBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/classify (not in OpenAI's API)"""

    input: str | Annotated[list[str], Meta(max_length=INPUTS_MAX)]
    pairs: str | Annotated[list[str], Meta(max_length=INPUTS_MAX)] | None = None
    """Second texts, one for each input."""
    model: Name | None = None
    """Name of a classifier or a regression in the model table."""
    truncate: bool | None = False
    """Cut inputs that are longer than the model takes; else they are refused."""


HARMLESS: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
    }
)
"""They change nothing in what the model says; ignored."""

NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that cannot be honoured, and the values (null beside them) that ask for nothing."""

BodyT = TypeVar("BodyT", CompletionBody, ChatBody, EmbeddingBody, ClassifyBody)

_AT: Final = re.compile(r" - at `\$\.?([^`]*)`$")


def decode(body: bytes, kind: type[BodyT]) -> BodyT:
    """The body, checked; HttpError(400) that names the field or the byte otherwise."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Raw])
        _check_names(fields, kind)
        decoded = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = _AT.search(str(error))
        param = found.group(1) if found is not None else None
        raise invalid_field(str(error), param or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return decoded


def _check_names(fields: dict[str, Raw], kind: type[BodyT]) -> None:
    for name, raw in fields.items():
        if name in kind.__struct_fields__ or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise invalid_field(
                f"unknown field {name[:64]!r}: it would be ignored; leave it out", name[:64]
            )
        value = msgspec.json.decode(raw)
        if value is not None and value not in NEUTRAL[name]:
            raise HttpError(
                400,
                f"{name!r} is not supported: leave it out",
                param=name,
                code="unsupported_parameter",
            )
