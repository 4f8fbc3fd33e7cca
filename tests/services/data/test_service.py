"""The service's answers, with a port whose kernel is the test."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from libllm.config import DataConfig, Home
from libllm.events import Event, Post
from libllm.port import Port
from libllm.service import Request
from llmproto.base import Header
from llmproto.connection import Working
from llmproto.data import SegmentAsk
from llmproto.errors import ErrorKind, RemoteError
from llmproto.recipes import DataRecipe
from llmservices.data.service import PLANS_MAX, SEGMENTS_KEPT, WORKS_MAX, DataService
from llmservices.texts.segments import SegmentFile

from .conftest import Bench


class Rig:
    """One service, and what it said unasked."""

    def __init__(self, root: Path) -> None:
        self.said: list[Event] = []
        self.port = Port(self.said.append)
        self.home = Home(root / "home")
        self.service = DataService(self.port, self.home, DataConfig())

    def request(self) -> Request:
        return Request(Header(1, 0x0C01, b"i" * 16), self.port)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await rig.service.start()
    yield rig


async def test_prepare_then_segments(rig: Rig, bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", *({"text": f"text {number}"} for number in range(9)))
    ask = bench.ask(DataRecipe(train=[path]))
    prepared = await rig.service.prepare(ask, rig.request())
    assert (prepared.rows, prepared.batches) == (9, 5)
    segment = await rig.service.segment(SegmentAsk(prepared.plan, 0), rig.request())
    assert Path(segment.path).stat().st_size == segment.bytes
    assert SegmentFile(segment.path).batch(0).rows == 2
    again = await rig.service.segment(SegmentAsk(prepared.plan, 0), rig.request())
    assert again == segment


async def test_long_work_is_announced_and_makes_progress(rig: Rig, bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "text"})
    await rig.service.prepare(bench.ask(DataRecipe(train=[path])), rig.request())
    budgets = [
        event.message.budget_ms
        for event in rig.said
        if isinstance(event, Post) and isinstance(event.message, Working)
    ]
    assert budgets[0] > 0
    assert budgets[-1] == 0
    assert rig.service.holding().progress > 0


async def test_a_plan_that_is_not_known_is_stale(rig: Rig) -> None:
    with pytest.raises(RemoteError) as refusal:
        await rig.service.segment(SegmentAsk(b"p" * 32, 0), rig.request())
    assert refusal.value.kind is ErrorKind.STALE


async def test_askers_at_once_share_the_work(rig: Rig, bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", *({"text": f"text {number}"} for number in range(9)))
    asks = [bench.ask(DataRecipe(train=[path])) for _ in range(4)]
    first, *others = await asyncio.gather(
        *(rig.service.prepare(ask, rig.request()) for ask in asks)
    )
    assert all(other == first for other in others)
    segments = await asyncio.gather(
        *(rig.service.segment(SegmentAsk(first.plan, 0), rig.request()) for _ in range(4))
    )
    assert len({segment.digest for segment in segments}) == 1


async def test_the_next_segment_is_made_ahead_and_old_ones_go(rig: Rig, bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", *({"text": f"text {number}"} for number in range(9)))
    prepared = await rig.service.prepare(bench.ask(DataRecipe(train=[path])), rig.request())
    folder = rig.home.cache / "data" / "segments" / prepared.plan.hex()

    async def names(index: int, done_below: int = 0) -> set[str]:
        ask = SegmentAsk(prepared.plan, index, done_below)
        await rig.service.segment(ask, rig.request())
        await rig.service.settle()
        return {file.name for file in folder.iterdir()}

    assert await names(0) == {"0.arrow", "1.arrow"}
    assert await names(1) == {"0.arrow", "1.arrow", "2.arrow"}
    assert await names(2, done_below=2) == {"2.arrow", "3.arrow"}
    for index in range(3, 3 + 2 * SEGMENTS_KEPT):
        assert len(await names(index)) <= SEGMENTS_KEPT + 2


async def test_a_refusal_names_file_and_line(rig: Rig, bench: Bench) -> None:
    path = bench.file("a.jsonl", '{"text": "one"}\n{"text": \n')
    with pytest.raises(RemoteError, match=r"a\.jsonl:2: is no JSON"):
        await rig.service.prepare(bench.ask(DataRecipe(train=[path])), rig.request())


async def test_more_work_than_can_wait_is_refused(rig: Rig, bench: Bench) -> None:
    waiting: asyncio.Future[None] = rig.port.loop.create_future()
    for number in range(WORKS_MAX):
        rig.service._works["long", number] = waiting
    path = bench.jsonl("a.jsonl", {"text": "text"})
    with pytest.raises(RemoteError, match=f"{WORKS_MAX} pieces of work wait") as refusal:
        await rig.service.prepare(bench.ask(DataRecipe(train=[path])), rig.request())
    assert refusal.value.kind is ErrorKind.EXHAUSTED
    assert refusal.value.retry_after_ms
    rig.service._works.clear()
    waiting.cancel()


async def test_no_more_plans_are_kept_than_fit(rig: Rig, bench: Bench) -> None:
    path = bench.jsonl("a.jsonl", {"text": "text"})
    plans = [
        (
            await rig.service.prepare(bench.ask(DataRecipe(train=[path]), seed=seed), rig.request())
        ).plan
        for seed in range(PLANS_MAX + 1)
    ]
    with pytest.raises(RemoteError, match="is not known"):
        await rig.service.segment(SegmentAsk(plans[0], 0), rig.request())
    await rig.service.segment(SegmentAsk(plans[-1], 0), rig.request())
    await rig.service.settle()
