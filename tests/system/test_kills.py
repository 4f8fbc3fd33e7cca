"""Kill anything: streams pause, then go on, and nobody can tell from the text that it happened."""

import asyncio
import random

import pytest

from .conftest import System, find, strike
from .load import Twins, assert_equal, complete_all, load

VICTIMS = ("executor", "tokenizer", "monitor", "kernel")


@pytest.mark.parametrize("victim", VICTIMS)
async def test_kill_of_one_service(shared: System, twins: Twins, victim: str) -> None:
    asks = load(8, 60)
    async with shared.client() as client:
        wanted = await twins.of(client, asks)
        disturbed = asyncio.create_task(complete_all(client, asks))
        await asyncio.sleep(0.2)
        await strike(client, victim)
        assert_equal(await disturbed, wanted)
        await shared.until_settled(client)


async def campaign(system: System, twins: Twins, *, kills: int, seed: int, tokens: int) -> int:
    """So many kills while 32 streams run, over and over; how many streams there were."""
    chance = random.Random(seed)
    asks = load(32, tokens)
    streams = struck = 0
    async with system.client() as client:
        wanted = await twins.of(client, asks)
        while struck < kills:
            disturbed = asyncio.create_task(complete_all(client, asks))
            while not disturbed.done() and struck < kills:
                await asyncio.wait([disturbed], timeout=chance.uniform(0.1, 0.6))
                await strike(client, VICTIMS[struck % len(VICTIMS)])
                struck += 1
            assert_equal(await disturbed, wanted)
            streams += sum(ask.choices for ask in asks)
        await system.until_settled(client)
    return streams


async def test_random_kills(shared: System, twins: Twins) -> None:
    assert await campaign(shared, twins, kills=12, seed=7, tokens=100) >= 32


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_hundred_random_kills(shared: System, twins: Twins) -> None:
    assert await campaign(shared, twins, kills=100, seed=8, tokens=160) >= 32


async def test_blocks_come_back(shared: System, twins: Twins) -> None:
    """After everything above, a thread that needs most of the cache still fits."""
    async with shared.client() as client:
        before = (await find(client, "executor")).incarnation
        model = await client.model()
        asks = [ask for ask in load(32, 60) if ask.choices == 1]
        assert_equal(await complete_all(client, asks), await twins.of(client, asks))
        prompt = [1] * (model.context_tokens - 8)
        whole = await client.generate(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
        assert whole.usage.output_tokens == 4
        assert (await find(client, "executor")).incarnation == before
        await shared.until_settled(client)
