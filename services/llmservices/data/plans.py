"""Plans by question: what a Prepare asks for, found or made.

Runs in worker threads; the caller sees to it that one question is worked on once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from blake3 import blake3
from llmproto.data import Prepare, Prepared
from llmproto.errors import invalid
from llmproto.recipes import DataRecipe

from llmservices.data.cache import Cache, Contents
from llmservices.data.cleaning import LIBRARIES as CLEANING_LIBRARIES
from llmservices.data.core import Arrangement, Plan
from llmservices.data.dataset import Dataset, Meta
from llmservices.data.duplicates import LIBRARIES as DUPLICATE_LIBRARIES
from llmservices.data.encoding import Encoder
from llmservices.data.examples import Source
from llmservices.data.preparing import LIBRARIES, Pipeline, Work, dataset_digest
from llmservices.data.readers import files_of


class Planned(NamedTuple):
    """A plan that can be asked for segments."""

    plan: Plan
    prepared: Prepared


class Maker:
    """Finds what was made, or makes it; safe to use from several threads at once."""

    def __init__(
        self, cache: Cache, in_use: Callable[[], set[str]], progress: Callable[[int], None]
    ) -> None:
        self._cache = cache
        self._contents = Contents()
        self._in_use = in_use
        """Datasets that may not be removed."""
        self._progress = progress

    def prepare(self, ask: Prepare) -> Planned:
        """Rows tokenised, in an order."""
        check(ask)
        encoder = Encoder(Path(ask.tokenizer))
        source = source_of(ask.data, ask.part, ask.task, ask.labels)
        pipeline = pipeline_of(ask, source, encoder)
        contents = self._digests(source)
        digest = dataset_digest(contents, pipeline)

        def make(folder: Path) -> Meta:
            return Work(source, pipeline, encoder, progress=self._progress).run(folder)

        folder, meta = self._find_or_make(digest, source, contents, make)
        return arrange(ask, digest, Dataset(folder, meta), meta)

    def _find_or_make(
        self, digest: str, source: Source, contents: list[str], make: Callable[[Path], Meta]
    ) -> tuple[Path, Meta]:
        found = self._cache.find_rows(digest)
        if found is not None:
            return found
        with self._cache.making() as folder:
            meta = make(folder)
            if self._digests(source) != contents:
                raise invalid("the data changed while they were read: try again when they stand")
            self._cache.keep_rows(digest, folder, meta, self._in_use)
        found = self._cache.find_rows(digest)
        assert found is not None, digest
        return found

    def _digests(self, source: Source) -> list[str]:
        """Of all files that rows depend on, in order."""
        files = list(source.files)
        augment = source.recipe.augment
        if source.augmented and augment is not None and augment.synonyms is not None:
            files.append(Path(augment.synonyms))
        try:
            return [self._contents.digest(path) for path in files]
        except OSError as error:
            raise invalid(f"{error.filename}: cannot be read ({error.strerror})") from None


def check(ask: Prepare) -> None:
    """Combinations that mean nothing; INVALID that names them."""
    recipe = ask.data
    packs = recipe.packing != "none" or recipe.sampling == "windows"
    if packs and ask.task != "generate":
        raise invalid(f"packing and windows are for the task generate, not {ask.task}")
    if recipe.packing != "none" and recipe.sampling == "windows":
        raise invalid('sampling = "windows" draws from all text joined: packing must be "none"')
    if packs and recipe.group_by_length and recipe.packing != "isolated":
        raise invalid("group_by_length: rows of joined text have one length already")


def source_of(recipe: DataRecipe, part: str, task: str, labels: list[str]) -> Source:
    """Which files, and which of their rows."""
    apart = bool(recipe.validation_share) and not recipe.validation
    inputs = recipe.validation if part == "validation" and not apart else recipe.train
    if not inputs:
        raise invalid(f"the recipe names no {part} data")
    return Source(
        files=tuple(files_of(inputs, part=part)),
        recipe=recipe,
        task=task,  # type: ignore[arg-type]  # the schema's pattern allows just these
        keep=part if apart else "all",  # type: ignore[arg-type]
        labels=tuple(labels or recipe.labels),
        augmented=part == "train" and recipe.augment is not None,
    )


def rows_recipe(source: Source) -> DataRecipe:
    """What of a recipe the rows depend on: not their files' names, not their arrangement."""
    recipe = source.recipe
    return msgspec.structs.replace(
        recipe,
        train=[],
        validation=[],
        labels=list(source.labels),
        packing="none",
        sampling="epochs",
        group_by_length=False,
        validation_share=recipe.validation_share if source.keep != "all" else 0.0,
        augment=recipe.augment if source.augmented else None,
    )


def libraries_of(recipe: DataRecipe) -> tuple[str, ...]:
    """By whose versions the same rows may become others, beside the tokenizer's."""
    return () if recipe.clean is None else CLEANING_LIBRARIES + DUPLICATE_LIBRARIES


def pipeline_of(ask: Prepare, source: Source, encoder: Encoder) -> Pipeline:
    """What tokenised rows depend on."""
    recipe = rows_recipe(source)
    stream = ask.data.packing == "joined" or ask.data.sampling == "windows"
    return Pipeline(
        recipe=recipe,
        keep=source.keep,
        task=ask.task,  # type: ignore[arg-type]  # the schema's pattern allows just these
        context_tokens=0 if stream else ask.context_tokens,
        stream=stream,
        labels=source.labels,
        tokenizer=encoder.digest,
        libraries=LIBRARIES + libraries_of(recipe),
    )


def arrange(ask: Prepare, digest: str, dataset: Dataset, meta: Meta) -> Planned:
    """Rows in an order."""
    arrangement = Arrangement(
        dataset=digest,
        task=ask.task,  # type: ignore[arg-type]  # the schema's pattern allows just these
        context_tokens=ask.context_tokens,
        batch=ask.batch,
        seed=ask.seed,
        shuffle=ask.shuffle,
        packing=ask.data.packing,
        sampling=ask.data.sampling,
        group_by_length=ask.data.group_by_length,
    )
    plan = Plan(dataset, arrangement)
    prepared = Prepared(
        plan=blake3(msgspec.msgpack.encode(arrangement)).digest(),
        dataset=digest,
        rows=plan.rows,
        batches=plan.batches,
        tokens=plan.tokens,
        segment_batches=plan.segment_batches,
        dropped=meta.dropped,
        changed=meta.changed,
        labels=meta.labels,
    )
    return Planned(plan, prepared)
