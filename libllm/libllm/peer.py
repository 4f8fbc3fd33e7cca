"""Session, transport and one timer on an event loop: what every peer of the kernel consists of."""

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Callable

from llmproto import wire
from llmproto.connection import Hello
from llmproto.errors import RemoteError

from libllm.events import (
    Connected,
    Disconnected,
    Effect,
    Event,
    Holding,
    MessageArrived,
    Send,
    SendRefused,
    Wake,
    Woke,
)
from libllm.session import Session
from libllm.transport import Transport


def new_hello(
    *, role: str, proof: bytes, process: str | None = None, incarnation: int = 0
) -> Hello:
    """What this process says of itself, under a session of its own."""
    return Hello(
        session=os.urandom(16),
        role=role,
        proof=proof,
        process=process,
        incarnation=incarnation,
        pid=os.getpid(),
    )


class Peer:
    """Feeds a session and performs what it asks; effects that mean something to the owner go to
    `deliver`."""

    def __init__(
        self,
        endpoint: str,
        hello: Hello,
        *,
        server_key: str | None = None,
        deliver: Callable[[Effect], None],
        holding: Callable[[], Holding] = Holding,
    ) -> None:
        """Connects in the background; must be made by the running event loop."""
        self.session = Session(hello, random.SystemRandom(), holding=holding)
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._events: deque[Event] = deque()
        self._is_feeding = False
        self._transport = Transport(
            endpoint,
            server_key=server_key,
            arrived=self._arrived,
            connected=lambda: self.feed(Connected()),
            disconnected=lambda: self.feed(Disconnected()),
        )

    def feed(self, event: Event) -> None:
        """Tell the session, and do what follows, in order: an event that the owner feeds while
        effects are being done waits until they are, or an older Wake would undo a newer one."""
        self._events.append(event)
        if self._is_feeding:
            return
        self._is_feeding = True
        try:
            while self._events:
                self._do(self.session.handle(time.monotonic_ns(), self._events.popleft()))
        finally:
            self._is_feeding = False

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Wake():
                    self._wake(effect.at_ns)
                case _:
                    self._deliver(effect)

    def close(self) -> None:
        """Give up socket and timer; say Leave first where that is wanted."""
        if self._timer is not None:
            self._timer.cancel()
        self._transport.close(linger_ms=100)

    def _send(self, effect: Send) -> None:
        try:
            frames = wire.encode(effect.header, effect.message, effect.blobs)
        except RemoteError as error:
            header = effect.header
            refused = SendRefused(
                header.id, error.kind, error.detail, reply_to=header.reply_to, peer=header.peer
            )
            self._loop.call_soon(self.feed, refused)
        else:
            self._transport.send(frames)

    def _arrived(self, frames: list[bytes]) -> None:
        """Decode; what the kernel sends and this side cannot read is dropped, as an older peer
        must."""
        try:
            header = wire.decode_header(frames)
            message = wire.decode_opaque(header.kind, frames[1])
        except RemoteError:
            return
        self.feed(MessageArrived(header, message, tuple(frames[2:])))

    def _wake(self, at_ns: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at_ns is not None:
            delay_s = max(0.0, (at_ns - time.monotonic_ns()) / 1e9)
            self._timer = self._loop.call_later(delay_s, self._woke)

    def _woke(self) -> None:
        self._timer = None
        self.feed(Woke())
