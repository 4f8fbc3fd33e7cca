"""Sampling where the logits are: for all rows at once, and without waiting for the device.

The same rule as `sampler.Sampler`, whose numbers (`key`, `noise`) and order of filters it takes;
what needs a thread's ids or gives log-probabilities stays there.  Legend: W rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling
from torch.nn import functional

from llmservices.executor.gpu.rows import put
from llmservices.executor.sampler import Ask, Choice, adjusts, key, mixed_ids, noise


def samples(sampling: Sampling) -> bool:
    """Whether rows of this kind can be sampled here."""
    return sampling.logprobs is None and not adjusts(sampling)


class Drawn:
    """Tokens that are on their way from the device."""

    def __init__(self, tokens_W: torch.Tensor, top_W: torch.Tensor, asks: Sequence[Ask]) -> None:
        self.tokens_W = tokens_W
        self._positions = [ask.position for ask in asks]
        # Doubles hold every token exactly, so that both travel together.
        both = torch.stack([tokens_W.double(), top_W.double()])
        self._arrived: torch.cuda.Event | None = None
        if both.is_cuda:
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            self._arrived.record()
        else:
            self._host = both

    def take(self) -> list[Choice | RemoteError]:
        """Waits for them; INTERNAL for a row whose logits are not numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, tops = self._host.tolist()
        return [
            Choice(int(token), None)
            if math.isfinite(top)
            else RemoteError(
                ErrorKind.INTERNAL, f"the model's greatest logit at position {position} is {top}"
            )
            for token, top, position in zip(tokens, tops, self._positions, strict=True)
        ]


class DeviceSampler:
    """Chooses tokens on the device."""

    def __init__(self, vocab_tokens: int, device: torch.device) -> None:
        self._device = device
        self._mixed_V = mixed_ids(vocab_tokens, device)

    def draw(self, logits_WV: torch.Tensor, asks: Sequence[Ask]) -> Drawn:
        """One token a row; all asks are of a kind that `samples`."""
        found = logits_WV.max(-1)
        tokens_W = found.indices
        rows = [row for row, ask in enumerate(asks) if ask.sampling.temperature]
        plain = [row for row in rows if not _filtered(asks[row].sampling)]
        filtered = [row for row in rows if _filtered(asks[row].sampling)]
        for some in (plain, filtered):
            if some:
                at = put(np.asarray(some, dtype=np.int64), self._device)
                drawn = self._drawn(
                    logits_WV.index_select(0, at), [asks[row] for row in some], some is filtered
                )
                tokens_W = tokens_W.index_copy(0, at, drawn)
        return Drawn(tokens_W, found.values, asks)

    def _drawn(self, logits_WV: torch.Tensor, asks: Sequence[Ask], filtered: bool) -> torch.Tensor:
        samplings = [ask.sampling for ask in asks]
        temperatures = np.asarray([s.temperature for s in samplings], dtype=np.float32)
        keys = np.asarray([key(a.sampling.seed, a.position) for a in asks], dtype=np.int64)
        scaled_WV = logits_WV.float() / put(temperatures, self._device)[:, None]
        if filtered:
            scaled_WV = scaled_WV.masked_fill(~self._kept(scaled_WV, samplings), float("-inf"))
        scaled_WV += noise(self._mixed_V, put(keys, self._device))
        return scaled_WV.max(-1).indices

    def _kept(self, scaled_WV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
        """(W, V): what top-k, then top-p, then min-p leave, as `sampler.keep`."""
        vocab = scaled_WV.shape[1]
        limits = np.asarray(
            [
                [s.top_k or vocab, s.top_p, math.log(s.min_p) if s.min_p else -math.inf]
                for s in samplings
            ]
        )
        top_k, top_p, min_p = put(limits.T.copy(), self._device)[..., None]
        ranked_WV, order_WV = scaled_WV.sort(dim=-1, descending=True, stable=True)
        kept_WV = torch.arange(vocab, device=self._device) < top_k
        chances_WV = functional.softmax(ranked_WV.double().masked_fill(~kept_WV, float("-inf")), -1)
        before_WV = chances_WV.cumsum(-1) - chances_WV
        kept_WV &= (before_WV < top_p) | (top_p >= 1.0)
        kept_WV[:, 0] = True
        # In float32, as the values are: that is where the other sampler compares them.
        kept_WV &= ranked_WV >= ranked_WV[:, :1] + min_p.float()
        return torch.zeros_like(kept_WV).scatter_(1, order_WV, kept_WV)


def _filtered(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
