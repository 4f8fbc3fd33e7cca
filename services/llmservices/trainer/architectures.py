"""From configurations to empty models: which family is ours, and which is the library's.

Ours are those that the published configuration describes wholly; anything unusual in it (scaled
positions, windows, other activations) goes to transformers.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from llmproto.errors import invalid
from llmproto.recipes import ArchitectureRecipe

from llmservices.trainer.bert import Bert, BertSpec
from llmservices.trainer.gpt2 import Gpt2, Gpt2Spec
from llmservices.trainer.learner import Learner
from llmservices.trainer.llama import Llama, LlamaSpec

Config = Mapping[str, Any]  # Any: JSON
GELUS: Final = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
LLAMAS: Final = ("llama", "mistral", "qwen2")
PREFIXES: Final = {
    "llama": "model.",
    "mistral": "model.",
    "qwen2": "model.",
    "gpt2": "transformer.",
    "bert": "bert.",
}
"""What a bare model's tensors lack of the names in a model with a head."""
HEADS: Final = ("lm_head.", "score.", "classifier.")


def context_tokens(config: Config) -> int | None:
    """Longest sequence."""
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def labels_of(config: Config) -> list[str]:
    """Names of the classes that the model has a head for; empty where it has none."""
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        return []
    names = config.get("id2label") or {}
    return [names[key] for key in sorted(names, key=int)]


def is_generator(config: Config) -> bool:
    """Whether the published model predicts the next token."""
    architecture = (config.get("architectures") or ["ForCausalLM"])[0]
    return str(architecture).endswith(("ForCausalLM", "LMHeadModel"))


def prefixed(config: Config, name: str) -> str:
    """The name of a tensor in a model with a head."""
    prefix = PREFIXES.get(str(config.get("model_type")), "")
    return name if name.startswith((prefix, *HEADS)) else prefix + name


def own(config: Config, *, labels: int) -> Learner | None:
    """Our model of this configuration, its weights not set; None: leave it to the library.
    `labels` is 0 for a generator."""
    family = config.get("model_type")
    if family in LLAMAS:
        return _llama(config, str(family), labels)
    if family == "gpt2" and not labels:
        return _gpt2(config)
    if family == "bert" and labels:
        return _bert(config, labels)
    return None


def _llama(config: Config, family: str, labels: int) -> Learner | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = (
        config.get("hidden_act", "silu") == "silu"
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and not (family == "mistral" and config.get("sliding_window"))
        and not (family == "qwen2" and config.get("use_sliding_window"))
        and config.get("pretraining_tp", 1) == 1
        and config.get("partial_rotary_factor", 1.0) == 1.0
    )
    if not plain:
        return None
    heads, width = config["num_attention_heads"], config["hidden_size"]
    biased = bool(config.get("attention_bias"))
    return Llama(
        LlamaSpec(
            vocabulary=config["vocab_size"],
            width=width,
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or width // heads,
            context_tokens=config.get("max_position_embeddings", 2048),
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or biased,
            out_bias=biased,
            mlp_bias=bool(config.get("mlp_bias")),
            labels=labels,
            attention_dropout=config.get("attention_dropout") or 0.0,
            deviation=config.get("initializer_range", 0.02),
        )
    )


def _gpt2(config: Config) -> Learner | None:
    chances = {config.get(f"{name}_pdrop", 0.1) for name in ("attn", "embd", "resid")}
    gelu = GELUS.get(config.get("activation_function", "gelu_new"))
    plain = (
        gelu is not None
        and len(chances) == 1
        and not config.get("scale_attn_by_inverse_layer_idx")
        and config.get("scale_attn_weights", True)
    )
    if not plain or gelu is None:
        return None
    width = config["n_embd"]
    return Gpt2(
        Gpt2Spec(
            vocabulary=config["vocab_size"],
            width=width,
            inner=config.get("n_inner") or 4 * width,
            layers=config["n_layer"],
            heads=config["n_head"],
            context_tokens=config["n_positions"],
            tied=bool(config.get("tie_word_embeddings", True)),
            bias=not config.get("llmos_without_bias", False),
            dropout=chances.pop(),
            norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
            gelu=gelu,
        )
    )


def _bert(config: Config, labels: int) -> Learner | None:
    gelu = GELUS.get(config.get("hidden_act", "gelu"))
    if gelu is None or config.get("position_embedding_type", "absolute") != "absolute":
        return None
    chance = config.get("hidden_dropout_prob", 0.1)
    own_chance = config.get("classifier_dropout")
    return Bert(
        BertSpec(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            context_tokens=config["max_position_embeddings"],
            labels=labels,
            types=config.get("type_vocab_size", 2),
            dropout=chance,
            attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
            classifier_dropout=chance if own_chance is None else own_chance,
            norm_epsilon=config.get("layer_norm_eps", 1e-12),
            gelu=gelu,
            deviation=config.get("initializer_range", 0.02),
        )
    )


class Special(msgspec.Struct, frozen=True):
    """Ids of the tokenizer that a configuration repeats."""

    vocabulary: int
    bos: int | None
    end: int | None


def described(recipe: ArchitectureRecipe, special: Special) -> dict[str, object]:
    """config.json of a model that begins from nothing."""
    width, heads = recipe.width, recipe.heads
    if width % heads:
        raise invalid(f"model.width {width} is no multiple of model.heads {heads}")
    ids = {"bos_token_id": special.bos, "eos_token_id": special.end, "pad_token_id": special.end}
    match recipe.family:
        case "llama":
            return ids | _llama_config(recipe, special)
        case "gpt2":
            return ids | _gpt2_config(recipe, special)
        case "bert":
            return ids | _bert_config(recipe, special)


def _llama_config(recipe: ArchitectureRecipe, special: Special) -> dict[str, object]:
    kv_heads = recipe.kv_heads or recipe.heads
    if recipe.heads % kv_heads:
        raise invalid(f"model.heads {recipe.heads} is no multiple of model.kv_heads {kv_heads}")
    if recipe.width // recipe.heads % 2:
        raise invalid(f"a head has {recipe.width // recipe.heads} numbers; rotary ones are even")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": special.vocabulary,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.hidden or -(-recipe.width * 8 // 3 // 64) * 64,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": kv_heads,
        "head_dim": recipe.width // recipe.heads,
        "max_position_embeddings": recipe.context_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": recipe.rope_theta,
        "hidden_act": "silu",
        "attention_bias": recipe.bias,
        "mlp_bias": recipe.bias,
        "attention_dropout": recipe.dropout,
        "tie_word_embeddings": recipe.tie,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }


def _gpt2_config(recipe: ArchitectureRecipe, special: Special) -> dict[str, object]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": special.vocabulary,
        "n_embd": recipe.width,
        "n_inner": recipe.hidden,
        "n_layer": recipe.layers,
        "n_head": recipe.heads,
        "n_positions": recipe.context_tokens,
        "activation_function": "gelu",
        "attn_pdrop": recipe.dropout,
        "embd_pdrop": recipe.dropout,
        "resid_pdrop": recipe.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": recipe.tie,
        "llmos_without_bias": not recipe.bias,
        "dtype": "float32",
    }


def _bert_config(recipe: ArchitectureRecipe, special: Special) -> dict[str, object]:
    return {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": special.vocabulary,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.hidden or 4 * recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": recipe.context_tokens,
        "hidden_act": "gelu",
        "hidden_dropout_prob": recipe.dropout,
        "attention_probs_dropout_prob": recipe.dropout,
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "dtype": "float32",
    }
