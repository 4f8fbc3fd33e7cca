"""A trainer without a model: its losses are numbers that only the recipe and the step decide, so
that whatever dies in between, the committed ones are known beforehand."""

import struct
import zlib
from functools import partial
from hashlib import blake2b
from typing import Final

from libllm.events import Answer, Arrived, Call, Post, Welcomed
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.init import Child
from llmproto.jobs import (
    CheckpointCommitted,
    JobEnded,
    JobMark,
    JobPace,
    JobRun,
    JobStopped,
    StepReport,
    StepsDone,
)
from llmproto.operation import ProcessStarted

from libllm import events as session_events
from llmkernel.testkit.world import Process, World

STEP_MS: Final = 15
LOAD_MS: Final = 25
REPORT_MS: Final = 60
SAVE_MS: Final = 30
BATCHES: Final = 4
"""Of one step: what the data position counts."""
POISONED: Final = b"poisoned"
"""A recipe whose computation ends its process at `POISON_STEP`."""
POISON_STEP: Final = 7


def recipe_of(name: str, steps: int, checkpoint_every: int) -> bytes:
    """What the fake trainer reads."""
    return f"{name} {steps} {checkpoint_every}".encode()


def loss(recipe: bytes, step: int) -> float:
    """Of a step: any number, always the same."""
    low = zlib.crc32(step.to_bytes(8), zlib.crc32(recipe))
    found: float = struct.unpack("<d", struct.pack("<Q", (0x3FF << 52) | (low << 20)))[0]
    return found


def version(recipe: bytes, step: int) -> bytes:
    """Of the model after so many steps."""
    return blake2b(recipe + step.to_bytes(8), digest_size=32).digest()


def report(recipe: bytes, step: int) -> StepReport:
    """As an undisturbed run reports it."""
    return StepReport(step, loss(recipe, step), tokens=64)


