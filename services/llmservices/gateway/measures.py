"""What the gateway counts, as totals since its start."""

from bisect import bisect_left
from typing import Final

from llmproto.metrics import Distribution, Metrics, Sample

SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)


class Seconds:
    """A histogram of durations."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def report(self) -> Distribution:
        """So far."""
        return Distribution(self._name, list(SECONDS), list(self._counts), self._sum)


class Measures:
    """Counters and histograms of one gateway.  Bounded: routes and statuses are few."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int], int] = {}
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.streams = 0
        """That are read right now."""
        self.first_token = Seconds("llmos_gateway_first_token_seconds")
        self.between_tokens = Seconds("llmos_gateway_between_tokens_seconds")
        self.request = Seconds("llmos_gateway_request_seconds")

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        name = (method, route, status)
        self._requests[name] = self._requests.get(name, 0) + 1
        self.request.add(seconds)

    def report(self, process: str, incarnation: int) -> Metrics:
        """All of it."""
        counters = [
            Sample(
                "llmos_gateway_requests_total",
                float(count),
                {"method": method, "route": route, "status": str(status)},
            )
            for (method, route, status), count in self._requests.items()
        ]
        counters.append(Sample("llmos_gateway_prompt_tokens_total", float(self.prompt_tokens)))
        counters.append(Sample("llmos_gateway_output_tokens_total", float(self.output_tokens)))
        return Metrics(
            process=process,
            incarnation=incarnation,
            counters=counters,
            gauges=[Sample("llmos_gateway_streams", float(self.streams))],
            histograms=[
                self.first_token.report(),
                self.between_tokens.report(),
                self.request.report(),
            ],
        )
