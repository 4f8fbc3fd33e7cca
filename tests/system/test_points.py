"""Deaths at named points: where a process has done one half of something and not the other."""

import asyncio

import pytest

from .conftest import System, strike
from .faults.points import arm
from .load import Twins, assert_equal, complete_all, load

POINTS = (
    # A thread is accepted.
    ("tokenizer.out.ThreadSpawn", 3),
    ("kernel.in.ThreadSpawn", 3),
    ("kernel.out.ThreadSpawned", 3),  # journaled, and nobody was told
    ("tokenizer.out.Accepted", 3),  # spawned, and its client does not know
    ("kernel.pass.Accepted", 3),
    # It runs.
    ("executor.in.Run", 5),
    ("executor.out.Stepped", 1),  # accepted, and no token came
    ("executor.out.Stepped", 20),
    ("kernel.in.Stepped", 20),  # proposed, not committed
    ("kernel.out.Committed", 41),  # journaled, not sent
    ("executor.in.Committed", 20),
    ("tokenizer.in.Committed", 20),
    ("tokenizer.out.Text", 1),
    ("tokenizer.out.Text", 20),
    ("kernel.pass.Text", 20),
    ("kernel.pass.StreamAcked", 2),
    ("tokenizer.out.SinkAcked", 2),
    ("kernel.in.SinkAcked", 2),
    # It ends.
    ("tokenizer.out.ThreadEnd", 1),  # its stop string came, and nobody knows
    ("kernel.in.ThreadEnd", 1),
)
AFTER_A_DEATH = (
    # Who dies first, and where the next incarnation, or the kernel, dies again.
    ("tokenizer", "kernel.out.SinkOpen", 3),
    ("tokenizer", "tokenizer.in.SinkOpen", 3),
    ("tokenizer", "tokenizer.out.ModelRegister", 1),
    ("executor", "executor.out.Working", 1),  # while it loads its model
    ("executor", "executor.out.ExecutorReady", 1),
    ("executor", "kernel.in.ExecutorReady", 1),
    ("executor", "kernel.out.Run", 3),
    ("kernel", "kernel.replay", 40),
    ("kernel", "kernel.in.Beat", 2),
    ("kernel", "kernel.out.Welcome", 2),
)


@pytest.mark.parametrize(("point", "nth"), POINTS)
async def test_death_at(rigged: System, twins: Twins, point: str, nth: int) -> None:
    asks = load(16, 40)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        armed = arm(rigged.home.root, point, nth=nth)
        try:
            found = await complete_all(client, asks)
            assert armed.struck
        finally:
            armed.disarm()
        assert_equal(found, wanted)
        await rigged.until_settled(client)


@pytest.mark.parametrize(("first", "point", "nth"), AFTER_A_DEATH)
async def test_second_death_at(
    rigged: System, twins: Twins, first: str, point: str, nth: int
) -> None:
    asks = load(16, 60)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        before = (await client.status()).tokens_committed
        disturbed = asyncio.create_task(complete_all(client, asks))
        while (await client.status()).tokens_committed < before + 100:
            assert not disturbed.done()
        armed = arm(rigged.home.root, point, nth=nth)
        try:
            await strike(client, first)
            found = await disturbed
            assert armed.struck
        finally:
            armed.disarm()
        assert_equal(found, wanted)
        await rigged.until_settled(client)
