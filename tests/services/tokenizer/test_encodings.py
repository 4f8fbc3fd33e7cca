"""Calls of encoders in the tokenizer: answered by their vectors, asked for again when they are
lost."""

import asyncio
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from libllm.events import Post
from libllm.service import Request
from llmproto.base import Header
from llmproto.connection import Failed
from llmproto.encoding import Encode, Encoded, Vectors
from llmproto.errors import ErrorKind, RemoteError
from llmproto.models import ModelAdd
from llmproto.threads import (
    END_CANCEL,
    END_ERROR,
    Committed,
    SinkAcked,
    SinkDrop,
    SinkOpen,
    ThreadSpawn,
)
from llmservices.tokenizer.service import Tokenizer

from ..encoders import make
from .test_service import READER, Kernel

KEY = b"k" * 16
THREAD = b"thread01"
BLOB = bytes(range(16))


class Desk:
    """A tokenizer that knows one encoder, and one call under way."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.tokenizer = Tokenizer(self.kernel, built_in=())

    def request(self, source: bytes = READER, blobs: tuple[bytes, ...] = ()) -> Request:
        header = Header(1, 0x0B01, b"q" * 16, source=source, tenant=1)
        return Request(header, self.kernel, blobs)

    async def begin(self) -> "asyncio.Task[None]":
        encode = Encode(key=KEY, model="e", texts=["w1", "w2 w3"])
        task = asyncio.create_task(self.tokenizer.encode(encode, self.request()))
        await self.held()
        return task

    async def held(self) -> None:
        """Until a call is under way."""
        while not self.tokenizer.holding().threads:  # noqa: ASYNC110 - turns of one loop
            await asyncio.sleep(0)

    def vectors(self, thread: bytes = THREAD, *, size: int = 16) -> None:
        said = Vectors([thread], [5], [0], [size], 2)
        self.tokenizer.vectors(said, self.request(b"", (BLOB,)))

    def answers(self) -> list[Post]:
        return [post for post in self.kernel.posts if isinstance(post.message, Encoded)]


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> Desk:
    made = Desk()
    folder, _ = make(tmp_path / "e")
    await made.tokenizer.add_model(ModelAdd(str(folder)), made.request())
    assert made.kernel.models["e"].task == "embed"
    return made


async def test_a_call_is_a_thread_and_its_vectors_are_the_answer(desk: Desk) -> None:
    task = await desk.begin()
    (spawn,) = desk.kernel.asked(ThreadSpawn)
    assert (spawn.lengths, spawn.output_tokens_max, spawn.sink_state) == ([3, 4], 0, b"")
    held = desk.tokenizer.holding()
    assert (held.threads, held.positions) == ([THREAD], [6])
    desk.vectors()
    await task
    (post,) = desk.answers()
    assert post.message == Encoded("e", 2, [3, 4])
    assert (post.blobs, post.peer) == ((BLOB,), READER)
    assert desk.tokenizer.holding().threads == []


async def test_vectors_of_nobodys_call_are_lost(desk: Desk) -> None:
    desk.vectors()
    assert not desk.answers()


async def test_vectors_of_another_size_are_no_answer(desk: Desk) -> None:
    task = await desk.begin()
    desk.vectors(size=8)
    with pytest.raises(RemoteError, match="8 bytes of vectors came where 16"):
        await task


async def test_lost_vectors_are_asked_for_again_under_the_same_key(desk: Desk) -> None:
    task = await desk.begin()
    desk.tokenizer.sink_drop(SinkDrop([THREAD]), desk.request(b""))
    await desk.held()
    one, other = desk.kernel.asked(ThreadSpawn)
    assert one == other
    desk.vectors(b"thread02")
    await task
    assert len(desk.answers()) == 1


@pytest.mark.parametrize(
    ("end", "error", "kind", "says"),
    [
        (END_ERROR, "INTERNAL: it is not tried again", ErrorKind.INTERNAL, "not tried again"),
        (END_CANCEL, "", ErrorKind.DEADLINE, "cancelled"),
    ],
)
async def test_an_end_without_vectors_is_a_refusal(
    desk: Desk, end: int, error: str, kind: ErrorKind, says: str
) -> None:
    task = await desk.begin()
    commit = Committed([THREAD], [7], [None], [end], errors=[error])
    desk.tokenizer.committed(commit, desk.request(b""))
    with pytest.raises(RemoteError) as caught:
        await task
    assert caught.value.kind is kind
    assert says in caught.value.detail
    assert desk.kernel.said(SinkAcked) == [SinkAcked([THREAD], [6], [True])]


async def test_an_end_that_was_missed_is_told_again(desk: Desk) -> None:
    task = await desk.begin()
    opened = SinkOpen(
        thread=THREAD,
        tenant=1,
        session=READER,
        sink_state=b"",
        prompt_tokens=7,
        tokens=bytes(28),
        acked=0,
        end=END_ERROR,
        error=ErrorKind.DEADLINE,
        detail="time ran out",
    )
    desk.tokenizer.sink_open(opened, desk.request(b""))
    with pytest.raises(RemoteError, match="time ran out"):
        await task
    desk.kernel.said(SinkAcked)
    stranger = msgspec.structs.replace(opened, thread=b"stranger")
    desk.tokenizer.sink_open(stranger, desk.request(b""))
    assert desk.kernel.said(SinkAcked) == [SinkAcked([b"stranger"], [6], [True])]


async def test_the_kernels_refusal_is_the_answer(desk: Desk) -> None:
    desk.kernel.refusals[ThreadSpawn] = [Failed(ErrorKind.EXHAUSTED, "full", 100)]
    encode = Encode(key=KEY, model="e", texts=["w1"])
    with pytest.raises(RemoteError) as caught:
        await desk.tokenizer.encode(encode, desk.request())
    assert (caught.value.kind, caught.value.retry_after_ms) == (ErrorKind.EXHAUSTED, 100)
