"""A kernel in memory, for tests: no sockets, no processes, a clock that stands until it is moved.

`Rig` drives the real core and keeps the journal as a list of encoded facts; `Peer` is one
connection.  Authors of plug-in services use both to see what the kernel makes of their messages.
"""

from collections.abc import Iterable
from typing import Any, Final, TypeVar

import msgspec
from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Beat, Hello, Welcome
from llmproto.execution import ExecutorReady
from llmproto.generation import Accepted, Generate, Sampling
from llmproto.init import Child, Exit, Spec
from llmproto.jobs import JobKind, JobSpawn, JobSpawned
from llmproto.kinds import KIND_OF
from llmproto.models import ModelEntry, ModelRegister
from llmproto.operation import DeviceRow, ProcessStarted
from llmproto.threads import ThreadSpawn, ThreadSpawned

from llmkernel import facts
from llmkernel.core import Kernel
from llmkernel.events import (
    Arrived,
    ChildExited,
    ChildForked,
    Effect,
    Event,
    Forward,
    KernelConfig,
    Record,
    Rejected,
    Restarted,
    Send,
    Start,
    Suspect,
    Ticked,
)
from llmkernel.state import State
from llmkernel.threads import Thread

MS: Final = 1_000_000
OPERATOR_PROOF: Final = b"operator" * 4
SERVICE_PROOF: Final = b"service!" * 4
TOKENIZER: Final = Spec(name="tokenizer", role="tokenizer", module="fake")
CONFIG: Final = KernelConfig(
    services=(TOKENIZER,),
    operator_proof=OPERATOR_PROOF,
    service_proof=SERVICE_PROOF,
    executor_memory_bytes=1 << 20,
    preload=(),
)
DEVICES: Final = (DeviceRow(name="cpu0", kind="cpu", cores=[0, 1], memory_bytes=1 << 30),)
MODEL: Final = ModelEntry(
    name="m",
    path="/models/m",
    digest=b"m" * 16,
    architecture="Fake",
    context_tokens=2048,
    vocabulary=1000,
    weight_bytes=1 << 20,
)
MessageT = TypeVar("MessageT", bound=Message)


def numbered(number: int) -> bytes:
    """An id of 16 bytes."""
    return number.to_bytes(16)


def spawn_of(key: bytes, prompt: Iterable[int] = (1, 2, 3), **changes: Any) -> ThreadSpawn:
    """A ThreadSpawn with everything that a test does not care about; `changes` are its fields
    (of several types, hence Any)."""
    spawn = ThreadSpawn(
        key=key,
        index=0,
        digest=b"d" * 16,
        model=MODEL.name,
        tokens=wire.pack_tokens(prompt),
        output_tokens_max=8,
        sampling=Sampling(temperature=0.0),
        sink_state=b"",
    )
    return msgspec.structs.replace(spawn, **changes)


def job_of(key: bytes, **changes: Any) -> JobSpawn:
    """A JobSpawn with everything that a test does not care about; `changes` are its fields
    (of several types, hence Any)."""
    spawn = JobSpawn(key, JobKind.TRAIN, "bot", b"recipe", memory_bytes=1 << 20)
    return msgspec.structs.replace(spawn, **changes)


