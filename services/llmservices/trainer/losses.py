"""What a model is judged by: sums over targets, so that parts of a batch add up exactly.

Legend: N tokens, C width, V vocabulary.
Label smoothing: Szegedy et al. 2016 (arXiv 1512.00567), section 7.
"""

from typing import Any, Final, cast

import torch
from torch.nn import functional

from llmservices.trainer.linears import linear, product, weight_gradient

CHUNK_LOGITS: Final = 1 << 22
"""Logits computed at once: 16 MiB of float32 stay in the cache's neighbourhood, and a large
vocabulary needs no memory of the size of rows x vocabulary."""


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of the rows of h W^T, with both gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context has no type
        hidden_NC: torch.Tensor,
        weight_VC: torch.Tensor,
        targets_N: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        rows = max(1, CHUNK_LOGITS // weight_VC.shape[0])
        total = torch.zeros((), dtype=torch.float64)
        hidden_gradients: list[torch.Tensor] = []
        weight_total: torch.Tensor | None = None
        for first in range(0, hidden_NC.shape[0], rows):
            hidden, targets = hidden_NC[first : first + rows], targets_N[first : first + rows]
            logits = product(hidden, weight_VC, None)
            loss, gradient = _cross_entropy(logits, targets, smoothing)
            total += loss
            if wants_hidden:
                hidden_gradients.append(product(gradient, weight_VC.t(), None))
            if wants_weight:
                part = weight_gradient(gradient, hidden)
                weight_total = part if weight_total is None else weight_total.add_(part)
        ctx.gradients = (
            torch.cat(hidden_gradients) if wants_hidden else None,
            weight_total if wants_weight else None,
        )
        return total

    @staticmethod
    def backward(
        ctx: Any,  # Any: torch's context has no type
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight = ctx.gradients
        factor = float(gradient)
        return (
            None if hidden is None else hidden.mul_(factor),
            None if weight is None else weight.mul_(factor),
            None,
            None,
        )


def _cross_entropy(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over the rows, float64, and its gradient (in the logits' memory)."""
    logs = torch.log_softmax(logits_NV, -1)
    picked = logs.gather(1, targets_N[:, None])
    loss = -(1.0 - smoothing) * picked.sum(dtype=torch.float64)
    if smoothing:
        loss -= smoothing * logs.mean(-1).sum(dtype=torch.float64)
    gradient = torch.exp(logs, out=logits_NV)
    if smoothing:
        gradient -= smoothing / logits_NV.shape[1]
    ones = torch.full_like(picked, smoothing - 1.0)
    return loss, gradient.scatter_add_(1, targets_N[:, None], ones)


def head_loss(
    hidden_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum over the rows of the cross entropy of h W^T against the targets, as float64.

    All rows have targets: the caller picks those that have.
    """
    plain = (
        hidden_NC.device.type == "cpu"
        and hidden_NC.dtype == weight_VC.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
    if plain and torch.is_grad_enabled() and hidden_NC.requires_grad:
        # Any: Function.apply has no types
        head: Any = _HeadLoss
        return cast(torch.Tensor, head.apply(hidden_NC, weight_VC, targets_N, smoothing))
    return class_loss(linear(hidden_NC, weight_VC, None), targets_N, smoothing=smoothing)


def class_loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, smoothing: float = 0.0
) -> torch.Tensor:
    """Sum over the rows of the cross entropy, as float64."""
    rows = functional.cross_entropy(
        logits_NV.float(), targets_N, reduction="none", label_smoothing=smoothing
    )
    return rows.double().sum()


def value_loss(scores_N: torch.Tensor, values_N: torch.Tensor) -> torch.Tensor:
    """Sum over the rows of the squared error, as float64."""
    return (scores_N.float() - values_N).square().double().sum()
