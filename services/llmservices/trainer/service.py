"""The trainer's messages: an order comes, steps and checkpoints go; a thread computes."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import torch
from libllm.config import Home
from libllm.events import Holding
from libllm.metrics import Instruments, Reporter
from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto import limits
from llmproto.base import Message
from llmproto.errors import ErrorKind, RemoteError
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
from llmproto.metrics import Metrics
from llmproto.recipes import Recipe
from llmproto.threads import Done
from llmproto.versions import Digest, Saved

from libllm import logs
from llmservices.trainer.finishing import Checkpoint
from llmservices.trainer.pace import Pace
from llmservices.trainer.reports import Backlog
from llmservices.trainer.work import Order, Place, Result, Stopped, Work

MessageT = TypeVar("MessageT", bound=Message)
T = TypeVar("T")

FLUSH_S: Final = 0.25
"""Reports are sent so often."""
DRAIN_STEP_S: Final = 1.0
"""What is left of a step after SIGTERM is waited for so long."""


class Settings(msgspec.Struct, frozen=True):
    """What the kernel granted, as the arguments say it."""

    job: bytes
    attempt: int
    device: str
    cores: list[int]
    home: Home
    process: str


class Measures:
    """For the monitor."""

    def __init__(self) -> None:
        self._made = Instruments()
        self._steps = self._made.counter("llmos_trainer_steps_total")
        self._tokens = self._made.counter("llmos_trainer_tokens_total")
        self._checkpoints = self._made.counter("llmos_trainer_checkpoints_total")
        self._loss = self._made.gauge("llmos_trainer_loss")
        self._rate = self._made.gauge("llmos_trainer_learning_rate")
        self._seconds = self._made.histogram("llmos_trainer_step_seconds")

    def take(self, report: StepReport) -> None:
        """One step."""
        self._steps.add()
        self._tokens.add(report.tokens)
        self._loss.value = report.loss
        self._rate.value = report.learning_rate
        self._seconds.add(report.ms / 1000)

    def saved(self) -> None:
        """One checkpoint."""
        self._checkpoints.add()

    def report(self, process: str, incarnation: int) -> Metrics:
        """All of it."""
        return self._made.report(process, incarnation)


class Trainer(Service):
    """One rank of one job."""

    def __init__(self, port: Port, settings: Settings) -> None:
        self._port = port
        self._settings = settings
        self._pace = Pace()
        self._backlog = Backlog()
        self._measures = Measures()
        self._reporter = Reporter(port, self._report)
        self._logger = logs.configure(settings.process)
        self._order: Order | None = None
        self._work: Work | None = None
        self._progress = 0
        self._steps_total = 0
        self._doing = ""
        self._said = ("", 0)
        self._flushing: asyncio.TimerHandle | None = None
        """Reports are on their way; their mark is awaited."""

    def handlers(self) -> Handlers:
        """Every message that a trainer takes."""
        return {JobRun: self.job_run, JobPace: self.job_pace, JobMark: self.job_mark}

    def holding(self) -> Holding:
        """The job, once it is known here; every micro-batch is progress."""
        if self._order is None:
            return Holding()
        return Holding(self._progress, [self._order.job], [self._order.attempt])

    def welcomed(self) -> None:
        """What was said may be lost."""
        self._flush()

    async def drain(self) -> None:
        """SIGTERM: the kernel goes on from the last checkpoint; what was computed is said."""
        self._flush()
        self._reporter.stop()
        if self._work is not None:
            self._work.abandon()

    # --- orders -----------------------------------------------------------------------------------

    def job_run(self, run: JobRun, request: Request) -> None:
        """Begin; said again after each Welcome, it changes nothing."""
        if self._order is not None or run.attempt != self._settings.attempt:
            return
        self._pace.set(run.share, stop=False)
        place = Place(self._device(), max(1, len(self._settings.cores)), self._settings.home.run)
        try:
            recipe = msgspec.msgpack.decode(run.recipe, type=Recipe)
        except msgspec.DecodeError as error:
            self._end_soon(run, RemoteError(ErrorKind.INVALID, f"the recipe is none: {error}"))
            return
        self._order = order_of(run, recipe)
        self._reporter.start()
        self._port.working("preparing", budget_ms=limits.WORKING_MS_MAX)
        bus = LoopBus(self)
        self._work = Work(self._order, place, bus, self._pace)
        threading.Thread(target=self._run, args=(self._work,), name="steps", daemon=True).start()

    def job_pace(self, pace: JobPace, request: Request) -> None:
        """Slower, faster, or away."""
        if self._settings.attempt == pace.attempt:
            self._pace.set(pace.share, stop=pace.stop)
            if pace.stop and self._order is None:
                self._leave(pace.job)

    def job_mark(self, mark: JobMark, request: Request) -> None:
        """Journaled."""
        if mark.attempt != self._settings.attempt:
            return
        self._backlog.marked(mark.step)
        if self._backlog.next():
            self._flush_soon()

    def _device(self) -> torch.device:
        name = self._settings.device
        return torch.device(name if name.startswith("cuda") else "cpu")

    # --- the step thread --------------------------------------------------------------------------

    def _run(self, work: Work) -> None:
        """On the step thread: the whole of it, and its end."""
        try:
            outcome: Result | RemoteError | Stopped = work.run()
        except (RemoteError, Stopped) as error:
            work.close()
            outcome = error
        except BaseException as error:  # the process ends with it: nothing is repaired in place
            self._post(self._broke, error)
            return
        self._post(self._finished, outcome)

    def _post(self, call: Callable[[T], None], value: T) -> None:
        self._port.loop.call_soon_threadsafe(call, value)

    def _broke(self, error: BaseException) -> None:
        raise error

    def _finished(self, outcome: "Result | RemoteError | Stopped") -> None:
        order = self._order
        assert order is not None
        self._port.working("ending", budget_ms=limits.WORKING_MS_MAX)
        if isinstance(outcome, Stopped):
            self._leave(order.job)
        elif order.rank == 0:
            self._tasks = asyncio.ensure_future(self._end(order, outcome))
        elif isinstance(outcome, Result):
            self._logger.info("rank_done", rank=order.rank)
        else:
            # Rank 0 finds the same, and says it; where it does not, this process is not at fault
            # alone: its death lets the kernel start all of them again.
            self._logger.error("rank_failed", kind=outcome.kind, detail=outcome.detail)
            if outcome.kind is not ErrorKind.INVALID:
                raise outcome

    def _end_soon(self, run: JobRun, error: RemoteError) -> None:
        if run.rank == 0:
            self._tasks = asyncio.ensure_future(self._end(order_of(run, Recipe(run.name)), error))

    async def _end(self, order: Order, outcome: "Result | RemoteError | Stopped") -> None:
        """Say that the job is over, and wait to be told to go."""
        if isinstance(outcome, Result):
            while self._backlog.next():
                self._flush()
                await asyncio.sleep(FLUSH_S / 5)
            ended = JobEnded(
                order.job,
                order.attempt,
                version=outcome.version,
                metrics=outcome.metrics,
                detail=outcome.detail[: limits.DETAIL_BYTES_MAX],
            )
        else:
            assert isinstance(outcome, RemoteError)
            if outcome.kind in (ErrorKind.STALE, ErrorKind.UNAVAILABLE):
                raise outcome
            self._logger.error("job_failed", kind=outcome.kind, detail=outcome.detail)
            detail = outcome.detail[: limits.DETAIL_BYTES_MAX]
            ended = JobEnded(order.job, order.attempt, error=outcome.kind, detail=detail)
        # STALE: the attempt is over already.
        with contextlib.suppress(RemoteError):
            await self._port.call(ended, Done)
        self._exit()

    def _leave(self, job: bytes) -> None:
        self._flush()
        self._port.send(JobStopped(job, self._settings.attempt))
        self._exit()

    def _exit(self) -> None:
        """With code 0, once what was said is out."""
        self._reporter.stop()
        self._port.loop.call_later(0.05, self._end_process)

    def _end_process(self) -> None:
        signal.raise_signal(signal.SIGTERM)

    # --- reports ----------------------------------------------------------------------------------

    def _reported(self, report: StepReport) -> None:
        self._measures.take(report)
        self._reporter.changed()
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = self._port.loop.call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        order = self._order
        if order is None or order.rank:
            return
        reports, doing = self._backlog.next(), self._doing
        if reports or (doing, self._steps_total) != self._said:
            self._said = (doing, self._steps_total)
            done = StepsDone(order.job, order.attempt, reports, self._steps_total, doing)
            self._port.send(done)
        if reports:
            self._flush_soon()  # said again until it is marked

    def _report(self) -> Metrics:
        return self._measures.report(self._settings.process, self._settings.attempt)


class LoopBus:
    """What the step thread says, carried out by the event loop."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._port = trainer._port
        self._is_working = True

    def ask(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str,
        blobs: tuple[bytes, ...] = (),
    ) -> MessageT:
        async def asked() -> MessageT:
            self._port.working("waiting", budget_ms=limits.WORKING_MS_MAX)
            reply = await self._port.exchange(message, answer, target=target, blobs=blobs)
            self._port.working("waiting", budget_ms=0)
            return reply.message

        return asyncio.run_coroutine_threadsafe(asked(), self._loop).result()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return self._port.loop

    def report(self, report: StepReport, *, steps_total: int) -> None:
        trainer = self._trainer
        trainer._steps_total = steps_total
        trainer._backlog.add(report)
        trainer._progress += 1
        self._loop.call_soon_threadsafe(trainer._reported, report)

    def doing(self, what: str) -> None:
        self._trainer._doing = what
        self._loop.call_soon_threadsafe(self._trainer._flush_soon)

    def moved(self) -> None:
        self._trainer._progress += 1

    def save(self, checkpoint: Checkpoint) -> "Future[Digest]":
        async def saved() -> Digest:
            trainer = self._trainer
            order = trainer._order
            assert order is not None
            await asyncio.to_thread(checkpoint.buffer.settle)
            reply = await self._port.exchange(
                checkpoint.save, Saved, target="store", blobs=checkpoint.blobs
            )
            version = reply.message.version
            committed = CheckpointCommitted(
                order.job, order.attempt, version, checkpoint.step, checkpoint.position
            )
            trainer._flush()
            await self._port.call(committed, Done)
            trainer._measures.saved()
            return version

        return asyncio.run_coroutine_threadsafe(saved(), self._loop)


def order_of(run: JobRun, recipe: Recipe) -> Order:
    """The order in a JobRun."""
    return Order(
        job=run.job,
        attempt=run.attempt,
        name=run.name,
        recipe=recipe,
        rank=run.rank,
        processes=run.processes,
        rendezvous=Path(run.rendezvous),
        checkpoint=run.checkpoint,
        reported=run.reported,
    )
