"""GPT-2: learned positions, layer norms, weights stored input-first."""

from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.folder import Config, Tensors
from llmservices.models.linear import Linear
from llmservices.models.spec import DecoderSpec, activation

FAMILIES = ("gpt2",)


def read_spec(config: Config) -> DecoderSpec:
    """The spec of a GPT-2 config."""
    hidden, layers, heads = (
        config.integer("n_embd"),
        config.integer("n_layer"),
        config.integer("n_head"),
    )
    name = config.text("activation_function", "gelu_new")
    acting = activation(name)
    if acting is None:
        raise config.error(f"activation_function {name!r} is not implemented")
    config.refuse("scale_attn_by_inverse_layer_idx", False)
    config.refuse("scale_attn_weights", True)
    config.refuse("add_cross_attention", False)
    return DecoderSpec(
        family="gpt2",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=config.integer("n_inner", 4 * hidden),
        vocab_tokens=config.integer("vocab_size"),
        context_tokens=config.integer("n_positions"),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=acting,
        gated=False,
        windows=[None] * layers,
        attention_scale=(hidden // heads) ** -0.5,
    )


def build(spec: DecoderSpec, config: Config, tensors: Tensors) -> Decoder:
    """Read the weights; the first published ones lack the prefix."""
    at = "transformer." if "transformer.wte.weight" in tensors else ""
    embedding = tensors.take(at + "wte.weight", spec.vocab_tokens, spec.hidden)
    tied = config.flag("tie_word_embeddings", True)
    head = embedding if tied else tensors.take("lm_head.weight", spec.vocab_tokens, spec.hidden)
    return Decoder(
        spec,
        embedding_VC=embedding,
        positions_TC=tensors.take(at + "wpe.weight", spec.context_tokens, spec.hidden),
        layers=[_layer(spec, tensors, f"{at}h.{i}.") for i in range(spec.layers)],
        final_norm=_norm(spec, tensors, at + "ln_f"),
        head=Linear(head),
    )


def _layer(spec: DecoderSpec, tensors: Tensors, at: str) -> Layer:
    hidden, inner = spec.hidden, spec.inner
    return Layer(
        attention_norm=_norm(spec, tensors, at + "ln_1"),
        qkv=_linear(tensors, at + "attn.c_attn", hidden, 3 * hidden),
        out=_linear(tensors, at + "attn.c_proj", hidden, hidden),
        mlp_norm=_norm(spec, tensors, at + "ln_2"),
        up=_linear(tensors, at + "mlp.c_fc", hidden, inner),
        down=_linear(tensors, at + "mlp.c_proj", inner, hidden),
    )


def _linear(tensors: Tensors, name: str, features_in: int, features_out: int) -> Linear:
    weight = tensors.take(f"{name}.weight", features_in, features_out)
    return Linear(weight.T, bias=tensors.take(f"{name}.bias", features_out))


def _norm(spec: DecoderSpec, tensors: Tensors, name: str) -> Norm:
    weight = tensors.take(f"{name}.weight", spec.hidden)
    bias = tensors.take(f"{name}.bias", spec.hidden)
    return Norm(weight, bias, eps=spec.norm_eps, offset=0.0, rms=False)
