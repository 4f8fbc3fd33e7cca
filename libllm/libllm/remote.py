"""How a system is reached from another machine: an address, the server's public key, a proof.

The kernel that listens on tcp writes `keys/connection.json` into its home; a copy of that file is
all that the other machine needs. It is as secret as the keys beside it.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Final

import msgspec
from llmproto.errors import invalid
from msgspec import Meta

FILE_BYTES_MAX: Final = 1 << 16
LOCAL: Final = ("ipc://", "inproc://")
"""What never leaves the machine needs no encryption."""

ServerKey = Annotated[str, Meta(min_length=40, max_length=40)]
"""A CURVE public key as ZeroMQ writes it (Z85)."""
Proof = Annotated[str, Meta(pattern="^([0-9a-f]{2})*$", max_length=512)]
"""A key file's content in hexadecimal; empty: not given away."""


class Remote(msgspec.Struct, frozen=True):
    """The content of a connection file. Take a proof out of it before giving it to somebody who
    is not to have that right."""

    url: str
    server_key: ServerKey
    operator: Proof = ""
    service: Proof = ""

    @classmethod
    def read(cls, path: str | Path) -> "Remote":
        """From a file; RemoteError(INVALID) naming it."""
        try:
            with Path(path).open("rb") as file:
                found = msgspec.json.decode(file.read(FILE_BYTES_MAX), type=cls)
        except OSError as error:
            raise invalid(f"{path} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise invalid(f"{path} is not a connection file: {error}") from None
        check_sealed(found.url, found.server_key)
        return found


def check_sealed(url: str, server_key: str | None) -> None:
    """RemoteError(INVALID) where a role proof would cross a network in the clear."""
    if not url.startswith(LOCAL) and server_key is None:
        raise invalid(
            f"{url} leaves this machine, and a proof may do so only encrypted: give server_key "
            "too, or the connection file of the system (keys/connection.json of its home)"
        )
    if url.startswith(LOCAL) and server_key is not None:
        raise invalid(f"{url} does not leave this machine and takes no server_key")


def check_listen(url: str) -> None:
    """RemoteError(INVALID) unless it names one address: tcp://ADDRESS:PORT."""
    scheme, _, place = url.partition("://")
    host, _, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    address = _address(host)
    is_wildcard = host in ("*", "") or (address is not None and address.is_unspecified)
    if scheme == "tcp" and is_wildcard:
        raise invalid(
            f"listen = {url!r} would let in every network that this machine is on: name the "
            "address of one, such as tcp://127.0.0.1:8751"
        )
    if scheme != "tcp" or address is None or not _is_port(port):
        raise invalid(
            f"listen = {url!r} is not tcp://ADDRESS:PORT, with the IP address of an interface of "
            "this machine and a port from 1 to 65535"
        )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= 65535
