"""A simulated machine: one clock, one seeded network, init, a disk, and peers that can all die.

Everything happens on one thread in the order of virtual time; the same seed is the same run.  The
kernel's core and the sessions' cores are the real ones.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from typing import Final

import msgspec
from libllm.events import Connected, Disconnected, MessageArrived, Woke
from libllm.session import Session
from llmproto import wire
from llmproto.base import Header, Message
from llmproto.connection import Hello
from llmproto.errors import RemoteError
from llmproto.init import Child, Exit

from libllm import events as session_events
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
    KernelConfig,
    KillHung,
    PeerLost,
    Record,
    Restarted,
    Send,
    SignalChild,
    Start,
    Suspect,
    Ticked,
    Wake,
)
from llmkernel.state import State
from llmkernel.testkit.ledger import Ledger
from llmkernel.testkit.rig import CONFIG, DEVICES, MS

TICK_MS: Final = 250
SIGKILL: Final = 9
SIGSEGV: Final = 11
RECONNECT_MS: Final = 20
SESSION_CHECK_EVERY: Final = 8
"""Of the kernel's events; the kernel itself is checked after each one."""


class Network(msgspec.Struct, frozen=True):
    """How bad the network is, as probabilities for each message."""

    slow: float = 0.0
    """Takes up to 300 ms."""
    lost: float = 0.0
    twice: float = 0.0
    reordered: float = 0.0


class Node:
    """One peer: a session, and what a service or a program makes of it.

    Invariant: after `die` nothing of it is ever heard again.
    """

    def __init__(self, world: "World", hello: Hello) -> None:
        self.world = world
        self.alive = True
        self.stopped = False
        """Its process does not run, though it lives."""
        self.peer: bytes | None = None
        """The connection, while there is one."""
        self.hello = hello
        ids = random.Random(world.random.getrandbits(64))
        self.session = Session(hello, ids, holding=self.holding)
        self._arrivals_ns = [0, 0]
        self._wake_ns: int | None = None
        self._wanted_ns: int | None = None
        world.nodes.append(self)
        world.after(1, self.connect)

    def holding(self) -> session_events.Holding:
        """What its Beat tells."""
        return session_events.Holding()

    def took(self, effect: session_events.Effect) -> None:
        """An effect of the session that is not the world's to perform."""
        raise NotImplementedError

    # --- the connection ---------------------------------------------------------------------------

    def connect(self) -> None:
        """Try, until the kernel is there."""
        if not self.alive or self.peer is not None:
            return
        if self.world.kernel is None or self.stopped:
            self.world.after(RECONNECT_MS, self.connect)
            return
        self.world.connections += 1
        self.peer = b"c%d" % self.world.connections
        self.world.by_peer[self.peer] = self
        self._arrivals_ns = [0, 0]
        self.feed(Connected())

    def disconnect(self) -> None:
        """The connection breaks; what is on its way is lost."""
        if self.peer is None:
            return
        del self.world.by_peer[self.peer]
        self.peer = None
        if self.alive:
            if not self.stopped:
                self.feed(Disconnected())
            self.world.after(RECONNECT_MS, self.connect)

    def die(self) -> None:
        """SIGKILL."""
        self.alive = False
        self.disconnect()

    def arrived(self, peer: bytes, frames: list[bytes]) -> None:
        """A message, if the connection that it came on still stands."""
        if peer != self.peer or self.stopped:
            return
        header = wire.decode_header(frames)
        self.feed(MessageArrived(header, wire.decode_body(header.kind, frames[1])))

    def feed(self, event: session_events.Event) -> None:
        """One event for the session, and everything that follows from it."""
        if not self.alive or self.stopped:
            return
        for effect in self.session.handle(self.world.now_ns, event):
            if isinstance(effect, session_events.Send):
                self._send(effect.header, effect.message)
            elif isinstance(effect, session_events.Wake):
                self._wake(effect.at_ns)
            elif self.alive:
                self.took(effect)
        if not self.world.events % SESSION_CHECK_EVERY:
            self.session.check()

    def _send(self, header: Header, message: Message) -> None:
        if self.peer is None or not self.alive:
            return
        try:
            frames = wire.encode(header, message)
        except RemoteError as error:
            self.feed(session_events.SendRefused(header.id, error.kind, error.detail))
            return
        peer = self.peer
        self.world.transmit(self, 0, lambda: self.world.to_kernel(peer, frames))

    def _wake(self, at_ns: int | None) -> None:
        """The session's one timer; an earlier appointment is kept, and renewed when it comes."""
        self._wanted_ns = at_ns
        if at_ns is not None and (self._wake_ns is None or at_ns < self._wake_ns):
            self._wake_ns = at_ns
            self.world.at(at_ns, partial(self._woke, at_ns))

    def _woke(self, at_ns: int) -> None:
        if self._wake_ns != at_ns:
            return
        self._wake_ns = None
        if self._wanted_ns is not None and self._wanted_ns > self.world.now_ns:
            self._wake(self._wanted_ns)
        else:
            self.feed(Woke())

    def arrival_ns(self, direction: int, delay_ns: int, *, reordered: bool) -> int:
        """When a message that leaves now arrives; in order, unless the network reorders."""
        at_ns = self.world.now_ns + delay_ns
        if not reordered:
            at_ns = max(at_ns, self._arrivals_ns[direction] + 1)
            self._arrivals_ns[direction] = at_ns
        return at_ns


