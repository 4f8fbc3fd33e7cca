"""Loads over HTTP: requests that are the same whenever they are made, and a client that resumes."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
from libllm.client import AsyncClient

STREAMS = 16
TOKENS = 480
RESUMABLE = {"llmos-resumable": "true"}


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


async def forget_all(http: httpx.AsyncClient, readers: Sequence[Resuming]) -> None:
    """What may be resumed is kept for a while, unless this is said, and answered."""
    for reader in readers:
        await _forget(http, reader.stream)


async def _forget(http: httpx.AsyncClient, stream: str) -> None:
    """Say it until somebody says that it was heard."""
    while True:
        try:
            answer = await http.delete(f"/v1/streams/{stream}")
        except httpx.TransportError:
            await asyncio.sleep(0.05)
            continue
        if answer.status_code < 500:
            # Not found: it was heard, but the answer was lost.
            assert answer.status_code in (200, 404), answer.text
            return
