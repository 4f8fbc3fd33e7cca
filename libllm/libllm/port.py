"""What a peer says to the others: messages, questions, announcements; and who hears the answers and
the streams."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from llmproto.base import Message
from llmproto.connection import Failed, Working
from llmproto.errors import ErrorKind, RemoteError

from libllm.events import Answer, Call, Event, Forget, Post, StreamFailed, StreamRow
from libllm.plugins import NO_KINDS, Kinds

MessageT = TypeVar("MessageT", bound=Message)


class Reply(NamedTuple, Generic[MessageT]):
    """An answer with the frames behind its body."""

    message: MessageT
    blobs: tuple[bytes, ...]


class Listener(Protocol):
    """Whoever reads a stream."""

    def row(self, row: StreamRow) -> None:
        """The next text; to be answered with Consumed once the caller has it."""

    def failed(self, failure: StreamFailed) -> None:
        """No more will come."""


class Port:
    """The way out of a service or a client.

    Its methods belong to the event loop's thread; another thread uses
    `loop.call_soon_threadsafe(port.send, ...)`. Invariant: every question is answered exactly once,
    and the answer forgets it.
    """

    def __init__(self, feed: Callable[[Event], None]) -> None:
        self.feed = feed
        """Tell the session an event."""
        self._loop = asyncio.get_running_loop()
        self._calls = 0
        self._waiting: dict[int, Callable[[Answer], None]] = {}
        self._listeners: dict[bytes, Listener] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that this port belongs to."""
        return self._loop

    def send(
        self,
        message: Message,
        *,
        target: str = "kernel",
        peer: bytes | None = None,
        cause: bytes | None = None,
        reply_to: bytes | None = None,
        tenant: int | None = None,
        blobs: Sequence[bytes] = (),
        kinds: Kinds = NO_KINDS,
    ) -> None:
        """Say it once. It is lost where the connection is down: whoever needs it asks or is told
        again.

        `kinds` is the table of the plug-in service that the message belongs to, if it is one's.
        """
        self.feed(
            Post(
                kinds.pack(message),
                target,
                peer=peer,
                cause=cause,
                reply_to=reply_to,
                tenant=tenant,
                blobs=tuple(blobs),
            )
        )

    def ask(
        self,
        message: Message,
        then: Callable[[Message], None],
        *,
        target: str = "kernel",
        cause: bytes | None = None,
        tenant: int | None = None,
        deadline_ns: int | None = None,
        once: bool = False,
        wait_exhausted: bool = False,
    ) -> int:
        """Say it until it is answered, then call `then` with the answer, which may be Failed. Gives
        its number."""
        return self.begin(
            lambda call: Call(
                call,
                message,
                target,
                cause=cause,
                tenant=tenant,
                deadline_ns=deadline_ns,
                once=once,
                wait_exhausted=wait_exhausted,
            ),
            then,
        )

    def begin(self, make: Callable[[int], Event], then: Callable[[Message], None]) -> int:
        """Feed the event made of a new call's number; `then` gets its answer."""
        return self._begin(make, lambda answer: then(answer.message))

    def _begin(self, make: Callable[[int], Event], then: Callable[[Answer], None]) -> int:
        self._calls += 1
        self._waiting[self._calls] = then
        self.feed(make(self._calls))
        return self._calls

    def forget(self, call: int) -> None:
        """The answer to this question is no longer wanted."""
        if self._waiting.pop(call, None) is not None:
            self.feed(Forget(call))

    async def call(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str = "kernel",
        cause: bytes | None = None,
        tenant: int | None = None,
        deadline_ns: int | None = None,
        once: bool = False,
        wait_exhausted: bool = False,
    ) -> MessageT:
        """Say it until it is answered, and give the answer; raises RemoteError where that is
        Failed."""
        reply = await self.exchange(
            message,
            answer,
            target=target,
            cause=cause,
            tenant=tenant,
            deadline_ns=deadline_ns,
            once=once,
            wait_exhausted=wait_exhausted,
        )
        return reply.message

    async def exchange(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str,
        blobs: Sequence[bytes] = (),
        kinds: Kinds = NO_KINDS,
        cause: bytes | None = None,
        tenant: int | None = None,
        deadline_ns: int | None = None,
        once: bool = False,
        wait_exhausted: bool = False,
    ) -> Reply[MessageT]:
        """As `call`, with raw bytes behind the message and its answer; `kinds` is the table of the
        service asked, where that is a plug-in."""
        future: asyncio.Future[Answer] = self._loop.create_future()

        def settle(found: Answer) -> None:
            if not future.done():
                future.set_result(found)

        number = self._begin(
            lambda call: Call(
                call,
                kinds.pack(message),
                target,
                cause=cause,
                tenant=tenant,
                deadline_ns=deadline_ns,
                once=once,
                wait_exhausted=wait_exhausted,
                blobs=tuple(blobs),
            ),
            settle,
        )
        try:
            found = await future
        finally:
            self.forget(number)
        return Reply(expect(kinds.unpack(found.message), answer), found.blobs)

    def working(self, what: str, *, budget_ms: int) -> None:
        """Announce that for so long no progress will be seen; 0 takes it back."""
        self.send(Working(what, budget_ms))

    def listen(self, stream: bytes, listener: Listener | None) -> None:
        """Who reads this stream from now on; None: nobody."""
        if listener is None:
            self._listeners.pop(stream, None)
        else:
            self._listeners[stream] = listener

    def deliver(self, effect: Answer | StreamRow | StreamFailed) -> None:
        """The session has something for whoever asked or listens."""
        if isinstance(effect, Answer):
            then = self._waiting.pop(effect.call, None)
            if then is not None:
                then(effect)
            return
        listener = self._listeners.get(effect.stream)
        if listener is None:
            return
        if isinstance(effect, StreamRow):
            listener.row(effect)
        else:
            listener.failed(effect)


def expect(found: Message, wanted: type[MessageT]) -> MessageT:
    """The answer, if it is the wanted one; RemoteError otherwise."""
    if isinstance(found, wanted):
        return found
    if isinstance(found, Failed):
        raise RemoteError(found.kind, found.detail, retry_after_ms=found.retry_after_ms)
    raise RemoteError(
        ErrorKind.INTERNAL, f"answered by {type(found).__name__}, not {wanted.__name__}"
    )
