"""From a model folder to a model: `config.json` and safetensors in, a `Model` out.

The Hugging Face folder is the format.  Never runs code from the folder and never unpickles.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import torch

from llmservices.models import bert, gemma, gpt2, gpt_neox, llama
from llmservices.models.decoder import Decoder
from llmservices.models.encoder import EncoderModel
from llmservices.models.folder import Config, Tensors, read_config
from llmservices.models.foreign import ForeignModel
from llmservices.models.spec import DecoderSpec
from llmservices.models.tasks import Task, read_task

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Lend = Callable[[DecoderSpec, torch.dtype, torch.device], bool]
"""Whether a decoder of such a kind is laid out anew at once by who loads it."""
_LoadForeign = Callable[[Path, torch.dtype, torch.device], ForeignModel]
_LoadForeignEncoder = Callable[[Path, torch.dtype, torch.device, Task], EncoderModel]
_ReadSpec = Callable[[Config], DecoderSpec]
_Build = Callable[[DecoderSpec, Config, Tensors], Decoder]
_FAMILIES: dict[str, tuple[_ReadSpec, _Build]] = {
    **dict.fromkeys(llama.FAMILIES, (llama.read_spec, llama.build)),
    **dict.fromkeys(gemma.FAMILIES, (gemma.read_spec, gemma.build)),
    **dict.fromkeys(gpt2.FAMILIES, (gpt2.read_spec, gpt2.build)),
    **dict.fromkeys(gpt_neox.FAMILIES, (gpt_neox.read_spec, gpt_neox.build)),
}


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
    def kv_token_bytes(self) -> int:
        """Of the keys and values of one token."""

    @property
    def family(self) -> str:
        """`model_type` of its config."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def _never(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> bool:
    return False


def load(
    folder: Path, *, dtype: DtypeChoice = "auto", device: torch.device, lend: Lend = _never
) -> Model:
    """Load a causal language model, or an encoder (an `EncoderModel`).

    Where `lend` says so, a decoder's weights may be views of the files: nothing is read before it
    is laid out, and nothing is held twice.

    INVALID, with the path: not a model folder, a part of it is missing or torn, a tensor has the
    wrong shape (both are named), remote code, or a quantisation that is not supported.
    """
    config = read_config(folder)
    if "quantization_config" in config:
        method = config.nested("quantization_config").text("quant_method", "unnamed")
        raise config.error(f"quantisation {method!r} is not supported")
    if "auto_map" in config:
        raise config.error("auto_map asks for code from the folder, which is never run")
    family = config.text("model_type")
    task = read_task(folder)
    if task.kind != "generate":
        return _load_encoder(folder, config, task, dtype=_wanted(config, dtype), device=device)
    if family in _FAMILIES:
        read_spec, build = _FAMILIES[family]
        spec, wanted = read_spec(config), _wanted(config, dtype)
        lent = lend(spec, wanted, device)
        with (
            torch.inference_mode(),
            Tensors(folder, dtype=wanted, device=device, lent=lent) as tensors,
        ):
            return build(spec, config, tensors)
    # Here and not at the top: the library takes seconds to import, and our own families never
    # need it.
    foreign: _LoadForeign = importlib.import_module("llmservices.models.foreign_load").load_foreign
    return foreign(folder, _wanted(config, dtype), device)


def _load_encoder(
    folder: Path, config: Config, task: Task, *, dtype: torch.dtype, device: torch.device
) -> EncoderModel:
    if config.text("model_type") in bert.FAMILIES:
        with torch.inference_mode(), Tensors(folder, dtype=dtype, device=device) as tensors:
            return bert.build(bert.read_spec(config), task, config, tensors)
    module = importlib.import_module("llmservices.models.foreign_load")
    foreign: _LoadForeignEncoder = module.load_foreign_encoder
    return foreign(folder, dtype, device, task)


def _wanted(config: Config, dtype: DtypeChoice) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    name = config.text("dtype", config.text("torch_dtype", "float32"))
    if name not in _DTYPES:
        raise config.error(f"dtype {name!r} is not supported; one of {', '.join(_DTYPES)} is")
    return _DTYPES[name]