class Process(Node):
    """A node that init started: it has a pid, and dies by signals."""

    def __init__(self, world: "World", child: Child) -> None:
        self.child = child
        super().__init__(
            world,
            Hello(
                world.random.randbytes(16),
                child.spec.role,
                child.proof,
                process=child.spec.name,
                incarnation=child.incarnation,
            ),
        )

    def suspects(self) -> tuple[Suspect, ...]:
        """The crash note that it leaves."""
        return ()


class World:
    """Clock, network, init, disk and kernel.

    Invariant: nothing happens but what stands in the agenda; all chance comes from one generator.
    """

    def __init__(
        self,
        seed: int,
        *,
        config: KernelConfig = CONFIG,
        network: Network = Network(),  # noqa: B008 - frozen
    ) -> None:
        self.random = random.Random(seed)
        self.ledger = Ledger()
        self.watch: Callable[[Effect], None] = lambda effect: None
        """Is shown every effect, before anything happens of it."""
        self.fast = False
        """Executors compute other tokens in every residency; otherwise as in exact mode."""
        self.config = config
        self.devices = DEVICES
        self.network = network
        self.now_ns = 1_000_000_000
        self.kernel: Kernel | None = None
        self.journal: list[bytes] = []
        self.epoch = 0
        self.nodes: list[Node] = []
        self.by_peer: dict[bytes, Node] = {}
        self.connections = 0
        self.pids = 100
        self.children: dict[int, Process] = {}
        self.exits: list[Exit] = []
        """Of children that died while no kernel lived."""
        self.programs: dict[str, Callable[[World, Child], Process]] = {}
        """What to run for each role."""
        self.events = 0
        self.trace = blake2b(digest_size=16)
        self.room = True
        """The journal's disk is not full."""
        self.kernel_stopped_until_ns = 0
        self.compact_every = 0
        """Events between two facts of the compaction that never ends; 0: none."""
        self._live: Iterator[facts.AnyFact] | None = None
        self._head = 0
        self.lose_effects = False
        """The kernel dies after the next journal write, before anything is sent."""
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._entries = 0
        self._encoder = msgspec.msgpack.Encoder()

    # --- time -------------------------------------------------------------------------------------

    def at(self, at_ns: int, what: Callable[[], None]) -> None:
        """Something happens then."""
        self._entries += 1
        heapq.heappush(self._agenda, (max(at_ns, self.now_ns), self._entries, what))

    def after(self, ms: float, what: Callable[[], None]) -> None:
        """Something happens so much later."""
        self.at(self.now_ns + int(ms * MS), what)

    def run(self, ms: float, *, until: Callable[[], bool] | None = None) -> None:
        """Let time pass, or everything up to a condition happen."""
        end_ns = self.now_ns + int(ms * MS)
        while self._agenda and self._agenda[0][0] <= end_ns:
            at_ns, _, what = heapq.heappop(self._agenda)
            self.now_ns = max(self.now_ns, at_ns)
            what()
            if until is not None and until():
                return
        self.now_ns = end_ns

    # --- the network ------------------------------------------------------------------------------

    def transmit(self, node: Node, direction: int, deliver: Callable[[], None]) -> None:
        """Put a message on a connection: 0 to the kernel, 1 from it."""
        chance, network = self.random.random, self.network
        if network.lost and chance() < network.lost:
            return
        for _ in range(2 if network.twice and chance() < network.twice else 1):
            slow = network.slow and chance() < network.slow
            delay_ns = int((300 if slow else 1) * MS * chance()) + 50_000
            reordered = bool(network.reordered) and chance() < network.reordered
            self.at(node.arrival_ns(direction, delay_ns, reordered=reordered), deliver)

    def to_kernel(self, peer: bytes, frames: list[bytes]) -> None:
        """A message reaches the kernel, if the connection still stands."""
        if peer in self.by_peer:
            self.handle(Arrived(peer, tuple(frames)))

    def _to_peer(self, peer: bytes, frames: list[bytes]) -> None:
        node = self.by_peer.get(peer)
        if node is None:
            self.after(0, lambda: self.handle(PeerLost(peer)))
            return
        wire.check_size(frames)
        self.transmit(node, 1, lambda: node.arrived(peer, frames))

    # --- the kernel -------------------------------------------------------------------------------

    def boot(self) -> None:
        """A kernel starts, with what the journal holds."""
        if self.kernel is not None:
            return
        self.epoch += 1
        self.kernel = kernel = Kernel(self.replayed())
        children = tuple(node.child for node in self.children.values())
        exits, self.exits = tuple(self.exits), []
        self.handle(
            Restarted(
                self.epoch, b"b" * 16, self.now_ns, self.config, self.devices, children, exits
            )
        )
        if not self.room:
            self.handle(JournalRoom(False))
        self.after(TICK_MS, lambda: self._tick(kernel))

    def replayed(self) -> State:
        """The state that the journal says."""
        state = State()
        for record in self.journal:
            state.apply(facts.decode(record))
        return state

    def _tick(self, kernel: Kernel) -> None:
        if self.kernel is kernel:
            self.after(TICK_MS, lambda: self._tick(kernel))
            self.handle(Ticked())

    def crash_kernel(self, *, after_ms: float) -> None:
        """SIGKILL; the next one starts a while later."""
        if self.kernel is None:
            return
        live = self.kernel.tables.state.digest()
        assert self.replayed().digest() == live, "the journal does not say what was"
        self.kernel = None
        self._live = None
        self.kernel_stopped_until_ns = 0
        for node in list(self.by_peer.values()):
            node.disconnect()
        self.after(after_ms, self.boot)

    def handle(self, event: Event) -> None:
        """One event for the kernel; what it decides is journaled, and then happens."""
        if self.kernel is None:
            return
        if self.now_ns < self.kernel_stopped_until_ns:
            self.at(self.kernel_stopped_until_ns, partial(self._held_up, event, self.kernel))
            return
        self.events += 1
        effects = self.kernel.handle(self.now_ns, event)
        for effect in effects:
            self.trace.update(self._encoder.encode(effect))
            self.watch(effect)
            if isinstance(effect, Record):
                self.journal.append(facts.encode(effect.fact))
                self.ledger.record(effect.fact)
        self.kernel.check()
        if self.compact_every and not self.events % self.compact_every:
            self._compact(self.kernel)
        if self.lose_effects and any(isinstance(effect, Record) for effect in effects):
            self.lose_effects = False
            self.crash_kernel(after_ms=100)
            return
        for effect in effects:
            match effect:
                case Send():
                    header = wire.encode_header(effect.header)
                    self._to_peer(effect.peer, [header, wire.encode_body(effect.message)])
                case Forward():
                    self._to_peer(effect.peer, [wire.encode_header(effect.header), *effect.body])
                case Start():
                    self.after(2, partial(self._fork, effect))
                case SignalChild():
                    self.signal(effect.pid, effect.signal)
                case KillHung():
                    self._kill_hung(effect)
                case Wake():
                    self.at(effect.at_ns, lambda: self.handle(Ticked()))
                case Halt():
                    raise AssertionError("nobody asked for an end")
                case _:
                    pass

    def _held_up(self, event: Event, kernel: Kernel) -> None:
        """What came while the kernel was stopped; another kernel never hears of it."""
        if self.kernel is kernel:
            self.handle(event)

    def _compact(self, kernel: Kernel) -> None:
        """Say one live fact again; when all are said, forget what lies before the first."""
        if self._live is None:
            self._head = len(self.journal)
            self._live = kernel.tables.state.live()
        fact = next(self._live, None)
        if fact is not None:
            self.journal.append(facts.encode(fact))
            return
        del self.journal[: self._head]
        self._live = None

    # --- init -------------------------------------------------------------------------------------

    def _fork(self, start: Start) -> None:
        self.pids += 1
        proof = self.random.randbytes(16)
        child = Child(start.spec, start.incarnation, self.pids, proof, self.now_ns)
        self.children[child.pid] = self.programs[child.spec.role](self, child)
        self.handle(ChildForked(child))

    def signal(self, pid: int, number: int, *, code: int | None = None) -> None:
        """A child gets a signal, or (with a code) exits by itself; init tells the kernel."""
        node = self.children.pop(pid, None)
        if node is None:
            return
        suspects = node.suspects()
        node.die()
        child = node.child
        exit = Exit(child.spec.name, child.incarnation, pid, code, number if code is None else None)
        self.after(1, lambda: self._exited(exit, suspects))

    def _exited(self, exit: Exit, suspects: tuple[Suspect, ...]) -> None:
        if self.kernel is None:
            self.exits.append(exit)
        else:
            self.handle(ChildExited(exit, suspects))

    def _kill_hung(self, effect: KillHung) -> None:
        node = self.children.get(effect.pid)
        stopped = node is not None and node.stopped
        self.signal(effect.pid, SIGKILL)
        self.after(0, lambda: self.handle(HungKilled(effect.process, effect.incarnation, stopped)))
