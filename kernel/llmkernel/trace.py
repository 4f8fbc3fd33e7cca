"""The trace: every event with its time, behind the state that it met; replayed through a fresh core
it gives the same effects.

Format: records of a little-endian u32 length, one byte of kind (`F` a fact of the state at the
beginning, `E` an event) and MessagePack.  A torn last record is left out.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from llmkernel import facts
from llmkernel.events import Event
from llmkernel.state import State

BYTES_MAX: Final = 1 << 30
"""A trace ends there; whoever forgot it has at most that on disk."""
_LENGTH: Final = struct.Struct("<I")


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One event and when it was handled."""

    now_ns: int
    event: Event


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Entry)


class Trace:
    """The writer.  Each record is handed to the operating system at once: it survives the
    process."""

    def __init__(self, path: Path, state: State, *, bytes_max: int = BYTES_MAX) -> None:
        self._left_bytes = bytes_max
        self._file = path.open("wb", buffering=0)
        for fact in state.live():
            self._put(b"F", facts.encode(fact))

    def __call__(self, now_ns: int, event: Event) -> None:
        """One event, just before it is handled."""
        self._put(b"E", _encoder.encode(Entry(now_ns, event)))

    def close(self) -> None:
        """No more."""
        self._file.close()

    def _put(self, kind: bytes, body: bytes) -> None:
        record = _LENGTH.pack(1 + len(body)) + kind + body
        self._left_bytes -= len(record)
        if self._left_bytes >= 0:
            self._file.write(record)


def read_trace(path: Path) -> tuple[State, list[Entry]]:
    """The state at the beginning, and the events."""
    state = State()
    entries: list[Entry] = []
    for kind, body in _records(path.read_bytes()):
        if kind == b"F":
            state.apply(facts.decode(body))
        else:
            entries.append(_decoder.decode(body))
    return state, entries


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            return
        yield data[at : at + 1], data[at + 1 : at + length]
        at += length
