"""The socketpair between init and the kernel: datagrams to messages and back, the same at both
ends.

A datagram is a big-endian u16 kind and a MessagePack body.  A body beyond `PART_BYTES` is sent in
parts, all but the last under the kind `MORE`.  Nothing here blocks: what the socket does not take
waits in order, and what it holds comes out whole.
"""

import collections
import errno
import socket
import struct
import sys
from typing import Final

from llmproto import wire
from llmproto.errors import invalid
from llmproto.init import InitMessage, KernelBeat
from llmproto.kinds import KIND_OF

MORE: Final = 0
PART_BYTES: Final = 32 << 10  # far below the socket buffer of any system
MESSAGE_BYTES_MAX: Final = 16 << 20  # PROCESSES_MAX children with the longest command lines
WAITING_MAX: Final = 16_384  # datagrams; a peer that leaves so many unread is broken
_FLAVOUR: Final = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
_KIND: Final = struct.Struct(">H")


def encode(message: InitMessage) -> list[bytes]:
    """The datagrams of one message, in order."""
    body = wire.encode_body(message)
    parts = [body[at : at + PART_BYTES] for at in range(0, len(body), PART_BYTES)]
    more = [_KIND.pack(MORE) + part for part in parts[:-1]]
    return [*more, _KIND.pack(KIND_OF[type(message)]) + parts[-1]]


def decode(kind: int, body: bytes) -> InitMessage:
    """One message of this conversation; anything else is RemoteError(INVALID)."""
    message = wire.decode_body(kind, body)
    if not isinstance(message, InitMessage):
        raise invalid(f"kind 0x{kind:04x} is not spoken between init and the kernel")
    return message


class Link:
    """One end.  Invariant: messages leave in the order of `send`, each whole or not at all seen by
    the peer."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._waiting: collections.deque[bytes] = collections.deque()
        self._partial = bytearray()
        self.closed = False
        """The peer is gone: nothing will arrive any more, and nothing is sent."""

    @classmethod
    def inherited(cls, descriptor: int) -> "Link":
        """The end whose descriptor number came through the environment."""
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """For selectors and event loops."""
        return self._socket.fileno()

    @property
    def waiting(self) -> int:
        """Datagrams that the socket has not taken: while there are any, `flush` when it is
        writable."""
        return len(self._waiting)

    def send(self, message: InitMessage) -> None:
        """Send now or when there is room.  A beat that would have to wait is left out: what waits
        says as much."""
        if self.closed or (self._waiting and isinstance(message, KernelBeat)):
            return
        self._waiting.extend(encode(message))
        assert len(self._waiting) <= WAITING_MAX, len(self._waiting)
        self.flush()

    def flush(self) -> bool:
        """Hand over what waits; True when nothing is left."""
        while self._waiting:
            try:
                self._socket.send(self._waiting[0])
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # macOS, for a full queue
                    return False
                self._hang_up()
                return True
            self._waiting.popleft()
        return True

    def receive(self) -> list[InitMessage]:
        """All that has arrived; RemoteError(INVALID) for what is no message of this
        conversation."""
        messages: list[InitMessage] = []
        while not self.closed:
            try:
                datagram = self._socket.recv(PART_BYTES + _KIND.size)
            except BlockingIOError:
                break
            except OSError:
                datagram = b""
            if not datagram:
                self._hang_up()
                break
            messages.extend(self._take(datagram))
        return messages

    def close(self) -> None:
        """Give the descriptor back; the peer sees the end."""
        self._hang_up()
        self._socket.close()

    def _take(self, datagram: bytes) -> list[InitMessage]:
        if len(datagram) < _KIND.size:
            raise invalid(f"a datagram has at least {_KIND.size} bytes, this one {len(datagram)}")
        self._partial += datagram[_KIND.size :]
        if len(self._partial) > MESSAGE_BYTES_MAX:
            raise invalid(f"a message is at most {MESSAGE_BYTES_MAX} bytes, this one is longer")
        (kind,) = _KIND.unpack_from(datagram)
        if kind == MORE:
            return []
        body = bytes(self._partial)
        self._partial.clear()
        return [decode(kind, body)]

    def _hang_up(self) -> None:
        self.closed = True
        self._waiting.clear()


def pair() -> tuple[Link, socket.socket]:
    """Init's end, and the one to be inherited by a kernel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _FLAVOUR)
    return Link(ours), theirs
