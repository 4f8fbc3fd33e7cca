"""Computes the rows of a step with a model of the transformers library, thread after thread.

Blocks are only counted: what is remembered of a thread is the library's own state, kept by
residency.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from llmservices.executor.runner import Work
from llmservices.models.foreign import ForeignModel


class _Past:
    """What is known of one residency: its ids, and how many of them `state` covers."""

    __slots__ = ("covered", "ids", "state")

    def __init__(self) -> None:
        self.ids = np.zeros(0, dtype=np.int64)
        self.state: object | None = None
        self.covered = 0


class ForeignRunner:
    """Exact mode keeps no state: a token's logits then come from one pass over the ids before
    it, whatever was computed when.  The same is done for architectures that offer no state."""

    shares_prefixes = False
    greatest: tuple[list[float], list[int]] | None = None

    def __init__(self, model: ForeignModel, *, blocks: int, block_tokens: int, exact: bool) -> None:
        self._model = model
        self._keep = not exact
        self._pasts: dict[int, _Past] = {}
        self.cache_bytes = blocks * block_tokens * model.kv_token_bytes

    def clear(self, blocks: Iterable[int]) -> None:
        """Blocks hold nothing."""

    def forget(self, residency: int) -> None:
        self._pasts.pop(residency, None)

    def compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        logits = [part for work in works if (part := self._compute(work)) is not None]
        return torch.cat(logits) if logits else None

    def _compute(self, work: Work) -> torch.Tensor | None:
        past = self._pasts.setdefault(work.residency, _Past())
        assert work.start == len(past.ids)
        past.ids = np.concatenate([past.ids, work.tokens.astype(np.int64)])
        if work.wanted == "none":
            return None
        tokens = torch.from_numpy(past.ids[past.covered :]).to(self._model.device)
        logits, past.state = self._model.forward(tokens, past.state, keep=self._keep)
        past.covered = len(past.ids) if past.state is not None else 0
        return logits[-1:] if work.wanted == "last" else logits[-len(work.tokens) :]
