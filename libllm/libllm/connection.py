"""A client's own session with a kernel."""

import asyncio
from typing import Final, assert_never

from llmproto.errors import ErrorKind, RemoteError

from libllm.config import Home, read_key
from libllm.events import (
    Answer,
    Arrived,
    Effect,
    Event,
    Fatal,
    Leave,
    Lost,
    Send,
    StreamFailed,
    StreamRow,
    Wake,
    Welcomed,
)
from libllm.peer import Peer, new_hello
from libllm.port import Port
from libllm.remote import LOCAL

CONNECT_S: Final = 15.0
"""How long the first Welcome may take: a kernel that restarts with a full journal, and some."""


class Connection:
    """The session of a client of its own, beside no service."""

    def __init__(self, endpoint: str, *, proof: bytes, server_key: str | None = None) -> None:
        """Connects in the background; must be made by the running event loop."""
        self.port = Port(self._feed)
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._endpoint = endpoint
        hello = new_hello(role="client", proof=proof)
        self._peer = Peer(endpoint, hello, server_key=server_key, deliver=self._deliver)

    async def wait_up(self, timeout_s: float) -> None:
        """Until the kernel has welcomed this session; DENIED or the like where it will not,
        DEADLINE after so long."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._up)
        except TimeoutError:
            detail = f"the system did not answer within {timeout_s:g} s"
            if not self._endpoint.startswith(LOCAL):
                detail += (
                    f": nobody listens at {self._endpoint}, or its key is not the server key that "
                    "was given"
                )
            raise RemoteError(ErrorKind.DEADLINE, detail) from None

    def close(self) -> None:
        """Say goodbye, and let go of the socket."""
        if not self._up.done():
            self._up.cancel()
        self._peer.feed(Leave())
        self._peer.close()

    def _feed(self, event: Event) -> None:
        self._peer.feed(event)

    def _deliver(self, effect: Effect) -> None:
        match effect:
            case Answer() | StreamRow() | StreamFailed():
                self.port.deliver(effect)
            case Welcomed() if not self._up.done():
                self._up.set_result(None)
            case Fatal() if not self._up.done():
                self._up.set_exception(RemoteError(effect.kind, effect.detail))
            case Welcomed() | Fatal() | Lost() | Arrived() | Send() | Wake():
                pass
            case _:
                assert_never(effect)


async def open_connection(
    home: Home,
    *,
    url: str | None = None,
    server_key: str | None = None,
    proof: bytes | None = None,
    timeout_s: float = CONNECT_S,
) -> Connection:
    """Connect to the kernel of a home, or to another address (tcp: with its public key); the proof
    is the home's operator key where none is given."""
    if proof is None:
        proof = read_key(home.operator_key)
    connection = Connection(url or home.endpoint, proof=proof, server_key=server_key)
    try:
        await connection.wait_up(timeout_s)
    except BaseException:
        connection.close()
        raise
    return connection
