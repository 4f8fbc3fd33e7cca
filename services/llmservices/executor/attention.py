"""Attention over paged KV in plain torch, on any device: one fast way and one exact way.

Legend: N rows (query tokens), S key positions, H heads, G key-value heads, Q = H / G queries a
key-value head, D head dimension, B blocks, T tokens a block.

The cache is one tensor a layer, (B + 1, 2, G, T, D): gathered block by block it gives every
head its keys as one matrix, without a further copy.  The last block is nobody's: rows that only
fill up a tile write there.
"""

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch.nn import functional

from llmservices.models.decoder import elementwise
from llmservices.models.spec import DecoderSpec

TILE_ROWS = 32
"""Rows of every forward pass in exact mode, padded where there are fewer."""
TILE_KEYS = 64
"""Key positions that exact mode reduces at a time."""


class Segment(msgspec.Struct, frozen=True):
    """The rows of one thread in a step: positions start .. start + tokens - 1, and the thread's
    blocks."""

    start: int
    tokens: int
    blocks: Sequence[int]


class Cache:
    """The keys and values of all blocks."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.blocks = blocks
        self.block_tokens = block_tokens
        shape = (blocks + 1, 2, spec.kv_heads, block_tokens, spec.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        # (2, 1, G, 1): which slice of a block holds the keys (0) and values (1) of which head.
        self._slices = np.arange(2 * spec.kv_heads).reshape(2, 1, spec.kv_heads, 1)

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    def write_index(self, blocks_N: np.ndarray, offsets_N: np.ndarray) -> torch.Tensor:
        """Where `write` puts the rows of a step; one index serves all layers."""
        slices = blocks_N[None, :, None] * self._slices.size + self._slices[..., 0]
        at = slices * self.block_tokens + offsets_N[:, None]
        return torch.from_numpy(at.reshape(-1)).to(self.device)

    def write(self, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the keys and values (N, G, D) of rows."""
        flat = self.layers[layer].view(-1, self.spec.head_dim)
        flat.index_copy_(0, index, torch.stack([k, v]).view(-1, self.spec.head_dim))

    def read_index(self, table: np.ndarray) -> torch.Tensor:
        """What `gather` fetches for a table of block ids (rows, blocks)."""
        at = table[None, :, None, :] * self._slices.size + self._slices
        return torch.from_numpy(at.reshape(-1)).to(self.device)

    def gather(self, layer: int, index: torch.Tensor, rows: int) -> torch.Tensor:
        """(2, rows, G, S, D): keys, then values."""
        pool = self.layers[layer]
        taken = pool.view(-1, *pool.shape[3:]).index_select(0, index)
        return taken.view(2, rows, self.spec.kv_heads, -1, self.spec.head_dim)


