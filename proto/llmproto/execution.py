"""Conversation 0x03: the kernel and its executors: contexts in, proposed tokens out."""

from typing import Annotated

from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Id16, Int53, Message, Name
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling, Thread, Token, TokenScore
from llmproto.threads import End, Lengths, PackedTokens


class ExecutorReady(Message, frozen=True):
    """Executor -> kernel, after Welcome, once its model is loaded.  Not answered: Run follows
    when there is work."""

    model: Name
    digest: Id16
    context_tokens: Int53
    """The longest context that it takes: the model's, or what its KV cache holds, whichever is
    less."""
    blocks: Int53
    """KV blocks in all."""
    block_tokens: Int53
    residents_max: Int53
    """Threads that it takes at once."""
    path: Detail = ""
    """For people: precision, device and code path in use (`bfloat16 cpu native avx2 fast`)."""
    memory_bytes: Int53 = 0
    """Weights and KV cache."""


class Run(Message, frozen=True, array_like=True):
    """Kernel -> executor: compute this thread from its context.  Hot: an array.  Answered by
    Stepped, GaveBack or Refused."""

    thread: Thread
    residency: Int53
    tokens: PackedTokens
    """All ids up to the last committed position."""
    prompt_tokens: Int53
    """How many of them are prompt."""
    output_tokens_max: Int53
    """Counted from the prompt's end."""
    sampling: Sampling
    service_class: Annotated[int, Meta(ge=0, le=3)]
    priority: Annotated[int, Meta(ge=-8, le=7)]
    domain: Id16
    """Cache domain: prefixes are shared inside it only."""
    prompt_scores: bool = False
    """Log-probabilities of the prompt are still wanted (they go out with the first token)."""
    lengths: Lengths = []
    """Encoders: tokens of each input.  Answered by Vectors."""
    pair_at: list[Int53] = []
    """Encoders: tokens of each input before its second text; empty where none has one."""


class Stepped(Message, frozen=True, array_like=True):
    """Executor -> kernel: proposed tokens of one step, one row a thread.  Hot: an array.
    Answered by Committed (the watermark) or Resync; rows at or below the watermark are
    duplicates."""

    threads: list[Thread]
    residencies: list[Int53]
    positions: list[Int53]
    tokens: list[Token | None]
    """Absent only together with an end: no further token."""
    ends: list[End]
    """0, or why the thread ends with this row: 1 stop, 2 length."""
    blocks_free: Int53
    scores: list[TokenScore | None] | None = None
    prompt_scores: list[list[TokenScore] | None] | None = None


class Resync(Message, frozen=True):
    """Kernel -> executor: a row came beyond the next position; send again from here."""

    thread: Thread
    residency: Int53
    position: Int53
    """The next position that the kernel will commit."""


class Drop(Message, frozen=True):
    """Kernel -> executor: these residencies are over; free their blocks within the step.  Not
    answered."""

    residencies: Annotated[list[Int53], Meta(max_length=limits.THREADS_MAX)]


class GaveBack(Message, frozen=True):
    """Executor -> kernel: no blocks left; this thread returns to the queue with what was
    committed.  Not answered."""

    threads: list[Thread]
    residencies: list[Int53]
    blocks_free: Int53


class Refused(Message, frozen=True):
    """Executor -> kernel: this thread can never run here; it ends with this error.  Not
    answered."""

    thread: Thread
    residency: Int53
    kind: ErrorKind
    detail: Detail


class LoadFailed(Message, frozen=True):
    """Executor -> kernel: the model cannot be loaded; it exits.  Threads that wait for it end
    with this error."""

    model: Name
    kind: ErrorKind
    detail: Detail
