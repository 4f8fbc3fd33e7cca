"""Kill anything: streams pause, then go on, and nobody can tell from the text that it happened."""

import asyncio
import random
from collections.abc import Sequence

import httpx
import pytest
from libllm.client import AsyncClient

from .conftest import EXACT, Boot, System, find, strike
from .http_load import Resuming, bodies, forget_all, url_of
from .load import Twins, assert_equal, complete_all, load, under_way

TIGHT = EXACT.replace('"exact"', '"exact"\nkv_bytes = 3145728')
VICTIMS = ("executor", "tokenizer", "monitor", "gateway", "kernel")


@pytest.mark.parametrize("victim", VICTIMS)
async def test_kill_of_one_service(gated: System, twins: Twins, victim: str) -> None:
    asks = load(8, 400)
    async with gated.client() as client:
        wanted = await twins.of(client, asks)
        disturbed = await under_way(client, asks)
        await strike(client, victim)
        assert_equal(await disturbed, wanted)
        await gated.until_settled(client)


async def campaign(system: System, twins: Twins, *, kills: int, seed: int, tokens: int) -> None:
    """So many kills, over and over while 32 streams run over libllm and 16 over HTTP."""
    chance = random.Random(seed)
    asks = load(32, tokens)
    struck = 0
    async with system.client() as client:
        wanted, over_http = await twins.of(client, asks), await read_http(client)
        descriptors = system.descriptors()
        while struck < kills:
            readers = [Resuming() for _ in bodies()]
            disturbed = asyncio.gather(complete_all(client, asks), read_http(client, readers))
            while not disturbed.done() and struck < kills:
                await asyncio.wait([disturbed], timeout=chance.uniform(0.1, 0.6))
                if all(reader.last for reader in readers):  # before that HTTP cannot resume
                    await strike(client, VICTIMS[struck % len(VICTIMS)])
                    struck += 1
            found, found_over_http = await disturbed
            assert_equal(found, wanted)
            assert found_over_http == over_http
        await system.until_settled(client)
        assert system.descriptors() <= descriptors + 2, "init keeps descriptors of the dead"


async def read_http(client: AsyncClient, readers: Sequence[Resuming] = ()) -> list[str]:
    """The texts of the load over HTTP, by clients that resume."""
    url, model = await url_of(client), (await client.model()).name
    limits = httpx.Limits(max_connections=None)
    readers = readers or [Resuming() for _ in bodies()]
    asked = zip(readers, bodies(), strict=True)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        texts = await asyncio.gather(
            *(reader.read(http, {**body, "model": model}) for reader, body in asked)
        )
        await forget_all(http, readers)
        return list(texts)


async def test_random_kills(gated: System, twins: Twins) -> None:
    await campaign(gated, twins, kills=12, seed=7, tokens=200)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_hundred_random_kills(gated: System, twins: Twins) -> None:
    await campaign(gated, twins, kills=100, seed=8, tokens=160)


@pytest.mark.long
async def test_kills_while_blocks_run_out(booted: Boot, twins: Twins) -> None:
    """A cache for a third of the load: threads are given back, and nothing else is different."""
    system = await asyncio.to_thread(booted, TIGHT)
    asks = load(24, 60)
    async with system.client() as client:
        disturbed = asyncio.create_task(complete_all(client, asks))
        for victim in ("executor", "kernel", "executor"):
            await asyncio.sleep(0.3)
            await strike(client, victim)
        found = await disturbed
        await system.until_settled(client)
        assert_equal(found, await twins.of(client, asks))
        await system.until_settled(client)


async def test_blocks_come_back(gated: System, twins: Twins) -> None:
    """After everything above, a thread that needs most of the cache still fits."""
    async with gated.client() as client:
        before = (await find(client, "executor")).incarnation
        model = await client.model()
        asks = [ask for ask in load(32, 60) if ask.choices == 1]
        assert_equal(await complete_all(client, asks), await twins.of(client, asks))
        prompt = [1] * (model.context_tokens - 8)
        whole = await client.generate(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
        assert whole.usage.output_tokens == 4
        assert (await find(client, "executor")).incarnation == before
        await gated.until_settled(client)
