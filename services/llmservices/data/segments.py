"""Segments: the batches of a plan as Arrow files, for whoever maps them."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llmservices.data.cache import Cache, disk, file_digest, sync
from llmservices.data.core import Plan, Rows
from llmservices.data.packing import Int64s, offsets_of
from llmservices.texts.arrow import to_arrow


class SegmentMade(NamedTuple):
    """A whole segment on disk."""

    path: Path
    digest: bytes
    bytes: int


def make_segment(cache: Cache, plan: Plan, digest: bytes, index: int) -> SegmentMade:
    """Write segment `index`; EXHAUSTED where the disk is full."""
    rows, counts = plan.segment(index)
    path = cache.segment_path(digest, index)
    with cache.making() as folder, disk():
        made = folder / "segment"
        write_segment(made, rows, counts)
        sync(made)
        found = SegmentMade(path, bytes.fromhex(file_digest(made)), made.stat().st_size)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(made, path)
    return found


def write_segment(path: Path, rows: Rows, counts: list[int]) -> None:
    """One record batch for each batch."""
    columns = {
        "ids": _ragged(rows.ids, rows.lengths),
        "labels": _ragged(rows.labels, rows.label_lengths),
        "lengths": _ragged(rows.documents.astype(np.int32), rows.document_counts),
    }
    if rows.types is not None:
        columns["types"] = _ragged(rows.types, rows.lengths)
    if rows.values is not None:
        columns["value"] = to_arrow(rows.values, pa.float32())
    whole = pa.RecordBatch.from_pydict(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        first = 0
        for count in counts:
            writer.write_batch(whole.slice(first, count))
            first += count


def _ragged(flat: Any, lengths: Int64s) -> Any:  # pyarrow has no types
    offsets = to_arrow(offsets_of(lengths).astype(np.int32), pa.int32())
    return pa.ListArray.from_arrays(offsets, to_arrow(flat.astype(np.int32), pa.int32()))
