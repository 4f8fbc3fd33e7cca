"""What every message is made of: the base struct, ids and the header.

Ids are MessagePack `bin`; every other integer stays below 2^53, so that readers whose numbers
are doubles can follow. A peer's address is its *session*: 16 bytes that it chose at random and
keeps across reconnects.
"""

from typing import Annotated, Any, NewType

import msgspec
from msgspec import Meta

from llmproto import limits

Int53 = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
"""An unsigned integer that a double holds exactly."""
Id16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Id8 = Annotated[bytes, Meta(min_length=8, max_length=8)]
Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES_MAX)]
Path = Annotated[str, Meta(min_length=1, max_length=limits.PATH_BYTES_MAX)]
Milliseconds = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Detail = Annotated[str, Meta(max_length=limits.DETAIL_BYTES_MAX)]

MessageId = NewType("MessageId", bytes)
SessionId = NewType("SessionId", bytes)
ThreadId = NewType("ThreadId", bytes)
"""8 bytes: kernel epoch and a counter, big-endian; unique for the life of a home."""
StreamId = NewType("StreamId", bytes)
"""17 bytes: the 16 of the request key, and the index of the choice."""
Residency = NewType("Residency", int)
"""Kernel epoch x 2^32 + a counter: one stay of one thread on one executor."""
TenantId = NewType("TenantId", int)


class Message(msgspec.Struct, frozen=True):
    """Anything that stands in a body frame.  Unknown fields are ignored by readers."""


class Opaque(Message, frozen=True):
    """A message of a plug-in kind, its body encoded: what it means is known to the asker and the
    service alone."""

    kind: int
    body: bytes


class Header(msgspec.Struct, frozen=True, array_like=True):
    """The first frame of every message, an array so that a router reads it cheaply."""

    version: Annotated[int, Meta(ge=1, le=255)]
    """Protocol version of the sender."""
    kind: Annotated[int, Meta(ge=1, le=0xFFFF)]
    """Which message the body is; see the table of kinds."""
    id: Id16
    """Chosen at random by the sender; a repeated request keeps its id."""
    target: Annotated[str, Meta(max_length=limits.NAME_BYTES_MAX)] = "kernel"
    """A service name.  Where `peer` is present it is only for people."""
    reply_to: Id16 | None = None
    """The id of the message that this one answers."""
    source: Annotated[bytes, Meta(max_length=16)] = b""
    """Session of the sender.  Set by the kernel from the connection; what a peer writes here is
    overwritten."""
    cause: Id16 | None = None
    """The id of the request on whose behalf this one is made: rights and tenant come from there."""
    epoch: Int53 = 0
    """Kernel epoch that the sender was welcomed into; 0 before that."""
    deadline_ms: Milliseconds | None = None
    """What is left of the caller's patience."""
    blobs: Annotated[list[Int53], Meta(max_length=limits.BLOBS_MAX)] = []
    """Length in bytes of each frame behind the body."""
    tenant: Int53 | None = None
    """From a gateway: a tenant handle that the kernel gave to it.  Towards services: the
    tenant, set by the kernel."""
    peer: Id16 | None = None
    """The session of one peer: goes to it and nobody else."""
    trace: Annotated[bytes, Meta(max_length=64)] | None = None
    """W3C trace context, passed on unread."""


def replaced(header: Header, **changes: Any) -> Header:  # Any: the fields are of several types
    """The header with some fields changed."""
    return msgspec.structs.replace(header, **changes)
