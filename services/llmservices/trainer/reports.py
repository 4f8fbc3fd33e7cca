"""Steps on their way to the kernel: said in batches, and again until they are journaled.

Invariant: what is held is the reports beyond the mark, in order; never more than HELD_MAX.
"""

import threading
from typing import Final

from llmproto import limits
from llmproto.jobs import StepReport

HELD_MAX: Final = limits.JOB_REPORTS_MAX
"""The step thread waits beyond that: the kernel would not journal more without a checkpoint."""
BATCH_MAX: Final = 1024


class Backlog:
    """Filled by the step thread, sent by the event loop."""

    def __init__(self) -> None:
        self._room = threading.Condition()
        self._held: list[StepReport] = []
        self._mark = 0

    def add(self, report: StepReport) -> None:
        """Waits for room."""
        with self._room:
            self._room.wait_for(lambda: len(self._held) < HELD_MAX)
            if report.step > self._mark:
                self._held.append(report)

    def marked(self, step: int) -> None:
        """Journaled up to here."""
        with self._room:
            self._mark = max(self._mark, step)
            self._held = [report for report in self._held if report.step > self._mark]
            self._room.notify_all()

    def next(self) -> list[StepReport]:
        """The oldest."""
        with self._room:
            return self._held[:BATCH_MAX]
