"""Hostile peers on the bus: typed refusals, and nobody else notices.

Each attack runs beside four streams, which must be what they are without it; the kernel is the same
process afterwards, and hardly larger.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from libllm.config import Home, read_key
from libllm.connection import Connection
from libllm.results import Completion
from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Beat, Failed, Goodbye, Hello, Unknown, Welcome
from llmproto.errors import ErrorKind, RemoteError
from llmproto.execution import Stepped
from llmproto.generation import Generate, Sampling
from llmproto.init import Halt
from llmproto.kinds import KIND_OF, KINDS
from llmproto.models import ModelAdd
from llmproto.operation import ProcessesAsk, Shutdown, Status, StatusAsk
from llmproto.tenants import KeyPresent
from llmproto.threads import Done, ThreadCancel, ThreadSpawn

from .conftest import System
from .load import complete_all, load

ANSWER_MS = 10_000
GROWTH_BYTES_MAX = 96 << 20
"""What an attack may leave in the kernel: far less than what was thrown at it."""


class Raw:
    """A DEALER that says whatever it is told to."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, ANSWER_MS)
        self.socket.setsockopt(zmq.RCVTIMEO, ANSWER_MS)
        self.socket.connect(home.endpoint)

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()

    def say(self, message: Message, **fields: Any) -> bytes:  # Any: the header's own fields
        """Send one message; gives its id."""
        bare = Header(limits.PROTOCOL_VERSION, KIND_OF[type(message)], os.urandom(16))
        header = msgspec.structs.replace(bare, **fields)
        self.socket.send_multipart([wire.encode_header(header), wire.encode_body(message)])
        return header.id

    def hear(self) -> tuple[Header, Message]:
        """The next message."""
        frames = self.socket.recv_multipart()
        header = wire.decode_header(frames)
        return header, wire.decode_body(header.kind, frames[1])

    def answer(self, question: bytes) -> Message:
        """To this question; what else comes is passed over."""
        while True:
            header, message = self.hear()
            if header.reply_to == question:
                return message

    def ask(self, message: Message, **fields: Any) -> Message:
        """Its answer."""
        return self.answer(self.say(message, **fields))

    def refused(self, message: Message, **fields: Any) -> ErrorKind:
        """The kind of its refusal."""
        answer = self.ask(message, **fields)
        assert isinstance(answer, Failed), answer
        assert answer.detail
        return answer.kind

    def greet(self, *, role: str = "client", proof: bytes | None = None) -> Message:
        """Say Hello, as the operator unless told otherwise."""
        key = read_key(self.home.operator_key) if proof is None else proof
        return self.ask(Hello(session=os.urandom(16), role=role, proof=key))


@pytest.fixture
def raw(served: System) -> Iterator[Raw]:
    peer = Raw(served.home)
    yield peer
    peer.close()


def kernel_of(system: System) -> int:
    """Its pid."""
    for pid in system.pids():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"\0llmkernel\0" in command:
            return pid
    raise AssertionError("there is no kernel")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


ASKS = load(4, 80)


@pytest.fixture(scope="module")
def twins(served: System) -> list[Completion]:
    """What the streams are when nobody disturbs them."""

    async def complete() -> list[Completion]:
        async with served.client() as client:
            return await complete_all(client, ASKS)

    return asyncio.run(complete())


async def beside_streams(
    system: System, twins: list[Completion], attack: Callable[[], None]
) -> None:
    """The attack in mid-stream of four streams, and what must not come of it."""
    async with system.client() as client:
        before = {row.name: (row.pid, row.incarnation) for row in await client.ps()}
        kernel = before["kernel"][0]
        assert kernel is not None
        size = resident_bytes(kernel)
        disturbed = asyncio.create_task(complete_all(client, ASKS))
        await asyncio.to_thread(attack)
        assert await disturbed == twins
        after = {row.name: (row.pid, row.incarnation) for row in await client.ps()}
        assert after == before
        assert resident_bytes(kernel) - size < GROWTH_BYTES_MAX
        await system.until_settled(client)


