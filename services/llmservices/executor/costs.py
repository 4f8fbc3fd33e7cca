"""What a step will cost, by the steps that were.

From it follows how long a step may take before it counts as hung, which is announced where it is
longer than the kernel's own patience, and how much of a prompt fits beside answers under way.
"""

from typing import Final

from llmproto import limits

FORGET: Final = 0.98
"""Weight of the past at each step: the last fifty or so count."""
SAFETY: Final = 4.0
"""A step may take so many times what is predicted: contexts differ, and cores are shared."""
UNKNOWN_MS: Final = 60_000
"""Budget of a step whose like was never measured."""
PACE_WEIGHT: Final = 0.1
"""Of the newest step in a mean."""
EXTRAPOLATION: Final = 16
"""Up to so many times the largest step that was measured, the line is believed."""


class StepCosts:
    """base + slope x rows: a line through (rows, seconds), least squares with forgetting.

    Invariant: base and slope are never negative, so that more rows never cost less.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._rows = 0.0
        self._seconds = 0.0
        self._rows_rows = 0.0
        self._rows_seconds = 0.0
        self._rows_max = 0

    def add(self, rows: int, seconds: float) -> None:
        """One step was measured."""
        self._weight = FORGET * self._weight + 1.0
        self._rows = FORGET * self._rows + rows
        self._seconds = FORGET * self._seconds + seconds
        self._rows_rows = FORGET * self._rows_rows + rows * rows
        self._rows_seconds = FORGET * self._rows_seconds + rows * seconds
        self._rows_max = max(self._rows_max, rows)

    @property
    def line(self) -> tuple[float, float]:
        """(base, slope) in seconds; zeros before the first step."""
        if not self._weight:
            return 0.0, 0.0
        spread = self._weight * self._rows_rows - self._rows * self._rows
        slope = 0.0
        if spread > 1e-9 * self._rows_rows * self._weight:
            slope = (self._weight * self._rows_seconds - self._rows * self._seconds) / spread
        slope = max(0.0, slope)
        base = (self._seconds - slope * self._rows) / self._weight
        if base < 0.0:  # the line through the origin that fits best
            return 0.0, self._rows_seconds / self._rows_rows if self._rows_rows else 0.0
        return base, slope

    def budget_ms(self, rows: int) -> int:
        """How long a step of so many rows may take."""
        if rows > EXTRAPOLATION * self._rows_max:
            return UNKNOWN_MS
        base, slope = self.line
        predicted_ms = 1000 * SAFETY * (base + slope * rows)
        return min(limits.WORKING_MS_MAX, round(predicted_ms))


class PromptCosts:
    """What a step without prompts takes, and what each row of a prompt adds to one.

    Running means, each over steps of its own kind: neither is forgotten while the other kind comes.
    """

    def __init__(self) -> None:
        self._decode_s = 0.0
        self._row_s = 0.0

    def add(self, prompt_rows: int, seconds: float) -> None:
        """One step was measured."""
        if prompt_rows:
            row_s = max(0.0, seconds - self._decode_s) / prompt_rows
            self._row_s = _mean(self._row_s, row_s)
        else:
            self._decode_s = _mean(self._decode_s, seconds)

    def rows_within(self, seconds: float) -> int | None:
        """Rows of prompts that fit into a step of so long a time, or of twice a step's without
        them; None before both are known."""
        if not self._decode_s or not self._row_s:
            return None
        return int(max(seconds - self._decode_s, self._decode_s) / self._row_s)


def _mean(old: float, new: float) -> float:
    return old + PACE_WEIGHT * (new - old) if old else new


def announced_ms(costs: StepCosts, rows: int) -> int | None:
    """What is to be announced before a step; None where the kernel's own patience is enough."""
    budget_ms = costs.budget_ms(rows)
    return budget_ms if budget_ms > limits.STEP_BUDGET_MS // 2 else None
