"""Streams that resume, streams that are dropped, streams that nobody reads."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from .conftest import CONTEXT, MODEL, Gateway, words

RESUMABLE = {"llmos-resumable": "true"}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": True}
TEXT = {"prompt": "ab", "max_tokens": 6, "stream": True, "logprobs": 1}

Event = tuple[str, Any]


async def events(answer: httpx.Response) -> AsyncIterator[Event]:
    """Id and data of every event; `[DONE]` as it is."""
    event_id = ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
            yield event_id, data if data == "[DONE]" else json.loads(data)


async def all_events(gateway: Gateway, path: str, body: dict[str, Any]) -> list[Event]:
    """Of a resumable request, to its end."""
    async with gateway.http.stream("POST", path, json=body, headers=RESUMABLE) as answer:
        assert answer.status_code == 200
        return [event async for event in events(answer)]


async def resumed(gateway: Gateway, stream: str, last: str | None) -> list[Event]:
    """What follows that event."""
    headers = {} if last is None else {"last-event-id": last}
    async with gateway.http.stream("GET", f"/v1/streams/{stream}", headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        return [event async for event in events(answer)]


def data_of(found: list[Event]) -> list[Any]:
    """Without ids."""
    return [data for _, data in found]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
        ("/v1/completions", TEXT),
        ("/v1/completions", {**TEXT, "stream_options": {"include_usage": True}}),
    ],
)
async def test_resuming_behind_any_event_gives_the_rest(
    gateway: Gateway, path: str, body: dict[str, Any]
) -> None:
    whole = await all_events(gateway, path, body)
    stream = whole[0][0].partition(":")[0]
    assert whole[-1][1] == "[DONE]"
    for number, (event_id, _) in enumerate(whole[:-1]):
        assert event_id.startswith(stream)
        rest = await resumed(gateway, stream, event_id)
        assert data_of(rest) == data_of(whole[number + 1 :])
        assert [each for each, data in rest if data != "[DONE]"] == [
            each for each, data in whole[number + 1 :] if data != "[DONE]"
        ]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
)
async def test_resuming_from_the_beginning(
    gateway: Gateway, path: str, body: dict[str, Any]
) -> None:
    whole = await all_events(gateway, path, body)
    stream = whole[0][0].partition(":")[0]
    assert await resumed(gateway, stream, None) == whole


async def test_the_streams_are_named_before_they_begin(gateway: Gateway) -> None:
    body = {**CHAT, "n": 2}
    gateway.llm.hold.clear()
    path = "/v1/chat/completions"
    async with gateway.http.stream("POST", path, json=body, headers=RESUMABLE) as answer:
        names = answer.headers["llmos-stream"].split(", ")
    assert len(names) == 2
    gateway.llm.hold.set()
    for index, name in enumerate(names):
        found = [data for data in data_of(await resumed(gateway, name, None)) if data != "[DONE]"]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found)
        assert text == "".join(words(6, index))
        assert {chunk["choices"][0]["index"] for chunk in found} == {index}


async def test_a_stream_can_be_resumed_by_its_id_alone(gateway: Gateway) -> None:
    whole = await all_events(gateway, "/v1/completions", TEXT)
    stream = whole[0][0][:34]
    found = data_of(await resumed(gateway, stream, None))
    assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == "".join(words(6))


async def test_a_drop_cancels(gateway: Gateway) -> None:
    gateway.llm.hold.clear()
    async with gateway.http.stream("POST", "/v1/completions", json=TEXT) as answer:
        assert "llmos-stream" not in answer.headers
        thread = next(iter(gateway.llm.threads.values()))
    await until(lambda: thread.cancelled)
    assert gateway.llm.reading == 0
    await until(lambda: gateway.measures.streams == 0)


async def test_a_drop_of_an_unstreamed_request_cancels(gateway: Gateway) -> None:
    gateway.llm.hold.clear()
    body = {"prompt": ["ab", "cd"], "n": 2}
    task = asyncio.create_task(gateway.http.post("/v1/completions", json=body))
    await until(lambda: len(gateway.llm.threads) == 4)
    task.cancel()
    await until(lambda: all(thread.cancelled for thread in gateway.llm.threads.values()))
    assert gateway.llm.reading == 0


async def test_a_drop_of_a_resumable_stream_leaves_it(gateway: Gateway) -> None:
    path = "/v1/completions"
    gateway.llm.hold.clear()
    async with gateway.http.stream("POST", path, json=TEXT, headers=RESUMABLE) as answer:
        name = answer.headers["llmos-stream"]
    await until(lambda: gateway.llm.reading == 0)
    thread = next(iter(gateway.llm.threads.values()))
    assert not thread.cancelled
    gateway.llm.hold.set()
    found = data_of(await resumed(gateway, name, None))
    assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == "".join(words(6))


async def test_a_second_reader_takes_the_stream_over(gateway: Gateway) -> None:
    gateway.llm.hold.clear()
    path = "/v1/completions"
    async with gateway.http.stream("POST", path, json=TEXT, headers=RESUMABLE) as first:
        task = asyncio.create_task(resumed(gateway, first.headers["llmos-stream"], None))
        found = data_of([event async for event in events(first)])
        assert found[-1]["error"]["code"] == "stale"
        gateway.llm.hold.set()
        assert data_of(await task)[-1] == "[DONE]"


async def test_deleting_cancels(gateway: Gateway) -> None:
    gateway.llm.hold.clear()
    path = "/v1/completions"
    async with gateway.http.stream("POST", path, json=TEXT, headers=RESUMABLE) as answer:
        name = answer.headers["llmos-stream"]
        deleted = await gateway.http.delete(f"/v1/streams/{name}")
        assert deleted.json() == {"id": name, "deleted": True, "object": "stream"}
    assert next(iter(gateway.llm.threads.values())).cancelled
    assert (await gateway.http.delete(f"/v1/streams/{name}")).status_code == 404


@pytest.mark.parametrize(
    ("stream", "last", "status"),
    [
        ("nonsense", None, 404),
        ("00" * 17, None, 404),
        ("00" * 17, "nonsense", 400),
        ("00" * 17, "00" * 17 + ":x:0:0", 400),
        ("00" * 17, "11" * 17 + ":0:0:0", 400),
        ("00" * 17, "00" * 17 + ":99999999999999999999:0:0", 400),
    ],
)
async def test_bad_names(gateway: Gateway, stream: str, last: str | None, status: int) -> None:
    headers = {} if last is None else {"last-event-id": last}
    answer = await gateway.http.get(f"/v1/streams/{stream}", headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_another_tenant_may_not_resume(gateway: Gateway) -> None:
    headers = {**RESUMABLE, "authorization": "Bearer good"}
    path = "/v1/completions"
    gateway.llm.hold.clear()
    async with gateway.http.stream("POST", path, json=TEXT, headers=headers) as answer:
        name = answer.headers["llmos-stream"]
        assert (await gateway.http.get(f"/v1/streams/{name}")).status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "stream": False},
        {"prompt": "a", "stream": True, "echo": True},
        {"prompt": "a", "stream": True, "n": 65},
    ],
)
async def test_what_cannot_be_resumed(gateway: Gateway, body: dict[str, Any]) -> None:
    answer = await gateway.http.post("/v1/completions", json=body, headers=RESUMABLE)
    assert answer.status_code == 400
    assert not gateway.llm.generates


async def test_who_does_not_read_stalls_only_itself(gateway: Gateway) -> None:
    """A reader that stops is not fed beyond its credit; others go on; then it gets everything."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": CONTEXT - 1, "n": 128, "stream": True}
    data = json.dumps(body).encode()
    host, port = gateway.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await reader.readuntil(b"\r\n\r\n")
    other = await gateway.http.post("/v1/completions", json={"prompt": "b", "max_tokens": 3})
    assert other.json()["choices"][0]["text"] == "".join(words(3))
    rest = await reader.read(-1)
    writer.close()
    assert rest.count(b'"finish_reason":"length"') == 128
    assert rest.count(b'"text":"') == 128 * CONTEXT
    assert rest.rstrip().endswith(b"0")


async def until(condition: Any) -> None:
    """Let the loop run until it holds; the test's own time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110 - the condition has no event
        await asyncio.sleep(0.001)
