"""Conversation 0x00: a peer meets the kernel, stays alive, fails."""

from typing import Annotated, Literal

from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Id16, Int53, Message, Milliseconds, Name
from llmproto.errors import ErrorKind


class Failed(Message, frozen=True):
    """Anyone -> requester.  The only negative answer there is."""

    kind: ErrorKind
    """Decides what the caller does."""
    detail: Detail
    """For people: what happened, with the numbers, and what to do."""
    retry_after_ms: Milliseconds | None = None
    """When a retry can succeed; absent where a retry is pointless or the time unknown."""


class Hello(Message, frozen=True):
    """Peer -> kernel, first on every connection.  Answered by Welcome, or Failed(DENIED |
    INVALID | EXHAUSTED)."""

    session: Id16
    """Random, kept across reconnects of one peer incarnation."""
    role: Name
    """`client`, `gateway`, or the service name."""
    proof: Annotated[bytes, Meta(max_length=256)] = b""
    """The one-time key inherited from init, or the content of a key file of the home."""
    protocol_min: Annotated[int, Meta(ge=1, le=255)] = limits.PROTOCOL_VERSION
    """Lowest protocol version that the peer speaks."""
    protocol_max: Annotated[int, Meta(ge=1, le=255)] = limits.PROTOCOL_VERSION
    """Highest protocol version that the peer speaks."""
    process: Name | None = None
    """The process name that init started it under; absent for clients and services started by
    somebody else."""
    incarnation: Int53 = 0
    """Which start of that process this is."""
    pid: Int53 | None = None
    """Process id on its own node, for `ps`."""


class Welcome(Message, frozen=True):
    """Kernel -> peer, answers Hello.  All credit starts anew; the peer lists what it holds with
    a Beat."""

    kernel_epoch: Int53
    """Grows by one with every start of the kernel of this home."""
    boot_id: Id16
    """Random for every start of init."""
    protocol: Annotated[int, Meta(ge=1, le=255)]
    """The version to speak from here on."""
    beat_ms: Milliseconds
    """How often the kernel expects a Beat."""
    session: Id16
    """The peer's own address."""
    tenant: Int53
    """The tenant that this connection speaks for."""


class Unknown(Message, frozen=True):
    """Kernel -> peer, answers anything but Hello on a connection that has not been welcomed:
    say Hello."""

    kernel_epoch: Int53
    """The epoch that the peer is not part of yet."""


class Beat(Message, frozen=True):
    """Peer -> kernel, every `beat_ms` and right after Welcome: alive, and what it holds."""

    progress: Int53 = 0
    """Grows whenever work moves (steps, requests); the kernel compares it with what it knows to
    be outstanding."""
    threads: list[Annotated[bytes, Meta(min_length=8, max_length=8)]] = []
    """Sink: the threads it keeps.  Executor: the threads resident on it."""
    positions: list[Int53] = []
    """Sink: highest committed position received, one for each thread.  Executor: the residency
    of each thread."""


class Working(Message, frozen=True):
    """Service -> kernel, before work that makes no visible progress for long: extends the
    budget of progress."""

    what: Name
    """For `ps`: `loading`, `capturing`, ..."""
    budget_ms: Annotated[int, Meta(ge=0, le=limits.WORKING_MS_MAX)]
    """Longer than this is a hang.  0: the work is done."""


class Goodbye(Message, frozen=True):
    """Either way: an orderly leave.  The session ends at once, without its lease."""

    reason: Literal["done", "draining", "replaced", "shutdown"] = "done"
