"""Batches: a pure function of a dataset, an order and an index.

Nothing here reads a file, keeps a place or knows what was asked before: batch i is the same whoever
asks, whenever, in whatever order.
"""

from functools import lru_cache
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from llmproto.errors import invalid

from llmservices.data import order, packing
from llmservices.data.dataset import Dataset
from llmservices.texts.segments import NOTHING

SEGMENT_TOKENS: Final = 1 << 20
"""A segment of about 8 MB: made in a fraction of a second, large beside what asking costs."""
SEGMENT_BATCHES_MAX: Final = 4096
SEGMENT_EPOCHS_MAX: Final = 64
"""Of few rows, whose orders cost more than their tokens."""
EPOCHS_KEPT: Final = 2
"""Orders that are kept: a segment may span the end of an epoch."""

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class Arrangement(msgspec.Struct, frozen=True):
    """How the rows of a dataset become batches; with its digest, the whole plan."""

    dataset: str
    task: Literal["generate", "classify", "regress"]
    context_tokens: int
    batch: int
    seed: int
    shuffle: bool
    packing: Literal["none", "isolated", "joined"] = "none"
    sampling: Literal["epochs", "windows"] = "epochs"
    group_by_length: bool = False
    rules: int = 2
    """Grows when the same arrangement comes to mean another order: a plan never changes its
    content."""


class Rows(NamedTuple):
    """Some rows, flat: what a segment's columns are made of."""

    ids: Int32s
    lengths: Int64s
    labels: Int32s
    label_lengths: Int64s
    documents: Int64s
    """Length of each document."""
    document_counts: Int64s
    """How many documents each row has."""
    types: Int32s | None
    values: npt.NDArray[np.float32] | None


