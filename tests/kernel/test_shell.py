"""The shell with a real socket and a real journal; the core is real, or one that does as told."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import zmq
import zmq.asyncio
from libllm.config import Home
from libllm.crashnotes import CrashNote
from llmkernel import facts, initlink, turns
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
    PeerFull,
    PeerLost,
    Record,
    Rejected,
    Restarted,
    Send,
    SignalChild,
    Start,
    StopAsked,
    Suspect,
    Ticked,
    Wake,
)
from llmkernel.facts import Booted, TenantSeen
from llmkernel.initlink import Link
from llmkernel.journal import Journal, Options
from llmkernel.port import Port
from llmkernel.rejected import read_rejected, reject
from llmkernel.shell import Clock, Shell
from llmkernel.state import State
from llmkernel.testkit.rig import CONFIG, DEVICES, MODEL, OPERATOR_PROOF, Rig
from llmkernel.trace import Trace, read_trace
from llmproto import init, limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Failed, Hello, Welcome
from llmproto.errors import ErrorKind
from llmproto.execution import Stepped
from llmproto.init import Child, Exit, Exited, Forked, KernelBeat, Spec, Stop
from llmproto.kinds import KIND_OF
from llmproto.models import ModelRegister
from llmproto.operation import Status, StatusAsk

FIRST = Restarted(1, b"b" * 16, 1, CONFIG, DEVICES)
SMALL = 64 << 10


class Scripted(Kernel):
    """Does for each event what the test says; remembers what it was told."""

    def __init__(self, act: Callable[[Event], list[Effect]] = lambda event: []) -> None:
        super().__init__(State())
        self.told: list[Event] = []
        self.act = act

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        self.told.append(event)
        return self.act(event)


class Rack:
    """A shell at work in a task, its journal, init's end of the link, and the peers."""

    def __init__(self, folder: Path, kernel: Kernel, **options: Any) -> None:  # Options' fields
        self.home = Home(folder)
        self.home.make()
        self.kernel = kernel
        settings = {"sync": "never", "bytes_max": 1 << 30, "segment_bytes": SMALL, **options}
        self.options = Options(reserve_bytes=8192, **settings)
        self.journal, records = Journal.open(self.home.journal, self.options)
        for record in records:
            for fact in turns.decode(record):
                kernel.tables.state.apply(fact)
        self.inits, end = initlink.pair()
        self.link = Link(end)
        self.journal_closed = False
        self.heard: list[Message] = []
        self.logs = structlog.testing.LogCapture()
        self.context = zmq.asyncio.Context()
        self.sockets: list[zmq.asyncio.Socket] = []
        self.task: asyncio.Task[None] | None = None

    def shell(self, *, wait_for_sync: bool = False, **more: Any) -> Shell:  # Shell's arguments
        wrapped = structlog.wrap_logger(
            structlog.PrintLogger(),
            processors=[self.logs],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
        )
        return Shell(
            self.kernel,
            journal=self.journal,
            clock=Clock(0),
            link=self.link,
            home=self.home,
            logger=wrapped,
            wait_for_sync=wait_for_sync,
            **more,
        )

    def start(self, shell: Shell, first: Iterable[Event] = (FIRST,)) -> None:
        self.task = asyncio.create_task(shell.run(self.home.socket, first))

    def dealer(self) -> zmq.asyncio.Socket:
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(self.home.endpoint)
        self.sockets.append(dealer)
        return dealer

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
        loop.set_exception_handler(None)
        self.close_journal()
        for dealer in self.sockets:
            dealer.close()
        self.context.term()
        self.inits.close()
        self.link.close()

    def close_journal(self) -> None:
        if not self.journal_closed:
            self.journal.close()
        self.journal_closed = True

    def reopen(self) -> State:
        """As the next kernel does."""
        self.close_journal()
        self.journal, records = Journal.open(self.home.journal, self.options)
        self.journal_closed = False
        state = State()
        for record in records:
            for fact in turns.decode(record):
                state.apply(fact)
        return state

    async def from_init(self, kind: type[Message]) -> Message:
        """The next message of this kind that init hears."""
        loop = asyncio.get_running_loop()
        while True:
            self.heard.extend(self.inits.receive())
            while self.heard:
                message = self.heard.pop(0)
                if isinstance(message, kind):
                    return message
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self.inits.fileno(), set_once, readable)
            await readable
            loop.remove_reader(self.inits.fileno())


