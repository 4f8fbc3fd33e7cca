"""The best runner that a GPU has here."""

import importlib
from collections.abc import Callable

from llmservices.executor.gpu.operations import MakeOperations, Plain
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.models.decoder import Decoder


def open_runner(model: Decoder, *, blocks: int, block_tokens: int, residents_max: int) -> GpuRunner:
    """With kernels of our own where Triton is, else with what torch has; `kind` says which."""
    found = _kernels(model)
    operations = Plain() if isinstance(found, str) else found
    runner = GpuRunner(
        model,
        blocks=blocks,
        block_tokens=block_tokens,
        residents_max=residents_max,
        operations=operations,
    )
    runner.kind = f"graphs, torch ({found})" if isinstance(found, str) else "graphs, triton"
    return runner


def _kernels(model: Decoder) -> MakeOperations | str:
    """Or why there are none."""
    try:
        # Not imported above: Triton is there with torch's CUDA builds alone.
        module = importlib.import_module("llmservices.executor.gpu.kernels.operations")
    except ImportError as error:
        return f"no kernels: {error}"
    refusal: Callable[[Decoder], str | None] = module.refusal
    make: Callable[[Decoder], MakeOperations] = module.Kernels
    reason = refusal(model)
    return make(model) if reason is None else f"no kernels: {reason}"
