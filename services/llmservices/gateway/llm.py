"""What the gateway needs of the system, so that its tests can do without one."""

import asyncio
from collections import deque
from typing import Final, Protocol, TypeVar

from libllm.events import StreamRow
from libllm.vectors import Inputs, Part
from llmproto.base import Message
from llmproto.errors import RemoteError
from llmproto.generation import Accepted, Attached, Generate

ROWS_MAX: Final = 64
"""Taken at once: what has piled up is written together, in pieces that stay small."""
MessageT = TypeVar("MessageT", bound=Message)


class Inbox:
    """The rows of all streams of one HTTP request, in the order in which they came.

    Bounded by credit: a stream whose rows are not consumed brings at most CREDIT_TOKENS of them.
    """

    def __init__(self) -> None:
        self._rows: deque[StreamRow] = deque()
        self._failure: RemoteError | None = None
        self._came = asyncio.Event()

    def put(self, row: StreamRow) -> None:
        """The next row of one of the streams."""
        self._rows.append(row)
        self._came.set()

    def fail(self, error: RemoteError) -> None:
        """One of the streams brings no more."""
        self._failure = error
        self._came.set()

    async def take(self, *, patience_s: float | None = None) -> list[StreamRow]:
        """The oldest rows that were not taken, one to ROWS_MAX; raises what failed once no row is
        left, TimeoutError where none comes for so long."""
        while not self._rows:
            if self._failure is not None:
                raise self._failure
            self._came.clear()
            async with asyncio.timeout(patience_s):
                await self._came.wait()
        return [self._rows.popleft() for _ in range(min(len(self._rows), ROWS_MAX))]


class Llm(Protocol):
    """The system, as one session of the bus; the real one is `BusLlm`, over libllm's Port.

    `tenant` is a handle that the kernel gave for an API key; None: the session's own tenant.
    """

    async def call(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str = "kernel",
        tenant: int | None = None,
        patience_ms: int,
    ) -> MessageT:
        """Ask; RemoteError where that fails, DEADLINE where it takes too long."""

    async def encode(self, inputs: Inputs, *, tenant: int | None, patience_ms: int) -> list[Part]:
        """Vectors or scores of every input, in order; RemoteError where one call fails."""

    async def open(
        self, generate: Generate, inbox: Inbox, *, tenant: int | None, patience_ms: int
    ) -> Accepted:
        """Start; rows come to the inbox, perhaps before this returns.  Left early, or refused: it
        leaves nothing behind."""

    async def resume(
        self,
        stream: bytes,
        inbox: Inbox,
        *,
        offset: int,
        scores: int,
        tenant: int | None,
        patience_ms: int,
    ) -> Attached:
        """Read a stream that exists; whoever read it here before gets no more of it."""

    def consume(self, row: StreamRow, *, keep: bool) -> None:
        """The client took this row.  `keep`: it may come again for it and for what follows, so that
        an end is acknowledged only after a while."""

    def close(self, stream: bytes, inbox: Inbox, *, cancel: bool) -> None:
        """This inbox reads no more of it, and its thread ends unless it is to go on.  A stream that
        is over, or read by another inbox by now: no effect."""
