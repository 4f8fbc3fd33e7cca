"""Computes the rows of a step with one native call over paged KV.

A row's bits depend on its own context alone, whatever is computed beside it and on however many
threads: fast and exact mode are one path here.
"""

import ctypes
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from llmproto.errors import invalid

from llmservices.executor.runner import Work, wanted_rows
from llmservices.executor.sampler import Draw
from llmservices.models.native.bindings import BLOCK_TOKENS_MAX, Layer, Plan
from llmservices.models.native.bindings import Draw as NativeDraw
from llmservices.models.native.decoder import NativeDecoder


class NativeRunner:
    """One native engine over a decoder that was laid out for it."""

    shares_prefixes = True

    def __init__(
        self,
        model: NativeDecoder,
        *,
        blocks: int,
        block_tokens: int,
        rows_max: int,
        threads: int,
        isa: str = "",
    ) -> None:
        """`isa` names an instruction set; empty: the best that runs here."""
        if block_tokens > BLOCK_TOKENS_MAX:
            raise invalid(
                f"blocks of {block_tokens} tokens; the native step takes {BLOCK_TOKENS_MAX}"
            )
        self._model = model
        self._layers = (Layer * model.spec.layers)(*model.layers)
        struct = model.struct(self._layers, block_tokens)
        functions = model.functions
        at = ctypes.pointer(struct)
        values = functions.llm_block_bytes(at) // model.dtype.itemsize
        size = values * model.dtype.itemsize
        # From numpy, whose zeros are pages that the system makes when they are first written: a
        # cache takes the memory of what is in it.
        self.caches = [
            torch.from_numpy(np.zeros((blocks, size), dtype=np.uint8)).view(model.dtype)
            for _ in range(model.spec.layers)
        ]
        for layer, cache in zip(self._layers, self.caches, strict=True):
            layer.cache = cache.data_ptr()
        opened = functions.llm_open(at, threads, rows_max, isa.encode())
        if opened is None:
            raise invalid(
                f"the native step cannot run here with {threads} threads ({isa or 'any'})"
            )
        self._engine = opened
        self._columns = struct.head.columns
        self._block_tokens = block_tokens
        self.isa = isa or functions.llm_isas().decode().split()[0]
        self.greatest: tuple[list[float], list[int]] | None = None
        weakref.finalize(self, functions.llm_close, opened)

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def clear(self, blocks: Iterable[int]) -> None:
        for cache in self.caches:
            cache[list(blocks)] = 0

    def forget(self, residency: int) -> None:
        """Nothing is kept by residency."""

    def compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        tokens = np.concatenate([work.tokens for work in works]).astype(np.int32)
        segments = np.zeros((len(works), 4), dtype=np.int32)
        tables: list[Sequence[int]] = []
        first = 0
        for row, work in enumerate(works):
            used = -(-(work.start + len(work.tokens)) // self._block_tokens)
            segments[row, :3] = work.start, len(work.tokens), first
            tables.append(work.blocks[:used])
            first += used
        blocks = np.concatenate([np.asarray(table, dtype=np.int32) for table in tables])
        wanted = wanted_rows(works).astype(np.int32)
        count = len(wanted)
        logits = torch.empty((count, self._columns), dtype=torch.float32)
        values = np.empty(count, dtype=np.float32)
        best = np.empty(count, dtype=np.int32)
        plan = Plan(
            tokens.ctypes.data,
            segments.ctypes.data,
            blocks.ctypes.data,
            wanted.ctypes.data,
            logits.data_ptr(),
            values.ctypes.data,
            best.ctypes.data,
            len(tokens),
            len(works),
            count,
            0,
        )
        done = self._model.functions.llm_step(self._engine, ctypes.pointer(plan))
        assert done == 0, f"{len(tokens)} rows are more than the native step was opened for"
        self.greatest = (values.tolist(), best.tolist())
        return logits[:, : self._model.vocab_tokens] if count else None

    def draw(self, draws: Sequence[Draw]) -> list[int | None]:
        """Tokens from rows of logits; None where two are nearer to each other than the rounding of
        either side, and where the native step does not go."""
        vocab = self._model.vocab_tokens
        asked = (NativeDraw * len(draws))()
        taken = [row for row, draw in enumerate(draws) if _readable(draw.logits_V, vocab)]
        for at, row in enumerate(taken):
            sampling, (first, second) = draws[row].sampling, draws[row].words
            asked[at] = NativeDraw(
                draws[row].logits_V.data_ptr(),
                sampling.top_p,
                sampling.min_p,
                sampling.temperature,
                sampling.top_k,
                first,
                second,
                -1,
                0,
            )
        self._model.functions.llm_draw(self._engine, asked, len(taken))
        tokens: list[int | None] = [None] * len(draws)
        for at, row in enumerate(taken):
            if asked[at].token >= 0:
                tokens[row] = asked[at].token
        return tokens


def _readable(logits_V: torch.Tensor, vocab: int) -> bool:
    """Whether it is float32 in a row, with room behind it to the next multiple of 16."""
    room = logits_V.untyped_storage().nbytes() // 4 - logits_V.storage_offset()
    return (
        logits_V.dtype == torch.float32
        and len(logits_V) == vocab
        and (logits_V.stride(0) == 1)
        and room >= -(-vocab // 16) * 16
    )
