"""Whatever bytes arrive, the codec gives a value or RemoteError(INVALID); what it wrote, it reads.

Values are made from the annotations of the structs, so that a new field is tested at once.
"""

import json
import math
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Final

import msgpack
import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llmproto import limits, wire
from llmproto.base import Header, Message, replaced
from llmproto.errors import ErrorKind, RemoteError
from llmproto.kinds import KIND_OF, KINDS
from msgspec import inspect as types

QUICK: Final = settings(max_examples=200, deadline=None)
ITEMS_MAX: Final = 4
FRAMES: Final = Path(__file__).parent / "golden" / f"v{limits.PROTOCOL_VERSION}" / "frames.json"
BODIES: Final = [
    (int(name.split()[0], 16), bytes.fromhex(frame))
    for name, variants in json.loads(FRAMES.read_text(encoding="utf-8")).items()
    for frame in variants.values()
]
HEADER: Final = Header(version=limits.PROTOCOL_VERSION, kind=1, id=bytes(16))
OPCODES: Final = [bytes([code]) for code in range(0xC0, 0xE0)]


def optional(kind: types.StructType) -> st.SearchStrategy[dict[str, object]]:
    """Keyword arguments of a struct, fields with a default left out at times."""
    required = {field.name: values(field.type) for field in kind.fields if field.required}
    others = {field.name: values(field.type) for field in kind.fields if not field.required}
    return st.fixed_dictionaries(required, optional=others)


@cache
def structs(struct: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """Any legal value of a struct."""
    info = types.type_info(struct)
    assert isinstance(info, types.StructType)
    return optional(info).map(lambda fields: struct(**fields))


def values(kind: types.Type) -> st.SearchStrategy[object]:
    """Any legal value of a type."""
    match kind:
        case types.UnionType():
            return st.one_of([values(one) for one in kind.types])
        case types.IntType():
            low = kind.ge if kind.ge is not None else -(1 << 53) + 1
            high = kind.le if kind.le is not None else (kind.lt or 1 << 53) - 1
            return st.integers(low, high)
        case types.FloatType():
            low_f = kind.ge if kind.ge is not None else kind.gt
            return st.floats(low_f, kind.le, exclude_min=kind.gt is not None, allow_nan=False)
        case types.StrType(pattern=None):
            text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
            return text.map(lambda found: found.ljust(kind.min_length or 0, "x"))
        case types.StrType():
            return st.from_regex(kind.pattern or "", fullmatch=True)
        case types.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length or 12, 32))
        case types.ListType():
            least = kind.min_length or 0
            return st.lists(values(kind.item_type), min_size=least, max_size=least + ITEMS_MAX)
        case types.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=2)
        case types.LiteralType():
            return st.sampled_from(kind.values)
        case types.EnumType():
            return st.sampled_from(list(kind.cls))
        case types.StructType():
            return structs(kind.cls)
        case types.BoolType():
            return st.booleans()
        case _:
            assert isinstance(kind, types.NoneType)
            return st.none()


MESSAGES: Final = st.sampled_from(list(KINDS.values())).flatmap(structs)

