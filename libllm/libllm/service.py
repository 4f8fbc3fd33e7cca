"""The SDK for authors of services: a class with typed handlers, and `run`.

    class Echo(Service):
        def handlers(self) -> Handlers:
            return {TokenizeAsk: self.tokenize}

        def tokenize(self, message: TokenizeAsk, request: Request) -> Tokenized:
            return Tokenized([], 1)

    run(lambda port: Echo(), role="echo", environment=ProcessEnvironment.read())

A plug-in has messages of its own kinds (`libllm.plugins`) and gives their table as `kinds`. For the
system to start it by its name, its distribution names its module in the entry-point group
`llmos.services`; `python -m` of that module must come to `run`.

A service dies of what it did not expect, and its supervisor starts it again: the one broad `except`
of a service's process stands here.
"""

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import uvloop
from llmproto import limits
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import Note, ProcessStarted
from llmproto.threads import Done

from libllm import logs
from libllm.config import ProcessEnvironment
from libllm.events import (
    Answer,
    Arrived,
    Effect,
    Event,
    Fatal,
    Holding,
    Leave,
    Lost,
    Send,
    StreamFailed,
    StreamRow,
    Wake,
    Welcomed,
)
from libllm.peer import Peer, new_hello
from libllm.plugins import NO_KINDS, Kinds
from libllm.port import Port

EXIT_CANNOT_START: Final = 1
"""Something outside is in the way, such as a port that is taken."""
NOTE_NS: Final = 2_000_000_000
"""How long a process that cannot start waits for the kernel to hear why."""
EXIT_BROKEN: Final = 70
"""sysexits.h EX_SOFTWARE: an invariant broke."""
EXIT_REFUSED: Final = 77
"""sysexits.h EX_NOPERM: the kernel will not have this process."""
DRAIN_S: Final = limits.STOPPING_MS_MAX / 1000 * 0.75
"""What is left of the time between SIGTERM and SIGKILL after some safety."""


class Request:
    """One message that came, and the way to answer it; an answer is sent at most once."""

    __slots__ = ("_is_answered", "_kinds", "_port", "blobs", "header")

    def __init__(
        self,
        header: Header,
        port: Port,
        blobs: tuple[bytes, ...] = (),
        kinds: Kinds = NO_KINDS,
    ) -> None:
        self.header = header
        """As the kernel passed it on: `source`, `tenant` and `id` are its word."""
        self.blobs = blobs
        """The raw frames behind the body."""
        self._kinds = kinds
        self._port = port
        self._is_answered = False

    @property
    def id(self) -> bytes:
        """Cite it as the cause of what is done on its behalf."""
        return self.header.id

    @property
    def source(self) -> bytes:
        """Session of the asker; empty where the kernel itself asks."""
        return self.header.source

    @property
    def tenant(self) -> int | None:
        """Who pays."""
        return self.header.tenant

    @property
    def is_answered(self) -> bool:
        """Whether reply or fail was called."""
        return self._is_answered

    def reply(self, message: Message, *, blobs: Sequence[bytes] = ()) -> None:
        """Answer."""
        if self._is_answered:
            return
        self._is_answered = True
        source = self.header.source
        self._port.send(
            message,
            peer=source or None,
            reply_to=self.header.id,
            blobs=blobs,
            kinds=self._kinds,
        )

    def fail(self, error: RemoteError) -> None:
        """Refuse."""
        detail = error.detail[: limits.DETAIL_BYTES_MAX]
        self.reply(Failed(error.kind, detail, error.retry_after_ms))


Handler = Callable[[Any, Request], Message | Awaitable[Message | None] | None]
"""Takes a message of the type that it stands for in the table (hence Any: each has its own); what
it returns is the reply (with blobs: `request.reply`). RemoteError is the refusal."""
Handlers = Mapping[type[Message], Handler]


class Service:
    """What a service may define; only `handlers` must."""

    def handlers(self) -> Handlers:
        """Which method takes which message.  Asked once."""
        raise NotImplementedError

    def kinds(self) -> Kinds:
        """A plug-in's own messages.  Asked once."""
        return NO_KINDS

    def holding(self) -> Holding:
        """What each Beat tells: progress, and the threads that it keeps."""
        return Holding()

    async def start(self) -> None:
        """Load what is needed; runs beside the handlers, and when it returns the service counts as
        ready. RemoteError: it cannot start, and its detail tells people why."""

    def address(self) -> str:
        """Where it can be reached from outside, once ready."""
        return ""

    def welcomed(self) -> None:
        """The connection stands (again): say what the kernel must know beyond the Beat."""

    async def drain(self) -> None:
        """SIGTERM came: finish what can be finished quickly."""


