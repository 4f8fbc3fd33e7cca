"""Versions swapped under running streams, refused, rolled back, and processes killed meanwhile."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import llmservices.models
import msgspec
import pytest
import torch
from libllm.client import AsyncClient
from libllm.results import Completion
from llmkernel.devices import detect
from llmproto.errors import ErrorKind, RemoteError
from llmproto.models import DeploymentRow, DeploymentState
from llmproto.versions import Saved
from llmservices.versions.manifest import object_path, read_manifest
from safetensors.torch import load_file, save_file

from .conftest import Boot, System, strike

EMBEDDED = Path(llmservices.models.__file__).with_name("embedded")
SERVICES = '[services]\nrun = ["tokenizer", "store"]\n'
CONFIG = '[executor]\nmode = "exact"\nkv_bytes = 67108864\n' + SERVICES
STREAMS = 16
TOKENS = 32
PROMPTS = ("Once upon a time", "The kernel", "A token is", "What is a lease?")


class Ask(msgspec.Struct, frozen=True):
    """One of the requests that are made again and again."""

    prompt: str
    seed: int


ASKS = [Ask(PROMPTS[n % len(PROMPTS)], n) for n in range(STREAMS)]


def perturbed(folder: Path, seed: int) -> Path:
    """A copy of the embedded model that says something else."""
    shutil.copytree(EMBEDDED, folder)
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        tensors[name] = tensor + 0.05 * noise * tensor.std()
    path.chmod(0o644)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


async def complete(client: AsyncClient, ask: Ask, model: str = "bot") -> Completion:
    return await client.generate(
        ask.prompt, model=model, max_tokens=TOKENS, seed=ask.seed, logprobs=0, ignore_eos=True
    )


async def row_of(client: AsyncClient, name: str = "bot") -> DeploymentRow:
    (row,) = [row for row in await client.deployments() if row.name == name]
    return row


async def executors(client: AsyncClient) -> list[str]:
    """Models that are loaded, or on their way."""
    rows = [row for row in await client.ps() if row.role == "executor"]
    return [row.model for row in rows if row.model != "llmos-mini"]


async def until_alone(client: AsyncClient, model: str) -> None:
    """Until nothing but this model is loaded."""
    deadline = time.monotonic() + 20
    while (found := await executors(client)) != [model]:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


class Store:
    """A system with two versions of `bot` in its store."""

    def __init__(self, system: System, client: AsyncClient, versions: list[Saved]) -> None:
        self.system = system
        self.client = client
        self.a, self.b = versions
        self.twins: dict[tuple[str, Ask], list[int]] = {}

    async def learn(self) -> None:
        """What each version says undisturbed; leaves the first one deployed."""
        for version in (self.b, self.a):
            await self.client.deploy(version.reference)
            answers = await asyncio.gather(*(complete(self.client, ask) for ask in ASKS))
            for ask, found in zip(ASKS, answers):
                assert found.model == version.reference
                assert found.tokens is not None
                self.twins[version.reference, ask] = found.tokens

    def check(self, ask: Ask, found: Completion) -> str:
        """It is what its version says undisturbed; which that is."""
        assert found.finish_reason == "length", found
        assert found.tokens == self.twins[found.model, ask], (found.model, ask)
        return found.model


@asynccontextmanager
async def stored(booted: Boot, folder: Path, config: str = CONFIG) -> AsyncIterator[Store]:
    system = await asyncio.to_thread(booted, config)
    async with system.client() as client:
        saved = [await client.import_version(EMBEDDED, "bot")]
        saved.append(await client.import_version(perturbed(folder / "b", 1), "bot"))
        yield Store(system, client, saved)


class Traffic:
    """STREAMS requests at once, each again when it ends."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._over = False
        self._seen: asyncio.Queue[str] = asyncio.Queue()
        self._running = asyncio.gather(*map(self._stream, ASKS))

    async def _stream(self, ask: Ask) -> None:
        while not self._over:
            self._seen.put_nowait(self._store.check(ask, await complete(self._store.client, ask)))

    async def until_seen(self, version: str) -> None:
        """Until one of them was answered by this version."""
        async with asyncio.timeout(30):
            while await self._seen.get() != version:
                pass

    async def stop(self) -> None:
        """Each reads its last answer to the end."""
        self._over = True
        await self._running


