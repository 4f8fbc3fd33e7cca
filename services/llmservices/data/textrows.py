"""Rows as text: what an evaluation judges a model by, in a file of JSON lines.

The same files and recipe give the same lines.  A file is named by its content and may be made again
at any time.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3
from llmproto.data import DataRow, Rows, RowsAsk
from llmproto.errors import invalid
from llmproto.generation import ChatMessage

from llmservices.data.cache import Cache, disk
from llmservices.data.examples import Source, examples
from llmservices.data.formats import Shape, no_rows, sorted_labels
from llmservices.data.readers import files_of
from llmservices.data.rows import Chat, Completion, Example, Labelled, Tally, Text

FILES_MAX: Final = 16
"""Files that are kept: those of the evaluations that run, and room."""
PROGRESS_ROWS: Final = 4096


def make_rows(ask: RowsAsk, *, folder: Path, cache: Cache, progress: Callable[[int], None]) -> Rows:
    """Read, clean and write them; INVALID where the data are not what they should be."""
    source = _source_of(ask)
    tally = Tally()
    shapes: list[Shape] = []
    labels: set[str] = set()
    hasher = blake3()
    count = 0
    with cache.making() as making, disk():
        made = making / "rows"
        with made.open("wb") as file:
            for found in examples(source, tally, shapes.append):
                row = row_of(found.example)
                if row.label is not None:
                    labels.add(row.label)
                line = msgspec.json.encode(row) + b"\n"
                hasher.update(line)
                file.write(line)
                count += 1
                if count % PROGRESS_ROWS == 0:
                    progress(PROGRESS_ROWS)
        if not count:
            raise no_rows(", ".join(map(str, source.files)), tally.dropped)
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{hasher.hexdigest()}.jsonl"
        os.replace(made, path)
        _forget(folder, but=path)
    return Rows(
        path=str(path),
        digest=hasher.digest(),
        rows=count,
        format=shapes[0].format,
        labels=list(ask.data.labels) or sorted_labels(labels),
        dropped=dict(tally.dropped),
    )


def row_of(example: Example) -> DataRow:
    """As it goes to an evaluator."""
    match example:
        case Text():
            return DataRow(text=example.text)
        case Chat():
            return DataRow(
                messages=[ChatMessage(turn.role, turn.content) for turn in example.turns]
            )
        case Completion():
            return DataRow(
                prompt=example.asked,
                completion=example.completion,
                instruction=example.instruction,
            )
        case Labelled():
            return DataRow(
                text=example.text, pair=example.pair, label=example.label, value=example.value
            )


def _source_of(ask: RowsAsk) -> Source:
    recipe = ask.data
    apart = bool(recipe.validation_share) and not recipe.validation
    inputs = recipe.validation if ask.part == "validation" and not apart else recipe.train
    if not inputs:
        raise invalid(f"the recipe names no {ask.part} data")
    return Source(
        files=tuple(files_of(inputs, part=ask.part)),
        recipe=recipe,
        task=ask.task,  # type: ignore[arg-type]  # the schema's pattern allows just these
        keep=ask.part if apart else "all",  # type: ignore[arg-type]
        labels=tuple(recipe.labels),
    )


def _forget(folder: Path, *, but: Path) -> None:
    """The oldest, beyond the bound."""
    files = sorted(folder.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in files[: max(0, len(files) - FILES_MAX)]:
        if path != but:
            path.unlink(missing_ok=True)
