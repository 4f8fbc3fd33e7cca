"""The monitor's numbers, read back from Prometheus' text format.

Source: Prometheus text exposition format 0.0.4.
"""

import re
from collections.abc import Sequence

import msgspec

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


class Measure(msgspec.Struct, frozen=True):
    """One sample."""

    name: str
    labels: dict[str, str]
    value: float


def read(text: str) -> list[Measure]:
    """The samples; lines of another form are passed over, as the format asks of readers."""
    measures = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        measures.append(Measure(match[1], dict(_LABEL.findall(match[2] or "")), value))
    return measures


def lines(measures: Sequence[Measure]) -> list[str]:
    """For people: the sums of counters over processes, without the parts of histograms."""
    sums: dict[str, float] = {}
    for measure in measures:
        if _is_total(measure):
            sums[measure.name] = sums.get(measure.name, 0.0) + measure.value
    return [f"  {name:<40} {_number(value)}" for name, value in sums.items() if value]


def document(measures: Sequence[Measure]) -> list[Measure]:
    """For programs: all but the buckets of histograms."""
    return [measure for measure in measures if "le" not in measure.labels]


def _is_total(measure: Measure) -> bool:
    return measure.name.startswith("llmos_") and measure.name.endswith("_total")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.3f}"
