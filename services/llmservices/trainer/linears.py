"""Linear layers in float32 by the fastest library at hand.

torch gives float32 matrix products on x86 to MKL, which on AMD processors reaches half of what
oneDNN does.  `OneDnnLinear` computes the same function, and both its gradients, by oneDNN's inner
product.  Which call is taken is a function of the shapes alone: equal steps stay equal bit for bit.
"""

from typing import Any, Final, cast

import torch
from torch import nn
from torch.nn import functional

OUTPUTS_MIN: Final = 8
"""A weight's gradient with fewer rows than this is too thin for oneDNN's blocks: MKL is faster."""


def product(x_NK: torch.Tensor, w_MK: torch.Tensor, bias_M: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b by oneDNN; strided operands are read as they lie."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, w_MK, bias_M, "none", [], "")
    return y


def weight_gradient(gradient_NM: torch.Tensor, x_NK: torch.Tensor) -> torch.Tensor:
    """gradient^T x, [M, K].  oneDNN likes the longer side as its columns."""
    outputs, inputs = gradient_NM.shape[1], x_NK.shape[1]
    if outputs < OUTPUTS_MIN:
        return gradient_NM.t() @ x_NK
    if outputs >= inputs:
        return product(x_NK.t(), gradient_NM.t(), None).t().contiguous()
    return product(gradient_NM.t(), x_NK.t(), None)


class _Linear(torch.autograd.Function):
    """y = x W^T + b, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context has no type
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any,  # Any: torch's context has no type
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            product(gradient, weight.t(), None) if wants_x else None,
            weight_gradient(flat, x.reshape(-1, x.shape[-1])) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b: by oneDNN for float32 on a CPU, else as torch does it."""
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
    ):
        return functional.linear(x, weight, bias)
    # Any: Function.apply has no types
    return cast(torch.Tensor, cast(Any, _Linear).apply(x, weight, bias))


class OneDnnLinear(nn.Linear):
    """An nn.Linear that computes as `linear` does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def accelerate(module: nn.Module) -> int:
    """Make every plain nn.Linear below compute as `linear` does; gives how many there were.

    Parameters, names and hooks stay what they are: only the class changes.
    """
    found = [each for each in module.modules() if type(each) is nn.Linear]
    for each in found:
        each.__class__ = OneDnnLinear
    return len(found)
