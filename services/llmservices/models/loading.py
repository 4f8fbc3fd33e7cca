"""From a model folder to a model: `config.json` and safetensors in, a `Model` out.

The Hugging Face folder is the format.  Never runs code from the folder and never unpickles.
"""

from pathlib import Path
from typing import Literal, Protocol

import torch

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


class Model(Protocol):
    """What the service may know of a loaded model; the engine knows the concrete kinds."""

    @property
    def context_tokens(self) -> int:
        """The longest context that it was made for."""

    @property
    def vocab_tokens(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def family(self) -> str:
        """`model_type` of its config."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def load(folder: Path, *, dtype: DtypeChoice = "auto", device: torch.device) -> Model:
    """Load a causal language model.  INVALID, with the path: not a model folder, a part of it is missing or torn, a
    tensor has the wrong shape (both), remote code, or a quantisation that is not supported."""
    raise NotImplementedError
