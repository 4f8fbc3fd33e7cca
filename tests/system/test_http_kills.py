"""Kill anything, seen over HTTP: the unmodified openai client notices nothing while its gateway
lives; a client that resumes by id outlives the gateway too."""

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from llmproto.operation import ThreadState

from .conftest import System, find, strike
from .http_load import Resuming, bodies, forget_all, url_of
from .load import Twins, assert_equal, load
from .test_pairs import Reader, read_on, requests_of


async def through_openai(url: str, model: str) -> list[str]:
    """All texts, read as streams by the unmodified client, which is not to try anything again."""
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120
    ) as llm:

        async def one(body: dict[str, Any]) -> str:
            stream = await llm.completions.create(model=model, **body)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return list(await asyncio.gather(*(one(body) for body in bodies())))


async def test_openai_client_through_kills(gated: System) -> None:
    async with gated.client() as client:
        url, model = await url_of(client), (await client.model()).name
        await through_openai(url, model)
        began_s = time.monotonic()
        wanted = await through_openai(url, model)
        whole_s = time.monotonic() - began_s
        for victim in ("executor", "tokenizer", "kernel"):
            disturbed = asyncio.create_task(through_openai(url, model))
            await asyncio.sleep(random.Random(victim).uniform(0.2, 0.5) * whole_s)
            assert not disturbed.done()
            await strike(client, victim)
            assert await disturbed == wanted, victim
        await gated.until_settled(client)


@pytest.mark.parametrize(
    "other",
    [
        None,
        pytest.param("executor", marks=pytest.mark.long),
        pytest.param("tokenizer", marks=pytest.mark.long),
        "kernel",
    ],
)
async def test_resumed_over_a_gateway_kill(gated: System, other: str | None) -> None:
    async with gated.client() as client:
        url, model = await url_of(client), (await client.model()).name
        wanted = await through_openai(url, model)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            await gated.until_settled(client)  # all of these are acknowledged
            before = (await find(client, "gateway")).incarnation
            readers = [Resuming() for _ in bodies()]
            disturbed = asyncio.gather(
                *(
                    reader.read(http, {**body, "model": model})
                    for reader, body in zip(readers, bodies(), strict=True)
                )
            )
            while not all(reader.last for reader in readers):
                assert not disturbed.done()
                await asyncio.sleep(0.01)
            await strike(client, "gateway")
            if other is not None:
                await strike(client, other)
            assert await disturbed == wanted
            await forget_all(http, readers)
        assert any(reader.attempts > 1 for reader in readers)
        assert (await find(client, "gateway")).incarnation > before
        assert await url_of(client) == url
        await gated.until_settled(client)


async def test_what_was_deleted_stays_deleted(gated: System) -> None:
    """Once DELETE is answered, nothing that dies brings the stream back."""
    async with gated.client() as client:
        url, model = await url_of(client), (await client.model()).name
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            reader = Resuming()
            await reader.read(http, {**bodies()[0], "model": model})
            assert [row.state for row in await client.threads()] == [ThreadState.ENDED]
            answer = await http.delete(f"/v1/streams/{reader.stream}")
            await asyncio.gather(strike(client, "gateway"), strike(client, "tokenizer"))
        assert answer.status_code == 200
        assert not await client.threads()
        await gated.until_settled(client)


async def test_a_client_process_and_the_gateway(
    gated: System, twins: Twins, tmp_path: Path
) -> None:
    """Whoever speaks the protocol does not need the gateway, dead or alive."""
    asks = [ask for ask in load(16, 600) if ask.choices == 1]
    async with gated.client() as client:
        wanted = await twins.of(client, asks)
        requests = requests_of(asks)
        with Reader(gated, tmp_path, requests) as reader:
            await reader.until_lines(100)
            reader.process.kill()
            await strike(client, "gateway")
        unfinished = reader.unfinished(requests, wanted)
        assert unfinished
        lines = reader.lines
        found = await asyncio.gather(*(read_on(client, one, lines) for one, _ in unfinished))
        assert_equal(found, [twin for _, twin in unfinished])
        await reader.forget_read(client)
        await gated.until_settled(client)
