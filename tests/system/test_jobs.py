"""Jobs under real processes: ranks and kernel are killed, the steps are those of an undisturbed
run."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from libllm.client import AsyncClient
from llmkernel.jobplaces import JOB_NICE
from llmkernel.testkit.trainer import recipe_of, report, version
from llmproto import limits
from llmproto.data import Segment, SegmentAsk
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import (
    JobAsk,
    JobFound,
    JobKind,
    JobRow,
    JobSpawn,
    JobSpawned,
    JobState,
    StepReport,
)
from llmproto.threads import Done, ThreadCancel, ThreadResume, ThreadSuspend

from .conftest import EXACT, System, systems

STEPS = 600
ENDED = (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """Serving nothing, training without models."""
    config = EXACT.replace('"tokenizer", "monitor"', '"tokenizer"')
    with systems() as start:
        yield start(config, "tests.system.faults.jobs")


async def spawn(client: AsyncClient, *, processes: int, steps: int = STEPS) -> bytes:
    """A job, accepted."""
    name = f"bot-{random.randbytes(4).hex()}"
    message = JobSpawn(
        key=random.randbytes(16),
        kind=JobKind.TRAIN,
        name=name,
        recipe=recipe_of(name, steps, 50),
        processes=processes,
        memory_bytes=1 << 20,
    )
    return (await client._ask(message, JobSpawned)).job


async def look(client: AsyncClient, job: bytes) -> JobRow:
    """Where it stands."""
    return (await client._ask(JobAsk(job), JobFound)).row


async def until(client: AsyncClient, job: bytes, *states: JobState, step: int = 0) -> JobRow:
    """It is in one of these states, and has come so far."""
    async with asyncio.timeout(60):
        while (row := await look(client, job)).state not in states or row.step < step:
            assert row.state not in ENDED or row.state in states, row
            await asyncio.sleep(0.02)
    return row


async def kill(client: AsyncClient, name: str) -> None:
    """SIGKILL, from outside."""
    for row in await client.ps():
        if row.name == name and row.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(row.pid, signal.SIGKILL)


async def judge(client: AsyncClient, job: bytes, steps: int = STEPS) -> JobRow:
    """It ends, with the steps of an undisturbed run."""
    row = await until(client, job, JobState.DONE)
    recipe = recipe_of(row.name, steps, 50)
    assert (row.step, row.version) == (steps, version(recipe, steps))
    reports: list[StepReport] = []
    while not reports or reports[-1].step < steps:
        found = await client._ask(JobAsk(job, reports[-1].step if reports else 0), JobFound)
        assert found.reports
        reports += found.reports
    # Of a long run the kernel keeps the last ones.
    first = reports[0].step
    assert steps - first + 1 >= min(steps, limits.JOB_REPORTS_KEPT)
    assert reports == [report(recipe, step) for step in range(first, steps + 1)]
    return row


@pytest.mark.parametrize(
    "kills", [6, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
async def test_killed_at_random_it_comes_to_the_same_end(system: System, kills: int) -> None:
    chance = random.Random(kills)
    steps = 100 * kills
    async with system.client() as client:
        job = await spawn(client, processes=2, steps=steps)
        for number in range(1, kills + 1):
            row = await until(client, job, JobState.RUNNING, step=steps * number // (kills + 2))
            for victim in chance.sample([*row.processes, "kernel"], chance.choice((1, 1, 2))):
                await kill(client, victim)
        row = await judge(client, job, steps)
        assert row.attempts > 1
        await system.until_settled(client)


async def test_its_processes_have_their_lease_and_little_priority(system: System) -> None:
    async with system.client() as client:
        job = await spawn(client, processes=1)
        row = await until(client, job, JobState.RUNNING)
        (process,) = [p for p in await client.ps() if p.name in row.processes]
        assert process.pid is not None and process.lease is not None
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(
            19, os.getpriority(os.PRIO_PROCESS, system.init_pid()) + JOB_NICE
        )
        assert sorted(os.sched_getaffinity(process.pid)) == process.lease.cores
        assert (Path(system.home.logs) / f"{process.name}.log").exists()
        await client._ask(ThreadCancel(job), Done)
        await until(client, job, JobState.CANCELLED)
        await system.until_settled(client)


async def test_suspended_it_gives_back_and_goes_on(system: System) -> None:
    async with system.client() as client:
        job = await spawn(client, processes=2, steps=200)
        await until(client, job, JobState.RUNNING, step=30)
        await client._ask(ThreadSuspend(job), Done)
        row = await until(client, job, JobState.SUSPENDED)
        assert row.checkpoint_step == row.step and not row.processes
        assert not any(p.role == "trainer" for p in await client.ps())
        await client._ask(ThreadResume(job), Done)
        await judge(client, job, 200)
        await system.until_settled(client)


async def test_the_data_service_starts_when_it_is_asked(system: System) -> None:
    async with system.client() as client:
        assert not any(row.role == "data" for row in await client.ps())
        for number in range(2):
            with pytest.raises(RemoteError) as caught:
                await client._ask(SegmentAsk(bytes(32), 0), Segment, target="data")
            assert caught.value.kind is ErrorKind.STALE
            (row,) = [row for row in await client.ps() if row.role == "data"]
            assert row.incarnation == number + 1
            await kill(client, "data")
        await system.until_settled(client)


async def test_it_goes_on_at_the_next_boot(system: System) -> None:
    async with system.client() as client:
        job = await spawn(client, processes=1, steps=300)
        await until(client, job, JobState.RUNNING, step=60)
    system.stop()
    await system.boot_async()
    async with system.client() as client:
        row = await judge(client, job, 300)
        assert row.attempts >= 2
        await system.until_settled(client)
