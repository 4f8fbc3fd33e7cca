"""What happened to each request, and what that comes to.  Pure.

Definitions (as in MLPerf Inference and vLLM's serving benchmark): time to first token (TTFT) from
the moment the request was due; time per output token (TPOT) = (last - first token) / (tokens - 1);
inter-token latency (ITL): each single gap; end-to-end: due to end.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec


class Timeline(msgspec.Struct):
    """One request as its client saw it; times in seconds since the beginning of the run."""

    number: int
    prompt_tokens: int
    due_s: float
    sent_s: float = 0.0
    arrivals_s: list[float] = []
    """When each piece of the answer came."""
    output_tokens: int = 0
    ended_s: float = 0.0
    error: str = ""
    cached_tokens: int | None = None
    """Of the prompt, taken from a cache, where the server says it."""

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Absent where there is one token."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.output_tokens - 1)


class Limits(msgspec.Struct, frozen=True):
    """A request counts for goodput when it keeps both."""

    name: str
    ttft_ms: float
    tpot_ms: float

    def kept(self, one: Timeline) -> bool:
        tpot_s = one.tpot_s
        return one.ttft_s * 1000 <= self.ttft_ms and (
            tpot_s is None or tpot_s * 1000 <= self.tpot_ms
        )


SERVER: Final = Limits("server", 2000.0, 100.0)
"""MLPerf Inference, Llama 3.1 8B, server scenario."""
INTERACTIVE: Final = Limits("interactive", 500.0, 30.0)


class Spread(msgspec.Struct, frozen=True):
    """Of one measured time, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True):
    """A run in numbers."""

    requests: int
    failed: int
    errors: dict[str, int]
    seconds: float
    """From the first request that was due to the last end."""
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    tokens_per_s: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    end_to_end_ms: Spread | None
    goodput_per_s: dict[str, float]
    """Requests a second that kept the limits of this name."""
    goodput_share: dict[str, float]
    cached_tokens: int | None = None
    late_ms_p99: float = 0.0
    """How late the generator itself sent what was due: large means that it, not the server, was
    measured."""


def summarize(
    timelines: Sequence[Timeline], limits: Iterable[Limits] = (SERVER, INTERACTIVE)
) -> Summary:
    """The whole run; failed requests count in rates (as none) and in no latency."""
    good = [one for one in timelines if not one.error and one.arrivals_s]
    begin_s = min((one.due_s for one in timelines), default=0.0)
    end_s = max((one.ended_s for one in timelines), default=0.0)
    seconds = max(end_s - begin_s, 1e-9)
    errors: dict[str, int] = {}
    for one in timelines:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    prompt_tokens = sum(one.prompt_tokens for one in good)
    output_tokens = sum(one.output_tokens for one in good)
    gaps = [b - a for one in good for a, b in zip(one.arrivals_s, one.arrivals_s[1:])]
    kept = {limit.name: sum(map(limit.kept, good)) for limit in limits}
    cached = [one.cached_tokens for one in good if one.cached_tokens is not None]
    late = spread([one.sent_s - one.due_s for one in timelines])
    return Summary(
        requests=len(timelines),
        failed=len(timelines) - len(good),
        errors=errors,
        seconds=round(seconds, 3),
        requests_per_s=round(len(good) / seconds, 4),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / seconds, 2),
        tokens_per_s=round((prompt_tokens + output_tokens) / seconds, 2),
        ttft_ms=spread([one.ttft_s for one in good]),
        tpot_ms=spread([tpot for one in good if (tpot := one.tpot_s) is not None]),
        itl_ms=spread(gaps),
        end_to_end_ms=spread([one.ended_s - one.due_s for one in good]),
        goodput_per_s={name: round(count / seconds, 4) for name, count in kept.items()},
        goodput_share={
            name: round(count / max(len(timelines), 1), 4) for name, count in kept.items()
        },
        cached_tokens=sum(cached) if cached else None,
        late_ms_p99=late.p99 if late is not None else 0.0,
    )


def spread(seconds: Sequence[float]) -> Spread | None:
    """Percentiles by the nearest-rank rule; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def rank(share: float) -> float:
        return round(1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3)

    mean = round(1000 * sum(ordered) / len(ordered), 3)
    return Spread(mean, rank(0.5), rank(0.9), rank(0.95), rank(0.99), rank(1.0))
