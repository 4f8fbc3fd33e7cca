"""One seed, one run: what is asked, what dies when, and what must hold at the end."""

import random
from functools import partial
from typing import Final

import msgspec
from llmproto.models import DeploymentState, ModelLoad, ModelsAsk
from llmproto.operation import ProcessesAsk, StatusAsk, ThreadsAsk
from llmproto.threads import ThreadRenice, ThreadResume, ThreadSuspend
from msgspec import structs

from llmkernel.events import JournalRoom
from llmkernel.testkit.client import ASK_MS, FakeClient, Reading
from llmkernel.testkit.executor import FakeExecutor
from llmkernel.testkit.oracle import BITTER, HANGS, PAIR, POISON
from llmkernel.testkit.rig import DEVICES, MS
from llmkernel.testkit.store import ENTRIES, FakeStore
from llmkernel.testkit.tokenizer import FakeTokenizer
from llmkernel.testkit.world import SIGKILL, Network, World

NETWORKS: Final = (
    Network(),
    Network(slow=0.05),
    Network(slow=0.05, lost=0.03, twice=0.03),
    Network(slow=0.1, lost=0.02, twice=0.05, reordered=0.2),
)
ASKING_MS: Final = 1500
ENTRY_FIRST: Final = next(iter(ENTRIES))
DYING_MS: Final = 2500
HEALED_MS: Final = 90_000
"""Virtual time within which everything ends once nothing is disturbed any more."""


class Outcome(msgspec.Struct, frozen=True):
    """What a run came to."""

    events: int
    """That the kernel handled."""
    trace: bytes
    """Digest of every effect."""
    kernels: int


