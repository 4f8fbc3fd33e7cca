"""BERT with a classifier or a regression on its pooled first token, for training.

Parameters are named as the Hugging Face architecture names them.
Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.
Legend: N tokens, C width, H heads, D width of a head, S sequences.
"""

from typing import cast

import msgspec
import torch
from torch import nn
from torch.nn import functional

from llmservices.trainer.attention import attend
from llmservices.trainer.documents import Documents
from llmservices.trainer.dropout import dropout
from llmservices.trainer.learner import Learner


class BertSpec(msgspec.Struct, frozen=True):
    """Shapes."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    context_tokens: int
    labels: int
    """1: a regression."""
    types: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    norm_epsilon: float = 1e-12
    gelu: str = "none"
    deviation: float = 0.02


class _Embeddings(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embeddings = nn.Embedding(spec.context_tokens, spec.width)
        self.token_type_embeddings = nn.Embedding(spec.types, spec.width)
        self.LayerNorm = nn.LayerNorm(spec.width, eps=spec.norm_epsilon)


class _SelfAttention(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self._spec = spec
        self.query = nn.Linear(spec.width, spec.width)
        self.key = nn.Linear(spec.width, spec.width)
        self.value = nn.Linear(spec.width, spec.width)

    def forward(self, x_NC: torch.Tensor, documents: Documents) -> torch.Tensor:
        spec = self._spec
        shape = (-1, spec.heads, spec.width // spec.heads)
        mixed = attend(
            self.query(x_NC).view(shape),
            self.key(x_NC).view(shape),
            self.value(x_NC).view(shape),
            documents,
            causal=False,
            dropout=spec.attention_dropout if self.training else 0.0,
        )
        return mixed.reshape(x_NC.shape)


class _Output(nn.Module):
    """Back to the width, dropped out, added to the residual, normed."""

    def __init__(self, spec: BertSpec, inputs: int) -> None:
        super().__init__()
        self._dropout = spec.dropout
        self.dense = nn.Linear(inputs, spec.width)
        self.LayerNorm = nn.LayerNorm(spec.width, eps=spec.norm_epsilon)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out = dropout(self.dense(x), self._dropout, training=self.training)
        return cast(torch.Tensor, self.LayerNorm(out + residual))


class _Attention(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.self = _SelfAttention(spec)
        self.output = _Output(spec, spec.width)


class _Intermediate(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self._gelu = spec.gelu
        self.dense = nn.Linear(spec.width, spec.inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.dense(x), approximate=self._gelu)


class _Layer(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.attention = _Attention(spec)
        self.intermediate = _Intermediate(spec)
        self.output = _Output(spec, spec.inner)

    def forward(
        self, x_NC: torch.Tensor, documents: Documents, only_first: bool = False
    ) -> torch.Tensor:
        mixed = self.attention.self(x_NC, documents)
        if only_first:  # nobody reads the other rows of the last layer
            mixed = mixed.index_select(0, documents.firsts_S)
            x_NC = x_NC.index_select(0, documents.firsts_S)
        x_NC = self.attention.output(mixed, x_NC)
        return cast(torch.Tensor, self.output(self.intermediate(x_NC), x_NC))


class _Encoder(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(spec) for _ in range(spec.layers))


class _Pooler(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.dense = nn.Linear(spec.width, spec.width)


class _Body(nn.Module):
    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.embeddings = _Embeddings(spec)
        self.encoder = _Encoder(spec)
        self.pooler = _Pooler(spec)


class Bert(Learner):
    """A classifier or a regression."""

    def __init__(self, spec: BertSpec) -> None:
        super().__init__()
        self.spec = spec
        self.context_tokens, self.vocabulary = spec.context_tokens, spec.vocabulary
        self.task = "regress" if spec.labels == 1 else "classify"
        self.bert = _Body(spec)
        self.classifier = nn.Linear(spec.width, spec.labels)

    def initialise(self) -> None:
        """New weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.spec.deviation)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def judge(self, documents: Documents) -> torch.Tensor:
        table = self.bert.embeddings
        types_N = documents.types_N
        if types_N is None:
            types_N = torch.zeros_like(documents.ids_N)
        x_NC = (
            table.word_embeddings(documents.ids_N)
            + table.token_type_embeddings(types_N)
            + table.position_embeddings(documents.positions_N)
        )
        x_NC = dropout(table.LayerNorm(x_NC), self.spec.dropout, training=self.training)
        last = len(self.bert.encoder.layer) - 1
        for index, layer in enumerate(self.bert.encoder.layer):
            x_NC = self.layer(layer, x_NC, documents, index == last)
        pooled_SC = torch.tanh(self.bert.pooler.dense(x_NC))
        pooled_SC = dropout(pooled_SC, self.spec.classifier_dropout, training=self.training)
        return cast(torch.Tensor, self.classifier(pooled_SC))
