"""The load generator against real servers on loopback: aiohttp's, and a system."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from libllm.bench.serve.__main__ import asks_of, limits_of, parser
from libllm.bench.serve.run import processes_for, run_load
from libllm.bench.serve.servers import Target
from libllm.bench.serve.timeline import Limits
from libllm.bench.serve.workload import Lengths, Shape, synthetic
from llmproto.errors import RemoteError

SHAPE = Shape(500)


class Fake:
    """An OpenAI-compatible server that answers with as many tokens as were asked for."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.now = self.most = 0
        self.changed = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = False

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.broken:
            return web.Response(status=500, text="no")
        async with self.changed:
            self.now += 1
            self.most = max(self.most, self.now)
            self.changed.notify_all()
        await self.gate.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await self._event(response, {"choices": [{"text": "x"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self._event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self.now -= 1
        return response

    async def wait_for(self, requests: int) -> None:
        """Until so many are unanswered at once."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.now >= requests)

    async def _event(self, response: web.StreamResponse, event: object) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})


@asynccontextmanager
async def serving(fake: Fake) -> AsyncIterator[str]:
    """Its base URL."""
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    app.router.add_get("/v1/models", fake.models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def test_a_closed_loop_keeps_so_many_in_flight_and_counts_all() -> None:
    fake = Fake()
    asks = synthetic(12, SHAPE, prompt=Lengths(5, 5), output=Lengths(3, 3))
    async with serving(fake) as url:
        fake.gate.clear()
        running = asyncio.create_task(
            run_load(Target("http", url=url), asks, concurrency=4, processes=1)
        )
        await fake.wait_for(4)
        fake.gate.set()
        summary, lines = await running
    assert fake.most == 4
    assert (summary.requests, summary.failed) == (12, 0)
    assert (summary.prompt_tokens, summary.output_tokens) == (60, 36)
    assert [line.number for line in lines] == list(range(12))
    assert fake.bodies[0]["model"] == "fake"
    assert fake.bodies[0]["prompt"] in [ask.prompt for ask in asks]


async def test_an_open_loop_does_not_wait_for_a_slow_server() -> None:
    fake = Fake()
    asks = synthetic(30, SHAPE, prompt=Lengths(2, 2), output=Lengths(1, 1), rate=1000.0)
    async with serving(fake) as url:
        fake.gate.clear()
        running = asyncio.create_task(
            run_load(Target("http", url=url), asks, concurrency=None, processes=1)
        )
        await fake.wait_for(30)
        fake.gate.set()
        summary, _ = await running
    assert (fake.most, summary.requests, summary.failed) == (30, 30, 0)


async def test_several_processes_share_a_load() -> None:
    fake = Fake()
    asks = synthetic(10, SHAPE, prompt=Lengths(2, 2), output=Lengths(2, 2))
    async with serving(fake) as url:
        summary, lines = await run_load(Target("http", url=url), asks, concurrency=5, processes=2)
    assert (summary.requests, summary.failed, summary.output_tokens) == (10, 0, 20)
    assert [line.number for line in lines] == list(range(10))


async def test_failures_are_counted_by_their_reason() -> None:
    fake = Fake()
    fake.broken = True
    asks = synthetic(3, SHAPE, prompt=Lengths(2, 2), output=Lengths(2, 2))
    async with serving(fake) as url:
        summary, _ = await run_load(Target("http", url=url), asks, concurrency=1, processes=1)
        with pytest.raises(RemoteError, match="the warm-up failed: RuntimeError: HTTP 500: no"):
            await run_load(Target("http", url=url), asks, concurrency=1, warm_up=asks[:1])
    assert (summary.failed, list(summary.errors)) == (3, ["RuntimeError: HTTP 500: no"])


async def test_a_server_that_is_not_there_is_named() -> None:
    asks = synthetic(1, SHAPE, prompt=Lengths(2, 2), output=Lengths(2, 2))
    with pytest.raises(RemoteError, match="is the server up"):
        await run_load(Target("http", url="http://127.0.0.1:9"), asks, concurrency=1)


@pytest.mark.parametrize(
    ("streams", "cores", "expected"), [(1, 2, 1), (64, 8, 1), (65, 8, 2), (1000, 8, 4)]
)
def test_processes_leave_the_server_its_cores(streams: int, cores: int, expected: int) -> None:
    assert processes_for([], streams, cores) == expected


def test_options_make_the_workload() -> None:
    said = parser().parse_args(["--url", "http://x", "--rate", "5", "--requests", "7"])
    asks, concurrency = asks_of(said)
    assert (len(asks), concurrency, len(asks[0].prompt)) == (7, None, 128)
    closed = parser().parse_args(["--system", "--requests", "2", "--prompt", "4:4"])
    assert asks_of(closed)[1] == 8


def test_limits_are_read() -> None:
    assert limits_of(["mine=10/2.5"]) == [Limits("mine", 10.0, 2.5)]
    with pytest.raises(RemoteError, match="NAME=TTFT/TPOT"):
        limits_of(["mine=ten"])
