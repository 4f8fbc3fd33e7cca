"""The totals and the kernel's own numbers as Prometheus text (format 0.0.4).

A family has one type and each of its lines one value: where two reports give one name to different
things, the first that is listed has it, and the others are left out and counted.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from llmproto.operation import Processes, ProcessRow, ProcessState, Status
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from llmservices.monitor.core import Histogram, Labels, Totals

COMMITTED: Final = "llmos_tokens_committed_total"


class Families(Collector):
    """Metric families under construction, each name once."""

    def __init__(self) -> None:
        self._by_name: dict[str, Metric] = {}
        self._lines: set[tuple[str, frozenset[tuple[str, str]]]] = set()
        self.conflicts = 0

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        return self._by_name.values()

    def counter(self, name: str, labels: dict[str, str], value: float) -> None:
        """A total; the name gets the suffix `_total` that the format asks for."""
        family = name.removesuffix("_total")
        self._add(family, "counter", [(f"{family}_total", labels, value)])

    def gauge(self, name: str, labels: dict[str, str], value: float) -> None:
        """A level."""
        self._add(name, "gauge", [(name, labels, value)])

    def histogram(self, name: str, labels: dict[str, str], histogram: Histogram) -> None:
        """Cumulative buckets, as the format wants them."""
        bounds = [repr(float(bound)) for bound in histogram.bounds] + ["+Inf"]
        lines = []
        seen = 0
        for bound, count in zip(bounds, histogram.counts, strict=True):
            seen += count
            lines.append((f"{name}_bucket", {**labels, "le": bound}, float(seen)))
        lines.append((f"{name}_count", labels, float(seen)))
        lines.append((f"{name}_sum", labels, histogram.sum))
        self._add(name, "histogram", lines)

    def _add(
        self, name: str, kind: str, lines: Iterable[tuple[str, dict[str, str], float]]
    ) -> None:
        family = self._by_name.get(name)
        if family is None:
            family = self._by_name[name] = Metric(name, "", kind)
        for line_name, labels, value in lines:
            line = (line_name, frozenset(labels.items()))
            if family.type != kind or line in self._lines:
                self.conflicts += 1
                return
            self._lines.add(line)
            family.add_sample(line_name, labels, value)


def render(totals: Totals, status: Status | None, processes: Processes | None) -> str:
    """All there is to say; without the kernel's part where it did not answer."""
    families = Families()
    families.gauge("llmos_kernel_up", {}, float(status is not None))
    if status is not None:
        _add_status(families, status)
    if processes is not None:
        for row in processes.rows:
            _add_process(families, row)
    for process, reporter in totals.reporters.items():
        for series, counter in reporter.counters.items():
            families.counter(series.name, _labels(series.labels, process), counter.value)
        for series, value in reporter.gauges.items():
            families.gauge(series.name, _labels(series.labels, process), value)
        for series, histogram in reporter.histograms.items():
            families.histogram(series.name, _labels(series.labels, process), histogram)
    families.counter("llmos_monitor_refused_total", {}, float(totals.refused))
    families.gauge("llmos_monitor_conflicts", {}, float(families.conflicts))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(families)
    return generate_latest(registry).decode()


def _labels(labels: Labels, process: str) -> dict[str, str]:
    return {**dict(labels), "process": process}


def _add_status(families: Families, status: Status) -> None:
    families.gauge("llmos_info", {"version": status.version}, 1.0)
    families.gauge("llmos_ready", {}, float(status.ready))
    families.gauge("llmos_kernel_epoch", {}, float(status.kernel_epoch))
    families.gauge("llmos_kernel_uptime_seconds", {}, status.uptime_ms / 1000)
    for state, threads in _threads(status):
        families.gauge("llmos_threads", {"state": state}, float(threads))
    families.gauge("llmos_journal_bytes", {}, float(status.journal_bytes))
    families.gauge("llmos_journal_full", {}, float(status.journal_full))
    families.gauge("llmos_sessions", {}, float(status.sessions))
    for device in status.devices:
        labels = {"device": device.name, "kind": device.kind}
        families.gauge("llmos_device_memory_bytes", labels, float(device.memory_bytes))
        granted = float(device.memory_granted_bytes)
        families.gauge("llmos_device_memory_granted_bytes", labels, granted)
        families.gauge("llmos_device_cores", labels, float(len(device.cores)))


def _threads(status: Status) -> Iterator[tuple[str, int]]:
    yield "queued", status.threads_queued
    yield "running", status.threads_running
    yield "ended", status.threads_ended


def _add_process(families: Families, row: ProcessRow) -> None:
    labels = {"process": row.name, "role": row.role}
    families.gauge("llmos_process_up", labels, float(row.state is ProcessState.READY))
    families.gauge(
        "llmos_process_quarantined", labels, float(row.state is ProcessState.QUARANTINED)
    )
    families.gauge("llmos_process_threads", labels, float(row.threads))
    families.gauge("llmos_process_uptime_seconds", labels, row.uptime_ms / 1000)
    families.counter("llmos_process_restarts_total", labels, float(max(row.incarnation - 1, 0)))
    if row.lease is not None:
        families.gauge("llmos_process_lease_bytes", labels, float(row.lease.memory_bytes))
