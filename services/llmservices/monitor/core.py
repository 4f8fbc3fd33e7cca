"""What every process measured, over all its incarnations.

Owns the series. Invariants: a counter or histogram never falls, whatever restarts; the cost of
all series together stays below a bound, beyond which new ones are refused and counted, never
silently lost.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from llmproto import limits
from llmproto.metrics import Distribution, Metrics, Sample

SECOND_NS: Final = 1_000_000_000
SILENT_NS: Final = 60 * SECOND_NS
"""Services report at least every 10 s: the levels of one that was silent for so long are no longer
true, and its totals may be forgotten where room is needed."""
TEXT_BYTES_MAX: Final = limits.MESSAGE_BYTES_MAX * 3 // 4
"""What all series may take as text: it has to fit one message, with the kernel's own numbers."""
LINE_BYTES: Final = 48
"""Of a line beyond names and labels: the value, `le`, punctuation."""
LABELS_MAX: Final = 8
LABEL_BYTES_MAX: Final = 128
NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,127}")
LABEL: Final = re.compile(r"(?!__|process$|le$)[a-zA-Z_][a-zA-Z0-9_]{0,63}")

Labels = tuple[tuple[str, str], ...]


class SeriesName(NamedTuple):
    """One line (or one histogram) of one process."""

    name: str
    labels: Labels


class Counter:
    """A total that never falls.

    Invariant: `value` is what ended incarnations counted plus what the present one said last.
    Source: counter resets as Prometheus treats them (documentation of `increase()`).
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._now = 0.0

    @property
    def value(self) -> float:
        """Over all incarnations."""
        return self._before + self._now

    def restart(self) -> None:
        """The next report begins at zero again."""
        self._before += self._now
        self._now = 0.0

    def take(self, total: float) -> None:
        """The total since the start of the process; a lower one means that it started anew."""
        if total < self._now:
            self.restart()
        self._now = total


class Histogram:
    """Counts in buckets that never fall; see Counter."""

    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self._counts = [Counter() for _ in range(len(bounds) + 1)]
        self._sum = Counter()

    @property
    def counts(self) -> list[int]:
        """In each bucket alone, the open one last."""
        return [int(count.value) for count in self._counts]

    @property
    def sum(self) -> float:
        """Of all observations."""
        return self._sum.value

    def restart(self) -> None:
        """The next report begins at zero again."""
        for counter in (self._sum, *self._counts):
            counter.restart()

    def take(self, distribution: Distribution) -> None:
        """Totals since the start of the process."""
        if any(new < old._now for new, old in zip(distribution.counts, self._counts)):
            self.restart()
        for counter, count in zip(self._counts, distribution.counts):
            counter.take(count)
        self._sum.take(distribution.sum)


class Reporter:
    """One process, under its name, over all its incarnations."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.heard_ns = 0
        self.counters: dict[SeriesName, Counter] = {}
        self.histograms: dict[SeriesName, Histogram] = {}
        self.gauges: dict[SeriesName, float] = {}

    def restart(self, incarnation: int) -> None:
        """Another incarnation reports."""
        self.incarnation = incarnation
        for counter in self.counters.values():
            counter.restart()
        for histogram in self.histograms.values():
            histogram.restart()
        self.gauges = {}

    @property
    def bytes(self) -> int:
        """What its series cost."""
        gauges_and_counters = (*self.counters, *self.gauges)
        return sum(map(_cost, gauges_and_counters)) + sum(
            _cost(name, lines=len(histogram.bounds) + 3)
            for name, histogram in self.histograms.items()
        )


