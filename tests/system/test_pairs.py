"""Two die at once, the client among them: a second client reads on where the first one stood."""

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from libllm.client import AsyncClient
from libllm.config import child_environment
from libllm.options import to_generate
from libllm.results import Completion
from llmproto import limits, wire
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Generate
from llmproto.operation import ThreadState

from .conftest import System, find, strike
from .faults.points import SELF, arm
from .load import Ask, Twins, assert_equal, complete_all, load, under_way
from .reader import Line, read_lines

ROLES = ("kernel", "executor", "tokenizer")
PAIRS = tuple(itertools.combinations(ROLES, 2))
POINTS = {
    "kernel": ("kernel.out.Committed", "kernel.out.ThreadSpawned", "kernel.in.ThreadEnd"),
    "executor": ("executor.out.Stepped", "executor.in.Run"),
    "tokenizer": ("tokenizer.out.Accepted", "tokenizer.out.ThreadEnd", "tokenizer.out.Text"),
}
"""Where the first of a pair takes the second one with it."""
AT = [
    (who, other, point) for who in ROLES for other in ROLES if who != other for point in POINTS[who]
]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_two_at_once(shared: System, twins: Twins, pair: tuple[str, str]) -> None:
    asks = load(16, 300)
    async with shared.client() as client:
        wanted = await twins.of(client, asks)
        tokens = random.Random(str(pair)).randrange(50, 800)
        disturbed = await under_way(client, asks, tokens)
        pids = [(await find(client, role)).pid for role in pair]
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        assert_equal(await disturbed, wanted)
        await shared.until_settled(client)


@pytest.mark.long
@pytest.mark.parametrize(("who", "other", "point"), AT)
async def test_two_at_a_point(
    rigged: System, twins: Twins, who: str, other: str, point: str
) -> None:
    asks = load(16, 60)
    async with rigged.client() as client:
        wanted = await twins.of(client, asks)
        pid = (await find(client, other)).pid
        assert pid is not None
        nth = 1 if point.endswith("ThreadEnd") else 4
        armed = arm(rigged.home.root, point, pids=(pid, SELF), nth=nth)
        try:
            found = await complete_all(client, asks)
            assert armed.struck
        finally:
            armed.disarm()
        assert_equal(found, wanted)
        await rigged.until_settled(client)


class Reader:
    """A client process at work, and what it has written."""

    def __init__(self, system: System, folder: Path, requests: list[Generate]) -> None:
        self._output = folder / "output"
        bodies = folder / "requests"
        bodies.write_text("\n".join(wire.encode_body(request).hex() for request in requests))
        script = Path(__file__).with_name("reader.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(system.home.root), str(bodies), str(self._output)],
            env=child_environment(),
        )

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def lines(self) -> list[Line]:
        """So far."""
        return read_lines(self._output)

    def unfinished(
        self, requests: list[Generate], twins: list[Completion]
    ) -> list[tuple[Generate, Completion]]:
        """The requests, with their twins, of which it did not see the end."""
        ended = {line.stream[:32] for line in self.lines if line.finish_reason}
        pairs = zip(requests, twins, strict=True)
        return [(request, twin) for request, twin in pairs if request.key.hex() not in ended]

    async def forget_read(self, client: AsyncClient) -> None:
        """What it has read to the end, perhaps without having said so."""
        for row in await client.threads():
            if row.state is ThreadState.ENDED:
                try:
                    await client.cancel(row.thread, forget=True)
                except RemoteError as error:  # it has said so, and that was heard meanwhile
                    assert error.kind is ErrorKind.STALE

    async def until_lines(self, count: int) -> None:
        """It has read so much."""
        while len(self.lines) < count:
            assert self.process.poll() is None
            await asyncio.sleep(0.01)


def requests_of(asks: list[Ask]) -> list[Generate]:
    """The messages, with keys that are known before anybody is asked."""
    made = [to_generate(ask.options, prompt=ask.prompt) for ask in asks]
    return [msgspec.structs.replace(request, resumable=True) for request in made]


async def read_on(client: AsyncClient, request: Generate, lines: list[Line]) -> Completion:
    """The rest of one request's stream after another client's lines."""
    stream = request.key + bytes(1)
    mine = [line for line in lines if line.stream == stream.hex()]
    offset = max((line.offset for line in mine), default=0)
    scores = [score for line in mine for score in line.scores or ()]
    if mine and mine[-1].finish_reason is not None:
        offset, scores, mine = 0, [], []  # read to its end; it may be gone, so ask for it anew
    try:
        generation = await client.resume(stream, offset, scores=len(scores))
    except RemoteError as error:
        assert error.kind is ErrorKind.STALE
        assert not mine, "an accepted stream is gone"
        generation = client.start(request)
    rest = await generation.collect()
    all_scores = None if rest.scores is None and not scores else [*scores, *(rest.scores or ())]
    choice = msgspec.structs.replace(
        rest.choices[0],
        text="".join(line.text for line in mine) + rest.text,
        scores=all_scores,
        tokens=None if all_scores is None else [score.token for score in all_scores],
    )
    return msgspec.structs.replace(rest, choices=[choice])


@pytest.mark.parametrize(
    "other", [None, "kernel", *(pytest.param(role, marks=pytest.mark.long) for role in ROLES[1:])]
)
async def test_client_and_another(
    shared: System, twins: Twins, tmp_path: Path, other: str | None
) -> None:
    asks = [ask for ask in load(16, 400) if ask.choices == 1]
    async with shared.client() as client:
        wanted = await twins.of(client, asks)
        requests = requests_of(asks)
        with Reader(shared, tmp_path, requests) as reader:
            await reader.until_lines(100)
            reader.process.kill()
            if other is not None:
                await strike(client, other)
        unfinished = reader.unfinished(requests, wanted)
        lines = reader.lines
        assert unfinished
        found = await asyncio.gather(*(read_on(client, one, lines) for one, _ in unfinished))
        assert_equal(found, [twin for _, twin in unfinished])
        await reader.forget_read(client)
        await shared.until_settled(client)


@pytest.mark.long
@pytest.mark.parametrize("resumable", [True, False])
async def test_threads_of_a_dead_client_end(
    shared: System, tmp_path: Path, resumable: bool
) -> None:
    """After they have lingered for it; those that somebody may still resume keep their context for
    a while, and run no more."""
    asks = [ask for ask in load(8, 900) if ask.choices == 1 and ask.stop is None]
    requests = [
        msgspec.structs.replace(request, resumable=resumable) for request in requests_of(asks)
    ]
    async with shared.client() as client:
        with Reader(shared, tmp_path, requests) as reader:
            await reader.until_lines(100)
        services = [(row.name, row.incarnation) for row in await client.ps()]
        deadline = time.monotonic() + 30 + limits.LINGER_MS / 1000
        while [row for row in await client.threads() if row.state is not ThreadState.ENDED]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        if resumable:
            for request in requests:
                end = await (await client.resume(request.key + bytes(1))).collect()
                assert end.finish_reason == "cancel"
        await shared.until_settled(client)
        assert [(row.name, row.incarnation) for row in await client.ps()] == services
