"""A process that is stopped is found by its lack of progress and treated like a dead one; init
itself may be stopped and even killed."""

import asyncio
import os
import signal
import time
from contextlib import suppress

import msgspec
import pytest
from libllm.options import to_generate
from llmproto.operation import ThreadState

from .conftest import Boot, System, find, strike
from .load import Ask, Twins, assert_equal, complete_all, load, read, under_way

STOPPED = ("executor", "tokenizer", "kernel")


@pytest.mark.parametrize("victim", STOPPED)
async def test_a_stopped_process_is_replaced(shared: System, twins: Twins, victim: str) -> None:
    asks = load(8, 400)
    async with shared.client() as client:
        wanted = await twins.of(client, asks)
        disturbed = await under_way(client, asks)
        pid = await strike(client, victim, signal.SIGSTOP)
        try:
            assert_equal(await disturbed, wanted)
            await shared.until_settled(client)
        finally:
            # An old incarnation that wakes up, if any does, does no harm.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert (await find(client, victim)).pid != pid
        assert_equal(await complete_all(client, asks), wanted)
        await shared.until_settled(client)


@pytest.mark.long
@pytest.mark.parametrize("victim", STOPPED)
async def test_a_short_stop_kills_nobody(shared: System, twins: Twins, victim: str) -> None:
    """Woken in time it goes on where it stood."""
    asks = load(8, 400)
    async with shared.client() as client:
        wanted = await twins.of(client, asks)
        disturbed = await under_way(client, asks)
        pid = await strike(client, victim, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
        assert_equal(await disturbed, wanted)
        await shared.until_settled(client)


async def test_init_stopped(shared: System, twins: Twins) -> None:
    """Init judges nobody by time in which it did not run itself."""
    asks = load(8, 400)
    async with shared.client() as client:
        wanted = await twins.of(client, asks)
        before = {row.name: row.pid for row in await client.ps()}
        disturbed = await under_way(client, asks)
        init = shared.init_pid()
        os.kill(init, signal.SIGSTOP)
        await asyncio.sleep(3)
        os.kill(init, signal.SIGCONT)
        assert_equal(await disturbed, wanted)
        # Whatever would be killed wrongly would be within the time that silence is judged by.
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert {row.name: row.pid for row in await client.ps()} == before
            await asyncio.sleep(0.2)
        await shared.until_settled(client)


async def test_killed_init_leaves_nothing_and_its_threads_go_on(booted: Boot, twins: Twins) -> None:
    system = await asyncio.to_thread(booted)
    asks = [ask for ask in load(8, 300) if ask.choices == 1 and ask.stop is None]
    asks = [msgspec.structs.replace(ask, resumable=True) for ask in asks]
    requests = [to_generate(ask.options, prompt=ask.prompt) for ask in asks]
    async with system.client() as client:
        for request in requests:
            generation = client.start(request)
            await generation.wait_accepted()
            await generation.take()
            generation.detach()
        os.kill((await find(client, "monitor")).pid or 0, signal.SIGSTOP)
        os.kill(system.init_pid(), signal.SIGKILL)
        system.until_gone()
    await system.boot_async()
    async with system.client() as client:
        found = await asyncio.gather(
            *[read(await client.resume(request.key + bytes(1))) for request in requests]
        )
        assert_equal(found, await twins.of(client, asks))
        await system.until_settled(client)


async def test_a_thread_is_paused_without_a_reader(shared: System) -> None:
    """A detached thread stops at its credit, and a cancel ends it."""
    ask = Ask(prompt="A list is", tokens=900, seed=1, resumable=True)
    async with shared.client() as client:
        generation = await client.generate(ask.prompt, stream=True, **ask.options)
        await generation.take()
        generation.detach()
        (thread,) = generation.threads
        while [row.state for row in await client.threads()] != [ThreadState.PAUSED]:
            await client.status()
        await client.cancel(thread)
        await read_rest(shared, generation.streams[0])
        await shared.until_settled(client)


async def read_rest(system: System, stream: bytes) -> None:
    """To its end, as another client."""
    async with system.client() as other:
        end = await (await other.resume(stream)).collect()
        assert end.finish_reason == "cancel"
