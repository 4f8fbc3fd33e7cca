"""Tokens drawn by the native step against the rule in the sampler: the same ones."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from llmproto.generation import Sampling
from llmservices.executor.native import NativeRunner
from llmservices.executor.sampler import Ask, Choice, Draw, Sampler, adjust, gumbel, key
from llmservices.models.native.bindings import Functions
from llmservices.models.native.decoder import NativeDecoder
from llmservices.models.native.packing import Packer

from tests.services.executor.native_models import Small

CPU = torch.device("cpu")
ROWS = 12


def runner(functions: Functions, vocab: int, isa: str = "", threads: int = 2) -> NativeRunner:
    model = NativeDecoder(Small(vocab=vocab, layers=1).make(), "auto", Packer(functions, 1))
    return NativeRunner(model, blocks=1, block_tokens=16, rows_max=1, threads=threads, isa=isa)


def rows_of_logits(vocab: int, spread: float, salt: int) -> torch.Tensor:
    """As the native step lays them: columns up to a multiple of 32, of which the last are none."""
    generator = torch.Generator().manual_seed(salt)
    return (torch.randn(ROWS, -(-vocab // 32) * 32, generator=generator) * spread)[:, :vocab]


def drawn(drawer: NativeRunner, logits: torch.Tensor, sampling: list[Sampling]) -> list[int | None]:
    return drawer.draw(
        [Draw(row, one, key(one.seed, 3)) for row, one in zip(logits, sampling, strict=True)]
    )


def by_the_rule(logits: torch.Tensor, sampling: list[Sampling]) -> list[int]:
    asks = [Ask(one, np.zeros(3, dtype=np.int32), 1) for one in sampling]
    choices = Sampler(logits.shape[1], CPU).choose(logits, asks)
    return [choice.token for choice in choices if isinstance(choice, Choice)]


@pytest.mark.parametrize("vocab", [5, 301, 6_000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_the_tokens_are_those_of_the_rule(functions: Functions, vocab: int, spread: float) -> None:
    """For every filter and pair of them, on every instruction set; and seldom in doubt."""
    filters = itertools.product([0, 1, 20], [1.0, 0.9, 0.5, 0.01], [0.0, 0.001, 0.3])
    settings = [(temperature, k, p, m) for k, p, m in filters for temperature in (0.1, 0.8, 3.0)]
    logits = rows_of_logits(vocab, spread, vocab)
    drawers = [runner(functions, vocab, isa) for isa in functions.llm_isas().decode().split()]
    sure = asked = 0
    for number, (temperature, k, p, m) in enumerate(settings):
        sampling = [
            Sampling(temperature=temperature, top_k=k, top_p=p, min_p=m, seed=ROWS * number + row)
            for row in range(ROWS)
        ]
        expected = by_the_rule(logits, sampling)
        for drawer in drawers[: 1 if number % 4 else None]:
            found = drawn(drawer, logits, sampling)
            assert all(token in (None, right) for token, right in zip(found, expected))
            asked += len(found)
            sure += len(found) - found.count(None)
    assert sure > (0.9 if spread else 0.4) * asked


def test_ties_and_infinities_are_left_to_the_rule(functions: Functions) -> None:
    drawer = runner(functions, 64)
    logits = rows_of_logits(64, 1.0, 1)
    words = key(0, 3)
    noise = gumbel(Sampler(64, CPU)._mixed_V, [words])[0]
    logits[0] = -noise
    logits[1] = float("-inf")
    logits[2] = float("inf")
    found = drawn(drawer, logits, [Sampling(seed=0)] * ROWS)
    assert found[:3] == [None] * 3
    assert None not in found[3:]


def test_a_sampler_with_a_drawer_chooses_the_same(functions: Functions) -> None:
    """Penalties, bias and log-probabilities included."""
    vocab = 301
    logits = rows_of_logits(vocab, 3.0, 5)
    asks = [
        Ask(
            Sampling(
                seed=row,
                temperature=[0.0, 0.7, 1.0][row % 3],
                top_p=[1.0, 0.8][row % 2],
                repetition_penalty=[1.0, 1.2][row // 2 % 2],
                bias_tokens=[5, 300],
                bias_values=[4.0, 3.0],
                logprobs=[None, 2][row // 4 % 2],
            ),
            np.arange(40, dtype=np.int32) * 3,
            7,
        )
        for row in range(ROWS)
    ]
    expected = Sampler(vocab, CPU).choose(logits, asks)
    assert Sampler(vocab, CPU, runner(functions, vocab)).choose(logits, asks) == expected


class _Refusing:
    """Counts what it is asked, and is never sure."""

    def __init__(self) -> None:
        self.asked = 0

    def draw(self, draws: Sequence[Draw]) -> list[int | None]:
        self.asked += len(draws)
        return [None] * len(draws)


def test_where_the_drawer_is_not_sure_the_rule_decides() -> None:
    logits = rows_of_logits(50, 2.0, 9)
    asks = [Ask(Sampling(seed=row), np.zeros(2, dtype=np.int32), 1) for row in range(ROWS)]
    refusing = _Refusing()
    assert Sampler(50, CPU, refusing).choose(logits, asks) == Sampler(50, CPU).choose(logits, asks)
    assert refusing.asked == ROWS


def test_adjusted_rows_leave_room_for_whole_vectors() -> None:
    ask = Ask(Sampling(presence_penalty=1.0), np.zeros(3, dtype=np.int32), 1)
    adjusted = adjust(torch.ones(21), ask)
    assert len(adjusted) == 21
    assert adjusted.untyped_storage().nbytes() >= 32 * 4
