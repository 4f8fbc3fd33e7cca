"""`python -m tests.system.faults.trainer --job HEX ...`: a trainer without a model, whose
losses are those of `llmkernel.testkit.trainer`: known before it computes them."""

import asyncio
import os
import sys
from pathlib import Path

from libllm.config import ProcessEnvironment
from libllm.events import Holding
from libllm.port import Port
from libllm.service import Handlers, Request, Service, run
from llmkernel.testkit.trainer import BATCHES, report, version
from llmproto.jobs import (
    CheckpointCommitted,
    JobEnded,
    JobMark,
    JobPace,
    JobRun,
    JobStopped,
    StepsDone,
)
from llmproto.threads import Done

STEP_S = 0.004
BATCH = 10
"""Steps in one report."""


class Trainer(Service):
    """Rank 0 computes; the others end when it writes that it is over."""

    def __init__(self, port: Port) -> None:
        self._port = port
        said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        self._job, self._attempt = bytes.fromhex(said["--job"]), int(said["--attempt"])
        self._run: JobRun | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = False
        self._unsaid: StepsDone | None = None
        self._mark: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._progress = 1

    def handlers(self) -> Handlers:
        """What the kernel says."""
        return {JobRun: self.begin, JobMark: self.marked, JobPace: self.pace}

    def holding(self) -> Holding:
        """Its job, once it knows it."""
        held = [] if self._run is None else [self._job]
        return Holding(self._progress, held, [self._attempt] * len(held))

    def begin(self, run: JobRun, request: Request) -> None:
        """Continue, once."""
        if self._run is None:
            self._run = run
            work = self._compute(run) if run.rank == 0 else self._follow(run)
            self._task = asyncio.get_running_loop().create_task(work)

    def marked(self, mark: JobMark, request: Request) -> None:
        """So far everything is journaled."""
        if not self._mark.done():
            self._mark.set_result(mark.step)

    def welcomed(self) -> None:
        """What was on its way may be lost."""
        if self._unsaid is not None:
            self._port.send(self._unsaid)

    def pace(self, pace: JobPace, request: Request) -> None:
        """Only the end of it matters here."""
        self._stop = pace.stop

    async def _follow(self, run: JobRun) -> None:
        while not Path(run.rendezvous).exists():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)
        os._exit(0)

    async def _compute(self, run: JobRun) -> None:
        _, steps, every = run.recipe.split()
        step = saved = run.step
        for row in run.reported:
            assert row == report(run.recipe, row.step), "not what was computed"
        while step < int(steps) and not self._stop:
            rows = []
            for _ in range(min(BATCH, int(steps) - step)):
                await asyncio.sleep(STEP_S)
                step += 1
                self._progress += 1
                rows.append(report(run.recipe, step))
            await self._report(StepsDone(self._job, self._attempt, rows, int(steps)))
            if step - saved >= int(every):
                saved = await self._save(run, step)
        if step < int(steps):
            await self._save(run, step)
            self._port.send(JobStopped(self._job, self._attempt))
            await asyncio.sleep(0.05)  # it is on its way
        else:
            ended = JobEnded(self._job, self._attempt, version(run.recipe, step))
            await self._port.call(ended, Done)
        Path(run.rendezvous).touch()
        os._exit(0)

    async def _report(self, done: StepsDone) -> None:
        self._mark = asyncio.get_running_loop().create_future()
        self._unsaid = done
        self._port.send(done)
        assert await self._mark >= done.reports[-1].step, "nothing is missing in between"
        self._unsaid = None

    async def _save(self, run: JobRun, step: int) -> int:
        taken = CheckpointCommitted(
            *(self._job, self._attempt, version(run.recipe, step), step, step * BATCHES)
        )
        await self._port.call(taken, Done)
        return step


if __name__ == "__main__":
    run(Trainer, role="trainer", environment=ProcessEnvironment.read())
