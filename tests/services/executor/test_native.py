"""The native step against the plain path in torch, and against itself in other company."""

import mmap
import os

import msgspec
import numpy as np
import pytest
import torch
from llmservices.executor.native import NativeRunner
from llmservices.executor.runner import PagedRunner, Work
from llmservices.models.native.bindings import Functions
from llmservices.models.native.decoder import NativeDecoder
from llmservices.models.native.packing import Packer

from tests.services.executor.native_models import Small, int4_errors
from tests.services.models.native.memory import resident_pages
from tests.services.models.native.reference import quantise_int4

SHAPES = {
    "odd widths": Small(),
    "biased, tied": Small(biased=True, tied=True, hidden=40, inner=33, vocab=64),
    "one group, normed": Small(normed=True, heads=4, kv_heads=4, head_dim=24, hidden=64),
    "wide groups": Small(heads=14, kv_heads=2, head_dim=64, hidden=128, inner=160, vocab=300),
    "one key head": Small(heads=9, kv_heads=1, head_dim=18),
    "window": Small(window=7),
}
BLOCKS = 200


def works(kind: str, block_tokens: int) -> list[list[Work]]:
    """Steps by the name of what is in them; each thread has blocks of its own, in no order."""
    table = [(37 * i + 11) % BLOCKS for i in range(BLOCKS)]
    room = 40

    def work(thread: int, start: int, tokens: int, wanted: str = "last") -> Work:
        ids = (np.arange(start, start + tokens) * 7 + thread * 5) % 64
        blocks = table[thread * room : (thread + 1) * room]
        return Work(thread, ids.astype(np.int32), start, blocks, wanted)  # type: ignore[arg-type]

    match kind:
        case "prefill":
            return [[work(0, 0, 75, "all")]]
        case "chunks":
            return [[work(0, 0, 33, "none")], [work(0, 33, 1, "none")], [work(0, 34, 40, "all")]]
        case "decodes":
            first = [work(i, 0, 9 + 20 * i, "none") for i in range(4)]
            return [first, [work(i, 9 + 20 * i, 1) for i in range(4)]]
        case _:
            first = [work(0, 0, 50, "none"), work(1, 0, 17, "last"), work(2, 0, 3, "none")]
            return [first, [work(0, 50, 1), work(1, 17, 1), work(2, 3, 30, "all"), work(3, 0, 70)]]


def last_logits(runner: NativeRunner | PagedRunner, steps: list[list[Work]]) -> torch.Tensor:
    with torch.inference_mode():
        logits = [runner.compute(step) for step in steps]
    assert logits[-1] is not None
    return logits[-1].float()


def native(
    functions: Functions,
    small: Small,
    *,
    precision: str = "auto",
    threads: int = 1,
    isa: str = "",
    block_tokens: int = 16,
) -> NativeRunner:
    model = NativeDecoder(small.make(), precision, Packer(functions, threads))
    return NativeRunner(
        model, blocks=BLOCKS, block_tokens=block_tokens, rows_max=256, threads=threads, isa=isa
    )


def plain(
    small: Small, block_tokens: int = 16, *, widened: bool = False, precision: str = "auto"
) -> PagedRunner:
    model = small.make(widened=widened, precision=precision)
    return PagedRunner(model, blocks=BLOCKS, block_tokens=block_tokens, exact=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["prefill", "chunks", "decodes", "mixed"])