async def test_before_hello_everything_is_unknown(
    served: System, twins: list[Completion], raw: Raw
) -> None:
    def attack() -> None:
        for message in (StatusAsk(), Shutdown(), Beat(), ModelAdd("/etc"), Goodbye()):
            raw.say(message)
            _, answer = raw.hear()
            assert isinstance(answer, Unknown), answer
            assert answer.kernel_epoch > 0

    await beside_streams(served, twins, attack)


async def test_wrong_proofs(served: System, twins: list[Completion], raw: Raw) -> None:
    """No role is given to who does not prove it; nor is a session that is another's."""
    home = served.home
    service_key = read_key(home.service_key)
    mine = os.urandom(16)

    def denied(hello: Hello) -> None:
        kind = raw.refused(hello)
        assert kind is ErrorKind.DENIED, hello
        raw.say(StatusAsk())
        assert isinstance(raw.hear()[1], Unknown)

    def attack() -> None:
        for role in ("client", "tokenizer", "executor", "gateway", "kernel", "init", "operator"):
            for proof in (b"", b"x" * 32, b"x" * 256):
                denied(Hello(session=os.urandom(16), role=role, proof=proof))
        denied(Hello(session=os.urandom(16), role="client", proof=service_key))
        denied(Hello(session=os.urandom(16), role="kernel", proof=service_key))
        denied(
            Hello(
                session=os.urandom(16),
                role="tokenizer",
                proof=service_key,
                process="tokenizer",
                incarnation=1,
            )
        )
        versions = Hello(
            session=mine,
            role="client",
            proof=read_key(home.operator_key),
            protocol_min=200,
            protocol_max=201,
        )
        assert raw.refused(versions) is ErrorKind.INVALID
        other = Raw(home)
        try:
            welcome = other.ask(
                Hello(session=mine, role="client", proof=read_key(home.operator_key))
            )
            assert isinstance(welcome, Welcome) and welcome.session == mine
            denied(Hello(session=mine, role="plugin", proof=service_key))
            denied(Hello(session=mine, role="client", proof=b"x" * 32))
            assert isinstance(other.ask(StatusAsk()), Status)
        finally:
            other.close()

    await beside_streams(served, twins, attack)


async def test_kinds_that_are_not_a_clients(
    served: System, twins: list[Completion], raw: Raw
) -> None:
    def attack() -> None:
        assert isinstance(raw.greet(), Welcome)
        spawn = ThreadSpawn(
            digest=bytes(16),
            model="llmos-mini",
            tokens=wire.pack_tokens([1, 2]),
            sampling=Sampling(seed=1),
            output_tokens_max=3,
            key=os.urandom(16),
            index=0,
            sink_state=b"",
        )
        stepped = Stepped([bytes(8)], [1], [1], [1], [0], 1)
        for message in (spawn, stepped, KeyPresent(b"x"), Halt()):
            assert raw.refused(message) is ErrorKind.DENIED, message
        # An answer to a question that nobody asked is dropped; who serves "nobody" may come.
        raw.say(Done(), reply_to=os.urandom(16))
        assert raw.refused(StatusAsk(), target="nobody") is ErrorKind.UNAVAILABLE
        assert raw.refused(ThreadCancel(os.urandom(8))) is ErrorKind.STALE
        assert raw.refused(StatusAsk(), tenant=77) in (ErrorKind.STALE, ErrorKind.DENIED)
        assert isinstance(raw.ask(StatusAsk(), source=b"x" * 16), Status)
        for kind in (0x7FFF, 0x0099):
            header = Header(limits.PROTOCOL_VERSION, kind, os.urandom(16))
            raw.socket.send_multipart([wire.encode_header(header), b"\x80"])
            answer = raw.answer(header.id)
            assert isinstance(answer, Failed) and answer.kind is ErrorKind.INVALID

    await beside_streams(served, twins, attack)


