"""How a command speaks: tables and lines for people, JSON for programs, refusals on stderr.

Invariant: with --json, standard output holds JSON documents and nothing else.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBROKEN = 10_000
"""Width where the output is no terminal: a row stays on its line, for grep and awk."""


def console() -> "Console":
    """Standard output for people; without colours or folding when it is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else UNBROKEN
    return Console(width=width, highlight=False, markup=False, emoji=False)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> "Table":
    """A table without rules; headings named in `right` (separated by blanks) hold numbers."""
    from rich.table import Table
    from rich.text import Text

    numbers = right.split()
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for heading in headings:
        if heading in numbers:
            made.add_column(heading, justify="right", no_wrap=True)
        else:
            made.add_column(heading, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def print_json(document: object) -> None:
    """One document, or one line of several."""
    print(json.dumps(plain(document), ensure_ascii=False), flush=True)


def plain(value: object) -> object:
    """The value in JSON's types: structs as objects, ids in hexadecimal."""
    import msgspec

    return _hexed(msgspec.to_builtins(value, builtin_types=(bytes, bytearray)))


def _hexed(value: object) -> object:
    match value:
        case bytes() | bytearray():
            return value.hex()
        case dict():
            return {key: _hexed(item) for key, item in value.items()}
        case list() | tuple():
            return [_hexed(item) for item in value]
        case _:
            return value


def refuse(line: str) -> None:
    """Say on standard error why nothing, or no more, was done."""
    print(f"llmos: {line}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line about the work, where standard output belongs to the result."""
    print(line, file=sys.stderr, flush=True)


def duration(milliseconds: int) -> str:
    """`850ms`, `12s`, `4m10s`, `3h02m`, `5d01h`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds = milliseconds // 1000
    units = (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))
    for unit, unit_s, part, part_s in units:
        if seconds >= unit_s:
            return f"{seconds // unit_s}{unit}{seconds % unit_s // part_s:02}{part}"
    return f"{seconds}s"


def size(count: int) -> str:
    """Bytes in units of 1024: `812 B`, `3.9 MB`."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1024
        if value < 1024 or unit == "TB":
            break
    return f"{value:.1f} {unit}"
