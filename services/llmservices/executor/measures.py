"""What an executor counts, for the monitor."""

from libllm.metrics import Instruments
from llmproto.metrics import Metrics

from llmservices.executor.steploop import Report


class Measures:
    """Totals of the engine, and how long its steps take."""

    def __init__(self) -> None:
        made = Instruments()
        self._instruments = made
        self._steps = made.counter("llmos_executor_steps_total")
        self._rows = made.counter("llmos_executor_rows_total")
        self._tokens = made.counter("llmos_executor_tokens_total")
        self._cached = made.counter("llmos_executor_cached_tokens_total")
        self._gave_back = made.counter("llmos_executor_gave_back_total")
        self._residents = made.gauge("llmos_executor_residents")
        self._blocks = made.gauge("llmos_executor_blocks")
        self._blocks_free = made.gauge("llmos_executor_blocks_free")
        self._step = made.histogram("llmos_executor_step_seconds")

    def take(self, report: Report) -> None:
        """The step thread has said something."""
        counters = report.counters
        self._steps.value = counters.steps
        self._rows.value = counters.rows
        self._tokens.value = counters.tokens
        self._cached.value = counters.cached_tokens
        self._gave_back.value = counters.gave_back
        if report.step_s is not None:
            self._step.add(report.step_s)

    def report(
        self, process: str, incarnation: int, *, residents: int, blocks: int, blocks_free: int
    ) -> Metrics:
        """All of it, with the levels of this moment."""
        self._residents.value = residents
        self._blocks.value = blocks
        self._blocks_free.value = blocks_free
        return self._instruments.report(process, incarnation)
