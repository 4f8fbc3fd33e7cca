"""The layouts of packed weights, and the search for int4 scales, spelled out in torch."""

import torch
from torch.nn import functional

GROUP = 32
DIVISORS = (-8.0, -9.0, -8.5, -7.5, 7.5)
"""What the widest number of a group is divided by for the scales that are tried; the first gives
the scale of q4_0 of llama.cpp, the others are refined."""


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """With zeros behind, to a multiple of 32 in each dimension."""
    room: list[int] = []
    for size in reversed(tensor.shape):
        room += [0, -size % 32]
    return functional.pad(tensor, room)


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up in turns of 16."""
    turns = [padded(part).reshape(-1, 16, *padded(part).shape[1:]) for part in (gate, up)]
    return torch.stack(turns, 1).flatten(0, 2)


def packed(weight_NK: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(bytes, scales of int8) of a padded matrix."""
    if precision == "int4":
        return _int4(weight_NK), None
    if precision == "int8":
        numbers, scales = quantise_int8(weight_NK)
        return _panels(numbers), scales
    return _panels(weight_NK), None


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """(panel, step, half, column, depth within the step)"""
    columns, depth = weight.shape
    step = 4 // weight.itemsize
    parts = weight.view(columns // 32, 2, 16, depth // step, step).permute(0, 3, 1, 2, 4)
    return parts.contiguous().view(torch.uint8).flatten()


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers with 128 added, one scale a row)"""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    divisors = torch.where(scales > 0, scales, 1.0)[:, None]
    return ((wide / divisors).round() + 128).to(torch.uint8), scales


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers -8..7 of shape (N, groups, 32), scales (N, groups, 1) of half precision)"""
    groups = weight.float().view(len(weight), -1, GROUP)
    widest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_scale = torch.zeros_like(widest)
    best_error = torch.full_like(widest, float("inf"))
    for divisor in DIVISORS:
        scale = (widest / divisor).half().float()
        if divisor != DIVISORS[0]:
            numbers = _numbers(groups, scale)
            power = _total(numbers.square())
            fitted = _total(groups * numbers) / torch.where(power > 0, power, 1.0)
            scale = fitted.half().float()
        error = _total((groups - _numbers(groups, scale) * scale).square())
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.where(error < best_error, error, best_error)
    return _numbers(groups, best_scale).to(torch.int8), best_scale


def _total(values: torch.Tensor) -> torch.Tensor:
    """Added one after another, as the library does it."""
    total = torch.zeros_like(values[..., :1])
    for index in range(values.shape[-1]):
        total = total + values[..., index : index + 1]
    return total


def _numbers(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    return (groups * inverse).round().clamp(-8, 7)


def _int4(weight: torch.Tensor) -> torch.Tensor:
    """For each panel and group: 32 scales, then four times 32 columns of eight depths."""
    columns, depth = weight.shape
    panels, groups = columns // 32, depth // GROUP
    numbers, scales = quantise_int4(weight)
    # (panel, half, column, group, pair of quads, low or high, depth in the quad)
    quads = (numbers + 8).to(torch.uint8).view(panels, 2, 16, groups, 4, 2, 4)
    nibbles = quads[..., 0, :] | (quads[..., 1, :] << 4)
    nibbles = nibbles.permute(0, 3, 4, 1, 2, 5).reshape(panels, groups, -1)
    halves = scales.half().view(panels, 32, groups).transpose(1, 2).contiguous()
    return torch.cat([halves.view(torch.uint8), nibbles], -1).flatten()
