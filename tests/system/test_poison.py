"""One bad request hurts nobody else: a thread that kills its executor, a request that kills its
tokenizer, and innocents beside them."""

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest
from libllm.client import AsyncClient
from libllm.results import Completion
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import ProcessState

from .conftest import System, find, strike
from .faults.executor import Mark, write_marks
from .faults.tokenizer import DEADLY
from .load import Twins, assert_equal, complete_all, load

POISON = 300
"""The first token of a thread that is to kill."""
OTHER = 301
DEATHS_MAX = 24
"""Halving 32 suspects, twice at every size, takes fewer."""


@pytest.fixture
def innocent(rigged: System) -> Iterator[None]:
    """No mark outlives its test."""
    yield
    write_marks(rigged.home.root, {})


async def poisoned(client: AsyncClient, mark: int, tokens: int = 60) -> Completion:
    """A thread with a mark."""
    return await client.generate(
        [mark, 20, 30, 40], max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=0
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mark", "count"),
    [
        pytest.param(Mark("segv"), 31, marks=pytest.mark.long),
        (Mark("segv", after=7), 31),
        pytest.param(Mark("exit", after=7), 15, marks=pytest.mark.long),
    ],
    ids=["segv-at-once", "segv", "exit"],
)
async def test_a_thread_that_kills(
    rigged: System, twins: Twins, innocent: None, mark: Mark, count: int
) -> None:
    asks = load(count, 40)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        before = (await find(client, "executor")).incarnation
        write_marks(rigged.home.root, {POISON: mark})
        disturbed = asyncio.create_task(complete_all(client, asks))
        with pytest.raises(RemoteError) as caught:
            await poisoned(client, POISON)
        assert caught.value.kind is ErrorKind.INTERNAL
        assert_equal(await disturbed, wanted)
        assert (await find(client, "executor")).incarnation - before <= DEATHS_MAX
        await rigged.until_settled(client, seconds=60)


@pytest.mark.timeout(300)
async def test_a_thread_that_hangs(rigged: System, twins: Twins, innocent: None) -> None:
    asks = load(3, 40)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        write_marks(rigged.home.root, {POISON: Mark("loop", after=5)})
        disturbed = asyncio.create_task(complete_all(client, asks))
        with pytest.raises(RemoteError) as caught:
            await poisoned(client, POISON)
        assert caught.value.kind is ErrorKind.INTERNAL
        assert_equal(await disturbed, wanted)
        await rigged.until_settled(client, seconds=60)


@pytest.mark.timeout(300)
async def test_a_pair_that_kills_together(rigged: System, twins: Twins, innocent: None) -> None:
    """Both finish, apart, and so do the others."""
    asks = load(14, 40)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        alone = [await poisoned(client, mark) for mark in (POISON, OTHER)]
        before = (await find(client, "executor")).incarnation
        write_marks(
            rigged.home.root, {POISON: Mark("segv", 5, OTHER), OTHER: Mark("segv", 5, POISON)}
        )
        both = asyncio.gather(poisoned(client, POISON), poisoned(client, OTHER))
        found = await complete_all(client, asks)
        assert_equal(found, wanted)
        assert_equal(await both, alone)
        deaths = (await find(client, "executor")).incarnation - before
        assert 1 <= deaths <= DEATHS_MAX
        await rigged.until_settled(client, seconds=60)


async def kill_innocents(system: System, twins: Twins, kills: int) -> None:
    """Kill the executor again and again, each time in the middle of a step of the same threads."""
    asks = load(4, 160)
    struck = 0
    async with system.client() as client:
        wanted = await twins.of(client, asks)
        while struck < kills:
            disturbed = asyncio.create_task(complete_all(client, asks))
            while not disturbed.done() and struck < kills:
                row = await find(client, "executor")
                if row.state is ProcessState.READY and row.threads:
                    await strike(client, "executor")
                    struck += 1
                    assert not any(thread.strikes for thread in await client.threads())
                    await until_another(client, row.incarnation)
            assert_equal(await disturbed, wanted)
        await system.until_settled(client)


async def until_another(client: AsyncClient, incarnation: int) -> None:
    """The executor that was killed is known to be gone."""
    deadline = time.monotonic() + 30
    while (await find(client, "executor")).incarnation == incarnation:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_ten_outside_kills_strike_nobody(rigged: System, twins: Twins) -> None:
    await kill_innocents(rigged, twins, 10)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_fifty_outside_kills_strike_nobody(rigged: System, twins: Twins) -> None:
    await kill_innocents(rigged, twins, 50)


async def test_a_request_that_kills_the_tokenizer(rigged: System, twins: Twins) -> None:
    asks = load(15, 60)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        disturbed = asyncio.create_task(complete_all(client, asks))
        before = (await find(client, "tokenizer")).incarnation
        with pytest.raises(RemoteError) as caught:
            await client.generate(f"say {DEADLY}", max_tokens=4)
        assert caught.value.kind is ErrorKind.INTERNAL
        assert_equal(await disturbed, wanted)
        deaths = (await find(client, "tokenizer")).incarnation - before
        assert 1 <= deaths <= 6
        await rigged.until_settled(client)


@pytest.mark.long
async def test_outside_kills_of_the_tokenizer_refuse_nobody(rigged: System, twins: Twins) -> None:
    """Requests that are in it when it is killed are tried again, however often that happens."""
    asks = load(8, 20)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        for _ in range(4):
            disturbed = asyncio.create_task(complete_all(client, asks))
            await strike(client, "tokenizer", signal.SIGKILL)
            assert_equal(await disturbed, wanted)
        await rigged.until_settled(client)
