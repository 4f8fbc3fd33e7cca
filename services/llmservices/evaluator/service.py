"""One evaluation as a service: told to run, it judges, reports, ends and exits.

It keeps nothing: another attempt begins anew and comes to the same numbers.
"""

import asyncio
import signal
import time
from typing import Final

import msgspec
from libllm.client import AsyncClient
from libllm.events import Holding
from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import JobEnded, JobMark, JobPace, JobRun, JobStopped, StepReport, StepsDone
from llmproto.models import ModelEntry
from llmproto.recipes import EvaluationRecipe
from llmproto.threads import Done
from llmproto.versions import MetricsRecord

from llmservices.evaluator import core
from llmservices.evaluator.arguments import Arguments
from llmservices.evaluator.judging import Done as Judged
from llmservices.evaluator.judging import Judge
from llmservices.evaluator.metrics import check_fit, of_outcome

FLUSH_S: Final = 0.25
"""Between two messages with reports."""
ROWS_MAX: Final = 1024
"""Reports of one message."""


class Evaluator(Service):
    """Carries out one attempt of one job."""

    def __init__(self, port: Port, arguments: Arguments) -> None:
        self._port = port
        self._llm = AsyncClient(port)
        self._arguments = arguments
        self._run: JobRun | None = None
        self._task: asyncio.Task[None] | None = None
        self._reports: list[StepReport] = []
        """Not marked yet."""
        self._step = 0
        self._steps_total = 0
        self._doing = ""
        self._sent_s = 0.0
        self._began_s = 0.0

    def handlers(self) -> Handlers:
        """What the kernel says to a job's process."""
        return {JobRun: self.run, JobMark: self.mark, JobPace: self.pace}

    def holding(self) -> Holding:
        """The job, and how far it is."""
        if self._run is None:
            return Holding()
        return Holding(self._step, [self._run.job], [self._step])

    def welcomed(self) -> None:
        """What is not marked is told again."""
        if self._run is not None:
            self._flush(now=True)

    def run(self, message: JobRun, request: Request) -> None:
        """Begin; heard again it changes nothing."""
        if self._task is not None or message.attempt != self._arguments.attempt:
            return
        self._run = message
        self._task = asyncio.create_task(self._carry_out(message))
        self._task.add_done_callback(_raise)

    def mark(self, message: JobMark, request: Request) -> None:
        """These are journaled."""
        self._reports = [report for report in self._reports if report.step > message.step]
        if self._reports:
            self._flush()

    def pace(self, message: JobPace, request: Request) -> None:
        """It computes nothing itself; where it is to stop, it stops: the next attempt begins
        anew."""
        if not message.stop or message.attempt != self._arguments.attempt:
            return
        if self._task is not None:
            self._task.cancel()
        self._port.send(JobStopped(message.job, message.attempt))
        signal.raise_signal(signal.SIGTERM)

    async def _carry_out(self, run: JobRun) -> None:
        ended = JobEnded(job=run.job, attempt=run.attempt)
        try:
            metrics, remark = await self._judge(run)
            ended = msgspec.structs.replace(ended, metrics=metrics, detail=remark)
        except RemoteError as error:
            ended = msgspec.structs.replace(ended, error=error.kind, detail=error.detail)
        self._doing = ""
        self._flush(now=True)
        try:
            await self._port.call(ended, Done)
        except RemoteError as error:
            if error.kind is not ErrorKind.STALE:  # another attempt has begun: this one is over
                raise
        signal.raise_signal(signal.SIGTERM)

    async def _judge(self, run: JobRun) -> tuple[dict[str, float], str]:
        """The metrics, and what is to be said of them."""
        recipe = msgspec.msgpack.decode(run.recipe, type=EvaluationRecipe)
        model = await self._llm.model(recipe.model)
        check_fit(recipe.metrics, model.task)
        judge = Judge(self._port, self._llm, recipe, model)
        found = await self._look(judge, recipe, model)
        return found, await self._record(recipe, model, found)

    async def _look(
        self, judge: Judge, recipe: EvaluationRecipe, model: ModelEntry
    ) -> dict[str, float]:
        """Go through the data, once for each kind of question."""
        self._doing = "reading"
        self._flush(now=True)
        looks = core.looks(recipe.metrics, model.task)
        prepared = await judge.prepared() if "scores" in looks else None
        rows = await judge.rows() if looks != ["scores"] else None
        if prepared is not None:
            self._steps_total += prepared.batches
        if rows is not None:
            self._steps_total += -(-rows.rows // core.batch_rows(rows.rows))
        self._doing = "evaluating"
        self._began_s = time.monotonic()
        found: dict[str, float] = {}
        for look in looks:
            if look == "scores":
                assert prepared is not None
                outcome = await judge.scores(prepared, self._judged)
            else:
                assert rows is not None
                by_text = {
                    "labels": judge.labels,
                    "values": judge.values,
                    "similarities": judge.similarities,
                    "answers": judge.answers,
                }
                outcome = await by_text[look](rows, self._judged)
            found.update(await asyncio.to_thread(of_outcome, recipe.metrics, outcome))
        return found

    async def _record(
        self, recipe: EvaluationRecipe, model: ModelEntry, metrics: dict[str, float]
    ) -> str:
        """The results belong to the version, where there is one."""
        if not recipe.record:
            return ""
        if model.version is None:
            return f"not recorded: {model.name} is no version of the store"
        record = MetricsRecord(f"@{model.version.hex()}", metrics)
        await self._port.call(record, Done, target="store")
        return ""

    def _judged(self, done: Judged) -> None:
        """One more batch."""
        now_s = time.monotonic()
        self._step += 1
        ms = (now_s - self._began_s) * 1000
        self._began_s = now_s
        self._reports.append(StepReport(self._step, done.loss, tokens=done.tokens, ms=ms))
        self._flush()

    def _flush(self, *, now: bool = False) -> None:
        """Tell what is not marked; not too often."""
        run = self._run
        now_s = time.monotonic()
        if run is None or (not now and now_s - self._sent_s < FLUSH_S):
            return
        self._sent_s = now_s
        self._port.send(
            StepsDone(
                run.job, run.attempt, self._reports[:ROWS_MAX], self._steps_total, self._doing
            )
        )


def _raise(task: "asyncio.Task[None]") -> None:
    """What the work did not expect ends the process."""
    if not task.cancelled():
        task.result()
