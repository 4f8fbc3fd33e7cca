"""What a chat template's expressions may make of little: the ways to a huge text, bounded.

Meant for broken templates, not for hostile ones: those are kept out by who may add a model.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import jinja2
from jinja2 import filters
from llmproto import limits

TEXT_CHARACTERS_MAX: Final = 4 * limits.PROMPT_BYTES_MAX
"""Of any string on the way: what a long chat needs, and room."""
NUMBER_BITS_MAX: Final = 4096
WIDTH_MAX: Final = 999  # padding and indentation
PADDING: Final = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
WIDE_FIELDS: Final = {
    "%": re.compile(r"%(\([^)]*\))?[-+ #0]*(\d{4}|\d*\*|\d*\.(\d{4}|\*))"),
    "{": re.compile(r"\{[^{}]*(\{|\d{4})"),
}
"""By the character that begins a field: widths of four digits, or given by a value."""


class Bound(Exception):
    """The template did more than it may."""


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes that Jinja's own filter writes."""
    if isinstance(indent, int):
        bounded_width(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    check_method(str(text), "replace", (str(old), str(new)))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


@jinja2.pass_eval_context
def _join(
    context: jinja2.nodes.EvalContext,
    items: Iterable[Any],
    between: str = "",
    attribute: str | int | None = None,
) -> str:
    kept = list(items)
    bounded(len(kept) * len(str(between)))
    return str(filters.do_join(context, kept, between, attribute))


def _center(text: str, width: int = 80) -> str:
    bounded_width(width)
    return filters.do_center(text, width)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    bounded_width(len(width) if isinstance(width, str) else width)
    bounded(len(text) + text.count("\n") * (len(width) if isinstance(width, str) else width))
    return filters.do_indent(text, width, first, blank)


def _format(text: object, *values: Any, **named: Any) -> str:  # Any: Jinja's signature
    check_format(str(text), "%", (*values, *named.values()))
    return filters.do_format(str(text), *values, **named)


def _batch(items: Iterable[Any], count: int, fill_with: object = None) -> Iterator[list[Any]]:
    bounded_width(count)
    yield from filters.do_batch(items, count, fill_with)


def _slice(items: Iterable[Any], count: int, fill_with: object = None) -> Iterator[list[Any]]:
    bounded_width(count)
    yield from filters.do_slice(list(items), count, fill_with)


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "tojson": _tojson,
    "replace": _replace,
    "join": _join,
    "center": _center,
    "indent": _indent,
    "format": _format,
    "batch": _batch,
    "slice": _slice,
}
"""Instead of Jinja's own of these names."""


def check_binop(operator: str, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
        if bits > NUMBER_BITS_MAX and operator in {"**", "*"}:
            raise Bound(f"a number takes more than {NUMBER_BITS_MAX} bits")
    elif (
        operator == "+"
        and isinstance(left, str | list | tuple)
        and isinstance(right, str | list | tuple)
    ):
        bounded(len(left) + len(right))
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                bounded(len(sequence) * times)
    elif operator == "%" and isinstance(left, str):
        values = right if isinstance(right, tuple) else (right,)
        check_format(left, "%", values)


def check_method(owner: str, name: str, arguments: Sequence[object]) -> None:
    if name in PADDING:
        for argument in arguments:
            if isinstance(argument, int):
                bounded_width(argument)
    elif name == "replace" and len(arguments) >= 2:
        old, new = arguments[:2]
        if isinstance(old, str) and isinstance(new, str):
            bounded(len(owner) + owner.count(old) * len(new))
    elif name == "join" and arguments and isinstance(arguments[0], list | tuple):
        bounded(len(owner) * len(arguments[0]))
    elif name == "translate":
        raise Bound("str.translate is not available")


def check_format(owner: str, marker: str, values: Iterable[object]) -> None:
    """The widths in a format string, and how often its fields can repeat a value."""
    fields = owner.replace(2 * marker, "")  # doubled, it stands for itself
    if WIDE_FIELDS[marker].search(fields):
        raise Bound(f"a field is wider than {WIDTH_MAX} characters, or as wide as a value says")
    longest = max((len(str(value)) for value in values), default=0)
    bounded(len(owner) + owner.count(marker) * longest)


def bounded(characters: int) -> None:
    if characters > TEXT_CHARACTERS_MAX:
        raise Bound(f"a text has more than {TEXT_CHARACTERS_MAX} characters")


def bounded_width(width: int) -> None:
    if width > WIDTH_MAX:
        raise Bound(f"a field is {width} characters wide, more than {WIDTH_MAX}")
