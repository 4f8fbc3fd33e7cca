"""Low-rank adapters of any learner, by peft.

Source: Hu et al. 2021 (arXiv 2106.09685).  Trained are the adapters and a classifier's head; the
rest is frozen, and saved nowhere again.
"""

from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
import torch
from llmproto.errors import invalid
from llmproto.recipes import LoraRecipe
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from llmservices.trainer.documents import Documents
from llmservices.trainer.learner import Learner, MicroBatch

PREFIX: Final = "base_model.model."
"""What peft's files put before the names of the model."""
HEADS: Final = ("classifier", "score")
NAME: Final = "default"
EXCLUDED: Final = ".*pooler.*"
"""Linear, but of no block."""
TASKS: Final = {"generate": "CAUSAL_LM", "classify": "SEQ_CLS", "regress": "SEQ_CLS"}


def linears(learner: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers of the model's blocks."""
    found = {
        name.rpartition(".")[2]
        for name, module in learner.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and name.partition(".")[0] not in (*HEADS, "lm_head")
        and "pooler" not in name
    }
    return sorted(found)


class Adapted(Learner):
    """A learner with adapters in its linear layers."""

    file = "adapter_model.safetensors"

    def __init__(self, inner: Learner, recipe: LoraRecipe) -> None:
        super().__init__()
        self.context_tokens, self.vocabulary = inner.context_tokens, inner.vocabulary
        self.task = inner.task
        there = linears(inner)
        self.targets = recipe.targets or there
        unknown = sorted(set(self.targets) - set(there))
        if unknown:
            raise invalid(
                f"lora.targets names {', '.join(unknown)}; the linear layers of this model are "
                f"{', '.join(there)}"
            )
        modules = inner.modules()
        self._is_input_first = any(type(each).__name__ == "Conv1D" for each in modules)
        self.config = LoraConfig(
            r=recipe.rank,
            lora_alpha=cast(int, recipe.alpha),  # peft says int, and divides
            lora_dropout=recipe.dropout,
            target_modules=list(self.targets),
            exclude_modules=EXCLUDED,
            fan_in_fan_out=self._is_input_first,
        )
        # Any: peft has no types
        inject: Any = inject_adapter_in_model
        self._inner: Learner = inject(self.config, inner)
        for name, parameter in self._inner.named_parameters():
            parameter.requires_grad_(".lora_" in name or name.partition(".")[0] in HEADS)

    @property
    def inner(self) -> Learner:
        """The model itself."""
        return self._inner

    def loss(self, batch: MicroBatch, *, smoothing: float = 0.0) -> torch.Tensor:
        self._inner.is_checkpointed = self.is_checkpointed
        return self._inner.loss(batch, smoothing=smoothing)

    def hidden(self, documents: Documents) -> torch.Tensor:
        return self._inner.hidden(documents)

    def head_weight(self) -> torch.Tensor:
        return self._inner.head_weight()

    def judge(self, documents: Documents) -> torch.Tensor:
        return self._inner.judge(documents)

    def _named(self) -> dict[str, nn.Parameter]:
        return {
            PREFIX + name.replace(f".{NAME}.", "."): parameter
            for name, parameter in self._inner.named_parameters()
            if parameter.requires_grad
        }

    def exported(self) -> dict[str, torch.Tensor]:
        return {name: each.detach() for name, each in self._named().items()}

    def load_exported(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._named().items():
                parameter.copy_(weights[name])

    def description(self, base: str) -> dict[str, bytes]:
        heads = [head for head in HEADS if any(f".{head}." in name for name in self._named())]
        described = {
            "peft_type": "LORA",
            "task_type": TASKS[self.task],
            "base_model_name_or_path": base,
            "r": self.config.r,
            "lora_alpha": self.config.lora_alpha,
            "lora_dropout": self.config.lora_dropout,
            "target_modules": sorted(self.targets),
            "exclude_modules": EXCLUDED,
            "modules_to_save": heads or None,
            "bias": "none",
            "fan_in_fan_out": self._is_input_first,
            "inference_mode": True,
        }
        return {"adapter_config.json": msgspec.json.format(msgspec.json.encode(described))}