class Rig:
    """One kernel and its clock; remembers every effect of the last event, and the journal."""

    def __init__(
        self,
        config: KernelConfig = CONFIG,
        devices: tuple[DeviceRow, ...] = DEVICES,
        *,
        children: tuple[Child, ...] = (),
        rejected: tuple[Rejected, ...] = (),
    ) -> None:
        self.config = config
        self.devices = devices
        self.journal: list[bytes] = []
        self.now_ns = 1_000_000_000
        self.epoch = 0
        self.effects: list[Effect] = []
        self.ranks: dict[str, Child] = {}
        """The last child of each process of a job."""
        self.starts: dict[str, Start] = {}
        """The last Start of each process."""
        self.pids = 100
        self.ids = 0
        self.peers = 0
        self.restart(children=children, rejected=rejected)

    def restart(
        self,
        *,
        children: tuple[Child, ...] = (),
        exits: tuple[Exit, ...] = (),
        rejected: tuple[Rejected, ...] = (),
    ) -> list[Effect]:
        """Another kernel takes over, with what the journal holds."""
        self.kernel = Kernel(self.replayed())
        self.epoch += 1
        return self.handle(
            Restarted(
                self.epoch,
                b"b" * 16,
                self.now_ns,
                self.config,
                self.devices,
                children,
                exits,
                rejected,
            )
        )

    def replayed(self) -> State:
        """What the journal says."""
        state = State()
        for record in self.journal:
            state.apply(facts.decode(record))
        return state

    def handle(self, event: Event) -> list[Effect]:
        """One event; every invariant is checked behind it."""
        self.effects = self.kernel.handle(self.now_ns, event)
        for effect in self.effects:
            if isinstance(effect, Record):
                self.journal.append(facts.encode(effect.fact))
            elif isinstance(effect, Start):
                self.starts[effect.spec.name] = effect
        self.kernel.check()
        return self.effects

    def wait(self, ms: int) -> list[Effect]:
        """Time passes; the kernel ticks as its shell would.  Gives all effects."""
        effects: list[Effect] = []
        until_ns = self.now_ns + ms * MS
        while self.now_ns < until_ns:
            self.now_ns = min(until_ns, self.now_ns + 250 * MS)
            effects += self.handle(Ticked())
        return effects

    def thread(self, thread: bytes) -> Thread:
        """A thread that is known."""
        return self.kernel.tables.state.threads.by_id[thread]

    # --- processes --------------------------------------------------------------------------------

    def fork(self, start: Start) -> Child:
        """What init does with a Start; the kernel is told."""
        self.pids += 1
        proof = b"proof" + self.pids.to_bytes(4)
        child = Child(start.spec, start.incarnation, self.pids, proof, self.now_ns)
        self.handle(ChildForked(child))
        return child

    def exited(
        self,
        child: Child,
        *,
        code: int | None = None,
        signal: int | None = None,
        suspects: tuple[tuple[bytes, int], ...] = (),
    ) -> list[Effect]:
        """A child is gone; an exit by signal 11 unless a test says otherwise."""
        if code is None and signal is None:
            signal = 11
        exit = Exit(child.spec.name, child.incarnation, child.pid, code, signal)
        rows = tuple(Suspect(thread, position) for thread, position in suspects)
        return self.handle(ChildExited(exit, rows))

    # --- jobs -------------------------------------------------------------------------------------

    def job(self, client: "Peer", key: bytes = b"j" * 16, **changes: Any) -> bytes:
        """A job of this client, accepted."""
        client.say(job_of(key, **changes))
        return client.the(JobSpawned).job

    def trainer(self, name: str = "trainer-1") -> "Peer":
        """A rank that the kernel has asked for, ready."""
        child = self.fork(self.starts[name])
        self.ranks[name] = child
        return self.service(child)

    # --- threads ----------------------------------------------------------------------------------

    def ask(self, client: "Peer", tokenizer: "Peer", *, id: bytes | None = None) -> bytes:
        """A client's Generate is on its way to the tokenizer; gives its id."""
        key = numbered(1000 + self.ids)
        client.say(Generate(key=key, prompt="once"), target="tokenizer", id=id)
        ((header, _),) = tokenizer.heard
        return header.id

    def spawn(
        self, client: "Peer", tokenizer: "Peer", key: bytes = b"k" * 16, **changes: Any
    ) -> bytes:
        """A thread of this client, accepted."""
        cause = self.ask(client, tokenizer)
        tokenizer.say(spawn_of(key, **changes), cause=cause)
        thread = tokenizer.the(ThreadSpawned).thread
        effects = list(self.effects)
        tokenizer.say(Accepted([thread], MODEL.name, 3), reply_to=cause)
        self.effects = effects
        return thread

    # --- peers ------------------------------------------------------------------------------------

    def client(self) -> "Peer":
        """A welcomed client."""
        peer = self.peer("client")
        peer.hello(OPERATOR_PROOF)
        return peer

    def peer(self, role: str) -> "Peer":
        """A connection on which nothing was said."""
        self.peers += 1
        return Peer(self, b"peer%d" % self.peers, numbered(self.peers), role)

    def service(self, child: Child) -> "Peer":
        """A child that has said Hello, Beat and that it is ready (an executor does not)."""
        peer = self.peer(child.spec.role)
        peer.greet(child)
        if child.spec.role != "executor":
            peer.say(ProcessStarted())
        return peer

    def tokenizer(self) -> "Peer":
        """The tokenizer that the configuration asks for, ready, with a registered model."""
        self.tokenizer_child = self.fork(self.starts["tokenizer"])
        peer = self.service(self.tokenizer_child)
        peer.say(ModelRegister(MODEL, default=True))
        return peer

    def executor(self, name: str = "executor-1", **changes: int) -> "Peer":
        """An executor that the kernel has asked for, ready."""
        start = self.starts[name]
        self.executor_child = self.fork(start)
        peer = self.service(self.executor_child)
        peer.say(executor_ready(start.spec.arguments[1], **changes))
        return peer


