"""Reads what a person asks a job to do: a recipe.toml, flags, or both.

Everything that can be refused without looking at data or models is refused here, naming file and
key.  Paths are absolute afterwards: those of a file are relative to its folder, those of flags to
the caller's.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar

import msgspec
from llmproto import limits
from llmproto.errors import RemoteError, invalid
from llmproto.recipes import (
    METRICS,
    VALIDATION_METRICS,
    DataRecipe,
    EvaluationRecipe,
    Part,
    Recipe,
)

GATE: Final = re.compile(
    r"\s*[A-Za-z0-9_.@/-]+\s*(>=|<=|==|>|<)\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*"
)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_PLACE: Final = re.compile(r"(.*) - at `\$\.?([^`]*)`")
_MISSING: Final = re.compile(r"Object missing required field `([^`]*)`")

PartT = TypeVar("PartT", bound=Part)


class Flags(TypedDict, total=False):
    """What `train` takes in the place of a file, or over one.  `None`: not given."""

    name: str | None
    base: str | Path | None
    method: str | None
    task: str | None
    data: "Paths"
    validation: "Paths"
    format: str | None
    text: str | None
    text_pair: str | None
    label: str | None
    epochs: float | None
    steps: int | None
    batch: int | None
    learning_rate: float | None
    optimizer: str | None
    context_tokens: int | None
    precision: str | None
    seed: int | None
    processes: int | None
    device: str | None
    cores: int | None
    deploy: bool | None
    gate: str | None
    """As `finish.gate`: what must hold of the metrics for the version to be deployed."""
    evaluate: Sequence[str] | None
    tags: Sequence[str] | None
    sets: Mapping[str, object] | None
    """Any other keys, with their tables: `{"training.warmup_steps": 10}`."""


Paths = str | Path | Sequence[str | Path] | None

_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "name": ("name",),
    "base": ("base",),
    "method": ("method",),
    "task": ("task",),
    "data": ("data", "train"),
    "validation": ("data", "validation"),
    "format": ("data", "format"),
    "text": ("data", "text"),
    "text_pair": ("data", "text_pair"),
    "label": ("data", "label"),
    "epochs": ("training", "epochs"),
    "steps": ("training", "steps"),
    "batch": ("training", "batch"),
    "learning_rate": ("training", "learning_rate"),
    "optimizer": ("training", "optimizer"),
    "context_tokens": ("training", "context_tokens"),
    "precision": ("training", "precision"),
    "seed": ("training", "seed"),
    "processes": ("training", "processes"),
    "device": ("resources", "device"),
    "cores": ("resources", "cores"),
    "deploy": ("finish", "deploy"),
    "gate": ("finish", "gate"),
    "evaluate": ("finish", "evaluate"),
    "tags": ("finish", "tags"),
}
_PATHS: Final = ("data", "validation")


def recipe_of(given: Recipe | str | Path | None, flags: Flags) -> Recipe:
    """The recipe that file and flags make together, flags first; RemoteError(INVALID) naming the
    file and the key."""
    unknown = sorted(set(flags) - set(_KEYS) - {"sets"})
    if unknown:
        raise invalid(f"train takes no {unknown[0]!r}: there are {', '.join([*_KEYS, 'sets'])}")
    if isinstance(given, Recipe):
        if any(value is not None for value in flags.values()):
            raise invalid("give a Recipe, or flags; a file can be given with flags")
        check(given, "the recipe")
        return given
    source = "the flags" if given is None else str(given)
    document = {} if given is None else read_toml(Path(given))
    if given is not None:
        _anchor(document, Path(given).absolute().parent)
    _apply(document, flags)
    recipe = convert(document, Recipe, source)
    check(recipe, source)
    return recipe


def evaluation_of(
    model: str,
    data: Paths | DataRecipe,
    metrics: Sequence[str],
    *,
    output_tokens_max: int = 256,
    record: bool = True,
    sets: Mapping[str, object] | None = None,
) -> EvaluationRecipe:
    """What `evaluate` is asked; RemoteError(INVALID)."""
    document: dict[str, Any] = {  # Any: as the schema has it, which checks it
        "model": model,
        "metrics": list(metrics),
        "output_tokens_max": output_tokens_max,
        "record": record,
        "data": msgspec.to_builtins(data)
        if isinstance(data, DataRecipe)
        else {"train": _all(data)},
    }
    for key, value in (sets or {}).items():
        _put(document, tuple(key.split(".")), value)
    recipe = convert(document, EvaluationRecipe, "the evaluation")
    if not recipe.metrics:
        raise invalid(f"no metric is named: there are {', '.join(METRICS)}")
    check_metrics(recipe.metrics)
    if not recipe.data.train:
        raise invalid("an evaluation needs data: name a file or a folder")
    return recipe


def read_toml(path: Path) -> dict[str, Any]:  # Any: whatever the file says
    """The file as it stands; RemoteError(INVALID) naming it."""
    try:
        with path.open("rb") as file:
            text = file.read(limits.RECIPE_BYTES_MAX + 1)
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror}") from None
    if len(text) > limits.RECIPE_BYTES_MAX:
        raise invalid(f"{path} has more than {limits.RECIPE_BYTES_MAX} bytes")
    try:
        return tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise invalid(f"{path}: {error}") from None


def convert(document: object, kind: type[PartT], source: str) -> PartT:
    """The document as this struct; RemoteError(INVALID) naming source and key."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise invalid(f"{source}: {_explain(str(error), kind)}") from None


