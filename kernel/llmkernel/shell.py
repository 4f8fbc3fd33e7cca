"""The kernel's hands: sockets, journal, init and clock around the pure core; it decides nothing.

Order within a turn: all that has arrived is handled, facts are appended to the journal, and only
then the effects leave.  With `sync = "always"` they wait until their position is on disk.
"""

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, assert_never

import structlog
from libllm.config import Home
from libllm.crashnotes import read_note
from llmproto import init, wire
from llmproto.errors import RemoteError

from llmkernel import facts
from llmkernel.core import Kernel
from llmkernel.events import (
    Arrived,
    ChildExited,
    ChildForked,
    Effect,
    Event,
    Forward,
    Halt,
    HungKilled,
    JournalRoom,
    KillHung,
    Log,
    PeerFull,
    PeerLost,
    Record,
    Send,
    SignalChild,
    Start,
    StopAsked,
    Suspect,
    Ticked,
    Wake,
)
from llmkernel.initlink import Link
from llmkernel.journal import Journal
from llmkernel.port import Port
from llmkernel.rejected import reject

TICK_S: Final = 0.25
BEAT_S: Final = 0.5
COMPACT_BYTES: Final = 32 << 20
"""The journal is rewritten beyond this and twice what was live last time: bounds replay."""
COMPACT_FACTS: Final = 64
"""Facts rewritten in one turn."""
LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Clock:
    """Nanoseconds that never run backwards, across restarts of kernel and machine alike."""

    def __init__(self, floor_ns: int) -> None:
        """`floor_ns` is the latest time that the journal knows."""
        self._offset_ns = max(floor_ns, time.time_ns()) - time.monotonic_ns()
        self._last_ns = 0

    def now_ns(self) -> int:
        """The present."""
        self._last_ns = max(self._last_ns, time.monotonic_ns() + self._offset_ns)
        return self._last_ns


