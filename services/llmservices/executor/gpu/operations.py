"""What stands between the matrix products of a step: one interface, and the plain way in torch.

Legend: N rows, C hidden, H heads, G key-value heads, D head dimension, I inner width.
"""

from typing import Protocol

import torch

from llmservices.executor.attention import Cache, attend
from llmservices.executor.gpu.rows import Rows
from llmservices.models.decoder import Decoder, Layer, Norm, activate, rotate


class Operations(Protocol):
    """Made for the rows of one step.  No call waits for the device, and every shape follows from
    the number of rows alone: all of it can stand in a graph."""

    def norm(self, norm: Norm, x_NC: torch.Tensor) -> torch.Tensor: ...

    def add_norm(
        self, norm: Norm, x_NC: torch.Tensor, more_NC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and its norm.  May write over `x_NC`."""

    def store(self, index: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        """Norms and rotates queries and keys, stores keys and values; the queries (N, H, D)."""

    def attend(self, index: int, q_NHD: torch.Tensor) -> torch.Tensor:
        """(N, H * D)."""

    def gate(self, inner: torch.Tensor) -> torch.Tensor:
        """Activation of the first half times the second: (N, I) of (N, 2 I)."""


class MakeOperations(Protocol):
    """Makes them for a step."""

    @property
    def tile_rows(self) -> int | None:
        """Rows of one thread that are computed together; None: only steps of decodes are."""

    def __call__(self, model: Decoder, cache: Cache, rows: Rows) -> Operations: ...


class PlainOperations:
    """In torch, on any device; decodes only.  Attention gathers each row's context."""

    def __init__(self, model: Decoder, cache: Cache, rows: Rows) -> None:
        assert rows.tiles is None
        spec, device = model.spec, cache.device
        positions = rows.positions_N.long()
        self._spec, self._cache, self._rows = spec, cache, rows
        self._angles = [
            (cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None])
            for cos, sin in model.ropes
        ]
        heads, tokens = spec.kv_heads, cache.block_tokens
        # As `Cache.write_index` and `Cache.read_index`, but on the device.
        slices = torch.arange(2 * heads, device=device).view(2, 1, heads)
        at = rows.firsts_N.long() + positions // tokens
        blocks = rows.tables.index_select(0, at).long()
        slices_of = blocks[None, :, None] * (2 * heads) + slices
        self._write = (slices_of * tokens + (positions % tokens)[:, None]).reshape(-1)
        columns = torch.arange(rows.width, device=device)
        at_NB = rows.firsts_N.long()[:, None] + columns
        table = rows.tables.index_select(0, at_NB.reshape(-1)).long().view(at_NB.shape)
        self._read = (table[None, :, None, :] * (2 * heads) + slices[..., None]).reshape(-1)
        self._keys = torch.arange(rows.width * tokens, device=device)
        self._ends = positions[:, None]
        self._masks: dict[int | None, torch.Tensor] = {}

    def norm(self, norm: Norm, x_NC: torch.Tensor) -> torch.Tensor:
        return norm(x_NC, exact=False)

    def add_norm(
        self, norm: Norm, x_NC: torch.Tensor, more_NC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_NC = x_NC + more_NC
        return x_NC, norm(x_NC, exact=False)

    def store(self, index: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        spec = self._spec
        heads, both = spec.heads, spec.heads + spec.kv_heads
        split = qkv.view(-1, both + spec.kv_heads, spec.head_dim)
        qk = split[:, :both]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = layer.q_norm(qk[:, :heads], exact=False)
            k = layer.k_norm(qk[:, heads:], exact=False)
            qk = torch.cat([q, k], 1)
        if self._angles:
            qk = rotate(qk, *self._angles[spec.rope_of[index]])
        self._cache.write(index, self._write, qk[:, heads:], split[:, both:])
        return qk[:, :heads]

    def attend(self, index: int, q_NHD: torch.Tensor) -> torch.Tensor:
        spec, rows = self._spec, len(q_NHD)
        k, v = self._cache.gather(index, self._read, rows)
        q = q_NHD.reshape(rows, spec.kv_heads, -1, spec.head_dim)
        return attend(spec, q, k, v, self._mask(spec.windows[index], q.dtype)).reshape(rows, -1)

    def gate(self, inner: torch.Tensor) -> torch.Tensor:
        half = inner.shape[1] // 2
        return activate(self._spec.activation, inner[:, :half], exact=False) * inner[:, half:]

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(N, 1, 1, S) to be added."""
        if window not in self._masks:
            hidden = self._keys > self._ends
            if window is not None:
                hidden |= self._keys <= self._ends - window
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[window] = zeros.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self._masks[window]


class Plain:
    """Makes them."""

    tile_rows: int | None = None

    def __call__(self, model: Decoder, cache: Cache, rows: Rows) -> Operations:
        return PlainOperations(model, cache, rows)