class Plan:
    """A dataset in an order.

    Invariant: in every epoch each row of the dataset comes exactly once (windows apart).
    """

    def __init__(self, dataset: Dataset, arrangement: Arrangement) -> None:
        self.arrangement = arrangement
        self._dataset = dataset
        lengths = dataset.lengths
        self._stream_tokens = int(dataset.offsets[-1])
        if self._is_windows and dataset.meta.ends:
            self._stream_tokens -= 1  # documents are parted by the token, nothing follows the last
        if self._is_windows and self._stream_tokens <= arrangement.context_tokens:
            raise invalid(
                f"the data has {self._stream_tokens} tokens, a window needs "
                f"{arrangement.context_tokens + 1}: shorten context_tokens, or add data"
            )
        self._stream = self._shuffled_stream(lengths)
        self._starts, self._counts, self._documents = self._rows(lengths)
        self.rows = len(self._counts)
        self.batches = -(-self.rows // arrangement.batch)
        self.tokens = self._epoch_tokens()
        per_batch = max(1, self.tokens // max(1, self.batches))
        most = min(SEGMENT_BATCHES_MAX, SEGMENT_EPOCHS_MAX * self.batches)
        self.segment_batches = max(1, min(most, SEGMENT_TOKENS // per_batch))
        self._order = lru_cache(EPOCHS_KEPT)(self._order_of)

    @property
    def _is_windows(self) -> bool:
        return self.arrangement.sampling == "windows"

    def batch_rows(self, index: int) -> Int64s:
        """Numbers of the rows of a batch, counting through all epochs."""
        epoch, place = divmod(index, self.batches)
        first = place * self.arrangement.batch
        return self._order(epoch)[first : first + self.arrangement.batch]

    def segment(self, index: int) -> tuple[Rows, list[int]]:
        """The batches of segment `index` one after another, and how many rows each has."""
        first = index * self.segment_batches
        batches = range(first, first + self.segment_batches)
        if self._is_windows and self.arrangement.shuffle:
            parts = [self._window_starts(batch) for batch in batches]
            starts = np.concatenate(parts)
            lengths = np.full(len(starts), self.arrangement.context_tokens, np.int64)
            return self._pieces(starts, lengths), [len(part) for part in parts]
        parts = [self.batch_rows(batch) for batch in batches]
        return self._take(np.concatenate(parts)), [len(part) for part in parts]

    # --- rows: documents, packs or windows ------------------------------------------------

    def _rows(self, lengths: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """For each row: its first document (or token), how many there are; and all documents."""
        room = self.arrangement.context_tokens
        if self._is_windows:
            starts = packing.joined(max(0, self._stream_tokens - 1), room)
            return starts[:-1], np.diff(starts), np.empty(0, np.int64)
        if self.arrangement.packing == "joined":
            starts = packing.joined(self._stream_tokens, room)
            return starts[:-1], np.diff(starts), np.empty(0, np.int64)
        if self.arrangement.packing == "isolated":
            documents, offsets = packing.isolated(lengths, room)
            return offsets[:-1], np.diff(offsets), documents
        count = len(lengths)
        return np.arange(count), np.ones(count, np.int64), np.arange(count)

    def _shuffled_stream(self, lengths: Int64s) -> tuple[Int64s, Int64s] | None:
        """Documents in the order of joining, and where each begins; None: as they lie.

        Neighbours are often about one thing, and a row of them teaches to copy.
        """
        asked = self.arrangement
        if asked.packing != "joined" or not asked.shuffle:
            return None
        documents = order.permutation(len(lengths), asked.seed)
        return documents, packing.offsets_of(lengths[documents])

    def _in_data(self, places: Int64s) -> Int64s:
        """Where tokens of the joined stream lie among those of the dataset."""
        if self._stream is None:
            return places
        documents, begins = self._stream
        which = np.searchsorted(begins, places, side="right") - 1
        found: Int64s = self._dataset.offsets[documents[which]] + places - begins[which]
        return found

    @property
    def _is_stream(self) -> bool:
        """Rows are pieces of all tokens, not documents."""
        return self._is_windows or self.arrangement.packing == "joined"

    def _epoch_tokens(self) -> int:
        return int(self._counts.sum()) if self._is_stream else self._stream_tokens

    def _row_tokens(self) -> Int64s:
        if self._is_stream:
            return self._counts
        lengths = self._dataset.lengths[self._documents]
        return np.add.reduceat(lengths, self._starts) if len(lengths) else lengths

    def _order_of(self, epoch: int) -> Int64s:
        asked = self.arrangement
        if asked.shuffle:
            rows = order.shuffled(self.rows, asked.seed, epoch)
        else:
            rows = np.arange(self.rows)
        if asked.group_by_length:
            lengths = self._row_tokens()
            seed = asked.seed + epoch
            rows = order.grouped_by_length(rows, lengths, batch=asked.batch, seed=seed)
        return rows

    def _window_starts(self, batch: int) -> Int64s:
        places = self._stream_tokens - self.arrangement.context_tokens
        asked = self.arrangement
        return order.window_starts(asked.batch, places, seed=asked.seed, index=batch)

    # --- tokens ---------------------------------------------------------------------------

    def _take(self, rows: Int64s) -> Rows:
        starts, counts = self._starts[rows], self._counts[rows]
        if self._is_stream:
            return self._pieces(starts, counts)
        documents = self._documents[packing.ranges(starts, counts)]
        offsets = self._dataset.offsets
        begins = offsets[documents]
        return self._gather(begins, offsets[documents + 1] - begins, counts, documents)

    def _gather(self, starts: Int64s, lengths: Int64s, counts: Int64s, documents: Int64s) -> Rows:
        """The tokens of some documents, and what is learned of them."""
        data = self._dataset
        places = packing.ranges(starts, lengths)
        ids = data.ids[places]
        firsts = packing.offsets_of(counts)
        row_lengths = np.add.reduceat(lengths, firsts[:-1]) if len(lengths) else lengths
        values = None
        labels, label_lengths = self._learned(places, ids, lengths), row_lengths
        if self.arrangement.task != "generate":
            labels, label_lengths = np.empty(0, np.int32), np.zeros(len(counts), np.int64)
            if data.labels is not None:
                labels, label_lengths = data.labels[documents], np.ones(len(counts), np.int64)
            values = None if data.values is None else data.values[documents]
        types = None if data.types is None else data.types[places].astype(np.int32)
        return Rows(ids, row_lengths, labels, label_lengths, lengths, counts, types, values)

    def _learned(self, places: Int64s, ids: Int32s, lengths: Int64s) -> Int32s:
        """The token after each, or NOTHING."""
        labels = np.empty(len(ids), np.int32)
        labels[:-1] = ids[1:]
        learn = self._dataset.learn
        if learn is None:
            labels[np.cumsum(lengths) - 1] = NOTHING
            return labels
        # The last of a piece is followed by a token that its row does not hold.
        ends = np.cumsum(lengths) - 1
        following = np.minimum(places[ends] + 1, self._dataset.offsets[-1] - 1)
        labels[ends] = self._dataset.ids[following]
        labels[learn[places] == 0] = NOTHING
        return labels

    def _pieces(self, starts: Int64s, lengths: Int64s) -> Rows:
        """Pieces of all tokens, each token's label the next one."""
        data = self._dataset
        places = packing.ranges(starts, lengths)
        last = self._stream_tokens - 1
        labels = data.ids[self._in_data(np.minimum(places + 1, last))]
        labels[places == last] = NOTHING
        places = self._in_data(places)
        if data.learn is not None:
            labels[data.learn[places] == 0] = NOTHING
        ones = np.ones(len(starts), np.int64)
        return Rows(data.ids[places], lengths, labels, lengths, lengths, ones, None, None)
