"""Renders PROTOCOL.md from the structs, their docstrings and `introduction.md`.

`python -m llmproto.render [PATH]` writes it; without PATH, to where it stands in the repository.
Types, ranges and defaults come from msgspec, prose from the source through `ast`: docstrings of
structs, and strings that follow a field or a constant.
"""

import ast
import enum
import inspect
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

import msgspec
from msgspec import NODEFAULT
from msgspec import inspect as types

from llmproto import (
    base,
    connection,
    data,
    encoding,
    errors,
    execution,
    generation,
    init,
    jobs,
    limits,
    metrics,
    models,
    operation,
    recipes,
    rights,
    tenants,
    threads,
    versions,
)
from llmproto.base import Header, Message
from llmproto.kinds import KIND_OF, KINDS
from llmproto.threads import Committed

CONVERSATIONS: Final[dict[int, ModuleType]] = {
    0x00: connection,
    0x01: generation,
    0x02: threads,
    0x03: execution,
    0x04: models,
    0x05: operation,
    0x06: tenants,
    0x07: metrics,
    0x08: init,
    0x09: jobs,
    0x0A: versions,
    0x0B: encoding,
    0x0C: data,
}
_INT53: Final = (1 << 53) - 1
_UNITS: Final = {"ms": "ms", "ns": "ns", "s": "s", "bytes": "bytes", "tokens": "tokens"}


class Prose(NamedTuple):
    """The strings of one module: of the module, its classes, and their fields."""

    module: str
    classes: dict[str, str]
    names: dict[str, str]
    """By `Class.field`, or by the bare name of a constant."""
    order: list[str]
    """Classes and constants as they stand in the source."""


def prose_of(module: ModuleType) -> Prose:
    """Read a module's own source."""
    tree = ast.parse(inspect.getsource(module))
    prose = Prose(ast.get_docstring(tree) or "", {}, {}, [])
    _collect(tree.body, "", prose)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            prose.classes[node.name] = ast.get_docstring(node) or ""
            prose.order.append(node.name)
            _collect(node.body, f"{node.name}.", prose)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            prose.order.append(_assigned(node))
    return prose


def _collect(body: list[ast.stmt], prefix: str, prose: Prose) -> None:
    for node, following in pairwise(body):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                prose.names[prefix + _assigned(node)] = inspect.cleandoc(text)


