"""One seed, one run of jobs: what is trained, what dies when, and what must hold at the end."""

import random
from collections.abc import Callable
from functools import partial
from typing import Final

from llmproto.jobs import JobKind, JobsAsk, JobSpawn, JobState
from llmproto.operation import DeviceRow
from llmproto.threads import ThreadCancel, ThreadRenice, ThreadResume, ThreadSuspend

from llmkernel.events import JournalRoom, Record
from llmkernel.facts import AnyFact, CheckpointTaken, JobAdmitted, StepsReported
from llmkernel.jobs import Job
from llmkernel.testkit.client import FakeClient
from llmkernel.testkit.executor import FakeExecutor
from llmkernel.testkit.scenario import NETWORKS, Outcome
from llmkernel.testkit.tokenizer import FakeTokenizer
from llmkernel.testkit.trainer import (
    BATCHES,
    POISON_STEP,
    POISONED,
    FakeTrainer,
    recipe_of,
    report,
    version,
)
from llmkernel.testkit.world import SIGKILL, Network, World

DYING_MS: Final = 3_000
SMALL: Final = (DeviceRow(name="cpu0", kind="cpu", cores=[0, 1], memory_bytes=8 << 20),)
"""A model with its executor takes 2 MiB."""
HEALED_MS: Final = 300_000
"""Virtual time within which everything ends once nothing is disturbed any more."""


class Books:
    """What the journal says of jobs, fact by fact.

    Invariant: the steps of a job follow one another and are those of an undisturbed run; a
    checkpoint never holds a step that was not reported, and never goes back.
    """

    def __init__(self) -> None:
        self.recipes: dict[bytes, bytes] = {}
        self.steps: dict[bytes, int] = {}
        self.checkpoints: dict[bytes, int] = {}

    def record(self, fact: AnyFact) -> None:
        """Follow the journal."""
        if isinstance(fact, JobAdmitted):
            self.recipes.setdefault(fact.job, fact.recipe)
        elif isinstance(fact, StepsReported):
            for row in fact.reports:
                step = self.steps[fact.job] = self.steps.get(fact.job, 0) + 1
                assert row == report(self.recipes[fact.job], step), (row, step)
        elif isinstance(fact, CheckpointTaken):
            assert fact.step <= self.steps.get(fact.job, 0)
            assert fact.step >= self.checkpoints.get(fact.job, 0)
            assert fact.version == version(self.recipes[fact.job], fact.step)
            assert fact.position == fact.step * BATCHES
            self.checkpoints[fact.job] = fact.step


