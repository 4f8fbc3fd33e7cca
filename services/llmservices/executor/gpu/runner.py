"""Computes the rows of a step on a GPU, with one of our own decoders over paged KV.

A step of decodes has a shape out of a few (`graphs.buckets`) and runs as one recorded graph;
padded rows write to the cache's spare block.  Any other step runs kernel by kernel with as many
rows as it has, or where there are no kernels on the plain path over the same cache.  On a CPU the
same step runs without a graph, which is how it is tested.

A row's bits depend on how many rows are computed beside it, since the libraries choose matrix
products by shape: `exact` mode has the plain path.  What has run on a GPU is said in
tests/bench/README.md.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from llmservices.executor.gpu.forward import forward
from llmservices.executor.gpu.graphs import Graph, Pace, Pool, buckets, on
from llmservices.executor.gpu.operations import MakeOperations
from llmservices.executor.gpu.rows import Rows, Slots, put
from llmservices.executor.gpu.sampling import DeviceSampler, Drawn
from llmservices.executor.resident import UNKNOWN
from llmservices.executor.runner import PagedRunner, Work, wanted_rows
from llmservices.executor.sampler import Ask
from llmservices.models.decoder import Decoder


class GpuRunner:
    """One decoder, its cache, and a graph for each bucket of rows."""

    shares_prefixes = True
    greatest: tuple[list[float], list[int]] | None = None
    kind = "graphs"
    """By what it computes, for people."""

    def __init__(
        self,
        model: Decoder,
        *,
        blocks: int,
        block_tokens: int,
        residents_max: int,
        operations: MakeOperations,
    ) -> None:
        self._model = model
        self._plain = PagedRunner(model, blocks=blocks, block_tokens=block_tokens, exact=False)
        self._cache = self._plain.cache
        self._operations = operations
        each = -(-model.context_tokens // block_tokens)
        self._slots = Slots(residents_max, each, spare=blocks, device=model.device)
        self._sampler = DeviceSampler(model.vocab_tokens, model.device)
        self._buckets = buckets(residents_max)
        self._pool = Pool()
        self._pace = Pace(model.device)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._logits = torch.empty(
            (residents_max, model.vocab_tokens), dtype=model.dtype, device=model.device
        )
        if model.device.type == "cuda" and operations.tile_rows is not None:
            with on(model.device):
                # The largest first: the others fit into its memory.
                for bucket in reversed(self._buckets):
                    self._graph(bucket, each)

    @property
    def cache_bytes(self) -> int:
        return self._plain.cache_bytes + self._logits.nbytes + self._slots.tables.nbytes

    def clear(self, blocks: Iterable[int]) -> None:
        self._plain.clear(blocks)

    def forget(self, residency: int) -> None:
        self._slots.forget(residency)

    def draw(
        self,
        logits_WV: torch.Tensor,
        picked: Sequence[int],
        residencies: Sequence[int],
        asks: Sequence[Ask],
    ) -> Drawn:
        """Sample the picked rows without waiting for them; `UNKNOWN` may stand for their tokens
        in the next step of these residencies."""
        device = self._model.device
        with on(device):
            if len(picked) < len(logits_WV):
                at = put(np.asarray(picked, dtype=np.int64), device)
                logits_WV = logits_WV.index_select(0, at)
            drawn = self._sampler.draw(logits_WV, asks)
            slots = put(np.asarray(self._slots.slots(residencies), dtype=np.int64), device)
            self._slots.newest.index_copy_(0, slots, drawn.tokens_W.to(torch.int32))
            return drawn

    def compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        """As `Runner.compute`; the logits are good until the next call."""
        with on(self._model.device):
            self._pace.wait()
            logits_WV = self._compute(works)
            self._pace.started()
            return logits_WV

    def _compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        firsts = [
            self._slots.first(work.residency, work.blocks, self._blocks(work)) for work in works
        ]
        self._slots.send()
        if all(len(work.tokens) == 1 and work.wanted == "last" for work in works):
            return self._decode(works, firsts)
        if self._operations.tile_rows is not None:
            return self._mixed(works, firsts, self._operations.tile_rows)
        return self._plain.compute(self._known(works))

    def _blocks(self, work: Work) -> int:
        return -(-(work.start + len(work.tokens)) // self._cache.block_tokens)

    # --- steps of decodes -------------------------------------------------------------------------

    def _decode(self, works: Sequence[Work], firsts: list[int]) -> torch.Tensor:
        count = len(works)
        bucket = next(size for size in self._buckets if size >= count)
        packed = np.zeros((3, _aligned(bucket)), dtype=np.int32)
        packed[0, :count] = [work.tokens[0] for work in works]
        packed[1, :count] = [work.start for work in works]
        packed[2] = self._slots.nobody
        packed[2, :count] = firsts
        graph = self._graph(bucket, self._width(max(map(self._blocks, works))))
        return graph.run(put(packed, self._model.device))[:count]

    def _width(self, used: int) -> int:
        """Kernels look at no more than a row's context; the plain way has shapes by powers of
        two."""
        each = self._slots.blocks_each
        if self._operations.tile_rows is not None:
            return each
        return min(1 << (used - 1).bit_length(), each)

    def _graph(self, bucket: int, width: int) -> Graph:
        found = self._graphs.get((bucket, width))
        if found is None:
            shape = (3, _aligned(bucket))
            packed = torch.zeros(shape, dtype=torch.int32, device=self._model.device)
            packed[2] = self._slots.nobody

            def step(packed: torch.Tensor) -> torch.Tensor:
                return self._static(packed[:, :bucket], width)

            found = self._graphs[bucket, width] = Graph(step, packed, self._pool)
        return found

    @torch.inference_mode()
    def _static(self, packed: torch.Tensor, width: int) -> torch.Tensor:
        logits = self._forward(packed, packed.shape[1], None, width, None)
        # All graphs give their logits at one place, whose memory is paid for once.
        return self._logits[: len(logits)].copy_(logits)

    # --- other steps ------------------------------------------------------------------------------

    def _mixed(
        self, works: Sequence[Work], firsts: list[int], tile_rows: int
    ) -> torch.Tensor | None:
        counts = [len(work.tokens) for work in works]
        rows = sum(counts)
        packed = np.zeros((3, _aligned(rows)), dtype=np.int32)
        packed[0, :rows] = np.concatenate([work.tokens for work in works])
        packed[1, :rows] = np.concatenate(
            [np.arange(work.start, work.start + count) for work, count in zip(works, counts)]
        )
        packed[2, :rows] = np.repeat(firsts, counts)
        decodes = next((row for row, count in enumerate(counts) if count > 1), len(counts))
        tiles = _tiles(counts, decodes, tile_rows)
        wanted = wanted_rows(works)
        device = self._model.device
        logits = self._forward(
            put(packed, device)[:, :rows],
            decodes,
            put(tiles, device) if tiles.size else None,
            self._slots.blocks_each,
            # No kernel is ever asked for nothing.
            put(wanted if len(wanted) else np.zeros(1, dtype=np.int64), device),
        )
        return logits if len(wanted) else None

    def _forward(
        self,
        packed: torch.Tensor,
        decodes: int,
        tiles: torch.Tensor | None,
        width: int,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens, positions, firsts = packed
        tokens = self._slots.filled_in(tokens, firsts)
        rows = Rows(tokens, positions, firsts, self._slots.tables, decodes, tiles, width)
        operations = self._operations(self._model, self._cache, rows)
        return forward(self._model, operations, tokens, positions, wanted)

    def _known(self, works: Sequence[Work]) -> Sequence[Work]:
        """With the tokens that only the device knows; waits for it where there are any."""
        if not any(work.tokens[-1] == UNKNOWN for work in works):
            return works
        newest = self._slots.newest.tolist()
        slots = self._slots.slots([work.residency for work in works])
        return [
            msgspec.structs.replace(work, tokens=np.asarray([newest[slot]]))
            if work.tokens[-1] == UNKNOWN
            else work
            for work, slot in zip(works, slots)
        ]


def _aligned(rows: int) -> int:
    """So many columns that every row of a packed input begins at a multiple of 64 bytes: kernels
    are compiled anew where an alignment differs."""
    return -(-rows // 16) * 16


def _tiles(counts: Sequence[int], decodes: int, tile_rows: int) -> np.ndarray:
    """(2, tiles): first row and rows of each tile after the first `decodes` rows."""
    found: list[tuple[int, int]] = []
    row = decodes
    for count in counts[decodes:]:
        found += [(row + done, min(tile_rows, count - done)) for done in range(0, count, tile_rows)]
        row += count
    return np.ascontiguousarray(np.asarray(found, dtype=np.int32).reshape(-1, 2).T)
