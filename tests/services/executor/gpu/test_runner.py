"""The static step without a graph against the plain path, on the CPU."""

import numpy as np
import pytest
import torch
from llmproto.generation import Sampling
from llmservices.executor.gpu.graphs import buckets
from llmservices.executor.gpu.operations import Plain
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.executor.resident import UNKNOWN
from llmservices.executor.runner import PagedRunner, Work
from llmservices.executor.sampler import Ask
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

BLOCKS = 8 * ROOM


def runner_of(model: Decoder, residents_max: int = 8) -> GpuRunner:
    return GpuRunner(
        model,
        blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        residents_max=residents_max,
        operations=Plain(),
    )


def plain_of(model: Decoder) -> PagedRunner:
    return PagedRunner(model, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, exact=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_gives_the_plain_logits(family: str) -> None:
    model = make(family)
    runner = runner_of(model)
    expected = logits(plain_of(model), STEPS)
    with torch.inference_mode():
        for step, wanted in zip(STEPS, expected, strict=True):
            found = runner.compute(step)
            assert found is not None
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_token_that_only_the_device_knows() -> None:
    model = make("llama")
    known, unknown = runner_of(model), runner_of(model)
    steps = [[work(0, 0, 9), work(1, 0, 5)], [work(1, 5, 1), work(0, 9, 1)]]
    expected = logits(known, steps)[-1]
    logits(unknown, steps[:1])
    # What the device is to choose, in another order than that of the step.
    logits_WV = torch.full((3, VOCAB), -1.0)
    for row, each in ((0, steps[1][1]), (2, steps[1][0])):
        logits_WV[row, int(each.tokens[0])] = 1.0
    ask = Ask(Sampling(temperature=0.0), np.zeros(4, dtype=np.int32), 1)
    with torch.inference_mode():
        unknown.draw(logits_WV, [0, 2], [0, 1], [ask, ask])
        last = [
            Work(each.residency, np.asarray([UNKNOWN]), each.start, each.blocks, "last")
            for each in steps[1]
        ]
        torch.testing.assert_close(unknown.compute(last), expected, rtol=0, atol=0)
        # Beside a prefill, too.
        mixed = [*last, work(2, 0, 6)]
        known_too = [*steps[1], work(2, 0, 6)]
        torch.testing.assert_close(unknown.compute(mixed), known.compute(known_too))


def test_a_slot_serves_the_next_residency() -> None:
    model = make("llama")
    runner = runner_of(model, residents_max=2)
    for thread in range(6):
        steps = [[work(thread, 0, 4 + thread)], [work(thread, 4 + thread, 1)]]
        found = logits(runner, steps)
        torch.testing.assert_close(found, logits(plain_of(model), steps), rtol=1e-4, atol=1e-4)
        runner.forget(thread)
        runner.forget(thread)


def test_what_the_one_before_left_in_a_slot_is_not_read() -> None:
    model = make("llama")
    runner = runner_of(model, residents_max=1)
    logits(runner, [[work(0, 0, 33)]])
    runner.forget(0)
    for layer in runner._cache.layers:
        layer[list(work(0, 0, 1).blocks)] = float("nan")
    # Three blocks, where the plain way looks at four.
    steps = [[work(1, 0, 9)], [work(1, 9, 1)]]
    torch.testing.assert_close(
        logits(runner, steps), logits(plain_of(model), steps), rtol=1e-4, atol=1e-4
    )


def test_buckets_end_at_the_most_and_waste_little() -> None:
    for most in (1, 3, 8, 9, 64, 100, 256, 300):
        sizes = buckets(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for rows in range(9, most + 1):
            assert min(size for size in sizes if size >= rows) <= rows * 1.8
