"""The kernel's hands: sockets, journal, init and clock around the pure core; it decides nothing.

Order within a turn: an event is handled, its facts are appended to the journal as one record, and
only then its messages leave (`llmkernel.outbox`).  What must not be seen half done is never acted
upon: an event on which the core raises ends the process, at once.
"""

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, assert_never

from libllm.config import Home
from libllm.crashnotes import read_note
from libllm.logs import Logger
from llmproto import init, limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.errors import RemoteError
from llmproto.kinds import KIND_OF

from llmkernel import turns
from llmkernel.compaction import Compaction
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
from llmkernel.outbox import Outbox
from llmkernel.port import Port
from llmkernel.rejected import reject
from llmkernel.remote import Door

TICK_S: Final = 0.4
SLICE_S: Final = 0.005
"""Between two slices of compaction: messages come first."""
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
        logger: Logger,
        wait_for_sync: bool,
        compaction: Compaction | None = None,
        trace: Callable[[int, Event], None] | None = None,
    ) -> None:
        """`link` leads to init; absent where the kernel runs without one (tests)."""
        self._kernel = kernel
        self._journal = journal
        self._clock = clock
        self._link = link
        self._home = home
        self._logger = logger
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._port: Port | None = None
        self._outbox = Outbox(journal, self._deliver, wait_for_sync=wait_for_sync)
        self._compaction = compaction or Compaction(journal, kernel.tables.state)
        self._compacting: asyncio.TimerHandle | None = None
        self._pending: deque[Event] = deque()
        self._wake: asyncio.TimerHandle | None = None
        self._wake_ns = 0
        self._next_tick: asyncio.TimerHandle | None = None
        self._ended = self._loop.create_future()
        self._room = True

    # --- life -------------------------------------------------------------------------------------

    async def run(self, socket: Path, first: Iterable[Event], *, door: Door | None = None) -> None:
        """Handle `first`, bind, and pump until told to end; raises what ended it otherwise."""
        self._loop.set_exception_handler(self._raised)
        self.handle(first)
        self._port = Port(socket, self._arrived, door)
        if self._link is not None:
            self._loop.add_reader(self._link.fileno(), self._from_init)
        self._next_tick = self._loop.call_later(TICK_S, self._tick)
        try:
            await self._ended
        finally:
            for timer in (self._next_tick, self._compacting, self._wake):
                if timer is not None:
                    timer.cancel()
            if self._link is not None:
                self._loop.remove_reader(self._link.fileno())
            self._port.close(100)

    def _raised(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:  # asyncio's
        """A callback raised: the process ends, nothing is repaired in place."""
        error = context.get("exception")
        self._broke(error if isinstance(error, Exception) else RuntimeError(context["message"]))

    def _broke(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _arrived(self, batch: list[tuple[bytes, ...]]) -> None:
        self.handle([Arrived(message[0], message[1:]) for message in batch])

    def synced(self, position: int) -> None:
        """The journal is on disk up to here (called on the loop)."""
        if self._ended.done():
            return
        self._outbox.synced(position)
        self.handle(())

    # --- one turn ---------------------------------------------------------------------------------

    def handle(self, events: Iterable[Event]) -> None:
        """Handle events, and those that come of them, each to its end before the next."""
        self._pending.extend(events)
        while self._pending and not self._ended.done():
            self._turn(self._pending.popleft())
        self._look_again()

    def _turn(self, event: Event) -> None:
        now_ns = self._clock.now_ns()
        if self._trace is not None:
            self._trace(now_ns, event)
        try:
            effects = self._kernel.handle(now_ns, event)
            records = turns.encode([e.fact for e in effects if isinstance(e, Record)])
        except Exception as error:
            self._broke(error)  # before anything else: nothing that follows may see this state
            reject(self._home.journal / "rejected", self._kernel.tables, event, error)
            raise
        if records:
            self._outbox.record(records)
            self._look_for_room()
        for effect in effects:
            self._perform(effect)

    def _look_for_room(self) -> None:
        """Tell the core, before anything else, that the disk is full, or no longer."""
        room = self._journal.room() and not self._outbox.stuck
        if room is not self._room:
            self._room = room
            self._pending.appendleft(JournalRoom(room, self._journal.bytes_used))

    def _perform(self, effect: Effect) -> None:
        """Do one thing; what comes of it is pending, where it matters."""
        match effect:
            case Record():
                pass  # journaled before anything is performed
            case Send():
                self._say(effect.peer, effect.header, effect.message)
            case Forward():
                self._forward(effect)
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
                self._pending.append(HungKilled(effect.process, effect.incarnation, stopped))
            case Wake():
                self._wake_at(effect.at_ns)
            case Log():
                self._logger.log(LEVELS[effect.level], effect.event, **effect.fields)
            case Halt():
                self._loop.call_later(0.1, self._halt)
            case _:
                assert_never(effect)

    # --- messages out -----------------------------------------------------------------------------

    def _say(self, peer: bytes, header: Header, message: Message) -> None:
        try:
            frames = wire.encode(header, message)
        except RemoteError as error:
            self._unsendable(peer, header, error)
            return
        self._outbox.send(peer, tuple(frames))

    def _forward(self, effect: Forward) -> None:
        frames = (wire.encode_header(effect.header), *effect.body)
        try:
            wire.check_size(frames)
        except RemoteError as error:
            self._unsendable(effect.peer, effect.header, error)
            return
        self._outbox.send(effect.peer, frames)

    def _unsendable(self, peer: bytes, header: Header, error: RemoteError) -> None:
        """No message may be like this: whoever waits for it, or for its answer, is told."""
        self._logger.error(
            "message cannot be sent", kind=header.kind, target=header.target, detail=error.detail
        )
        question = header.reply_to
        if question is None:
            asker = self._kernel.tables.sessions.by_id.get(header.source)
            if asker is None:
                return
            peer, question = asker.peer, header.id
        answer = Header(
            limits.PROTOCOL_VERSION, KIND_OF[Failed], header.id, header.target, question
        )
        failed = Failed(error.kind, error.detail)
        self._outbox.send(peer, tuple(wire.encode(answer, failed)))

    def _deliver(self, peer: bytes, frames: tuple[bytes, ...]) -> None:
        if self._port is None:
            return  # nobody has connected yet
        sent = self._port.send(peer, frames)
        if not sent:
            self._pending.append(PeerFull(peer) if sent is None else PeerLost(peer))

    def _look_again(self) -> None:
        if self._port is not None and not self._ended.done():
            self._port.look_again()

    # --- init -------------------------------------------------------------------------------------

    def _to_init(self, message: init.InitMessage) -> None:
        if self._link is not None:
            self._link.send(message)

    def _from_init(self) -> None:
        assert self._link is not None
        for message in self._link.receive():
            self.handle(self.events_of(message))
        if self._link.closed:
            os._exit(0)  # init is gone, and everything with it

    def events_of(self, message: init.InitMessage) -> list[Event]:
        """What it means to the core that init said this."""
        match message:
            case init.Forked():
                return [ChildForked(message.child)]
            case init.Exited():
                return [ChildExited(message.exit, self._suspects(message.exit))]
            case init.Stop():
                return [StopAsked()]
            case _:
                self._logger.error("init said", message=type(message).__name__)
                return []

    def _suspects(self, exit: init.Exit) -> tuple[Suspect, ...]:
        """What it was computing; the note has served then."""
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
        self._next_tick = self._loop.call_later(TICK_S, self._tick)
        self._to_init(init.KernelBeat())
        if self._link is not None:
            self._link.flush()
        self._outbox.retry()
        self._room = self._journal.room() and not self._outbox.stuck
        self._drained([JournalRoom(self._room, self._journal.bytes_used), Ticked()])
        if self._compacting is None:
            self._compact()

    def _compact(self) -> None:
        """A slice of compaction, and the next one soon."""
        self._compacting = None
        if self._room and self._compaction.step():
            self._compacting = self._loop.call_later(SLICE_S, self._compact)

    def _drained(self, events: list[Event]) -> None:
        """Deadlines are judged after the inbox is drained."""
        if self._port is not None:
            self._port.drain()
        self.handle(events)


def _is_stopped(pid: int) -> bool:
    """Somebody stopped the process (state T); unknown counts as not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] in b"Tt"
