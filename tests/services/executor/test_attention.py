"""Exact mode: a thread's tokens and scores are the same bits whatever runs beside it."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmproto.generation import Sampling, TokenScore
from llmservices.executor.attention import TILE_ROWS
from llmservices.executor.contract import END_NONE, Admission, EngineConfig
from llmservices.executor.core import Engine
from llmservices.executor.runner import PagedRunner, Work
from llmservices.models.decoder import Decoder
from llmservices.models.linear import Linear

Scored = list[tuple[int | None, TokenScore | None]]


class Want(msgspec.Struct, frozen=True):
    """A thread of the property test."""

    prefix: int
    suffix: list[int]
    output: int
    sampling: Sampling
    starts_at: int
    """Step before which it is admitted."""
    service_class: int
    interrupted_at: list[int]
    """Steps before which it is dropped, and admitted again with what it has."""

    @property
    def prompt(self) -> list[int]:
        return [(7 * i) % 90 for i in range(self.prefix)] + self.suffix


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**53 - 1),
    logprobs=st.just(20),
)
wants = st.builds(
    Want,
    prefix=st.sampled_from([0, 3, 20, 60]),
    suffix=st.lists(st.integers(0, 100), min_size=1, max_size=40),
    output=st.integers(1, 24),
    sampling=samplings,
    starts_at=st.integers(0, 12),
    service_class=st.integers(0, 1),
    interrupted_at=st.lists(st.integers(1, 25), max_size=2),
)


def alone(model: Decoder, want: Want) -> Scored:
    """The undisturbed twin: by itself, its prompt in one chunk."""
    return together(model, [msgspec.structs.replace(want, starts_at=0, interrupted_at=[])], 500)[0]


def together(
    model: Decoder, threads: list[Want], rows: int, *, blocks: int = 400, block_tokens: int = 4
) -> list[Scored]:
    config = EngineConfig(blocks=blocks, block_tokens=block_tokens, step_tokens=rows, exact=True)
    engine = Engine(model, config)
    out: list[Scored] = [[] for _ in threads]
    done = [False] * len(threads)
    current: dict[int, int] = {}
    residency = step = 0

    def admit(index: int) -> None:
        nonlocal residency
        residency += 1
        want = threads[index]
        so_far = [token for token, _ in out[index] if token is not None]
        current[residency] = index
        engine.add(
            Admission(
                thread=index.to_bytes(8, "big"),
                residency=residency,
                tokens=want.prompt + so_far,
                prompt_tokens=len(want.prompt),
                output_tokens_max=want.output,
                sampling=want.sampling,
                service_class=want.service_class,
            )
        )

    while not all(done):
        for index, want in enumerate(threads):
            if step == want.starts_at:
                admit(index)
            elif step in want.interrupted_at and index in current.values() and not done[index]:
                old = next(key for key, value in current.items() if value == index)
                engine.drop(old)
                del current[old]
                admit(index)
        result = engine.step()
        engine.check()
        assert not result.failed
        for row in result.rows:
            index = current[row.residency]
            out[index].append((row.token, row.score))
            engine.watermark(row.residency, row.position)
            done[index] = row.end != END_NONE
        for _, lost in result.gave_back:
            admit(current.pop(lost))
        step += 1
    return out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    threads=st.lists(wants, min_size=1, max_size=6),
    rows=st.sampled_from([1, 5, 33, 64, 200]),
    tight=st.booleans(),
)
def test_every_batch_gives_the_bits_of_the_undisturbed_thread(
    tiny: Decoder, threads: list[Want], rows: int, tight: bool
) -> None:
    longest = max(len(want.prompt) + want.output for want in threads)
    blocks = -(-longest // 4) + 3 if tight else 400
    assert together(tiny, threads, rows, blocks=blocks) == [alone(tiny, want) for want in threads]


@pytest.mark.parametrize("threads", [1, 2])
def test_bfloat16_too(tiny_bfloat16: Decoder, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = [
            Want(20 * (i % 3), [i, i + 1], 5, Sampling(logprobs=20, seed=i), i % 4, 1, [3 + i])
            for i in range(4)
        ]
        assert together(tiny_bfloat16, wanted, 17, block_tokens=16) == [
            alone(tiny_bfloat16, want) for want in wanted
        ]
    finally:
        torch.set_num_threads(before)


def test_logits_of_a_prompt_are_the_same_bits_in_every_cut(tiny: Decoder) -> None:
    """Directly at the runner: all rows at once, one by one, and behind a neighbour's rows."""
    prompt = np.arange(75, dtype=np.int32) % 90

    def logits(cuts: list[int], before: int) -> torch.Tensor:
        runner = PagedRunner(tiny, blocks=64, block_tokens=4, exact=True)
        parts = []
        for start, end in zip([0, *cuts], [*cuts, len(prompt)]):
            neighbour = Work(1, np.full(before, 7, dtype=np.int32), 0, range(32, 64), "none")
            work = Work(2, prompt[start:end], start, range(32), "all")
            with torch.inference_mode():
                out = runner.compute([neighbour, work] if before else [work])
            assert out is not None
            parts.append(out)
        return torch.cat(parts)

    whole = logits([], 0)
    assert whole.isfinite().all()
    assert torch.equal(logits(list(range(1, 75)), 0), whole)
    assert torch.equal(logits([3, 32, 70], 0), whole)
    assert torch.equal(logits([40], 19), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("features_in", "features_out"), [(48, 101), (896, 1152), (172, 64)])
def test_a_linear_does_not_see_where_in_the_tile_a_row_stands(
    dtype: torch.dtype, features_in: int, features_out: int
) -> None:
    """What exact mode rests on: at one shape, the bits of a row depend on that row alone."""
    generator = torch.Generator().manual_seed(0)
    linear = Linear(torch.randn(features_out, features_in, generator=generator).to(dtype))
    rows = torch.randn(TILE_ROWS, features_in, generator=generator).to(dtype)
    expected = linear(rows)
    for shift in range(1, TILE_ROWS):
        others = torch.randn(TILE_ROWS, features_in, generator=generator).to(dtype)
        others[shift] = rows[0]
        assert torch.equal(linear(others)[shift], expected[0])
        assert torch.equal(linear(rows.roll(shift, 0)), expected.roll(shift, 0))
