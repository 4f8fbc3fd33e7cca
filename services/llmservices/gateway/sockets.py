"""The listening socket: one address, perhaps shared by several workers of one system, by nobody
else.

SO_REUSEPORT lets any process of the same user share a port, another system's gateway too. So the
first worker of a system makes sure that the port is free, under a lock that all its workers hold
shared for as long as they live.
"""

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final

from llmproto.errors import ErrorKind, RemoteError, invalid

BACKLOG: Final = 1024
SEND_BUFFER_BYTES: Final = 64 << 10
"""What a client that does not read may leave in the system's buffers."""


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url(bound: socket.socket) -> str:
    """Where clients reach it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(host: str, port: int, *, shared_lock: Path | None) -> socket.socket:
    """A bound socket; RemoteError naming address and remedy where it cannot be had.

    `shared_lock`: other workers of this system use the same address; they use the same lock.
    """
    if shared_lock is None or port == 0:
        return _bind(host, port, shares=False)
    fd = os.open(shared_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Kept open for ever: its end is the end of this process.
    alone = _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not alone:
        fcntl.flock(fd, fcntl.LOCK_SH)  # waits for a worker that is making sure
        alone = _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which may have failed and gone
    if alone:
        with contextlib.closing(_bind(host, port, shares=False)):
            pass
    found = _bind(host, port, shares=True)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return found


def bind_any(host: str, memory: Path) -> socket.socket:
    """A bound socket at any free port: where it can be, at the one that this file remembers, so
    that clients find a restarted gateway again."""
    try:
        port = int(memory.read_text())
        found = _bind(host, port, shares=False)
    except (OSError, ValueError, OverflowError, RemoteError):
        found = _bind(host, 0, shares=False)
    with contextlib.suppress(OSError):
        memory.write_text(str(found.getsockname()[1]))
    return found


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    return True


def _bind(host: str, port: int, *, shares: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise invalid(
            f"the gateway cannot listen at {host!r}: {error.strerror}; set [gateway] host"
        ) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise _refused(host, port, error) from None
    found.setblocking(False)
    return found


def _refused(host: str, port: int, error: OSError) -> RemoteError:
    if error.errno == errno.EADDRINUSE:
        return RemoteError(
            ErrorKind.EXHAUSTED,
            f"port {port} of {host} is taken by another program: choose another with [gateway] "
            "port in config.toml (0: any free one), or stop that program",
        )
    if error.errno == errno.EACCES:
        return RemoteError(
            ErrorKind.DENIED,
            f"this user may not listen at port {port}: choose one above 1023 with [gateway] port",
        )
    return invalid(f"the gateway cannot listen at {host}:{port}: {error.strerror}")
