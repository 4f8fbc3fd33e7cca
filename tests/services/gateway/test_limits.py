"""Bounds of a gateway, each reached by lowering it: slow clients, crowds, and its own mistakes."""

import asyncio
import json

import pytest
from llmproto.models import ModelsAsk
from llmservices.gateway import app, endpoint, server, streaming

from .conftest import FakeLlm, Gateway, serving


async def exchange(gateway: Gateway, data: bytes) -> tuple[int, dict[str, str]]:
    """Status and error of what a connection is answered until it is closed."""
    host, port = gateway.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split(b" ")[1]), json.loads(body)["error"]


@pytest.mark.parametrize("data", [b"", b"GET /heal", b"GET /health HTTP/1.1\r\nx: "])
async def test_slow_headers(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(server, "HEADER_S", 0.01)
    async with serving() as gateway:
        status, error = await exchange(gateway, data)
    assert status == 408
    assert "0.01 s" in error["message"]


async def test_slow_body(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BODY_S", 0.01)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    status, error = await exchange(gateway, head)
    assert status == 408
    assert "1 bytes did" in error["message"]


async def test_too_many_connections(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 0)
    status, error = await exchange(gateway, b"GET /health HTTP/1.1\r\n\r\n")
    assert status == 429
    assert error["type"] == "rate_limit_error"


async def test_too_many_streams(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "STREAMS_MAX", 3)
    body = {"prompt": "a", "n": 2, "stream": True}
    gateway.llm.hold.clear()
    async with gateway.http.stream("POST", "/v1/completions", json=body) as first:
        assert first.status_code == 200
        refused = await gateway.http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_streams"
        gateway.llm.hold.set()
        await first.aread()
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 200


async def test_a_stream_that_waits_says_so(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "WAITING_S", 0.001)
    gateway.llm.hold.clear()
    body = {"prompt": "a", "max_tokens": 1, "stream": True}
    async with gateway.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == ": waiting"
        gateway.llm.hold.set()
        rest = [line async for line in lines]
    assert rest[-2] == "data: [DONE]"


async def test_its_own_mistakes_are_not_shown(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLlm, "_answer", lambda self, message: 1 / 0)
    answer = await gateway.http.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "Zero" not in answer.text
    monkeypatch.undo()
    assert (await gateway.http.get("/v1/models")).status_code == 200
    gateway.llm.down.add(ModelsAsk)
    assert (await gateway.http.get("/v1/models")).status_code == 503


async def test_head(gateway: Gateway) -> None:
    answer = await gateway.http.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
