"""Gemma 2 and Gemma 3 (text): norms before and after, local and global layers, capped scores."""

from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.folder import Config, Tensors
from llmservices.models.linear import Linear
from llmservices.models.llama import joined
from llmservices.models.rope import Rope, read_rope
from llmservices.models.spec import DecoderSpec, activation

FAMILIES = ("gemma2", "gemma3_text", "gemma3")

_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""Where the text model's tensors are: alone, or inside a model that also sees."""


def read_spec(config: Config) -> DecoderSpec:
    """The spec of a config of one of `FAMILIES`; of one that also sees, its text model."""
    family = config.text("model_type")
    if family == "gemma3":
        config = config.nested("text_config")
    layers, head_dim = config.integer("num_hidden_layers"), config.integer("head_dim", 256)
    name = config.text("hidden_activation", "gelu_pytorch_tanh")
    acting = activation(name)
    if acting is None:
        raise config.error(f"hidden_activation {name!r} is not implemented")
    config.refuse("use_bidirectional_attention", False)
    local = _local_layers(config, layers, 2 if family == "gemma2" else 6)
    window = config.integer("sliding_window", 4096)
    return DecoderSpec(
        family=family,
        hidden=config.integer("hidden_size"),
        layers=layers,
        heads=config.integer("num_attention_heads", 8),
        kv_heads=config.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        inner=config.integer("intermediate_size"),
        vocab_tokens=config.integer("vocab_size", 256_000 if family == "gemma2" else 262_208),
        context_tokens=config.integer(
            "max_position_embeddings", 8192 if family == "gemma2" else 131_072
        ),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        activation=acting,
        ropes=_ropes(config, family, head_dim),
        rope_of=[0 if family == "gemma2" or not is_local else 1 for is_local in local],
        windows=[window if is_local else None for is_local in local],
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=config.optional_number("attn_logit_softcapping"),
        final_softcap=config.optional_number("final_logit_softcapping"),
        embedding_scale=config.integer("hidden_size") ** 0.5,
    )


def _local_layers(config: Config, layers: int, pattern: int) -> list[bool]:
    if "layer_types" in config:
        return [kind == "sliding_attention" for kind in config.items("layer_types")]
    pattern = config.integer("sliding_window_pattern", pattern)
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _ropes(config: Config, family: str, head_dim: int) -> list[Rope]:
    """Of global layers, then (Gemma 3) of local ones."""
    if family == "gemma2":
        return [read_rope(config, head_dim)]
    return [
        read_rope(config, head_dim, layers="full_attention", base_default=1_000_000.0),
        read_rope(config, head_dim, layers="sliding_attention")
        if "rope_parameters" in config
        # The old layout scales the global layers only.
        else Rope.plain(config.number("rope_local_base_freq", 10_000.0), head_dim),
    ]


def build(spec: DecoderSpec, config: Config, tensors: Tensors) -> Decoder:
    """Read the weights; the head is the embedding."""
    at = next((p for p in _PREFIXES if p + "embed_tokens.weight" in tensors), _PREFIXES[0])
    embedding = tensors.take(at + "embed_tokens.weight", spec.vocab_tokens, spec.hidden)
    config.refuse("tie_word_embeddings", True)
    return Decoder(
        spec,
        embedding_VC=embedding,
        positions_TC=None,
        layers=[_layer(spec, tensors, f"{at}layers.{i}.") for i in range(spec.layers)],
        final_norm=_norm(spec, tensors, at + "norm", spec.hidden),
        head=Linear(embedding),
    )


def _layer(spec: DecoderSpec, tensors: Tensors, at: str) -> Layer:
    hidden, inner = spec.hidden, spec.inner
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attn = at + "self_attn."
    normed = spec.family != "gemma2"
    return Layer(
        attention_norm=_norm(spec, tensors, at + "input_layernorm", hidden),
        qkv=joined(
            tensors, [(attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv)], hidden
        ),
        q_norm=_norm(spec, tensors, attn + "q_norm", spec.head_dim) if normed else None,
        k_norm=_norm(spec, tensors, attn + "k_norm", spec.head_dim) if normed else None,
        out=joined(tensors, [(attn + "o_proj", hidden)], q),
        post_attention_norm=_norm(spec, tensors, at + "post_attention_layernorm", hidden),
        mlp_norm=_norm(spec, tensors, at + "pre_feedforward_layernorm", hidden),
        up=joined(tensors, [(at + "mlp.gate_proj", inner), (at + "mlp.up_proj", inner)], hidden),
        down=joined(tensors, [(at + "mlp.down_proj", hidden)], inner),
        post_mlp_norm=_norm(spec, tensors, at + "post_feedforward_layernorm", hidden),
    )


def _norm(spec: DecoderSpec, tensors: Tensors, name: str, width: int) -> Norm:
    weight = tensors.take(f"{name}.weight", width)
    return Norm(weight, None, eps=spec.norm_eps, offset=spec.norm_offset, rms=True)
