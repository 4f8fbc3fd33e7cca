"""What tokens cost in bytes and operations, and what the processor can do of both at most.

A decode reads every weight once a step and every key and value of its context once a token; the
more rows share a step, the more its arithmetic weighs. Source of the model: Williams, Waterman and
Patterson 2009 (Roofline, doi 10.1145/1498765.1498785).
"""

from pathlib import Path
from typing import Final

import msgspec
import torch

from llmservices.models.native.bindings import BFLOAT16, FLOAT32, INT8, Functions
from llmservices.models.spec import DecoderSpec

DOT_KINDS: Final = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}
DOT_OF: Final = {precision: precision for precision in DOT_KINDS} | {"int4": "int8"}
"""Precision of the weights -> the dot products that they are computed with."""
DOT_ROUNDS: Final = 2_000_000
"""Some milliseconds each."""
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
CACHES_TIMES: Final = 4
"""A buffer so many times as large as all caches is not read out of them."""


class Ceilings(msgspec.Struct, frozen=True):
    """What the processor did at one moment, with nothing else to do."""

    read_bytes_per_s: float
    dot_operations_per_s: dict[str, float]
    """By the kind of dot products."""


class Gauge:
    """Measures ceilings; holds the memory that is read for it."""

    def __init__(
        self, functions: Functions, *, threads: int, buffer_bytes: int, isa: str = ""
    ) -> None:
        self._functions = functions
        self._threads = threads
        self._isa = isa.encode()
        self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
        functions.llm_prefer_large_pages(self._buffer.data_ptr(), self._buffer.nbytes)
        self._buffer.fill_(1)  # else it is no memory yet

    def measure(self) -> Ceilings:
        functions, threads, isa = self._functions, self._threads, self._isa
        start, size = self._buffer.data_ptr(), self._buffer.nbytes
        return Ceilings(
            functions.llm_read_bandwidth(start, size, threads, isa),
            {
                name: functions.llm_dot_peak(kind, DOT_ROUNDS, threads, isa)
                for name, kind in DOT_KINDS.items()
            },
        )


def beyond_caches(least_bytes: int, caches: Path = CACHES) -> int:
    """Bytes of a buffer that the caches of this processor do not hold."""
    sizes = [file.read_text().strip() for file in caches.glob("index*/size")]
    held = sum(int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K"))
    return max(least_bytes, CACHES_TIMES * held)


def matrix_operations(spec: DecoderSpec) -> int:
    """Of all layers, for one row: a product and a sum for every weight."""
    heads = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim  # q and out, k and v
    inner = (3 if spec.gated else 2) * spec.inner
    return 2 * spec.layers * spec.hidden * (heads + inner)


def head_operations(spec: DecoderSpec) -> int:
    """Logits of one row."""
    return 2 * spec.hidden * spec.vocab_tokens


def attention_operations(spec: DecoderSpec, positions: int) -> int:
    """Of all layers, for rows that attend to so many positions in all."""
    return 4 * spec.layers * spec.heads * spec.head_dim * positions


def decode_bytes(weight_bytes: int, kv_token_bytes: int, *, streams: int, context: float) -> float:
    """Read for one token, of so many streams in a step, each with a context of this mean length."""
    return weight_bytes / streams + kv_token_bytes * context


def decode_operations(spec: DecoderSpec, context: float) -> float:
    """For one token behind a context of this mean length."""
    return matrix_operations(spec) + head_operations(spec) + attention_operations(spec, 1) * context


def prefill_operations(spec: DecoderSpec, tokens: int) -> float:
    """For one token of a prompt of so many, on the mean; only the last one's logits are wanted."""
    attended = attention_operations(spec, tokens * (tokens + 1) // 2)
    return matrix_operations(spec) + (head_operations(spec) + attended) / tokens
