"""Weights in the layouts that the library reads, each laid out once.

Legend: N columns (outputs), K depth (inputs). Both are padded with zeros to multiples of 32. A
panel holds 32 columns; along its depth come steps of so many depths as the processor multiplies at
once (1 float32, 2 bfloat16, 4 int8), 16 columns beside 16. `sources/pack.h` does it.
"""

import ctypes
from collections.abc import Sequence
from typing import Final

import msgspec
import torch
from torch.nn import functional

from llmservices.models.native.bindings import (
    BFLOAT16,
    FLOAT32,
    INT4,
    INT8,
    PANEL,
    Functions,
    Matrix,
    Part,
    Source,
)

GROUP: Final = 32
"""int4: depths that share a scale."""
KINDS: Final = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
"""Of the weights that can be laid out."""
_PRECISIONS: Final = {"int8": INT8, "int4": INT4}
_PANEL_BYTES: Final = {
    FLOAT32: PANEL * 4,
    BFLOAT16: PANEL * 2,
    INT8: PANEL,
    INT4: PANEL // 2 + PANEL * 2 // GROUP,
}
"""Of one depth, by kind."""


class Packed(msgspec.Struct, frozen=True):
    """One matrix as the library reads it."""

    data: torch.Tensor
    kind: int
    columns: int
    depth: int
    scales: torch.Tensor | None
    bias: torch.Tensor | None
    grouped: bool = False

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.bias) if t is not None)

    def struct(self) -> Matrix:
        """Its description; this object must outlive every use."""
        return Matrix(
            self.data.data_ptr(),
            pointer(self.scales),
            pointer(self.bias),
            self.kind,
            self.columns,
            self.depth,
            self.grouped,
        )


class Packer(msgspec.Struct, frozen=True):
    """Lays matrices out, one after another, on so many threads."""

    functions: Functions
    threads: int
    forgets: bool = False
    """Whether what it has read is given back to the system at once, page by page: its sources are
    then read by nobody else."""
    isa: str = ""
    """Name of an instruction set; empty: the best that runs here.  The bytes are the same."""

    def pack(
        self,
        parts: Sequence[torch.Tensor],
        bias_N: torch.Tensor | None,
        precision: str,
        *,
        in_turns: bool = False,
        grouped: bool = False,
    ) -> Packed:
        """A matrix whose columns are the rows of all parts.

        `precision`: `auto` (the weights' own), int8 or int4.  `in_turns`: 16 of the first part,
        16 of the second, so that one panel computes 16 of the MLP's numbers.  `grouped`: as int8,
        its rows get a scale for each 128 numbers.
        """
        dtype, depth = parts[0].dtype, parts[0].shape[1]
        assert all(part.dtype is dtype and part.is_contiguous() for part in parts)
        counts = [len(part) for part in parts]
        assert not in_turns or (len(parts) == 2 and counts[0] == counts[1])
        rows = 2 * _rounded(counts[0]) if in_turns else _rounded(sum(counts))
        kind = _PRECISIONS.get(precision, KINDS[dtype])
        data = torch.empty(rows * _rounded(depth) * _PANEL_BYTES[kind] // PANEL, dtype=torch.uint8)
        self.functions.llm_prefer_large_pages(data.data_ptr(), data.nbytes)
        scales = torch.empty(rows) if kind == INT8 else None
        packed = Packed(
            data,
            kind,
            rows,
            _rounded(depth),
            scales,
            self._bias(bias_N, in_turns),
            grouped=grouped and kind == INT8,
        )
        addresses = (Part * len(parts))(*[Part(part.data_ptr(), len(part)) for part in parts])
        source = Source(addresses, len(parts), KINDS[dtype], depth, in_turns)
        done = self.functions.llm_pack(
            ctypes.pointer(source),
            ctypes.pointer(packed.struct()),
            self.threads,
            self.isa.encode(),
        )
        assert done == 0, f"{self.threads} threads, {self.isa or 'any'}"
        if self.forgets:
            for part in parts:
                self.functions.llm_forget_pages(part.data_ptr(), part.nbytes)
        return packed

    def _bias(self, bias_N: torch.Tensor | None, in_turns: bool) -> torch.Tensor | None:
        if bias_N is None:
            return None
        if not in_turns:
            return own(bias_N)
        turns = [own(part).view(-1, PANEL // 2) for part in bias_N.chunk(2)]
        return torch.stack(turns, 1).flatten()


def _rounded(size: int) -> int:
    return size + -size % PANEL


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where its numbers are."""
    return None if tensor is None else tensor.data_ptr()


def own(values: torch.Tensor) -> torch.Tensor:
    """A copy of a row in float32, with zeros behind to a multiple of 32."""
    return functional.pad(values.to(torch.float32, copy=True), (0, -len(values) % PANEL))


def same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same numbers in memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def array_of(values: list[float]) -> "ctypes.Array[ctypes.c_float]":
    """A C array."""
    return (ctypes.c_float * len(values))(*values)
