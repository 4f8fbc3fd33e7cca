"""Init's one loop: a single thread that polls, forks, kills, reaps and reports.

No policy: what runs and what is restarted is the kernel's decision.  Init decides on kernels alone:
there shall be one, and it shall beat.
"""

import os
import selectors
import signal
import time
from collections.abc import Sequence
from typing import Final, assert_never

import msgspec
from llmproto import limits
from llmproto.errors import RemoteError
from llmproto.init import (
    Exit,
    Exited,
    Fork,
    Forked,
    Halt,
    InitMessage,
    KernelBeat,
    Promoted,
    Signal,
    Stop,
)

from llmkernel import initlink
from llmkernel.init import image, logs
from llmkernel.init.children import Children, Process, not_started
from llmkernel.init.home import Claim
from llmkernel.init.image import Image
from llmkernel.init.kernels import Kernels, Seat
from llmkernel.init.logs import Log
from llmkernel.init.oom import OomCount
from llmkernel.init.stop import Phase, Stopping

QUIET_S: Final = 0.05
"""The image is imported when nothing was started for so long."""
UNASKED_S: Final = 1.0
"""Under a kernel that starts nothing it waits so long: importing holds up whoever asks next."""
HOUSEKEEPING_S: Final = 5.0
ENDING_POLL_S: Final = 0.02
GAP_S: Final = 0.25
"""A turn that comes later than planned by more was kept from running."""
HEARD_S: Final = limits.BEAT_MS / 1000
"""A kernel that beats so long after it was told of an exit has read it."""


class Programs(msgspec.Struct, frozen=True):
    """What init starts by itself."""

    kernel: str = "llmkernel"
    """Module of the kernel; a standby gets the argument `--standby`."""
    standby: bool = True
    image: Sequence[str] = image.MODULES
    """Imported into the image of forked children."""


