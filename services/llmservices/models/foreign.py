"""A causal language model of the transformers library, for architectures that are not our own.

Correct, and slower: one thread at a time, with the library's own cache.  Nothing is imported
from the library here; `foreign_load.py` does that, only when such a model is loaded.
"""

from typing import Any

import torch


class ForeignModel:
    """One loaded model.  `module` is untyped (Any): its classes are as many as the
    architectures."""

    def __init__(
        self,
        module: Any,
        *,
        family: str,
        context_tokens: int,
        vocab_tokens: int,
        kv_token_bytes: int,
    ) -> None:
        self._module = module
        self.family = family
        self.context_tokens = context_tokens
        self.vocab_tokens = vocab_tokens
        self.kv_token_bytes = kv_token_bytes
        """An estimate: attention over all heads."""
        parameter: torch.Tensor = next(module.parameters())
        self.dtype = parameter.dtype
        self.device = parameter.device
        self.weight_bytes = sum(parameter.nbytes for parameter in module.parameters())

    def forward(
        self, tokens_N: torch.Tensor, past: object | None, *, keep: bool
    ) -> tuple[torch.Tensor, object | None]:
        """(logits (N, V), what to give as `past` for the tokens that follow).

        The latter is None where nothing was to be kept, or where the architecture keeps no such
        state.
        """
        inputs = {} if past is None else {"past_key_values": past}
        out = self._module(tokens_N[None], use_cache=keep, **inputs)
        logits: torch.Tensor = out.logits[0]
        return logits, out.get("past_key_values") if keep else None
