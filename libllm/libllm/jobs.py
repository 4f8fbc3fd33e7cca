"""Jobs: training and evaluation runs, as a client starts, watches, stops and continues them.

    job = await llm.train("recipe.toml")
    async for found in job.watch():
        print(found.row.step, [report.loss for report in found.reports])
    print((await job).reference)

A job belongs to the system: it goes on without whoever started it, and through the death of any
process.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Generator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
from llmproto.base import Message
from llmproto.data import DataAugment, DataClean, DataInspect, DataReport
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.jobs import (
    JobAsk,
    JobFound,
    JobKind,
    JobRow,
    Jobs,
    JobsAsk,
    JobSpawn,
    JobSpawned,
    JobState,
    StepReport,
)
from llmproto.models import ModelAdd, ModelAdded, ModelAsk, ModelFound
from llmproto.recipes import DataRecipe, EvaluationRecipe, Recipe
from llmproto.threads import Done, ThreadCancel, ThreadRenice, ThreadResume, ThreadSuspend
from llmproto.versions import VersionAsk, VersionFound, VersionKind, VersionRow

from libllm.recipes import Flags, Paths, evaluation_of, looks_like_path, recipe_of

WATCH_S: Final = 0.25
"""Between two looks at a job: often enough for people, and nothing for the kernel."""
REPORTS_MAX: Final = 1024
"""As many come at once (JobFound); then there may be more at once."""
DATA_S: Final = 86_400.0
"""Cleaning a large file takes what it takes; Ctrl-C ends the wait."""
OVER: Final = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})

MessageT = TypeVar("MessageT", bound=Message)


class Ask(Protocol):
    """How a question reaches the system: `AsyncClient`'s own way."""

    async def __call__(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str = "kernel",
        patience_s: float | None = None,
    ) -> MessageT: ...


class JobResult(msgspec.Struct, frozen=True):
    """What a job came to."""

    name: str
    reference: str | None
    """`name@digest` of the version that it made; an evaluation makes none."""
    metrics: dict[str, float]
    row: JobRow


class AsyncJob:
    """One job.  Awaiting it waits for its end: a JobResult, or RemoteError where it failed or was
    cancelled."""

    def __init__(self, ask: Ask, job: bytes) -> None:
        """Made by `train`, `evaluate` and `job`."""
        self._ask = ask
        self.id = job

    def __repr__(self) -> str:
        return f"<Job {self.id.hex()}>"

    def __await__(self) -> Generator[Any, None, JobResult]:  # Any: what coroutines yield
        return self.result().__await__()

    async def row(self) -> JobRow:
        """Where it stands."""
        return (await self._look((1 << 53) - 1)).row

    async def result(self) -> JobResult:
        """Its end."""
        row: JobRow | None = None
        async for found in self.watch((1 << 53) - 1):
            row = found.row
        assert row is not None
        return result_of(row)

    async def watch(self, after_step: int = 0) -> AsyncIterator[JobFound]:
        """What is new, as it comes: `reports` of later steps, oldest first, each step once, and the
        `row`; the last one tells the end and raises nothing."""
        known: JobRow | None = None
        while True:
            found = await self._look(after_step)
            fresh = [report for report in found.reports if report.step > after_step]
            after_step = max([after_step, *(report.step for report in fresh)])
            if fresh or known is None or _changed(known, found.row):
                yield JobFound(found.row, fresh)
            known = found.row
            if len(found.reports) >= REPORTS_MAX:
                continue
            if known.state in OVER:
                return
            await asyncio.sleep(WATCH_S)

    async def reports(self) -> list[StepReport]:
        """The steps that the kernel still keeps."""
        return (await self._look(0)).reports

    async def stop(self) -> None:
        """Save what it has, and leave the device, until `resume`."""
        await self._ask(ThreadSuspend(self.id), Done)

    async def resume(self) -> None:
        """Undo `stop`."""
        await self._ask(ThreadResume(self.id), Done)

    async def cancel(self) -> None:
        """End it for good; its versions stay."""
        await self._ask(ThreadCancel(self.id), Done)

    async def renice(self, priority: int, *, service_class: int | None = None) -> None:
        """Change its priority, -8 to 7: higher runs first within its class."""
        await self._ask(ThreadRenice(self.id, priority, service_class), Done)

    async def _look(self, after_step: int) -> JobFound:
        return await self._ask(JobAsk(self.id, after_step=after_step), JobFound)