class Init:
    """The process.  Everything it knows of kernels, children and its own end lies in its tables."""

    def __init__(self, claim: Claim, oom: OomCount, programs: Programs) -> None:
        self._programs = programs
        self._claim = claim
        self._oom = oom
        self._log = Log()
        self._children = Children(claim.home, oom, self._log)
        self._image = Image(programs.image, self._log)
        self._kernels = Kernels()
        self._stopping = Stopping()
        self._selector = selectors.DefaultSelector()
        self._boot_id = os.urandom(16)
        self._waiting: list[Fork] = []  # for the image
        self._exits: dict[tuple[str, int], tuple[Exit, float | None]] = {}  # and when it was told
        self._busy_s = 0.0
        self._housekeeping_s = 0.0
        self._planned_s = 0.0
        self._done = False

    def run(self) -> None:
        """Until everything has ended."""
        wakeup = self._watch_signals()
        self._children.start_guard(self._claim.lock_fd)
        self._planned_s = time.monotonic()
        while not self._done:
            self._do_what_is_due(time.monotonic())
            if self._done:
                break
            now_s = time.monotonic()
            timeout_s = max(0.0, self._next_s(now_s) - now_s)
            self._planned_s = now_s + timeout_s
            ready = self._selector.select(timeout_s)
            self._notice_gap(time.monotonic())
            for key, _ in ready:
                if key.fileobj == wakeup:
                    self._take_signals(os.read(wakeup, 4096))
                else:
                    self._serve(key.data)
            self._reap(time.monotonic())
        self._children.end_guard()
        self._claim.release()
        self._log.info("ended")

    # --- what happens -------------------------------------------------------------------------

    def _watch_signals(self) -> int:
        """The descriptor that becomes readable with each signal's number."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the byte in the pipe is all that is wanted
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._selector.register(read_end, selectors.EVENT_READ)
        return read_end

    def _take_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._log.info("told to end", signal=number)
                if self._stopping.ask(time.monotonic()) and self._kernels.ruling is not None:
                    self._send(self._kernels.ruling, Stop())

    def _notice_gap(self, now_s: float) -> None:
        gap_s = now_s - self._planned_s
        if gap_s > GAP_S:
            self._kernels.clock_gap(gap_s)

    def _serve(self, seat: Seat) -> None:
        """The link of a kernel is readable or writable."""
        try:
            messages = seat.link.receive()
        except RemoteError as error:
            self._log.error("kernel speaks nonsense", reason=error.detail)
            seat.killed = True
            self._children.kill(seat.pid)
            messages = []
        if seat is self._kernels.ruling:
            for message in messages:
                self._kernels.heard(seat, time.monotonic())
                self._handle(message)
        self._watch(seat)

    def _handle(self, message: InitMessage) -> None:
        match message:
            case Fork():
                self._fork(message)
            case Signal():
                self._children.signal(message.pid, message.incarnation, message.signal)
            case KernelBeat():
                self._forget_heard_exits(time.monotonic())
            case Halt():
                self._stopping.halt(time.monotonic())
            case Promoted() | Forked() | Exited() | Stop():
                self._log.error("only init says this", message=type(message).__name__)
            case _:
                assert_never(message)

    def _fork(self, message: Fork) -> None:
        now_s = time.monotonic()
        self._kernels.busy(now_s)
        if message.spec.fork and not self._image.loaded:
            if len(self._waiting) < limits.PROCESSES_MAX:
                self._waiting.append(message)
            else:
                self._tell(not_started(message.spec, message.incarnation), now_s)
            return
        self._busy_s = now_s
        as_image = message.spec.fork and self._image.usable
        result = self._children.fork(message.spec, message.incarnation, image=as_image)
        if isinstance(result, Exit):
            self._tell(result, now_s)
        elif self._kernels.ruling is not None:
            self._send(self._kernels.ruling, Forked(child=result))

    def _reap(self, now_s: float) -> None:
        for process in self._children.reap(now_s):
            self._ended(process, now_s)

    def _ended(self, process: Process, now_s: float) -> None:
        exit_ = process.exit
        assert exit_ is not None
        self._log.info(
            "ended",
            name=process.name,
            pid=process.pid,
            incarnation=process.incarnation,
            code=exit_.code,
            signal=exit_.signal,
        )
        if process.child is not None:
            self._tell(exit_, now_s)
            return
        for seat in (self._kernels.ruling, self._kernels.standby):
            if seat is not None and seat.pid == process.pid:
                self._serve(seat)  # its last words
        seat = self._kernels.died(process.pid, now_s)
        if seat is not None:
            self._unwatch(seat)
            seat.link.close()
            if self._kernels.ruling is None:
                self._waiting.clear()  # the next kernel asks anew

    # --- what the kernel is told --------------------------------------------------------------

    def _tell(self, exit_: Exit, now_s: float) -> None:
        """Report to the ruling kernel; kept for the next one until this one must have read it."""
        ruling = self._kernels.ruling
        self._exits[exit_.name, exit_.incarnation] = exit_, now_s if ruling else None
        if len(self._exits) > limits.PROCESSES_MAX:
            del self._exits[next(iter(self._exits))]
        if ruling is not None:
            self._send(ruling, Exited(exit=exit_))

    def _forget_heard_exits(self, now_s: float) -> None:
        for key, (_, told_s) in list(self._exits.items()):
            if told_s is not None and now_s >= told_s + HEARD_S:
                del self._exits[key]

    def _send(self, seat: Seat, message: InitMessage) -> None:
        seat.link.send(message)
        self._watch(seat)

    def _watch(self, seat: Seat) -> None:
        """Ask for what can happen next on this link."""
        seat.link.flush()
        key = self._selector.get_map().get(seat.link)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if seat.link.waiting else 0)
        if seat.link.closed:  # its exit is on the way
            self._unwatch(seat)
        elif key is None:
            self._selector.register(seat.link, events, seat)
        elif key.events != events:
            self._selector.modify(seat.link, events, seat)

    def _unwatch(self, seat: Seat) -> None:
        if seat.link in self._selector.get_map():
            self._selector.unregister(seat.link)

    # --- what is due --------------------------------------------------------------------------

    def _next_s(self, now_s: float) -> float:
        """When to look again if nothing happens."""
        due = [self._housekeeping_s, self._stopping.until_s]
        if not self._stopping.asked:
            due.append(self._kernels.next_s())
            due.append(self._image_due_s())
        if self._children.ending:
            due.append(now_s + ENDING_POLL_S)
        return min(at for at in due if at is not None)

    def _do_what_is_due(self, now_s: float) -> None:
        if now_s >= self._housekeeping_s:
            self._housekeeping_s = now_s + HOUSEKEEPING_S
            self._oom.refresh()
            for name in logs.rotate(self._claim.home.logs):
                self._log.info("rotated", file=name)
            self._children.start_guard(self._claim.lock_fd)
        if self._stopping.asked:
            self._stop(now_s)
            return
        if self._kernels.silent(now_s):
            self._kill_silent(now_s)
        if self._kernels.due_s is not None and now_s >= self._kernels.due_s:
            self._promote(now_s)
        standby_due_s = self._kernels.standby_due_s
        if standby_due_s is not None and now_s >= standby_due_s and self._programs.standby:
            self._start_standby(now_s)
        image_due_s = self._image_due_s()
        if image_due_s is not None and now_s >= image_due_s:
            self._load_image()

    def _kill_silent(self, now_s: float) -> None:
        seat = self._kernels.ruling
        assert seat is not None
        self._serve(seat)  # what lies in the link was said in time
        if self._kernels.silent(now_s):
            self._log.error("kernel is silent", pid=seat.pid, ms=limits.KERNEL_SILENT_MS)
            seat.killed = True
            self._children.kill(seat.pid)

    def _promote(self, now_s: float) -> None:
        seat = self._kernels.take_standby() or self._new_kernel([])
        if seat is None:
            self._kernels.due_s = now_s + limits.BACKOFF_MS_MAX / 1000
            return
        self._kernels.seated(seat, now_s)
        exits = [exit_ for exit_, _ in self._exits.values()]
        self._exits = {key: (exit_, now_s) for key, (exit_, _) in self._exits.items()}
        self._send(
            seat,
            Promoted(
                boot_id=self._boot_id,
                children=self._children.living(),
                exits=exits,
                kernel_incarnation=self._kernels.promotions,
            ),
        )

    def _start_standby(self, now_s: float) -> None:
        seat = self._new_kernel(["--standby"])
        if seat is None:
            self._kernels.standby_due_s = now_s + limits.BACKOFF_MS_MAX / 1000
        else:
            self._kernels.stands_by(seat)
            self._watch(seat)

    def _new_kernel(self, arguments: list[str]) -> Seat | None:
        link, theirs = initlink.pair()
        try:
            pid = self._children.start_kernel(
                self._programs.kernel, arguments, theirs.fileno(), self._kernels.promotions + 1
            )
        except OSError as error:
            self._log.error("no kernel could be started", reason=str(error))
            link.close()
            return None
        finally:
            theirs.close()
        return Seat(pid, link)

    def _image_due_s(self) -> float | None:
        """The kernel is up, has started what it starts at once, and nothing more for a moment."""
        ruling = self._kernels.ruling
        if self._image.loaded or ruling is None or not ruling.beaten:
            return None
        if self._busy_s < ruling.promoted_s and not self._waiting:
            return ruling.promoted_s + UNASKED_S
        return max(self._busy_s, ruling.promoted_s) + QUIET_S

    def _load_image(self) -> None:
        started_s = time.monotonic()
        self._image.load()
        now_s = time.monotonic()
        self._kernels.clock_gap(now_s - started_s)
        self._log.info("image loaded", ms=int((now_s - started_s) * 1000))
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._fork(message)

    # --- the end ------------------------------------------------------------------------------

    def _stop(self, now_s: float) -> None:
        """One phase after another, each left early when nobody is left in it."""
        match self._stopping.advance(
            now_s, kernel=self._kernels.ruling, living=len(self._children)
        ):
            case Phase.TERMINATING:
                self._children.signal_all(signal.SIGTERM)
                self._children.signal_all(signal.SIGCONT)  # a stopped one cannot end
            case Phase.KILLING:
                self._children.signal_all(signal.SIGKILL)
            case Phase.ENDED:
                self._done = True
            case None:
                pass
