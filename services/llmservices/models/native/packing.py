"""Weights in the layouts that the library reads, each laid out once.

Legend: N columns (outputs), K depth (inputs). Both are padded with zeros to multiples of 32. A
panel holds 32 columns; along its depth come steps of so many depths as the processor multiplies at
once (1 float32, 2 bfloat16, 4 int8), 16 columns beside 16.
"""

import ctypes

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
)

GROUP = 32
"""int4: depths that share a scale."""
DIVISORS = (-8.0, -9.0, -8.5, -7.5, 7.5)
"""int4: what the widest number of a group is divided by for the scales that are tried."""
SLAB_NUMBERS = 1 << 17
_STEPS = {torch.float32: 1, torch.bfloat16: 2, torch.uint8: 4}
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.uint8: INT8}


class Packed(msgspec.Struct, frozen=True):
    """One matrix as the library reads it."""

    data: torch.Tensor
    kind: int
    columns: int
    depth: int
    scales: torch.Tensor | None
    bias: torch.Tensor | None

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
            0,
        )


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where its numbers are."""
    return None if tensor is None else tensor.data_ptr()


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """With zeros behind, to a multiple of 32 in each dimension."""
    room: list[int] = []
    for size in reversed(tensor.shape):
        room += [0, -size % PANEL]
    return functional.pad(tensor, room) if any(room) else tensor


def interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up in turns of 16, so that one panel computes 16 of the MLP's numbers."""
    gate, up = (padded(part) for part in gate_up.chunk(2))
    turns = [part.reshape(-1, 16, *part.shape[1:]) for part in (gate, up)]
    both = torch.stack(turns, 1)
    return both.flatten(0, 2)


def pack(
    weight_NK: torch.Tensor, bias_N: torch.Tensor | None, precision: str, functions: Functions
) -> Packed:
    """`precision`: `auto` (the weight's own), int8 or int4."""
    bias = None if bias_N is None else padded(bias_N.float()).contiguous()
    weight = padded(weight_NK)
    columns, depth = weight.shape
    if precision == "int4":
        return Packed(_int4(weight, functions), INT4, columns, depth, None, bias)
    scales = None
    if precision == "int8":
        weight, scales = _int8(weight)
    data = _panels(weight, functions)
    return Packed(data, _KINDS[weight.dtype], columns, depth, scales, bias)


def _panels(weight: torch.Tensor, functions: Functions) -> torch.Tensor:
    columns, depth = weight.shape
    step = _STEPS[weight.dtype]
    parts = weight.view(columns // PANEL, 2, 16, depth // step, step).permute(0, 3, 1, 2, 4)
    return _laid_out(parts, functions)


def _laid_out(parts: torch.Tensor, functions: Functions) -> torch.Tensor:
    """A copy in this order of dimensions, in memory of large pages where the system has them."""
    out = torch.empty(parts.shape, dtype=parts.dtype)
    functions.llm_prefer_large_pages(out.data_ptr(), out.nbytes)
    return out.copy_(parts)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, one scale a column; stored with 128 added, since the processor multiplies
    unsigned by signed."""
    numbers = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(len(weight))
    for rows in _slabs(weight):
        slab = weight[rows].float()
        scales[rows] = slab.abs().amax(1) / 127
        divisors = torch.where(scales[rows] > 0, scales[rows], 1.0)[:, None]
        numbers[rows] = ((slab / divisors).round_() + 128).to(torch.uint8)
    return numbers, scales


def _slabs(weight: torch.Tensor) -> list[slice]:
    """Rows by so many that what is computed of them stays in the core's cache."""
    rows = max(1, SLAB_NUMBERS // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers -8..7 of shape (N, groups, 32), scales) of groups of 32 along the depth; the scales
    have half precision.

    The scale that puts the number of greatest magnitude at -8, as q4_0 of llama.cpp has it, is one
    of the candidates: the squared error is never above q4_0's.
    """
    numbers = torch.empty(len(weight), weight.shape[1] // GROUP, GROUP, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // GROUP, 1)
    for rows in _slabs(weight):
        groups = weight[rows].float().view(-1, numbers.shape[1], GROUP)
        scales[rows] = _best_scale(groups)
        numbers[rows] = _numbers(groups, scales[rows]).to(torch.int8)
    return numbers, scales


def _best_scale(groups: torch.Tensor) -> torch.Tensor:
    at = groups.abs().argmax(-1, keepdim=True)
    widest = groups.gather(-1, at)
    best_scale = torch.zeros_like(widest)
    best_error = torch.full_like(widest, float("inf"))
    for divisor in DIVISORS:
        scale = (widest / divisor).half().float()
        scale = _refined(groups, scale) if divisor != -8.0 else scale
        error = (groups - _numbers(groups, scale) * scale).square().sum(-1, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


def _numbers(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    return (groups * inverse).round_().clamp_(-8, 7)


def _refined(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The least-squares scale of the numbers that this scale gives."""
    numbers = _numbers(groups, scale)
    power = numbers.square().sum(-1, keepdim=True)
    fitted = (groups * numbers).sum(-1, keepdim=True) / torch.where(power > 0, power, 1.0)
    return fitted.half().float()


def _int4(weight: torch.Tensor, functions: Functions) -> torch.Tensor:
    """For each panel and group: 32 scales, then four times 32 columns of eight depths."""
    columns, depth = weight.shape
    panels, groups = columns // PANEL, depth // GROUP
    numbers, scales = quantise_int4(weight)
    # (panel, half, lane, group, pair of quads, low or high, depth in the quad)
    quads = (numbers + 8).to(torch.uint8).view(panels, 2, 16, groups, 4, 2, 4)
    nibbles = quads[..., 0, :] | (quads[..., 1, :] << 4)
    nibbles = nibbles.permute(0, 3, 4, 1, 2, 5).reshape(panels, groups, -1)
    halves = scales.half().view(panels, PANEL, groups).transpose(1, 2).contiguous()
    return _laid_out(torch.cat([halves.view(torch.uint8), nibbles], -1), functions)


def same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same numbers in memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def array_of(values: list[float]) -> "ctypes.Array[ctypes.c_float]":
    """A C array."""
    return (ctypes.c_float * len(values))(*values)
