"""Loads any other causal language model or encoder through the transformers library; imported only
when one is wanted."""

import inspect
from pathlib import Path
from typing import Any

import torch
from llmproto.errors import invalid
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as library_logging

from llmservices.models.folder import Tensors
from llmservices.models.foreign import ForeignEncoder, ForeignModel
from llmservices.models.tasks import Task
from llmservices.versions.manifest import is_version

UNBOUNDED_CONTEXT_TOKENS = 4096
"""Taken for architectures that state no longest context."""


def load_foreign(folder: Path, dtype: torch.dtype, device: torch.device) -> ForeignModel:
    """INVALID for what the library does not know or cannot read; never remote code, never
    pickles."""
    # Any: the library's loaders have no types, or wrong ones.
    library: Any = AutoModelForCausalLM
    config, module = _loaded(library, folder, dtype, device, "a causal language model")
    text = config.get_text_config(decoder=True)
    return ForeignModel(
        module,
        family=str(config.model_type),
        context_tokens=_context(text),
        vocab_tokens=module.get_output_embeddings().weight.shape[0],
        kv_token_bytes=2 * text.num_hidden_layers * text.hidden_size * dtype.itemsize,
    )


def load_foreign_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device, task: Task
) -> ForeignEncoder:
    """The same for encoders, with the head that the task needs."""
    library: Any = AutoModel if task.kind == "embed" else AutoModelForSequenceClassification
    config, module = _loaded(library, folder, dtype, device, "an encoder")
    return ForeignEncoder(
        module,
        task,
        family=str(config.model_type),
        context_tokens=_context(config.get_text_config()),
        takes_types="token_type_ids" in inspect.signature(module.forward).parameters,
    )


def _context(config: Any) -> int:
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) else UNBOUNDED_CONTEXT_TOKENS


def _loaded(
    library: Any, folder: Path, dtype: torch.dtype, device: torch.device, what: str
) -> tuple[Any, Any]:
    """(config, module), every tensor of which was there (but for poolers, which nothing reads)."""
    pooler = library is AutoModel
    state: dict[str, torch.Tensor] | None = None
    # Missing and torn files are told apart here, with their paths.
    with Tensors(folder, dtype=dtype, device=torch.device("cpu")) as tensors:
        if is_version(folder):
            state = {name: tensors.read(name) for name in tensors.names()}
    logs: Any = library_logging
    logs.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        source: Path | None = folder
        if state is not None:  # The class itself takes a state alone; what chooses it does not.
            with torch.device("meta"):
                library, source = type(library.from_config(config, trust_remote_code=False)), None
        module, report = library.from_pretrained(
            source,
            config=config,
            state_dict=state,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise invalid(f"{folder} cannot be loaded as {what}: {first}") from error
    missing = sorted(key for key in report["missing_keys"] if not (pooler and "pooler" in key))
    if missing:
        raise invalid(f"{folder}: tensor {missing[0]} is missing, and {len(missing) - 1} others")
    module.eval().to(device)
    return config, module