def check(recipe: Recipe, source: str) -> None:
    """RemoteError(INVALID) where the parts of a recipe contradict each other."""
    try:
        _check_method(recipe)
        _check_training(recipe)
        check_validation_metrics(recipe.finish.evaluate, recipe.task)
        _check_finish(recipe)
    except RemoteError as error:
        raise invalid(f"{source}: {error.detail}") from None


def check_metrics(metrics: Sequence[str]) -> None:
    """RemoteError(INVALID) for a metric that is unknown."""
    for metric in metrics:
        if metric not in METRICS:
            raise invalid(f"unknown metric {metric!r}: there are {', '.join(METRICS)}")


def check_validation_metrics(metrics: Sequence[str], task: str) -> None:
    """RemoteError(INVALID) for a metric that no trainer computes of this task."""
    there = VALIDATION_METRICS[task]
    unknown = sorted(set(metrics) - set(there))
    if unknown:
        raise invalid(
            f"finish.evaluate names {', '.join(unknown)}; while training to {task} there are "
            f"{', '.join(there)} (others: llmos eval)"
        )


def check_gate(gate: str) -> None:
    """RemoteError(INVALID) unless it reads like `accuracy>=0.87`, several joined by commas."""
    for part in gate.split(","):
        if not GATE.fullmatch(part):
            raise invalid(f"the gate {gate!r} does not read like accuracy>=0.87,loss<1.5")


def looks_like_path(text: str) -> bool:
    """Written as a path, not as the reference of a version."""
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def _check_method(recipe: Recipe) -> None:
    if recipe.method == "pretrain":
        if recipe.base is not None:
            raise invalid("method = 'pretrain' starts from nothing: take out base, or say 'full'")
        if recipe.task != "generate":
            raise invalid(f"method = 'pretrain' makes a model that generates, not {recipe.task}")
        if recipe.model is None:
            raise invalid("method = 'pretrain' needs the table [model]: what to build")
        _check_model(recipe)
    else:
        if recipe.base is None:
            raise invalid(
                f"method = '{recipe.method}' needs base: a version, a name or a folder; "
                "'pretrain' starts from nothing"
            )
        for table in ("model", "tokenizer"):
            if (recipe.model if table == "model" else recipe.tokenizer) is not None:
                raise invalid(f"[{table}] is for method = 'pretrain'; otherwise it is the base's")
    if recipe.lora is not None and recipe.method != "lora":
        raise invalid(f"[lora] is for method = 'lora', and it is '{recipe.method}'")
    if not recipe.data.train:
        raise invalid("data.train names no file: there is nothing to learn from")
    if recipe.data.validation and recipe.data.validation_share:
        raise invalid("data.validation and data.validation_share exclude each other")
    tokenizer = recipe.tokenizer
    if tokenizer is not None and (tokenizer.kind == "folder") != (tokenizer.path is not None):
        raise invalid("tokenizer.path goes with tokenizer.kind = 'folder', and only with it")


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    assert model is not None
    if model.width % model.heads:
        raise invalid(f"model.width ({model.width}) is no multiple of model.heads ({model.heads})")
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise invalid(
            f"model.heads ({model.heads}) is no multiple of model.kv_heads ({model.kv_heads})"
        )
    longest = recipe.training.context_tokens
    if longest is not None and longest > model.context_tokens:
        raise invalid(
            f"training.context_tokens ({longest}) is beyond model.context_tokens "
            f"({model.context_tokens})"
        )


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    if training.epochs is not None and training.steps is not None:
        raise invalid("training.epochs and training.steps exclude each other: give one")
    if training.batch < training.processes:
        raise invalid(
            f"training.batch ({training.batch}) leaves some of training.processes "
            f"({training.processes}) without a sequence"
        )
    if training.processes > limits.JOB_PROCESSES_MAX:
        raise invalid(
            f"training.processes ({training.processes}) is beyond {limits.JOB_PROCESSES_MAX}"
        )
    if training.stop_early_after is not None and not (
        recipe.data.validation or recipe.data.validation_share
    ):
        raise invalid("training.stop_early_after needs data.validation or data.validation_share")


