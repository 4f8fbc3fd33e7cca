"""Conversation 0x06: API keys and tenants."""

from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto.base import Int53, Message, Name


class KeyPresent(Message, frozen=True):
    """Gateway -> kernel: whose key is this?  Answered by KeyPresented, or Failed(DENIED).  The
    key itself is never stored or logged."""

    key: Annotated[bytes, Meta(min_length=1, max_length=256)]


class KeyPresented(Message, frozen=True):
    """Kernel -> gateway, answers KeyPresent."""

    handle: Int53
    """Good for the header's `tenant`, from this gateway's session only."""
    name: Name
    operator: bool


class KeyAdd(Message, frozen=True):
    """Operator -> kernel: accept the key with this digest.  Answered by Done, or Failed(INVALID
    | EXHAUSTED | DENIED)."""

    name: Name
    """Name of the key; also of its tenant."""
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """SHA-256 of the key (keys are 32 random bytes, so no slow hash is needed)."""
    operator: bool = False


class KeyRemove(Message, frozen=True):
    """Operator -> kernel.  Answered by Done, or Failed(STALE | DENIED)."""

    name: Name


class KeyRow(msgspec.Struct, frozen=True):
    """A key as it is listed."""

    name: Name
    operator: bool
    created_s: Int53


class KeysAsk(Message, frozen=True):
    """Operator -> kernel.  Answered by Keys."""


class Keys(Message, frozen=True):
    """Kernel -> operator, answers KeysAsk."""

    rows: list[KeyRow]
