"""Workloads: one seed, one workload; traces become what they say."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from libllm.bench.serve.workload import (
    FIRST_ID,
    Lengths,
    Shape,
    azure,
    mooncake,
    reusable_tokens,
    synthetic,
)
from llmproto.errors import RemoteError

SHAPE = Shape(vocabulary=500)
TRACES = Path(__file__).parents[4] / "shared/assets/traces"


@pytest.mark.parametrize(("text", "low", "high"), [("128", 128, 128), ("64:512", 64, 512)])
def test_lengths_are_read(text: str, low: int, high: int) -> None:
    assert Lengths.read(text) == Lengths(low, high)


@pytest.mark.parametrize("text", ["", "0", "x", "9:3", "1:2:3", "-4"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(RemoteError):
        Lengths.read(text)


def test_one_seed_is_one_workload_and_another_seed_another() -> None:
    def made(seed: int) -> object:
        shape = Shape(500, seed)
        return synthetic(20, shape, prompt=Lengths(4, 9), output=Lengths(1, 5), rate=3.0)

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_poisson_arrivals_come_at_their_rate() -> None:
    asks = synthetic(4000, SHAPE, prompt=Lengths(1, 1), output=Lengths(1, 1), rate=5.0)
    times = [ask.at_s for ask in asks if ask.at_s is not None]
    assert len(times) == 4000
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.1)
    # The standard deviation of an exponential distribution is its mean.
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(0.2, rel=0.15)


def test_a_closed_loop_has_no_times_and_drawn_lengths_stay_in_range() -> None:
    asks = synthetic(200, SHAPE, prompt=Lengths(3, 6), output=Lengths(2, 4))
    assert {ask.at_s for ask in asks} == {None}
    assert {len(ask.prompt) for ask in asks} == {3, 4, 5, 6}
    assert {ask.output_tokens for ask in asks} == {2, 3, 4}
    assert all(FIRST_ID <= token < 500 for ask in asks for token in ask.prompt)


def test_azure_rows(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,2000,9\n"
    )
    shape = Shape(500, prompt_max=1024, output_max=16)
    first, second = azure(trace, 10, shape, speed=2.0)
    assert (first.at_s, len(first.prompt), first.output_tokens) == (0.0, 374, 16)
    assert (second.at_s, len(second.prompt), second.output_tokens) == (2.0, 1024, 9)
    assert first.prompt[:50] != second.prompt[:50]


def test_mooncake_rows_share_what_their_hash_ids_share(tmp_path: Path) -> None:
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 1500, "output_length": 512, "hash_ids": [0, 1, 2]}\n'
        '{"timestamp": 500, "input_length": 1500, "output_length": 64, "hash_ids": [0, 1, 3]}\n'
    )
    first, second = mooncake(trace, 10, SHAPE, speed=1.0, block_tokens=32)
    assert [len(first.prompt), first.output_tokens] == [round(1500 / 16), 32]
    assert (second.at_s, second.output_tokens) == (0.5, 4)
    assert first.prompt[:64] == second.prompt[:64]
    assert first.prompt[64:] != second.prompt[64:]
    assert reusable_tokens([first, second], 32) == 64


def test_reuse_counts_leading_blocks_alone() -> None:
    chance = random.Random(1)
    one, other = ([chance.randrange(16, 500) for _ in range(32)] for _ in range(2))
    asks = synthetic(3, SHAPE, prompt=Lengths(1, 1), output=Lengths(1, 1))
    prompts = [one + other, other + one, one + other + one]
    made = [type(ask)(ask.number, None, ids, 1) for ask, ids in zip(asks, prompts)]
    assert reusable_tokens(made, 32) == 64


@pytest.mark.parametrize("line", ["nonsense", '{"timestamp": 1}', '{"hash_ids": 3}'])
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    trace = tmp_path / "trace.jsonl"
    good = '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [0]}\n'
    trace.write_text(good + line + "\n")
    with pytest.raises(RemoteError, match="line 2"):
        mooncake(trace, 10, SHAPE, speed=1.0, block_tokens=512)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="absent"):
        azure(tmp_path / "absent.csv", 1, SHAPE, speed=1.0)


@pytest.mark.skipif(not TRACES.exists(), reason="the recorded traces are not here")
def test_the_recorded_traces_are_read() -> None:
    rows = azure(TRACES / "azure_llm_2023/AzureLLMInferenceTrace_conv.csv", 50, SHAPE, speed=1.0)
    assert [len(rows), len(rows[0].prompt), rows[0].output_tokens] == [50, 374, 44]
    assert all((a.at_s or 0) <= (b.at_s or 0) for a, b in pairwise(rows))
    conversation = TRACES / "mooncake/conversation_first2000.jsonl"
    shared = mooncake(conversation, 200, SHAPE, speed=1.0, block_tokens=32)
    assert shared[0].prompt[:32] == shared[1].prompt[:32]
    assert reusable_tokens(shared, 32) > 0
