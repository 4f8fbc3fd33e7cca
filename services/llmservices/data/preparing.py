"""From files to tokenised rows on disk: the pipeline, run once for each content and recipe.

Invariant: equal files, recipe, tokenizer and libraries give equal rows, byte for byte, whoever
makes them and however often he died on the way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers
from blake3 import blake3
from llmproto.errors import invalid
from llmproto.recipes import DataRecipe

from llmservices.data.cache import disk, file_digest, sync
from llmservices.data.dataset import ROWS_FILE, Meta, write_rows
from llmservices.data.encoding import Encoded, Encoder
from llmservices.data.examples import Source, examples
from llmservices.data.formats import Shape, Task, no_rows, sorted_labels
from llmservices.data.rendering import Rendered, Renderer
from llmservices.data.rows import Bad, BadRow, Labelled, Place, Tally

PIPELINE_FORMAT: Final = 1
"""Grows with every change of what the same data become."""
LIBRARIES: Final = (f"tokenizers {tokenizers.__version__}",)
CHUNK_ROWS: Final = 4096
CHUNK_CHARACTERS: Final = 1 << 20

Int64s = npt.NDArray[np.int64]
T = TypeVar("T")


class Pipeline(msgspec.Struct, frozen=True):
    """All that rows depend on, beside the files' content."""

    recipe: DataRecipe
    """Without its files."""
    keep: str
    task: Task
    context_tokens: int
    labels: tuple[str, ...]
    tokenizer: str
    stream: bool
    """Rows are cut from all tokens: no document is too long."""
    libraries: tuple[str, ...]
    format: int = PIPELINE_FORMAT


def dataset_digest(contents: Sequence[str], pipeline: Pipeline) -> str:
    """Of files and pipeline, hexadecimal."""
    return blake3(msgspec.msgpack.encode([list(contents), pipeline])).hexdigest()


class Piece(NamedTuple):
    """A row on its way to disk."""

    place: Place
    rendered: Rendered
    label: str | None
    value: float | None


