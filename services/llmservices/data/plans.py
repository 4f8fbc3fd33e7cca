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

from llmservices.data.cache import Cache, Contents
from llmservices.data.cleaning import LIBRARIES as CLEANING_LIBRARIES
from llmservices.data.core import Arrangement, Plan
from llmservices.data.dataset import Dataset, Meta
from llmservices.data.encoding import Encoder
from llmservices.data.examples import Source
from llmservices.data.preparing import LIBRARIES, Pipeline, Work, dataset_digest
from llmservices.data.readers import files_of


class Planned(NamedTuple):
    """A plan that can be asked for segments."""

    plan: Plan
    prepared: Prepared


def prepare(
    ask: Prepare,
    *,
    cache: Cache,
    contents: Contents,
    in_use: Callable[[], set[str]],
    progress: Callable[[int], None],
) -> Planned:
    """Find or make the rows, arrange them."""
    check(ask)
    encoder = Encoder(Path(ask.tokenizer))
    source = source_of(ask)
    pipeline = pipeline_of(ask, source, encoder)
    digests = [contents.digest(path) for path in source.files]
    if source.recipe.augment is not None and source.recipe.augment.synonyms is not None:
        digests.append(contents.digest(Path(source.recipe.augment.synonyms)))
    dataset = dataset_digest(digests, pipeline)
    found = cache.find_rows(dataset)
    if found is None:
        with cache.making() as folder:
            meta = Work(source, pipeline, encoder, progress=progress).run(folder)
            if [contents.digest(path) for path in source.files] != digests[: len(source.files)]:
                raise invalid("the data changed while they were read: try again when they stand")
            cache.keep_rows(dataset, folder, meta, in_use)
        found = cache.find_rows(dataset)
        assert found is not None, dataset
    folder, meta = found
    return arrange(ask, dataset, Dataset(folder, meta), meta)


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


def source_of(ask: Prepare) -> Source:
    """Which files, and which of their rows."""
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
        labels=tuple(ask.labels or recipe.labels),
        augmented=ask.part == "train" and recipe.augment is not None,
    )


def pipeline_of(ask: Prepare, source: Source, encoder: Encoder) -> Pipeline:
    """What the rows depend on; not how they are arranged."""
    recipe = msgspec.structs.replace(
        source.recipe,
        train=[],
        validation=[],
        labels=[],
        group_by_length=False,
        # isolated packing and single documents have the same rows, and so have both joined kinds
        packing="none",
        sampling="epochs",
        validation_share=source.recipe.validation_share if source.keep != "all" else 0.0,
        augment=source.recipe.augment if source.augmented else None,
    )
    stream = ask.data.packing == "joined" or ask.data.sampling == "windows"
    return Pipeline(
        recipe=recipe,
        keep=source.keep,
        task=ask.task,  # type: ignore[arg-type]  # the schema's pattern allows just these
        context_tokens=0 if stream else ask.context_tokens,
        stream=stream,
        labels=source.labels,
        tokenizer=encoder.digest,
        libraries=LIBRARIES + (CLEANING_LIBRARIES if recipe.clean is not None else ()),
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
