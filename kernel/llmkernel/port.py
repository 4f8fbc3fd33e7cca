"""The kernel's socket: frames in by connection, frames out, nothing decided.

ZeroMQ's descriptor is edge-triggered, so every wake-up drains the socket, and so does every batch
of sends.  Routing ids are ZeroMQ's own; peers never choose them.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import zmq
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError

from llmkernel.remote import Door

HIGH_WATER_MARK: Final = 10_000
"""Messages waiting for one peer: its credit ends long before."""
DRAIN_MAX: Final = 1024
"""Messages taken in one turn, so that the journal, timers and init get theirs."""


class Port:
    """One ROUTER socket.

    Invariant: what is sent is taken by ZeroMQ at once, or reported as lost (nobody there) or full
    (a peer that does not read).
    """

    def __init__(
        self,
        path: Path,
        arrived: Callable[[list[tuple[bytes, ...]]], None],
        door: Door | None = None,
    ) -> None:
        """Binds at once; `arrived` gets every batch, each message with its routing id first.

        `door` is where peers of other machines come in; RemoteError(UNAVAILABLE) where its address
        cannot be had.
        """
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, limits.MESSAGE_BYTES_MAX),
            (zmq.BACKLOG, 1024),
        ):
            self._socket.setsockopt(option, value)
        mask = os.umask(0o177)
        try:
            self._socket.bind(f"ipc://{path}")
        finally:
            os.umask(mask)
        if door is not None:
            self._open(door)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._again = True
        self._loop.add_reader(self._fd, self.drain)
        self._loop.call_soon(self.drain)  # what came before the descriptor was watched

    def _open(self, door: Door) -> None:
        """Listen there too.  These options count from here on, and not for the ipc address, whose
        file's mode is its protection."""
        for option, value in (
            (zmq.CURVE_SERVER, 1),
            (zmq.CURVE_SECRETKEY, door.secret_key),
            (zmq.IPV6, "[" in door.url),
            (zmq.MAXMSGSIZE, limits.SEALED_FRAME_BYTES_MAX),
            (zmq.HEARTBEAT_IVL, limits.PING_MS),
            (zmq.HEARTBEAT_TIMEOUT, limits.PING_SILENT_MS),
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(door.url)
        except zmq.ZMQError as error:
            self._socket.close(0)
            self._context.term()
            detail = f"[kernel] listen = {door.url!r} cannot be had: {error.strerror}"
            raise RemoteError(ErrorKind.UNAVAILABLE, detail) from None

    def send(self, peer: bytes, frames: tuple[bytes, ...]) -> bool | None:
        """True: on its way.  False: nobody is there.  None: dropped, the peer does not read."""
        try:
            self._socket.send_multipart((peer, *frames), zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def look_again(self) -> None:
        """After sending, which may swallow the edge of an arrival: look whether anything came."""
        if not self._again and self._readable():
            self._again = True
            self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """Hand over all that has arrived."""
        self._again = False
        if self._socket.closed:
            return
        batch: list[tuple[bytes, ...]] = []
        receive = self._socket.recv_multipart
        while len(batch) < DRAIN_MAX:
            try:
                batch.append(tuple(receive(zmq.NOBLOCK)))
            except zmq.Again:
                break
        if batch:
            self._arrived(batch)
        self.look_again()

    def _readable(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def close(self, linger_ms: int) -> None:
        """Unbind; what was sent still has so long to leave."""
        self._loop.remove_reader(self._fd)
        self._socket.close(linger_ms)
        self._context.term()
