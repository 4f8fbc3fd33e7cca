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

from llmservices.executor.contract import (
    Admission,
    Computed,
    Counters,
    Failure,
    Proposal,
    Stepping,
    StepResult,
)
from llmservices.executor.costs import PromptCosts, StepCosts, announced_ms

RESEND_S: Final = limits.RUN_RESEND_MS / 1000


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


class Stop(msgspec.Struct, frozen=True):
    """No step follows; the thread ends."""


Order = Add | Drop | Mark | Resend | Stop


class Report(msgspec.Struct, frozen=True):
    """What the step thread has to say."""

    rows: list[Proposal]
    gave_back: list[tuple[bytes, int]]
    failed: list[Failure]
    blocks_free: int
    counters: Counters
    """As they stood then."""
    step_s: float | None = None
    """How long the step took, where this is the report of one."""
    vectors: list[Computed] = []
    """Of an encoder."""


class StepLoop:
    """One thread around one engine.

    Invariant: a proposal is reported once when it is made and again only when somebody asks, or
    when the watermark has not moved for RESEND_S.
    """

    def __init__(
        self,
        engine: Stepping,
        note: CrashNote,
        costs: StepCosts,
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
        self._prefilling: dict[int, int] = {}
        """Residency -> ids that were to be computed when it came; until its first proposal."""
        self._costs = costs
        self._pace = PromptCosts()
        self._announced_s = 0.0
        """Until when the kernel was told to be patient."""
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is at, and wait for that."""
        self.order(Stop())
        self._thread.join()

    def order(self, order: Order) -> None:
        """Called by the event loop's thread."""
        with self._condition:
            self._orders.append(order)
            self._condition.notify()

    # --- on the step thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
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

    def _obey(self) -> bool:
        """Do what was ordered; False when that is to end."""
        while self._orders:
            order = self._orders.popleft()
            match order:
                case Mark():
                    self._mark(order)
                case Add():
                    self._add(order.admission)
                case Drop():
                    self._marked_s = time.monotonic()
                    for residency in order.residencies:
                        self._drop(residency)
                case Resend():
                    self._resend(order)
                case Stop():
                    return False
        return True

    def _add(self, admission: Admission) -> None:
        try:
            self._engine.add(admission)
        except RemoteError as error:
            failure = Failure(admission.thread, admission.residency, error)
            self._say(StepResult([], [], [failure], self._engine.blocks_free))
        else:
            self._prefilling[admission.residency] = len(admission.tokens)

    def _drop(self, residency: int) -> None:
        self._engine.drop(residency)
        self._forget(residency)

    def _forget(self, residency: int) -> None:
        self._proposed.pop(residency, None)
        self._ends.pop(residency, None)
        self._prefilling.pop(residency, None)

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
        vectors = [each for residency in wanted for each in engine.computed(residency)]
        if rows or vectors:
            self._say(StepResult(rows, [], [], engine.blocks_free, vectors))

    def _step(self) -> None:
        counters = self._engine.counters
        before, prompts_before = counters.rows, counters.prefill_tokens
        self._announce()
        began_s = time.monotonic()
        result = self._engine.step(self._beside_tokens())
        self._note.clear()
        step_s = time.monotonic() - began_s
        rows = counters.rows - before
        if rows:
            self._costs.add(rows, step_s)
            self._pace.add(counters.prefill_tokens - prompts_before, step_s)
        for row in result.rows:
            self._proposed[row.residency] = row.position
            self._prefilling.pop(row.residency, None)
            if row.end:
                self._ends[row.residency] = row.position
        for computed in result.vectors:
            self._proposed[computed.residency] = 0
            self._prefilling.pop(computed.residency, None)
        for _, residency in result.gave_back:
            self._forget(residency)
        for failure in result.failed:
            self._forget(failure.residency)
        # The tokens of a step may come with the next one, which need not compute anything.
        if rows or result.rows or result.gave_back or result.failed:
            self._say(result, step_s)

    def _beside_tokens(self) -> int | None:
        """How much of prompts goes beside decodes."""
        wanted_ms = self._engine.config.mixed_step_ms
        return None if wanted_ms is None else self._pace.rows_within(wanted_ms / 1000)

    def _announce(self) -> None:
        """Ask for patience where the step may take long."""
        decoding = len(self._proposed) + len(self._prefilling)
        pending = sum(self._prefilling.values()) + decoding  # at most residents_max of them
        budget_ms = announced_ms(self._costs, min(pending, self._engine.config.step_tokens))
        if budget_ms is None:
            return
        until_s = time.monotonic() + budget_ms / 1000
        if until_s > self._announced_s:
            self._announced_s = until_s
            self._working(budget_ms)

    def _say(self, result: StepResult, step_s: float | None = None) -> None:
        self._report(
            Report(
                result.rows,
                result.gave_back,
                result.failed,
                result.blocks_free,
                msgspec.structs.replace(self._engine.counters),
                step_s,
                result.vectors,
            )
        )
