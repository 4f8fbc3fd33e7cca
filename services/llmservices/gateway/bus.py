"""The real Llm: streams and questions over the gateway's session.

Invariant (`check`): every stream that is read has one reader; an end that was sent to a client that
may resume is acknowledged once, after a while.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from libllm.events import Close, Consumed, Event, Open, Resume, StreamFailed, StreamRow
from libllm.listening import stream_id
from libllm.port import MessageT, Port, expect
from libllm.vectors import Inputs, Part, encode_all
from llmproto import limits
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Accepted, Attached, Generate

from llmservices.gateway.llm import Inbox

MS: Final = 1_000_000
HANDLE_WAITS_S: Final = (0.05, 0.2, 0.5)
"""A new kernel does not know a tenant's handle until its key was presented again, which may be just
after the request was repeated: it is made anew, under its key."""
KEPT_MAX: Final = 1024
"""Ends that wait for their acknowledgement; beyond that the oldest is acknowledged early."""


class Reader:
    """Who reads one stream."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox

    def row(self, row: StreamRow) -> None:
        """The next text."""
        self.inbox.put(row)

    def failed(self, failure: StreamFailed) -> None:
        """No more will come."""
        self.inbox.fail(RemoteError(failure.kind, failure.detail))


class BusLlm:
    """An Llm over a Port."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._readers: dict[bytes, Reader] = {}
        self._kept: dict[bytes, tuple[StreamRow, asyncio.TimerHandle]] = {}
        """Last rows that were sent and not acknowledged, oldest first."""

    @property
    def streams(self) -> int:
        """Streams that are read."""
        return len(self._readers)

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._kept) <= KEPT_MAX
        assert not self._kept.keys() & self._readers.keys()

    async def call(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str = "kernel",
        tenant: int | None = None,
        patience_ms: int,
    ) -> MessageT:
        """See Llm."""
        deadline_ns = time.monotonic_ns() + patience_ms * MS
        return await self._port.call(
            message, answer, target=target, tenant=tenant, deadline_ns=deadline_ns
        )

    async def encode(self, inputs: Inputs, *, tenant: int | None, patience_ms: int) -> list[Part]:
        """See Llm."""
        deadline_ns = time.monotonic_ns() + patience_ms * MS
        for wait_s in HANDLE_WAITS_S:
            try:
                return await encode_all(self._port, inputs, tenant=tenant, deadline_ns=deadline_ns)
            except RemoteError as error:
                if error.kind is not ErrorKind.STALE or tenant is None:
                    raise
            await asyncio.sleep(wait_s)
        return await encode_all(self._port, inputs, tenant=tenant, deadline_ns=deadline_ns)

    async def open(
        self, generate: Generate, inbox: Inbox, *, tenant: int | None, patience_ms: int
    ) -> Accepted:
        """See Llm."""
        streams = [stream_id(generate.key, index) for index in range(generate.choices)]
        for stream in streams:
            self._listen(stream, inbox)
        try:
            for wait_s in (*HANDLE_WAITS_S, None):
                answer = await self._ask(
                    lambda call: Open(call, generate, tenant=tenant), patience_ms, "taken"
                )
                stale = isinstance(answer, Failed) and answer.kind is ErrorKind.STALE
                if not stale or tenant is None or wait_s is None:
                    break
                await asyncio.sleep(wait_s)
            return expect(answer, Accepted)
        except BaseException:
            for stream in streams:
                self.close(stream, inbox, cancel=True)
            raise

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
        """See Llm."""
        self._take_over(stream)
        self._listen(stream, inbox)
        try:
            answer = await self._ask(
                lambda call: Resume(call, stream, offset=offset, scores=scores, tenant=tenant),
                patience_ms,
                "found",
            )
            return expect(answer, Attached)
        except BaseException:
            self.close(stream, inbox, cancel=False)
            raise

    def consume(self, row: StreamRow, *, keep: bool) -> None:
        """See Llm."""
        if row.end is None:
            self._port.feed(Consumed(row.stream, row.until, row.tokens))
        elif not keep:
            self._unlisten(row.stream)
            self._port.feed(Consumed(row.stream, row.until, row.tokens, ended=True))
        else:
            self._unlisten(row.stream)
            wait_s = limits.LINGER_MS / 1000
            timer = self._port.loop.call_later(wait_s, self._acknowledge, row.stream)
            self._kept[row.stream] = (row, timer)
            if len(self._kept) > KEPT_MAX:
                self._acknowledge(next(iter(self._kept)))

    def close(self, stream: bytes, inbox: Inbox, *, cancel: bool) -> None:
        """See Llm."""
        reader = self._readers.get(stream)
        if reader is not None and reader.inbox is inbox:
            self._unlisten(stream)
            self._port.feed(Close(stream, cancel=cancel))

    async def _ask(self, make: Callable[[int], Event], patience_ms: int, what: str) -> Message:
        """The answer to what `make` gives for a new call; UNAVAILABLE where none comes in time."""
        future: asyncio.Future[Message] = self._port.loop.create_future()

        def settle(answer: Message) -> None:
            if not future.done():
                future.set_result(answer)

        call = self._port.begin(make, settle)
        try:
            async with asyncio.timeout(patience_ms / 1000):
                return await future
        except TimeoutError:
            detail = f"it was not {what} within {patience_ms} ms: a service is down or starting"
            raise RemoteError(ErrorKind.UNAVAILABLE, detail) from None
        finally:
            self._port.forget(call)

    def _take_over(self, stream: bytes) -> None:
        """Its last reader here gets no more of it."""
        reader = self._readers.get(stream)
        if reader is not None:
            detail = "the stream is being read by another request now"
            reader.inbox.fail(RemoteError(ErrorKind.STALE, detail))
            self.close(stream, reader.inbox, cancel=False)
        kept = self._kept.pop(stream, None)
        if kept is not None:
            kept[1].cancel()
            self._port.feed(Close(stream, cancel=False))

    def _acknowledge(self, stream: bytes) -> None:
        row, timer = self._kept.pop(stream)
        timer.cancel()
        self._port.feed(Consumed(stream, row.until, row.tokens, ended=True))

    def _listen(self, stream: bytes, inbox: Inbox) -> None:
        reader = self._readers[stream] = Reader(inbox)
        self._port.listen(stream, reader)

    def _unlisten(self, stream: bytes) -> None:
        self._readers.pop(stream, None)
        self._port.listen(stream, None)