class Work:
    """One preparation."""

    def __init__(
        self,
        source: Source,
        pipeline: Pipeline,
        encoder: Encoder,
        *,
        progress: Callable[[int], None],
    ) -> None:
        self._source = source
        self._pipeline = pipeline
        self._recipe = pipeline.recipe
        self._encoder = encoder
        self._progress = progress
        self._tally = Tally()
        self._shape: Shape | None = None
        self._labels: dict[str, int] = {}
        self._codes: list[int] = []
        self._values: list[float] = []
        self._lengths: list[Int64s] = []

    def run(self, folder: Path) -> Meta:
        """Write the rows into the folder; INVALID where the data are not what they should be,
        EXHAUSTED where the disk is full."""
        with disk():
            with Spill(folder) as spill:
                for chunk in self._chunks():
                    self._take(chunk, spill)
                    self._progress(len(chunk))
            return self._finish(folder, spill)

    def _pieces(self) -> Iterator[Piece]:
        renderer = Renderer(self._encoder.template, learn_all=self._recipe.loss == "all")
        for place, example in examples(self._source, self._tally, self._set_shape):
            try:
                rendered = renderer.render(example)
            except BadRow as error:
                skip = self._recipe.bad_rows == "skip"
                self._tally.take_bad(Bad(place, str(error)), skip=skip)
                continue
            if isinstance(example, Labelled):
                yield Piece(place, rendered, example.label, example.value)
            else:
                yield Piece(place, rendered, None, None)

    def _set_shape(self, shape: Shape) -> None:
        self._shape = shape
        if self._recipe.too_long == "split" and shape.format != "text":
            raise invalid(
                f'too_long = "split" is for plain text, the data are {shape.format}: choose '
                '"truncate", "skip" or "error"'
            )

    def _chunks(self) -> Iterator[list[Piece]]:
        return heaps(self._pieces(), lambda piece: len(piece.rendered.text))

    def _take(self, chunk: list[Piece], spill: "Spill") -> None:
        encoded = self._encoder.encode([piece.rendered for piece in chunk])
        self._count_unknown(encoded)
        learn = None if encoded.learned is None else shifted(encoded.learned, encoded.lengths)
        rows = Heap(encoded.ids, encoded.lengths, learn, encoded.types, np.arange(len(chunk)))
        if not self._pipeline.stream:
            rows = self._fit(rows, chunk)
        rows = self._drop_unlearned(rows)
        for origin in rows.origins.tolist():
            label, value = chunk[origin].label, chunk[origin].value
            if label is not None:
                self._codes.append(self._labels.setdefault(label, len(self._labels)))
            if value is not None:
                self._values.append(value)
        self._lengths.append(rows.lengths)
        spill.append(rows)

    def _fit(self, rows: "Heap", chunk: list[Piece]) -> "Heap":
        """By policy, nothing that is longer than the context."""
        room = self._pipeline.context_tokens
        long = np.flatnonzero(rows.lengths > room)
        if not len(long):
            return rows
        match self._recipe.too_long:
            case "error":
                first = int(long[0])
                raise invalid(
                    f"{chunk[first].place}: {rows.lengths[first]} tokens, the context has {room}: "
                    'shorten it, or set too_long = "truncate", "skip" or (plain text) "split"'
                )
            case "skip":
                self._tally.dropped["too_long"] += len(long)
                return rows.chosen(np.flatnonzero(rows.lengths <= room))
            case "truncate":
                self._tally.changed["truncated"] += len(long)
                return self._truncate(rows, chunk, set(long.tolist()))
            case "split":
                self._tally.changed["split"] += len(long)
                return rows.split(room)

    def _truncate(self, rows: "Heap", chunk: list[Piece], long: set[int]) -> "Heap":
        parts = []
        for index in range(len(rows.lengths)):
            if index not in long:
                parts.append(rows.chosen(np.array([index])))
                continue
            short = self._encoder.truncated(chunk[index].rendered, self._pipeline.context_tokens)
            learn = None if rows.learn is None else np.ones(len(short.ids), np.uint8)
            if short.learned is not None:
                learn = shifted(short.learned, short.lengths)
            elif learn is not None:
                learn[-1] = 0
            parts.append(Heap(short.ids, short.lengths, learn, short.types, np.array([index])))
        return Heap.joined(parts)

    def _drop_unlearned(self, rows: "Heap") -> "Heap":
        """A row of which nothing is learned would be a step for nothing."""
        if self._pipeline.task != "generate" or self._pipeline.stream or not len(rows.lengths):
            return rows.chosen(np.flatnonzero(rows.lengths > 0))
        if rows.learn is None:
            useful = rows.lengths > 1
        else:
            ends = np.cumsum(rows.lengths)
            sums = np.concatenate([[0], np.cumsum(rows.learn, dtype=np.int64)])
            useful = sums[ends] - sums[ends - rows.lengths] > 0
        useless = int((~useful).sum())
        if not useless:
            return rows
        self._tally.dropped["nothing_to_learn"] += useless
        return rows.chosen(np.flatnonzero(useful))

    def _count_unknown(self, encoded: Encoded) -> None:
        if self._encoder.unknown is not None:
            unknown = int((encoded.ids == self._encoder.unknown).sum())
            if unknown:
                self._tally.changed["unknown_tokens"] += unknown  # tokens, not rows

    def _finish(self, folder: Path, spill: "Spill") -> Meta:
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int64)
        if not len(lengths):
            what = ", ".join(map(str, self._source.files[:3])) or "the recipe"
            raise no_rows(what, self._tally.dropped)
        labels, codes = self._final_labels()
        write_rows(
            folder / ROWS_FILE,
            ids=spill.ids,
            lengths=lengths,
            learn=spill.learn,
            types=spill.types,
            labels=codes,
            values=np.array(self._values, np.float32) if self._values else None,
        )
        spill.remove()
        sync(folder / ROWS_FILE)
        assert self._shape is not None
        return Meta(
            digest=file_digest(folder / ROWS_FILE),
            bytes=(folder / ROWS_FILE).stat().st_size,
            rows=len(lengths),
            tokens=int(lengths.sum()),
            format=self._shape.format,
            dropped=dict(self._tally.dropped),
            changed=dict(self._tally.changed),
            labels=list(labels),
            ends=self._encoder.ends and self._shape.format == "text",
        )

    def _final_labels(self) -> tuple[tuple[str, ...], npt.NDArray[np.int32] | None]:
        """Labels in the order of their ids, and each row's id."""
        given = self._pipeline.labels
        if self._pipeline.task != "classify":
            return given, None
        labels = given or tuple(sorted_labels(self._labels))
        place = {label: index for index, label in enumerate(labels)}
        ids = np.array([place[label] for label in self._labels], np.int32)
        return labels, ids[np.array(self._codes, np.int64)]


