"""Kill anything, seen over HTTP: the unmodified openai client notices nothing while its gateway
lives; a client that resumes by id outlives the gateway too."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from libllm.client import AsyncClient

from .conftest import SERVED, System, find, strike, systems

STREAMS = 16
TOKENS = 80
RESUMABLE = {"llmos-resumable": "true"}


@pytest.fixture(scope="module")
def gated() -> Iterator[System]:
    """A system with a gateway, which may be killed."""
    with systems() as start:
        yield start(SERVED, "llmkernel.init")


async def url_of(client: AsyncClient) -> str:
    """Where the gateway listens, once it does."""
    while True:
        url = (await client.status()).http
        if url:
            return url
        await asyncio.sleep(0.02)


def bodies() -> list[dict[str, Any]]:
    """Requests that are the same whenever they are made: half greedy, half sampled."""
    return [
        {
            "prompt": f"The for statement, part {number}:",
            "max_tokens": TOKENS,
            "temperature": 0.0 if number % 2 else 0.8,
            "seed": number,
            "stream": True,
        }
        for number in range(STREAMS)
    ]


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
        wanted = await through_openai(url, model)
        for victim in ("executor", "tokenizer", "kernel"):
            disturbed = asyncio.create_task(through_openai(url, model))
            await asyncio.sleep(random.Random(victim).uniform(0.3, 0.6))
            assert not disturbed.done()
            await strike(client, victim)
            assert await disturbed == wanted, victim
        await gated.until_settled(client)


class Resuming(msgspec.Struct):
    """A client that goes on behind the last event that it has."""

    text: str = ""
    stream: str = ""
    last: str = ""
    attempts: int = 0

    async def read(self, http: httpx.AsyncClient, body: dict[str, Any]) -> str:
        """To the end, whatever happens to the connection."""
        while True:
            self.attempts += 1
            try:
                if await self._attempt(http, body):
                    return self.text
            except httpx.TransportError:
                await asyncio.sleep(0.05)

    async def _attempt(self, http: httpx.AsyncClient, body: dict[str, Any]) -> bool:
        if self.last:
            path, headers = f"/v1/streams/{self.stream}", {"last-event-id": self.last}
            request = http.build_request("GET", path, headers=headers)
        else:
            self.text = ""
            request = http.build_request("POST", "/v1/completions", json=body, headers=RESUMABLE)
        answer = await http.send(request, stream=True)
        try:
            if answer.status_code >= 500:  # the gateway is back before the system is
                return False
            assert answer.status_code == 200, await answer.aread()
            self.stream = answer.headers.get("llmos-stream", self.stream)
            return await self._events(answer)
        finally:
            await answer.aclose()

    async def _events(self, answer: httpx.Response) -> bool:
        event_id = ""
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line == "data: [DONE]":
                return True
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                if "error" in data:
                    assert data["error"]["type"] == "server_error", data
                    return False
                self.text += "".join(choice["text"] for choice in data["choices"])
                self.last = event_id
        return False


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
            before = (await find(client, "gateway")).incarnation
            await strike(client, "gateway")
            if other is not None:
                await strike(client, other)
            assert await disturbed == wanted
            for reader in readers:  # what may be resumed is kept for a while, unless this is said
                answer = await http.delete(f"/v1/streams/{reader.stream}")
                assert answer.status_code == 200, answer.text
        assert any(reader.attempts > 1 for reader in readers)
        assert (await find(client, "gateway")).incarnation > before
        assert await url_of(client) == url
        await gated.until_settled(client)
