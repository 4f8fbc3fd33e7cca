"""Any other architecture, through the transformers library: padded, one document a row.

Imported only when such a model is to be trained.
Legend: S sequences, T the longest, N tokens, C width.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from llmproto.errors import invalid
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmservices.trainer.architectures import Config, context_tokens
from llmservices.trainer.documents import Documents
from llmservices.trainer.learner import Learner


class Foreign(Learner):
    """A module of the library."""

    def __init__(self, config: Config, *, task: str, labels: int) -> None:
        super().__init__()
        self.task = task
        # Any: the library's loaders have no types
        library: Any = (
            AutoModelForCausalLM if task == "generate" else (AutoModelForSequenceClassification)
        )
        settings: Any = AutoConfig
        family = str(config.get("model_type"))
        try:
            rest = {key: value for key, value in config.items() if key != "model_type"}
            made = settings.for_model(family, **rest)
            made.use_cache = False
            if labels:
                made.num_labels = labels
                made.problem_type = (
                    "regression" if task == "regress" else "single_label_classification"
                )
                if made.pad_token_id is None:
                    made.pad_token_id = 0
            self._module: Any = library.from_config(made, trust_remote_code=False)
        except (ValueError, KeyError, AttributeError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise invalid(f"model_type {family!r} cannot be trained to {task}: {first}") from error
        self._pad = made.pad_token_id or 0
        self.vocabulary = made.vocab_size
        self.context_tokens = context_tokens(config) or 4096

    def _padded(self, documents: Documents) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs [S, T], and where each of the N tokens stands among the S x T."""
        lengths_S = documents.lasts_S - documents.firsts_S + 1
        longest = max(documents.lengths)
        rows_N = torch.arange(len(documents.lengths), device=lengths_S.device)
        rows_N = rows_N.repeat_interleave(lengths_S)
        places_N = rows_N * longest + documents.positions_N
        shape = (len(documents.lengths), longest)
        ids = torch.full((shape[0] * longest,), self._pad, device=places_N.device)
        mask = torch.zeros_like(ids)
        inputs = {
            "input_ids": ids.index_copy_(0, places_N, documents.ids_N).view(shape),
            "attention_mask": mask.index_fill_(0, places_N, 1).view(shape),
        }
        if documents.types_N is not None:
            types = torch.zeros_like(ids).index_copy_(0, places_N, documents.types_N)
            inputs["token_type_ids"] = types.view(shape)
        return inputs, places_N

    def hidden(self, documents: Documents) -> torch.Tensor:
        inputs, places_N = self._padded(documents)
        found = self._module.base_model(**inputs).last_hidden_state
        flat = found.reshape(-1, found.shape[-1])
        return cast(torch.Tensor, flat.index_select(0, places_N))

    def head_weight(self) -> torch.Tensor:
        head = self._module.get_output_embeddings()
        if head.bias is not None:
            raise invalid("a head with biases cannot be trained to generate")
        return cast(torch.Tensor, head.weight)

    def judge(self, documents: Documents) -> torch.Tensor:
        inputs, _ = self._padded(documents)
        return cast(torch.Tensor, self._module(**inputs).logits)

    def exported(self) -> dict[str, torch.Tensor]:
        return {name: each.detach() for name, each in self._module.named_parameters()}

    def load_exported(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(weights[name])