class FakeTrainer(Process):
    """One rank.  Rank 0 steps while every rank of its attempt runs, and speaks for all."""

    def __init__(self, world: World, child: Child) -> None:
        super().__init__(world, child)
        said = dict(zip(child.spec.arguments[::2], child.spec.arguments[1::2]))
        self.job = bytes.fromhex(said["--job"])
        self.attempt, self.rank = int(said["--attempt"]), int(said["--rank"])
        self.processes = int(said["--processes"])
        self.run: JobRun | None = None
        self.share = 1.0
        self.loaded = False
        self.over = False
        """It has said its last word, and waits for the answer."""
        self.leaving = False
        self.step = 0
        self.mark = 0
        self.saving = 0
        """The step whose checkpoint is on its way to be committed; 0: none."""
        self.checkpointed = 0
        self.unsaid: list[StepReport] = []
        self.calls = 0
        self.progress = 0
        world.after(LOAD_MS, self._load)

    def holding(self) -> session_events.Holding:
        """Its job, once it knows it."""
        held = [] if self.run is None else [self.job]
        return session_events.Holding(self.progress, held, [self.attempt] * len(held))

    def took(self, effect: session_events.Effect) -> None:
        """Announce itself; follow the kernel."""
        if isinstance(effect, Welcomed) and self.loaded:
            self.say(ProcessStarted())
        elif isinstance(effect, Arrived):
            self._told(effect.message)
        elif isinstance(effect, Answer):
            self._answered(effect.message)

    def say(self, message: Message) -> None:
        """Tell the kernel, once."""
        self.feed(Post(message))

    def ask(self, message: Message) -> None:
        """Tell the kernel until it answers."""
        self.calls += 1
        self.feed(Call(self.calls, message, wait_exhausted=True))

    def _load(self) -> None:
        self.loaded = True
        self.progress += 1
        self.say(ProcessStarted())

    def _told(self, message: Message) -> None:
        match message:
            case JobRun():
                assert (message.job, message.attempt) == (self.job, self.attempt)
                assert (message.rank, message.processes) == (self.rank, self.processes)
                if self.run is None:
                    self._begin(message)
            case JobMark():
                self.mark = max(self.mark, message.step)
                self.unsaid = [row for row in self.unsaid if row.step > self.mark]
            case JobPace():
                assert (message.job, message.attempt) == (self.job, self.attempt)
                self.share = message.share
                if message.stop and not self.leaving:
                    self.leaving = True
                    if self.run is None:
                        self._stopped()
            case _:
                raise AssertionError(message)

    def _begin(self, run: JobRun) -> None:
        self.run = run
        self.share = run.share
        self.step = self.checkpointed = run.step
        assert run.position == run.step * BATCHES
        if run.checkpoint is not None:
            assert run.checkpoint == version(run.recipe, run.step), "not what was saved"
        assert [row.step for row in run.reported] == [
            run.step + 1 + number for number in range(len(run.reported))
        ]
        for row in run.reported:
            assert row == report(run.recipe, row.step), "not what was computed"
        self.mark = run.step + len(run.reported)
        kernel = self.world.kernel
        if kernel is not None and self.rank == 0:
            assert self.mark == kernel.tables.state.jobs.by_id[self.job].step, "some are missing"
        if self.rank == 0:
            self._go()
            self._report()

    # --- rank 0 -----------------------------------------------------------------------------------

    def _siblings(self) -> list["FakeTrainer"]:
        return [
            node
            for node in self.world.children.values()
            if isinstance(node, FakeTrainer)
            and (node.job, node.attempt) == (self.job, self.attempt)
        ]

    def _go(self) -> None:
        self.world.after(STEP_MS / self.share, self._compute)

    def _compute(self) -> None:
        """A step, a checkpoint, or the end; it stands while a rank is stopped or missing."""
        run = self.run
        if not self.alive or self.over or run is None:
            return
        if self.stopped or sum(s.run is not None for s in self._siblings()) < self.processes:
            self._go()
            return
        _, steps, every = run.recipe.split()
        self.progress += 1
        due = self.step % int(every) == 0 and self.step > self.checkpointed
        if self.saving:
            pass
        elif self.step > self.checkpointed and (due or self.leaving):
            self.saving = self.step
            self.world.after(SAVE_MS, self._saved)
        elif self.leaving:
            self._stopped()
        elif self.step < int(steps):
            self._step(run)
        elif self.mark == self.step:
            self.over = True
            self.ask(JobEnded(self.job, self.attempt, version(run.recipe, self.step)))
        self._go()

    def _step(self, run: JobRun) -> None:
        self.step += 1
        if run.recipe.startswith(POISONED) and self.step == POISON_STEP:
            self.world.signal(self.child.pid, 0, code=1)
            return
        if self.step > self.mark:
            self.unsaid.append(report(run.recipe, self.step))

    def _saved(self) -> None:
        """The store has it: the kernel hears of it after the reports up to there."""
        if self.alive and self.run is not None:
            digest = version(self.run.recipe, self.saving)
            position = self.saving * BATCHES
            self.ask(CheckpointCommitted(self.job, self.attempt, digest, self.saving, position))

    def _report(self) -> None:
        if not self.alive or self.over:
            return
        if self.unsaid:
            assert self.run is not None
            total = int(self.run.recipe.split()[1])
            self.say(StepsDone(self.job, self.attempt, list(self.unsaid), total))
        self.world.after(REPORT_MS, self._report)

    def _answered(self, answer: Message) -> None:
        match answer:
            case Failed():
                assert answer.kind is ErrorKind.STALE, answer  # the attempt is over
                self._exit(1)
            case _ if self.over:
                self._all_exit()
            case _:
                self.checkpointed, self.saving = self.saving, 0

    # --- the end ----------------------------------------------------------------------------------

    def _stopped(self) -> None:
        if self.rank == 0:
            self.say(JobStopped(self.job, self.attempt))
            self._all_exit()

    def _all_exit(self) -> None:
        self.over = True
        for sibling in self._siblings():
            self.world.after(2 + sibling.rank, partial(sibling._exit, 0))

    def _exit(self, code: int) -> None:
        if self.alive and not self.stopped:
            self.world.signal(self.child.pid, 0, code=code)
