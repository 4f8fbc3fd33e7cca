"""A causal language model of the transformers library, for architectures that are not our own.

Correct, and slower: one thread at a time, with the library's own cache.  Nothing is imported
from the library here; `foreign_load.py` does that, only when such a model is loaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmservices.models.encoder import pooled
from llmservices.models.tasks import Task


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


class ForeignEncoder:
    """One loaded encoder of the library; one input at a time.  `module` is untyped (Any), as
    above."""

    kv_token_bytes = 0

    def __init__(
        self, module: Any, task: Task, *, family: str, context_tokens: int, takes_types: bool
    ) -> None:
        self._module = module
        self._takes_types = takes_types
        self.task = task
        self.family = family
        self.context_tokens = min(context_tokens, task.input_tokens_max or context_tokens)
        parameter: torch.Tensor = next(module.parameters())
        self.dtype = parameter.dtype
        self.device = parameter.device
        self.weight_bytes = sum(parameter.nbytes for parameter in module.parameters())
        self.vocab_tokens: int = module.get_input_embeddings().weight.shape[0]
        hidden: int = module.config.hidden_size
        self.width = len(task.labels) or hidden * len(task.pools)

    @torch.inference_mode()
    def encode(self, tokens: np.ndarray, types: np.ndarray, lengths: Sequence[int]) -> torch.Tensor:
        """(P, W) float32 on the CPU."""
        results: list[torch.Tensor] = []
        at = 0
        for length in lengths:
            rows = slice(at, at + length)
            at += length
            inputs = {"input_ids": torch.from_numpy(tokens[rows])[None].to(self.device)}
            if self._takes_types:
                inputs["token_type_ids"] = torch.from_numpy(types[rows])[None].to(self.device)
            out = self._module(**inputs)
            if self.task.kind == "embed":
                results.append(pooled(out.last_hidden_state[0], [(length, 1)], self.task))
            else:
                results.append(out.logits.float())
        return torch.cat(results).cpu()