class Totals:
    """All reporters, by name of process.

    Invariant (`check`): their series cost at most TEXT_BYTES_MAX, and at most PROCESSES_MAX report.
    """

    def __init__(self) -> None:
        self.reporters: dict[str, Reporter] = {}
        self.refused = 0
        """Series and reports that were not taken: no room, or no valid name."""
        self._bytes = 0

    def take(self, now_ns: int, metrics: Metrics) -> None:
        """One report; of an incarnation that has ended already: nothing."""
        reporter = self._reporter(now_ns, metrics)
        if reporter is None or metrics.incarnation < reporter.incarnation:
            return
        if metrics.incarnation > reporter.incarnation:
            reporter.restart(metrics.incarnation)
        reporter.heard_ns = now_ns
        reporter.gauges = {}
        self._bytes = sum(each.bytes for each in self.reporters.values())
        for sample in metrics.counters:
            name = self._admit(now_ns, sample, reporter.counters)
            if name is not None:
                reporter.counters.setdefault(name, Counter()).take(max(sample.value, 0.0))
        for sample in metrics.gauges:
            name = self._admit(now_ns, sample, reporter.gauges)
            if name is not None:
                reporter.gauges[name] = sample.value
        for distribution in metrics.histograms:
            self._take_histogram(now_ns, reporter, distribution)

    def silence(self, now_ns: int) -> None:
        """Forget the levels of those that report no more."""
        for reporter in self.reporters.values():
            if now_ns - reporter.heard_ns >= SILENT_NS:
                reporter.gauges = {}

    def check(self) -> None:
        """Assert the invariant in full."""
        assert sum(each.bytes for each in self.reporters.values()) <= TEXT_BYTES_MAX
        assert len(self.reporters) <= limits.PROCESSES_MAX
        for reporter in self.reporters.values():
            for histogram in reporter.histograms.values():
                assert len(histogram.counts) == len(histogram.bounds) + 1

    def _reporter(self, now_ns: int, metrics: Metrics) -> Reporter | None:
        found = self.reporters.get(metrics.process)
        if found is not None:
            return found
        if len(self.reporters) >= limits.PROCESSES_MAX and not self._forget_one(now_ns):
            self.refused += 1
            return None
        return self.reporters.setdefault(metrics.process, Reporter(metrics.incarnation))

    def _take_histogram(self, now_ns: int, reporter: Reporter, distribution: Distribution) -> None:
        bounds = distribution.bounds
        ascending = all(low < high for low, high in itertools.pairwise(bounds))
        if not ascending or len(distribution.counts) != len(bounds) + 1:
            self.refused += 1
            return
        lines = len(bounds) + 3
        name = self._admit(now_ns, distribution, reporter.histograms, lines=lines)
        if name is None:
            return
        histogram = reporter.histograms.setdefault(name, Histogram(bounds))
        if histogram.bounds != bounds:  # another release of the service: nothing adds up
            self.refused += 1
            return
        histogram.take(distribution)

    def _admit(
        self,
        now_ns: int,
        sample: Sample | Distribution,
        known: Mapping[SeriesName, object],
        *,
        lines: int = 1,
    ) -> SeriesName | None:
        """The name under which it is kept; None, and counted, where there is no room for it."""
        name = SeriesName(sample.name, tuple(sorted(sample.labels.items())))
        if name in known:
            return name
        cost = _cost(name, lines=lines)
        if _is_valid(name) and self._has_room(now_ns, cost):
            self._bytes += cost
            return name
        self.refused += 1
        return None

    def _has_room(self, now_ns: int, cost: int) -> bool:
        while self._bytes + cost > TEXT_BYTES_MAX:
            if not self._forget_one(now_ns):
                return False
        return True

    def _forget_one(self, now_ns: int) -> bool:
        """Forget the process that was silent longest, if one was silent for long."""
        oldest = min(self.reporters, key=lambda name: self.reporters[name].heard_ns, default=None)
        if oldest is None or now_ns - self.reporters[oldest].heard_ns < SILENT_NS:
            return False
        self._bytes -= self.reporters.pop(oldest).bytes
        return True


def _is_valid(series: SeriesName) -> bool:
    return (
        NAME.fullmatch(series.name) is not None
        and len(series.labels) <= LABELS_MAX
        and all(
            LABEL.fullmatch(key) and len(value.encode()) <= LABEL_BYTES_MAX
            for key, value in series.labels
        )
    )


def _cost(series: SeriesName, *, lines: int = 1) -> int:
    """Bytes of text, at most: escaped characters count twice, and the family's header lines once a
    series."""
    return (lines + 1) * (LINE_BYTES + len(series.name) + _label_bytes(series.labels))


def _label_bytes(labels: Iterable[tuple[str, str]]) -> int:
    return sum(len(key) + 2 * len(value.encode()) + 4 for key, value in labels)
