"""Frames to messages and back: what is read, and everything that is refused."""

import array
import struct
import sys
import tracemalloc
from collections.abc import Sequence

import msgspec
import pytest
from llmproto import limits, wire
from llmproto.base import Header, Message, Opaque, replaced
from llmproto.connection import Beat, Goodbye, Hello
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import Generate, Sampling
from llmproto.kinds import KIND_OF, KINDS, kind_of
from llmproto.threads import Committed, Done, SinkAcked

HEADER = Header(version=limits.PROTOCOL_VERSION, kind=KIND_OF[Beat], id=bytes(16))
SAMPLING = b"\xa8sampling\x81"


def refusal(frames: Sequence[bytes]) -> str:
    """How a whole message is refused; anything but INVALID fails the test."""
    with pytest.raises(RemoteError) as caught:
        header = wire.decode_header(frames)
        wire.decode_body(header.kind, frames[1])
    assert caught.value.kind is ErrorKind.INVALID
    assert len(caught.value.detail) <= limits.DETAIL_BYTES_MAX
    return caught.value.detail


def body_refusal(message: type[Message], frame: bytes) -> str:
    header = replaced(HEADER, kind=KIND_OF[message])
    return refusal([wire.encode_header(header), frame])


def generate(sampling: bytes) -> bytes:
    """A Generate with these bytes as the one field of its sampling."""
    return b"\x82\xa3key\xc4\x10" + bytes(16) + SAMPLING + sampling


def test_encode_gives_the_frames_that_decode_reads() -> None:
    beat = Beat(progress=7)
    header = replaced(HEADER, blobs=[3, 0])
    frames = wire.encode(header, beat, [b"abc", b""])
    assert frames == [wire.encode_header(header), wire.encode_body(beat), b"abc", b""]
    assert wire.decode_header(frames) == header
    assert wire.decode_body(header.kind, frames[1]) == beat


def test_encode_insists_on_the_kind_of_the_message() -> None:
    with pytest.raises(AssertionError):
        wire.encode(HEADER, Done())


def test_encode_leaves_plugin_kinds_to_their_service() -> None:
    class Ask(Message, frozen=True):
        """Client -> plug-in."""

    frames = wire.encode(replaced(HEADER, kind=0x8001), Ask())
    assert wire.decode_header(frames).kind == 0x8001
    assert "0x8001" in refusal(frames)


def test_an_opaque_body_travels_as_it_is() -> None:
    message = Opaque(0x8001, b"\xc1 is no MessagePack")
    frames = wire.encode(replaced(HEADER, kind=kind_of(message), blobs=[1]), message, [b"x"])
    assert frames[1:] == [message.body, b"x"]
    assert wire.decode_opaque(wire.decode_header(frames).kind, frames[1]) == message
    assert wire.decode_opaque(KIND_OF[Beat], wire.encode_body(Beat(3))) == Beat(3)
    assert kind_of(Beat()) == KIND_OF[Beat]


def test_encode_refuses_what_is_too_large_with_both_numbers() -> None:
    with pytest.raises(RemoteError, match=str(limits.MESSAGE_BYTES_MAX)):
        wire.encode(replaced(HEADER, blobs=[1 << 20]), Beat(), [bytes(1 << 20)])


def test_largest_message_passes() -> None:
    frames = wire.encode(HEADER, Beat())
    blob = limits.MESSAGE_BYTES_MAX - sum(map(len, frames)) - 5
    frames = wire.encode(replaced(HEADER, blobs=[blob]), Beat(), [bytes(blob)])
    assert sum(map(len, frames)) == limits.MESSAGE_BYTES_MAX
    assert wire.decode_header(frames).blobs == [blob]


@pytest.mark.parametrize("count", [0, 1, 3 + limits.BLOBS_MAX, 100_000])
def test_count_of_frames_is_bounded(count: int) -> None:
    assert str(count) in refusal([wire.encode_header(HEADER)] * count)


def test_header_is_bounded() -> None:
    assert str(limits.HEADER_BYTES_MAX) in refusal([bytes(limits.HEADER_BYTES_MAX + 1), b"\x80"])


