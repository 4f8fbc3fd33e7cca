"""An engine that starts a step before it knows the last one's tokens gives the same tokens."""

import random

import pytest
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling
from llmservices.executor.contract import END_LENGTH, END_STOP, Admission, EngineConfig, Proposal
from llmservices.executor.core import Engine
from llmservices.executor.gpu.operations import Plain
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.models.decoder import Decoder

from tests.services.executor.gpu.decoders import BLOCK_TOKENS, VOCAB, make

ROWS, RESIDENTS = 12, 16


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make("llama")


def engine_of(model: Decoder, *, overlapped: bool, blocks: int = 200) -> Engine:
    config = EngineConfig(
        blocks=blocks, block_tokens=BLOCK_TOKENS, step_tokens=ROWS, residents_max=RESIDENTS
    )
    if not overlapped:
        return Engine(model, config)
    runner = GpuRunner(
        model,
        blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        residents_max=RESIDENTS,
        operations=Plain(),
    )
    return Engine(model, config, runner=runner)


def admission(residency: int, tokens: list[int], sampling: Sampling, output: int) -> Admission:
    return Admission(
        thread=residency.to_bytes(8, "big"),
        residency=residency,
        tokens=tokens,
        prompt_tokens=len(tokens),
        output_tokens_max=output,
        sampling=sampling,
    )


def admissions(seed: int, *, scored: bool) -> list[Admission]:
    """Threads of all kinds; with `scored` some of them cannot be sampled on the device."""
    chance = random.Random(seed)
    found = []
    for residency in range(1, 11):
        sampling = Sampling(
            temperature=chance.choice([0.0, 0.0, 0.8]),
            top_k=chance.choice([0, 5]),
            seed=residency,
            stop_tokens=[chance.randrange(VOCAB) for _ in range(6)],
            logprobs=2 if scored and residency % 4 == 0 else None,
            repetition_penalty=1.3 if scored and residency % 5 == 0 else 1.0,
        )
        # Few first tokens, so that prefixes are shared.
        tokens = [chance.randrange(2)] * 9 + [chance.randrange(VOCAB) for _ in range(residency)]
        found.append(admission(residency, tokens, sampling, chance.choice([0, 1, 2, 25])))
    return found


def outputs(engine: Engine, asked: list[Admission]) -> dict[int, list[Proposal]]:
    """All proposals; threads arrive one after another, and who was given back comes again."""
    rows: dict[int, list[Proposal]] = {each.residency: [] for each in asked}
    waiting = list(reversed(asked))
    by_residency = {each.residency: each for each in asked}
    for _ in range(2000):
        if waiting:
            engine.add(waiting.pop())
        if not engine.runnable():
            break
        result = engine.step()
        engine.check()
        assert not result.failed
        for row in result.rows:
            rows[row.residency].append(row)
            engine.watermark(row.residency, row.position)
            if row.end:
                engine.drop(row.residency)
        for _, residency in result.gave_back:
            rows[residency] = []
            waiting.append(by_residency[residency])
    assert not engine.residencies()
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scored", [False, True])
def test_the_same_tokens_and_ends(model: Decoder, seed: int, scored: bool) -> None:
    asked = admissions(seed, scored=scored)
    plain = outputs(engine_of(model, overlapped=False), asked)
    found = outputs(engine_of(model, overlapped=True), asked)
    for residency, rows in plain.items():
        assert [(row.position, row.token, row.end) for row in found[residency]] == [
            (row.position, row.token, row.end) for row in rows
        ]
    ends = {row.end for rows in plain.values() for row in rows}
    assert {END_LENGTH, END_STOP} <= ends


def test_the_same_tokens_where_blocks_are_short(model: Decoder) -> None:
    asked = [
        admission(n, [n, n + 1, n + 2], Sampling(temperature=0.7, seed=n, ignore_eos=True), 25)
        for n in range(1, 7)
    ]
    plain = outputs(engine_of(model, overlapped=False), asked)
    engine = engine_of(model, overlapped=True, blocks=14)
    found = outputs(engine, asked)
    assert engine.counters.gave_back
    assert {key: [row.token for row in rows] for key, rows in found.items()} == {
        key: [row.token for row in rows] for key, rows in plain.items()
    }


def test_a_step_is_started_before_the_last_ones_tokens_are_known(model: Decoder) -> None:
    engine = engine_of(model, overlapped=True)
    engine.add(admission(1, [3, 4], Sampling(temperature=0.0, ignore_eos=True), 2))
    assert engine.step().rows == []
    assert engine.counters.rows == 2
    (first,) = engine.step().rows
    assert engine.counters.rows == 3
    (last,) = engine.step().rows
    assert (first.position, last.position, last.end) == (2, 3, END_LENGTH)
    assert engine.counters.rows == 3
    assert not engine.runnable()


def test_who_left_while_a_step_was_under_way_is_passed_over(model: Decoder) -> None:
    engine = engine_of(model, overlapped=True)
    for residency in (1, 2):
        engine.add(admission(residency, [5, 6, residency], Sampling(temperature=0.0), 9))
    engine.step()
    engine.drop(1)
    assert {row.residency for row in engine.step().rows} == {2}
    engine.drop(2)
    while engine.runnable():
        assert engine.step().rows == []
    engine.check()
    assert engine.blocks_free == engine.blocks


def test_a_thread_whose_logits_are_no_numbers_fails_alone() -> None:
    model = make("llama")
    model.embedding_VC[50] = float("nan")
    engine = engine_of(model, overlapped=True)
    engine.add(admission(1, [50, 2], Sampling(temperature=0.0), 9))
    engine.add(admission(2, [1, 2], Sampling(temperature=0.0, ignore_eos=True), 9))
    failed, tokens = [], 0
    while engine.runnable():
        result = engine.step()
        engine.check()
        failed += result.failed
        tokens += len(result.rows)
        for row in result.rows:
            engine.watermark(row.residency, row.position)
    assert [(each.residency, each.error.kind) for each in failed] == [(1, ErrorKind.INTERNAL)]
    assert tokens == 9