def _check_finish(recipe: Recipe) -> None:
    finish = recipe.finish
    if finish.gate:
        if not finish.deploy:
            raise invalid("finish.gate says when to deploy: it goes with finish.deploy = true")
        check_gate(finish.gate)
    if finish.evaluate and not (recipe.data.validation or recipe.data.validation_share):
        raise invalid("finish.evaluate needs data.validation or data.validation_share")


def _apply(document: dict[str, Any], flags: Flags) -> None:  # Any: a document of TOML
    given = {name: value for name, value in flags.items() if value is not None and name != "sets"}
    for name, value in given.items():
        if name in _PATHS:
            value = _all(value)  # type: ignore[arg-type]  # TypedDict's items() are objects
        elif name == "base":
            value = _base(str(value), Path.cwd())
        elif name in ("evaluate", "tags"):
            assert isinstance(value, Sequence)
            value = list(value)
        _put(document, _KEYS[name], value)
    training = document.get("training")
    if isinstance(training, dict):
        # A flag takes the place of what the file says of the same matter.
        for one, other in (("epochs", "steps"), ("steps", "epochs")):
            if one in given and other not in given:
                training.pop(other, None)
    for key, value in (flags.get("sets") or {}).items():
        _put(document, tuple(key.split(".")), value)


def _put(document: dict[str, Any], key: tuple[str, ...], value: object) -> None:  # Any: TOML
    table = document
    for part in key[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise invalid(f"{'.'.join(key)}: {part} is no table")
    table[key[-1]] = value


def _anchor(document: dict[str, Any], folder: Path) -> None:  # Any: a document of TOML
    """Make the paths of a file absolute; what is no path is left for the schema to refuse."""
    for table, key in (
        ("data", "train"),
        ("data", "validation"),
        ("tokenizer", "path"),
        ("finish", "tensorboard"),
    ):
        _anchor_one(document.get(table), key, folder)
    data = document.get("data")
    if isinstance(data, dict):
        _anchor_one(data.get("augment"), "synonyms", folder)
    if isinstance(document.get("base"), str):
        document["base"] = _base(document["base"], folder)


def _anchor_one(table: object, key: str, folder: Path) -> None:
    if not isinstance(table, dict) or key not in table:
        return
    value = table[key]
    if isinstance(value, str):
        table[key] = absolute(value, folder)
    elif isinstance(value, list):
        table[key] = [absolute(item, folder) if isinstance(item, str) else item for item in value]


def _base(text: str, folder: Path) -> str:
    """A path where it is written as one or stands there; else the reference of a version."""
    place = absolute(text, folder)
    return place if looks_like_path(text) or Path(place).is_dir() else text


def absolute(text: str, folder: Path) -> str:
    """Relative to the folder, `~` is the caller's own."""
    return os.path.abspath(folder / os.path.expanduser(text))


def _all(paths: Paths) -> list[str]:
    if paths is None:
        return []
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    return [absolute(str(path), Path.cwd()) for path in several]


def _explain(text: str, kind: type[Part]) -> str:
    """What msgspec says, with keys as a recipe writes them."""
    if found := _UNKNOWN.fullmatch(text):
        key, table = found[1], found[2] or ""
        known = _fields(kind, table)
        near = difflib.get_close_matches(key, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"unknown key {f'{table}.{key}' if table else key}; {meant}"
    if found := _PLACE.fullmatch(text):
        return f"{found[2]}: {found[1]}"
    if found := _MISSING.fullmatch(text):
        return f"the key {found[1]} is missing"
    return text


def _fields(kind: type[Part], table: str) -> list[str]:
    """Names of the keys of a table."""
    for part in table.split("."):
        if part:
            kind = _part(kind, part)
    return [field.name for field in msgspec.structs.fields(kind)]


def _part(kind: type[Part], name: str) -> type[Part]:
    field = next(field for field in msgspec.structs.fields(kind) if field.name == name)
    options = getattr(field.type, "__args__", (field.type,))
    return next(
        option for option in options if isinstance(option, type) and issubclass(option, Part)
    )
