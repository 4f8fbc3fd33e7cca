"""A client that stops reading stalls only its own threads, costs bounded memory, and gets
everything when it reads again."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
from libllm.client import AsyncClient
from llmproto import limits
from llmproto.operation import ThreadState

from .conftest import System, find
from .load import Ask, Twins, assert_equal, complete_all, load, read
from .test_pairs import Reader, requests_of

STALLED = 8
GROWTH_BYTES_MAX = 16 << 20
"""For so many stalled streams: the credit of each is some 100 KB in every buffer on the way, at a
generous count; the rest is what an allocator keeps."""


def stalling(count: int) -> list[Ask]:
    """Requests for far more tokens than their credit."""
    asks = [ask for ask in load(2 * count, 450) if ask.choices == 1 and ask.stop is None]
    return [msgspec.structs.replace(ask, seed=1000 + ask.seed) for ask in asks[:count]]


async def resident_bytes(client: AsyncClient, role: str) -> int:
    """What a process has in memory."""
    pid = (await find(client, role)).pid
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"{role} has no memory")


async def until_paused(client: AsyncClient, count: int, *, consumed: int) -> None:
    """So many threads have used up their credit, of each of which at most so much was consumed."""
    most = limits.CREDIT_TOKENS + limits.STEPS_AHEAD_MAX + consumed
    while True:
        rows = await client.threads()
        paused = [row for row in rows if row.state is ThreadState.PAUSED]
        if len(paused) == count:
            for row in paused:
                assert row.output_tokens <= most
            return
        await asyncio.sleep(0.05)


async def test_an_application_that_does_not_consume(shared: System, twins: Twins) -> None:
    asks, others = stalling(STALLED), load(8, 40)
    async with shared.client() as client, shared.client() as lazy:
        wanted = await twins.of(client, others)
        all_of_it = await twins.of(client, asks)
        before = {role: await resident_bytes(client, role) for role in ("kernel", "tokenizer")}
        stalled = [await lazy.generate(ask.prompt, stream=True, **ask.options) for ask in asks]
        await until_paused(client, STALLED, consumed=0)
        assert_equal(await complete_all(client, others), wanted)
        for role, resident in before.items():
            grown = await resident_bytes(client, role) - resident
            assert grown < GROWTH_BYTES_MAX, f"{role} has grown by {grown} bytes"
        found = await asyncio.gather(*(read(generation) for generation in stalled))
        assert_equal(found, all_of_it)
        await lazy.aclose()
        await shared.until_settled(client)


async def test_a_stopped_client_process(shared: System, twins: Twins, tmp_path: Path) -> None:
    asks, others = stalling(6), load(8, 40)
    async with shared.client() as client:
        wanted = await twins.of(client, others)
        all_of_it = await twins.of(client, asks)
        requests = requests_of(asks)
        with Reader(shared, tmp_path, requests) as reader:
            await reader.until_lines(60)
            os.kill(reader.process.pid, signal.SIGSTOP)
            await until_paused(client, len(asks), consumed=120)
            assert_equal(await complete_all(client, others), wanted)
            os.kill(reader.process.pid, signal.SIGCONT)
            assert await asyncio.to_thread(reader.process.wait, 60) == 0
        for request, twin in zip(requests, all_of_it, strict=True):
            lines = [line for line in reader.lines if line.stream[:32] == request.key.hex()]
            assert "".join(line.text for line in lines) == twin.text
            assert [line.finish_reason for line in lines if line.finish_reason] == ["length"]
        await shared.until_settled(client)
