"""What an operator does with data files: clean, augment, inspect.

Each reads its inputs once, row by row, and writes its output whole or not at all.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from llmproto.data import (
    DataAugment,
    DataClean,
    DataInspect,
    DataReport,
)
from llmproto.errors import RemoteError
from llmproto.recipes import DataRecipe

from llmservices.data.augmenting import check_options, copies, read_synonyms
from llmservices.data.cleaning import clean
from llmservices.data.columns import Columns
from llmservices.data.duplicates import Seen
from llmservices.data.encoding import Encoder
from llmservices.data.examples import key_of, raw_rows
from llmservices.data.formats import (
    Shape,
    detect,
    example_of,
    no_rows,
    texts_of,
    with_texts,
    written,
)
from llmservices.data.outputs import check_output, replacing
from llmservices.data.preparing import heaps
from llmservices.data.readers import files_of
from llmservices.data.rendering import Rendered, Renderer
from llmservices.data.rows import (
    Bad,
    BadRow,
    Example,
    Raw,
    Tally,
)

EXAMPLES: Final = 3
EXAMPLE_CHARACTERS: Final = 500
PROGRESS_ROWS: Final = 256

Progress = Callable[[int], None]


def clean_files(ask: DataClean, progress: Progress) -> DataReport:
    """A cleaned copy; all columns are kept."""
    recipe = ask.data or DataRecipe()
    output = Path(ask.output)
    check_output(output, overwrite=ask.overwrite)
    report = Path(f"{output}.dropped.jsonl")
    if ask.rows:
        check_output(report, overwrite=ask.overwrite)
    tally = Tally()
    seen = Seen(ask.clean.duplicates, ask.clean.near_similarity)
    found = _Shaped(ask.inputs, recipe, tally, progress)
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(replacing(output))
        left = stack.enter_context(replacing(report)) if ask.rows else None
        for raw, shape, example in found:
            cleaned = clean(texts_of(example), ask.clean)
            tally.changed.update(cleaned.changes)
            example = with_texts(example, cleaned.texts)
            dropped = cleaned.dropped
            if dropped is None:
                dropped = seen.again(key_of(example), "\n".join(cleaned.texts))
            if dropped is None:
                kept.write(written(shape, raw.values, example))
                continue
            tally.dropped[dropped] += 1
            if left is not None:
                file, line = raw.place
                row = {"reason": dropped, "file": file, "line": line, "row": raw.values}
                left.write(row)
        if not kept.rows:
            raise no_rows(ask.inputs[0], tally.dropped)
    return found.report(kept.rows)


def augment_files(ask: DataAugment, progress: Progress) -> DataReport:
    """All rows, each followed by its changed copies."""
    check_options(ask.augment)
    synonyms = ask.augment.synonyms
    words = read_synonyms(None if synonyms is None else Path(synonyms))
    output = Path(ask.output)
    check_output(output, overwrite=ask.overwrite)
    tally = Tally()
    found = _Shaped(ask.inputs, ask.data or DataRecipe(), tally, progress)
    with replacing(output) as kept:
        for number, (raw, shape, example) in enumerate(found):
            kept.write(raw.values)
            for copy in copies(example, ask.augment, words, row=number):
                kept.write(written(shape, raw.values, copy))
                tally.changed["augmented"] += 1
        if not kept.rows:
            raise no_rows(ask.inputs[0], tally.dropped)
    return found.report(kept.rows)


def inspect_files(ask: DataInspect, progress: Progress) -> DataReport:
    """What is in the files; malformed rows are counted, never fatal."""
    given = ask.data or DataRecipe()
    recipe = msgspec.structs.replace(given, bad_rows="skip")
    encoder = None if ask.tokenizer is None else Encoder(Path(ask.tokenizer))
    tally = Tally()
    columns = Columns()
    shown: list[str] = []
    kept: list[Raw] = []
    tokens = 0
    shape: Shape | None = None
    format = ""
    rows = 0
    for raw in _counted(raw_rows(tuple(files_of(ask.inputs)), recipe, tally), progress):
        if not format:
            shape, format = _format(recipe, raw)
        rows += 1
        columns.take(raw.values)
        if len(shown) < EXAMPLES:
            shown.append(_shown(raw.values))
        if encoder is not None and shape is not None:
            kept.append(raw)
            if len(kept) == PROGRESS_ROWS:
                tokens += _tokens(encoder, shape, kept, tally)
                kept = []
    if encoder is not None and shape is not None and kept:
        tokens += _tokens(encoder, shape, kept, tally)
    return DataReport(
        format=format or "empty",
        rows_in=tally.read,
        rows_out=rows,
        dropped=dict(tally.dropped),
        bad=tally.bad,
        columns=columns.found(),
        examples=shown,
        tokens=tokens if encoder is not None and shape is not None else None,
    )


class _Shaped:
    """Rows with what they say; the count of what happened to them."""

    def __init__(
        self, inputs: list[str], recipe: DataRecipe, tally: Tally, progress: Progress
    ) -> None:
        self._rows = _counted(raw_rows(tuple(files_of(inputs)), recipe, tally), progress)
        self._recipe = recipe
        self._tally = tally
        self._shape: Shape | None = None

    def __iter__(self) -> Iterator[tuple[Raw, Shape, Example]]:
        for raw in self._rows:
            if self._shape is None:
                self._shape = detect(self._recipe, raw.values.keys(), None)
            try:
                example = example_of(self._shape, raw.values, None)
            except BadRow as error:
                skip = self._recipe.bad_rows == "skip"
                self._tally.take_bad(Bad(raw.place, str(error)), skip=skip)
                continue
            yield raw, self._shape, example

    def report(self, rows_out: int) -> DataReport:
        """What is told about a finished copy."""
        tally = self._tally
        return DataReport(
            format="" if self._shape is None else self._shape.format,
            rows_in=tally.read,
            rows_out=rows_out,
            dropped=dict(tally.dropped),
            changed=dict(tally.changed),
            bad=tally.bad,
        )


def _counted(rows: Iterator[Any], progress: Progress) -> Iterator[Any]:  # Any: rows of two kinds
    for number, row in enumerate(rows, 1):
        yield row
        if number % PROGRESS_ROWS == 0:
            progress(PROGRESS_ROWS)


def _format(recipe: DataRecipe, raw: Raw) -> tuple[Shape | None, str]:
    try:
        shape = detect(recipe, raw.values.keys(), None)
    except RemoteError as error:
        return None, f"unknown: {error.detail}"
    return shape, shape.format


def _tokens(encoder: Encoder, shape: Shape, rows: list[Raw], tally: Tally) -> int:
    renderer = Renderer(encoder.template, learn_all=True)
    rendered = []
    for raw in rows:
        try:
            rendered.append(renderer.render(example_of(shape, raw.values, None)))
        except BadRow as error:
            tally.take_bad(Bad(raw.place, str(error)), skip=True)
    return sum(int(encoder.encode(heap).lengths.sum()) for heap in heaps(rendered, _size))


def _size(rendered: Rendered) -> int:
    return len(rendered.text)


def _shown(values: dict[str, object]) -> str:
    text = msgspec.json.encode(values, enc_hook=str).decode()
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + " ..."
