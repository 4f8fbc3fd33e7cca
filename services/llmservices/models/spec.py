"""One description that covers the decoder-only families; each family's module fills it from its
config."""

from typing import Literal

import msgspec

from llmservices.models.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(name: str) -> Activation | None:
    """Ours, by the name that configs use."""
    return _ACTIVATIONS.get(name)


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes and switches of one decoder: token ids -> layers of (norm, attention, norm, MLP)
    -> logits."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of the MLP."""
    vocab_tokens: int
    context_tokens: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float
    norm_offset: float = 0.0
    """Added to the weights of RMS norms (Gemma stores them around zero)."""
    activation: Activation
    gated: bool = True
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input (GPT-NeoX)."""
    ropes: list[Rope] = []
    """The different ones; none: learned positions."""
    rope_of: list[int] = []
    """Index into `ropes` for every layer."""
    windows: list[int | None] = []
    """For every layer, how many positions, its own included, a token attends to; None: all."""
    attention_scale: float
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
