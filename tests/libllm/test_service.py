"""The SDK: dispatch, answers, failures, drain, lifeline."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from libllm.config import Home, ProcessEnvironment, child_environment
from libllm.events import Event, Holding, Post
from libllm.port import Port
from libllm.service import EXIT_BROKEN, EXIT_REFUSED, Handlers, Request, Service, Serving
from llmproto.base import Header
from llmproto.connection import Beat, Failed, Goodbye, Hello, Working
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import TokenizeAsk, Tokenized
from llmproto.metrics import MetricsAsk, MetricsText
from llmproto.operation import ProcessStarted, Status, StatusAsk

if TYPE_CHECKING:
    from tests.libllm.conftest import FakeKernel

SOURCE = b"c" * 16


class Echo(Service):
    """Answers at once, later, by asking itself, or not at all."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.release = asyncio.Event()
        self.handled = 0
        self.is_drained = False

    def handlers(self) -> Handlers:
        return {TokenizeAsk: self.tokenize, MetricsAsk: self.metrics}

    def holding(self) -> Holding:
        return Holding(self.handled)

    def address(self) -> str:
        return "here"

    async def drain(self) -> None:
        self.is_drained = True

    def tokenize(self, message: TokenizeAsk, request: Request) -> Tokenized:
        self.handled += 1
        if message.prompt == "bad":
            raise invalid("bad prompt")
        assert message.prompt != "worse", "an invariant"
        return Tokenized([self.handled], 1)

    async def metrics(self, message: MetricsAsk, request: Request) -> MetricsText:
        self.handled += 1
        await self.release.wait()
        status = await self.port.call(StatusAsk(), Status, cause=request.id)
        return MetricsText(status.version)


class Bench:
    """A running Echo."""

    def __init__(self, home: Home) -> None:
        made: list[Echo] = []

        def make(port: Port) -> Echo:
            made.append(Echo(port))
            return made[0]

        environment = ProcessEnvironment(home=home, process="echo-1", incarnation=4, proof=b"p")
        self.serving = Serving(make, role="echo", environment=environment)
        self.echo = made[0]
        self.task = asyncio.create_task(self.serving.run())


@pytest.fixture
async def bench(kernel: "FakeKernel", home: Home) -> AsyncIterator[Bench]:
    """A service that was welcomed and said that it is ready."""
    bench = Bench(home)
    await kernel.hear(ProcessStarted)
    yield bench
    bench.serving.end(0)
    await asyncio.gather(bench.task, return_exceptions=True)


async def test_it_greets_beats_and_says_that_it_is_ready(kernel: "FakeKernel", home: Home) -> None:
    bench = Bench(home)
    _, started = await kernel.hear(ProcessStarted)
    assert started.address == "here"
    hello = kernel.hellos[0]
    assert (hello.role, hello.process, hello.incarnation, hello.proof) == (
        "echo",
        "echo-1",
        4,
        b"p",
    )
    assert kernel.heard[:2] == [Hello, Beat]
    await kernel.stop()
    kernel.start()
    await kernel.hear(ProcessStarted)
    bench.serving.end(0)
    assert await bench.task == 0


async def test_what_a_handler_returns_goes_to_the_asker(kernel: "FakeKernel", bench: Bench) -> None:
    asked = kernel.say(TokenizeAsk(prompt="a"), source=SOURCE)
    header, answer = await kernel.hear(Tokenized)
    assert (header.peer, header.reply_to, answer.tokens) == (SOURCE, asked.id, [1])


async def test_refusals_are_answered(kernel: "FakeKernel", bench: Bench) -> None:
    kernel.say(TokenizeAsk(prompt="bad"), source=SOURCE)
    _, failed = await kernel.hear(Failed)
    assert (failed.kind, failed.detail) == (ErrorKind.INVALID, "bad prompt")
    kernel.say(StatusAsk(), source=SOURCE)
    _, failed = await kernel.hear(Failed)
    assert "takes no StatusAsk" in failed.detail


async def test_an_asynchronous_handler_asks_on_behalf_of_its_request(
    kernel: "FakeKernel", bench: Bench
) -> None:
    asked = kernel.say(MetricsAsk(), source=SOURCE)
    bench.echo.release.set()
    header, _ = await kernel.hear(StatusAsk)
    assert header.cause == asked.id
    kernel.say(Status(True, "7", 1, 1), answers=header)
    header, text = await kernel.hear(MetricsText)
    assert (header.reply_to, text.text) == (asked.id, "7")


async def test_a_failed_question_fails_the_request(kernel: "FakeKernel", bench: Bench) -> None:
    bench.echo.release.set()
    kernel.say(MetricsAsk(), source=SOURCE)
    header, _ = await kernel.hear(StatusAsk)
    kernel.say(Failed(ErrorKind.DENIED, "not you"), answers=header)
    _, failed = await kernel.hear(Failed)
    assert failed.kind is ErrorKind.DENIED


async def test_what_was_not_expected_ends_the_process(kernel: "FakeKernel", home: Home) -> None:
    bench = Bench(home)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: bench.serving.broke(context["exception"]))
    await kernel.hear(ProcessStarted)
    kernel.say(TokenizeAsk(prompt="worse"), source=SOURCE)
    with pytest.raises(AssertionError, match="an invariant"):
        await bench.task


async def test_a_refused_process_ends(kernel: "FakeKernel", home: Home) -> None:
    kernel.greets = False
    bench = Bench(home)
    header, _ = await kernel.hear(Hello)
    kernel.say(Failed(ErrorKind.DENIED, "used already"), answers=header)
    assert await bench.task == EXIT_REFUSED


async def test_sigterm_drains_and_says_so(kernel: "FakeKernel", bench: Bench) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    _, goodbye = await kernel.hear(Goodbye)
    assert goodbye.reason == "draining"
    assert await bench.task == 0 and bench.echo.is_drained


async def test_announcements(kernel: "FakeKernel", bench: Bench) -> None:
    bench.serving.port.working("loading", budget_ms=5_000)
    _, working = await kernel.hear(Working)
    assert working == Working("loading", 5_000)


def test_an_answer_is_sent_once() -> None:
    async def scenario() -> list[Event]:
        sent: list[Event] = []
        request = Request(Header(1, 0x0107, bytes(16)), Port(sent.append))
        request.reply(Tokenized([], 1))
        request.fail(RemoteError(ErrorKind.INTERNAL, "late"))
        return sent

    (post,) = asyncio.run(scenario())
    assert isinstance(post, Post) and post.reply_to == bytes(16)


PROGRAM = """
import sys
from libllm.config import Home, ProcessEnvironment
from libllm.service import Service, run
from pathlib import Path

class Broken(Service):
    def handlers(self):
        return {}
    async def start(self):
        if sys.argv[1] == "break":
            raise ValueError("cannot start")
        print("up", flush=True)

environment = ProcessEnvironment(home=Home(Path(sys.argv[2])), lifeline_fd=0)
run(lambda port: Broken(), role="broken", environment=environment)
"""


def start(home: Home, how: str) -> "subprocess.Popen[bytes]":
    """A whole process of a service, whose lifeline is its standard input."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how, str(home.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(),
    )


def test_a_process_that_breaks_says_why_and_exits_otherwise_than_0(home: Home) -> None:
    process = start(home, "break")
    assert process.wait(timeout=60) == EXIT_BROKEN
    _, words = process.communicate(timeout=60)
    assert b"cannot start" in words and b"broken" in words


def test_the_end_of_the_lifeline_ends_the_process_at_once(home: Home) -> None:
    process = start(home, "live")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.communicate(timeout=60)  # closes the lifeline
    assert process.returncode == 0