def set_once(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until it holds; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for sets no event
        await asyncio.sleep(0)


def sh(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def waiting_child() -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """A process that ends when the socket closes."""
    ours, theirs = socket.socketpair()
    code = "import sys; sys.stdin.read()"
    with theirs:
        return subprocess.Popen([sys.executable, "-c", code], stdin=theirs.fileno()), ours


def stop(child: "subprocess.Popen[bytes]") -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)


def kill(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[Callable[..., Rack]]:
    made: list[Rack] = []

    def make(kernel: Kernel, **options: Any) -> Rack:
        made.append(Rack(tmp_path, kernel, **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def header(message: Message, id: bytes = b"i" * 16, **changes: Any) -> Header:  # Header's fields
    made = Header(limits.PROTOCOL_VERSION, KIND_OF[type(message)], id)
    return msgspec.structs.replace(made, **changes)


async def say(dealer: zmq.asyncio.Socket, message: Message, id: bytes = b"i" * 16) -> None:
    await dealer.send_multipart(wire.encode(header(message, id), message))


async def hear(dealer: zmq.asyncio.Socket) -> tuple[Header, Message]:
    frames = await dealer.recv_multipart()
    found = wire.decode_header(frames)
    return found, wire.decode_body(found.kind, frames[1])


def to(event: Event, message: Message, **changes: Any) -> Send:  # Header's fields
    """A message to whoever sent the event."""
    assert isinstance(event, Arrived)
    return Send(event.peer, header(message, **changes), message)


# --- the clock ------------------------------------------------------------------------------------


def test_the_clock_does_not_run_backwards_across_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time_ns() + 10**15
    assert Clock(later).now_ns() >= later
    assert Clock(0).now_ns() < later
    clock = Clock(0)
    first = clock.now_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: 5)
    assert clock.now_ns() == first


# --- the real core --------------------------------------------------------------------------------


async def test_a_client_is_welcomed_and_answered(rack: Callable[..., Rack]) -> None:
    at = rack(Kernel(State()))
    at.start(at.shell())
    dealer = at.dealer()
    await say(dealer, Hello(b"s" * 16, "client", OPERATOR_PROOF))
    assert isinstance((await hear(dealer))[1], Welcome)
    await say(dealer, StatusAsk(), b"q" * 16)
    answer, status = await hear(dealer)
    assert answer.reply_to == b"q" * 16
    assert isinstance(status, Status)
    started = await at.from_init(init.Fork)
    assert isinstance(started, init.Fork)
    assert started.spec.name == "tokenizer"
    assert (at.home.socket.stat().st_mode & 0o777) == 0o600


async def test_it_beats(rack: Callable[..., Rack]) -> None:
    at = rack(Scripted())
    at.start(at.shell())
    assert isinstance(await at.from_init(KernelBeat), KernelBeat)


# --- order ----------------------------------------------------------------------------------------


async def test_always_releases_in_order_and_only_what_is_synced(rack: Callable[..., Rack]) -> None:
    """Messages that need no fact of their own stay behind those that do."""
    numbers = iter(range(1, 100))

    def act(event: Event) -> list[Effect]:
        if not isinstance(event, Arrived):
            return []
        number = next(numbers)
        answer = to(event, Failed(ErrorKind.STALE, str(number)))
        padding = "x" * 30_000  # so that the records fill several segments
        return [Record(TenantSeen(number, padding)), answer] if number % 2 else [answer]

    kernel = Scripted(act)
    synced: list[int] = []
    loop = asyncio.get_running_loop()
    at = rack(kernel, sync="always", on_synced=lambda p: loop.call_soon_threadsafe(on_synced, p))
    shell = at.shell(wait_for_sync=True)
    safe = 0

    def on_synced(position: int) -> None:
        synced.append(position)
        shell.synced(position)

    at.start(shell, ())
    dealer = at.dealer()
    for _ in range(20):
        await say(dealer, StatusAsk())
    heard = []
    for _ in range(20):
        _, message = await hear(dealer)
        assert isinstance(message, Failed)
        heard.append(int(message.detail))
        assert synced
    assert heard == list(range(1, 21))
    assert synced[-1] >> 32 > 1
    assert safe == 0


async def test_a_peer_that_is_gone_is_reported_when_the_disk_lets_the_message_go(
    rack: Callable[..., Rack],
) -> None:
    gone = Send(b"nobody", header(StatusAsk()), StatusAsk())
    kernel = Scripted(lambda e: [Record(TenantSeen(1, "t")), gone] if e == StopAsked() else [])
    at = rack(kernel)
    shell = at.shell(wait_for_sync=True)
    at.start(shell, ())
    await asyncio.sleep(0)
    shell.handle([StopAsked()])
    assert kernel.told == [StopAsked()]
    shell.synced(at.journal.position)
    assert kernel.told[1:] == [PeerLost(b"nobody")]


async def test_facts_of_an_event_are_one_record(rack: Callable[..., Rack]) -> None:
    both = [TenantSeen(1, "a"), TenantSeen(2, "b")]
    at = rack(Scripted(lambda event: [Record(fact) for fact in both]))
    at.shell().handle([StopAsked()])
    at.close_journal()
    journal, records = Journal.open(at.home.journal, at.options)
    assert [turns.decode(record) for record in records] == [both]
    journal.close()


# --- a full disk ----------------------------------------------------------------------------------


def recording(count: int, size: int) -> Scripted:
    """Every StopAsked writes so many facts of this size, and says so."""
    numbers = iter(range(1, 10_000))

    def act(event: Event) -> list[Effect]:
        if event != StopAsked():
            return []
        facts_ = [TenantSeen(next(numbers), "x" * size) for _ in range(count)]
        return [*map(Record, facts_), Send(b"peer", header(StatusAsk()), StatusAsk())]

    return Scripted(act)


async def test_the_core_hears_of_a_full_disk_before_the_next_event(
    rack: Callable[..., Rack],
) -> None:
    kernel = recording(1, 1000)
    at = rack(kernel, bytes_max=2 * SMALL)
    shell = at.shell()
    shell.handle([StopAsked()] * 300)
    at_room = [number for number, e in enumerate(kernel.told) if isinstance(e, JournalRoom)]
    assert kernel.told[at_room[0]] == JournalRoom(False, 2 * SMALL)
    assert at_room[0] < 140
    # Nothing that was decided beyond the end of the disk is forgotten, nor acted upon.
    assert len([e for e in kernel.told if e == StopAsked()]) == 300
    assert not shell._journal.room()
    assert shell._outbox.stuck
    assert shell._outbox.held > 100


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a tmpfs")
async def test_a_full_file_system_stops_nothing_for_good(
    rack: Callable[..., Rack], tmp_path: Path
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    if not sh("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)):
        pytest.skip("mounting is not permitted")
    try:
        (folder / "ballast").write_bytes(bytes(64 << 10))
        kernel = recording(1, 1000)
        at = rack(kernel)
        shell = at.shell()
        shell.handle([StopAsked()] * 300)
        assert any(
            e == JournalRoom(False, e.bytes) for e in kernel.told if isinstance(e, JournalRoom)
        )
        assert shell._outbox.stuck
        (folder / "ballast").unlink()
        assert sh("mount", "-o", "remount,size=4m", str(folder))
        while shell._outbox.stuck or not at.journal.room():
            shell._tick()
            await asyncio.sleep(0)
        assert [e.room for e in kernel.told if isinstance(e, JournalRoom)][-1]
        assert shell._outbox.held == 0
        at.close_journal()
        journal, records = Journal.open(folder, at.options)
        names = [fact for record in records for fact in turns.decode(record)]
        assert [f.tenant for f in names if isinstance(f, TenantSeen)] == list(range(1, 301))
        journal.close()
    finally:
        assert sh("umount", "-l", str(folder))


# --- rejected events ------------------------------------------------------------------------------


class Breaking(Kernel):
    """The real core, but for one question that breaks it in the middle."""

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        effects = super().handle(now_ns, event)
        if isinstance(event, Arrived):
            kind = wire.decode_header(event.frames).kind
            if kind in (KIND_OF[StatusAsk], KIND_OF[Stepped]):
                raise ValueError("an invariant broke")
        return effects


async def test_an_event_that_breaks_the_core_ends_it_and_is_refused_ever_after(
    rack: Callable[..., Rack],
) -> None:
    at = rack(Breaking(State()))
    at.start(at.shell())
    dealer = at.dealer()
    await say(dealer, Hello(b"s" * 16, "client", OPERATOR_PROOF))
    await hear(dealer)
    await say(dealer, StatusAsk(), b"q" * 16)
    assert at.task is not None
    with pytest.raises(ValueError, match="an invariant broke"):
        await at.task
    found = read_rejected(at.home.journal / "rejected", forget_processes=False)
    assert found == (Rejected(b"q" * 16),)
    at.kernel = Kernel(at.reopen())
    again = msgspec.structs.replace(FIRST, epoch=2, rejected=found)
    at.start(at.shell(), [again])
    dealer = at.dealer()
    await say(dealer, Hello(b"s" * 16, "client", OPERATOR_PROOF))
    await hear(dealer)
    await say(dealer, StatusAsk(), b"q" * 16)
    answer, failed = await hear(dealer)
    assert answer.reply_to == b"q" * 16
    assert isinstance(failed, Failed)
    assert failed.kind is ErrorKind.INTERNAL
    await say(dealer, StatusAsk(), b"r" * 16)
    assert isinstance((await hear(dealer))[1], Status)


async def test_nothing_is_handled_after_the_core_broke(rack: Callable[..., Rack]) -> None:
    def act(event: Event) -> list[Effect]:
        if event == StopAsked():
            raise ValueError("broken")
        return []

    kernel = Scripted(act)
    at = rack(kernel)
    shell = at.shell()
    at.start(shell, ())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="broken"):
        shell.handle([StopAsked(), Ticked()])
    shell.handle([Ticked()])
    shell.synced(1)
    assert kernel.told == [StopAsked()]
    assert at.task is not None
    with pytest.raises(ValueError, match="broken"):
        await at.task


async def test_a_fact_that_is_no_record_is_the_event_s_fault(rack: Callable[..., Rack]) -> None:
    huge = Record(TenantSeen(1, "x" * limits.RECORD_BYTES_MAX))
    at = rack(Scripted(lambda event: [Record(Booted(1, 1, 1)), huge]))
    shell = at.shell()
    arrived = Arrived(b"p", tuple(wire.encode(header(StatusAsk()), StatusAsk())))
    with pytest.raises(AssertionError, match="no record"):
        shell.handle([arrived])
    assert read_rejected(at.home.journal / "rejected", forget_processes=False)
    assert list(turns_of(at)) == []


def turns_of(at: Rack) -> list[list[facts.AnyFact]]:
    at.close_journal()
    journal, records = Journal.open(at.home.journal, at.options)
    found = [turns.decode(record) for record in records]
    journal.close()
    return found


async def test_the_second_death_of_a_step_ends_its_threads(
    rack: Callable[..., Rack], tmp_path: Path
) -> None:
    """Also through the files: two kernels die of a Stepped, the third ends its thread."""
    rig = Rig()
    client, tokenizer = rig.client(), rig.tokenizer()
    thread = rig.spawn(client, tokenizer)
    executor = rig.executor()
    step = Stepped([thread], [1], [3], [5], [0], 10)
    folder = tmp_path / "rejected"
    for _ in range(2):
        event = Arrived(executor.peer, tuple(wire.encode(header(step), step)))
        reject(folder, rig.kernel.tables, event, ValueError())
        rig.restart(rejected=read_rejected(folder, forget_processes=False))
    assert rig.thread(thread).error is ErrorKind.INTERNAL


# --- messages that cannot be ----------------------------------------------------------------------


async def test_an_answer_that_is_too_large_is_a_failure_for_who_asked(
    rack: Callable[..., Rack],
) -> None:
    huge = Failed(ErrorKind.STALE, "x" * limits.MESSAGE_BYTES_MAX)
    odd = Failed(ErrorKind.STALE, "\udc80")
    answers = iter([huge, odd])

    def act(event: Event) -> list[Effect]:
        if not isinstance(event, Arrived):
            return []
        return [to(event, next(answers), reply_to=b"q" * 16)]

    at = rack(Scripted(act))
    at.start(at.shell(), ())
    dealer = at.dealer()
    for text in (str(limits.MESSAGE_BYTES_MAX), "Failed"):
        await say(dealer, StatusAsk(), b"q" * 16)
        answer, failed = await hear(dealer)
        assert answer.reply_to == b"q" * 16
        assert isinstance(failed, Failed)
        assert failed.kind is ErrorKind.INVALID
        assert text in failed.detail


async def test_what_nobody_asked_for_and_cannot_be_sent_is_logged(
    rack: Callable[..., Rack],
) -> None:
    huge = Failed(ErrorKind.STALE, "x" * limits.MESSAGE_BYTES_MAX)
    at = rack(Scripted(lambda event: [Send(b"p", header(huge), huge)]))
    at.shell().handle([StopAsked()])
    (line,) = at.logs.entries
    assert (line["log_level"], line["event"]) == ("error", "message cannot be sent")


async def test_a_request_that_cannot_be_passed_on_is_refused(rack: Callable[..., Rack]) -> None:
    """It just fitted; with the header that the kernel writes it does not."""
    kernel = Scripted()
    real = Kernel(State())
    real.handle(1, FIRST)
    hello = Hello(b"s" * 16, "client", OPERATOR_PROOF)
    kernel.tables = real.tables

    def act(event: Event) -> list[Effect]:
        if not isinstance(event, Arrived):
            return []
        if wire.decode_header(event.frames).kind == KIND_OF[Hello]:
            return real.handle(2, event)
        passed_on = header(StatusAsk(), b"q" * 16, source=b"s" * 16, target="tokenizer")
        return [Forward(b"other", passed_on, (bytes(limits.MESSAGE_BYTES_MAX),))]

    kernel.act = act
    at = rack(kernel)
    at.start(at.shell(), ())
    dealer = at.dealer()
    await say(dealer, hello)
    await hear(dealer)
    await say(dealer, StatusAsk(), b"q" * 16)
    answer, failed = await hear(dealer)
    assert answer.reply_to == b"q" * 16
    assert isinstance(failed, Failed)


# --- peers ----------------------------------------------------------------------------------------


async def test_a_peer_that_is_not_there_and_one_that_does_not_read(tmp_path: Path) -> None:
    arrived: list[bytes] = []
    came = asyncio.Event()

    def take(batch: list[tuple[bytes, ...]]) -> None:
        arrived.extend(message[0] for message in batch)
        came.set()

    port = Port(tmp_path / "s", take)
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVHWM, 1)
    dealer.connect(f"ipc://{tmp_path / 's'}")
    await dealer.send_multipart([b"hello", b""])
    await came.wait()
    assert port.send(b"nobody", (b"a", b"b")) is False
    block = bytes(4096)
    sent = [port.send(arrived[0], (b"a", block)) for _ in range(1)]
    while sent[-1]:
        sent.append(port.send(arrived[0], (b"a", block)))
        assert len(sent) < 20_000
    assert sent[-1] is None
    dealer.close()
    context.term()
    port.close(0)


async def test_a_full_peer_is_reported(rack: Callable[..., Rack]) -> None:
    kernel = Scripted(
        lambda e: [Send(b"p", header(StatusAsk()), StatusAsk())] if e == StopAsked() else []
    )
    at = rack(kernel)
    shell = at.shell()
    at.start(shell, ())
    await asyncio.sleep(0)
    assert shell._port is not None
    shell._port.send = lambda peer, frames: None  # type: ignore[method-assign]
    shell.handle([StopAsked()])
    assert kernel.told[-1] == PeerFull(b"p")


# --- init -----------------------------------------------------------------------------------------


async def test_what_init_says_becomes_events(rack: Callable[..., Rack]) -> None:
    kernel = Scripted()
    at = rack(kernel)
    shell = at.shell()
    note = CrashNote(at.home.crash_note("executor-1", 3))
    note.write([(b"thread01", 17)])
    child = Child(Spec("executor-1", "executor", "m"), 3, 77, b"proof", 5)
    gone = Exit("executor-1", 3, 77, None, signal.SIGSEGV)
    at.start(shell, ())
    for message in (Forked(child), Exited(gone), Exited(gone), Stop()):
        at.inits.send(message)
    await until(lambda: StopAsked() in kernel.told)
    told = [event for event in kernel.told if not isinstance(event, JournalRoom | Ticked)]
    assert told == [
        ChildForked(child),
        ChildExited(gone, (Suspect(b"thread01", 17),)),
        ChildExited(gone, ()),  # the note has served
        StopAsked(),
    ]


async def test_a_stopped_process_is_told_from_one_that_hangs(rack: Callable[..., Rack]) -> None:
    child, ours = waiting_child()
    hung = KillHung("executor-1", child.pid, 1)
    kernel = Scripted(lambda event: [hung] if event == StopAsked() else [])
    at = rack(kernel)
    shell = at.shell()
    try:
        shell.handle([StopAsked()])
        assert kernel.told[-1] == HungKilled("executor-1", 1, False)
        stop(child)
        shell.handle([StopAsked()])
        assert kernel.told[-1] == HungKilled("executor-1", 1, True)
        found = await at.from_init(init.Signal)
        assert found == init.Signal(child.pid, 1, signal.SIGKILL)
    finally:
        kill(child)
        ours.close()
    kernel.act = lambda event: [KillHung("x", 1 << 22, 1)] if event == StopAsked() else []
    shell.handle([StopAsked()])
    assert kernel.told[-1] == HungKilled("x", 1, False)


async def test_starts_signals_and_the_end_go_to_init(rack: Callable[..., Rack]) -> None:
    spec = Spec("t", "t", "m")
    effects: list[Effect] = [Start(spec, 4), SignalChild(9, 4, 15), Halt()]
    at = rack(Scripted(lambda event: effects if event == StopAsked() else []))
    at.start(at.shell(), [StopAsked()])
    assert await at.from_init(init.Fork) == init.Fork(spec, 4)
    assert await at.from_init(init.Signal) == init.Signal(9, 4, 15)
    assert await at.from_init(init.Halt) == init.Halt()
    assert at.task is not None
    await at.task


async def test_the_earliest_wake_counts(rack: Callable[..., Rack]) -> None:
    kernel = Scripted()
    at = rack(kernel)
    shell = at.shell()
    now = shell._clock.now_ns()
    kernel.act = lambda event: [Wake(now + 10**12), Wake(now), Wake(now + 10**11)]
    shell.handle([StopAsked()])
    kernel.act = lambda event: []
    await until(lambda: Ticked() in kernel.told)
    assert kernel.told == [StopAsked(), Ticked()]


# --- compaction and trace -------------------------------------------------------------------------


async def test_the_journal_is_compacted_while_messages_flow(rack: Callable[..., Rack]) -> None:
    kernel = Scripted()
    state = kernel.tables.state
    at = rack(kernel)
    for number in range(1, 400):
        fact = TenantSeen(number, "x" * 1000)
        state.apply(fact)
        at.journal.append(facts.encode(fact))
    oldest = at.journal.oldest
    compaction = Compaction(at.journal, state, begin_bytes=SMALL)
    shell = at.shell(compaction=compaction)
    shell._tick()
    assert compaction.running
    await until(lambda: not compaction.running)
    at.journal.wait_synced(at.journal.position)
    assert turns_of(at)
    assert at.journal.oldest > oldest
    assert shell._next_tick is not None
    shell._next_tick.cancel()


class Traced(Kernel):
    """Remembers what it answered."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.answered: list[list[Effect]] = []

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        effects = super().handle(now_ns, event)
        self.answered.append(list(effects))
        return effects


async def test_a_trace_replayed_gives_the_same_effects(rack: Callable[..., Rack]) -> None:
    state = State()
    state.apply(TenantSeen(1, "from an earlier kernel"))
    kernel = Traced(state)
    at = rack(kernel)
    path = at.home.logs / "trace"
    trace = Trace(path, state)
    shell = at.shell(trace=trace)
    at.start(shell)
    dealer = at.dealer()
    await say(dealer, Hello(b"s" * 16, "client", OPERATOR_PROOF))
    await hear(dealer)
    await say(dealer, StatusAsk(), b"q" * 16)
    await hear(dealer)
    await say(dealer, ModelRegister(MODEL), b"m" * 16)  # is not its right: refused
    await hear(dealer)
    shell.handle([StopAsked()])
    trace.close()
    found, entries = read_trace(path)
    fresh = Kernel(found)
    again = [fresh.handle(entry.now_ns, entry.event) for entry in entries]
    assert again == kernel.answered[: len(again)]
    assert len(again) >= 5
    assert fresh.tables.state.digest() == kernel.tables.state.digest()


def test_a_torn_or_bounded_trace_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    trace = Trace(path, State())
    trace(1, Ticked())
    trace(2, StopAsked())
    trace.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [entry.event for entry in read_trace(path)[1]] == [Ticked()]
    bounded = Trace(path, State(), bytes_max=len(whole) - 1)
    bounded(1, Ticked())
    bounded(2, StopAsked())
    bounded.close()
    assert [entry.now_ns for entry in read_trace(path)[1]] == [1]
