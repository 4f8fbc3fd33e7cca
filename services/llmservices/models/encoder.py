"""Encoders: rows of tokens in, one vector for each input out.

Legend: N rows (tokens of all inputs, one behind another), C hidden, H heads, D head dimension, L
tokens of one input, B inputs of equal length, P inputs, W width of the result.

Nothing is padded: every operation works on rows, and attention on groups of inputs of equal length,
which stand together when the caller has sorted them.
Source: Devlin et al. 2018 (BERT), Liu et al. 2019 (RoBERTa), Sanh et al. 2019 (DistilBERT), Song et
al. 2020 (MPNet).
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch.nn import functional

from llmservices.models.linear import Linear
from llmservices.models.spec import Activation
from llmservices.models.tasks import Pool, Task


class EncoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes and switches of one encoder."""

    family: str
    hidden: int
    layers: int
    heads: int
    inner: int
    vocab_tokens: int
    positions: int
    """Rows of the table of positions."""
    position_offset: int = 0
    """Row of an input's first position."""
    norm_eps: float
    activation: Activation

    @property
    def context_tokens(self) -> int:
        """The longest input."""
        return self.positions - self.position_offset


class EncoderModel(Protocol):
    """What the engine may know of a loaded encoder."""

    task: Task

    @property
    def context_tokens(self) -> int: ...

    @property
    def vocab_tokens(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def kv_token_bytes(self) -> int: ...

    @property
    def family(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def width(self) -> int:
        """Numbers of one result."""

    def encode(self, tokens: np.ndarray, types: np.ndarray, lengths: Sequence[int]) -> torch.Tensor:
        """(P, W) float32 on the CPU; inputs of equal length stand together."""


class Norm(msgspec.Struct):
    """Layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class Layer(msgspec.Struct):
    """Attention and MLP, each followed by its norm over the sum with its input."""

    qkv: Linear
    out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


class Head(Protocol):
    """From the token vectors of an input's first row to scores."""

    width: int
    bytes: int

    def __call__(self, first_PC: torch.Tensor) -> torch.Tensor: ...


class Embeddings(msgspec.Struct):
    """Tables of tokens, positions and (where the family has them) types."""

    tokens_VC: torch.Tensor
    positions_TC: torch.Tensor
    types_2C: torch.Tensor | None
    norm: Norm


class Encoder:
    """One of our own encoders: a spec and its weights."""

    kv_token_bytes = 0

    def __init__(
        self,
        spec: EncoderSpec,
        task: Task,
        *,
        embeddings: Embeddings,
        layers: list[Layer],
        head: Head | None,
        bias_buckets: "RelativeBias | None" = None,
    ) -> None:
        self.spec = spec
        self.task = task
        self._embeddings = embeddings
        self._layers = layers
        self._head = head
        self._bias = bias_buckets

    @property
    def context_tokens(self) -> int:
        """The longest input."""
        return min(self.spec.context_tokens, self.task.input_tokens_max or self.spec.context_tokens)

    @property
    def vocab_tokens(self) -> int:
        return self.spec.vocab_tokens

    @property
    def family(self) -> str:
        return self.spec.family

    @property
    def dtype(self) -> torch.dtype:
        return self._embeddings.tokens_VC.dtype

    @property
    def device(self) -> torch.device:
        return self._embeddings.tokens_VC.device

    @property
    def weight_bytes(self) -> int:
        tables = self._embeddings
        linears = [x for la in self._layers for x in (la.qkv, la.out, la.up, la.down)]
        return (
            tables.tokens_VC.nbytes
            + tables.positions_TC.nbytes
            + sum(linear.bytes for linear in linears)
            + (self._head.bytes if self._head is not None else 0)
        )

    @property
    def width(self) -> int:
        """Numbers of one result."""
        if self._head is not None:
            return self._head.width
        return self.spec.hidden * len(self.task.pools)

    @torch.inference_mode()
    def encode(self, tokens: np.ndarray, types: np.ndarray, lengths: Sequence[int]) -> torch.Tensor:
        """(P, W) float32 on the CPU; inputs of equal length stand together."""
        groups = [(length, len(list(group))) for length, group in groupby(lengths)]
        x_NC = self._embed(tokens, types, groups)
        for layer in self._layers:
            x_NC = self._layer(layer, x_NC, groups)
        if self._head is not None:
            starts = np.cumsum([0, *lengths[:-1]])
            first = x_NC.index_select(0, torch.from_numpy(starts).to(x_NC.device))
            return self._head(first).float().cpu()
        return pooled(x_NC, groups, self.task).cpu()

    def _embed(
        self, tokens: np.ndarray, types: np.ndarray, groups: list[tuple[int, int]]
    ) -> torch.Tensor:
        tables, device = self._embeddings, self.device
        x_NC = functional.embedding(torch.from_numpy(tokens).to(device), tables.tokens_VC)
        if tables.types_2C is not None:
            # First tokens and types: the order of additions is that of the reference.
            x_NC = x_NC + functional.embedding(torch.from_numpy(types).to(device), tables.types_2C)
        at, offset = 0, self.spec.position_offset
        for length, count in groups:
            rows = x_NC[at : at + length * count].view(count, length, -1)
            rows += tables.positions_TC[offset : offset + length]
            at += length * count
        return tables.norm(x_NC)

    def _layer(
        self, layer: Layer, x_NC: torch.Tensor, groups: list[tuple[int, int]]
    ) -> torch.Tensor:
        attended_NC = self._attend(layer.qkv(x_NC), groups)
        x_NC = layer.attention_norm(layer.out(attended_NC).add_(x_NC))
        inner = layer.up.activated(x_NC, self.spec.activation)
        return layer.mlp_norm(layer.down(inner).add_(x_NC))

    def _attend(self, qkv: torch.Tensor, groups: list[tuple[int, int]]) -> torch.Tensor:
        heads = self.spec.heads
        out_NC = torch.empty(len(qkv), self.spec.hidden, dtype=qkv.dtype, device=qkv.device)
        at = 0
        for length, count in groups:
            rows = slice(at, at + length * count)
            q, k, v = qkv[rows].view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            bias = None if self._bias is None else self._bias(length)
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            out_NC[rows].view(count, length, heads, -1).copy_(mixed.transpose(1, 2))
            at += length * count
        return out_NC


class RelativeBias:
    """What MPNet adds to the scores of attention: a learned number for each head and distance,
    far distances in buckets that grow logarithmically (as in T5, Raffel et al. 2019)."""

    def __init__(self, table_BH: torch.Tensor, *, buckets: int) -> None:
        self._table = table_BH
        self._buckets = buckets
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, length: int) -> torch.Tensor:
        """(1, H, L, L)"""
        found = self._kept.get(length)
        if found is None:
            if len(self._kept) >= 64:
                self._kept.clear()
            positions = torch.arange(length)
            places = self._places(positions[None, :] - positions[:, None]).to(self._table.device)
            found = self._table[places].permute(2, 0, 1)[None].contiguous()
            self._kept[length] = found
        return found

    def _places(self, distance: torch.Tensor) -> torch.Tensor:
        half = self._buckets // 2
        near = half // 2
        away = -distance
        place = (away < 0).long() * half
        away = away.abs()
        ratio = torch.log(away.float().clamp(min=1) / near) / np.log(128 / near)
        far = (near + (ratio * (half - near)).long()).clamp(max=half - 1)
        return place + torch.where(away < near, away, far)


def pooled(x_NC: torch.Tensor, groups: list[tuple[int, int]], task: Task) -> torch.Tensor:
    """(P, W) float32: the folder's own pooling, side by side where there are several, and its
    normalisation."""
    parts: list[torch.Tensor] = []
    at = 0
    for length, count in groups:
        x_BLC = x_NC[at : at + length * count].view(count, length, -1).float()
        parts.append(torch.cat([_pool(x_BLC, pool) for pool in task.pools], dim=-1))
        at += length * count
    result = torch.cat(parts)
    return functional.normalize(result, dim=-1) if task.normalise else result


def _pool(x_BLC: torch.Tensor, pool: Pool) -> torch.Tensor:
    length = x_BLC.shape[1]
    match pool:
        case "cls":
            return x_BLC[:, 0]
        case "last":
            return x_BLC[:, -1]
        case "max":
            return x_BLC.amax(1)
        case "mean":
            return x_BLC.sum(1) / length
        case "mean_sqrt_len":
            return x_BLC.sum(1) / float(np.sqrt(length))
        case "weighted_mean":
            weights = torch.arange(1, length + 1, device=x_BLC.device, dtype=torch.float32)
            return (x_BLC * weights[None, :, None]).sum(1) / weights.sum()
