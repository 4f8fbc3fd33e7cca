"""Work is paid for with rest, and nothing else is."""

import threading
from types import SimpleNamespace

import pytest
from llmproto import limits
from llmservices.trainer import pace
from llmservices.trainer.pace import Pace


class Clock:
    """Time that passes only where it is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(threading.Condition, "wait", self.wait)

    def wait(self, seconds: float) -> bool:
        self.now_s += seconds
        return False

    def rested(self, what: Pace) -> float:
        before = self.now_s
        what.rest()
        return self.now_s - before


def test_a_share_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = Pace()
    clock.now_s += 1.0
    assert clock.rested(found) == 0.0
    found.set(0.25, stop=False)
    clock.now_s += 2.0
    assert clock.rested(found) == pytest.approx(6.0)
    clock.now_s += 1.0
    assert clock.rested(found) == pytest.approx(3.0)


def test_waiting_and_the_start_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = Pace()
    found.set(0.25, stop=False)
    clock.now_s += 30.0  # a base is loaded
    found.begin()
    with found.waiting():
        clock.now_s += 20.0  # the data service is started
    clock.now_s += 1.0
    assert clock.rested(found) == pytest.approx(3.0)


def test_no_rest_looks_as_if_the_job_were_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = Pace()
    found.set(0.25, stop=False)
    clock.now_s += 1000.0
    assert clock.rested(found) * 1000 < limits.JOB_SILENT_MS / 2


def test_a_stop_ends_the_rest() -> None:
    found = Pace()
    found.set(0.01, stop=True)
    found.rest()
    assert found.is_stopping
