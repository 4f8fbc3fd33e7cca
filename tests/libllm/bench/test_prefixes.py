"""Shared prefixes: what could be reused, what was, and a run of a whole system."""

import json
from pathlib import Path

import llmservices.models
import pytest
from libllm.bench.compare.prefixes import counters, measure, parser, record_of, reusable
from libllm.bench.serve.timeline import Timeline
from libllm.bench.serve.workload import Ask, reusable_tokens

EMBEDDED = Path(llmservices.models.__file__).parent / "embedded"
A, B, C, D = ([first, *range(20, 23)] for first in range(1, 5))


def asks(*prompts: list[int]) -> list[Ask]:
    return [Ask(number, None, prompt, 1) for number, prompt in enumerate(prompts)]


def test_leading_whole_blocks_are_reusable() -> None:
    rows = asks(A + B, B + A, A + B + C, [*A, 9], A + C)
    assert reusable(rows, 4, float("inf")) == [0, 0, 8, 4, 4]
    assert sum(reusable(rows, 4, float("inf"))) == reusable_tokens(rows, 4)


def test_a_small_cache_forgets_ends_before_beginnings_and_the_oldest_first() -> None:
    rows = asks(A + B + C, A + B + C, D, D, A)
    assert reusable(rows, 4, 8) == [0, 8, 0, 4, 4]


def test_a_record_puts_times_beside_what_could_be_reused() -> None:
    rows = asks(A * 10, A * 10, B, B, C, D)
    lines = [
        Timeline(n, 40, 0.0, sent_s=1.0, arrivals_s=[1.0 + first_s], output_tokens=1)
        for n, first_s in enumerate([0.4, 0.01, 0.2, 0.03, 0.3, 9.0])
    ]
    lines[5].error = "lost"
    found = record_of(rows, lines, block_tokens=4, cache_tokens=1000, cached_tokens=43)
    assert (found.rows, found.failed, found.prompt_tokens) == (6, 1, 96)
    assert (found.reusable_tokens, found.reusable_here_tokens) == (44, 44)
    assert found.counts == {"90 %": 2, "50-90 %": 0, "10-50 %": 0, "none": 3}
    assert found.ttft_ms == {"90 %": pytest.approx(20.0), "none": pytest.approx(300.0)}
    assert found.hit_over_miss == pytest.approx(20 / 300)


def test_counters_of_several_executors_are_added() -> None:
    text = (
        "# TYPE llmos_executor_cached_tokens_total counter\n"
        'llmos_executor_cached_tokens_total{process="a"} 32\n'
        'llmos_executor_cached_tokens_total{process="b"} 1.6e+1\n'
        "llmos_kernel_threads 3\n"
    )
    assert counters(text) == {"cached_tokens_total": 48.0}


async def test_a_real_system_computes_no_prefix_twice(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [[0, 1, 2], [0, 1, 3], [4], [0, 1, 2, 5]]
    trace.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": 0,
                    "input_length": 512 * len(hashes),
                    "output_length": 16,
                    "hash_ids": hashes,
                }
            )
            + "\n"
            for hashes in rows
        )
    )
    said = parser().parse_args(
        [str(EMBEDDED), "--mooncake", str(trace), "--vocabulary", "200", "--kv-bytes", "16000000"]
    )
    found = await measure(said)
    assert (found.rows, found.failed, found.prompt_tokens) == (4, 0, 11 * 32)
    assert found.reusable_tokens == found.reusable_here_tokens == (2 + 3) * 32
    assert found.cached_tokens == found.reusable_tokens