def heaps(items: Iterable[T], characters_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in heaps that are worth a call of the tokenizer."""
    heap: list[T] = []
    characters = 0
    for item in items:
        size = characters_of(item)
        if heap and (characters + size > CHUNK_CHARACTERS or len(heap) == CHUNK_ROWS):
            yield heap
            heap, characters = [], 0
        heap.append(item)
        characters += size
    if heap:
        yield heap


class Heap(NamedTuple):
    """Some rows of tokens, flat."""

    ids: npt.NDArray[np.int32]
    lengths: Int64s
    learn: npt.NDArray[np.uint8] | None
    """As `Dataset.learn`."""
    types: npt.NDArray[np.uint8] | None
    origins: Int64s
    """Which row of the chunk each comes from."""

    def chosen(self, rows: Int64s) -> "Heap":
        """Some of the rows."""
        if len(rows) == len(self.lengths):
            return self
        keep = np.zeros(len(self.lengths), bool)
        keep[rows] = True
        tokens = np.repeat(keep, self.lengths)
        return Heap(
            self.ids[tokens],
            self.lengths[keep],
            None if self.learn is None else self.learn[tokens],
            None if self.types is None else self.types[tokens],
            self.origins[keep],
        )

    def split(self, room: int) -> "Heap":
        """The same tokens in rows of at most `room`."""
        pieces = np.maximum(1, -(-self.lengths // room))
        lengths = np.full(int(pieces.sum()), room, np.int64)
        lengths[np.cumsum(pieces) - 1] = self.lengths - (pieces - 1) * room
        learn = self.learn
        if learn is None:
            learn = np.ones(len(self.ids), np.uint8)
            learn[np.cumsum(self.lengths) - 1] = 0
        return Heap(self.ids, lengths, learn, self.types, np.repeat(self.origins, pieces))

    @classmethod
    def joined(cls, parts: Sequence["Heap"]) -> "Heap":
        """One after another."""
        learn = [part.learn for part in parts if part.learn is not None]
        types = [part.types for part in parts if part.types is not None]
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate(learn) if learn else None,
            np.concatenate(types) if types else None,
            np.concatenate([part.origins for part in parts]),
        )


def shifted(learned: npt.NDArray[np.uint8], lengths: Int64s) -> npt.NDArray[np.uint8]:
    """From "this token is learned" to "the token after this is"."""
    learn = np.empty_like(learned)
    learn[:-1] = learned[1:]
    learn[np.cumsum(lengths) - 1] = 0
    return learn


class Spill:
    """Flat columns in files, while nobody knows yet how long they get.

    Invariant: a column that some heap has is as long as the ids: where a heap has none, everything
    but the last token of each row is learned.
    """

    def __init__(self, folder: Path) -> None:
        self.ids = folder / "ids"
        self._learn = folder / "learn"
        self._types = folder / "types"
        self._has_learn = self._has_types = False
        self._tokens = 0

    def __enter__(self) -> "Spill":
        self._files = [path.open("wb") for path in (self.ids, self._learn, self._types)]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    @property
    def learn(self) -> Path | None:
        """The column's file, if there is one."""
        return self._learn if self._has_learn else None

    @property
    def types(self) -> Path | None:
        """The column's file, if there is one."""
        return self._types if self._has_types else None

    def append(self, heap: Heap) -> None:
        """More rows."""
        ids, learn, types = self._files
        ids.write(np.ascontiguousarray(heap.ids).data)
        if heap.learn is not None:
            self._has_learn = True
        if heap.types is not None:
            self._has_types = True
            types.write(np.ascontiguousarray(heap.types).data)
        everything = heap.learn
        if everything is None:
            everything = np.ones(len(heap.ids), np.uint8)
            everything[np.cumsum(heap.lengths[heap.lengths > 0]) - 1] = 0
        learn.write(np.ascontiguousarray(everything).data)
        self._tokens += len(heap.ids)

    def remove(self) -> None:
        """The files are not needed any more."""
        for path in (self.ids, self._learn, self._types):
            path.unlink()