class JobScenario:
    """A world with jobs and deaths, all drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        chance = self.chance
        self.world = World(seed, network=chance.choice(NETWORKS))
        self.books = Books()
        self.world.watch = self._watch
        self.world.programs = {"tokenizer": FakeTokenizer, "trainer": FakeTrainer}
        self.client = FakeClient(self.world)
        self.mixed = chance.random() < 0.3
        """Others generate meanwhile, on a device that has not room for everything at once."""
        if self.mixed:
            self.world.programs["executor"] = FakeExecutor
            self.world.devices = SMALL
        self.spawns: list[JobSpawn] = []
        self.cancelled: set[bytes] = set()
        """Request keys."""
        self._plan()

    def _watch(self, effect: object) -> None:
        if isinstance(effect, Record):
            self.books.record(effect.fact)

    def _plan(self) -> None:
        world, chance = self.world, self.chance
        world.after(0, world.boot)
        for number in range(chance.randint(1, 3)):
            world.after(chance.uniform(5, 1000), partial(self._spawn, number))
        for _ in range(chance.randint(1, 5) if self.mixed else 0):
            world.after(chance.uniform(100, 2 * DYING_MS), self._generate)
        for _ in range(chance.randint(0, 2)):
            self._later(lambda: world.crash_kernel(after_ms=chance.uniform(20, 400)))
        for _ in range(chance.randint(0, 4)):
            self._later(self._kill)
        for _ in range(chance.randint(0, 2)):
            self._later(self._cut)
        for _ in range(chance.choice((0, 0, 1, 2))):
            self._later(self._suspend)
        if chance.random() < 0.2:
            self._later(self._stop)
        if chance.random() < 0.3:
            self._later(self._lose_effects)
        if chance.random() < 0.2:
            self._later(self._cancel)
        if chance.random() < 0.2:
            self._later(partial(self._full, room=False))
        if chance.random() < 0.5:
            world.compact_every = chance.randint(1, 40)
        for _ in range(2):
            self._later(lambda: self.client.ask(JobsAsk()))

    def _later(self, what: Callable[[], None]) -> None:
        self.world.after(self.chance.uniform(20, DYING_MS), what)

    # --- what is done -----------------------------------------------------------------------------

    def _spawn(self, number: int) -> None:
        chance = self.chance
        poisoned = chance.random() < 0.1
        name = POISONED.decode() if poisoned else f"job-{number}"
        spawn = JobSpawn(
            key=chance.randbytes(16),
            kind=JobKind.TRAIN,
            name=f"{name}-{number}",
            recipe=recipe_of(name, chance.randint(1, 60), chance.choice((3, 10, 25, 100))),
            processes=chance.choice((1, 1, 2)),
            memory_bytes=chance.randint(1, 4) << 20,
            service_class=chance.choice((1, 3, 3, 3)),
            priority=chance.randint(-2, 2),
        )
        self.spawns.append(spawn)
        self._ask_again(spawn)

    def _generate(self) -> None:
        self.client.generate(
            [self.chance.randint(0, 600)],
            output_tokens_max=self.chance.choice((1, 8, 40)),
            model=self.chance.choice(("m", "o")),
        )

    def _ask_again(self, spawn: JobSpawn) -> None:
        """Until the kernel has it: a caller whose patience ends asks again with its key."""
        if self._find(spawn) is None:
            self.client.ask(spawn)
            self.world.after(6_000, partial(self._ask_again, spawn))

    def _find(self, spawn: JobSpawn) -> Job | None:
        kernel = self.world.kernel
        state = kernel.tables.state if kernel is not None else self.world.replayed()
        return next((job for job in state.jobs if job.key == spawn.key), None)

    def _jobs(self) -> list[Job]:
        kernel = self.world.kernel
        return [] if kernel is None else list(kernel.tables.state.jobs)

    def _kill(self) -> None:
        ranks = [n for n in self.world.children.values() if isinstance(n, FakeTrainer)]
        if ranks:
            self.world.signal(self.chance.choice(ranks).child.pid, SIGKILL)

    def _stop(self) -> None:
        ranks = [n for n in self.world.children.values() if isinstance(n, FakeTrainer)]
        if ranks:
            self.chance.choice(ranks).stopped = True

    def _cut(self) -> None:
        nodes = list(self.world.by_peer.values())
        if nodes:
            self.chance.choice(nodes).disconnect()

    def _lose_effects(self) -> None:
        self.world.lose_effects = True

    def _suspend(self) -> None:
        jobs = self._jobs()
        if jobs:
            job = self.chance.choice(jobs)
            self.client.ask(ThreadSuspend(job.id))
            self.client.ask(ThreadRenice(job.id, self.chance.randint(-8, 7)))
            resume = partial(self.client.ask, ThreadResume(job.id))
            self.world.after(self.chance.uniform(1, 900), resume)

    def _cancel(self) -> None:
        jobs = self._jobs()
        if jobs:
            job = self.chance.choice(jobs)
            self.cancelled.add(job.key)
            self.client.ask(ThreadCancel(job.id))

    def _full(self, *, room: bool) -> None:
        self.world.handle(JournalRoom(room))
        self.world.room = room
        if not room:
            self.world.after(self.chance.uniform(10, 700), partial(self._full, room=True))

    # --- what must hold ---------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All of it; raises AssertionError where a promise is broken."""
        world = self.world
        world.run(DYING_MS + 7_000)
        world.network = Network()
        world.lose_effects = False
        if world.kernel is None:
            world.run(500)
        for job in self._jobs():
            if job.suspended:  # its Suspend was repeated after its Resume
                self.client.ask(ThreadResume(job.id))
        world.run(HEALED_MS, until=self._settled)
        assert self._settled(), [(j.name, j.state, j.step, j.doing) for j in self._jobs()]
        for spawn in self.spawns:
            self._judge(spawn)
        assert world.kernel is not None
        assert world.replayed().digest() == world.kernel.tables.state.digest()
        world.kernel.check()
        return Outcome(world.events, world.trace.digest(), world.epoch)

    def _settled(self) -> bool:
        jobs = [self._find(spawn) for spawn in self.spawns]
        if self.world.kernel is None or not all(job is not None and job.end for job in jobs):
            return False
        if not self.client.done:
            return False
        return not any(isinstance(node, FakeTrainer) for node in self.world.children.values())

    def _judge(self, spawn: JobSpawn) -> None:
        job = self._find(spawn)
        assert job is not None
        steps = int(spawn.recipe.split()[1])
        poisoned = spawn.recipe.startswith(POISONED) and steps >= POISON_STEP
        if job.state is JobState.CANCELLED:
            assert spawn.key in self.cancelled
        elif poisoned:
            assert job.state is JobState.FAILED and job.step < POISON_STEP, job.state
            assert "see `llmos logs trainer-" in job.detail
        else:
            assert (job.state, job.step) == (JobState.DONE, steps), (job.state, job.detail)
            assert job.version == version(spawn.recipe, steps)
            assert job.reports == [report(spawn.recipe, step + 1) for step in range(steps)]
        living = [node for node in self.world.nodes if isinstance(node, FakeTrainer) and node.alive]
        assert not living
