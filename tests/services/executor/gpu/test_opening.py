"""Which runner a device gets."""

import pytest
import torch
from llmservices.executor.gpu.opening import open_runner
from llmservices.executor.gpu.runner import GpuRunner

from tests.services.executor.gpu.decoders import BLOCK_TOKENS, ROOM, STEPS, logits, make


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run here")
def test_where_no_kernel_starts_torch_computes_and_the_reason_is_said() -> None:
    model = make("llama")
    runner = open_runner(model, blocks=8 * ROOM, block_tokens=BLOCK_TOKENS, residents_max=8)
    assert isinstance(runner, GpuRunner)
    assert runner.kind.startswith("graphs, torch (no kernels: ")
    assert len(logits(runner, STEPS)) == len(STEPS)
