"""Training in a real system: whatever is killed, the losses and the weights are those of a run that
nobody disturbed."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from libllm.client import AsyncClient
from libllm.jobs import AsyncJob
from llmproto.errors import ErrorKind
from llmproto.jobs import JobRow, JobState
from llmproto.recipes import (
    ArchitectureRecipe,
    DataRecipe,
    Recipe,
    TokenizerRecipe,
    TrainingRecipe,
)
from llmproto.versions import VersionAsk, VersionFound
from llmservices.versions.manifest import read_manifest
from llmservices.versions.weights import read_tensors

from .conftest import System, systems

CONFIG = '[services]\nrun = ["tokenizer", "store"]\n'
ENDED = (JobState.DONE, JobState.FAILED, JobState.CANCELLED)
ROLES = ("trainer", "data", "store", "kernel")
STEPS_BETWEEN = 25
"""From one kill to the next."""
END_S = 90


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """Store and data service, and nothing to serve."""
    with systems() as start:
        yield start(CONFIG, "llmkernel.init")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to learn: words of a few letters."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 5))) for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text(" ".join(chance.choices(words, k=4000)))
    return path


def recipe(text: Path, name: str, **changes: object) -> Recipe:
    """A tiny model from nothing; dropout, so that random numbers count."""
    training = TrainingRecipe(
        steps=100, batch=4, learning_rate=3e-3, warmup_steps=5, checkpoint_every=10
    )
    return Recipe(
        name,
        method="pretrain",
        data=DataRecipe(train=[str(text)], validation_share=0.05, sampling="windows"),
        model=ArchitectureRecipe(
            family="gpt2", layers=2, heads=2, width=16, context_tokens=16, dropout=0.1
        ),
        tokenizer=TokenizerRecipe(kind="characters"),
        training=msgspec.structs.replace(training, **changes),
    )


async def ended(job: AsyncJob) -> JobRow:
    """How it ends."""
    async with asyncio.timeout(END_S):
        async for found in job.watch():
            row = found.row
    return row


async def done(job: AsyncJob) -> JobRow:
    """It ends well."""
    row = await ended(job)
    assert row.state is JobState.DONE, row
    return row


async def reached(job: AsyncJob, step: int) -> JobRow:
    """It has come so far."""
    async with asyncio.timeout(END_S):
        while (row := await job.row()).step < step:
            assert row.state not in ENDED, row
            await asyncio.sleep(0.01)
    return row


async def kill(client: AsyncClient, roles: Sequence[str]) -> None:
    """SIGKILL, from outside; a service that nobody has asked for yet is not there."""
    for row in await client.ps():
        if row.role in roles and row.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(row.pid, signal.SIGKILL)


async def made(client: AsyncClient, row: JobRow) -> tuple[dict[str, bytes], list[float]]:
    """The contents of the version's tensors, by digest, and the losses that it tells."""
    assert row.version is not None
    asked = VersionAsk(f"@{row.version.hex()}")
    found = await client._ask(asked, VersionFound, target="store")
    folder = Path(found.row.path)
    manifest, _ = read_manifest(folder)
    group = manifest.group("model.safetensors")
    assert group is not None
    digests = {tensor.name: tensor.digest for tensor in group.tensors}
    return digests, read_tensors(folder, "losses.safetensors")["loss"].tolist()


@pytest.mark.parametrize(
    "kills", [6, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
async def test_whatever_is_killed(system: System, text: Path, kills: int) -> None:
    chance = random.Random(kills)
    steps = STEPS_BETWEEN * (kills + 2)
    async with system.client() as client:
        expected = await made(
            client, await done(await client.train(recipe(text, f"calm-{kills}", steps=steps)))
        )
        job = await client.train(recipe(text, f"struck-{kills}", steps=steps))
        for number in range(1, kills + 1):
            await reached(job, STEPS_BETWEEN * number)
            # Each role alone first, then pairs and all that chance brings.
            single = number <= len(ROLES)
            victims = [ROLES[number - 1]] if single else chance.sample(ROLES, chance.choice((1, 2)))
            await kill(client, victims)
        row = await done(job)
        assert row.attempts > 1
        assert await made(client, row) == expected
        assert len(expected[1]) == steps


async def test_stopped_and_resumed(system: System, text: Path) -> None:
    async with system.client() as client:
        expected = await made(client, await done(await client.train(recipe(text, "through"))))
        job = await client.train(recipe(text, "halted"))
        await reached(job, 33)
        await job.stop()
        async with asyncio.timeout(END_S):
            async for found in job.watch():
                if (row := found.row).state is JobState.SUSPENDED:
                    break
        assert row.checkpoint_step == row.step
        await job.resume()
        assert await made(client, await done(job)) == expected


async def test_two_ranks_are_one(system: System, text: Path) -> None:
    async with system.client() as client:
        plain = recipe(text, "one", steps=20)
        assert plain.model is not None
        still = msgspec.structs.replace(plain.model, dropout=0.0)
        one = msgspec.structs.replace(plain, model=still)
        both = msgspec.structs.replace(
            one, name="two", training=msgspec.structs.replace(one.training, processes=2)
        )
        _, expected = await made(client, await done(await client.train(one)))
        _, found = await made(client, await done(await client.train(both)))
        assert found == pytest.approx(expected, abs=1e-4)


async def test_what_cannot_be_trained(system: System, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    async with system.client() as client:
        row = await ended(await client.train(recipe(empty, "nothing")))
        assert (row.state, row.error) == (JobState.FAILED, ErrorKind.INVALID)
        assert "empty.txt" in row.detail or "no" in row.detail
