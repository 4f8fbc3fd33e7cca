"""What training and serving cost each other on one device, with versions swapped meanwhile."""

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from llmproto.jobs import StepReport
from llmproto.recipes import DataRecipe, Recipe, TrainingRecipe

from libllm.bench.rollback import CONFIG, NAME, deploy_two
from libllm.bench.system import Figures, system
from libllm.client import AsyncClient
from libllm.jobs import AsyncJob

OUTPUT_TOKENS = 64
STEPS = 1_000_000
"""More than any measurement sees: the job is cancelled."""
SUMMANDS = 30


async def measure_beside(streams: int, swaps: int, seconds: float) -> Figures:
    """Tokens a second of each alone, then of both at once under `swaps` rollbacks."""
    with tempfile.TemporaryDirectory(prefix="llmos-") as folder:
        async with system(CONFIG) as (client, _, _):
            await deploy_two(client)
            serving = Serving(client, streams)
            await serving.during(2.0)  # warm
            alone = await serving.during(seconds)
            job = await client.train(_recipe(_write(Path(folder)), await _base(client)))
            async for look in job.watch():
                if look.reports:
                    break
            training_alone = await _trained(job, lambda: asyncio.sleep(seconds))
            both: list[float] = []

            async def together() -> None:
                swapping = asyncio.create_task(_swap(client, swaps, seconds))
                both.append(await serving.during(seconds))
                await swapping

            training_beside = await _trained(job, together)
            await job.cancel()
    return {
        "streams": streams,
        "swaps": swaps,
        "streams_ended": serving.ended,
        "streams_failed": serving.failed,
        "serving_alone_tokens_per_s": round(alone, 1),
        "serving_beside_tokens_per_s": round(both[0], 1),
        "serving_beside_over_alone": round(both[0] / alone, 3),
        "training_alone_tokens_per_s": round(training_alone, 1),
        "training_beside_tokens_per_s": round(training_beside, 1),
        "training_beside_over_alone": round(training_beside / training_alone, 3),
    }


class Serving:
    """Streams that follow one another, always so many at once."""

    def __init__(self, client: AsyncClient, streams: int) -> None:
        self._client = client
        self._streams = streams
        self._salt = itertools.count()
        self.ended = self.failed = 0

    async def during(self, seconds: float) -> float:
        """Tokens a second, over so long."""
        until_s = time.monotonic() + seconds
        began_s = time.monotonic()
        counts = await asyncio.gather(*(self._place(until_s) for _ in range(self._streams)))
        return sum(counts) / (time.monotonic() - began_s)

    async def _place(self, until_s: float) -> int:
        tokens = 0
        while time.monotonic() < until_s:
            found = await self._client.generate(
                f"Number {next(self._salt)}", model=NAME, max_tokens=OUTPUT_TOKENS, ignore_eos=True
            )
            self.ended += 1
            self.failed += found.usage.output_tokens != OUTPUT_TOKENS
            tokens += found.usage.output_tokens
        return tokens


async def _swap(client: AsyncClient, swaps: int, seconds: float) -> None:
    for _ in range(swaps):
        await asyncio.sleep(seconds / (swaps + 1))
        await client.rollback(NAME)


async def _trained(job: AsyncJob, meanwhile: Callable[[], Awaitable[None]]) -> float:
    """Tokens a second that the job learned from while that went on."""
    before = (await job.row()).step
    began_s = time.monotonic()
    await meanwhile()
    seconds = time.monotonic() - began_s
    after = (await job.row()).step
    reports: list[StepReport] = []
    async for look in job.watch(before):
        reports += look.reports
        if reports and reports[-1].step >= after:
            break
    return sum(report.tokens for report in reports if report.step <= after) / seconds


async def _base(client: AsyncClient) -> str:
    return (await client.versions(NAME))[0].reference


def _recipe(data: str, base: str) -> Recipe:
    return Recipe(
        name="beside",
        base=base,
        data=DataRecipe(train=[data]),
        training=TrainingRecipe(steps=STEPS, batch=8, learning_rate=1e-4, checkpoint_every=200),
    )


def _write(folder: Path) -> str:
    rows = [
        {"prompt": f"{one} plus {other} is", "completion": f" {one + other}."}
        for one in range(SUMMANDS)
        for other in range(SUMMANDS)
    ]
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
