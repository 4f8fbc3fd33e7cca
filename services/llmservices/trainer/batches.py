"""From a record batch of the data service to micro-batches of one rank.

Invariant: which rows a rank takes, and in which micro-batch they stand, is a function of the batch,
the rank and the recipe; targets and tokens are those of the whole batch, so that every rank knows
by what to divide without asking the others.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from llmservices.texts import segments
from llmservices.trainer.documents import lay_out
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
    types: torch.Tensor | None = None
    """int64, as long as `ids`."""


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
            int((row.labels != segments.NOTHING).sum())
            for row in self.rows
            if row.labels is not None
        )


def from_segment(found: segments.Batch, task: str) -> Batch:
    """The rows of one batch of a segment, in memory of their own."""
    ids = _rows(found.ids)
    labels = _rows(found.labels)
    types = None if found.types is None else _rows(found.types)
    values = found.value.tolist() if task == "regress" and found.value is not None else None
    return Batch(
        [
            Row(
                ids[index],
                labels[index],
                value=None if values is None else values[index],
                lengths=found.documents.row(index).tolist(),
                types=None if types is None else types[index],
            )
            for index in range(found.rows)
        ],
        task,
    )


def _rows(ragged: segments.Ragged) -> list[torch.Tensor]:
    flat = torch.from_numpy(ragged.flat[ragged.offsets[0] : ragged.offsets[-1]].astype(np.int64))
    return list(torch.split(flat, ragged.lengths.tolist()))


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
    types = [row.types for row in rows if row.types is not None]
    documents = lay_out(sequences, types if len(types) == len(sequences) else None, device)
    tokens = documents.tokens
    if task == "generate":
        labels_N = torch.cat([labels[index] for index in documents.order])
        places = (labels_N != segments.NOTHING).nonzero().view(-1)
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
