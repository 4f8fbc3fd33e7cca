"""Writes golden frames: `python tests/proto/golden/make.py` adds missing ones, `--all` renews all.

Frames of a released version are never renewed: a change that cannot read them, or writes them
differently, needs the next version. Two bodies for each kind, as hexadecimal in one JSON file:
`full` sets every field to something other than its default, `least` has the required fields alone
(a reader then sees every default).
"""

import json
import re
import sys
import zlib
from pathlib import Path
from typing import Final

import msgspec
from llmproto import limits
from llmproto.base import Header
from llmproto.kinds import KINDS
from msgspec import inspect as types

FRAMES: Final = Path(__file__).parent / f"v{limits.PROTOCOL_VERSION}" / "frames.json"


def picked(kind: types.Type, path: str) -> object:
    """A plain value of a type, of the same choice for the same path: `full` fields differ."""
    number = zlib.crc32(path.encode())
    match kind:
        case types.UnionType():
            return picked(next(one for one in kind.types if one != types.NoneType()), path)
        case types.BoolType():
            return path.count("'") % 2 == 0
        case types.IntType():
            low = kind.ge if kind.ge is not None else 0
            high = kind.le if kind.le is not None else (kind.lt or 1 << 16) - 1
            return max(low, 1) + number % (high - max(low, 1) + 1)
        case types.FloatType():
            least = kind.ge if kind.ge is not None else kind.gt or 0.0
            most = kind.le if kind.le is not None else 8.0
            return least + (most - least) * (1 + number % 62) / 64
        case types.StrType(pattern=None):
            return (path.rsplit(".", 1)[-1] + " ü")[: kind.max_length]
        case types.StrType():
            return one_of(kind.pattern or "", path)
        case types.BytesType():
            length = kind.min_length or min(kind.max_length or 8, 8)
            return (number.to_bytes(4, "big") * 8)[:length].ljust(length, b"\x01")
        case types.ListType():
            return [picked(kind.item_type, f"{path}.{i}") for i in range(kind.min_length or 2)]
        case types.DictType():
            return {"label": picked(kind.value_type, f"{path}.label")}
        case types.LiteralType():
            return kind.values[-1 - path.count("'") % len(kind.values)]
        case types.EnumType():
            return list(kind.cls)[-1 - path.count("'") % len(kind.cls)].value
        case types.StructType():
            return fields(kind, path, least=False)
        case _:
            raise TypeError(f"no value for {kind} at {path}")


def one_of(pattern: str, path: str) -> str:
    """An alternative of `^(one|other)$`, else a word that every other pattern of ours takes."""
    match = re.fullmatch(r"\^\(([^()]*)\)\$", pattern)
    words = match[1].split("|") if match else ["word"]
    return words[-1 - path.count("'") % len(words)]


def fields(kind: types.StructType, path: str, *, least: bool) -> object:
    """All fields of a struct, or the required ones, as MessagePack will carry them."""
    values = {}
    for field in kind.fields:
        if field.required or not least:
            seed = f"{path}.{field.name}"
            while (value := picked(field.type, seed)) == field.default:
                seed += "'"
            values[field.encode_name] = value
    return list(values.values()) if kind.array_like else values


def frame(struct: type[msgspec.Struct], *, least: bool) -> str:
    """One frame in hexadecimal; a least one leaves defaults out, as other writers may."""
    info = types.type_info(struct)
    assert isinstance(info, types.StructType)
    plain = msgspec.msgpack.encode(fields(info, struct.__name__, least=least))
    message = msgspec.msgpack.decode(plain, type=struct)
    return (plain if least else msgspec.msgpack.encode(message)).hex()


def main() -> None:
    """Write the file; existing frames stay, unless all are asked for."""
    kept = {} if "--all" in sys.argv[1:] else json.loads(FRAMES.read_text(encoding="utf-8"))
    structs: dict[str, type[msgspec.Struct]] = {"0x0000 Header": Header}
    structs |= {f"0x{kind:04x} {struct.__name__}": struct for kind, struct in KINDS.items()}
    frames = {
        name: kept.get(name)
        or {"full": frame(struct, least=False), "least": frame(struct, least=True)}
        for name, struct in structs.items()
    }
    FRAMES.write_text(json.dumps(frames, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
