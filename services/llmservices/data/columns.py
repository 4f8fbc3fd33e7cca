"""What the columns of some rows hold: types, gaps, frequent values, lengths of text.

Memory is bounded: distinct values are counted until there are too many to be categories, lengths
take four bytes a row.
"""

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Final

import numpy as np
from llmproto.data import DataColumn

VALUES_MAX: Final = 200
"""A column with more distinct values is not shown by its values."""
VALUES_SHOWN: Final = 10
VALUE_CHARACTERS: Final = 60
COLUMNS_MAX: Final = 200
LEVELS: Final = (0.0, 0.5, 0.95, 1.0)


class Column:
    """One column so far."""

    def __init__(self, missing: int) -> None:
        self.missing = missing
        self.types: Counter[str] = Counter()
        self.values: Counter[str] | None = Counter()
        self.lengths = array("I")

    def take(self, value: object) -> None:
        """The value of one row."""
        if value is None:
            self.missing += 1
            return
        self.types[type(value).__name__] += 1
        if isinstance(value, str):
            self.lengths.append(len(value))
        if self.values is not None and isinstance(value, str | int | float | bool):
            self.values[str(value)[:VALUE_CHARACTERS]] += 1
            if len(self.values) > VALUES_MAX:
                self.values = None


class Columns:
    """All columns of the rows so far."""

    def __init__(self) -> None:
        self._columns: dict[str, Column] = {}
        self._rows = 0

    def take(self, values: Mapping[str, object]) -> None:
        """One row."""
        for name, value in values.items():
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) >= COLUMNS_MAX:
                    continue
                column = self._columns[name] = Column(self._rows)
            column.take(value)
        for name, column in self._columns.items():
            if name not in values:
                column.missing += 1
        self._rows += 1

    def found(self) -> list[DataColumn]:
        """What is told of them."""
        return [_told(name, column) for name, column in self._columns.items()]


def _told(name: str, column: Column) -> DataColumn:
    lengths = np.array(column.lengths, np.int64)
    values = column.values or Counter()
    repeated = sum(values.values()) > len(values)
    return DataColumn(
        name=name,
        type=" or ".join(sorted(column.types)) or "nothing",
        missing=column.missing,
        values=dict(values.most_common(VALUES_SHOWN)) if repeated else {},
        characters=[
            int(np.quantile(lengths, level, method="nearest")) for level in LEVELS if len(lengths)
        ],
    )
