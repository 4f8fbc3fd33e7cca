"""A kernel that tests play by hand: a real ROUTER on a real socket, which only greets by itself."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest
import zmq
import zmq.asyncio
from libllm.config import Home
from llmproto import wire
from llmproto.base import Header, Message
from llmproto.connection import Hello, Welcome
from llmproto.kinds import kind_of

MessageT = TypeVar("MessageT", bound=Message)
PATIENCE_S = 20.0


class FakeKernel:
    """Greets every peer; all else waits in `inbox` until the test answers it."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.epoch = 0
        self.greets = True
        self.hellos: list[Hello] = []
        self.blobs: tuple[bytes, ...] = ()
        """Of the message that came last."""
        self.heard: list[type[Message]] = []
        self.inbox: asyncio.Queue[tuple[Header, Message]] = asyncio.Queue()
        self._peer = b""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Bind, as another incarnation than before."""
        self.epoch += 1
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.home.endpoint)
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Die."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self._socket.close()
            self._context.term()

    def say(
        self,
        message: Message,
        *,
        answers: Header | None = None,
        source: bytes = b"",
        blobs: tuple[bytes, ...] = (),
    ) -> Header:
        """Send to the peer that spoke last."""
        header = Header(
            version=1,
            kind=kind_of(message),
            id=os.urandom(16),
            reply_to=None if answers is None else answers.id,
            source=source,
            epoch=self.epoch,
            blobs=list(map(len, blobs)),
        )
        self._socket.send_multipart([self._peer, *wire.encode(header, message, blobs)])
        return header

    async def hear(self, wanted: type[MessageT]) -> tuple[Header, MessageT]:
        """The next message of this type; others before it are dropped."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                header, message = await self.inbox.get()
                if isinstance(message, wanted):
                    return header, message

    async def _serve(self) -> None:
        while True:
            self._peer, *frames = await self._socket.recv_multipart()
            header = wire.decode_header(frames)
            message = wire.decode_opaque(header.kind, frames[1])
            self.heard.append(type(message))
            self.blobs = tuple(frames[2:])
            if isinstance(message, Hello):
                self.hellos.append(message)
                if self.greets:
                    welcome = Welcome(self.epoch, bytes(16), 1, 500, message.session, 0)
                    self.say(welcome, answers=header)
            self.inbox.put_nowait((header, message))


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An empty home with an operator's key."""
    home = Home(Path(tmp_path_factory.mktemp("h")))
    home.make()
    home.operator_key.write_bytes(bytes(32))
    return home


@pytest.fixture
async def kernel(home: Home) -> AsyncIterator[FakeKernel]:
    """A kernel that listens in that home."""
    kernel = FakeKernel(home)
    kernel.start()
    yield kernel
    await kernel.stop()
