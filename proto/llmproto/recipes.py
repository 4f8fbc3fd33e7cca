"""What a job is asked to do: the content of recipe.toml, and of JobSpawn.

Read from people, so unknown keys are errors.  Every default is what a careful engineer would take
first.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from llmproto.base import Int53, Name, Path
from llmproto.versions import Reference, Tag

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
Rate = Annotated[float, Meta(ge=0.0, le=1e6)]

_TEXT: Final = frozenset({"generate"})
_CLASS: Final = frozenset({"classify"})
METRICS: Final[dict[str, frozenset[str]]] = {
    "loss": frozenset({"generate", "classify", "regress"}),
    "perplexity": _TEXT,
    "exact_match": _TEXT,
    "bleu": _TEXT,
    "chrf": _TEXT,
    "accuracy": _CLASS,
    "precision": _CLASS,
    "precision_macro": _CLASS,
    "precision_micro": _CLASS,
    "precision_per_class": _CLASS,
    "recall": _CLASS,
    "recall_macro": _CLASS,
    "recall_micro": _CLASS,
    "recall_per_class": _CLASS,
    "f1": _CLASS,
    "f1_macro": _CLASS,
    "f1_micro": _CLASS,
    "f1_per_class": _CLASS,
    "auc": _CLASS,
    "spearman": frozenset({"regress", "embed"}),
}
"""The metrics there are, and the tasks that each can judge.  Without a suffix precision, recall and
f1 are the mean over labels."""
VALIDATION_METRICS: Final[dict[str, tuple[str, ...]]] = {
    "generate": ("loss", "perplexity"),
    "classify": ("loss", "accuracy", "precision", "recall", "f1"),
    "regress": ("loss", "spearman"),
}
"""What a trainer computes of its validation data, by task; precision, recall and f1 are means over
the classes."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a recipe."""


class CleanOptions(Part, frozen=True, forbid_unknown_fields=True):
    """[data.clean]"""

    repair: bool = True
    """Repair mistaken encodings (ftfy)."""
    normalize: Literal["none", "NFC", "NFKC"] = "NFC"
    control_characters: bool = True
    """Remove them, but for tab and newline."""
    duplicates: Literal["none", "exact", "near"] = "exact"
    near_similarity: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.85
    """Jaccard similarity of word 5-shingles, estimated by MinHash, from which rows are near
    duplicates."""
    characters_min: Int53 = 1
    characters_max: Int53 | None = None
    letters_share_min: Share = 0.0
    """Quality: rows with a smaller share of letters and spaces are dropped."""
    repetition_max: Share = 1.0
    """Quality: rows in which the most frequent word 3-gram is a larger share of all are dropped."""
    mask: list[Literal["email", "phone", "key"]] = []
    """Replaced by <email>, <phone>, <key>."""


class AugmentOptions(Part, frozen=True, forbid_unknown_fields=True):
    """[data.augment], word by word; labels are kept.  Source: EDA, Wei and Zou 2019."""

    copies: Annotated[int, Meta(ge=0, le=64)] = 1
    """New rows for each row."""
    delete: Share = 0.0
    """Probability of deleting each word."""
    swap: Share = 0.0
    """Share of words that are swapped with another."""
    insert: Share = 0.0
    """Share of words beside which a synonym of another word is inserted."""
    replace: Share = 0.0
    """Share of words that are replaced by a synonym."""
    synonyms: Path | None = None
    """Lines `word: synonym, synonym`."""
    seed: Int53 = 0


class DataRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[data]"""

    train: list[Path] = []
    """Files or folders; relative ones are made absolute where the recipe is read."""
    validation: list[Path] = []
    validation_share: Share = 0.0
    """Of the training rows, kept apart by content where `validation` is empty."""
    format: Literal[
        "auto", "text", "chat", "alpaca", "sharegpt", "prompt_completion", "classification", "pairs"
    ] = "auto"
    text: str | None = None
    """Column of the text (of classification: of the sentence)."""
    text_pair: str | None = None
    """Column of the second text."""
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    labels: list[str] = []
    """Of a classifier, in the order of their ids; empty: those in the training data, sorted."""
    unknown_labels: Literal["error", "skip"] = "error"
    bad_rows: Literal["error", "skip"] = "error"
    too_long: Literal["error", "truncate", "skip", "split"] = "error"
    """What to do with a sequence longer than the context (`split`: plain text only)."""
    loss: Literal["completion", "all"] = "completion"
    """Of chats and completions: learn the answers alone, or everything."""
    packing: Literal["none", "isolated", "joined"] = "none"
    """Several documents in one row of full length; `isolated`: attention does not cross them;
    `joined`: documents in a random order of the seed's, cut wherever a row is full."""
    sampling: Literal["epochs", "windows"] = "epochs"
    """`windows`: each row is a random window of the joined text, as nanoGPT draws them."""
    group_by_length: bool = False
    """Batches of similar lengths; changes the order, not the content."""
    clean: CleanOptions | None = None
    """Absent: the rows as they are."""
    augment: AugmentOptions | None = None
    limit: Positive | None = None
    """Rows, from the beginning."""


class ArchitectureRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[model]: for pre-training from nothing."""

    family: Literal["llama", "gpt2", "bert"] = "llama"
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive | None = None
    width: Positive = 128
    hidden: Positive | None = None
    """Of the MLP.  Absent: the family's usual multiple of the width."""
    context_tokens: Positive = 256
    dropout: Share = 0.0
    bias: bool = False
    tie: bool = True
    """Input and output embeddings are one."""
    rope_theta: Rate = 10000.0


class TokenizerRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[tokenizer]: for pre-training; otherwise it is the base's."""

    kind: Literal["bpe", "characters", "folder"] = "bpe"
    path: Path | None = None
    """Of `folder`."""
    vocabulary: Positive = 4096
    """Of `bpe`, special tokens included."""
    special: list[str] = []
    """Special tokens beyond <|bos|> and <|end|>, in this order after them."""
    chat_template: str | None = None


class LoraRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[lora]: Hu et al. 2021 (arXiv 2106.09685)."""

    rank: Annotated[int, Meta(ge=1, le=4096)] = 16
    alpha: Rate = 32.0
    dropout: Share = 0.0
    targets: list[str] = []
    """Names of linear layers; empty: all of the model's blocks."""


class TrainingRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[training]"""

    epochs: Annotated[float, Meta(gt=0.0, le=1e6)] | None = None
    steps: Positive | None = None
    """Exactly one of the two; both absent: 1 epoch."""
    batch: Annotated[int, Meta(ge=1, le=1 << 20)] = 16
    """Sequences in one optimiser step, over all ranks and micro-batches."""
    micro_batch: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    """Sequences computed at once on one rank.  Absent: all of the rank's."""
    context_tokens: Positive | None = None
    """Longest sequence.  Absent: the model's context."""
    optimizer: str = "adamw"
    """One of the trainer's table: adamw, adam, adadelta, rmsprop, sgd, adagrad."""
    learning_rate: Rate = 5e-5
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Rate = 1e-8
    momentum: Share = 0.0
    weight_decay: Rate = 0.0
    decay_all: bool = False
    """Weight decay for biases and norms too."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    warmup_steps: Int53 = 0
    learning_rate_min: Rate = 0.0
    """Where linear and cosine end."""
    clip: Annotated[float, Meta(gt=0.0)] | None = 1.0
    """Largest norm of the gradient."""
    label_smoothing: Share = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed, weights and optimiser stay in float32."""
    activation_checkpointing: bool = False
    seed: Int53 = 0
    validate_every: Positive | None = None
    """Steps.  Absent: at the end of each epoch, where there is validation data."""
    checkpoint_every: Positive | None = None
    """Steps.  Absent: about every minute, by the measured time of a step, fixed when first
    measured."""
    keep_checkpoints: Annotated[int, Meta(ge=1, le=1000)] = 1
    stop_early_after: Positive | None = None
    """Validations without improvement.  Where this is given, the weights with the least validation
    loss are published, whenever the run ends."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """NaN, infinity, or a loss above `divergence_factor` x its running mean.  `rollback`: to the
    last checkpoint, with half the rate, at most 3 times."""
    divergence_factor: Annotated[float, Meta(gt=1.0)] = 10.0
    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    communication: Literal["fp32", "bf16"] = "fp32"
    """How ranks exchange gradients."""


class ResourceRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[resources]"""

    device: str | None = None
    cores: Positive | None = None
    memory_bytes: Positive | None = None
    """Of each process.  Absent: 2 GiB."""


class FinishRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """[finish]: what follows the last step."""

    evaluate: list[str] = []
    """Metrics on the validation data, beside its loss: VALIDATION_METRICS."""
    deploy: bool = False
    gate: str = ""
    """As in Deploy."""
    tags: list[Tag] = []
    tensorboard: Path | None = None
    """Folder for TensorBoard event files."""


class Recipe(Part, frozen=True, forbid_unknown_fields=True):
    """A training run."""

    name: Name
    method: Literal["full", "lora", "pretrain"] = "full"
    task: Literal["generate", "classify", "regress"] = "generate"
    base: str | None = None
    """Reference of a version, or path of a folder.  Absent only for `pretrain`."""
    data: DataRecipe = DataRecipe()
    model: ArchitectureRecipe | None = None
    tokenizer: TokenizerRecipe | None = None
    lora: LoraRecipe | None = None
    training: TrainingRecipe = TrainingRecipe()
    resources: ResourceRecipe = ResourceRecipe()
    finish: FinishRecipe = FinishRecipe()


class EvaluationRecipe(Part, frozen=True, forbid_unknown_fields=True):
    """An evaluation run: a model of the table, or a version of the store, on data, by metrics."""

    model: Reference
    data: DataRecipe
    metrics: list[str]
    """accuracy, precision, recall, f1 (with _macro, _micro, _per_class), auc, exact_match,
    perplexity, bleu, chrf, spearman, loss."""
    output_tokens_max: Positive = 256
    """Of generated answers."""
    record: bool = True
    """The results belong to the version from then on."""
