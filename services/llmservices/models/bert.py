"""BERT and its relatives: BERT, RoBERTa (XLM-R, CamemBERT), DistilBERT, MPNet; each as a table of
names over one encoder, with the heads that classify."""

from typing import Final

import msgspec
import torch
from llmproto.errors import invalid
from torch.nn import functional

from llmservices.models.encoder import (
    Embeddings,
    Encoder,
    EncoderSpec,
    Head,
    Layer,
    Norm,
    RelativeBias,
)
from llmservices.models.folder import Config, Tensors
from llmservices.models.linear import Linear
from llmservices.models.spec import activation
from llmservices.models.tasks import OFFSET_POSITIONS, Task


class _Names(msgspec.Struct, frozen=True):
    """Where a family keeps its tensors."""

    prefix: str
    layer: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


_BERT: Final = _Names(
    prefix="bert.",
    layer="encoder.layer.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
_ROBERTA: Final = msgspec.structs.replace(_BERT, prefix="roberta.")
_MPNET: Final = msgspec.structs.replace(
    _BERT,
    prefix="mpnet.",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
)
_DISTILBERT: Final = _Names(
    prefix="distilbert.",
    layer="transformer.layer.",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)
_NAMES: Final = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _MPNET,
    "distilbert": _DISTILBERT,
}
FAMILIES: Final = tuple(_NAMES)
BIAS_BUCKETS: Final = 32
"""Of MPNet, where its configuration says nothing."""


def read_spec(config: Config) -> EncoderSpec:
    """The shapes; INVALID for what is not implemented."""
    family = config.text("model_type")
    config.refuse("position_embedding_type", "absolute")
    config.refuse("is_decoder", False)
    config.refuse("add_cross_attention", False)
    distil = family == "distilbert"
    name = config.text("activation" if distil else "hidden_act", "gelu")
    found = activation(name)
    if found is None:
        raise config.error(f"activation {name!r} is not implemented")
    offset = config.integer("pad_token_id", 1) + 1 if family in OFFSET_POSITIONS else 0
    hidden = config.integer("dim" if distil else "hidden_size")
    heads = config.integer("n_heads" if distil else "num_attention_heads")
    if hidden % heads:
        raise config.error(f"hidden size {hidden} is not a multiple of {heads} heads")
    return EncoderSpec(
        family=family,
        hidden=hidden,
        layers=config.integer("n_layers" if distil else "num_hidden_layers"),
        heads=heads,
        inner=config.integer("hidden_dim" if distil else "intermediate_size"),
        vocab_tokens=config.integer("vocab_size"),
        positions=config.integer("max_position_embeddings"),
        position_offset=offset,
        norm_eps=1e-12 if distil else config.number("layer_norm_eps", 1e-12),
        activation=found,
    )


def build(spec: EncoderSpec, task: Task, config: Config, tensors: Tensors) -> Encoder:
    """The encoder, from the folder's tensors."""
    reader = _Reader(spec, tensors, _NAMES[spec.family])
    head: Head | None = None
    if task.kind != "embed":
        head = _head(spec, task, reader)
    bias = None
    if spec.family == "mpnet":
        buckets = config.integer("relative_attention_num_buckets", BIAS_BUCKETS)
        table = reader.take("encoder.relative_attention_bias.weight", buckets, spec.heads)
        bias = RelativeBias(table, buckets=buckets)
    types = None
    if spec.family not in ("distilbert", "mpnet"):
        count = config.integer("type_vocab_size", 2)
        types = reader.take("embeddings.token_type_embeddings.weight", count, spec.hidden)
    return Encoder(
        spec,
        task,
        embeddings=Embeddings(
            tokens_VC=reader.take(
                "embeddings.word_embeddings.weight", spec.vocab_tokens, spec.hidden
            ),
            positions_TC=reader.take(
                "embeddings.position_embeddings.weight", spec.positions, spec.hidden
            ),
            types_2C=types,
            norm=reader.norm("embeddings.LayerNorm"),
        ),
        layers=[reader.layer(number) for number in range(spec.layers)],
        head=head,
        bias_buckets=bias,
    )