async def swap_under_streams(store: Store, swaps: int) -> None:
    await store.learn()
    assert store.twins[store.a.reference, ASKS[0]] != store.twins[store.b.reference, ASKS[0]]
    running = Traffic(store)
    for number in range(swaps):
        version = (store.b, store.a)[number % 2]
        await store.client.deploy(version.reference)
        store.check(ASKS[0], await complete(store.client, ASKS[0]))
        await running.until_seen(version.reference)
    await running.stop()
    await until_alone(store.client, (await row_of(store.client)).model)


async def test_swapped_under_running_streams(booted: Boot, tmp_path: Path) -> None:
    async with stored(booted, tmp_path) as store:
        await swap_under_streams(store, 2)


@pytest.mark.long
async def test_swapped_ten_times(booted: Boot, tmp_path: Path) -> None:
    async with stored(booted, tmp_path) as store:
        await swap_under_streams(store, 10)


async def test_without_room_for_both(booted: Boot, tmp_path: Path) -> None:
    """Two executors do not fit: the old one's threads end first, new ones wait, none is lost."""
    memory = detect()[0].memory_bytes
    config = CONFIG.replace("67108864", str(memory * 6 // 10))
    async with stored(booted, tmp_path, config) as store:
        await swap_under_streams(store, 1)


async def refusal(call: Awaitable[object]) -> str:
    with pytest.raises(RemoteError) as error:
        await call
    assert error.value.kind is ErrorKind.INVALID, error.value
    return error.value.detail


def flip(system: System, version: Saved, other: Saved) -> None:
    """One bit of an object that this version alone has."""
    folders = [
        system.home.store / "versions" / saved.version.hex()[:32] for saved in (version, other)
    ]
    mine, theirs = (read_manifest(folder)[0].objects() for folder in folders)
    name = next(name for name in mine if name not in theirs)
    path = object_path(system.home.store, name)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


async def test_what_is_refused_and_what_is_taken_back(booted: Boot, tmp_path: Path) -> None:
    async with stored(booted, tmp_path) as store:
        client, a, b = store.client, store.a, store.b
        assert "has no metric 'accuracy'" in await refusal(
            client.deploy("bot", gate="accuracy>=0.87")
        )
        await client.deploy(a.reference)
        assert "there is nothing to roll back to" in await refusal(client.rollback("bot"))
        assert "is a deployment" in await refusal(client.add_model(EMBEDDED, "bot"))
        assert "is a model by itself" in await refusal(client.deploy("bot", name="llmos-mini"))
        await client.deploy(b.reference)
        await until_alone(client, b.reference)
        flip(store.system, a, b)
        detail = await refusal(client.deploy(a.reference))
        assert a.reference in detail and "damaged" in detail
        detail = await refusal(client.rollback("bot"))  # compared when it is loaded
        assert "cannot be loaded" in detail and "damaged" in detail, detail
        row = await row_of(client)
        assert (row.state, row.serving) == (DeploymentState.FAILED, b.reference)
        assert (await complete(client, ASKS[0])).model == b.reference
        await client.undeploy("bot")
        assert "unknown model 'bot'" in await refusal(complete(client, ASKS[0]))


async def test_killed_in_the_middle_of_a_deploy(booted: Boot, tmp_path: Path) -> None:
    async with stored(booted, tmp_path) as store:
        await store.learn()
        running = Traffic(store)
        for number, victim in enumerate(("store", "tokenizer", "kernel", "executor")):
            version = (store.b, store.a)[number % 2]
            deploying = asyncio.create_task(store.client.deploy(version.reference))
            await asyncio.sleep(0.02 * number)
            await strike(store.client, victim)
            assert (await deploying).model == version.reference
            assert (await row_of(store.client)).serving == version.reference
        before = (await row_of(store.client)).previous
        back = asyncio.create_task(store.client.rollback("bot"))
        await asyncio.sleep(0.01)
        await strike(store.client, "store")
        assert (await back).model == before  # once, though it was asked for twice
        await running.stop()
        await store.system.until_settled(store.client)
