"""All facts of one event as one journal record, so that a death in between leaves all or nothing of
it: a token without the end that came with it would be gone on from.

Invariant: decode(encode(facts)) gives the same facts in order, record by record.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
from llmproto import limits

from llmkernel import facts
from llmkernel.facts import AnyFact

_HEAD: Final = b"\x92\x00"
"""An array of two whose first is 0, which is the tag of no fact."""
_ROOM: Final = 64
"""More than the heads around the facts take."""


class Turn(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Several facts that belong together."""

    facts: list[bytes]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Turn)


def encode(together: Sequence[AnyFact]) -> list[bytes]:
    """One record; several only where one cannot hold them."""
    records = [facts.encode(fact) for fact in together]
    largest = max(map(len, records), default=0)
    assert largest <= limits.RECORD_BYTES_MAX, f"a fact of {largest} bytes is no record"
    if len(records) < 2:
        return records
    if sum(len(record) + 5 for record in records) + _ROOM > limits.RECORD_BYTES_MAX:
        return records
    return [_encoder.encode(Turn(records))]


def decode(record: bytes | memoryview) -> list[AnyFact]:
    """The facts of one record."""
    if bytes(record[:2]) != _HEAD:
        return [facts.decode(record)]
    return [facts.decode(fact) for fact in _decoder.decode(record).facts]