class JobTable:
    """What a client can ask about jobs, over a way to ask."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def train(self, recipe: Recipe | str | Path | None, flags: Flags) -> AsyncJob:
        """Start training; see `AsyncClient.train`."""
        wanted = recipe_of(recipe, flags)
        if wanted.base is not None and not os.path.isabs(wanted.base):
            base = await self._base(wanted.base)
            wanted = msgspec.structs.replace(wanted, base=base)
        return await self._spawn(train_message(wanted))

    async def evaluate(
        self,
        model: str,
        data: Paths | DataRecipe,
        metrics: Sequence[str],
        *,
        output_tokens_max: int = 256,
        record: bool = True,
    ) -> AsyncJob:
        """Start an evaluation; see `AsyncClient.evaluate`."""
        wanted = evaluation_of(
            model, data, metrics, output_tokens_max=output_tokens_max, record=record
        )
        served = await self._served(model)
        return await self._spawn(evaluation_message(msgspec.structs.replace(wanted, model=served)))

    async def jobs(self) -> list[JobRow]:
        """The living, and those that ended within the last hours."""
        return (await self._ask(JobsAsk(), Jobs)).rows

    async def job(self, job: bytes | str) -> AsyncJob:
        """A job by its id; STALE where there is none."""
        found = AsyncJob(self._ask, job_id(job))
        await found.row()
        return found

    async def data(self, message: DataClean | DataAugment | DataInspect) -> DataReport:
        """Clean, augment or inspect files."""
        return await self._ask(message, DataReport, target="data", patience_s=DATA_S)

    async def _spawn(self, message: JobSpawn) -> AsyncJob:
        return AsyncJob(self._ask, (await self._ask(message, JobSpawned)).job)

    async def _base(self, name: str) -> str:
        """A base as the trainer takes it: the reference of a version, or the folder of a model of
        the table that is no version."""
        try:
            await self._ask(VersionAsk(name), VersionFound, target="store")
        except RemoteError as error:
            if error.kind is not ErrorKind.INVALID:
                raise
            missing = error
        else:
            return name
        try:
            return (await self._ask(ModelAsk(name), ModelFound)).model.path
        except RemoteError as error:
            if error.kind is not ErrorKind.INVALID:
                raise
            raise invalid(f"base: {missing.detail}; {error.detail}") from None

    async def _served(self, model: str) -> str:
        """The name of the model table for a name, a version or a folder; put there where it is not
        yet."""
        if looks_like_path(model):
            path = os.path.abspath(os.path.expanduser(model))
            return (await self._ask(ModelAdd(path), ModelAdded, target="tokenizer")).name
        try:
            found = (await self._ask(ModelAsk(model), ModelFound)).model
        except RemoteError as error:
            if error.kind is not ErrorKind.INVALID:
                raise
        else:
            # What a name serves may be older than the newest version, which the name means.
            if found.version is None or found.name == model:
                return found.name
        row = (await self._ask(VersionAsk(model), VersionFound, target="store")).row
        return await self._add_version(row)

    async def _add_version(self, row: VersionRow) -> str:
        if row.kind is not VersionKind.MODEL:
            raise invalid(f"{row.reference} is a checkpoint of a job, not a model")
        add = ModelAdd(row.path, entry_name(row.name, row.version))
        return (await self._ask(add, ModelAdded, target="tokenizer")).name


def entry_name(name: str, version: bytes) -> str:
    """A version's name in the model table, and in what people read."""
    return f"{name}@{version.hex()[:8]}"


def train_message(recipe: Recipe) -> JobSpawn:
    """The request for a training run."""
    resources = recipe.resources
    return JobSpawn(
        key=os.urandom(16),
        kind=JobKind.TRAIN,
        name=recipe.name,
        recipe=msgspec.msgpack.encode(recipe),
        processes=recipe.training.processes,
        memory_bytes=resources.memory_bytes or 2 << 30,
        cores=resources.cores,
        device=resources.device,
    )


def evaluation_message(recipe: EvaluationRecipe) -> JobSpawn:
    """The request for an evaluation run."""
    return JobSpawn(
        key=os.urandom(16),
        kind=JobKind.EVALUATE,
        name=recipe.model,
        recipe=msgspec.msgpack.encode(recipe),
        memory_bytes=1 << 30,
        cores=1,
        device="cpu",
    )


def result_of(row: JobRow) -> JobResult:
    """Of a job that is over; RemoteError where it failed or was cancelled."""
    match row.state:
        case JobState.DONE:
            made = None if row.version is None else entry_name(row.name, row.version)
            return JobResult(row.name, made, row.metrics, row)
        case JobState.CANCELLED:
            raise RemoteError(ErrorKind.DEADLINE, f"the job {row.job.hex()} was cancelled")
        case _:
            raise RemoteError(row.error or ErrorKind.INTERNAL, row.detail)


def job_id(given: bytes | str) -> bytes:
    """Bytes, or their hexadecimal text."""
    try:
        found = bytes.fromhex(given) if isinstance(given, str) else bytes(given)
    except ValueError:
        found = b""
    if len(found) != 8:
        raise invalid(f"a job's id has 8 bytes, or 16 hexadecimal digits: {given!r}")
    return found


def _changed(known: JobRow, row: JobRow) -> bool:
    """Something that people look at."""
    return (known.state, known.step, known.share, known.doing, known.attempts) != (
        row.state,
        row.step,
        row.share,
        row.doing,
        row.attempts,
    )
