"""On a GPU: graphs and kernels against the plain path on the CPU, token by token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmproto.generation import Sampling
from llmservices.executor.contract import Admission, EngineConfig
from llmservices.executor.core import Engine
from llmservices.executor.gpu.opening import open_runner
from llmservices.executor.gpu.operations import MakeOperations, Plain
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.executor.runner import PagedRunner
from llmservices.models.decoder import Decoder

from tests.services.executor.gpu.decoders import (
    BLOCK_TOKENS,
    FAMILIES,
    ROOM,
    STEPS,
    VOCAB,
    logits,
    make,
    work,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # kernels are compiled
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BLOCKS = 8 * ROOM
ROOT = Path(__file__).parents[4]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def runner_of(model: Decoder, *, kernels: bool) -> GpuRunner:
    operations: MakeOperations = Plain()
    if kernels:
        found = open_runner(model, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, residents_max=8)
        assert found.kind == "graphs, triton"
        return found
    return GpuRunner(
        model, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, residents_max=8, operations=operations
    )


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_cpu(family: str, dtype: torch.dtype, kernels: bool) -> None:
    cpu = make(family, dtype=dtype)
    expected = logits(
        PagedRunner(cpu, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, exact=False), STEPS
    )
    runner = runner_of(make(family, dtype=dtype, device="cuda"), kernels=kernels)
    with torch.inference_mode():
        for step, wanted in zip(STEPS, expected, strict=True):
            found = runner.compute(step)
            assert found is not None
            difference = float((found.float().cpu() - wanted).abs().max())
            assert difference <= BOUNDS[dtype] * float(wanted.abs().max())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_cpu(family: str, temperature: float) -> None:
    assert tokens(make(family), temperature) == tokens(make(family, device="cuda"), temperature)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # torch's, of itself
def test_a_pass_that_waits_for_nothing() -> None:
    """A step whose tokens stay on the device never waits for it."""
    model = make("llama", device="cuda")
    engine = Engine(model, EngineConfig(blocks=BLOCKS, block_tokens=BLOCK_TOKENS))
    engine.add(admission(1, 0.8))
    engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_is_one_step_ahead_at_most() -> None:
    """Chunks that give no token are waited for, too."""
    runner = runner_of(make("llama", device="cuda"), kernels=True)
    with torch.inference_mode():
        for start in range(0, 60, 10):
            runner.compute([work(0, start, 10, "none")])
            assert len(runner._pace._ends) <= 2


def test_kernels_compiled_for_this_device() -> None:
    """The check of the interpreter, on the device itself."""
    program = Path(__file__).with_name("kernel_check.py")
    done = subprocess.run(
        [sys.executable, str(program), "cuda", "all"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def admission(residency: int, temperature: float) -> Admission:
    return Admission(
        thread=residency.to_bytes(8, "big"),
        residency=residency,
        tokens=[(residency * 5 + 3 * i) % VOCAB for i in range(7 * residency)],
        prompt_tokens=7 * residency,
        output_tokens_max=30,
        sampling=Sampling(temperature=temperature, top_k=9, seed=residency, ignore_eos=True),
    )


def tokens(model: Decoder, temperature: float) -> dict[int, list[int | None]]:
    """Of five threads that come one after another, in float32."""
    config = EngineConfig(blocks=BLOCKS, block_tokens=BLOCK_TOKENS, step_tokens=24)
    engine = Engine(model, config)
    waiting = [admission(residency, temperature) for residency in range(5, 0, -1)]
    found: dict[int, list[int | None]] = {each.residency: [] for each in waiting}
    while waiting or engine.runnable():
        if waiting:
            engine.add(waiting.pop())
        for row in engine.step().rows:
            engine.watermark(row.residency, row.position)
            found[row.residency].append(row.token)
    return found