def _assigned(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return ast.unparse(target)


def plain(text: str) -> str:
    """Prose for one table cell: one line, and no bar that would end it."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def spelled(number: float) -> str:
    """A number as people read it."""
    if number == _INT53:
        return "2^53 - 1"
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def count(low: int | None, high: int | None, unit: str) -> str:
    """How many of a unit, as a suffix; empty where anything goes."""
    if low is not None and low == high:
        return f" ({low:,} {unit})"
    if high is not None:
        return f" ({low or 0:,}..{high:,} {unit})"
    return f" (at least {low:,} {unit})" if low else ""


def anchor(struct: type) -> str:
    """Where a struct's heading is: GitHub's own rule for headings."""
    kind = KIND_OF.get(struct)
    return struct.__name__.lower() + ("" if kind is None else f"-0x{kind:04x}")


def heading(struct: type) -> str:
    """The heading that `anchor` names."""
    kind = KIND_OF.get(struct)
    return f"#### {struct.__name__}" + ("" if kind is None else f" 0x{kind:04x}")


def type_text(kind: types.Type) -> str:
    """A type with its range, in the notation that the introduction explains."""
    match kind:
        case types.UnionType():
            return " or ".join(map(type_text, kind.types))
        case types.IntType():
            return _int_text(kind)
        case types.FloatType():
            return _float_text(kind)
        case types.StrType():
            pattern = f" matching `{kind.pattern}`" if kind.pattern else ""
            text = f"`str`{count(kind.min_length, kind.max_length, 'characters')}{pattern}"
            return text.replace("|", "\\|")
        case types.BytesType():
            return f"`bin`{count(kind.min_length, kind.max_length, 'bytes')}"
        case types.ListType():
            items = count(kind.min_length, kind.max_length, "elements")
            return f"array of {type_text(kind.item_type)}{items}"
        case types.DictType():
            return f"map of {type_text(kind.value_type)}"
        case types.LiteralType():
            return "`str`: " + ", ".join(f'"{value}"' for value in kind.values)
        case types.StructType() | types.EnumType():
            return f"[{kind.cls.__name__}](#{anchor(kind.cls)})"
        case types.BoolType():
            return "`bool`"
        case types.NoneType():
            return "`nil`"
        case _:
            raise TypeError(f"{kind} is not a type of the protocol")


def _int_text(kind: types.IntType) -> str:
    low = kind.ge if kind.gt is None else kind.gt + 1
    high = kind.le if kind.lt is None else kind.lt - 1
    if low is None or high is None:
        return "`int`"
    if (low, high) == (0, _INT53):
        return "`uint`"
    return f"`int` {spelled(low)}..{spelled(high)}"


def _float_text(kind: types.FloatType) -> str:
    bounds = [
        f"{sign} {spelled(bound)}"
        for sign, bound in ((">", kind.gt), ("≥", kind.ge), ("<", kind.lt), ("≤", kind.le))
        if bound is not None
    ]
    return "`float`" + (f" {' and '.join(bounds)}" if bounds else "")


def default_text(field: types.Field) -> str:
    """What stands for a field that is left out."""
    if field.required:
        return "required"
    value = field.default_factory() if field.default is NODEFAULT else field.default
    if isinstance(value, msgspec.Struct):
        return "all its defaults"
    if isinstance(value, bytes):
        return "`bin` of 0 bytes"
    return f"`{msgspec.json.encode(value).decode()}`".replace("null", "nil")


def unit_text(name: str, kind: types.Type) -> str:
    """The unit that a number's name ends with."""
    if isinstance(kind, types.UnionType):
        return next(filter(None, (unit_text(name, part) for part in kind.types)), "")
    if not isinstance(kind, types.IntType):
        return ""
    words = name.removesuffix("_max").split("_")
    return _UNITS.get(words[-1], "")


def fields_table(struct: type[msgspec.Struct], prose: Prose) -> str:
    """Every field with its type, default and meaning."""
    info = types.type_info(struct)
    assert isinstance(info, types.StructType)
    if not info.fields:
        return "No fields.\n"
    rows = ["| field | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for field in info.fields:
        meaning = plain(prose.names.get(f"{struct.__name__}.{field.name}", ""))
        cells = [
            f"`{field.name}`",
            type_text(field.type),
            unit_text(field.name, field.type),
            default_text(field),
            meaning,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def enum_table(values: type[enum.Enum], prose: Prose) -> str:
    """Every value with its meaning."""
    rows = ["| value | meaning |", "|---|---|"]
    for value in values:
        meaning = plain(prose.names.get(f"{values.__name__}.{value.name}", ""))
        rows.append(f'| "{value.value}" | {meaning} |')
    return "\n".join(rows) + "\n"


def enum_chapter(values: type[enum.Enum], prose: Prose) -> str:
    """Heading, purpose and values."""
    purpose = prose.classes[values.__name__]
    return f"{heading(values)}\n\n{purpose}\n\n{enum_table(values, prose)}"


def senders(message: type[Message]) -> str:
    """Who may send it: those with one of its rights."""
    needed = rights.KIND_RIGHTS.get(message)
    if needed is None:
        return "the kernel alone"
    if needed == frozenset(rights.Right):
        return "anybody"
    names = sorted(f"`{right.value}`" for right in needed)
    return f"a peer with the right {' or '.join(names)}"


def roles_table() -> str:
    """The rights of each role."""
    rows = [(f"`{role}`", granted) for role, granted in rights.ROLES.items()]
    rows.append(("any other (plug-in services)", rights.PLUGIN_RIGHTS))
    lines = ["| role | rights |", "|---|---|"]
    for role, granted in rows:
        lines.append(f"| {role} | {', '.join(sorted(f'`{right.value}`' for right in granted))} |")
    return "\n".join(lines) + "\n"


def constants_table(module: ModuleType, prose: Prose) -> str:
    """Numbers that a conversation gives names to; empty where it has none."""
    rows = [
        f"| {value} | `{name}` | {plain(prose.names.get(name, ''))} |"
        for name in prose.order
        if isinstance(value := vars(module).get(name), int)
    ]
    return "\n".join(["| value | name | meaning |", "|---|---|---|", *rows, ""]) if rows else ""


def conversation(number: int, module: ModuleType) -> Iterator[str]:
    """The chapter of one conversation: its messages by kind, then the records they use."""
    prose = prose_of(module)
    first, _, rest = prose.module.partition("\n\n")
    title = first.removeprefix(f"Conversation 0x{number:02x}: ").removesuffix(".")
    yield f"### Conversation 0x{number:02x}: {plain(title)}\n"
    if rest:
        yield f"{rest}\n"
    if constants := constants_table(module, prose):
        yield constants
    structs = [vars(module)[name] for name in prose.order if name in prose.classes]
    messages = sorted((one for one in structs if one in KIND_OF), key=lambda one: KIND_OF[one])
    for struct in messages + [one for one in structs if one not in KIND_OF]:
        if issubclass(struct, enum.Enum):
            yield enum_chapter(struct, prose)
            continue
        yield f"{heading(struct)}\n"
        yield f"{prose.classes[struct.__name__]}\n"
        if struct in KIND_OF and module is not init:
            yield f"Sent by: {senders(struct)}.\n"
        if struct.__struct_config__.array_like:
            yield "An array of these, in this order:\n"
        yield fields_table(struct, prose)


def recipes_chapter() -> Iterator[str]:
    """What a job is asked to do: records that messages carry, and tables of a TOML file."""
    prose = prose_of(recipes)
    yield f"{prose.module}\n"
    for name in prose.order:
        if name in prose.classes and name != recipes.Part.__name__:
            yield f"{heading(vars(recipes)[name])}\n\n{prose.classes[name]}\n"
            yield fields_table(vars(recipes)[name], prose)


def limits_table() -> Iterator[str]:
    """Every limit with its reason: the comment behind it, or the comment lines above it."""
    heads = ["| limit | value | reason |", "|---|---|---|"]
    above: list[str] = []
    rows: list[str] = []
    for line in inspect.getsource(limits).splitlines():
        if section := re.fullmatch(r"# --- (\w+) -+", line):
            yield "\n".join(heads + rows) + "\n"
            rows = []
            yield f"### {section[1].capitalize()}\n"
        elif line.startswith("# "):
            above.append(line.removeprefix("# "))
            continue
        elif limit := re.match(r"(\w+): Final = ", line):
            _, _, behind = line.partition("  # ")
            reason = plain(" ".join(above) or behind)
            rows.append(f"| `{limit[1]}` | {spelled(vars(limits)[limit[1]])} | {reason} |")
        above = []
    yield "\n".join(heads + rows) + "\n"


def annotated_bytes(value: msgspec.Struct) -> str:
    """One frame in hexadecimal, a line for each field; the lines together are its bytes."""
    names = [field.name for field in msgspec.structs.fields(value)]
    encode = msgspec.msgpack.encode
    is_array = type(value).__struct_config__.array_like
    opening = bytes([(0x90 if is_array else 0x80) + len(names)])
    lines = [(opening, f"{'array' if is_array else 'map'} of {len(names)}")]
    for name, item in msgspec.structs.asdict(value).items():
        label = b"" if is_array else encode(name)
        lines.append((label + encode(item), name))
    assert b"".join(line for line, _ in lines) == encode(value)
    return "\n".join(f"    {line.hex(' ')}    # {name}" for line, name in lines)


def conversations_table() -> str:
    """The number ranges."""
    rows = ["| kinds | conversation |", "|---|---|"]
    for number, module in CONVERSATIONS.items():
        first = prose_of(module).module.split("\n\n")[0]
        title = first.partition(": ")[2].removesuffix(".")
        rows.append(f"| 0x{number:02x}00..0x{number:02x}ff | {plain(title)} |")
    return "\n".join(rows)


def placeholders() -> dict[str, str]:
    """What the introduction takes from the schema."""
    hello = connection.Hello(session=bytes(range(16)), role="client", pid=1234)
    header = Header(
        version=limits.PROTOCOL_VERSION, kind=KIND_OF[connection.Hello], id=bytes(range(16, 32))
    )
    row = Committed(threads=[bytes([0, 0, 0, 1, 0, 0, 0, 9])], positions=[7], tokens=[42], ends=[0])
    hot: list[type[Message]] = [
        kind for kind in KINDS.values() if kind.__struct_config__.array_like
    ]
    numbers = {name: f"{value:,}" for name, value in vars(limits).items() if isinstance(value, int)}
    return numbers | {
        "HEADER": fields_table(Header, prose_of(base)),
        "FAILURES": enum_chapter(errors.ErrorKind, prose_of(errors)),
        "CONVERSATIONS": conversations_table(),
        "HOT": ", ".join(f"[{kind.__name__}](#{anchor(kind)})" for kind in hot),
        "EXAMPLE_HELLO_BYTES": str(sum(len(msgspec.msgpack.encode(x)) for x in (header, hello))),
        "EXAMPLE_HEADER": annotated_bytes(header),
        "EXAMPLE_HELLO": annotated_bytes(hello),
        "EXAMPLE_COMMITTED": annotated_bytes(row),
    }


def protocol_text() -> str:
    """The whole document."""
    values = placeholders()
    introduction = (files("llmproto") / "introduction.md").read_text(encoding="utf-8")
    parts = [re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], introduction)]
    for number, module in CONVERSATIONS.items():
        parts.extend(conversation(number, module))
    parts.append("## 12. Recipes\n")
    parts.extend(recipes_chapter())
    parts.append("## 13. Roles and rights\n")
    parts.append(roles_table())
    parts.append(enum_chapter(rights.Right, prose_of(rights)))
    parts.append("## 14. Limits\n")
    parts.extend(limits_table())
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    """Write the document."""
    path = Path(arguments[0]) if arguments else Path(__file__).parents[1] / "PROTOCOL.md"
    path.write_text(protocol_text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
