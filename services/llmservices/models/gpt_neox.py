"""GPT-NeoX (Pythia): attention and MLP side by side, rotary positions on a part of each head."""

import torch

from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.folder import Config, Tensors
from llmservices.models.linear import Linear
from llmservices.models.llama import joined
from llmservices.models.rope import Rope, read_rope
from llmservices.models.spec import DecoderSpec, activation

FAMILIES = ("gpt_neox",)


def read_spec(config: Config) -> DecoderSpec:
    """The spec of a GPT-NeoX config."""
    hidden, layers, heads = (
        config.integer("hidden_size"),
        config.integer("num_hidden_layers"),
        config.integer("num_attention_heads"),
    )
    name = config.text("hidden_act", "gelu")
    acting = activation(name)
    if acting is None:
        raise config.error(f"hidden_act {name!r} is not implemented")
    return DecoderSpec(
        family="gpt_neox",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=config.integer("intermediate_size"),
        vocab_tokens=config.integer("vocab_size"),
        context_tokens=config.integer("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        activation=acting,
        gated=False,
        parallel_residual=config.flag("use_parallel_residual", True),
        ropes=[_rope(config, hidden // heads)],
        rope_of=[0] * layers,
        windows=[None] * layers,
        attention_scale=(hidden // heads) ** -0.5,
    )


def _rope(config: Config, head_dim: int) -> Rope:
    base = config.number("rotary_emb_base", 10_000.0)
    share = config.number("rotary_pct", 0.25)
    if "rope_parameters" in config:
        share = config.nested("rope_parameters").number("partial_rotary_factor", share)
    return read_rope(config, int(head_dim * share), base_default=base)


def build(spec: DecoderSpec, config: Config, tensors: Tensors) -> Decoder:
    """Read the weights."""
    embedding = tensors.take("gpt_neox.embed_in.weight", spec.vocab_tokens, spec.hidden)
    tied = config.flag("tie_word_embeddings", False)
    head = embedding if tied else tensors.take("embed_out.weight", spec.vocab_tokens, spec.hidden)
    return Decoder(
        spec,
        embedding_VC=embedding,
        positions_TC=None,
        layers=[_layer(spec, tensors, f"gpt_neox.layers.{i}.") for i in range(spec.layers)],
        final_norm=_norm(spec, tensors, "gpt_neox.final_layer_norm"),
        head=Linear(head),
    )


def _layer(spec: DecoderSpec, tensors: Tensors, at: str) -> Layer:
    hidden, inner = spec.hidden, spec.inner
    return Layer(
        attention_norm=_norm(spec, tensors, at + "input_layernorm"),
        qkv=_qkv(spec, tensors, at + "attention.query_key_value"),
        out=joined(tensors, [(at + "attention.dense", hidden)], hidden),
        mlp_norm=_norm(spec, tensors, at + "post_attention_layernorm"),
        up=joined(tensors, [(at + "mlp.dense_h_to_4h", inner)], hidden),
        down=joined(tensors, [(at + "mlp.dense_4h_to_h", hidden)], inner),
    )


def _qkv(spec: DecoderSpec, tensors: Tensors, name: str) -> Linear:
    """Stored head by head, each with its q, k and v; wanted q of all heads first."""
    stored = tensors.take(f"{name}.weight", 3 * spec.hidden, spec.hidden)
    weight = stored.view(spec.heads, 3, spec.head_dim, spec.hidden).transpose(0, 1)
    bias = tensors.optional(f"{name}.bias", 3 * spec.hidden)
    ordered: torch.Tensor | None = None
    if bias is not None:
        ordered = bias.view(spec.heads, 3, spec.head_dim).transpose(0, 1).reshape(-1)
    return Linear(weight.reshape(3 * spec.hidden, spec.hidden), bias=ordered)


def _norm(spec: DecoderSpec, tensors: Tensors, name: str) -> Norm:
    weight = tensors.take(f"{name}.weight", spec.hidden)
    bias = tensors.take(f"{name}.bias", spec.hidden)
    return Norm(weight, bias, eps=spec.norm_eps, offset=0.0, rms=False)
