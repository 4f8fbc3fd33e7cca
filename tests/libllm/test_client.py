"""The clients against a kernel and a sink that the test plays."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from libllm.client import AsyncClient, open_client
from libllm.config import Home
from libllm.generation import Generation
from libllm.listening import stream_id
from libllm.loopthread import LoopThread
from libllm.results import Piece
from libllm.sync import Client, connect
from llmproto import limits
from llmproto.connection import Failed, Goodbye
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import (
    Accepted,
    Attach,
    Attached,
    Generate,
    StreamAcked,
    StreamEnd,
    Text,
    TextScore,
)
from llmproto.operation import Processes, ProcessesAsk, ProcessKill, ProcessRow, ProcessState
from llmproto.tenants import KeyAdd
from llmproto.threads import Done, ThreadCancel

if TYPE_CHECKING:
    from tests.libllm.conftest import FakeKernel

THREAD = b"t" * 8


@pytest.fixture
async def llm(kernel: "FakeKernel", home: Home) -> AsyncIterator[AsyncClient]:
    """A connected client."""
    client = await open_client(home)
    yield client
    await client.aclose()


async def accept(kernel: "FakeKernel") -> tuple[Generate, list[bytes]]:
    """Accept the next request; gives it and its streams."""
    header, generate = await kernel.hear(Generate)
    count = generate.choices
    threads = [bytes((index,)) * 8 for index in range(count)]
    kernel.say(Accepted(threads, "tiny", 2), answers=header)
    return generate, [stream_id(generate.key, index) for index in range(count)]


def end(reason: str = "length", tokens: int = 2) -> StreamEnd:
    """An end."""
    return StreamEnd(reason, tokens, 2)


async def test_a_completion_with_all_choices(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.generate("Once", n=2, max_tokens=2, logprobs=0, seed=5))
    generate, (one, two) = await accept(kernel)
    assert (generate.prompt, generate.output_tokens_max, generate.sampling.seed) == ("Once", 2, 5)
    scores: list[list[TextScore] | None]
    scores = [[TextScore(" a", 7, -0.5)], [TextScore(" b", 8, -0.5)]]
    kernel.say(Text([one, two], [0, 0], [" a", " b"], [1, 1], [None, None], scores))
    more = [[TextScore("!", 9, -0.1)], None]
    kernel.say(Text([one, two], [2, 2], ["!", ""], [2, 1], [end(), end("stop", 1)], more))
    completion = await task
    assert (completion.text, completion.tokens, completion.finish_reason) == (
        " a!",
        [7, 9],
        "length",
    )
    assert [choice.text for choice in completion.choices] == [" a!", " b"]
    assert (completion.usage.prompt_tokens, completion.usage.output_tokens) == (2, 3)
    _, acked = await kernel.hear(StreamAcked)
    assert acked.ended == [True, True]


async def test_a_stream_survives_the_kernel(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.generate([1, 2], stream=True))
    _, (stream,) = await accept(kernel)
    generation = await task
    kernel.say(Text([stream], [0], ["Hé"], [1], [None]))
    assert (await anext(generation)).text == "Hé"
    await kernel.stop()
    kernel.start()
    header, attach = await kernel.hear(Attach)
    assert attach == Attach(stream, 3, 0)
    kernel.say(Attached(THREAD, "tiny", 5), answers=header)
    kernel.say(Text([stream], [0], ["Héllo"], [3], [end()]))
    pieces = [piece async for piece in generation]
    assert [piece.text for piece in pieces] == ["llo"]
    assert pieces[-1].finish_reason == "length" and pieces[-1].offset == 6


async def test_what_is_not_read_is_not_acknowledged(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.generate("x", stream=True))
    _, (stream,) = await accept(kernel)
    generation = await task
    kernel.say(Text([stream], [0], ["a" * 200], [200], [None]))
    assert (await generation.take())[0].tokens == 200
    asking = asyncio.create_task(llm.ps())
    header, _ = await kernel.hear(ProcessesAsk)
    kernel.say(Processes([]), answers=header)
    await asking
    assert StreamAcked not in kernel.heard
    kernel.say(Text([stream], [200], ["b"], [201], [None]))
    await generation.take()
    _, acked = await kernel.hear(StreamAcked)
    assert acked.tokens == [200]


async def test_leaving_a_stream_cancels_it(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.generate("x", stream=True))
    await accept(kernel)
    async with await task:
        pass
    _, cancel = await kernel.hear(ThreadCancel)
    assert cancel.thread == bytes(8)


async def test_a_cancelled_task_cancels_its_thread(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.generate("x"))
    header, _ = await kernel.hear(Generate)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    kernel.say(Accepted([THREAD], "tiny", 2), answers=header)
    _, cancel = await kernel.hear(ThreadCancel)
    assert cancel.thread == THREAD


async def test_a_detached_stream_is_resumed_where_it_was_left(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    task = asyncio.create_task(llm.generate("x", stream=True, resumable=True))
    _, (stream,) = await accept(kernel)
    generation = await task
    kernel.say(Text([stream], [0], ["é"], [1], [None]))
    kernel.say(Text([stream], [2], ["b"], [2], [None]))
    assert (await anext(generation)).text == "é"
    assert generation.detach() == [(stream, 2)]
    resuming = asyncio.create_task(llm.resume(stream.hex(), 2))
    header, attach = await kernel.hear(Attach)
    assert attach == Attach(stream, 2, 0)
    kernel.say(Attached(THREAD, "tiny", 3), answers=header)
    kernel.say(Text([stream], [2], ["bc"], [3], [end()]))
    resumed = await resuming
    # What was on its way when the stream was left may come first, as a piece of its own.
    assert "".join([piece.text async for piece in resumed]) == "bc"


async def test_refusals_and_errors_are_raised(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.generate("x"))
    header, _ = await kernel.hear(Generate)
    kernel.say(Failed(ErrorKind.INVALID, "no model `x`"), answers=header)
    with pytest.raises(RemoteError, match="no model"):
        await task
    task = asyncio.create_task(llm.generate("x"))
    _, (stream,) = await accept(kernel)
    broken = StreamEnd("error", 1, 1, error=ErrorKind.INTERNAL, detail="it crashed twice")
    kernel.say(Text([stream], [0], [""], [1], [broken]))
    with pytest.raises(RemoteError, match="it crashed twice"):
        await task


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"n": 0}, "choices"),
        ({"n": limits.CHOICES_MAX + 1}, "choices"),
        ({"stop": ["x"] * 17}, "stops"),
        ({"top_p": "much"}, "top_p"),
        ({"temprature": 1.0}, "temprature"),
        ({"max_tokens": -5}, "output_tokens_max"),
    ],
)
async def test_options_out_of_range_are_refused_before_anything_is_sent(
    llm: AsyncClient, options: dict[str, object], words: str
) -> None:
    with pytest.raises(RemoteError, match=words) as refused:
        await llm.generate("x", **options)  # type: ignore[call-overload]  # what a caller got wrong
    assert refused.value.kind is ErrorKind.INVALID


async def test_looking_and_killing(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.ps())
    header, _ = await kernel.hear(ProcessesAsk)
    rows = [ProcessRow("executor-1", "executor", 7, ProcessState.READY, 1, 5)]
    kernel.say(Processes(rows), answers=header)
    assert await task == rows
    killing = asyncio.create_task(llm.kill("executor-1"))
    header, kill = await kernel.hear(ProcessKill)
    assert (kill.name, kill.signal) == ("executor-1", 9)
    kernel.say(Done(), answers=header)
    await killing
    killing = asyncio.create_task(llm.kill(THREAD.hex()))
    header, cancel = await kernel.hear(ThreadCancel)
    assert cancel.thread == THREAD
    kernel.say(Done(), answers=header)
    await killing


async def test_a_kernel_that_dies_of_its_order_has_obeyed(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    killing = asyncio.create_task(llm.kill("kernel"))
    await kernel.hear(ProcessKill)
    await kernel.stop()
    await killing
    kernel.start()


async def test_a_new_key_is_shown_once_and_sent_as_digest(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    adding = asyncio.create_task(llm.add_key("me"))
    header, add = await kernel.hear(KeyAdd)
    kernel.say(Done(), answers=header)
    key = await adding
    assert key.startswith("llmos-") and key.encode() not in add.digest
    assert len(add.digest) == 32


async def test_closing_says_goodbye(kernel: "FakeKernel", home: Home) -> None:
    client = await open_client(home)
    await client.aclose()
    _, goodbye = await kernel.hear(Goodbye)
    assert goodbye.reason == "done"


async def test_where_nothing_runs_connecting_says_so_at_once(home: Home) -> None:
    with pytest.raises(RemoteError, match="llmos up") as refused:
        await asyncio.to_thread(connect, home.root)
    assert refused.value.kind is ErrorKind.UNAVAILABLE


async def test_the_synchronous_client_streams(kernel: "FakeKernel", home: Home) -> None:
    got: list[Piece] = []

    def program() -> None:
        loop = LoopThread()
        with Client(loop, loop.run(open_client(home))) as llm:
            pieces = llm.chat([{"role": "user", "content": "Hi"}], stream=True)
            got.extend(pieces)
            with llm.generate("x", stream=True) as unread:
                assert len(unread.threads) == 1

    thread = threading.Thread(target=program)
    thread.start()
    generate, (stream,) = await accept(kernel)
    assert generate.messages is not None and generate.messages[0].content == "Hi"
    kernel.say(Text([stream], [0], ["Good"], [1], [None]))
    kernel.say(Text([stream], [4], [" day"], [2], [end("stop")]))
    await accept(kernel)
    header, _ = await kernel.hear(ThreadCancel)
    kernel.say(Done(), answers=header)
    await kernel.hear(Goodbye)
    await asyncio.to_thread(thread.join)
    assert "".join(piece.text for piece in got) == "Good day"
    assert got[-1].finish_reason == "stop"


def test_a_generation_is_an_asynchronous_iterator() -> None:
    assert issubclass(Generation, AsyncIterator)