@pytest.mark.parametrize(
    ("announced", "blobs"), [([], [b"x"]), ([1], []), ([2], [b"x"]), ([1], [b"x", b"y"])]
)
def test_blobs_are_as_announced(announced: list[int], blobs: list[bytes]) -> None:
    header = wire.encode_header(replaced(HEADER, blobs=announced))
    assert str(announced) in refusal([header, b"\x80", *blobs])


def test_the_longest_header_is_within_its_limit() -> None:
    header = Header(
        version=255,
        kind=0xFFFF,
        id=bytes(16),
        target="\U0001f600" * limits.NAME_BYTES_MAX,
        reply_to=bytes(16),
        source=bytes(16),
        cause=bytes(16),
        epoch=(1 << 53) - 1,
        deadline_ms=(1 << 53) - 1,
        blobs=[(1 << 53) - 1] * limits.BLOBS_MAX,
        tenant=(1 << 53) - 1,
        peer=bytes(16),
        trace=bytes(64),
    )
    assert len(wire.encode_header(header)) <= limits.HEADER_BYTES_MAX


@pytest.mark.parametrize("version", [2, 255])
def test_other_versions_are_refused_but_for_the_connection(version: int) -> None:
    hello = Hello(session=bytes(16), role="client", protocol_min=version, protocol_max=version)
    header = Header(version=version, kind=KIND_OF[Hello], id=bytes(16))
    frames = wire.encode(header, hello)
    assert wire.decode_header(frames) == header
    generation = replaced(header, kind=KIND_OF[Generate])
    assert f"protocol {version}" in refusal([wire.encode_header(generation), generate(b"\xa0\xc0")])


@pytest.mark.parametrize(
    "changes", [{"version": 0}, {"version": 256}, {"kind": 0}, {"kind": 0x10000}, {"id": b"short"}]
)
def test_header_fields_have_ranges(changes: dict[str, object]) -> None:
    assert "header" in refusal(wire.encode(replaced(HEADER, **changes), PlainBody()))


class PlainBody(Message, frozen=True):
    """A body of no known kind."""


