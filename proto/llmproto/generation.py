"""Conversation 0x01: a client and the sink of its threads: requests in, text out."""

from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Id16, Int53, Message, Name
from llmproto.errors import ErrorKind

Token = Annotated[int, Meta(ge=0, le=limits.TOKEN_ID_MAX)]
Stream = Annotated[bytes, Meta(min_length=17, max_length=17)]
Thread = Annotated[bytes, Meta(min_length=8, max_length=8)]


class Sampling(msgspec.Struct, frozen=True):
    """How the next token is chosen.  All defaults together mean: sample from the model's own
    distribution."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0: the most likely token (ties to the lowest id)."""
    top_k: Annotated[int, Meta(ge=0, le=limits.TOKEN_ID_MAX)] = 0
    """Keep the k most likely tokens.  0: all."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Keep the smallest set of most likely tokens whose probabilities add up to this."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Drop tokens less likely than this times the most likely one."""
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    """Divides positive (multiplies negative) logits of tokens that occur in prompt or output
    (Keskar et al. 2019)."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """Subtracted once from the logit of every token that occurs in the output."""
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """Subtracted for every occurrence in the output."""
    bias_tokens: Annotated[list[Token], Meta(max_length=limits.LOGIT_BIASES_MAX)] = []
    """Tokens whose logits `bias_values` are added to."""
    bias_values: Annotated[
        list[Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=limits.LOGIT_BIASES_MAX)
    ] = []
    """One for each of `bias_tokens`."""
    seed: Int53 = 0
    """The random number for position i is a function of (seed, i, token id) alone."""
    logprobs: Annotated[int, Meta(ge=0, le=limits.LOGPROBS_MAX)] | None = None
    """Report the log-probability of each chosen token, and of so many alternatives.  Absent:
    neither."""
    prompt_logprobs: bool = False
    """Report log-probabilities of the prompt's tokens too (with `logprobs`)."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    stop_tokens: Annotated[list[Token], Meta(max_length=64)] = []
    """Token ids that end the thread (the model's own end-of-sequence ids are added by the sink)."""


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a chat."""

    role: Name
    content: str


class Generate(Message, frozen=True):
    """Client -> `tokenizer`.  Answered by Accepted, or Failed; then Text until every choice has
    ended.

    Exactly one of `prompt`, `prompt_tokens` and `messages` is present.
    """

    key: Id16
    """Request key, random.  Repeating a request with its key never starts it twice."""
    model: Name | None = None
    """Name in the model table.  Absent: the system's default model."""
    prompt: str | None = None
    """Text to continue."""
    prompt_tokens: list[Token] | None = None
    """Token ids to continue, as they are: nothing is added."""
    messages: list[ChatMessage] | None = None
    """A chat, rendered by the model's own template."""
    output_tokens_max: Annotated[int, Meta(ge=0, le=limits.CONTEXT_TOKENS_MAX)] | None = None
    """Absent: until the context is full.  0: score the prompt only."""
    sampling: Sampling = Sampling()
    stops: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=limits.STOP_BYTES_MAX)]],
        Meta(max_length=limits.STOPS_MAX),
    ] = []
    """Output ends before the first of these."""
    choices: Annotated[int, Meta(ge=1, le=limits.CHOICES_MAX)] = 1
    """Independent continuations; choice i samples with seed + i."""
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0
    """Higher runs first within its class."""
    service_class: Annotated[int, Meta(ge=0, le=3)] = 1
    """0 interactive, 1 normal, 2 batch, 3 background."""
    resumable: bool = False
    """When the client is gone the threads linger for LINGER_MS instead of being cancelled."""


class Accepted(Message, frozen=True):
    """Sink -> client, answers Generate: the threads are journaled and will not be lost."""

    threads: list[Thread]
    """One for each choice."""
    model: Name
    """The resolved name."""
    prompt_tokens: Int53
    """Tokens in the prompt."""
    prompt: list[Token] = []
    """The prompt's token ids, where the request gave text and asked for logprobs of the prompt."""
    prompt_texts: list[str] = []
    """The text of each of those tokens."""


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, after penalties, bias and temperature 1: natural
    logarithm."""

    token: Token
    logprob: float | None
    """Absent for the first token of a prompt, which nothing predicts."""
    top_tokens: list[Token] = []
    top_logprobs: list[float] = []


class TextScore(msgspec.Struct, frozen=True, array_like=True):
    """A TokenScore with text."""

    text: str
    token: Token
    logprob: float | None
    top_texts: list[str] = []
    top_tokens: list[Token] = []
    top_logprobs: list[float] = []
    offset: Int53 = 0
    """Where the token's text begins, in UTF-8 bytes of the stream (of the prompt, for its
    tokens)."""


class StreamEnd(msgspec.Struct, frozen=True, array_like=True):
    """How a stream ended."""

    reason: Annotated[str, Meta(pattern="^(stop|length|cancel|error)$")]
    output_tokens: Int53
    """Generated tokens, the one that ended it included."""
    prompt_tokens: Int53
    stop: str | None = None
    """The stop string that ended it, where one did."""
    error: ErrorKind | None = None
    detail: Detail = ""


class Text(Message, frozen=True, array_like=True):
    """Sink -> client: new text of any number of its streams, one row a stream.  Hot: an array.
    May be lost and asked for again (Attach); rows whose offset was already received are
    duplicates."""

    streams: list[Stream]
    offsets: list[Int53]
    """UTF-8 bytes of the stream before this row's text."""
    texts: list[str]
    tokens: list[Int53]
    """Generated tokens up to and including this row."""
    ends: list[StreamEnd | None]
    scores: list[list[TextScore] | None] | None = None
    """Where logprobs were asked for."""
    prompt_scores: list[list[TextScore] | None] | None = None
    """Of the prompt, with the first row of a stream that asked for them."""


class StreamAcked(Message, frozen=True):
    """Client -> sink, lazily: what the caller has consumed.  Gives credit; not answered."""

    streams: list[Stream]
    offsets: list[Int53]
    """UTF-8 bytes consumed."""
    tokens: list[Int53]
    """`tokens` of the last consumed row."""
    ended: list[bool]
    """The end was consumed: the thread's context may be forgotten."""


class Attach(Message, frozen=True):
    """Client -> sink: send this stream to me, from this offset.  Answered by Attached, or
    Failed(STALE | DENIED)."""

    stream: Stream
    offset: Int53
    """Bytes that the client holds.  Beyond what was committed (after the loss of an unsynced
    tail): STALE, with both."""
    scores: Int53 = 0
    """Scored tokens that the client holds."""


class Attached(Message, frozen=True):
    """Sink -> client, answers Attach."""

    thread: Thread
    model: Name
    offset: Int53
    """Bytes that exist by now."""


class TokenizeAsk(Message, frozen=True):
    """Client -> `tokenizer`: what ids a text becomes.  Answered by Tokenized, or Failed."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class Tokenized(Message, frozen=True):
    """Sink -> client, answers TokenizeAsk."""

    tokens: list[Token]
    context_tokens: Int53
    """The model's context length."""
