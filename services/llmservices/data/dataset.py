"""Tokenised rows on disk: one Arrow file that is mapped, never read into memory as a whole.

Invariant: `learn[j]` is 1 where `ids[j + 1]` is to be predicted from what stands up to j.  At the
end of a document it is 0, but where a piece of a split text goes on in the next row.
"""

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmservices.texts.arrow import to_arrow, to_numpy

ROWS_FILE: Final = "rows.arrow"
META_FILE: Final = "meta.json"

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class Meta(msgspec.Struct, frozen=True):
    """What is known of a dataset beside its rows; written when they are whole."""

    digest: str
    """BLAKE3 of the file, hexadecimal."""
    bytes: int
    rows: int
    tokens: int
    format: str
    dropped: dict[str, int]
    changed: dict[str, int]
    labels: list[str]
    ends: bool
    """Documents end with a token of their own."""


class Dataset:
    """Mapped rows; its arrays are read-only views."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.meta = meta
        reader: Any = pa.ipc.open_file(pa.memory_map(str(folder / ROWS_FILE)))  # untyped library
        batch = reader.get_batch(0)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        ids = columns["ids"]
        self.ids: Int32s = to_numpy(ids.values, np.int32)
        self.offsets: Int64s = to_numpy(ids.offsets, np.int64)
        self.learn: npt.NDArray[np.uint8] | None = None
        self.types: npt.NDArray[np.uint8] | None = None
        self.labels: Int32s | None = None
        self.values: npt.NDArray[np.float32] | None = None
        if "learn" in columns:
            self.learn = to_numpy(columns["learn"].values, np.uint8)
        if "types" in columns:
            self.types = to_numpy(columns["types"].values, np.uint8)
        if "label" in columns:
            self.labels = to_numpy(columns["label"], np.int32)
        if "value" in columns:
            self.values = to_numpy(columns["value"], np.float32)

    @property
    def lengths(self) -> Int64s:
        """Tokens of each row."""
        return np.diff(self.offsets)


def write_rows(
    path: Path,
    *,
    ids: Path,
    lengths: Int64s,
    learn: Path | None,
    types: Path | None,
    labels: Int32s | None,
    values: npt.NDArray[np.float32] | None,
) -> None:
    """The Arrow file of flat columns that stand in files, which are mapped rather than read."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    columns = {"ids": _ragged(ids, offsets, pa.int32())}
    if learn is not None:
        columns["learn"] = _ragged(learn, offsets, pa.uint8())
    if types is not None:
        columns["types"] = _ragged(types, offsets, pa.uint8())
    if labels is not None:
        columns["label"] = to_arrow(labels, pa.int32())
    if values is not None:
        columns["value"] = to_arrow(values, pa.float32())
    batch = pa.RecordBatch.from_pydict(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _ragged(flat: Path, offsets: Int64s, item: Any) -> Any:  # pyarrow has no types
    mapped = pa.memory_map(str(flat)).read_buffer()
    values = pa.Array.from_buffers(item, int(offsets[-1]), [None, mapped])
    return pa.LargeListArray.from_arrays(to_arrow(offsets, pa.int64()), values)
