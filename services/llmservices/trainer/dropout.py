"""Dropout whose random bits are cheap.

torch draws a double of its Mersenne Twister for each element, which on a CPU costs more than the
layer around it; here 16 bits decide, so a probability is rounded to 1/65536.
"""

from typing import Any, Final, cast

import torch
from torch.nn import functional

LEVELS: Final = 1 << 16


def kept_mask(like: torch.Tensor, probability: float) -> torch.Tensor:
    """float32 of `like`'s shape on the CPU: 0 with `probability`, else what keeps the mean."""
    count = like.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    dropped = round(probability * LEVELS)
    bits = words.view(torch.int16)[:count].view(like.shape)
    return (bits >= dropped - LEVELS // 2).to(like.dtype).mul_(LEVELS / (LEVELS - dropped))


class _Masked(torch.autograd.Function):
    """x times a mask that needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context has no type
        x: torch.Tensor,
        probability: float,
    ) -> torch.Tensor:
        mask = kept_mask(x, probability)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(
        ctx: Any,  # Any: torch's context has no type
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


def dropout(x: torch.Tensor, probability: float, *, training: bool) -> torch.Tensor:
    """Zero each element with a probability, and scale the others so that the mean stays."""
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu" or probability >= 1.0:
        return functional.dropout(x, probability)
    # Any: Function.apply has no types
    return cast(torch.Tensor, cast(Any, _Masked).apply(x, probability))
