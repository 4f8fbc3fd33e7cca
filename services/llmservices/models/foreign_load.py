"""Loads any other causal language model through the transformers library; imported only when
one is wanted."""

from pathlib import Path
from typing import Any

import torch
from llmproto.errors import invalid
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as library_logging

from llmservices.models.folder import Tensors
from llmservices.models.foreign import ForeignModel

UNBOUNDED_CONTEXT_TOKENS = 4096
"""Taken for architectures that state no longest context."""


def load_foreign(folder: Path, dtype: torch.dtype, device: torch.device) -> ForeignModel:
    """INVALID for what the library does not know or cannot read; never remote code, never
    pickles."""
    with Tensors(folder, dtype=dtype, device=device):
        pass  # Missing and torn files are told apart here, with their paths.
    # Any: the library's loaders have no types, or wrong ones.
    logs: Any = library_logging
    library: Any = AutoModelForCausalLM
    logs.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        module, report = library.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise invalid(f"{folder} cannot be loaded as a causal language model: {first}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise invalid(f"{folder}: tensor {missing[0]} is missing, and {len(missing) - 1} others")
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    module.eval().to(device)
    return ForeignModel(
        module,
        family=str(config.model_type),
        context_tokens=context if isinstance(context, int) else UNBOUNDED_CONTEXT_TOKENS,
        vocab_tokens=module.get_output_embeddings().weight.shape[0],
        kv_token_bytes=2 * text.num_hidden_layers * text.hidden_size * dtype.itemsize,
    )
