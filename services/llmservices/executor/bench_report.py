"""What the bench of the engine found, as one document and as a table.  Pure: figures in, text out.

Invariant: every fraction is the quotient of two medians that stand beside it.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec
from rich.table import Table

from llmservices.executor.roofline import Ceilings


class Spread(msgspec.Struct, frozen=True):
    """Of repeated figures."""

    median: float
    least: float
    greatest: float


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One case; its ceilings were measured in turns with it, or not at all (absent)."""

    case: Literal["decode", "prefill"]
    streams: int
    context: int
    """Tokens of each prompt."""
    tokens_per_s: Spread
    bytes_per_token: float | None
    """Read; absent for a prefill, whose rows share what is read."""
    operations_per_token: float
    """A product and a sum are two."""
    dot: str
    """Dot products that the weights are computed with."""
    read_bytes_per_s: float | None
    operations_per_s: float
    read_bandwidth: Spread | None
    """Bytes a second that the processor reads at most."""
    dot_peak: Spread | None
    """Operations a second at most."""
    bandwidth_fraction: float | None
    arithmetic_fraction: float | None


class Report(msgspec.Struct, frozen=True):
    """All of a run."""

    arguments: dict[str, object]
    path: str
    """Precision and code path, in the words of `llmos ps`."""
    weight_bytes: int
    kv_token_bytes: int
    figures: list[Figure]
    dot_operations_per_s: dict[str, Spread]
    """Peaks of every kind over the whole run."""
    torch: str
    python: str


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def figure(
    case: Literal["decode", "prefill"],
    *,
    streams: int,
    context: int,
    tokens_per_s: Sequence[float],
    bytes_per_token: float | None,
    operations_per_token: float,
    dot: str,
    ceilings: Sequence[Ceilings],
) -> Figure:
    """From what was measured to what it means."""
    rate = spread(tokens_per_s)
    read = None if bytes_per_token is None else rate.median * bytes_per_token
    operations = rate.median * operations_per_token
    bandwidth = spread([each.read_bytes_per_s for each in ceilings]) if ceilings else None
    peak = spread([each.dot_operations_per_s[dot] for each in ceilings]) if ceilings else None
    return Figure(
        case=case,
        streams=streams,
        context=context,
        tokens_per_s=rate,
        bytes_per_token=bytes_per_token,
        operations_per_token=operations_per_token,
        dot=dot,
        read_bytes_per_s=read,
        operations_per_s=operations,
        read_bandwidth=bandwidth,
        dot_peak=peak,
        bandwidth_fraction=None if read is None or bandwidth is None else read / bandwidth.median,
        arithmetic_fraction=None if peak is None else operations / peak.median,
    )


def table(report: Report) -> Table:
    """A line for each case."""
    title = f"{report.arguments['shape']}, {report.path}, {report.arguments['threads']} threads"
    made = Table(title=f"{title}; tokens/s: median (lowest-highest)")
    heads = ("case", "streams", "context", "tokens/s", "MB/token", "GB/s", "of read", "GFLOP/token")
    for head in (*heads, "TFLOP/s", "of dot peak"):
        made.add_column(head, justify="left" if head == "case" else "right", no_wrap=True)
    for each in report.figures:
        rate = each.tokens_per_s
        made.add_row(
            each.case,
            str(each.streams),
            str(each.context),
            f"{rate.median:.1f} ({rate.least:.1f}-{rate.greatest:.1f})",
            _scaled(each.bytes_per_token, 1e6),
            _scaled(each.read_bytes_per_s, 1e9),
            _share(each.bandwidth_fraction, each.read_bandwidth, 1e9, "GB/s"),
            f"{each.operations_per_token / 1e9:.2f}",
            f"{each.operations_per_s / 1e12:.3f}",
            _share(each.arithmetic_fraction, each.dot_peak, 1e12, each.dot),
        )
    return made


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"


def _share(fraction: float | None, ceiling: Spread | None, unit: float, name: str) -> str:
    if fraction is None or ceiling is None:
        return "-"
    return f"{fraction:.0%} of {ceiling.median / unit:.2f} {name}"
