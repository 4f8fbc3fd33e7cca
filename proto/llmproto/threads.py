"""Conversation 0x02: sinks and the kernel: system calls on threads, committed tokens out."""

from typing import Annotated

from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Id16, Int53, Message, Milliseconds, Name
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling, Thread, Token, TokenScore

PackedTokens = Annotated[bytes, Meta(max_length=4 * limits.CONTEXT_TOKENS_MAX)]
"""Token ids as little-endian uint32, one after another: a context is copied and journaled
without being read."""

Lengths = Annotated[
    list[Annotated[int, Meta(ge=1, le=limits.CONTEXT_TOKENS_MAX)]],
    Meta(max_length=limits.ENCODE_INPUTS_MAX),
]

END_NONE = 0
END_STOP = 1
"""An end-of-sequence or stop token, or a stop string."""
END_LENGTH = 2
END_CANCEL = 3
END_ERROR = 4
End = Annotated[int, Meta(ge=END_NONE, le=END_ERROR)]


class ThreadSpawn(Message, frozen=True):
    """Sink -> kernel, citing the client's request as its cause.  Answered by ThreadSpawned, or
    Failed(EXHAUSTED | INVALID | DENIED | STALE)."""

    key: Id16
    """The client's request key; with `index` it names the thread, so that a repeated spawn
    finds it."""
    index: Annotated[int, Meta(ge=0, lt=limits.CHOICES_MAX)]
    digest: Id16
    """Of the request's content: the same key with other content is INVALID."""
    model: Name
    tokens: PackedTokens
    """Ids of the prompt, at least one."""
    output_tokens_max: Annotated[int, Meta(ge=0, le=limits.CONTEXT_TOKENS_MAX)]
    sampling: Sampling
    sink_state: Annotated[bytes, Meta(max_length=limits.SINK_STATE_BYTES_MAX)]
    """Opaque to the kernel; given back with SinkOpen."""
    service_class: Annotated[int, Meta(ge=0, le=3)] = 1
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0
    deadline_ms: Milliseconds | None = None
    resumable: bool = False
    lengths: Lengths = []
    """Encoders: tokens of each input of this call; they add up to `tokens`, and
    `output_tokens_max` is 0."""
    pair_at: list[Int53] = []
    """Encoders: how many tokens of each input come before its second text; empty where none has
    one."""
    deployment: Name | None = None
    """What ModelFound said: the thread may run on another entry of it as long as it has computed
    nothing.  Failed(STALE): it serves another entry by now; ask for the model again."""


class ThreadSpawned(Message, frozen=True):
    """Kernel -> sink, answers ThreadSpawn, after journaling."""

    thread: Thread
    existing: bool
    """The key was known: the thread goes on, and its SinkOpen came or comes by itself."""


class SinkOpen(Message, frozen=True):
    """Kernel -> sink, for every thread of its service after Welcome, and again when tokens were
    lost on the way.

    Holds all that the sink needs to make the text anew: it never depends on what an earlier
    incarnation did.
    """

    thread: Thread
    tenant: Int53
    session: Id16
    """Where the text goes."""
    sink_state: Annotated[bytes, Meta(max_length=limits.SINK_STATE_BYTES_MAX)]
    prompt_tokens: Int53
    tokens: PackedTokens
    """All ids, the prompt included, up to the last committed position."""
    acked: Int53
    """Highest position that the sink has acknowledged."""
    end: End = END_NONE
    error: ErrorKind | None = None
    detail: Detail = ""
    scores: list[TokenScore] | None = None
    """One for each generated token, where logprobs were asked for."""
    prompt_scores: list[TokenScore] | None = None


class Committed(Message, frozen=True, array_like=True):
    """Kernel -> sink (tokens to deliver) and kernel -> executor (the watermark: `tokens`
    empty).  Hot: an array.

    Position 0 is the first prompt token.  Rows are in order for each thread; a row whose end is
    not 0 and whose token is absent (`None`) ends the thread without a further token.
    """

    threads: list[Thread]
    positions: list[Int53]
    tokens: list[Token | None]
    ends: list[End]
    scores: list[TokenScore | None] | None = None
    errors: list[str] | None = None
    """`KIND: detail` for rows whose end is 4, else empty strings."""
    prompt_scores: list[list[TokenScore] | None] | None = None


class SinkAcked(Message, frozen=True):
    """Sink -> kernel, lazily: how far the clients have consumed.  Gives credit; not answered;
    losing one only re-sends."""

    threads: list[Thread]
    positions: list[Int53]
    ended: list[bool]
    """The end was consumed: the context may be forgotten."""


class ThreadEnd(Message, frozen=True):
    """Sink -> kernel: the thread ends at this position (a stop string matched).  Not answered.
    The first journaled end wins; tokens beyond `at` are cut."""

    thread: Thread
    at: Int53
    """The last position that belongs to the thread."""


class ThreadCancel(Message, frozen=True):
    """Client or sink -> kernel: end it within a step, always.  Answered by Done, or
    Failed(STALE | DENIED)."""

    thread: Thread
    forget: bool = False
    """Nobody will read it any more: once this is answered its context is forgotten, too, and no
    acknowledgement of its end is waited for."""


class ThreadSuspend(Message, frozen=True):
    """Client -> kernel: leave the device, keep the context.  Answered by Done, or Failed(STALE
    | DENIED)."""

    thread: Thread


class ThreadResume(Message, frozen=True):
    """Client -> kernel: undoes ThreadSuspend.  Answered by Done, or Failed(STALE | DENIED)."""

    thread: Thread


class ThreadRenice(Message, frozen=True):
    """Client -> kernel.  Answered by Done, or Failed(STALE | DENIED)."""

    thread: Thread
    priority: Annotated[int, Meta(ge=-8, le=7)]
    service_class: Annotated[int, Meta(ge=0, le=3)] | None = None
    """Absent: as it was."""


class Done(Message, frozen=True):
    """Kernel or service -> requester: it was done."""


class SinkDrop(Message, frozen=True):
    """Kernel -> sink: these threads are forgotten; forget them too.  Not answered."""

    threads: list[Thread]


class ThreadAdopt(Message, frozen=True):
    """Sink -> kernel, citing a client's Attach as its cause: the thread's text goes to that client
    from now on.  Answered by Done, or Failed(STALE | DENIED)."""

    thread: Thread
