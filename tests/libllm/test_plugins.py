"""Plug-in kinds and blobs through the SDK: a table of its own, both ways, and what does not fit."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libllm.client import AsyncClient, open_client
from libllm.config import Home, ProcessEnvironment
from libllm.events import Event, Post
from libllm.plugins import NO_KINDS, Kinds
from libllm.port import Port
from libllm.service import Handlers, Request, Service, Serving
from llmproto import limits
from llmproto.base import Message, Opaque
from llmproto.connection import Beat, Failed
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import ProcessStarted, StatusAsk
from msgspec import Meta

if TYPE_CHECKING:
    from tests.libllm.conftest import FakeKernel


class Ask(Message, frozen=True):
    """Client -> echo.  Answered by Said."""

    text: Annotated[str, Meta(max_length=20)]
    times: Annotated[int, Meta(ge=1)] = 1


class Said(Message, frozen=True):
    """Echo -> client."""

    text: str


KINDS = Kinds({0x8000: Ask, 0x8001: Said})
SOURCE = b"c" * 16


class Echo(Service):
    """Says what it is asked, blobs included."""

    def handlers(self) -> Handlers:
        return {Ask: self.ask}

    def kinds(self) -> Kinds:
        return KINDS

    def ask(self, message: Ask, request: Request) -> None:
        if message.text == "much":
            request.reply(Said("x"), blobs=[bytes(limits.MESSAGE_BYTES_MAX)])
        request.reply(Said(message.text * message.times), blobs=request.blobs[::-1])


@pytest.fixture
async def echo(kernel: "FakeKernel", home: Home) -> AsyncIterator[None]:
    """An echo service that said it is ready."""
    serving = Serving(
        lambda port: Echo(), role="echo", environment=ProcessEnvironment(home=home, proof=b"p")
    )
    task = asyncio.create_task(serving.run())
    await kernel.hear(ProcessStarted)
    yield
    serving.end(0)
    assert await task == 0


@pytest.fixture
async def llm(kernel: "FakeKernel", home: Home) -> AsyncIterator[AsyncClient]:
    """A client of the kernel."""
    client = await open_client(home)
    yield client
    await client.aclose()


# --- the table ------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.integers(1, 1 << 40))
def test_unpack_is_the_inverse_of_pack(text: str, times: int) -> None:
    packed = KINDS.pack(Ask(text, times))
    assert isinstance(packed, Opaque) and packed.kind == 0x8000
    assert KINDS.unpack(packed) == Ask(text, times)


@given(st.integers(0x8000, 0xFFFF), st.binary(max_size=64))
def test_garbage_raises_nothing_but_invalid(kind: int, body: bytes) -> None:
    try:
        found = KINDS.unpack(Opaque(kind, body))
    except RemoteError as error:
        assert error.kind is ErrorKind.INVALID
    else:
        assert isinstance(found, Ask | Said)


def test_messages_of_the_protocol_pass_every_table() -> None:
    assert KINDS.pack(Beat(1)) == NO_KINDS.unpack(Beat(1)) == Beat(1)


@pytest.mark.parametrize("table", [{0x7FFF: Ask}, {0x10000: Ask}, {0x8000: Ask, 0x8001: Ask}])
def test_a_table_that_is_none_is_refused(table: dict[int, type[Message]]) -> None:
    with pytest.raises(AssertionError):
        Kinds(table)


# --- a service ------------------------------------------------------------------------------------


async def test_a_service_answers_its_own_kinds_with_blobs(kernel: "FakeKernel", echo: None) -> None:
    asked = kernel.say(KINDS.pack(Ask("ab", 2)), source=SOURCE, blobs=(b"1", b"", b"333"))
    header, answer = await kernel.hear(Opaque)
    assert KINDS.unpack(answer) == Said("abab")
    assert (header.reply_to, header.peer, header.kind) == (asked.id, SOURCE, 0x8001)
    assert (header.blobs, kernel.blobs) == ([3, 0, 1], (b"333", b"", b"1"))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Opaque(0x8000, msgspec.msgpack.encode({"text": "x" * 21})), "length <= 20"),
        (Opaque(0x8007, b"\x80"), "0x8007"),
        (KINDS.pack(Said("x")), "takes no Said"),
        (StatusAsk(), "takes no StatusAsk"),
        (KINDS.pack(Ask("much")), str(limits.MESSAGE_BYTES_MAX)),
    ],
)
async def test_what_a_service_cannot_take_or_say_is_answered_invalid(
    kernel: "FakeKernel", echo: None, message: Message, words: str
) -> None:
    asked = kernel.say(message, source=SOURCE)
    header, failed = await kernel.hear(Failed)
    assert (header.reply_to, header.peer) == (asked.id, SOURCE)
    assert failed.kind is ErrorKind.INVALID and words in failed.detail


# --- a client -------------------------------------------------------------------------------------


async def test_a_client_asks_a_plugin_again_until_it_is_answered(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    call = asyncio.create_task(
        llm.exchange("echo", Ask("a"), Said, kinds=KINDS, blobs=[b"12", b"3"])
    )
    first, message = await kernel.hear(Opaque)
    assert (first.target, first.blobs, kernel.blobs) == ("echo", [2, 1], (b"12", b"3"))
    assert KINDS.unpack(message) == Ask("a")
    kernel.say(Failed(ErrorKind.UNAVAILABLE, "it died"), answers=first)
    again, _ = await kernel.hear(Opaque)
    assert (again.id, again.blobs, kernel.blobs) == (first.id, [2, 1], (b"12", b"3"))
    kernel.say(KINDS.pack(Said("a")), answers=again, blobs=(b"4",))
    assert await call == (Said("a"), (b"4",))


async def test_a_client_without_blobs_gets_the_message_alone(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    call = asyncio.create_task(llm.call("echo", Ask("a"), Said, kinds=KINDS))
    header, _ = await kernel.hear(Opaque)
    kernel.say(KINDS.pack(Said("a")), answers=header)
    assert await call == Said("a")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Opaque(0x8001, b"\xc1"), ErrorKind.INVALID),
        (Opaque(0x9000, b"\x80"), ErrorKind.INVALID),
        (KINDS.pack(Ask("a")), ErrorKind.INTERNAL),
        (Failed(ErrorKind.DENIED, "no"), ErrorKind.DENIED),
    ],
)
async def test_an_answer_that_is_none_is_an_error(
    kernel: "FakeKernel", llm: AsyncClient, answer: Message, kind: ErrorKind
) -> None:
    call = asyncio.create_task(llm.call("echo", Ask("a"), Said, kinds=KINDS))
    header, _ = await kernel.hear(Opaque)
    kernel.say(answer, answers=header)
    with pytest.raises(RemoteError) as refused:
        await call
    assert refused.value.kind is kind


async def test_what_is_too_large_is_refused_before_it_leaves(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    with pytest.raises(RemoteError, match=str(limits.MESSAGE_BYTES_MAX)):
        await llm.exchange("echo", Ask("a"), Said, kinds=KINDS, blobs=[bytes(1 << 20)])
    with pytest.raises(RemoteError, match="frames"):
        await llm.exchange("echo", Ask("a"), Said, kinds=KINDS, blobs=[b""] * 65)
    assert Opaque not in kernel.heard


async def test_a_deadline_names_the_last_refusal(kernel: "FakeKernel", llm: AsyncClient) -> None:
    call = asyncio.create_task(llm.call("echo", Ask("a"), Said, kinds=KINDS, deadline_s=0.5))
    header, _ = await kernel.hear(Opaque)
    kernel.say(Failed(ErrorKind.UNAVAILABLE, "nobody there", 10_000), answers=header)
    with pytest.raises(RemoteError, match="nobody there") as refused:
        await call
    assert refused.value.kind is ErrorKind.DEADLINE


async def test_ports_say_messages_of_a_plugin_once() -> None:
    said: list[Event] = []
    Port(said.append).send(Said("a"), peer=SOURCE, kinds=KINDS, blobs=[b"b"])
    assert said == [Post(KINDS.pack(Said("a")), peer=SOURCE, blobs=(b"b",))]
