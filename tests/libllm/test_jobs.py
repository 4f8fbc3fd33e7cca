"""Jobs against a kernel that the test plays: what is asked, watched, and what it comes to."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from libllm.client import AsyncClient, open_client
from libllm.config import Home
from libllm.jobs import AsyncJob
from libllm.sync import connect
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.data import DataInspect, DataReport
from llmproto.errors import ErrorKind, RemoteError
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
from llmproto.models import ModelAdd, ModelAdded, ModelAsk, ModelEntry, ModelFound
from llmproto.recipes import EvaluationRecipe, Recipe
from llmproto.threads import Done, ThreadCancel, ThreadRenice, ThreadResume, ThreadSuspend
from llmproto.versions import Lineage, VersionAsk, VersionFound, VersionKind, VersionRow

if TYPE_CHECKING:
    from tests.libllm.conftest import FakeKernel

JOB = bytes.fromhex("0000000100000007")
DIGEST = bytes(range(32))
ROW = JobRow(
    job=JOB,
    kind=JobKind.TRAIN,
    name="bot",
    tenant="owner",
    state=JobState.RUNNING,
    step=0,
    steps_total=4,
    checkpoint=None,
    checkpoint_step=0,
    attempts=1,
    age_ms=5,
)
ENTRY = ModelEntry(
    name="bot",
    path="/m",
    digest=bytes(16),
    architecture="X",
    context_tokens=64,
    vocabulary=8,
    weight_bytes=1,
)

VERSION = VersionRow(
    version=DIGEST,
    reference="bot@00010203",
    name="bot",
    kind=VersionKind.MODEL,
    path="/store/versions/0001",
    created_s=0,
    bytes=1,
    bytes_own=1,
    tags=["prod"],
    lineage=Lineage(),
    metrics={},
)


def row(**changes: object) -> JobRow:
    return msgspec.structs.replace(ROW, **changes)


def report(step: int) -> StepReport:
    return StepReport(step=step, loss=1.0 / step)


@pytest.fixture
async def llm(kernel: "FakeKernel", home: Home) -> AsyncIterator[AsyncClient]:
    client = await open_client(home)
    yield client
    await client.aclose()


async def look(kernel: "FakeKernel", found: JobFound) -> JobAsk:
    """Answer the next look at the job."""
    header, ask = await kernel.hear(JobAsk)
    kernel.say(found, answers=header)
    return ask


async def start(kernel: "FakeKernel", llm: AsyncClient) -> AsyncJob:
    task = asyncio.create_task(llm.train(None, name="bot", base="/m", data="/d"))
    header, _ = await kernel.hear(JobSpawn)
    kernel.say(JobSpawned(JOB, False), answers=header)
    return await task


async def test_what_train_asks_for(kernel: "FakeKernel", llm: AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'name = "bot"\nbase = "/m"\n[data]\ntrain = ["/d"]\n'
        "[training]\nprocesses = 2\n[resources]\ncores = 3\nmemory_bytes = 4096\n"
    )
    task = asyncio.create_task(llm.train(path, batch=8))
    header, spawn = await kernel.hear(JobSpawn)
    kernel.say(JobSpawned(JOB, False), answers=header)
    assert (await task).id == JOB
    assert (spawn.kind, spawn.name, spawn.processes) == (JobKind.TRAIN, "bot", 2)
    assert (spawn.cores, spawn.memory_bytes, spawn.device) == (3, 4096, None)
    recipe = msgspec.msgpack.decode(spawn.recipe, type=Recipe)
    assert (recipe.training.batch, recipe.data.train) == (8, ["/d"])


async def test_a_base_is_a_version_or_a_model(kernel: "FakeKernel", llm: AsyncClient) -> None:
    nothing = Failed(ErrorKind.INVALID, "no version of that name")
    cases: list[tuple[list[Message], str | None]] = [
        ([VersionFound(VERSION)], "bot:prod"),
        ([nothing, ModelFound(ENTRY)], "/m"),
        ([nothing, Failed(ErrorKind.INVALID, "no model bot:prod")], None),
    ]
    for answers, wanted in cases:
        task = asyncio.create_task(llm.train(None, name="new", base="bot:prod", data="/d"))
        kinds: tuple[type[Message], ...] = (VersionAsk, ModelAsk)
        for answer, kind in zip(answers, kinds):
            header, _ = await kernel.hear(kind)
            kernel.say(answer, answers=header)
        if wanted is None:
            with pytest.raises(RemoteError, match="base: no version of that name; no model bot"):
                await task
            return
        header, spawn = await kernel.hear(JobSpawn)
        kernel.say(JobSpawned(JOB, False), answers=header)
        await task
        assert msgspec.msgpack.decode(spawn.recipe, type=Recipe).base == wanted


async def test_watching_gives_each_step_once(kernel: "FakeKernel", llm: AsyncClient) -> None:
    job = await start(kernel, llm)
    seen: list[JobFound] = []

    async def watch() -> None:
        seen.extend([found async for found in job.watch()])

    task = asyncio.create_task(watch())
    assert (await look(kernel, JobFound(row(), []))).after_step == 0
    two = [report(1), report(2)]
    await look(kernel, JobFound(row(step=2), two))
    assert (await look(kernel, JobFound(row(step=2), []))).after_step == 2
    # A kernel that died and replayed may tell steps again: those are known.
    await look(kernel, JobFound(row(step=3, attempts=2), [report(2), report(3)]))
    done = row(step=4, attempts=2, state=JobState.DONE, version=DIGEST, metrics={"loss": 0.5})
    await look(kernel, JobFound(done, [report(4)]))
    await task
    steps = [[report.step for report in found.reports] for found in seen]
    assert steps == [[], [1, 2], [3], [4]]
    assert seen[-1].row.state is JobState.DONE


async def test_a_full_answer_is_followed_by_the_next_at_once(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    job = await start(kernel, llm)
    task = asyncio.ensure_future(anext(job.watch()))
    many = [report(step) for step in range(1, 1025)]
    await look(kernel, JobFound(row(step=2000), many))
    assert len((await task).reports) == 1024


async def test_the_end_of_a_job(kernel: "FakeKernel", llm: AsyncClient) -> None:
    job = await start(kernel, llm)
    task = asyncio.ensure_future(job.result())
    await look(kernel, JobFound(row(), []))
    kernel_died = Failed(ErrorKind.UNAVAILABLE, "kernel restarts", 1)
    header, _ = await kernel.hear(JobAsk)
    kernel.say(kernel_died, answers=header)
    done = row(state=JobState.DONE, version=DIGEST, metrics={"loss": 0.5})
    await look(kernel, JobFound(done, []))
    result = await task
    assert (result.reference, result.metrics) == ("bot@00010203", {"loss": 0.5})


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        (row(state=JobState.FAILED, error=ErrorKind.INVALID, detail="line 3"), "INVALID", "line 3"),
        (row(state=JobState.FAILED), "INTERNAL", ""),
        (row(state=JobState.CANCELLED), "DEADLINE", f"the job {JOB.hex()} was cancelled"),
    ],
)
async def test_a_job_that_fails(
    kernel: "FakeKernel", llm: AsyncClient, end: JobRow, kind: str, said: str
) -> None:
    job = await start(kernel, llm)
    task = asyncio.ensure_future(job.result())
    await look(kernel, JobFound(end, []))
    with pytest.raises(RemoteError) as caught:
        await task
    assert (caught.value.kind.value, caught.value.detail) == (kind, said)


async def test_system_calls(kernel: "FakeKernel", llm: AsyncClient) -> None:
    job = await start(kernel, llm)
    for call, wanted in (
        (job.stop(), ThreadSuspend(JOB)),
        (job.resume(), ThreadResume(JOB)),
        (job.cancel(), ThreadCancel(JOB)),
        (job.renice(3, service_class=2), ThreadRenice(JOB, 3, 2)),
    ):
        task = asyncio.ensure_future(call)
        header, message = await kernel.hear(type(wanted))
        kernel.say(Done(), answers=header)
        await task
        assert message == wanted


async def test_jobs_by_id(kernel: "FakeKernel", llm: AsyncClient) -> None:
    listed = asyncio.ensure_future(llm.jobs())
    header, _ = await kernel.hear(JobsAsk)
    kernel.say(Jobs([row()]), answers=header)
    assert [found.name for found in await listed] == ["bot"]
    found = asyncio.ensure_future(llm.job(JOB.hex()))
    assert (await look(kernel, JobFound(row(), []))).job == JOB
    assert (await found).id == JOB
    with pytest.raises(RemoteError, match="16 hexadecimal digits"):
        await llm.job("12")


async def evaluated(kernel: "FakeKernel", header: Header, task: "asyncio.Task[AsyncJob]") -> str:
    """The model that the evaluation is about in the end."""
    header, spawn = await kernel.hear(JobSpawn)
    kernel.say(JobSpawned(JOB, False), answers=header)
    await task
    assert spawn.kind is JobKind.EVALUATE
    recipe = msgspec.msgpack.decode(spawn.recipe, type=EvaluationRecipe)
    assert recipe.metrics == ["f1"]
    assert spawn.name == recipe.model
    return recipe.model


@pytest.mark.parametrize(
    "entry", [ENTRY, msgspec.structs.replace(ENTRY, name="bot@1234abcd", version=DIGEST)]
)
async def test_a_model_of_the_table_is_evaluated(
    kernel: "FakeKernel", llm: AsyncClient, entry: ModelEntry
) -> None:
    task = asyncio.create_task(llm.evaluate(entry.name, data="/d", metrics=["f1"]))
    header, _ = await kernel.hear(ModelAsk)
    kernel.say(ModelFound(entry), answers=header)
    assert await evaluated(kernel, header, task) == entry.name


async def test_a_name_is_its_newest_version_whatever_it_serves(
    kernel: "FakeKernel", llm: AsyncClient
) -> None:
    task = asyncio.create_task(llm.evaluate("bot", data="/d", metrics=["f1"]))
    header, _ = await kernel.hear(ModelAsk)
    older = msgspec.structs.replace(ENTRY, name="bot@1234abcd", version=bytes(32))
    kernel.say(ModelFound(older), answers=header)
    header, _ = await kernel.hear(VersionAsk)
    kernel.say(VersionFound(VERSION), answers=header)
    header, add = await kernel.hear(ModelAdd)
    kernel.say(ModelAdded(str(add.name), bytes(16)), answers=header)
    assert await evaluated(kernel, header, task) == "bot@00010203"


async def test_a_version_is_put_into_the_table(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.create_task(llm.evaluate("bot:prod", data="/d", metrics=["f1"]))
    header, _ = await kernel.hear(ModelAsk)
    kernel.say(Failed(ErrorKind.INVALID, "no such model"), answers=header)
    header, ask = await kernel.hear(VersionAsk)
    assert ask.reference == "bot:prod"
    kernel.say(VersionFound(VERSION), answers=header)
    header, add = await kernel.hear(ModelAdd)
    assert add == ModelAdd("/store/versions/0001", "bot@00010203")
    kernel.say(ModelAdded("bot@00010203", bytes(16)), answers=header)
    assert await evaluated(kernel, header, task) == "bot@00010203"


async def test_data(kernel: "FakeKernel", llm: AsyncClient) -> None:
    task = asyncio.ensure_future(llm.data(DataInspect(["/d"])))
    header, _ = await kernel.hear(DataInspect)
    assert header.target == "data"
    kernel.say(DataReport("text", 3, 3), answers=header)
    assert (await task).rows_in == 3


async def test_the_synchronous_twin(kernel: "FakeKernel", home: Home) -> None:
    def use() -> tuple[list[int], str | None]:
        with connect(home.root, url=home.endpoint, proof=bytes(32)) as llm:
            job = llm.train(name="bot", base="/m", data="/d")
            steps = [report.step for found in job.watch() for report in found.reports]
            return steps, job.result().reference

    task = asyncio.ensure_future(asyncio.to_thread(use))
    header, _ = await kernel.hear(JobSpawn)
    kernel.say(JobSpawned(JOB, False), answers=header)
    done = row(state=JobState.DONE, version=DIGEST)
    await look(kernel, JobFound(row(), [report(1)]))
    await look(kernel, JobFound(done, [report(2)]))
    await look(kernel, JobFound(done, []))
    assert await task == ([1, 2], "bot@00010203")