@pytest.mark.parametrize("kind", [0x00FF, 0x0900, 0x7FFF, 0x8000, 0xFFFF])
def test_unknown_kinds_are_refused(kind: int) -> None:
    header = replaced(HEADER, kind=kind)
    assert f"0x{kind:04x}" in refusal([wire.encode_header(header), b"\x80"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff\xc0\xc0\xc0\xc0\xc0",
        b"\xdf\xff\xff\xff\xff\xa1a\xc0\xa1b\xc0",
        b"\x81\xa1a\xc6\xff\xff\xff\xff\x00",
        b"\x81\xa1a\xdd\xff\xff\xff\xff\x00",
        b"\xc7\x05\xff12345",
        b"\x80\x80",
        b"\x90\x90",
        b"\x91" * 100_000,
        b"\x81\xa1a" + b"\x91" * 100_000,
        b"\x81\xa1a" + b"\x81\xa1a" * 100_000,
    ],
    ids=lambda frame: f"{frame[:8].hex()}-{len(frame)}",
)
def test_hostile_bodies_are_refused_within_bounded_memory(kind: int, frame: bytes) -> None:
    tracemalloc.start()
    try:
        body_refusal(KINDS[kind], frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000 + 2 * len(frame)


@pytest.mark.parametrize("length", [100_000, 10_000_000, 0xFFFFFFFF])
@pytest.mark.parametrize("field", ["threads", "positions", "ended"])
def test_announced_lengths_reserve_nothing(field: str, length: int) -> None:
    name = bytes([0xA0 + len(field)]) + field.encode()
    frame = b"\x81" + name + b"\xdd" + struct.pack(">I", length) + b"\x00"
    tracemalloc.start()
    try:
        body_refusal(SinkAcked, frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_a_body_takes_a_bounded_multiple_of_its_bytes() -> None:
    """The worst that fits a message: rows of the record with the most memory for its bytes."""
    rows = (limits.MESSAGE_BYTES_MAX - 200) // 3
    column = b"\xdd" + struct.pack(">I", rows) + b"\x92\x00\xc0" * rows
    frame = b"\x95\x90\x90\x90\x90" + column
    tracemalloc.start()
    try:
        message = wire.decode_body(KIND_OF[Committed], frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(message, Committed)
    assert peak < 100 * len(frame)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308", "-1e308"])
@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ],
)
@pytest.mark.parametrize("code", [">f", ">d"])
def test_no_sampling_range_holds_nan_or_infinity(field: str, value: str, code: str) -> None:
    if code == ">f" and value.endswith("308"):
        value = value.replace("1e308", "1e38")
    packed = (b"\xca" if code == ">f" else b"\xcb") + struct.pack(code, float(value))
    name = bytes([0xA0 + len(field)]) + field.encode()
    assert field in body_refusal(Generate, generate(name + packed))


def test_no_bias_is_nan() -> None:
    nan = b"\xcb" + struct.pack(">d", float("nan"))
    assert "bias_values" in body_refusal(Generate, generate(b"\xabbias_values\x91" + nan))


@pytest.mark.parametrize("value", [1 << 53, (1 << 64) - 1, -1, -(1 << 63)])
def test_integers_stay_below_2_to_the_53(value: int) -> None:
    packed = msgspec.msgpack.encode(value)
    assert "seed" in body_refusal(Generate, generate(b"\xa4seed" + packed))
    committed = b"\x94\x91\xc4\x08" + bytes(8) + b"\x91\x00\x91\x00\x91" + packed
    assert "$[3]" in body_refusal(Committed, committed)


def test_invalid_utf8_is_refused() -> None:
    assert body_refusal(Hello, b"\x82\xa7session\xc4\x10" + bytes(16) + b"\xa4role\xa2\xff\xfe")
    header = wire.encode_header(replaced(HEADER, target="ab")).replace(b"\xa2ab", b"\xa2\xc3\x28")
    assert "header" in refusal([header, b"\x80"])


def test_refusals_are_short_however_long_the_value() -> None:
    detail = body_refusal(Goodbye, msgspec.msgpack.encode({"reason": "x" * 500_000}))
    assert detail.startswith("Goodbye: ")
    assert len(detail) <= 400


def test_text_that_is_no_unicode_is_the_callers_mistake() -> None:
    with pytest.raises(RemoteError, match="INVALID"):
        wire.encode(replaced(HEADER, kind=KIND_OF[Goodbye], target="\udcff"), Goodbye())


@pytest.mark.parametrize("tokens", [[], [0], [1, limits.TOKEN_ID_MAX, (1 << 32) - 1]])
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_tokens_are_packed_little_endian(
    tokens: list[int], byteorder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = array.array(wire.unpack_tokens(b"").typecode, tokens)
    if byteorder != sys.byteorder:
        native.byteswap()
    monkeypatch.setattr(sys, "byteorder", byteorder)
    packed = wire.pack_tokens(tokens)
    if byteorder == "little":
        assert packed == struct.pack(f"<{len(tokens)}I", *tokens)
    else:
        assert packed == native.tobytes()
    assert list(wire.unpack_tokens(packed)) == tokens


@pytest.mark.parametrize("length", [1, 2, 3, 5, 4001])
def test_packed_tokens_are_whole(length: int) -> None:
    with pytest.raises(RemoteError, match=str(length)):
        wire.unpack_tokens(bytes(length))


def test_remote_error_says_kind_and_detail() -> None:
    error = RemoteError(ErrorKind.EXHAUSTED, "no room", retry_after_ms=5)
    assert (str(error), error.retry_after_ms) == ("EXHAUSTED: no room", 5)
    assert (invalid("x").kind, invalid("x").retry_after_ms) == (ErrorKind.INVALID, None)


def test_defaults_are_the_models_own_distribution() -> None:
    assert Sampling() == msgspec.msgpack.decode(b"\x80", type=Sampling)
