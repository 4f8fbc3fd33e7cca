"""Llama and those that differ from it by switches: Mistral, Qwen2, Qwen3."""

import torch

from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.folder import Config, Tensors
from llmservices.models.linear import Linear
from llmservices.models.rope import read_rope
from llmservices.models.spec import DecoderSpec, activation

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def read_spec(config: Config) -> DecoderSpec:
    """The spec of a config of one of `FAMILIES`."""
    family = config.text("model_type")
    hidden, layers, heads = (
        config.integer("hidden_size"),
        config.integer("num_hidden_layers"),
        config.integer("num_attention_heads"),
    )
    head_dim = config.integer("head_dim", 128 if family == "qwen3" else hidden // heads)
    acting = activation(config.text("hidden_act", "silu"))
    if acting is None:
        raise config.error(f"hidden_act {config.text('hidden_act')!r} is not implemented")
    config.refuse("pretraining_tp", 1)
    return DecoderSpec(
        family=family,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        inner=config.integer("intermediate_size"),
        vocab_tokens=config.integer("vocab_size"),
        context_tokens=config.integer("max_position_embeddings", 2048),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=acting,
        ropes=[read_rope(config, head_dim)],
        rope_of=[0] * layers,
        windows=_windows(config, family, layers),
        attention_scale=head_dim**-0.5,
    )


def _windows(config: Config, family: str, layers: int) -> list[int | None]:
    window = config.optional_integer("sliding_window")
    if family == "llama" or window is None:
        return [None] * layers
    if family == "mistral":
        return [window] * layers
    if not config.flag("use_sliding_window", False):
        return [None] * layers
    if "layer_types" in config:
        kinds = config.items("layer_types")
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = config.integer("max_window_layers", 28)
    return [window if layer >= first else None for layer in range(layers)]


def build(spec: DecoderSpec, config: Config, tensors: Tensors) -> Decoder:
    """Read the weights."""
    hidden, vocab = spec.hidden, spec.vocab_tokens
    embedding = tensors.take("model.embed_tokens.weight", vocab, hidden)
    tied = config.flag("tie_word_embeddings", False)
    head = embedding if tied else tensors.take("lm_head.weight", vocab, hidden)
    return Decoder(
        spec,
        embedding_VC=embedding,
        positions_TC=None,
        layers=[_layer(spec, tensors, f"model.layers.{i}.") for i in range(spec.layers)],
        final_norm=_norm(spec, tensors, "model.norm.weight", hidden),
        head=Linear(head),
    )


def _layer(spec: DecoderSpec, tensors: Tensors, at: str) -> Layer:
    hidden, inner = spec.hidden, spec.inner
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attn = at + "self_attn."
    normed = spec.family == "qwen3"
    return Layer(
        attention_norm=_norm(spec, tensors, at + "input_layernorm.weight", hidden),
        qkv=joined(
            tensors, [(attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)], hidden
        ),
        q_norm=_norm(spec, tensors, attn + "q_norm.weight", spec.head_dim) if normed else None,
        k_norm=_norm(spec, tensors, attn + "k_norm.weight", spec.head_dim) if normed else None,
        out=joined(tensors, [(attn + "o_proj", hidden)], q),
        mlp_norm=_norm(spec, tensors, at + "post_attention_layernorm.weight", hidden),
        up=joined(tensors, [(at + "mlp.gate_proj", inner), (at + "mlp.up_proj", inner)], hidden),
        down=joined(tensors, [(at + "mlp.down_proj", hidden)], inner),
    )


def _norm(spec: DecoderSpec, tensors: Tensors, name: str, width: int) -> Norm:
    return Norm(tensors.take(name, width), None, eps=spec.norm_eps, offset=0.0, rms=True)


def joined(tensors: Tensors, parts: list[tuple[str, int]], features_in: int) -> Linear:
    """One linear of several that read the same input, with biases where they are stored."""
    weights = [tensors.take(f"{name}.weight", out, features_in) for name, out in parts]
    biases = [tensors.optional(f"{name}.bias", out) for name, out in parts]
    if all(bias is None for bias in biases):
        return Linear(*weights)
    stored = [
        bias if bias is not None else torch.zeros_like(weight[:, 0])
        for bias, weight in zip(biases, weights, strict=True)
    ]
    return Linear(*weights, bias=torch.cat(stored))
