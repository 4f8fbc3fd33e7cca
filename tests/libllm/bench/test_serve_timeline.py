"""Figures of a run, from timelines made by hand."""

import pytest
from libllm.bench.serve.timeline import INTERACTIVE, SERVER, Limits, Timeline, spread, summarize


def line(number: int, *arrivals_s: float, due_s: float = 0.0, tokens: int = 0) -> Timeline:
    """A request whose pieces came then."""
    return Timeline(
        number,
        prompt_tokens=10,
        due_s=due_s,
        sent_s=due_s + 0.001,
        arrivals_s=list(arrivals_s),
        output_tokens=tokens or len(arrivals_s),
        ended_s=arrivals_s[-1] if arrivals_s else due_s,
    )


def test_times_are_counted_from_when_the_request_was_due() -> None:
    one = line(0, 1.5, 1.6, 1.8, due_s=1.0)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.tpot_s == pytest.approx(0.15)


def test_pieces_of_several_tokens_count_by_their_tokens() -> None:
    assert line(0, 1.0, 2.0, tokens=11).tpot_s == pytest.approx(0.1)
    assert line(0, 1.0).tpot_s is None


def test_percentiles_are_nearest_ranks() -> None:
    found = spread([n / 1000 for n in range(100, 0, -1)])
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99, found.max) == (50, 90, 95, 99, 100)
    assert found.mean == pytest.approx(50.5)
    assert spread([]) is None


@pytest.mark.parametrize(
    ("one", "server", "interactive"),
    [
        (line(0, 0.4, 0.42), True, True),
        (line(0, 0.6, 0.62), True, False),
        (line(0, 0.4, 0.45), True, False),
        (line(0, 2.1, 2.11), False, False),
        (line(0, 0.1), True, True),
    ],
)
def test_both_limits_must_be_kept(one: Timeline, server: bool, interactive: bool) -> None:
    assert SERVER.kept(one) is server
    assert INTERACTIVE.kept(one) is interactive


def test_a_run_in_numbers() -> None:
    lost = line(2, due_s=1.0)
    lost.error, lost.ended_s = "ClientError: gone", 1.5
    limits = [Limits("strict", 300, 200)]
    summary = summarize([line(0, 0.2, 0.4), line(1, 1.0, 2.0, due_s=0.5), lost], limits)
    assert (summary.requests, summary.failed) == (3, 1)
    assert summary.errors == {"ClientError: gone": 1}
    assert summary.seconds == 2.0
    assert summary.requests_per_s == 1.0
    assert (summary.prompt_tokens, summary.output_tokens) == (20, 4)
    assert (summary.output_tokens_per_s, summary.tokens_per_s) == (2.0, 12.0)
    assert summary.goodput_per_s == {"strict": 0.5}
    assert summary.goodput_share == {"strict": round(1 / 3, 4)}
    assert summary.ttft_ms is not None
    assert (summary.ttft_ms.p50, summary.ttft_ms.max) == (200, 500)
    assert summary.late_ms_p99 == 1.0


def test_nothing_at_all_is_no_error() -> None:
    summary = summarize([])
    assert (summary.requests, summary.ttft_ms, summary.requests_per_s) == (0, None, 0.0)
