"""How much of its device a job may take: obeyed between micro-batches, by sleeping.

Only work is paid for with rest: what the step thread waits for, or does before the first step, is
none.  A rest is shorter than the silence after which a job counts as stuck.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

from llmproto import limits

HOLD_S: Final = 1.0
"""A held job looks again after so long."""
REST_S_MAX: Final = limits.JOB_SILENT_MS / 1000 / 4
"""However long the work was: rest is no progress, and without progress the kernel ends a job."""


class Pace:
    """Set by the event loop, obeyed by the step thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._share = 1.0
        self._stop = False
        self._since_s = time.monotonic()

    def set(self, share: float, *, stop: bool) -> None:
        """From now on."""
        with self._changed:
            self._share = share
            self._stop = self._stop or stop
            self._changed.notify_all()

    @property
    def is_stopping(self) -> bool:
        """A checkpoint is wanted, and then the end."""
        return self._stop

    def begin(self) -> None:
        """Work begins here."""
        self._since_s = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is no work of this job."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._since_s += time.monotonic() - began_s

    def rest(self) -> None:
        """Called between pieces of work: with share s, sleep d (1 - s) / s after d of work, at most
        REST_S_MAX."""
        worked_s = time.monotonic() - self._since_s
        with self._changed:
            began_s = time.monotonic()
            while not self._stop and self._share < 1.0:
                share = self._share
                rest_s = HOLD_S
                if share > 0.0:
                    rest_s = min(REST_S_MAX, worked_s * (1.0 - share) / share)
                left_s = began_s + rest_s - time.monotonic()
                if left_s <= 0.0 and share > 0.0:
                    break
                self._changed.wait(HOLD_S if share <= 0.0 else left_s)
        self._since_s = time.monotonic()
