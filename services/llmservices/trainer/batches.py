"""From a record batch of the data service to micro-batches of one rank.

Invariant: which rows a rank takes, and in which micro-batch they stand, is a function of the batch,
the rank and the recipe; targets and tokens are those of the whole batch, so that every rank knows
by what to divide without asking the others.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from llmservices.trainer.documents import IGNORED, lay_out
from llmservices.trainer.learner import MicroBatch


class Row(msgspec.Struct, frozen=True):
    """One sequence of a batch."""

    ids: torch.Tensor
    """int64."""
    labels: torch.Tensor | None
    """int64: as long as `ids` for a generator, one class for a classifier."""
    value: float | None = None
    lengths: list[int] | None = None
    """Of the documents in a packed row."""


class Batch(msgspec.Struct, frozen=True):
    """What one optimiser step takes."""

    rows: list[Row]
    task: str

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def targets(self) -> int:
        """Of all rows: what a sum of losses is divided by."""
        if self.task != "generate":
            return len(self.rows)
        return sum(
            int((row.labels != IGNORED).sum()) for row in self.rows if row.labels is not None
        )


def from_arrow(record: Any, task: str) -> Batch:  # Any: pyarrow has no types
    """The rows of a pyarrow RecordBatch of a segment."""
    names = set(record.schema.names)
    ids = _lists(record.column("ids"))
    labels = _lists(record.column("labels")) if "labels" in names else None
    lengths = _lists(record.column("lengths")) if "lengths" in names else None
    values = record.column("value").to_pylist() if task == "regress" else None
    return Batch(
        [
            Row(
                ids[index],
                None if labels is None or task == "regress" else labels[index],
                None if values is None else values[index],
                None if lengths is None else lengths[index].tolist(),
            )
            for index in range(len(ids))
        ],
        task,
    )


def _lists(column: Any) -> list[torch.Tensor]:  # Any: pyarrow has no types
    offsets = column.offsets.to_numpy()
    flat = torch.from_numpy(np.asarray(column.values.to_numpy(), dtype=np.int64))
    return [flat[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist())]


def share(batch: Batch, *, rank: int, processes: int, micro_batch: int | None) -> list[list[Row]]:
    """The rows of one rank, micro-batch by micro-batch.  Every rank has equally many micro-batches:
    where rows are too few for that, some are empty."""
    rows = batch.rows[rank::processes]
    most = -(-len(batch.rows) // processes)
    size = min(micro_batch or most, most)
    return [rows[first : first + size] for first in range(0, most, size)]


def micro_batch(rows: Sequence[Row], task: str, device: torch.device | None = None) -> MicroBatch:
    """Rows side by side, a packed row cut into its documents."""
    sequences: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for row in rows:
        whole = row.lengths if row.lengths and task == "generate" else [len(row.ids)]
        sequences += torch.split(row.ids, whole)
        if task == "generate":
            assert row.labels is not None
            labels += torch.split(row.labels, whole)
    documents = lay_out(sequences, device)
    tokens = documents.tokens
    if task == "generate":
        labels_N = torch.cat([labels[index] for index in documents.order])
        places = (labels_N != IGNORED).nonzero().view(-1)
        targets = labels_N.index_select(0, places)
        return MicroBatch(documents, _on(places, device), _on(targets, device), tokens)
    if task == "regress":
        values = torch.tensor([rows[index].value for index in documents.order])
        return MicroBatch(documents, None, _on(values, device), tokens)
    classes = torch.cat([_class(rows[index]) for index in documents.order])
    return MicroBatch(documents, None, _on(classes, device), tokens)


def _class(row: Row) -> torch.Tensor:
    assert row.labels is not None and len(row.labels) == 1, "a classifier's row has one label"
    return row.labels


def _on(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return tensor if device is None else tensor.to(device)
