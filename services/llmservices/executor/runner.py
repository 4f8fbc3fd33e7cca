"""Computes the rows of a step with one of our own decoders over paged KV.

What is computed is decided elsewhere (`planner.py`); where keys and values lie, too (`blocks.py`).
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np
import torch

from llmservices.executor.attention import (
    TILE_ROWS,
    Cache,
    ExactAttention,
    FastAttention,
    Segment,
)
from llmservices.models.decoder import Decoder


class Work(msgspec.Struct, frozen=True):
    """Rows of one thread."""

    residency: int
    tokens: np.ndarray
    """Ids of the rows."""
    start: int
    """Position of the first."""
    blocks: Sequence[int]
    wanted: Literal["none", "last", "all"]
    """Rows whose logits are needed."""


class Runner(Protocol):
    """Computes steps; the engine's only view of a model."""

    shares_prefixes: bool
    greatest: tuple[list[float], list[int]] | None
    """(greatest logit, its token) of the rows that `compute` gave last, where it found them by the
    way."""

    def compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        """Logits (W, V) of the wanted rows in the order of `works`; those of one row come first
        in it."""

    def clear(self, blocks: Iterable[int]) -> None:
        """Wipe blocks whose content may be poisonous (not a number) to whoever gets them next."""

    def forget(self, residency: int) -> None:
        """The residency's blocks went back."""

    @property
    def cache_bytes(self) -> int: ...


class PagedRunner:
    """Our own decoders, in torch."""

    shares_prefixes = True
    greatest: tuple[list[float], list[int]] | None = None

    def __init__(self, model: Decoder, *, blocks: int, block_tokens: int, exact: bool) -> None:
        self._model = model
        self._exact = exact
        self.cache = Cache(
            model.spec,
            blocks=blocks,
            block_tokens=block_tokens,
            dtype=model.dtype,
            device=model.device,
        )

    @property
    def cache_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache.layers)

    def clear(self, blocks: Iterable[int]) -> None:
        for layer in self.cache.layers:
            layer[list(blocks)] = 0

    def forget(self, residency: int) -> None:
        """Nothing is kept by residency."""

    def compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        tokens = np.concatenate([work.tokens for work in works]).astype(np.int64)
        positions = np.concatenate(
            [np.arange(work.start, work.start + len(work.tokens)) for work in works]
        )
        wanted = wanted_rows(works)
        if self._exact:
            return self._in_tiles(works, tokens, positions, wanted)
        segments = [Segment(work.start, len(work.tokens), work.blocks) for work in works]
        return self._model.forward(
            self._put(tokens),
            self._put(positions),
            FastAttention(self.cache, segments),
            self._put(wanted) if len(wanted) else None,
        )

    def _in_tiles(
        self, works: Sequence[Work], tokens: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> torch.Tensor | None:
        """Every forward pass has TILE_ROWS rows, so that each operation has one shape and so
        one order."""
        logits: list[torch.Tensor] = []
        for start, segments in _tiles(works):
            rows = slice(start, start + TILE_ROWS)
            inside = wanted[(wanted >= start) & (wanted < start + TILE_ROWS)] - start
            at = self._put(inside)
            out = self._model.forward(
                self._put(_filled(tokens[rows])),
                self._put(_filled(positions[rows])),
                ExactAttention(self.cache, segments),
                at if len(inside) else None,
            )
            if out is not None:
                logits.append(out.index_select(0, at))
        return torch.cat(logits) if logits else None

    def _put(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._model.device)


def wanted_rows(works: Sequence[Work]) -> np.ndarray:
    """Indices of the wanted rows."""
    rows: list[int] = []
    end = 0
    for work in works:
        start, end = end, end + len(work.tokens)
        if work.wanted == "last":
            rows.append(end - 1)
        elif work.wanted == "all":
            rows.extend(range(start, end))
    return np.asarray(rows, dtype=np.int64)


def _tiles(works: Sequence[Work]) -> list[tuple[int, list[Segment]]]:
    """(first row, segments) of each tile; a thread's rows may go on in the next one."""
    tiles: list[tuple[int, list[Segment]]] = []
    row = 0
    for work in works:
        done = 0
        while done < len(work.tokens):
            if row % TILE_ROWS == 0:
                tiles.append((row, []))
            take = min(TILE_ROWS - row % TILE_ROWS, len(work.tokens) - done)
            tiles[-1][1].append(Segment(work.start + done, take, work.blocks))
            row += take
            done += take
    return tiles


def _filled(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, (0, TILE_ROWS - len(rows)))
