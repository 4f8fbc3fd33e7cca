"""Totals, and when they are said."""

import asyncio
from collections.abc import Callable

import pytest
from libllm.events import Event, Post
from libllm.metrics import QUIET_S, REPORT_S, Instruments, Reporter
from libllm.port import Port
from llmproto.metrics import Distribution, Metrics, Sample


def test_a_report_holds_everything() -> None:
    made = Instruments()
    counter, gauge = made.counter("a_total"), made.gauge("b")
    histogram = made.histogram("c", (1.0, 2.0))
    counter.add()
    counter.add(2)
    gauge.value = 7
    for value in (0.5, 1.0, 1.5, 3.0):
        histogram.add(value)
    assert made.report("p", 3) == Metrics(
        "p",
        3,
        [Sample("a_total", 3.0)],
        [Sample("b", 7)],
        [Distribution("c", [1.0, 2.0], [2, 1, 1], 6.0)],
    )


def test_names_are_made_once_and_counters_say_that_they_are() -> None:
    made = Instruments()
    made.gauge("b")
    for again in (lambda: made.gauge("b"), lambda: made.counter("c")):
        with pytest.raises(AssertionError):
            again()
    with pytest.raises(AssertionError):
        made.histogram("h", (2.0, 1.0))


class Loop:
    """A clock that is moved by the test."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[tuple[float, Callable[[], None], asyncio.TimerHandle]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        handle = asyncio.TimerHandle(0.0, call, (), loop)
        self.timers.append((self.now_s + delay_s, call, handle))
        return handle

    def move(self, seconds: float) -> None:
        self.now_s += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now_s]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_s]
        for _, call, handle in due:
            if not handle.cancelled():
                call()


async def test_changes_are_said_soon_and_nothing_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event] = []
    port = Port(said.append)
    loop = Loop()
    monkeypatch.setattr(Port, "loop", loop)
    reporter = Reporter(port, lambda: Metrics("p", 1))
    reporter.changed()  # before it may speak
    reporter.start()
    assert said == [Post(Metrics("p", 1), "monitor")]
    loop.move(1.5)
    for _ in range(100):
        reporter.changed()
    assert len(said) == 1
    loop.move(REPORT_S - 1.5)
    assert len(said) == 2
    loop.move(QUIET_S - 0.1)
    assert len(said) == 2
    loop.move(0.1)
    assert len(said) == 3
    loop.move(5)
    reporter.changed()
    loop.move(0)
    assert len(said) == 4
    reporter.stop()
    assert len(said) == 5
    loop.move(100)
    assert len(said) == 5
