"""Can a request make progress?  An open port says nothing of that."""

from typing import Final

from llmproto.models import Models, ModelState
from llmproto.operation import Status

STILL_NS: Final = 60_000_000_000
"""Threads that are running, and no token in so long: nothing moves."""
SINK: Final = "tokenizer"


class Health:
    """Judges what the kernel says; remembers when it last saw tokens move."""

    def __init__(self) -> None:
        self._seen = (0, 0)
        """Kernel epoch and tokens committed."""
        self._moved_ns: int | None = None

    def reasons(self, now_ns: int, status: Status, models: Models) -> list[str]:
        """Why no request can make progress; none: it can."""
        reasons = [each for each in status.not_ready if each.partition(":")[0] == SINK]
        if status.journal_full:
            reasons.append(f"the journal is full ({status.journal_bytes} bytes): nothing is taken")
        if not models.rows:
            reasons.append("there is no model")
        elif all(row.state is ModelState.FAILED for row in models.rows):
            failed = models.rows[0]
            reasons.append(f"no model can be loaded ({failed.model.name}: {failed.detail})")
        still_ns = self._still_ns(now_ns, status)
        if still_ns >= STILL_NS:
            reasons.append(
                f"{status.threads_running} threads are running and no token was committed for "
                f"{still_ns // 1_000_000_000} s"
            )
        return reasons

    def _still_ns(self, now_ns: int, status: Status) -> int:
        seen = (status.kernel_epoch, status.tokens_committed)
        if seen != self._seen or self._moved_ns is None or not status.threads_running:
            self._seen, self._moved_ns = seen, now_ns
        return now_ns - self._moved_ns
