"""Segments of training data: reading the Arrow files that the data service makes.

A segment is mapped, not read: the arrays of a batch are views of the page cache, read-only, valid
for as long as anything refers to them.  The columns are those of `llmproto.data.Segment`.
"""

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmservices.texts.arrow import to_numpy

NOTHING: Final = -100
"""The label where nothing is learned: what losses of the field ignore by default."""

Int32s = npt.NDArray[np.int32]


class Ragged(NamedTuple):
    """Rows of different lengths in one array: row i is `flat[offsets[i]:offsets[i + 1]]`."""

    flat: Int32s
    offsets: Int32s

    def row(self, index: int) -> Int32s:
        """One row, a view."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int32s:
        """Of each row."""
        return np.diff(self.offsets)


class Batch(NamedTuple):
    """One batch, over all ranks; rank r of n takes rows r, r + n, ..."""

    ids: Ragged
    labels: Ragged
    documents: Ragged
    """Lengths of each row's documents."""
    types: Ragged | None
    value: npt.NDArray[np.float32] | None

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self.ids.offsets) - 1

    def padded(
        self, rows: npt.NDArray[np.int64], *, padding: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The ids of some rows as one matrix, and where it holds tokens."""
        return matrix(self.ids, rows, padding)


def matrix(
    ragged: Ragged, rows: npt.NDArray[np.int64], padding: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Rows as one matrix [rows, longest], and where it holds values; no loop over rows."""
    starts = ragged.offsets[rows].astype(np.int64)
    lengths = ragged.offsets[rows + 1] - starts
    columns = np.arange(lengths.max(initial=0))
    present = columns[None, :] < lengths[:, None]
    filled = np.full(present.shape, padding, np.int64)
    filled[present] = ragged.flat[(starts[:, None] + columns[None, :])[present]]
    return filled, present


class SegmentFile:
    """One mapped segment."""

    def __init__(self, path: str | Path) -> None:
        self._reader: Any = pa.ipc.open_file(pa.memory_map(str(path)))  # pyarrow has no types

    def __len__(self) -> int:
        """Batches."""
        return int(self._reader.num_record_batches)

    def batch(self, index: int) -> Batch:
        """Number `index` of this segment, from 0; its arrays are views of the file."""
        batch = self._reader.get_batch(index)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        value = columns.get("value")
        return Batch(
            ids=_ragged(columns["ids"]),
            labels=_ragged(columns["labels"]),
            documents=_ragged(columns["lengths"]),
            types=_ragged(columns["types"]) if "types" in columns else None,
            value=None if value is None else to_numpy(value, np.float32),
        )


def _ragged(column: Any) -> Ragged:  # pyarrow has no types
    return Ragged(to_numpy(column.values, np.int32), to_numpy(column.offsets, np.int32))
