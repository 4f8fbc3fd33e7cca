"""Tables as text: csv and tsv, with or without a header.  Pure: lines in, rows out.

csv: RFC 4180 (quotes, line breaks inside them).  tsv: cells between tabs, nothing is quoted.
"""

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from llmservices.data.formats import (
    COMPLETION_COLUMNS,
    LABEL_COLUMNS,
    NUMBERED,
    PAIR_COLUMNS,
    TEXT_COLUMNS,
)
from llmservices.data.rows import Bad, Place, Raw

LOOK_ROWS: Final = 1000
"""Rows that are looked at to tell whether the first one is a header."""
HEADER_WORDS_MAX: Final = 3
HEADER_CHARACTERS_MAX: Final = 64
CELL_CHARACTERS_MAX: Final = 1 << 28
CUSTOMARY: Final = frozenset(
    itertools.chain(TEXT_COLUMNS, LABEL_COLUMNS, *PAIR_COLUMNS, *COMPLETION_COLUMNS)
)

Line = tuple[int, list[str]]


def read_table(
    lines: Iterable[str], *, file: str, tabs: bool, named: Sequence[str] = ()
) -> Iterator[Raw | Bad]:
    """Rows by column name; `named` are the columns that the recipe speaks of."""
    cells = _tab_cells(lines) if tabs else _csv_cells(lines, file)
    rows = (row for row in cells if isinstance(row, Bad) or row[1])  # empty lines are none
    looked = list(itertools.islice(rows, LOOK_ROWS))
    whole = [row[1] for row in looked if not isinstance(row, Bad)]
    if not whole:
        yield from (row for row in looked if isinstance(row, Bad))
        return
    if has_header(whole, named):
        names = [cell.strip() for cell in whole[0]]
        looked = looked[1:] if not isinstance(looked[0], Bad) else looked
    else:
        names = [f"{NUMBERED}{number}" for number in range(1, len(whole[0]) + 1)]
    for row in itertools.chain(looked, rows):
        if isinstance(row, Bad):
            yield row
            continue
        line, values = row
        place = Place(file, line)
        if len(values) != len(names):
            yield Bad(place, f"{len(values)} columns, the table has {len(names)}")
        else:
            yield Raw(place, dict(zip(names, values, strict=True)))


def has_header(rows: Sequence[Sequence[str]], named: Sequence[str]) -> bool:
    """Whether the first row names the columns.

    It does where it holds a name that the recipe or custom gives to columns; and where it looks
    like names (short, distinct, no numbers) that do not come again below them.
    """
    first = [cell.strip() for cell in rows[0]]
    if len(set(first)) < len(first):
        return False
    if any(name in first for name in named) or CUSTOMARY & set(first):
        return True
    if not all(_like_a_name(cell) for cell in first) or len(rows) < 2:
        return False
    return not any(
        cell == row[column].strip()
        for column, cell in enumerate(first)
        for row in rows[1:]
        if column < len(row)
    )


def _like_a_name(cell: str) -> bool:
    return (
        0 < len(cell) <= HEADER_CHARACTERS_MAX
        and len(cell.split()) <= HEADER_WORDS_MAX
        and (cell[0].isalpha() or cell[0] == "_")
    )


def _tab_cells(lines: Iterable[str]) -> Iterator[Line | Bad]:
    for number, line in enumerate(lines, 1):
        bare = line.rstrip("\r\n")
        yield number, bare.split("\t") if bare else []


def _csv_cells(lines: Iterable[str], file: str) -> Iterator[Line | Bad]:
    csv.field_size_limit(CELL_CHARACTERS_MAX)
    reader = csv.reader(lines, strict=True)
    begin = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Bad(Place(file, begin), f"is no csv: {error}")
            begin = reader.line_num + 1
            continue
        yield begin, row
        begin = reader.line_num + 1