def executor_ready(model: str, **changes: int) -> ExecutorReady:
    """As an executor with room for everything says it."""
    figures = {"context_tokens": 2048, "blocks": 1024, "block_tokens": 16, "residents_max": 64}
    figures.update(changes)
    return ExecutorReady(
        model=model,
        digest=MODEL.digest,
        context_tokens=figures["context_tokens"],
        blocks=figures["blocks"],
        block_tokens=figures["block_tokens"],
        residents_max=figures["residents_max"],
        path="float32 cpu torch exact",
    )


class Peer:
    """One connection; `said` is what the kernel sent to it in answer to the last event."""

    def __init__(self, rig: Rig, peer: bytes, session: bytes, role: str) -> None:
        self.rig = rig
        self.peer = peer
        self.session = session
        self.role = role

    def say(
        self,
        message: Message,
        *,
        target: str = "kernel",
        id: bytes | None = None,
        cause: bytes | None = None,
        reply_to: bytes | None = None,
        peer: bytes | None = None,
        tenant: int | None = None,
        blobs: tuple[bytes, ...] = (),
    ) -> list[Message]:
        """Send; gives what came back to this connection."""
        if id is None:
            self.rig.ids += 1
            id = b"id" + self.rig.ids.to_bytes(14)
        self.last_id = id
        header = Header(
            limits.PROTOCOL_VERSION,
            KIND_OF[type(message)],
            id,
            target=target,
            cause=cause,
            reply_to=reply_to,
            peer=peer,
            tenant=tenant,
            blobs=list(map(len, blobs)),
        )
        self.rig.handle(Arrived(self.peer, tuple(wire.encode(header, message, blobs))))
        return self.said

    @property
    def heard(self) -> list[tuple[Header, Message]]:
        """Headers and messages to this connection among the last event's effects."""
        found: list[tuple[Header, Message]] = []
        for effect in self.rig.effects:
            if isinstance(effect, Send) and effect.peer == self.peer:
                body = wire.encode_body(effect.message)
                found.append((effect.header, wire.decode_body(effect.header.kind, body)))
            elif isinstance(effect, Forward) and effect.peer == self.peer:
                found.append((effect.header, wire.decode_body(effect.header.kind, effect.body[0])))
        return found

    @property
    def said(self) -> list[Message]:
        """Messages to this connection among the last event's effects."""
        return [message for _, message in self.heard]

    def hello(self, proof: bytes, *, process: str | None = None, incarnation: int = 0) -> Message:
        """Say Hello; gives the answer."""
        hello = Hello(self.session, self.role, proof, process=process, incarnation=incarnation)
        (answer,) = self.say(hello)
        return answer

    def greet(self, child: Child) -> None:
        """Hello and the first Beat of a process that init started."""
        answer = self.hello(child.proof, process=child.spec.name, incarnation=child.incarnation)
        assert isinstance(answer, Welcome), answer
        self.beat()

    def beat(
        self,
        progress: int = 0,
        *,
        threads: tuple[bytes, ...] = (),
        positions: tuple[int, ...] = (),
    ) -> list[Message]:
        """Alive, and holding these."""
        return self.say(Beat(progress, list(threads), list(positions)))

    def the(self, kind: type[MessageT]) -> MessageT:
        """The one message of this kind among the last event's effects."""
        (found,) = [message for message in self.said if isinstance(message, kind)]
        return found
