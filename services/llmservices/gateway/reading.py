"""The streams of one HTTP request: opened together, read together, closed together."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from libllm.events import StreamRow
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Accepted, Attached
from llmproto.threads import Done, ThreadCancel
from starlette.types import Receive

from llmservices.gateway.core import Wanted
from llmservices.gateway.errors import CANCELLED, HttpError
from llmservices.gateway.llm import Inbox, Llm
from llmservices.gateway.measures import Measures

ACCEPT_MS: Final = 30_000
"""How long a request waits for services that are starting again."""

T = TypeVar("T")


class Reading:
    """Streams that are open, and what they measured.

    Invariant: after `close` none of them is read any more.
    """

    def __init__(
        self, llm: Llm, measures: Measures, *, tenant: int | None, resumable: bool
    ) -> None:
        self.resumable = resumable
        """The client may come back: what it leaves goes on, and what it was sent is kept for a
        while."""
        self._llm = llm
        self._measures = measures
        self._tenant = tenant
        self._inbox = Inbox()
        self._open: set[bytes] = set()
        self._seen: dict[bytes, tuple[int, float | None]] = {}
        """Tokens of each stream, and when the last of them came."""
        self._resumed: bytes | None = None
        self._began_s = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Every stream has ended."""
        return not self._open

    async def open(self, wanted: Wanted) -> list[Accepted]:
        """Start every prompt; all or none."""
        self._open.update(name.stream for name in wanted.names(0))
        self._measures.streams += len(self._open)
        tasks = [
            asyncio.create_task(
                self._llm.open(generate, self._inbox, tenant=self._tenant, patience_ms=ACCEPT_MS)
            )
            for generate in wanted.generates
        ]
        try:
            accepted = list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # The first failure is the one that is told.
            raise
        self._measures.prompt_tokens += sum(each.prompt_tokens for each in accepted)
        return accepted

    async def resume(self, stream: bytes, *, offset: int, scores: int) -> Attached:
        """Go on with a stream."""
        self._open.add(stream)
        self._resumed = stream
        self._measures.streams += 1
        return await self._llm.resume(
            stream,
            self._inbox,
            offset=offset,
            scores=scores,
            tenant=self._tenant,
            patience_ms=ACCEPT_MS,
        )

    async def forget(self, stream: bytes) -> None:
        """End a stream and its thread; where this returns, the kernel has forgotten it."""
        attached = await self.resume(stream, offset=0, scores=0)
        ask = ThreadCancel(attached.thread, forget=True)
        try:
            await self._llm.call(ask, Done, tenant=self._tenant, patience_ms=ACCEPT_MS)
        except RemoteError as error:
            if error.kind is not ErrorKind.STALE:  # forgotten meanwhile is as good
                raise

    async def take(self, *, patience_s: float | None = None) -> list[StreamRow]:
        """The next rows of any of them; see Inbox."""
        rows = await self._inbox.take(patience_s=patience_s)
        now_s = time.monotonic()
        for row in rows:
            self._measure(row, now_s)
        return rows

    def _measure(self, row: StreamRow, now_s: float) -> None:
        tokens, last_s = self._seen.get(row.stream, (0, None))
        if row.stream == self._resumed and last_s is None:
            tokens, last_s = row.tokens - 1, self._began_s  # the rest was counted when it came
        if row.tokens <= tokens:
            return
        self._seen[row.stream] = (row.tokens, now_s)
        self._measures.output_tokens += row.tokens - tokens
        if last_s is None:
            self._measures.first_token.add(now_s - self._began_s)
        else:
            self._measures.between_tokens.add((now_s - last_s) / (row.tokens - tokens))

    def consume(self, row: StreamRow) -> None:
        """The client has this row."""
        self._llm.consume(row, keep=self.resumable)
        if row.end is not None:
            self._left(row.stream)

    def close(self, *, cancel: bool) -> None:
        """Read no more; what has not ended is cancelled, or goes on."""
        for stream in list(self._open):
            self._llm.close(stream, self._inbox, cancel=cancel)
            self._left(stream)

    def _left(self, stream: bytes) -> None:
        if stream in self._open:
            self._open.discard(stream)
            self._measures.streams -= 1


async def unless_gone(
    receive: Receive,
    work: Coroutine[Any, Any, T],  # Any: what a coroutine is sent
) -> T:
    """What the work gives, which is cancelled as soon as the client is gone (HttpError(499), which
    nobody reads)."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HttpError(CANCELLED, "the client is gone", type="cancelled", code="cancelled")
    finally:
        await _cancel(working)
        await _cancel(gone)


async def _cancel(task: "asyncio.Task[Any]") -> None:  # Any: whatever it would have given
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:  # Any: ASGI's messages
    while (await receive())["type"] != "http.disconnect":
        pass