ANYTHING: Final = st.recursive(
    st.none() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


def is_value_or_refusal(frames: list[bytes]) -> Message | None:
    """Decode a whole message; None where it was refused, and nothing else may come out."""
    held = sum(map(len, frames))
    tracemalloc.start()
    try:
        header = wire.decode_header(frames)
        return wire.decode_body(header.kind, frames[1])
    except RemoteError as error:
        assert error.kind is ErrorKind.INVALID
        assert len(error.detail) <= limits.DETAIL_BYTES_MAX
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000 + 100 * held, (peak, held)


@QUICK
@given(message=MESSAGES)
def test_every_message_comes_back_as_it_was_sent(message: Message) -> None:
    header = replaced(HEADER, kind=KIND_OF[type(message)])
    frames = wire.encode(header, message)
    assert wire.decode_header(frames) == header
    again = wire.decode_body(header.kind, frames[1])
    assert again == message
    assert type(again) is type(message)
    assert wire.encode_body(again) == frames[1]


@QUICK
@given(message=MESSAGES)
def test_plain_msgpack_reads_the_same(message: Message) -> None:
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    assert msgpack.unpackb(wire.encode_body(message)) == plain


@QUICK
@given(header=structs(Header))
def test_every_header_comes_back(header: Header) -> None:
    header = replaced(header, version=limits.PROTOCOL_VERSION, blobs=[len(header.blobs)])
    frames = [wire.encode_header(header), b"\x80", bytes(header.blobs[0])]
    assert wire.decode_header(frames) == header


@QUICK
@given(frames=st.lists(st.binary(max_size=64), max_size=5))
@example(frames=[wire.encode_header(HEADER)])
def test_garbage_is_refused(frames: list[bytes]) -> None:
    is_value_or_refusal(frames)


@QUICK
@given(kind=st.sampled_from(list(KINDS)), body=st.binary(max_size=256))
def test_garbage_bodies_are_values_or_refused(kind: int, body: bytes) -> None:
    is_value_or_refusal([wire.encode_header(replaced(HEADER, kind=kind)), body])


@QUICK
@given(golden=st.sampled_from(BODIES), data=st.data())
def test_truncated_frames_are_refused(golden: tuple[int, bytes], data: st.DataObject) -> None:
    kind, body = golden
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    header = wire.encode_header(replaced(HEADER, kind=kind or 1))
    frames = [header, cut] if kind else [cut, b"\x80"]
    assert is_value_or_refusal(frames) is None


@QUICK
@given(golden=st.sampled_from(BODIES), data=st.data())
def test_damaged_frames_are_values_or_refused(
    golden: tuple[int, bytes], data: st.DataObject
) -> None:
    kind, body = golden
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        width = data.draw(st.integers(0, 5))
        piece = data.draw(st.sampled_from(OPCODES) | st.binary(max_size=9))
        body = body[:at] + piece + body[at + width :]
    header = wire.encode_header(replaced(HEADER, kind=kind or 1))
    is_value_or_refusal([header, body] if kind else [body, b"\x80"])


@QUICK
@given(
    announced=st.sampled_from([b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9"]),
    length=st.integers(1 << 24, (1 << 32) - 1),
    golden=st.sampled_from([one for one in BODIES if one[0]]),
    data=st.data(),
)
def test_announced_lengths_are_not_believed(
    announced: bytes, length: int, golden: tuple[int, bytes], data: st.DataObject
) -> None:
    kind, body = golden
    at = data.draw(st.integers(0, len(body)))
    frame = body[:at] + announced + length.to_bytes(4, "big") + body[at : at + 8]
    is_value_or_refusal([wire.encode_header(replaced(HEADER, kind=kind)), frame])


@QUICK
@given(kind=st.sampled_from(list(KINDS)), value=ANYTHING)
def test_wellformed_values_of_other_shapes_are_refused_or_read(kind: int, value: object) -> None:
    body = msgpack.packb(value)
    is_value_or_refusal([wire.encode_header(replaced(HEADER, kind=kind)), body])


@QUICK
@given(message=MESSAGES, data=st.data())
def test_a_field_of_another_value_never_passes_its_range(
    message: Message, data: st.DataObject
) -> None:
    """One field of a good message becomes anything; what is read is legal, or nothing is read."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    fields = list(plain) if isinstance(plain, dict) else range(len(plain))
    if not fields:
        return
    at = data.draw(st.sampled_from(fields))
    plain[at] = data.draw(
        st.sampled_from([math.nan, math.inf, -1, 1 << 53, 1 << 63, "", b"", [], {}, None, True])
    )
    header = wire.encode_header(replaced(HEADER, kind=KIND_OF[type(message)]))
    again = is_value_or_refusal([header, msgpack.packb(plain)])
    if again is not None:
        strict = msgspec.to_builtins(again, builtin_types=(bytes,))
        assert msgspec.convert(strict, type(again)) == again
