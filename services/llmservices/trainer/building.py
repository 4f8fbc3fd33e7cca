"""From a recipe and a base to a model that can be trained, and to the files of what it becomes."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import torch
from llmproto.errors import invalid
from llmproto.recipes import LoraRecipe, Recipe
from safetensors.torch import load_file

from llmservices.models.folder import INDEX, WEIGHTS
from llmservices.trainer import architectures
from llmservices.trainer.architectures import Config, Special
from llmservices.trainer.learner import Learner
from llmservices.trainer.linears import accelerate
from llmservices.versions.manifest import is_version
from llmservices.versions.weights import read_tensors

CONFIG: Final = "config.json"
DTYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Base(msgspec.Struct, frozen=True):
    """What a run starts from, as its folder describes it."""

    folder: Path
    config: Config

    @classmethod
    def read(cls, folder: Path) -> "Base":
        """INVALID where there is no configuration."""
        try:
            config = msgspec.json.decode((folder / CONFIG).read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise invalid(f"{folder / CONFIG} cannot be read: {error}") from None
        return cls(folder, config)

    def weights(self) -> dict[str, torch.Tensor]:
        """Under the names of a model with a head; a version's are verified."""
        if is_version(self.folder):
            found = read_tensors(self.folder)
        elif (self.folder / INDEX).exists():
            index = json.loads((self.folder / INDEX).read_bytes())["weight_map"]
            found = {}
            for shard in sorted(set(index.values())):
                found |= load_file(self.folder / Path(shard).name)
        elif (self.folder / WEIGHTS).exists():
            found = load_file(self.folder / WEIGHTS)
        else:
            raise invalid(f"{self.folder} has no {WEIGHTS}; weights must be safetensors")
        return {architectures.prefixed(self.config, name): each for name, each in found.items()}


class Built(msgspec.Struct, frozen=True):
    """A model, and what is published with it."""

    learner: Learner
    stored: torch.dtype
    """Of the published weights."""
    files: dict[str, bytes]
    """Beside what is inherited from the base, or made by the tokenizer."""


def check(recipe: Recipe, config: Config) -> None:
    """INVALID where this base cannot be trained so, with what to do."""
    context, wanted = architectures.context_tokens(config), recipe.training.context_tokens
    if context is not None and wanted is not None and wanted > context:
        raise invalid(
            f"training.context_tokens is {wanted}, the model's context is {context} tokens: "
            f"ask for at most {context}"
        )
    if recipe.task == "generate" and not architectures.is_generator(config):
        architecture = (config.get("architectures") or ["?"])[0]
        raise invalid(
            f"the base is a {architecture}, which does not generate: "
            'set task = "classify" or "regress", or take a base that generates'
        )


def labels_for(recipe: Recipe, config: Config) -> list[str]:
    """The classes in the order of their ids, as far as they are known before the data is read."""
    if recipe.task != "classify":
        return []
    known = architectures.labels_of(config)
    if recipe.data.labels and known and known != recipe.data.labels:
        generic = [f"LABEL_{index}" for index in range(len(known))]
        if known != generic or len(known) != len(recipe.data.labels):
            raise invalid(
                f"data.labels are {recipe.data.labels}, the base has a head for {known}: leave "
                "data.labels out, or take a base without that head"
            )
    return recipe.data.labels or known


def build(
    recipe: Recipe, base: Base | None, special: Special | None, labels: Sequence[str]
) -> Built:
    """The model with its first weights: the base's, and new ones (by the recipe's seed) where it
    has none.  Exactly one of base and special is there."""
    outputs = {"generate": 0, "regress": 1, "classify": len(labels)}[recipe.task]
    if base is None:
        assert special is not None
        if recipe.model is None:
            raise invalid('method = "pretrain" needs a [model] table')
        config: Config = architectures.described(recipe.model, special)
        if recipe.model.family == "bert" and recipe.task == "generate":
            raise invalid('model.family = "bert" does not generate: set task = "classify"')
    else:
        config = base.config
    torch.manual_seed(recipe.training.seed)
    use_own = not (config.get("model_type") == "gpt2" and recipe.method == "lora")
    learner = architectures.own(config, labels=outputs) if use_own else None
    if learner is None:
        foreign = importlib.import_module("llmservices.trainer.foreign")  # seconds
        learner = checked(foreign.Foreign(config, task=recipe.task, labels=outputs))
    learner.task = recipe.task
    learner.initialise()
    stored = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    if base is not None:
        stored = _load(learner, base.weights(), outputs)
    if recipe.method == "lora":
        adapter = importlib.import_module("llmservices.trainer.adapter")  # seconds
        learner = checked(adapter.Adapted(learner, recipe.lora or LoraRecipe()))
    learner.is_checkpointed = recipe.training.activation_checkpointing
    accelerate(learner)
    return Built(learner, stored, _files(recipe, learner, base, config, labels))


def checked(found: object) -> Learner:
    """What an imported module gave, typed."""
    assert isinstance(found, Learner)
    return found


def _load(learner: Learner, weights: Mapping[str, torch.Tensor], outputs: int) -> torch.dtype:
    """Copy what the base has; only a head may be new.  Gives the base's precision."""
    wanted = learner.exported()
    missing = [name for name in wanted if name not in weights]
    new = [name for name in missing if not name.startswith(("classifier.", "score."))]
    poolerless = all(".pooler." in name for name in new)
    if new and not (outputs and poolerless):
        raise invalid(f"the base has no tensor {new[0]}, and {len(new) - 1} others")
    merged: dict[str, torch.Tensor] = dict(wanted)
    for name, tensor in wanted.items():
        if name not in weights:
            continue
        if weights[name].shape != tensor.shape:
            raise invalid(
                f"the base's {name} has shape {tuple(weights[name].shape)}, this run needs "
                f"{tuple(tensor.shape)}"
            )
        merged[name] = weights[name]
    # `exported` gives views of what is overwritten: the new parts are copied onto themselves.
    learner.load_exported(merged)
    return _precision([weights[name] for name in wanted if name in weights])


def _precision(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The first floating one's: a base may hold counts and positions as well."""
    found = next((each.dtype for each in tensors if each.is_floating_point()), None)
    if found is None:
        raise invalid("the base has no weights that are floating-point numbers")
    return found


def _files(
    recipe: Recipe,
    learner: Learner,
    base: Base | None,
    config: Config,
    labels: Sequence[str],
) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    changed = dict(config)
    if recipe.task != "generate":
        names = list(labels) if recipe.task == "classify" else ["LABEL_0"]
        changed["architectures"] = [_classifier_of(config)]
        changed["num_labels"] = len(names)
        changed["id2label"] = {str(index): name for index, name in enumerate(names)}
        changed["label2id"] = {name: index for index, name in enumerate(names)}
        changed["problem_type"] = (
            "regression" if recipe.task == "regress" else "single_label_classification"
        )
        if base is not None and (base.folder / "modules.json").exists():
            files["modules.json"] = b"[]\n"  # it pools no longer: its head judges
    if base is None or changed != config:
        files[CONFIG] = json.dumps(changed, indent=2).encode() + b"\n"
    return files | learner.description(recipe.base or "")


def _classifier_of(config: Config) -> str:
    architecture = str((config.get("architectures") or [""])[0])
    for ending in ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "Model"):
        architecture = architecture.removesuffix(ending)
    return architecture.removesuffix("ForSequenceClassification") + "ForSequenceClassification"
