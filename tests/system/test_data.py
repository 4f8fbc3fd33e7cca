"""The data service under a real kernel: started when it is asked, killed in the middle."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from libllm.client import AsyncClient
from llmproto.base import Message
from llmproto.data import Prepare, Prepared, Segment, SegmentAsk
from llmproto.errors import ErrorKind, RemoteError
from llmproto.recipes import DataRecipe
from llmservices.texts.segments import SegmentFile

from .conftest import ROOT, System, find, strike

TOKENIZER = ROOT / "services/llmservices/models/embedded"
ROWS = 8_000


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """A question that takes a second to answer."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for row in range(ROWS):
            text = f"Row {row} of {ROWS} says {row * row % 9973} and little else. " * 8
            file.write(json.dumps({"text": text}) + "\n")
    return Prepare(
        data=DataRecipe(train=[str(path)], packing="isolated"),
        part="train",
        task="generate",
        tokenizer=str(TOKENIZER),
        context_tokens=1024,
        batch=8,
        seed=1,
    )


async def prepare(client: AsyncClient, ask: Prepare) -> Prepared:
    return await client._port.call(ask, Prepared, target="data")


async def segment(client: AsyncClient, ask: Prepare, index: int) -> Segment:
    """As a trainer asks: a service that was killed is told the plan again."""
    while True:
        plan = (await prepare(client, ask)).plan
        try:
            return await client._port.call(SegmentAsk(plan, index), Segment, target="data")
        except RemoteError as error:
            assert error.kind is ErrorKind.STALE, error


async def killed_in_the_middle(system: System, question: "asyncio.Task[Message]") -> int:
    """SIGKILL the service while it makes something, until the question is answered; how often.

    The third time it may finish.
    """
    cache = system.home.cache / "data"
    struck: set[str] = set()
    while not question.done():
        for making in cache.glob("making-*-*"):
            pid = making.name.split("-")[1]
            if len(struck) < 2 and pid not in struck and any(making.iterdir()):
                os.kill(int(pid), signal.SIGKILL)
                struck.add(pid)
        await asyncio.sleep(0.001)
    return len(struck)


async def test_killed_in_the_middle_it_gives_the_same(shared: System, ask: Prepare) -> None:
    async with shared.client() as client:
        assert not [row for row in await client.ps() if row.name == "data" and row.pid]
        wanted = await prepare(client, ask)
        assert wanted.rows > 100
        segments = [await segment(client, ask, index) for index in (0, 3)]
        await find(client, "data")

        shutil.rmtree(shared.home.cache / "data" / "rows")
        (shared.home.cache / "data" / "rows").mkdir()
        question: asyncio.Task[Message] = asyncio.ensure_future(prepare(client, ask))
        assert await killed_in_the_middle(shared, question) > 0
        assert await question == wanted

        for index, whole in zip((0, 3), segments, strict=True):
            Path(whole.path).unlink(missing_ok=True)
            await strike(client, "data", signal.SIGKILL)  # what it has made is forgotten
            question = asyncio.ensure_future(segment(client, ask, index))
            await killed_in_the_middle(shared, question)
            again = await question
            assert isinstance(again, Segment)
            assert again == whole
            assert SegmentFile(again.path).batch(0).rows == ask.batch
        assert len(list((shared.home.cache / "data" / "rows").iterdir())) == 1