def slots(segments: Sequence[Segment], block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(block, offset in it) where each row's keys and values are stored."""
    blocks, offsets = [], []
    for segment in segments:
        positions = np.arange(segment.start, segment.start + segment.tokens)
        blocks.append(np.asarray(segment.blocks, dtype=np.int64)[positions // block_tokens])
        offsets.append(positions % block_tokens)
    return np.concatenate(blocks), np.concatenate(offsets)


def _table(segments: Sequence[Segment], blocks: int, block_tokens: int, unused: int) -> np.ndarray:
    """Block ids of each segment, cut or padded to a multiple that covers all."""
    table = np.full((len(segments), blocks), unused, dtype=np.int64)
    for row, segment in enumerate(segments):
        used = -(-(segment.start + segment.tokens) // block_tokens)
        table[row, :used] = segment.blocks[:used]
    return table


class FastAttention:
    """Fused attention of torch: all decodes of a step in one call, each prefill in its own."""

    exact = False

    def __init__(self, cache: Cache, segments: Sequence[Segment]) -> None:
        """`segments` in the order of the rows; those of one token before the first longer one are
        computed together."""
        self._cache = cache
        self._slots = cache.write_index(*slots(segments, cache.block_tokens))
        singles = list(itertools.takewhile(lambda segment: segment.tokens == 1, segments))
        self._decodes = len(singles)
        self._prefills = segments[len(singles) :]
        self._masks: dict[int | None, torch.Tensor | None] = {}
        if singles:
            self._keys = max(segment.start + 1 for segment in singles)
            blocks = -(-self._keys // cache.block_tokens)
            table = _table(singles, blocks, cache.block_tokens, cache.blocks)
            self._decode_index = cache.read_index(table)
            self._decode_ends = torch.tensor(
                [segment.start for segment in singles], device=cache.device
            )[:, None]
        self._prefill_indices = [self._index_of(segment) for segment in self._prefills]
        self._prefill_masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def __call__(
        self, layer: int, q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor
    ) -> torch.Tensor:
        self._cache.write(layer, self._slots, k_NGD, v_NGD)
        window = self._cache.spec.windows[layer]
        parts = []
        if self._decodes:
            parts.append(self._decode(layer, q_NHD[: self._decodes], window))
        row = self._decodes
        for index, segment in enumerate(self._prefills):
            rows = slice(row, row + segment.tokens)
            if segment.start == 0:
                k, v = k_NGD[rows].transpose(0, 1)[None], v_NGD[rows].transpose(0, 1)[None]
            else:
                k, v = self._cache.gather(layer, self._prefill_indices[index], 1)
            parts.append(self._prefill(index, q_NHD[rows], k, v, window))
            row += segment.tokens
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _index_of(self, segment: Segment) -> torch.Tensor:
        tokens = self._cache.block_tokens
        blocks = -(-(segment.start + segment.tokens) // tokens)
        return self._cache.read_index(_table([segment], blocks, tokens, self._cache.blocks))

    def _decode(self, layer: int, q_NHD: torch.Tensor, window: int | None) -> torch.Tensor:
        spec = self._cache.spec
        rows = len(q_NHD)
        k, v = self._cache.gather(layer, self._decode_index, rows)[:, :, :, : self._keys]
        # The queries that share a key-value head stand where query positions would: one pass
        # over the keys.
        q = q_NHD.reshape(rows, spec.kv_heads, -1, spec.head_dim)
        if window not in self._masks:
            self._masks[window] = self._decode_mask(window, q.dtype)
        return attend(self._cache.spec, q, k, v, self._masks[window]).reshape(rows, -1)

    def _decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(N, 1, 1, S) to be added; None where every row sees every key."""
        keys = torch.arange(self._keys, device=self._cache.device)
        hidden = keys > self._decode_ends
        if window is not None:
            hidden |= keys <= self._decode_ends - window
        if not hidden.any():
            return None
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]

    def _prefill(
        self, index: int, q_NHD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """`k` and `v` are (1, G, S, D)."""
        spec = self._cache.spec
        segment = self._prefills[index]
        end = segment.start + segment.tokens
        q, k, v = q_NHD.transpose(0, 1)[None], k[:, :, :end], v[:, :, :end]
        plain = segment.start == 0 and (window is None or window >= end)
        if plain and spec.attention_softcap is None:
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=spec.attention_scale, enable_gqa=True
            )
        else:
            if (index, window) not in self._prefill_masks:
                self._prefill_masks[index, window] = self._prefill_mask(segment, window, q.dtype)
            out = attend(spec, q, k, v, self._prefill_masks[index, window])
        return out[0].transpose(0, 1).reshape(segment.tokens, -1)

    def _prefill_mask(
        self, segment: Segment, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """(1, 1, tokens, S) to be added."""
        end = segment.start + segment.tokens
        keys = torch.arange(end, device=self._cache.device)
        rows = torch.arange(segment.start, end, device=self._cache.device)[:, None]
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[None, None]


def attend(
    spec: DecoderSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(batch, heads, rows, D) attend to (batch, key-value heads, S, D); any number of key-value
    heads that divides that of the queries'."""
    if spec.attention_softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=spec.attention_scale, enable_gqa=True
        )
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.transpose(-1, -2)).float() * spec.attention_scale
    scores = torch.tanh(scores / spec.attention_softcap) * spec.attention_softcap
    if mask is not None:
        scores = scores + mask
    return functional.softmax(scores, -1).to(v.dtype) @ v


class ExactAttention:
    """Attention whose bits for a row depend on that row's thread and position alone.

    TILE_ROWS rows, always; each row meets its keys in tiles of TILE_KEYS, products of one fixed
    shape; the weights are taken against the row's greatest score, which no order of comparison
    changes, and the tiles' sums are added first to last, where a tile beyond the row's end adds
    exact zeros.  All in float32.
    """

    exact = True

    def __init__(self, cache: Cache, segments: Sequence[Segment]) -> None:
        """`segments` together have TILE_ROWS rows or fewer."""
        self._cache = cache
        stored, offsets = slots(segments, cache.block_tokens)
        rows = len(stored)
        assert rows <= TILE_ROWS
        spare = (0, TILE_ROWS - rows)
        self._slots = cache.write_index(
            np.pad(stored, spare, constant_values=cache.blocks), np.pad(offsets, spare)
        )
        ends = np.zeros(TILE_ROWS, dtype=np.int64)
        ends[:rows] = np.concatenate(
            [np.arange(segment.start, segment.start + segment.tokens) for segment in segments]
        )
        self._tiles = int(ends.max()) // TILE_KEYS + 1
        keys = self._tiles * TILE_KEYS
        blocks = -(-keys // cache.block_tokens)
        table = np.full((TILE_ROWS, blocks), cache.blocks, dtype=np.int64)
        table[:rows] = np.repeat(
            _table(segments, blocks, cache.block_tokens, cache.blocks),
            [segment.tokens for segment in segments],
            axis=0,
        )
        self._index = cache.read_index(table)
        self._ends = torch.from_numpy(ends).to(cache.device)[:, None]
        self._hidden: dict[int | None, torch.Tensor] = {}

    def __call__(
        self, layer: int, q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor
    ) -> torch.Tensor:
        cache, spec = self._cache, self._cache.spec
        cache.write(layer, self._slots, k_NGD, v_NGD)
        window = spec.windows[layer]
        if window not in self._hidden:
            self._hidden[window] = self._mask(window)
        queries = spec.heads // spec.kv_heads
        kv = cache.gather(layer, self._index, TILE_ROWS).float()
        k, v = kv.view(2, TILE_ROWS * spec.kv_heads, -1, spec.head_dim)
        q = q_NHD.float().reshape(TILE_ROWS * spec.kv_heads, queries, spec.head_dim)
        spans = [slice(tile * TILE_KEYS, (tile + 1) * TILE_KEYS) for tile in range(self._tiles)]
        tiles = [torch.bmm(q, k[:, span].transpose(1, 2)) for span in spans]
        scores = torch.stack(tiles).view(self._tiles, TILE_ROWS, -1, TILE_KEYS)
        scores = scores * spec.attention_scale
        if spec.attention_softcap is not None:
            cap = spec.attention_softcap
            scores = elementwise(torch.tanh, scores / cap, exact=True) * cap
        scores = scores.masked_fill(self._hidden[window], float("-inf"))
        scores = scores - scores.amax((0, 3), keepdim=True)
        weights = elementwise(torch.exp, scores, exact=True)
        weights = weights.view(self._tiles, -1, queries, TILE_KEYS)
        out: torch.Tensor | None = None
        total: torch.Tensor | None = None
        for tile, span in enumerate(spans):
            part = torch.bmm(weights[tile], v[:, span])
            mass = weights[tile].sum(-1, keepdim=True)
            # Adding zero first makes every zero positive, so that further zeros change no bit.
            out = part + 0.0 if out is None else out + part
            total = mass if total is None else total + mass
        assert out is not None
        assert total is not None
        return (out / total).view(TILE_ROWS, -1).to(q_NHD.dtype)

    def _mask(self, window: int | None) -> torch.Tensor:
        """(tiles, N, 1, TILE_KEYS): true where a row must not look."""
        keys = torch.arange(self._tiles * TILE_KEYS, device=self._cache.device)
        hidden = keys > self._ends
        if window is not None:
            hidden |= keys <= self._ends - window
        return hidden.view(TILE_ROWS, self._tiles, TILE_KEYS).transpose(0, 1)[:, :, None]
