"""The door for other machines: the key pair of this home, and the file that tells how to come in.

Confidentiality is ZeroMQ's CURVE (RFC 26, CurveZMQ) and authority the role proof of Hello, which so
never crosses a network in the clear. Owns keys/curve.key, curve.pub and connection.json, each 0600.
"""

import os
import tempfile
from pathlib import Path

import msgspec
import zmq
from libllm.config import Home, read_key
from libllm.remote import Remote
from llmproto.errors import invalid


class Door(msgspec.Struct, frozen=True):
    """Where to listen, and with which secret key."""

    url: str
    secret_key: bytes


def open_door(home: Home, url: str | None) -> Door | None:
    """The door of this home, described in its connection file; None, and no such file, where none
    is configured."""
    path = home.connection
    if url is None:
        path.unlink(missing_ok=True)
        return None
    secret_key = read_key(home.curve_key).strip()
    if not secret_key:
        _, secret_key = zmq.curve_keypair()
        _write(home.curve_key, secret_key)
    try:
        public_key = zmq.curve_public(secret_key)
    except (zmq.ZMQError, ValueError):
        raise invalid(
            f"{home.curve_key} is not a CURVE secret key: remove it, and another is made; every "
            "connection file given away is worthless then"
        ) from None
    _write(home.curve_public, public_key)
    remote = Remote(
        url=url,
        server_key=public_key.decode(),
        operator=read_key(home.operator_key).hex(),
        service=read_key(home.service_key).hex(),
    )
    _write(path, msgspec.json.format(msgspec.json.encode(remote)) + b"\n")
    return Door(url, secret_key)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, for this user alone (mkstemp makes it 0600); a kernel that comes after
    another finds it as it should be, and loses no time."""
    if path.exists() and path.read_bytes() == content:
        return
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)
