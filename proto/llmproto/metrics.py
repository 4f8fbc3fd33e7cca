"""Conversation 0x07: measurements to the monitor, and out again."""

from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto.base import Int53, Message, Name


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One counter (a total since the start of the process) or gauge (a level)."""

    name: Name
    value: float
    labels: dict[str, str] = {}


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """One histogram, as totals since the start of the process."""

    name: Name
    bounds: Annotated[list[float], Meta(max_length=64)]
    """Upper bounds of the buckets, ascending; one more bucket is open."""
    counts: Annotated[list[Int53], Meta(max_length=65)]
    sum: float
    labels: dict[str, str] = {}


class Metrics(Message, frozen=True):
    """Service -> `monitor`, every few seconds: its totals.  Not answered; a lost one costs
    nothing."""

    process: Name
    incarnation: Int53
    counters: Annotated[list[Sample], Meta(max_length=4096)] = []
    gauges: Annotated[list[Sample], Meta(max_length=4096)] = []
    histograms: Annotated[list[Distribution], Meta(max_length=1024)] = []


class MetricsAsk(Message, frozen=True):
    """Anyone -> `monitor`.  Answered by MetricsText."""


class MetricsText(Message, frozen=True):
    """`monitor` -> requester, answers MetricsAsk."""

    text: str
    """Prometheus text exposition format 0.0.4."""