class Shell:
    """One kernel process at work."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        journal: Journal,
        clock: Clock,
        link: Link | None,
        home: Home,
        logger: structlog.typing.FilteringBoundLogger,
        wait_for_sync: bool,
        trace: Callable[[int, Event], None] | None = None,
    ) -> None:
        """`link` leads to init; absent where the kernel runs without one (tests)."""
        self._kernel = kernel
        self._journal = journal
        self._clock = clock
        self._link = link
        self._home = home
        self._logger = logger
        self._wait_for_sync = wait_for_sync
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._port: Port | None = None
        self._held: deque[tuple[int, Effect]] = deque()
        """Effects that wait for the disk, with their positions (`always` only)."""
        self._synced = 0
        self._wake: asyncio.TimerHandle | None = None
        self._wake_ns = 0
        self._ended = self._loop.create_future()
        self._compaction: tuple[int, Iterator[facts.AnyFact]] | None = None
        """The segment before which everything is said again, and what is still to be said."""
        self._live_bytes = 0
        self._room = True

    # --- life -------------------------------------------------------------------------------------

    async def run(self, socket: Path, first: Event) -> None:
        """Handle `first`, bind, and pump until told to end."""
        self.handle([first])
        self._port = Port(socket, self._arrived)
        if self._link is not None:
            self._loop.add_reader(self._link.fileno(), self._from_init)
        tick = self._loop.call_later(TICK_S, self._tick)
        self._port.drain()
        try:
            await self._ended
        finally:
            tick.cancel()
            self._port.close(100)

    def _arrived(self, batch: list[tuple[bytes, ...]]) -> None:
        self.handle([Arrived(message[0], message[1:]) for message in batch])

    def synced(self, position: int) -> None:
        """The journal is on disk up to here (called on the loop)."""
        self._synced = max(self._synced, position)
        while self._held and self._held[0][0] <= self._synced:
            self._perform(self._held.popleft()[1])
        self._look_again()

    # --- one turn ---------------------------------------------------------------------------------

    def handle(self, events: Iterable[Event]) -> None:
        """Handle events, journal what they decided, let the effects go."""
        pending = deque(events)
        while pending:
            event = pending.popleft()
            now_ns = self._clock.now_ns()
            if self._trace is not None:
                self._trace(now_ns, event)
            try:
                effects = self._kernel.handle(now_ns, event)
            except Exception as error:
                reject(self._home.journal / "rejected", self._kernel.tables, event, error)
                raise
            self._let_go(effects, pending)
        self._look_again()

    def _let_go(self, effects: list[Effect], pending: deque[Event]) -> None:
        position = 0
        for effect in effects:
            if isinstance(effect, Record):
                position = self._journal.append(facts.encode(effect.fact))
        if position and self._journal.room() is not self._room:
            self._room = not self._room
            pending.append(JournalRoom(self._room, self._journal.bytes_used))
        waits = self._wait_for_sync and (position > self._synced or bool(self._held))
        for effect in effects:
            if isinstance(effect, Record):
                continue
            if waits and isinstance(effect, Send | Forward):
                self._held.append((max(position, self._last_held()), effect))
            else:
                happened = self._perform(effect)
                if happened is not None:
                    pending.append(happened)

    def _last_held(self) -> int:
        return self._held[-1][0] if self._held else 0

    def _perform(self, effect: Effect) -> Event | None:
        """Do one thing; what came of it is an event, where it matters."""
        match effect:
            case Send():
                header = wire.encode_header(effect.header)
                return self._send(effect.peer, (header, wire.encode_body(effect.message)))
            case Forward():
                return self._send(effect.peer, (wire.encode_header(effect.header), *effect.body))
            case Start():
                self._to_init(init.Fork(effect.spec, effect.incarnation))
            case SignalChild() if effect.pid in (os.getpid(), os.getppid()):
                # Whoever asked is to have the answer, where the signal is our own end.
                self._loop.call_later(0.02, os.kill, effect.pid, effect.signal)
            case SignalChild():
                self._to_init(init.Signal(effect.pid, effect.incarnation, effect.signal))
            case KillHung():
                stopped = _is_stopped(effect.pid)
                self._to_init(init.Signal(effect.pid, effect.incarnation, signal.SIGKILL))
                return HungKilled(effect.process, effect.incarnation, stopped)
            case Wake():
                self._wake_at(effect.at_ns)
            case Log():
                self._logger.log(LEVELS[effect.level], effect.event, **effect.fields)
            case Halt():
                self._loop.call_later(0.1, self._halt)
            case Record():
                raise AssertionError("records are appended before anything is performed")
            case _:
                assert_never(effect)
        return None

    def _send(self, peer: bytes, frames: tuple[bytes, ...]) -> Event | None:
        if self._port is None:
            return None  # nobody has connected yet
        try:
            wire.check_size(frames)
        except RemoteError as error:
            self._logger.error("message too large", detail=error.detail)
            return None
        sent = self._port.send(peer, frames)
        if sent:
            return None
        return PeerFull(peer) if sent is None else PeerLost(peer)

    def _look_again(self) -> None:
        if self._port is not None:
            self._port.look_again()

    # --- init -------------------------------------------------------------------------------------

    def _to_init(self, message: init.InitMessage) -> None:
        if self._link is not None:
            self._link.send(message)

    def _from_init(self) -> None:
        assert self._link is not None
        for message in self._link.receive():
            match message:
                case init.Forked():
                    self.handle([ChildForked(message.child)])
                case init.Exited():
                    exit = message.exit
                    self.handle([ChildExited(exit, self._suspects(exit))])
                case init.Stop():
                    self.handle([StopAsked()])
                case _:
                    self._logger.error("init said", message=type(message).__name__)
        if self._link.closed:
            os._exit(0)  # init is gone, and everything with it

    def _suspects(self, exit: init.Exit) -> tuple[Suspect, ...]:
        note = self._home.crash_note(exit.name, exit.incarnation)
        rows = read_note(note)
        note.unlink(missing_ok=True)
        return tuple(Suspect(thread, position) for thread, position in rows)

    def _halt(self) -> None:
        self._to_init(init.Halt())
        if not self._ended.done():
            self._ended.set_result(None)

    # --- time -------------------------------------------------------------------------------------

    def _wake_at(self, at_ns: int) -> None:
        if self._wake is not None:
            if self._wake_ns <= at_ns:
                return
            self._wake.cancel()
        self._wake_ns = at_ns
        delay_s = max(0.0, (at_ns - self._clock.now_ns()) / 1e9)
        self._wake = self._loop.call_later(delay_s, self._woke)

    def _woke(self) -> None:
        self._wake = None
        self._drained([Ticked()])

    def _tick(self) -> None:
        """Beat, look at the disk, let the core look at its deadlines."""
        self._loop.call_later(TICK_S, self._tick)
        self._to_init(init.KernelBeat())
        if self._link is not None:
            self._link.flush()
        self._room = self._journal.room()
        self._drained([JournalRoom(self._room, self._journal.bytes_used), Ticked()])
        if self._room:
            self._compact()

    def _drained(self, events: list[Event]) -> None:
        """Deadlines are judged after the inbox is drained."""
        if self._port is not None:
            self._port.drain()
        self.handle(events)

    # --- compaction -------------------------------------------------------------------------------

    def _compact(self) -> None:
        """Rewrite what is live at the head, a little each turn; then drop what lies before."""
        if self._compaction is None:
            threshold = max(COMPACT_BYTES, 2 * self._live_bytes)
            if self._journal.bytes_used <= threshold or not self._journal.can_mark:
                return
            head = self._journal.mark()
            self._compaction = (head, self._kernel.tables.state.live())
            self._live_bytes = 0
        head, live = self._compaction
        for _ in range(COMPACT_FACTS):
            fact = next(live, None)
            if fact is None:
                self._journal.drop_before(head)
                self._compaction = None
                return
            record = facts.encode(fact)
            self._live_bytes += len(record)
            self._journal.append(record)


def _is_stopped(pid: int) -> bool:
    """Somebody stopped the process (state T); unknown counts as not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] in b"Tt"
