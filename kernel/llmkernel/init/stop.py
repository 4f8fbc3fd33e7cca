"""The phases in which the system ends."""

import enum
from typing import Final

STOP_GRACE_S: Final = 3.0
"""For the kernel to say Halt."""
TERMINATE_GRACE_S: Final = 1.0
"""From SIGTERM to SIGKILL."""
KILL_GRACE_S: Final = 5.0
"""A killed process that is not gone after so long hangs in the system; init ends without it."""


class Phase(enum.Enum):
    """What has begun."""

    ASKED = enum.auto()
    """The kernel finishes what it wants to finish."""
    TERMINATING = enum.auto()
    KILLING = enum.auto()
    ENDED = enum.auto()


class Stopping:
    """Phases only move forward."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self.until_s: float | None = None
        """The end of the current phase at the latest."""

    @property
    def asked(self) -> bool:
        """It has begun."""
        return self._phase is not None

    def ask(self, now_s: float) -> bool:
        """Begin; asked again, lose patience.  True when the kernel is to be told."""
        if self._phase is None:
            self._phase, self.until_s = Phase.ASKED, now_s + STOP_GRACE_S
            return True
        self.until_s = now_s
        return False

    def halt(self, now_s: float) -> None:
        """The kernel is done."""
        if self._phase in (None, Phase.ASKED):
            self._phase, self.until_s = Phase.ASKED, now_s

    def advance(self, now_s: float, *, kernel: object | None, living: int) -> Phase | None:
        """The phase that begins now, if one does."""
        assert self._phase is not None and self.until_s is not None
        over = now_s >= self.until_s
        if self._phase is Phase.ASKED and (over or kernel is None):
            self._phase, self.until_s = Phase.TERMINATING, now_s + TERMINATE_GRACE_S
        elif self._phase is Phase.TERMINATING and over and living:
            self._phase, self.until_s = Phase.KILLING, now_s + KILL_GRACE_S
        elif self._phase in (Phase.TERMINATING, Phase.KILLING) and (over or not living):
            self._phase = Phase.ENDED
        else:
            return None
        return self._phase