def test_float32_logits_are_those_of_the_plain_path(
    functions: Functions, shape: str, kind: str
) -> None:
    block_tokens = 4 if kind == "chunks" else 16
    steps = works(kind, block_tokens)
    expected = last_logits(plain(SHAPES[shape], block_tokens), steps)
    for isa in functions.llm_isas().decode().split():
        for threads in (1, 3):
            runner = native(
                functions, SHAPES[shape], threads=threads, isa=isa, block_tokens=block_tokens
            )
            found = last_logits(runner, steps)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert runner.greatest is not None
            assert runner.greatest[1] == found.argmax(-1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
def test_bfloat16_logits_are_near_those_of_float32(
    functions: Functions, shape: str, kind: str
) -> None:
    """Nearer, on the whole, than the plain path's, which rounds after every operation."""
    small = msgspec.structs.replace(SHAPES[shape], dtype=torch.bfloat16)
    steps = works(kind, 16)
    expected = last_logits(plain(small, widened=True), steps)
    rounding = float((last_logits(plain(small), steps) - expected).square().mean().sqrt())
    for isa in functions.llm_isas().decode().split():
        found = last_logits(native(functions, small, isa=isa, threads=2), steps)
        assert float((found - expected).square().mean().sqrt()) <= rounding


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_weights_give_the_logits_of_their_numbers(
    functions: Functions, shape: str, precision: str
) -> None:
    """Against the plain path over the numbers that the precision leaves: what differs is the
    rounding of the rows to 8 bits, the same on every instruction set."""
    steps = works("mixed", 16)
    expected = last_logits(plain(SHAPES[shape], precision=precision), steps)
    isas = functions.llm_isas().decode().split()
    all_found = [
        last_logits(native(functions, SHAPES[shape], precision=precision, isa=isa), steps)
        for isa in isas
    ]
    for found in all_found:
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.06
        assert (found - all_found[0]).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_company_cuts_or_threads(
    functions: Functions, dtype: torch.dtype, precision: str
) -> None:
    small = Small(
        heads=14, kv_heads=2, head_dim=64, hidden=96, inner=1200, vocab=300, dtype=dtype, window=30
    )
    prompt = (np.arange(90) * 7 % 300).astype(np.int32)

    def logits(cuts: list[int], before: int, threads: int) -> torch.Tensor:
        runner = native(functions, small, precision=precision, threads=threads)
        parts = []
        for start, end in zip([0, *cuts], [*cuts, len(prompt)]):
            neighbour = Work(1, np.full(before, 7, dtype=np.int32), 0, range(100, 120), "none")
            work = Work(2, prompt[start:end], start, range(20), "all")
            out = runner.compute([neighbour, work] if before else [work])
            assert out is not None
            parts.append(out)
        return torch.cat(parts)

    whole = logits([], 0, 1)
    assert whole.isfinite().all()
    for isa_threads in (1, 2, 3):
        assert torch.equal(logits(list(range(1, 90)), 0, isa_threads), whole)
        assert torch.equal(logits([5, 32, 70], 19, isa_threads), whole)


@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_lose_their_core_change_no_bit(
    functions: Functions, dtype: torch.dtype, precision: str
) -> None:
    """Steps of decodes by more threads than there are cores: whoever waits computes what another
    one has claimed, while that one may come back at any moment."""
    small = Small(
        heads=14, kv_heads=2, head_dim=64, hidden=96, inner=1200, vocab=300, layers=9, dtype=dtype
    )

    def logits(threads: int) -> list[torch.Tensor]:
        runner = native(functions, small, precision=precision, threads=threads)
        found = []
        for position in range(40):
            rows = (1, 2, 5, 12, 13, 32, 33)[position % 7]
            ids = np.arange(40, dtype=np.int32) * 3 + position
            step = [
                Work(row, ids[row : row + 1], position // 7, [row * 2], "last")
                for row in range(rows)
            ]
            out = runner.compute(step)
            assert out is not None
            assert runner.greatest is not None
            assert runner.greatest[1] == out.argmax(-1).tolist()
            found.append(out)
        return found

    expected = logits(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread, and those that it starts
    try:
        found = logits(5)
    finally:
        os.sched_setaffinity(0, cores)
    assert all(map(torch.equal, found, expected))


def test_a_cache_takes_the_memory_of_what_is_in_it(functions: Functions) -> None:
    """Blocks that nobody has written to are not there, however many there may be."""
    small = Small(layers=1)
    model = NativeDecoder(small.make(), "auto", Packer(functions, 1))
    blocks = 1 << 16
    runner = NativeRunner(model, blocks=blocks, block_tokens=16, rows_max=16, threads=1)
    (cache,) = runner.caches
    assert cache.nbytes == runner.cache_bytes > 200_000_000
    ids = np.arange(10, dtype=np.int32)
    with torch.inference_mode():
        assert runner.compute([Work(0, ids, 0, [blocks // 2], "last")]) is not None
    assert resident_pages(cache) * mmap.PAGESIZE < cache.nbytes // 8  # of large pages, perhaps


def test_int4_errs_no_more_than_the_plain_rule() -> None:
    """Group by group; also where a group is all zeros or has one number that is far out."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[0] = 0
    weight[1, ::32] = 3.0
    ours, theirs = int4_errors(weight)
    assert (ours <= theirs * (1 + 1e-4)).all()
    assert ours[2:].mean() < 0.92 * theirs[2:].mean()


def test_int4_takes_no_less_than_four_bits_a_weight() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    numbers, scales = quantise_int4(weight)
    assert (int(numbers.min()), int(numbers.max())) == (-8, 7)
    assert scales.shape == (32, 2, 1)  # a group is 32
    assert torch.equal(scales.half().float(), scales)
