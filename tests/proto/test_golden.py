"""Frames of every released version stay readable, and say the same to plain msgpack."""

import json
from pathlib import Path

import msgpack
import msgspec
import pytest
from llmproto import limits, wire
from llmproto.base import Header
from llmproto.kinds import KINDS

Frames = dict[str, dict[str, str]]

GOLDEN = Path(__file__).parent / "golden"
VERSION = GOLDEN / f"v{limits.PROTOCOL_VERSION}" / "frames.json"
MAKE = "python tests/proto/golden/make.py (with --all only while this version is unreleased)"
STRUCTS: dict[str, type[msgspec.Struct]] = {"0x0000 Header": Header} | {
    f"0x{kind:04x} {struct.__name__}": struct for kind, struct in KINDS.items()
}


def frames_of(path: Path) -> Frames:
    frames: Frames = json.loads(path.read_text(encoding="utf-8"))
    return frames


def decoded(name: str, frame: bytes) -> msgspec.Struct:
    kind = int(name.split()[0], 16)
    if kind:
        return wire.decode_body(kind, frame)
    return msgspec.msgpack.decode(frame, type=Header)


def plain(value: object) -> object:
    """As MessagePack sees it: bytes stay bytes, structs become maps or arrays."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))


def test_every_kind_has_golden_frames() -> None:
    assert sorted(frames_of(VERSION)) == sorted(STRUCTS), MAKE


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("v*/frames.json")), ids=lambda p: p.parent.name)
def test_frames_of_all_versions_are_readable(path: Path) -> None:
    for name, variants in frames_of(path).items():
        for frame in variants.values():
            assert isinstance(decoded(name, bytes.fromhex(frame)), STRUCTS[name])


@pytest.mark.parametrize("name", STRUCTS)
def test_full_frame_sets_every_field(name: str) -> None:
    message = decoded(name, bytes.fromhex(frames_of(VERSION)[name]["full"]))
    for field in msgspec.structs.fields(message):
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        assert getattr(message, field.name) != default, f"{name}.{field.name}: run {MAKE}"


@pytest.mark.parametrize("name", STRUCTS)
def test_full_frame_is_the_same_to_msgpack(name: str) -> None:
    frame = bytes.fromhex(frames_of(VERSION)[name]["full"])
    message = decoded(name, frame)
    assert msgpack.unpackb(frame, strict_map_key=True) == plain(message)
    assert msgpack.packb(plain(message)) == frame
    assert msgspec.msgpack.encode(message) == frame, f"written differently now: run {MAKE}"


@pytest.mark.parametrize("name", STRUCTS)
def test_least_frame_has_the_required_fields_alone(name: str) -> None:
    frame = bytes.fromhex(frames_of(VERSION)[name]["least"])
    message = decoded(name, frame)
    there, whole = msgpack.unpackb(frame), plain(message)
    assert decoded(name, msgspec.msgpack.encode(message)) == message, "a default breaks its range"
    required = [field.name for field in msgspec.structs.fields(message) if field.required]
    if isinstance(whole, list):
        assert there == whole[: len(required)]
    else:
        assert isinstance(whole, dict)
        assert there == {field: whole[field] for field in required}


@pytest.mark.parametrize("name", STRUCTS)
def test_what_a_later_writer_adds_is_ignored(name: str) -> None:
    frame = bytes.fromhex(frames_of(VERSION)[name]["full"])
    content = msgpack.unpackb(frame)
    later = {"later": [1, {"deep": b"x"}, None, 1.5, "y"]}
    grown = [*content, later, None] if isinstance(content, list) else content | later
    assert decoded(name, msgpack.packb(grown)) == decoded(name, frame)
