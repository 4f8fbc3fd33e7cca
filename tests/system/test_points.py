"""Deaths at named points: where a process has done one half of something and not the other."""

import pytest

from .conftest import System, strike
from .faults.points import arm
from .load import Twins, assert_equal, complete_all, load, under_way

LONG = pytest.mark.long
POINTS = (
    # A thread is accepted.
    pytest.param("tokenizer.out.ThreadSpawn", 3, marks=LONG),
    pytest.param("kernel.in.ThreadSpawn", 3, marks=LONG),
    ("kernel.out.ThreadSpawned", 3),  # journaled, and nobody was told
    ("tokenizer.out.Accepted", 3),  # spawned, and its client does not know
    pytest.param("kernel.pass.Accepted", 3, marks=LONG),
    # It runs.
    pytest.param("executor.in.Run", 5, marks=LONG),
    ("executor.out.Stepped", 1),  # accepted, and no token came
    pytest.param("executor.out.Stepped", 20, marks=LONG),
    ("kernel.in.Stepped", 20),  # proposed, not committed
    ("kernel.out.Committed", 41),  # journaled, not sent
    pytest.param("executor.in.Committed", 20, marks=LONG),
    pytest.param("tokenizer.in.Committed", 20, marks=LONG),
    pytest.param("tokenizer.out.Text", 1, marks=LONG),
    pytest.param("tokenizer.out.Text", 20, marks=LONG),
    pytest.param("kernel.pass.Text", 20, marks=LONG),
    pytest.param("kernel.pass.StreamAcked", 2, marks=LONG),
    pytest.param("tokenizer.out.SinkAcked", 2, marks=LONG),
    pytest.param("kernel.in.SinkAcked", 2, marks=LONG),
    # It ends.
    ("tokenizer.out.ThreadEnd", 1),  # its stop string came, and nobody knows
    ("kernel.in.ThreadEnd", 1),
)
AFTER_A_DEATH = (
    # Who dies first, and where the next incarnation, or the kernel, dies again.
    pytest.param("tokenizer", "kernel.out.SinkOpen", 3, marks=LONG),
    ("tokenizer", "tokenizer.in.SinkOpen", 3),
    pytest.param("tokenizer", "tokenizer.out.ModelRegister", 1, marks=LONG),
    ("executor", "executor.out.Working", 1),  # while it loads its model
    pytest.param("executor", "executor.out.ExecutorReady", 1, marks=LONG),
    pytest.param("executor", "kernel.in.ExecutorReady", 1, marks=LONG),
    pytest.param("executor", "kernel.out.Run", 3, marks=LONG),
    ("kernel", "kernel.replay", 40),
    pytest.param("kernel", "kernel.in.Beat", 2, marks=LONG),
    pytest.param("kernel", "kernel.out.Welcome", 2, marks=LONG),
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
        disturbed = await under_way(client, asks, 100)
        armed = arm(rigged.home.root, point, nth=nth)
        try:
            await strike(client, first)
            found = await disturbed
            assert armed.struck
        finally:
            armed.disarm()
        assert_equal(found, wanted)
        await rigged.until_settled(client)
