"""What a service measures, and its way to the monitor: totals since its start, said again whenever
they have changed.

Invariant: a report holds every instrument that was made; names are few and made once.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from llmproto.metrics import Distribution, Metrics, Sample

from libllm.port import Port

REPORT_S: Final = 2.0
"""Changes are reported at most so often."""
QUIET_S: Final = 10.0
"""Without any, this often: a monitor that is new learns the totals."""
SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Bounds for durations."""


class Counter:
    """A total that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, more: float = 1.0) -> None:
        """So many more."""
        self.value += more


class Gauge:
    """A level."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Histogram:
    """How often which value was seen."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Instruments:
    """All that one process measures, by name."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}

    def counter(self, name: str) -> Counter:
        """A new one; its name ends in `_total`."""
        assert name not in self._counters and name.endswith("_total"), name
        return self._counters.setdefault(name, Counter())

    def gauge(self, name: str) -> Gauge:
        """A new one."""
        assert name not in self._gauges, name
        return self._gauges.setdefault(name, Gauge())

    def histogram(self, name: str, bounds: tuple[float, ...] = SECONDS) -> Histogram:
        """A new one."""
        assert name not in self._histograms and list(bounds) == sorted(set(bounds)), name
        return self._histograms.setdefault(name, Histogram(bounds))

    def report(self, process: str, incarnation: int) -> Metrics:
        """Everything so far."""
        return Metrics(
            process,
            incarnation,
            counters=[Sample(name, one.value) for name, one in self._counters.items()],
            gauges=[Sample(name, one.value) for name, one in self._gauges.items()],
            histograms=[
                Distribution(name, list(one.bounds), list(one.counts), one.sum)
                for name, one in self._histograms.items()
            ],
        )


class Reporter:
    """Sends the report to the monitor: soon after a change, rarely without one.

    Nothing runs in between, so an idle process stays idle.
    """

    def __init__(self, port: Port, report: Callable[[], Metrics]) -> None:
        self._port = port
        self._report = report
        self._timer: asyncio.TimerHandle | None = None
        self._changed = False
        self._sent_s = 0.0

    def start(self) -> None:
        """Begin; the port can be used from now on."""
        self._send()

    def changed(self) -> None:
        """Something was counted: cheap enough for every message."""
        if self._changed or self._timer is None:
            return
        self._changed = True
        self._timer.cancel()
        left_s = self._sent_s + REPORT_S - self._port.loop.time()
        self._timer = self._port.loop.call_later(max(0.0, left_s), self._send)

    def stop(self) -> None:
        """The last word."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._send()
        self._timer.cancel()
        self._timer = None

    def _send(self) -> None:
        self._changed = False
        self._sent_s = self._port.loop.time()
        self._port.send(self._report(), target="monitor")
        self._timer = self._port.loop.call_later(QUIET_S, self._send)
