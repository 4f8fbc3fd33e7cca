"""The step thread: takes orders, steps the engine, reports; nobody else touches the engine.

Orders and reports cross between the threads in two queues.  Both are bounded: orders by what the
kernel may have resident here, reports by `STEPS_AHEAD_MAX` steps beyond the watermark.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
from libllm.crashnotes import CrashNote
from llmproto import limits
from llmproto.errors import RemoteError

from llmservices.executor.contract import Admission, Failure, Proposal, StepResult
from llmservices.executor.core import Engine

RESEND_S: Final = limits.RUN_RESEND_MS / 1000
WARM_UP_TOKENS: Final = 64
SAFETY: Final = 4.0
"""A step may take so many times its predicted cost before it counts as hung."""


class Add(msgspec.Struct, frozen=True):
    """A thread arrives."""

    admission: Admission


class Drop(msgspec.Struct, frozen=True):
    """Residencies are over."""

    residencies: list[int]


class Mark(msgspec.Struct, frozen=True):
    """Committed up to these positions."""

    residencies: list[int]
    positions: list[int]


class Resend(msgspec.Struct, frozen=True):
    """Report again what lies beyond a position; of every residency where none is named."""

    residency: int | None = None
    position: int = 0


Order = Add | Drop | Mark | Resend


class Report(msgspec.Struct, frozen=True):
    """What the step thread has to say."""

    rows: list[Proposal]
    gave_back: list[tuple[bytes, int]]
    failed: list[Failure]
    blocks_free: int
    steps: int


class StepLoop:
    """One thread around one engine.

    Invariant: a proposal is reported once when it is made and again only when somebody asks, or
    when the watermark has not moved for RESEND_S.
    """

    def __init__(
        self,
        engine: Engine,
        note: CrashNote,
        *,
        report: Callable[[Report], None],
        broke: Callable[[BaseException], None],
        working: Callable[[int], None],
    ) -> None:
        """The callbacks are called on the step thread.  `working` announces a long step, in ms."""
        self._engine = engine
        self._note = note
        self._report = report
        self._broke = broke
        self._working = working
        self._orders: deque[Order] = deque()
        self._condition = threading.Condition()
        self._marked_s = time.monotonic()
        self._proposed: dict[int, int] = {}
        """Residency -> highest position proposed and not under the watermark."""
        self._ends: dict[int, int] = {}
        """Residency -> position of its end."""
        self._row_s = 0.0
        """Seconds a computed row takes, at the slowest seen lately."""
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def order(self, order: Order) -> None:
        """Called by the event loop's thread."""
        with self._condition:
            self._orders.append(order)
            self._condition.notify()

    # --- on the step thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._obey()
                if self._engine.runnable():
                    self._step()
                else:
                    self._wait()
        except BaseException as error:  # the process ends with it: nothing is repaired in place
            self._broke(error)

    def _wait(self) -> None:
        with self._condition:
            if not self._orders:
                self._condition.wait(RESEND_S if self._proposed else None)
        if self._proposed and time.monotonic() - self._marked_s > RESEND_S:
            self._marked_s = time.monotonic()
            self._resend(Resend())

    def _obey(self) -> None:
        while self._orders:
            order = self._orders.popleft()
            match order:
                case Mark():
                    self._mark(order)
                case Add():
                    self._add(order.admission)
                case Drop():
                    for residency in order.residencies:
                        self._drop(residency)
                case Resend():
                    self._resend(order)

    def _add(self, admission: Admission) -> None:
        try:
            self._engine.add(admission)
        except RemoteError as error:
            failure = Failure(admission.thread, admission.residency, error)
            self._say(StepResult([], [], [failure], self._engine.blocks_free))

    def _drop(self, residency: int) -> None:
        self._engine.drop(residency)
        self._proposed.pop(residency, None)
        self._ends.pop(residency, None)

    def _mark(self, mark: Mark) -> None:
        self._marked_s = time.monotonic()
        for residency, position in zip(mark.residencies, mark.positions):
            if self._ends.get(residency, position + 1) <= position:
                self._drop(residency)
                continue
            self._engine.watermark(residency, position)
            if self._proposed.get(residency, position + 1) <= position:
                del self._proposed[residency]

    def _resend(self, resend: Resend) -> None:
        engine = self._engine
        wanted = engine.residencies() if resend.residency is None else [resend.residency]
        after = resend.position - 1
        rows = [row for residency in wanted for row in engine.proposals_after(residency, after)]
        if rows:
            self._say(StepResult(rows, [], [], engine.blocks_free))

    def _step(self) -> None:
        before = self._engine.counters.rows
        began_s = time.monotonic()
        if self._proposed or self._row_s:
            budget_ms = int(self._row_s * self._engine.config.step_tokens * SAFETY * 1000)
            if budget_ms > limits.STEP_BUDGET_MS:
                self._working(min(budget_ms, limits.WORKING_MS_MAX))
        result = self._engine.step()
        self._note.clear()
        rows = self._engine.counters.rows - before
        if rows:
            row_s = (time.monotonic() - began_s) / rows
            self._row_s = max(row_s if rows >= WARM_UP_TOKENS else 0.0, 0.9 * self._row_s)
        for row in result.rows:
            self._proposed[row.residency] = row.position
            if row.end:
                self._ends[row.residency] = row.position
        for _, residency in result.gave_back:
            self._proposed.pop(residency, None)
        if result.rows or result.gave_back or result.failed:
            self._say(result)

    def _say(self, result: StepResult) -> None:
        self._report(
            Report(
                result.rows,
                result.gave_back,
                result.failed,
                result.blocks_free,
                self._engine.counters.steps,
            )
        )
