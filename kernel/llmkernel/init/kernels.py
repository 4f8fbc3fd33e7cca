"""Which kernel rules, which one stands by, and when the next is due.

A decision table: it is told what happened and when, and says what to do; `loop` does it.
"""

from typing import Final

from llmproto import limits

from llmkernel.initlink import Link

SILENT_S: Final = limits.KERNEL_SILENT_MS / 1000
STANDBY_AFTER_S: Final = 1.0
"""A standby costs a core for a moment: not while the system starts or recovers."""
STABLE_S: Final = limits.RESTART_WINDOW_MS / 1000
"""A kernel that has lived so long clears the back-off."""


class Seat:
    """A kernel process, ruling or standing by."""

    def __init__(self, pid: int, link: Link) -> None:
        self.pid = pid
        self.link = link
        self.promoted_s = 0.0
        self.heard_s = 0.0
        self.beaten = False
        """It has said something since it was promoted."""
        self.killed = False
        """For silence or nonsense; its exit has not come yet."""


class Kernels:
    """At most one ruling and one standing by."""

    def __init__(self) -> None:
        self.ruling: Seat | None = None
        self.standby: Seat | None = None
        self.promotions = 0
        self.due_s: float | None = 0.0
        """When the next kernel is to rule; absent while one does."""
        self.standby_due_s: float | None = None
        self._failures = 0

    def seated(self, seat: Seat, now_s: float) -> None:
        """This one rules now."""
        self.ruling = seat
        self.promotions += 1
        self.due_s = None
        self.standby_due_s = now_s + STANDBY_AFTER_S
        seat.promoted_s = seat.heard_s = now_s

    def take_standby(self) -> Seat | None:
        """The standby, no longer standing by."""
        seat, self.standby = self.standby, None
        return seat

    def stands_by(self, seat: Seat) -> None:
        """Another standby was started."""
        self.standby = seat
        self.standby_due_s = None

    def busy(self, now_s: float) -> None:
        """Processes are being started: the next standby can wait."""
        if self.standby_due_s is not None:
            self.standby_due_s = max(self.standby_due_s, now_s + STANDBY_AFTER_S)

    def heard(self, seat: Seat, now_s: float) -> None:
        """It said something."""
        seat.heard_s = now_s
        seat.beaten = True

    def clock_gap(self, gap_s: float) -> None:
        """Init itself did not run for so long: that is not the kernel's silence."""
        if self.ruling is not None:
            self.ruling.heard_s += gap_s

    def silent(self, now_s: float) -> bool:
        """The ruling kernel has overstayed and is to be killed."""
        seat = self.ruling
        return seat is not None and not seat.killed and now_s >= seat.heard_s + SILENT_S

    def died(self, pid: int, now_s: float) -> Seat | None:
        """The seat of this pid, empty now; when the next is due follows from how long it lasted."""
        if self.standby is not None and self.standby.pid == pid:
            self.standby_due_s = now_s + STANDBY_AFTER_S
            return self.take_standby()
        seat = self.ruling
        if seat is None or seat.pid != pid:
            return None
        self.ruling = None
        lasted_s = now_s - seat.promoted_s
        self._failures = 1 if lasted_s >= STABLE_S else self._failures + 1
        self.due_s = now_s + (0.0 if self.standby is not None else self._back_off_s())
        return seat

    def next_s(self) -> float | None:
        """When the table has something to say next."""
        due = [self.due_s] if self.ruling is None else [self.standby_due_s]
        if self.ruling is not None and not self.ruling.killed:
            due.append(self.ruling.heard_s + SILENT_S)
        return min((at for at in due if at is not None), default=None)

    def _back_off_s(self) -> float:
        """None after a first death, then doubling."""
        if self._failures <= 1:
            return 0.0
        doublings = min(self._failures - 2, 16)
        return min(limits.BACKOFF_MS_FIRST << doublings, limits.BACKOFF_MS_MAX) / 1000