class _Reader:
    """The folder's tensors by the family's names; with or without the prefix that a model with a
    head has."""

    def __init__(self, spec: EncoderSpec, tensors: Tensors, names: _Names) -> None:
        self.tensors = tensors
        self._spec = spec
        self._names = names
        bare = "embeddings.word_embeddings.weight" in tensors
        self._prefix = "" if bare else names.prefix

    def take(self, name: str, *shape: int) -> torch.Tensor:
        return self.tensors.take(self._prefix + name, *shape)

    def norm(self, name: str) -> Norm:
        hidden = self._spec.hidden
        # Older checkpoints call them gamma and beta.
        old = f"{self._prefix}{name}.gamma" in self.tensors
        weight, bias = ("gamma", "beta") if old else ("weight", "bias")
        return Norm(
            self.take(f"{name}.{weight}", hidden),
            self.take(f"{name}.{bias}", hidden),
            self._spec.norm_eps,
        )

    def layer(self, number: int) -> Layer:
        names, hidden, inner = self._names, self._spec.hidden, self._spec.inner
        at = f"{names.layer}{number}."
        three = [f"{at}{name}" for name in (names.query, names.key, names.value)]
        weights = [self.take(f"{name}.weight", hidden, hidden) for name in three]
        biases = [self.take(f"{name}.bias", hidden) for name in three]
        return Layer(
            qkv=Linear(*weights, bias=torch.cat(biases)),
            out=self._linear(at + names.out, hidden, hidden),
            attention_norm=self.norm(at + names.attention_norm),
            up=self._linear(at + names.up, inner, hidden),
            down=self._linear(at + names.down, hidden, inner),
            mlp_norm=self.norm(at + names.mlp_norm),
        )

    def _linear(self, name: str, outputs: int, inputs: int) -> Linear:
        weight = self.take(f"{name}.weight", outputs, inputs)
        return Linear(weight, bias=self.take(f"{name}.bias", outputs))

    def head_linear(self, name: str, outputs: int, inputs: int) -> Linear:
        """Of a head: its names never have the prefix, but for BERT's pooler."""
        weight = self.tensors.take(f"{name}.weight", outputs, inputs)
        return Linear(weight, bias=self.tensors.take(f"{name}.bias", outputs))

    def pooler(self) -> Linear:
        """BERT's own."""
        hidden = self._spec.hidden
        return self.head_linear(f"{self._prefix}pooler.dense", hidden, hidden)


class TwoLayerHead:
    """A dense layer over the first token's vector, a squashing, and the scores."""

    def __init__(self, dense: Linear, scores: Linear, *, relu: bool) -> None:
        self._dense = dense
        self._scores = scores
        self._relu = relu
        self.width = scores.features_out
        self.bytes = dense.bytes + scores.bytes

    def __call__(self, first_PC: torch.Tensor) -> torch.Tensor:
        inner = self._dense(first_PC)
        return self._scores(functional.relu(inner) if self._relu else torch.tanh(inner))


def _head(spec: EncoderSpec, task: Task, reader: _Reader) -> Head:
    hidden, count = spec.hidden, len(task.labels)
    match spec.family:
        case "bert":
            return TwoLayerHead(
                reader.pooler(), reader.head_linear("classifier", count, hidden), relu=False
            )
        case "distilbert":
            return TwoLayerHead(
                reader.head_linear("pre_classifier", hidden, hidden),
                reader.head_linear("classifier", count, hidden),
                relu=True,
            )
        case "roberta" | "xlm-roberta" | "camembert" | "mpnet":
            return TwoLayerHead(
                reader.head_linear("classifier.dense", hidden, hidden),
                reader.head_linear("classifier.out_proj", count, hidden),
                relu=False,
            )
        case other:
            raise invalid(f"{other!r} has no head that classifies")