async def test_garbage(served: System, twins: list[Completion], raw: Raw) -> None:
    """Random frames, and true messages with random damage; the session that sent them may end, the
    kernel may not."""
    chance = random.Random(11)

    def frames() -> list[bytes]:
        choice = chance.randrange(4)
        if choice == 0:
            return [chance.randbytes(chance.choice((0, 1, 16, 200, 5000))) for _ in range(4)]
        header = Header(limits.PROTOCOL_VERSION, chance.choice(sorted(KINDS)), os.urandom(16))
        body = chance.randbytes(chance.choice((0, 1, 50)))
        whole = [wire.encode_header(header), body]
        if choice == 1:
            return whole
        if choice == 2:
            return [*whole, *(b"blob" for _ in range(chance.choice((1, 70))))]
        at = chance.randrange(len(whole[0]))
        damaged = whole[0][:at] + chance.randbytes(1) + whole[0][at + 1 :]
        return [damaged[: chance.randrange(1, len(damaged) + 1)], body]

    def attack() -> None:
        for greeted in (False, True):
            for _ in range(300):
                if greeted and chance.randrange(100) == 0:
                    raw.greet()
                raw.socket.send_multipart(frames())
                while raw.socket.poll(0):
                    raw.hear()  # whatever it says can be read
        deep = b"\x91" * 100_000
        header = Header(limits.PROTOCOL_VERSION, KIND_OF[StatusAsk], os.urandom(16))
        raw.socket.send_multipart([wire.encode_header(header), deep])
        raw.socket.send_multipart([deep, deep])
        # Huge lengths that are not there.
        raw.socket.send_multipart([wire.encode_header(header), b"\xdd\xff\xff\xff\xff"])
        assert isinstance(raw.greet(), Welcome)
        assert isinstance(raw.ask(StatusAsk()), Status)

    await beside_streams(served, twins, attack)


async def test_huge_frames(served: System, twins: list[Completion], raw: Raw) -> None:
    """Beyond the limit the connection is cut; one just as large is refused."""

    def attack() -> None:
        assert isinstance(raw.greet(), Welcome)
        header = Header(limits.PROTOCOL_VERSION, KIND_OF[StatusAsk], os.urandom(16))
        raw.socket.send_multipart([wire.encode_header(header), b"x" * limits.MESSAGE_BYTES_MAX])
        answer = raw.answer(bytes(16))  # not read so far that its id would be known
        assert isinstance(answer, Failed) and answer.kind is ErrorKind.INVALID
        for _ in range(5):
            huge = Raw(served.home)
            try:
                assert isinstance(huge.greet(), Welcome)
                huge.socket.send_multipart([b"x" * (64 << 20)])
            finally:
                huge.close()
        assert isinstance(raw.greet(), Welcome)  # it has not beaten: its lease may be over
        assert isinstance(raw.ask(StatusAsk()), Status)

    await beside_streams(served, twins, attack)


async def test_thousands_of_questions_without_reading(
    served: System, twins: list[Completion], raw: Raw
) -> None:
    """What is not read is bounded, and costs nobody else anything."""

    def attack() -> None:
        assert isinstance(raw.greet(), Welcome)
        raw.socket.setsockopt(zmq.RCVHWM, 1)
        generate = Generate(
            key=bytes(16),
            prompt="A list is",
            output_tokens_max=5000,  # more than the context holds
            sampling=Sampling(seed=1),
        )
        for number in range(20_000):
            if number % 4:
                raw.say(ProcessesAsk())
            else:
                raw.say(generate, target="tokenizer")
        deadline = time.monotonic() + 30
        other = Raw(served.home)
        try:
            assert isinstance(other.greet(), Welcome)
            assert isinstance(other.ask(StatusAsk()), Status)
        finally:
            other.close()
        assert time.monotonic() < deadline

    await beside_streams(served, twins, attack)


async def test_many_connections(served: System, twins: list[Completion]) -> None:
    """Peers that come and go without a word."""

    def attack() -> None:
        for _ in range(10):
            peers = [Raw(served.home) for _ in range(20)]
            for number, peer in enumerate(peers):
                if number % 2:
                    peer.greet()
                else:
                    peer.say(Beat())
            for peer in peers:
                peer.close()

    await beside_streams(served, twins, attack)


async def test_a_lost_proof_is_told_by_the_library(served: System) -> None:
    """A client with the wrong key gets DENIED, at once."""
    connection = Connection(served.home.endpoint, proof=b"x" * 32)
    try:
        with pytest.raises(RemoteError) as caught:
            await connection.wait_up(10)
        assert caught.value.kind is ErrorKind.DENIED
        assert "operator.key" in caught.value.detail
    finally:
        connection.close()
