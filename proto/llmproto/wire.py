"""Frames to messages and back: the only encoder and decoder of the bus.

Invariant: whatever bytes arrive, decoding gives a value or raises RemoteError(INVALID), and
never holds more memory than a fixed multiple of what arrived.
"""

import array
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from llmproto import limits
from llmproto.base import Header, Message, Opaque
from llmproto.errors import RemoteError, invalid
from llmproto.kinds import KIND_OF, KINDS, PLUGIN_KIND_FIRST

_encoder: Final = msgspec.msgpack.Encoder()
_header_decoder: Final = msgspec.msgpack.Decoder(Header)
_body_decoders: Final[dict[int, msgspec.msgpack.Decoder[Message]]] = {
    kind: msgspec.msgpack.Decoder(message) for kind, message in KINDS.items()
}
_CONNECTION_KINDS: Final = range(0x0001, 0x0100)
"""Readable in every protocol version: with them peers agree on one, or part with a reason."""
_REFUSAL_CHARACTERS_MAX: Final = 400
_U32: Final = next(code for code in "IL" if array.array(code).itemsize == 4)


def encode_header(header: Header) -> bytes:
    """One header frame."""
    return _encoder.encode(header)


def encode_body(message: Message) -> bytes:
    """One body frame."""
    return message.body if isinstance(message, Opaque) else _encoder.encode(message)


def encode(header: Header, message: Message, blobs: Sequence[bytes] = ()) -> list[bytes]:
    """All frames of one message; the header's kind must be the message's own.

    Raises RemoteError(INVALID) where it is larger than a message may be, with both numbers, or
    holds text that UTF-8 cannot carry.
    """
    assert KIND_OF.get(type(message), header.kind) == header.kind, (header.kind, type(message))
    try:
        frames = [_encoder.encode(header), encode_body(message), *blobs]
    except UnicodeEncodeError as error:  # a file name that is no UTF-8, say
        raise _unreadable(type(message).__name__, error) from None
    check_size(frames)
    return frames


def check_size(frames: Sequence[bytes]) -> None:
    """Refuse what no message may be: too few or too many frames, or too many bytes."""
    if not 2 <= len(frames) <= 2 + limits.BLOBS_MAX:
        raise invalid(f"a message has 2 to {2 + limits.BLOBS_MAX} frames, this one {len(frames)}")
    size = sum(map(len, frames))
    if size > limits.MESSAGE_BYTES_MAX:
        raise invalid(
            f"a message is at most {limits.MESSAGE_BYTES_MAX} bytes, this one {size}: "
            "send less at once, or pass bulk data by file"
        )
    if len(frames[0]) > limits.HEADER_BYTES_MAX:
        raise invalid(
            f"a header is at most {limits.HEADER_BYTES_MAX} bytes, this one {len(frames[0])}"
        )


def decode_header(frames: Sequence[bytes]) -> Header:
    """The header of a whole message, after the checks that need no knowledge of its body."""
    check_size(frames)
    try:
        header = _header_decoder.decode(frames[0])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable("header", error) from None
    if header.version != limits.PROTOCOL_VERSION and header.kind not in _CONNECTION_KINDS:
        raise invalid(
            f"protocol {header.version} is not spoken here, only {limits.PROTOCOL_VERSION}"
        )
    if header.blobs or len(frames) > 2:
        lengths = [len(blob) for blob in frames[2:]]
        if lengths != header.blobs:
            raise invalid(
                f"the header announces blobs of {header.blobs} bytes, there are {lengths}"
            )
    return header


def decode_body(kind: int, frame: bytes) -> Message:
    """The body of a known kind."""
    decoder = _body_decoders.get(kind)
    if decoder is None:
        raise invalid(f"kind 0x{kind:04x} is not known to protocol {limits.PROTOCOL_VERSION}")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(KINDS[kind].__name__, error) from None


def decode_opaque(kind: int, frame: bytes) -> Message:
    """The body of a known kind, or a plug-in's as it came."""
    return Opaque(kind, frame) if kind >= PLUGIN_KIND_FIRST else decode_body(kind, frame)


def _unreadable(what: str, error: Exception) -> RemoteError:
    """The refusal, cut short: msgspec quotes values of enumerations in full, however long."""
    return invalid(f"{what}: {error}"[:_REFUSAL_CHARACTERS_MAX])


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32."""
    packed = array.array(_U32, tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> "array.array[int]":
    """The inverse of pack_tokens; RemoteError(INVALID) unless the length is a multiple of 4."""
    if len(packed) % 4:
        raise invalid(f"packed tokens are a multiple of 4 bytes, these are {len(packed)}")
    tokens = array.array(_U32)
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
