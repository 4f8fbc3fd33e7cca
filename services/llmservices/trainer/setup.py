"""What has to stand before the first step: base, tokenizer, data, model.

Asks the store and the data service; raises RemoteError(INVALID) with what to do where a run cannot
succeed.
"""

from pathlib import Path
from typing import Final

import msgspec
from libllm.recipes import check_validation_metrics
from llmproto.data import Prepare, TokenizerMade, TokenizerMake
from llmproto.errors import invalid
from llmproto.recipes import Recipe, TokenizerRecipe
from llmproto.versions import Import, Saved, VersionAsk, VersionFound, VersionRow

from llmservices.trainer import building, optimizers
from llmservices.trainer.architectures import Special, context_tokens
from llmservices.trainer.building import Base, Built
from llmservices.trainer.source import Asking, Source

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
)
CONTEXT_DEFAULT: Final = 2048
"""Of a model that states none."""


class Setup(msgspec.Struct, frozen=True):
    """All that a run consists of, before its checkpoint."""

    recipe: Recipe
    base: bytes | None
    """Version."""
    built: Built
    train: Source
    validation: Source | None
    steps_total: int
    epoch_batches: int
    files: dict[str, bytes]
    """Of what is published, beside the inherited ones."""


def version_row(bus: Asking, reference: str) -> VersionRow:
    """What the store says of it."""
    return bus.ask(VersionAsk(reference), VersionFound, target="store").row


def resolve_base(bus: Asking, recipe: Recipe, parent: bytes | None) -> VersionRow | None:
    """The version that the run starts from; a plain folder becomes one.  `parent` is what an
    earlier attempt took: a name may mean another one by now."""
    if recipe.method == "pretrain":
        if recipe.base is not None:
            raise invalid('method = "pretrain" begins from nothing: leave base out')
        return None
    if recipe.base is None:
        raise invalid(f'method = "{recipe.method}" needs a base: a version, or a model\'s folder')
    if parent is not None:
        row = version_row(bus, f"@{parent.hex()}")
    elif "/" in recipe.base or Path(recipe.base).is_dir():
        folder = Path(recipe.base)
        if not folder.is_dir():
            raise invalid(f"base: there is no folder {folder}")
        saved = bus.ask(Import(str(folder), folder.name), Saved, target="store")
        row = version_row(bus, f"@{saved.version.hex()}")
    else:
        row = version_row(bus, recipe.base)
    if row.adapter:
        raise invalid(
            f"the base {row.reference} is an adapter: export it merged, import that, and train it"
        )
    return row


def set_up(bus: Asking, recipe: Recipe, *, parent: bytes | None, made: Path) -> Setup:
    """`made` is the folder for a new tokenizer."""
    if recipe.training.optimizer not in optimizers.TABLE:
        raise invalid(optimizers.unknown(recipe.training.optimizer))
    training = recipe.training
    if training.epochs is not None and training.steps is not None:
        raise invalid("training.epochs and training.steps are both given: give one of them")
    check_validation_metrics(recipe.finish.evaluate, recipe.task)
    row = resolve_base(bus, recipe, parent)
    files: dict[str, bytes] = {}
    special: Special | None = None
    base: Base | None = None
    labels: list[str] = []
    if row is None:
        special, tokenizer = _new_tokenizer(bus, recipe, made)
        files = {
            name: (tokenizer / name).read_bytes()
            for name in TOKENIZER_FILES
            if (tokenizer / name).exists()
        }
        if recipe.model is None:
            raise invalid('method = "pretrain" needs a [model] table')
        context = recipe.model.context_tokens
        labels = recipe.data.labels
    else:
        base = Base.read(Path(row.path))
        building.check(recipe, base.config)
        tokenizer = base.folder
        context = context_tokens(base.config) or CONTEXT_DEFAULT
        labels = building.labels_for(recipe, base.config)
    wanted = training.context_tokens or context
    if wanted > context:
        raise invalid(f"training.context_tokens is {wanted}, model.context_tokens {context}")
    train = Source(bus, _prepare(recipe, "train", tokenizer, wanted, labels))
    labels = train.prepared.labels or labels
    validation: Source | None = None
    if recipe.data.validation or recipe.data.validation_share:
        validation = Source(bus, _prepare(recipe, "validation", tokenizer, wanted, labels))
    built = building.build(recipe, base, special, labels)
    batches = train.prepared.batches
    if training.steps is not None:
        steps = training.steps
    else:
        steps = max(1, round((training.epochs or 1.0) * batches))
    return Setup(
        recipe=recipe,
        base=None if row is None else row.version,
        built=built,
        train=train,
        validation=validation,
        steps_total=steps,
        epoch_batches=batches,
        files=files | built.files,
    )


def _prepare(
    recipe: Recipe, part: str, tokenizer: Path, context: int, labels: list[str]
) -> Prepare:
    return Prepare(
        data=recipe.data,
        part=part,
        task=recipe.task,
        tokenizer=str(tokenizer),
        context_tokens=context,
        batch=recipe.training.batch,
        seed=recipe.training.seed,
        shuffle=part == "train",
        labels=labels,
    )


def _new_tokenizer(bus: Asking, recipe: Recipe, made: Path) -> tuple[Special, Path]:
    asked = TokenizerMake(recipe.data, recipe.tokenizer or TokenizerRecipe(), str(made))
    answer = bus.ask(asked, TokenizerMade, target="data")
    return Special(answer.vocabulary, answer.bos, answer.end), Path(answer.path)
