"""From files to examples, one after another: read, keep apart, clean, augment.

A generator over generators: memory is bounded by a row, whatever the data.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
from blake3 import blake3
from llmproto.errors import invalid
from llmproto.recipes import AugmentOptions, CleanOptions, DataRecipe

from llmservices.data.augmenting import check_options, copies, read_synonyms
from llmservices.data.cleaning import clean
from llmservices.data.duplicates import Seen
from llmservices.data.formats import Shape, Task, detect, example_of, texts_of, with_texts
from llmservices.data.readers import read_file
from llmservices.data.rows import (
    Bad,
    BadRow,
    Example,
    Labelled,
    Place,
    Raw,
    Tally,
    Text,
)

Part = Literal["train", "validation"]
SHARE_UNITS: Final = 1 << 64


class Found(NamedTuple):
    """An example and where it came from."""

    place: Place
    example: Example


class Source(msgspec.Struct, frozen=True):
    """What is read, and how."""

    files: tuple[Path, ...]
    recipe: DataRecipe
    task: Task | None = None
    keep: Literal["all", "train", "validation"] = "all"
    """Which side of `validation_share`."""
    labels: tuple[str, ...] = ()
    """Empty: any."""
    augmented: bool = False


def raw_rows(files: Sequence[Path], recipe: DataRecipe, tally: Tally) -> Iterator[Raw]:
    """Rows as they stand in the files, at most `limit`; malformed ones by policy."""
    named = [
        name
        for name in (
            recipe.text,
            recipe.text_pair,
            recipe.label,
            recipe.prompt,
            recipe.completion,
            recipe.messages,
        )
        if name is not None
    ]
    skip = recipe.bad_rows == "skip"
    for path in files:
        for row in read_file(path, named=named, as_text=recipe.format == "text"):
            if recipe.limit is not None and tally.read >= recipe.limit:
                return
            tally.read += 1
            if isinstance(row, Bad):
                tally.take_bad(row, skip=skip)
            else:
                yield row


def examples(
    source: Source,
    tally: Tally,
    found_shape: Callable[[Shape], None],
) -> Iterator[Found]:
    """All examples, in the order of the files; `found_shape` hears their format once it is seen."""
    rows = raw_rows(source.files, source.recipe, tally)
    found = _read(rows, source, tally, found_shape)
    if source.recipe.clean is not None:
        found = _cleaned(found, source.recipe.clean, tally)
    found = _kept(found, source)
    if source.augmented and source.recipe.augment is not None:
        found = _augmented(found, source.recipe.augment)
    return found


def _cleaned(found: Iterator[Found], options: CleanOptions, tally: Tally) -> Iterator[Found]:
    seen = Seen(options.duplicates, options.near_similarity)
    for place, example in found:
        cleaned = clean(texts_of(example), options)
        tally.changed.update(cleaned.changes)
        dropped = cleaned.dropped
        if dropped is None:
            example = with_texts(example, cleaned.texts)
            dropped = seen.again(key_of(example), "\n".join(cleaned.texts))
        if dropped is None:
            yield Found(place, example)
        else:
            tally.dropped[dropped] += 1


def _augmented(found: Iterator[Found], options: AugmentOptions) -> Iterator[Found]:
    check_options(options)
    synonyms = read_synonyms(None if options.synonyms is None else Path(options.synonyms))
    for number, (place, example) in enumerate(found):
        yield Found(place, example)
        for copy in copies(example, options, synonyms, row=number):
            yield Found(place, copy)


def _read(
    rows: Iterator[Raw], source: Source, tally: Tally, found_shape: Callable[[Shape], None]
) -> Iterator[Found]:
    recipe = source.recipe
    shape: Shape | None = None
    for row in rows:
        if shape is None:
            shape = detect(recipe, row.values.keys(), source.task)
            found_shape(shape)
        try:
            example = example_of(shape, row.values, source.task)
        except BadRow as error:
            tally.take_bad(Bad(row.place, str(error)), skip=recipe.bad_rows == "skip")
            continue
        if _is_known(example, row.place, source, tally):
            yield Found(row.place, example)


def _is_known(example: Example, place: Place, source: Source, tally: Tally) -> bool:
    """Whether its label is one of the given ones; INVALID, or counted, where it is not."""
    if not isinstance(example, Labelled) or example.label is None or not source.labels:
        return True
    if example.label in source.labels:
        return True
    if source.recipe.unknown_labels == "skip":
        tally.dropped["unknown_label"] += 1
        return False
    known = ", ".join(source.labels[:20])
    raise invalid(
        f"{place}: the label {example.label!r:.80} is none of the {len(source.labels)} known "
        f'({known}): correct it, or set unknown_labels = "skip"'
    )


def _kept(found: Iterator[Found], source: Source) -> Iterator[Found]:
    """One side of the share that is kept apart."""
    if source.keep == "all":
        yield from found
        return
    share = source.recipe.validation_share
    for place, example in found:
        if isinstance(example, Text) and place.line == 1 and _is_plain(place):
            cut = int(len(example.text) * (1 - share))
            text = example.text[:cut] if source.keep == "train" else example.text[cut:]
            if text:
                yield Found(place, Text(text))
        elif is_apart(example, share) == (source.keep == "validation"):
            yield Found(place, example)


def _is_plain(place: Place) -> bool:
    """A text file is one document: its end is kept apart, as nanoGPT does it."""
    return (
        not place.file.removesuffix(".gz")
        .removesuffix(".zst")
        .endswith((".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"))
    )


def key_of(example: Example) -> bytes:
    """All that makes two rows equal."""
    return msgspec.msgpack.encode(example)


def is_apart(example: Example, share: float) -> bool:
    """Whether a row belongs to the share; by its content, so that equal rows stay together."""
    digest = blake3(key_of(example)).digest()
    return int.from_bytes(digest[:8], "big") < share * SHARE_UNITS