class Serving:
    """One service at work: dispatches messages to its handlers.

    Invariant: a request that is being handled is not handled a second time beside that; the first
    failure wins.
    """

    def __init__(
        self,
        make: Callable[[Port], Service],
        *,
        role: str,
        environment: ProcessEnvironment,
    ) -> None:
        """Connects in the background; must be made by the running event loop.

        `make` gives the service its port, on which it may not send before its `start` is called.
        """
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._tasks: dict[asyncio.Task[Message | None], tuple[bytes, bytes]] = {}
        self._handling: set[tuple[bytes, bytes]] = set()
        self._is_ready = False
        self.logger = logs.configure(environment.process or role)
        self.port = Port(self._feed)
        self.service = make(self.port)
        self._handlers = dict(self.service.handlers())
        self._kinds = self.service.kinds()
        hello = new_hello(
            role=role,
            proof=environment.proof,
            process=environment.process,
            incarnation=environment.incarnation,
        )
        self.peer = Peer(
            environment.endpoint,
            hello,
            server_key=environment.server_key,
            deliver=self._deliver,
            holding=self.service.holding,
        )

    async def run(self) -> int:
        """Serve until told to end; gives the exit code."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop(stop))
        try:
            return await self._ended
        finally:
            starting.cancel()
            stopping.cancel()
            self.peer.close()

    def end(self, code: int) -> None:
        """Make `run` return."""
        if not self._ended.done():
            self._ended.set_result(code)

    def broke(self, error: BaseException) -> None:
        """Something that must not happen did: the process ends, and its supervisor starts
        another."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _start(self) -> None:
        try:
            await self.service.start()
        except RemoteError as error:
            await self._cannot_start(error)
            return
        except Exception as error:
            self.broke(error)
            return
        self._is_ready = True
        self.port.send(ProcessStarted(self.service.address()))

    async def _cannot_start(self, error: RemoteError) -> None:
        """Something outside is not as the service needs it: people are told what, no trace."""
        self.logger.error("cannot_start", kind=error.kind, detail=error.detail)
        deadline_ns = time.monotonic_ns() + NOTE_NS
        with contextlib.suppress(RemoteError):
            await self.port.call(Note(error.detail), Done, deadline_ns=deadline_ns)
        self.end(EXIT_CANNOT_START)

    async def _stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        try:
            async with asyncio.timeout(DRAIN_S):
                await self.service.drain()
                if self._tasks:
                    await asyncio.wait(list(self._tasks))
        except TimeoutError:
            self.logger.warning("drained_partly", tasks=len(self._tasks))
        self._feed(Leave(draining=True))
        self.end(0)

    def _feed(self, event: Event) -> None:
        self.peer.feed(event)

    def _deliver(self, effect: Effect) -> None:
        match effect:
            case Arrived():
                self._handle(effect)
            case Answer() | StreamRow() | StreamFailed():
                self.port.deliver(effect)
            case Welcomed():
                self.service.welcomed()
                if self._is_ready:
                    self.port.send(ProcessStarted(self.service.address()))
            case Fatal():
                self.logger.error("refused", kind=effect.kind, detail=effect.detail)
                self.end(EXIT_REFUSED)
            case Lost():
                self.logger.info("connection_lost")
            case Send() | Wake():
                pass

    def _handle(self, arrived: Arrived) -> None:
        """Call the handler; a RemoteError is the answer, anything else the end of this process."""
        header = arrived.header
        request = Request(header, self.port, arrived.blobs, self._kinds)
        try:
            message = self._kinds.unpack(arrived.message)
        except RemoteError as error:
            request.fail(error)
            return
        handler = self._handlers.get(type(message))
        name = (header.source, header.id)
        if handler is None:
            detail = f"this service takes no {type(message).__name__}"
            request.fail(RemoteError(ErrorKind.INVALID, detail))
            return
        if name in self._handling:
            return  # Its answer is on the way.
        try:
            result = handler(message, request)
        except RemoteError as error:
            request.fail(error)
            return
        if result is None:
            return
        if isinstance(result, Message):
            request.reply(result)
            return
        assert inspect.iscoroutine(result), result
        task: asyncio.Task[Message | None] = asyncio.create_task(result)
        self._handling.add(name)
        self._tasks[task] = name
        task.add_done_callback(lambda done: self._handled(done, request))

    def _handled(self, task: "asyncio.Task[Message | None]", request: Request) -> None:
        self._handling.discard(self._tasks.pop(task))
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, RemoteError):
            request.fail(error)
        elif error is not None:
            self.broke(error)
        elif (answer := task.result()) is not None:
            request.reply(answer)


async def serve(
    make: Callable[[Port], Service],
    *,
    role: str,
    environment: ProcessEnvironment,
    serving: type[Serving] = Serving,
) -> int:
    """Serve until SIGTERM or a refusal; gives the exit code, raises what the service did not
    expect."""
    if environment.lifeline_fd is not None:
        hold_lifeline(environment.lifeline_fd)
    at_work = serving(make, role=role, environment=environment)
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: at_work.broke(_exception_of(context))
    )
    return await at_work.run()


def run(
    make: Callable[[Port], Service],
    *,
    role: str,
    environment: ProcessEnvironment,
    serving: type[Serving] = Serving,
) -> None:
    """The whole process of a service; ends it, with a code other than 0 where something broke."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(serve(make, role=role, environment=environment, serving=serving))
    except Exception:
        logger = logs.configure(environment.process or role)
        logger.critical("broken", exc_info=True)
        code = EXIT_BROKEN
    sys.stderr.flush()
    # Threads that still compute (a step, a load) must not hold up the end.
    os._exit(code)


def hold_lifeline(fd: int) -> None:
    """End this process at once when init is gone, which closes the other end of this pipe."""
    asyncio.get_running_loop().add_reader(fd, os._exit, 0)


def _exception_of(context: dict[str, Any]) -> BaseException:  # Any: asyncio's own type
    error = context.get("exception")
    if isinstance(error, BaseException):
        return error
    return RuntimeError(str(context.get("message")))
