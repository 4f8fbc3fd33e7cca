"""A DEALER socket on an event loop: frames in, frames out, connections noticed; it decides nothing.

ZeroMQ's descriptor is edge-triggered: it becomes readable when the socket's state changes, not
while messages wait. So every callback drains the socket, and so does whatever was sent (sending may
swallow the edge of an arrival).
"""

import asyncio
from collections.abc import Callable
from typing import Final

import zmq
from llmproto import limits
from llmproto.errors import invalid
from zmq.utils.monitor import parse_monitor_message

from libllm.remote import check_sealed

HIGH_WATER_MARK: Final = 10_000
RECONNECT_MS: Final = 10
RECONNECT_MS_MAX: Final = 200
DRAIN_MAX: Final = 512
"""Messages taken in one callback, so that timers and other descriptors get their turn."""


class Transport:
    """One connection, made again for ever.

    Invariant: whatever is sent while there is no connection, or while its pipe is full, is lost at
    once.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | None = None,
        arrived: Callable[[list[bytes]], None],
        connected: Callable[[], None],
        disconnected: Callable[[], None],
    ) -> None:
        """Connects in the background; the callbacks are called by the running event loop.

        `server_key` is the kernel's public key (CURVE), which every address needs that leaves this
        machine: RemoteError(INVALID) otherwise.
        """
        check_sealed(endpoint, server_key)
        self.lost = 0
        """Messages that could not be sent."""
        self._loop = asyncio.get_running_loop()
        self._arrived = arrived
        self._connected = connected
        self._disconnected = disconnected
        self._is_draining = False
        self._is_closed = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX),
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, limits.MESSAGE_BYTES_MAX),
        ):
            self._socket.setsockopt(option, value)
        if server_key is not None:
            self._seal(server_key, is_ipv6="[" in endpoint)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._loop.add_reader(self._monitor_fd, self._drain_monitor)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise invalid(f"{endpoint!r} is no address: {error.strerror}") from None
        self._loop.call_soon(self._drain_monitor)

    def _seal(self, server_key: str, *, is_ipv6: bool) -> None:
        """All that leaves is for the owner of this key alone, and a silent network is noticed."""
        public_key, secret_key = zmq.curve_keypair()
        for option, value in (
            (zmq.CURVE_SERVERKEY, server_key.encode()),
            (zmq.CURVE_PUBLICKEY, public_key),
            (zmq.CURVE_SECRETKEY, secret_key),
            (zmq.IPV6, is_ipv6),
            (zmq.MAXMSGSIZE, limits.SEALED_FRAME_BYTES_MAX),
            (zmq.HEARTBEAT_IVL, limits.PING_MS),
            (zmq.HEARTBEAT_TIMEOUT, limits.PING_SILENT_MS),
        ):
            try:
                self._socket.setsockopt(option, value)
            except zmq.ZMQError:
                self._socket.close(0)
                self._context.term()
                raise invalid(f"the server key {server_key!r} is none (40 characters)") from None

    def send(self, frames: list[bytes]) -> None:
        """Send now or never."""
        if self._is_closed:
            return
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.lost += 1
        if not self._is_draining and _has_input(self._socket):
            self._drain_soon()

    def close(self, *, linger_ms: int = 0) -> None:
        """Let go of the socket; what was sent just before still has so long to leave."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.term()

    def _drain_soon(self) -> None:
        self._is_draining = True
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Take what has arrived, until nothing is left or others must have their turn."""
        self._is_draining = True
        receive = self._socket.recv_multipart
        for _ in range(DRAIN_MAX):
            if self._is_closed:
                return
            try:
                frames = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._arrived(frames)
        self._is_draining = False
        if not self._is_closed and _has_input(self._socket):
            self._drain_soon()

    def _drain_monitor(self) -> None:
        """Connections, in the order in which they came and went."""
        while not self._is_closed and _has_input(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            # Reading the socket's state makes it take in the new pipe: sending needs that.
            self._socket.getsockopt(zmq.EVENTS)
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected()
            else:
                self._disconnected()
        if not self._is_closed and not self._is_draining:
            self._drain_soon()


def _has_input(socket: "zmq.Socket[bytes]") -> bool:
    """Something can be received; asking takes in what happened meanwhile."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
