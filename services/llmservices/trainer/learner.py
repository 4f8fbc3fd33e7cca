"""What every model is to the step: documents and targets in, a summed loss out.

Legend: N tokens, S sequences, P predictions, C width.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmservices.trainer.documents import Documents
from llmservices.trainer.losses import class_loss, head_loss, value_loss


class MicroBatch(msgspec.Struct, frozen=True):
    """What is computed at once."""

    documents: Documents
    places_P: torch.Tensor | None
    """Of a generator: the tokens after which something is predicted; else absent."""
    targets: torch.Tensor
    """int64 ids [P], int64 classes [S], or float32 values [S]."""
    tokens: int
    """Of the documents, as the data has them."""

    @property
    def count(self) -> int:
        """Targets."""
        return int(self.targets.shape[0])


class Learner(nn.Module):
    """A model whose body turns documents into hidden rows, and whose head judges them.

    Names of parameters are those of the Hugging Face architecture, unless `exported` says how they
    become so.
    """

    context_tokens: int
    vocabulary: int
    task: str
    """`generate`, `classify`, `regress`."""
    file: str = "model.safetensors"
    """Where what it exports belongs."""
    is_checkpointed: bool = False
    """Recompute each layer's activations in the backward pass (Chen et al. 2016, arXiv
    1604.06174)."""

    def initialise(self) -> None:
        """New weights; the library's models have made theirs."""

    def hidden(self, documents: Documents) -> torch.Tensor:
        """[N, C], after the last norm."""
        raise NotImplementedError

    def head_weight(self) -> torch.Tensor:
        """[V, C] of a generator."""
        raise NotImplementedError

    def judge(self, documents: Documents) -> torch.Tensor:
        """Logits [S, labels] of a classifier, scores [S, 1] of a regression."""
        raise NotImplementedError

    def loss(self, batch: MicroBatch, *, smoothing: float = 0.0) -> torch.Tensor:
        """Summed over the targets, float64."""
        if self.task == "generate":
            assert batch.places_P is not None
            hidden_PC = self.hidden(batch.documents).index_select(0, batch.places_P)
            return head_loss(hidden_PC, self.head_weight(), batch.targets, smoothing=smoothing)
        judged = self.judge(batch.documents)
        return self.judged_loss(judged, batch.targets, smoothing=smoothing)

    def judged_loss(
        self, judged: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Of a classifier's logits or a regression's scores, summed, float64."""
        if self.task == "regress":
            return value_loss(judged.squeeze(-1), targets)
        return class_loss(judged, targets, smoothing=smoothing)

    def forward(self, batch: MicroBatch, smoothing: float) -> torch.Tensor:
        """As `loss`: what wrappers of torch.distributed call."""
        return self.loss(batch, smoothing=smoothing)

    def layer(
        self, call: Callable[..., torch.Tensor], x: torch.Tensor, *rest: object
    ) -> torch.Tensor:
        """One layer, its activations kept or recomputed."""
        if not (self.is_checkpointed and torch.is_grad_enabled()):
            return call(x, *rest)
        # Any: torch leaves checkpoint's result open
        again: Any = checkpoint(call, x, *rest, use_reentrant=False)
        return cast(torch.Tensor, again)

    def description(self, base: str) -> dict[str, bytes]:
        """Small files that what it exports cannot be read without."""
        return {}

    def exported(self) -> dict[str, torch.Tensor]:
        """The weights under the architecture's public names, tied ones once."""
        return {name: each.detach() for name, each in self.named_parameters()}

    def load_exported(self, weights: Mapping[str, torch.Tensor]) -> None:
        """The inverse; KeyError where one is missing."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])