class Scenario:
    """A world with requests and deaths, all drawn from one seed."""

    def __init__(self, seed: int, *, deployments: bool = False) -> None:
        """With `deployments` a store swaps what a name serves, again and again."""
        self.chance = random.Random(seed)
        chance = self.chance
        self.world = World(seed, network=chance.choice(NETWORKS))
        self.world.fast = chance.random() < 0.3
        self.world.programs = {"tokenizer": FakeTokenizer, "executor": FakeExecutor}
        slow = chance.choice((1.0, 1.0, 1.0, 30.0))
        self.clients = [FakeClient(self.world, slow=slow) for _ in range(chance.randint(1, 3))]
        self.suspends = False
        """A Suspend may be repeated after its Resume."""
        self.store: FakeStore | None = None
        if deployments:
            self.store = FakeStore(self.world)
            self._plan_deployments(self.store)
        self._plan()

    def _plan_deployments(self, store: FakeStore) -> None:
        """One that can be loaded first; often there is no room for two."""
        chance = self.chance
        memory = chance.choice((3 << 20, 5 << 20, 1 << 30))
        self.world.devices = (structs.replace(DEVICES[0], memory_bytes=memory),)
        self.world.after(30, lambda: store.deploy(ENTRY_FIRST))
        for _ in range(chance.randint(1, 6)):
            model, replicas = chance.choice(list(ENTRIES)), chance.choice((1, 1, 2))
            at_ms = chance.uniform(300, DYING_MS)
            self.world.after(at_ms, partial(store.deploy, model, replicas=replicas))

    def _plan(self) -> None:
        world, chance = self.world, self.chance
        world.after(0, world.boot)
        bad = chance.choice((0, 0, 0, 0, 0, POISON, POISON, PAIR, HANGS, BITTER))
        requests = chance.randint(4, 9)
        for number in range(requests):
            first = 0
            if bad and (number == 0 or (number == 1 and bad == PAIR)):
                first = bad
            world.after(chance.uniform(5, ASKING_MS), partial(self._ask, first))
        for _ in range(chance.randint(0, 2)):
            self._later(lambda: world.crash_kernel(after_ms=chance.uniform(20, 400)))
        for role in ("executor", "tokenizer"):
            for _ in range(chance.choice((0, 0, 1, 1, 2))):
                self._later(partial(self._kill, role))
        for _ in range(chance.randint(0, 3)):
            self._later(self._cut)
        if chance.random() < 0.2:
            self._later(self._stop)
        if chance.random() < 0.3:
            self._later(self._lose_effects)
        if len(self.clients) > 1 and chance.random() < 0.4:
            self._later(self._kill_client)
        for _ in range(chance.randint(0, 2)):
            self._later(self._cancel)
        for _ in range(chance.choice((0, 0, 1, 3))):
            self._later(self._call)
        if chance.random() < 0.2:
            self._later(partial(self._full, room=False))
        if chance.random() < 0.5:
            world.compact_every = chance.randint(1, 40)
        if chance.random() < 0.1:
            self._later(self._stop_kernel)
        if len(self.clients) > 1 and chance.random() < 0.1:
            self._later(self._leave)

    def _later(self, what: object) -> None:
        assert callable(what)
        self.world.after(self.chance.uniform(20, DYING_MS), what)

    # --- what is done -----------------------------------------------------------------------------

    def _ask(self, first: int) -> None:
        chance = self.chance
        living = [client for client in self.clients if client.alive and not client.left]
        prompt = [first or chance.randint(0, 600)]
        prompt += [chance.randint(0, 999) for _ in range(chance.randint(0, 20))]
        plain = not first
        chance.choice(living).generate(
            prompt,
            output_tokens_max=chance.choice((0, 1, 8, 40, 80)) if plain else 12,
            stop=chance.choice(("", "", "q", "e", "é")) if plain else "",
            choices=chance.choice((1, 1, 1, 2, 3)) if plain else 1,
            seed=chance.randint(0, 9),
            deadline_ms=chance.choice((None, None, None, 700)) if plain else None,
            resumable=chance.random() < 0.3,
            model=self._model() if plain else "m",
        )

    def _model(self) -> str | None:
        if self.store is not None and self.store.serves:
            return self.chance.choice(("bot", "bot", "bot", "m"))
        return self.chance.choice((None, None, "m", "o"))

    def _kill(self, role: str) -> None:
        mine = [node for node in self.world.children.values() if node.child.spec.role == role]
        if mine:
            self.world.signal(self.chance.choice(mine).child.pid, SIGKILL)

    def _stop(self) -> None:
        children = list(self.world.children.values())
        if children:
            self.chance.choice(children).stopped = True

    def _cut(self) -> None:
        nodes = list(self.world.by_peer.values())
        if nodes:
            self.chance.choice(nodes).disconnect()

    def _lose_effects(self) -> None:
        self.world.lose_effects = True

    def _kill_client(self) -> None:
        victim, *others = self.clients
        heir = next((other for other in others if other.alive and not other.left), None)
        if heir is None or victim.left:
            return
        victim.die()
        for stream, reading in victim.streams.items():
            asked = any(g.key == stream[:16] for g in victim.opened.values())
            if not reading.over and not asked and not reading.deadline:
                self.world.after(
                    self.chance.uniform(5, 500),
                    partial(heir.resume, stream, reading),
                )

    def _cancel(self) -> None:
        streams: list[tuple[FakeClient, bytes, Reading]] = [
            (client, stream, reading)
            for client in self.clients
            if client.alive and not client.left
            for stream, reading in client.streams.items()
            if not reading.over
        ]
        if streams:
            client, stream, _ = self.chance.choice(streams)
            client.cancel(stream)

    def _call(self) -> None:
        """A system call on some thread, or a look at things."""
        world, chance = self.world, self.chance
        if world.kernel is None:
            return
        threads = list(world.kernel.tables.state.threads.by_id)
        client = chance.choice([client for client in self.clients if client.alive])
        if not threads:
            client.ask(chance.choice((StatusAsk(), ThreadsAsk(), ProcessesAsk(), ModelsAsk())))
            return
        thread = chance.choice(threads)
        match chance.randint(0, 2):
            case 0:
                self.suspends = True
                client.ask(ThreadSuspend(thread))
                world.after(chance.uniform(1, 600), partial(self._resume, thread))
            case 1:
                client.ask(ThreadRenice(thread, chance.randint(-8, 7), chance.randint(0, 3)))
            case _:
                client.ask(ModelLoad("o"))

    def _resume(self, thread: bytes) -> None:
        living = [client for client in self.clients if client.alive and not client.left]
        self.chance.choice(living).ask(ThreadResume(thread))

    def _full(self, *, room: bool) -> None:
        """The journal's disk, for a while."""
        self.world.handle(JournalRoom(room))
        self.world.room = room
        if not room:
            self.world.after(self.chance.uniform(10, 700), partial(self._full, room=True))

    def _stop_kernel(self) -> None:
        """Somebody stops the kernel, for longer than it lets others be silent."""
        self.world.kernel_stopped_until_ns = self.world.now_ns + int(
            self.chance.uniform(100, 1900) * MS
        )

    def _leave(self) -> None:
        client = self.clients[-1]
        if client.alive and sum(client.alive for client in self.clients) > 1:
            client.leave()

    # --- what must hold ---------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All of it; raises AssertionError where a promise is broken."""
        world = self.world
        world.run(DYING_MS + 100)
        world.network = Network()
        world.lose_effects = False
        if self.suspends:
            world.run(2 * ASK_MS)
            assert world.kernel is not None
            for thread in world.kernel.tables.state.threads:
                if thread.suspended:
                    self._resume(thread.id)
        world.run(HEALED_MS, until=self._settled)
        unread = [
            (stream.hex(), reading.text, reading.twin)
            for client in self.clients
            if client.alive
            for stream, reading in client.streams.items()
            if not reading.over
        ]
        assert not unread, unread
        assert self._settled(), self._left()
        assert world.replayed().digest() == self._kernel_digest()
        assert world.kernel is not None
        world.kernel.check()
        return Outcome(world.events, world.trace.digest(), world.epoch)

    def _kernel_digest(self) -> bytes:
        assert self.world.kernel is not None
        return self.world.kernel.tables.state.digest()

    def _settled(self) -> bool:
        """Everybody has what they asked for, and nothing of it is left anywhere."""
        world = self.world
        if world.kernel is None or not all(client.done for client in self.clients):
            return False
        return not any(self._left().values())

    def _left(self) -> dict[str, list[object]]:
        world = self.world
        assert world.kernel is not None
        t = world.kernel.tables
        return {
            "threads": list(t.state.threads.by_id),
            "residents": [r for p in t.processes.by_name.values() for r in p.residents],
            "requests": list(t.sessions.requests),
            "queue": [*t.queue.models()],
            "rolling": [
                name
                for name, one in t.state.deployments.items()
                if one.state is DeploymentState.ROLLING
            ],
            "retired": list(t.state.retired),
            "executors": [
                node.residents
                for node in world.children.values()
                if isinstance(node, FakeExecutor) and node.residents
            ],
            "sinks": [
                node.by_thread
                for node in world.children.values()
                if isinstance(node, FakeTokenizer) and (node.by_thread or node.by_stream)
            ],
            "dead": [s.id for s in t.sessions.by_id.values() if not self._lives(s.id)],
        }

    def _lives(self, session: bytes) -> bool:
        return any(node.alive and node.hello.session == session for node in self.world.nodes)
