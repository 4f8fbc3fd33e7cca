"""Attention over documents that lie side by side in one flat row; none sees another.

Legend: N tokens, H heads, G key/value heads, D width of a head, B sequences of a group, T longest.

Short sequences: explicit products with a hand-written gradient, one autograd node for all groups.
Long ones: torch's fused kernel, whose work grows less with the square of the length.
Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; gradient by the chain rule.
"""

from typing import Any, Final, cast

import torch
from torch.nn import functional

from llmservices.trainer.documents import Documents, Group
from llmservices.trainer.dropout import kept_mask

EXPLICIT_TOKENS_MAX: Final = 128
"""Up to this length the explicit products are faster than the fused kernel on a CPU."""


def _padded(x_NHD: torch.Tensor, group: Group) -> torch.Tensor:
    """The group's tokens as [B, H, T, D]."""
    heads, width = x_NHD.shape[1:]
    part = x_NHD[group.start : group.start + group.tokens]
    if group.places is not None:
        whole = part.new_zeros(group.sequences * group.longest, heads, width)
        part = whole.index_copy_(0, group.places, part)
    return part.view(group.sequences, group.longest, heads, width).transpose(1, 2)


def _flat(x_BHTD: torch.Tensor, group: Group) -> torch.Tensor:
    """The inverse: [tokens of the group, H, D]."""
    heads, width = x_BHTD.shape[1], x_BHTD.shape[3]
    rows = x_BHTD.transpose(1, 2).reshape(-1, heads, width)
    return rows if group.places is None else rows.index_select(0, group.places)


def _causal_bias(longest: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((longest, longest), float("-inf"), device=like.device).triu_(1)


def _probabilities(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, group: Group, scale: float, *, causal: bool
) -> torch.Tensor:
    scores = torch.matmul(q_BHTD, k_BHTD.transpose(-1, -2)).float().mul_(scale)
    if group.bias_B11T is not None:
        scores += group.bias_B11T
    if causal:
        scores += _causal_bias(group.longest, scores)
    return torch.softmax(scores, -1)


class _Explicit(torch.autograd.Function):
    """All groups of one layer at once."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context has no type
        q_NHD: torch.Tensor,
        k_NHD: torch.Tensor,
        v_NHD: torch.Tensor,
        documents: Documents,
        scale: float,
        causal: bool,
        probability: float,
    ) -> torch.Tensor:
        saved: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        for group in documents.groups:
            q, k, v = (_padded(each, group).contiguous() for each in (q_NHD, k_NHD, v_NHD))
            chances = _probabilities(q, k, group, scale, causal=causal)
            mask = kept_mask(chances, probability) if probability else chances.new_empty(0)
            used = chances * mask if probability else chances
            outputs.append(_flat(torch.matmul(used.to(v.dtype), v), group))
            saved += [q, k, v, chances, mask]
        ctx.documents, ctx.scale = documents, scale
        ctx.save_for_backward(*saved)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(
        ctx: Any,  # Any: torch's context has no type
        gradient_NHD: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        parts: list[tuple[torch.Tensor, ...]] = []
        saved = ctx.saved_tensors
        for index, group in enumerate(ctx.documents.groups):
            q, k, v, chances, mask = saved[5 * index : 5 * index + 5]
            out = _padded(gradient_NHD, group).contiguous()
            used = chances * mask if mask.numel() else chances
            chances_gradient = torch.matmul(out, v.transpose(-1, -2)).float()
            if mask.numel():
                chances_gradient *= mask
            scores = torch.ops.aten._softmax_backward_data(
                chances_gradient, chances, -1, torch.float32
            )
            scores = scores.mul_(ctx.scale).to(q.dtype)
            parts.append(
                (
                    _flat(torch.matmul(scores, k), group),
                    _flat(torch.matmul(scores.transpose(-1, -2), q), group),
                    _flat(torch.matmul(used.to(q.dtype).transpose(-1, -2), out), group),
                )
            )
        whole = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts)]
        return (*whole, None, None, None, None)


def _fused(
    q_NHD: torch.Tensor,
    k_NHD: torch.Tensor,
    v_NHD: torch.Tensor,
    documents: Documents,
    scale: float,
    causal: bool,
    probability: float,
) -> torch.Tensor:
    outputs = []
    for group in documents.groups:
        q, k, v = (_padded(each, group) for each in (q_NHD, k_NHD, v_NHD))
        # Padding stands behind the real tokens, so causality alone keeps it out of what is used.
        bias = None if causal else group.bias_B11T
        mixed = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if bias is None else bias.to(q.dtype),
            dropout_p=probability,
            is_causal=causal,
            scale=scale,
        )
        outputs.append(_flat(mixed, group))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend(
    q_NHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    documents: Documents,
    *,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v within each document, [N, H, D]; key/value heads are shared by
    H / G query heads each."""
    repeats = q_NHD.shape[1] // k_NGD.shape[1]
    if repeats > 1:
        k_NGD, v_NGD = (each.repeat_interleave(repeats, dim=1) for each in (k_NGD, v_NGD))
    scale = q_NHD.shape[2] ** -0.5
    longest = max(group.longest for group in documents.groups)
    if q_NHD.device.type != "cpu" or longest > EXPLICIT_TOKENS_MAX:
        return _fused(q_NHD, k_NGD, v_NGD, documents, scale, causal, dropout)
    # Any: Function.apply has no types
    explicit: Any = _Explicit
    return cast(
        torch.Tensor, explicit.apply(q_NHD, k_NGD, v_NGD, documents, scale, causal, dropout)
    )
