"""Peers of other machines: a real port with CURVE in front of a real core."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from libllm.client import AsyncClient, connect_async
from libllm.config import Home
from libllm.connection import Connection, open_connection
from libllm.remote import Remote
from llmkernel.core import Kernel
from llmkernel.events import Arrived, Forward, Restarted, Send, Ticked
from llmkernel.port import Port
from llmkernel.remote import Door, open_door
from llmkernel.state import State
from llmkernel.testkit.rig import CONFIG, DEVICES, OPERATOR_PROOF
from llmproto import limits, wire
from llmproto.base import Header
from llmproto.connection import Hello
from llmproto.errors import ErrorKind, RemoteError
from llmproto.kinds import KIND_OF
from llmproto.operation import Status, StatusAsk
from msgspec.structs import replace


def free_url() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


class Bus:
    """The core behind a port, with nothing else around it; its clock stands still."""

    def __init__(self, home: Home, door: Door) -> None:
        self.kernel = Kernel(State())
        self.kernel.handle(1, Restarted(1, b"b" * 16, 1, CONFIG, DEVICES))
        self.heard: list[tuple[bytes, ...]] = []
        self.port = Port(home.socket, self.arrived, door)

    def arrived(self, batch: list[tuple[bytes, ...]]) -> None:
        self.heard.extend(batch)
        for peer, *frames in batch:
            self.perform(Arrived(peer, tuple(frames)))

    def perform(self, event: Arrived | Ticked, now_ns: int = 1) -> None:
        for effect in self.kernel.handle(now_ns, event):
            if isinstance(effect, Send):
                self.port.send(effect.peer, tuple(wire.encode(effect.header, effect.message)))
            elif isinstance(effect, Forward):
                self.port.send(effect.peer, (wire.encode_header(effect.header), *effect.body))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.make()
    home.operator_key.write_bytes(OPERATOR_PROOF)
    return home


@pytest.fixture
async def bus(home: Home) -> AsyncIterator[Bus]:
    """A kernel that listens on tcp too, described in the home's connection file."""
    door = open_door(home, free_url())
    assert door is not None
    bus = Bus(home, door)
    yield bus
    bus.port.close(0)


async def connect(home: Home, **changes: str) -> Connection:
    """By the home's connection file, changed."""
    remote = replace(Remote.read(home.connection), **changes)
    return await open_connection(
        home,
        url=remote.url,
        server_key=remote.server_key,
        proof=bytes.fromhex(remote.operator),
    )


async def test_the_connection_file_is_all_that_a_client_needs(home: Home, bus: Bus) -> None:
    client: AsyncClient = await connect_async("/nowhere", connection=home.connection)
    assert isinstance(await client.status(), Status)
    await client.aclose()
    connection = await open_connection(home)  # The ipc address is there as before, in the clear.
    assert isinstance(await connection.port.call(StatusAsk(), Status), Status)
    connection.close()


async def test_a_wrong_proof_is_denied(home: Home, bus: Bus) -> None:
    with pytest.raises(RemoteError) as refused:
        await connect(home, operator=os.urandom(32).hex())
    assert refused.value.kind is ErrorKind.DENIED
    with pytest.raises(RemoteError) as refused:
        await connect(home, operator="")
    assert refused.value.kind is ErrorKind.DENIED
    assert not bus.kernel.tables.sessions.by_id


async def test_with_a_wrong_server_key_nothing_is_said(home: Home, bus: Bus) -> None:
    other, _ = zmq.curve_keypair()
    remote = Remote.read(home.connection)
    with pytest.raises(RemoteError, match="server key") as refused:
        await open_connection(
            home, url=remote.url, server_key=other.decode(), proof=b"p", timeout_s=0.5
        )
    assert refused.value.kind is ErrorKind.DEADLINE
    assert not bus.heard


async def test_who_speaks_in_the_clear_is_not_heard(home: Home, bus: Bus) -> None:
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(Remote.read(home.connection).url)
    hello = Hello(b"s" * 16, "client", OPERATOR_PROOF)
    header = Header(limits.PROTOCOL_VERSION, KIND_OF[Hello], b"i" * 16)
    await dealer.send_multipart(wire.encode(header, hello))
    event, _ = await monitor.recv_multipart()
    assert int.from_bytes(event[:2], "little") == zmq.EVENT_DISCONNECTED
    dealer.disable_monitor()
    monitor.close()
    dealer.close()
    context.term()
    assert not bus.heard


async def test_the_largest_message_passes_both_ways_encrypted(home: Home, bus: Bus) -> None:
    """Its bytes are counted before CURVE adds its own."""
    remote = Remote.read(home.connection)
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    public_key, secret_key = zmq.curve_keypair()
    dealer.curve_serverkey, dealer.linger = remote.server_key.encode(), 0
    dealer.curve_publickey, dealer.curve_secretkey = public_key, secret_key
    dealer.connect(remote.url)
    frames = [b"h", bytes(limits.MESSAGE_BYTES_MAX - 1)]
    await dealer.send_multipart(frames)
    async with asyncio.timeout(20):
        while not bus.heard:  # noqa: ASYNC110 - a batch sets no event
            await asyncio.sleep(0)
    assert list(bus.heard[0][1:]) == frames
    assert bus.port.send(bus.heard[0][0], tuple(frames))
    await dealer.recv_multipart()  # Unknown: it said no Hello.
    assert await dealer.recv_multipart() == frames
    dealer.close()
    context.term()


async def test_a_peer_that_falls_silent_loses_its_session(home: Home, bus: Bus) -> None:
    connection = await connect(home)
    assert len(bus.kernel.tables.sessions.by_id) == 1
    for now_ms in range(
        250, limits.SESSION_LEASE_MS + 500, 250
    ):  # A longer gap is the kernel's own.
        bus.perform(Ticked(), now_ms * 1_000_000)
    assert not bus.kernel.tables.sessions.by_id
    connection.close()


async def test_an_address_in_use_is_named(home: Home, bus: Bus, tmp_path: Path) -> None:
    url = Remote.read(home.connection).url
    with pytest.raises(RemoteError, match=url.removeprefix("tcp://")) as refused:
        Port(tmp_path / "other.sock", lambda batch: None, Door(url, zmq.curve_keypair()[1]))
    assert refused.value.kind is ErrorKind.UNAVAILABLE


def test_the_key_pair_is_made_once_and_for_this_user_alone(home: Home) -> None:
    door = open_door(home, "tcp://127.0.0.1:8751")
    assert door is not None
    assert zmq.curve_public(home.curve_key.read_bytes()) == home.curve_public.read_bytes()
    for path in (home.curve_key, home.curve_public, home.connection):
        assert path.stat().st_mode & 0o777 == 0o600
    first = Remote.read(home.connection)
    assert first.operator == OPERATOR_PROOF.hex()
    assert open_door(home, "tcp://127.0.0.1:8752") == Door("tcp://127.0.0.1:8752", door.secret_key)
    assert Remote.read(home.connection) == replace(first, url="tcp://127.0.0.1:8752")
    assert open_door(home, None) is None
    assert not home.connection.exists()


def test_a_key_that_is_none_is_refused(home: Home) -> None:
    home.curve_key.write_bytes(b"not a key")
    with pytest.raises(RemoteError, match=str(home.curve_key)) as refused:
        open_door(home, "tcp://127.0.0.1:8751")
    assert refused.value.kind is ErrorKind.INVALID
