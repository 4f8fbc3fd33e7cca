"""Kill anything: streams pause, then go on, and nobody can tell from the text that it happened."""

import asyncio
import os
import random
import signal
from collections.abc import Sequence

import pytest
from libllm.client import AsyncClient
from libllm.results import Completion

from .conftest import System, complete_all, load

VICTIMS = ("executor", "tokenizer", "monitor", "kernel")


async def kill_one(client: AsyncClient, role: str, number: int = signal.SIGKILL) -> int:
    """Signal a process of this role from outside, as the system's own children see it."""
    while True:
        for row in await client.ps():
            if row.role == role and row.pid is not None:
                os.kill(row.pid, number)
                return row.pid
        await asyncio.sleep(0.05)


def assert_equal(found: Sequence[Completion], twins: Sequence[Completion]) -> None:
    """Every stream is its undisturbed twin's, token for token."""
    for number, (one, twin) in enumerate(zip(found, twins, strict=True)):
        ours, theirs = one.tokens or [], twin.tokens or []
        differing = [at for at, (a, b) in enumerate(zip(ours, theirs)) if a != b]
        if differing or len(ours) != len(theirs):
            at = differing[0] if differing else min(len(ours), len(theirs))
            scores = (twin.scores or [])[at : at + 1]
            raise AssertionError(
                f"stream {number} differs at output token {at} of {len(theirs)}, {len(ours)} came: "
                f"{ours[at : at + 5]} for {theirs[at : at + 5]}, the twin's score {scores}"
            )
        assert one.text == twin.text
        assert one.finish_reason == twin.finish_reason
        assert one.usage == twin.usage


@pytest.mark.parametrize("victim", VICTIMS)
async def test_kill_of_one_service(shared: System, victim: str) -> None:
    asks = load(8, 60)
    async with shared.client() as client:
        twins = await complete_all(client, asks)
        disturbed = asyncio.create_task(complete_all(client, asks))
        await asyncio.sleep(0.3)
        await kill_one(client, victim)
        assert_equal(await disturbed, twins)
        await shared.until_settled(client)


async def test_random_kills(shared: System) -> None:
    """Twelve kills while 32 streams run."""
    chance = random.Random(7)
    asks = load(32, 120)
    async with shared.client() as client:
        twins = await complete_all(client, asks)
        disturbed = asyncio.create_task(complete_all(client, asks))
        for number in range(12):
            await asyncio.sleep(chance.uniform(0.2, 0.7))
            await kill_one(client, VICTIMS[number % len(VICTIMS)])
        while not disturbed.done():
            await asyncio.wait([disturbed], timeout=5)
        assert_equal(await disturbed, twins)
        await shared.until_settled(client)
