"""The decoder itself: one forward pass over rows of tokens, whatever threads they belong to.

Legend: N rows (tokens), C hidden, H heads, G key-value heads, D head dimension, V vocabulary, W
wanted rows.

Keys and values go to, and attention comes from, an `Attention` that the caller provides: here
nothing is known of blocks, threads or batches.  Every operation works row by row.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch.nn import functional

from llmservices.models.linear import Linear
from llmservices.models.spec import Activation, DecoderSpec

EXACT_ELEMENTS = 16_384
"""Elementwise functions run on so many at a time in exact mode: a multiple of every vector
width, and below the size from which torch splits an operation among threads (32,768; 16,384 for
GELU), where an element could fall into the scalar remainder of a vector loop, whose last bit
may differ."""


class Attention(Protocol):
    """Stores the rows' keys and values, then attends."""

    exact: bool

    def __call__(
        self, layer: int, q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor
    ) -> torch.Tensor:
        """Of shape (N, H * D)."""


class Norm:
    """RMS norm or layer norm; statistics in float32."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        eps: float,
        offset: float,
        rms: bool,
    ) -> None:
        self.weight = weight if not offset else weight.float() + offset
        self.bias = bias
        self.eps = eps
        self.rms = rms
        self.wide = bool(offset)

    def __call__(self, x: torch.Tensor, *, exact: bool) -> torch.Tensor:
        if not self.rms:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if not exact and not self.wide:
            return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        # Gemma multiplies before it rounds, the others after.
        return (wide * self.weight).to(x.dtype) if self.wide else wide.to(x.dtype) * self.weight


class Layer:
    """Weights of one layer; qkv and gate-up are one matrix each."""

    __slots__ = (
        "attention_norm", "down", "k_norm", "mlp_norm", "out", "post_attention_norm",
        "post_mlp_norm", "q_norm", "qkv", "up",
    )  # fmt: skip

    def __init__(
        self,
        *,
        attention_norm: Norm,
        qkv: Linear,
        out: Linear,
        mlp_norm: Norm,
        up: Linear,
        down: Linear,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        post_attention_norm: Norm | None = None,
        post_mlp_norm: Norm | None = None,
    ) -> None:
        self.attention_norm = attention_norm
        self.qkv = qkv
        self.out = out
        self.mlp_norm = mlp_norm
        self.up = up
        self.down = down
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.post_attention_norm = post_attention_norm
        self.post_mlp_norm = post_mlp_norm


class Decoder:
    """A decoder-only language model: a spec and its weights."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        embedding_VC: torch.Tensor,
        positions_TC: torch.Tensor | None,
        layers: list[Layer],
        final_norm: Norm,
        head: Linear,
    ) -> None:
        self.spec = spec
        self.embedding_VC = embedding_VC
        self.layers = layers
        self.positions_TC = positions_TC
        self.final_norm = final_norm
        self.head = head
        # A number, since a tensor made in the middle of a step would make a GPU wait for it; in
        # the model's precision, as the families' own code has it.
        self.embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=self.dtype))

    @property
    def context_tokens(self) -> int:
        return self.spec.context_tokens

    @property
    def vocab_tokens(self) -> int:
        return self.spec.vocab_tokens

    @property
    def family(self) -> str:
        return self.spec.family

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VC.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VC.device

    @property
    def weight_bytes(self) -> int:
        """Without norms and tables."""
        linears = [self.head] + [
            linear
            for layer in self.layers
            for linear in (layer.qkv, layer.out, layer.up, layer.down)
        ]
        return sum(linear.bytes for linear in linears) + self.embedding_VC.nbytes

    @property
    def kv_token_bytes(self) -> int:
        """Of the keys and values of one token in all layers."""
        spec = self.spec
        return 2 * spec.layers * spec.kv_heads * spec.head_dim * self.dtype.itemsize

    @cached_property
    def ropes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(cosines, signed sines) of each, by position.  Made at the first use: who takes the
        weights out never needs them."""
        spec = self.spec
        return [rope.tables(spec.context_tokens, self.dtype, self.device) for rope in spec.ropes]

    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        attention: Attention,
        wanted_W: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Logits (W, V) of the wanted rows, in the model's precision; None where no row is
        wanted.

        In exact mode the caller gives the same N always, and gets the logits of all N rows
        where any is wanted.
        """
        spec, exact = self.spec, attention.exact
        x_NC = functional.embedding(tokens_N, self.embedding_VC)
        if spec.embedding_scale != 1.0:
            x_NC = x_NC * self.embedding_scale
        if self.positions_TC is not None:
            x_NC = x_NC + functional.embedding(positions_N, self.positions_TC)
        angles = [
            (cos.index_select(0, positions_N)[:, None], sin.index_select(0, positions_N)[:, None])
            for cos, sin in self.ropes
        ]
        for index, layer in enumerate(self.layers):
            rope = angles[spec.rope_of[index]] if angles else None
            attended = self._attend(
                index, layer, layer.attention_norm(x_NC, exact=exact), rope, attention
            )
            if spec.parallel_residual:
                x_NC = self._mlp(layer, layer.mlp_norm(x_NC, exact=exact), exact) + attended + x_NC
                continue
            if layer.post_attention_norm is not None:
                attended = layer.post_attention_norm(attended, exact=exact)
            x_NC = x_NC + attended
            mixed = self._mlp(layer, layer.mlp_norm(x_NC, exact=exact), exact)
            if layer.post_mlp_norm is not None:
                mixed = layer.post_mlp_norm(mixed, exact=exact)
            x_NC = x_NC + mixed
        if wanted_W is None:
            return None
        if not exact:
            x_NC = x_NC.index_select(0, wanted_W)
        logits = self.head(self.final_norm(x_NC, exact=exact))
        if spec.final_softcap is not None:
            logits = elementwise(torch.tanh, logits / spec.final_softcap, exact=exact)
            logits = logits * spec.final_softcap
        return logits

    def _attend(
        self,
        index: int,
        layer: Layer,
        x_NC: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        attention: Attention,
    ) -> torch.Tensor:
        spec = self.spec
        heads, both = spec.heads, spec.heads + spec.kv_heads
        qkv = layer.qkv(x_NC).view(-1, both + spec.kv_heads, spec.head_dim)
        qk = qkv[:, :both]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = layer.q_norm(qk[:, :heads], exact=attention.exact)
            k = layer.k_norm(qk[:, heads:], exact=attention.exact)
            qk = torch.cat([q, k], 1)
        if rope is not None:
            qk = rotate(qk, *rope)
        attended = attention(index, qk[:, :heads], qk[:, heads:], qkv[:, both:])
        return layer.out(attended)

    def _mlp(self, layer: Layer, x_NC: torch.Tensor, exact: bool) -> torch.Tensor:
        inner = layer.up(x_NC)
        if not self.spec.gated:
            return layer.down(activate(self.spec.activation, inner, exact=exact))
        gate, up = inner[:, : self.spec.inner], inner[:, self.spec.inner :]
        return layer.down(activate(self.spec.activation, gate, exact=exact) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rows (N, heads, D) turned by their angles, on as many dimensions as those have."""
    dims = cos.shape[-1]
    if dims == x.shape[-1]:
        return x * cos + torch.roll(x, dims // 2, -1) * sin
    turned = x[..., :dims]
    turned = turned * cos + torch.roll(turned, dims // 2, -1) * sin
    return torch.cat([turned, x[..., dims:]], -1)


def activate(name: Activation, x: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """The named activation."""
    match name:
        case "silu":
            return elementwise(functional.silu, x, exact=exact)
        case "gelu":
            return elementwise(functional.gelu, x, exact=exact)
        case "gelu_tanh":
            return elementwise(_gelu_tanh, x, exact=exact)
        case "relu":
            return torch.relu(x)


class _Function(Protocol):
    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def elementwise(function: _Function, x: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """`function` of every element; in exact mode an element's bits do not depend on where it
    stands.  On a GPU they never do: there is no vector loop with a remainder."""
    if not exact or x.is_cuda:
        return function(x)
    flat = x.reshape(-1)
    room = -len(flat) % 64
    if room:
        flat = functional.pad(flat, (0, room))
    parts = [function(part) for part in torch.split(flat, EXACT_ELEMENTS)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[: x.numel()].view(x.shape)
