"""What the whole system costs a training: a job against its own step function in a bare loop.

The job's pace is the slope of its steps over the times at which a watcher hears of them, from the
fifth step on: data service, reports, journal and a checkpoint on the way are in it, the start is
not.  The bare loop runs in this process, with as many threads and as nice as the kernel starts a
trainer, on rows of the same lengths.
"""

import asyncio
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from libllm.bench.system import system
from libllm.client import AsyncClient
from llmproto.recipes import (
    ArchitectureRecipe,
    DataRecipe,
    Recipe,
    ResourceRecipe,
    TokenizerRecipe,
    TrainingRecipe,
)

from llmservices.trainer import building, numerics
from llmservices.trainer.architectures import Special
from llmservices.trainer.batches import Batch, Row
from llmservices.trainer.core import Training

CONFIG: Final = '[services]\nrun = ["tokenizer", "store"]\n'
NICE: Final = 10
"""As the kernel starts a trainer."""
ROWS: Final = 8
CONTEXT: Final = 128
STEPS_WARM: Final = 5
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz ,.\n"


def recipe_of(name: str, text: Path, *, steps: int, threads: int) -> Recipe:
    """1.3 million parameters, one checkpoint on the way."""
    return Recipe(
        name,
        method="pretrain",
        data=DataRecipe(train=[str(text)], sampling="windows"),
        model=ArchitectureRecipe(layers=3, heads=4, width=192, context_tokens=CONTEXT),
        tokenizer=TokenizerRecipe(kind="characters"),
        training=TrainingRecipe(
            steps=steps, batch=ROWS, learning_rate=1e-3, checkpoint_every=steps // 2
        ),
        resources=ResourceRecipe(cores=threads),
    )


def slope(points: Sequence[tuple[float, int]]) -> float:
    """Of a line through (seconds, count), by least squares: counts a second."""
    return statistics.linear_regression(*zip(*points)).slope


async def job_pace(client: AsyncClient, recipe: Recipe) -> float:
    """Tokens a second of one job."""
    points: list[tuple[float, int]] = []
    tokens = 0
    job = await client.train(recipe)
    async for look in job.watch():
        tokens += sum(report.tokens for report in look.reports)
        if look.reports and look.reports[-1].step >= STEPS_WARM:
            points.append((time.monotonic(), tokens))
    await job.result()
    return slope(points)


def loop_pace(recipe: Recipe, *, steps: int, threads: int) -> float:
    """Tokens a second of the step alone."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    numerics.fix(threads)
    vocabulary = len(LETTERS) + 2
    built = building.build(recipe, None, Special(vocabulary, 0, 1), [])
    training = Training(built.learner, recipe.training, steps_total=steps)
    generator = torch.Generator().manual_seed(0)
    points: list[tuple[float, int]] = []
    tokens = 0
    for step in range(steps):
        whole = torch.randint(0, vocabulary, (ROWS, CONTEXT + 1), generator=generator)
        batch = Batch([Row(row[:-1], row[1:]) for row in whole], "generate")
        tokens += training.step(batch).tokens
        if step + 1 >= STEPS_WARM:
            points.append((time.monotonic(), tokens))
    return slope(points)


async def measure(*, pairs: int, steps: int, threads: int) -> dict[str, float]:
    """Turn by turn; the first pair is not counted."""
    chance = random.Random(0)
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(chance.choices(LETTERS, k=steps * ROWS * CONTEXT)))
        async with system(CONFIG) as (client, _, _):
            for pair in range(pairs + 1):
                recipe = recipe_of(f"bench-{pair}", text, steps=steps, threads=threads)
                job = await job_pace(client, recipe)
                bare = await asyncio.to_thread(loop_pace, recipe, steps=steps, threads=threads)
                if pair:
                    found.append((job, bare))
    ratios = [job / bare for job, bare in found]
    return {
        "steps": steps,
        "tokens_s": round(statistics.median(job for job, _ in found), 1),
        "tokens_s_bare": round(statistics.median(bare for _, bare in found), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }
