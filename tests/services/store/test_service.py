"""The store's messages, with a port whose kernel is the test."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from libllm.events import Answer, Call, Event, Post
from libllm.port import Port
from libllm.service import Handler, Request
from llmproto.base import Header, Message
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import Jobs, JobsAsk
from llmproto.models import Models, ModelsAsk
from llmproto.versions import (
    Collect,
    Collected,
    Export,
    Import,
    Lineage,
    MetricsRecord,
    Saved,
    TagSet,
    Verified,
    Verify,
    VersionAsk,
    VersionFound,
    VersionKind,
    VersionRemove,
    Versions,
    VersionsAsk,
)
from llmservices.store.archive import Archive
from llmservices.store.disk import Disk
from llmservices.store.service import Store

from .saves import CONFIG, Tensors, random_tensors, save_of

T = TypeVar("T", bound=Message)


class KernelPort(Port):
    """Answers the store's questions at once, and remembers what it answered itself."""

    def __init__(self) -> None:
        super().__init__(self._take)
        self.sent: list[Message] = []

    def _take(self, event: Event) -> None:
        answers: dict[type[Message], Message] = {JobsAsk: Jobs([]), ModelsAsk: Models([])}
        if isinstance(event, Call):
            answer = answers[type(event.message)]
            asyncio.get_running_loop().call_soon(self.deliver, Answer(event.call, answer))
        elif isinstance(event, Post):
            self.sent.append(event.message)


class Asking:
    """A store, and what it answers."""

    def __init__(self, archive: Archive) -> None:
        self.port = KernelPort()
        self.store = Store(self.port, archive)
        self._handlers = self.store.handlers()
        self._asked = 0

    async def ask(self, message: Message, kind: type[T], *blobs: bytes) -> T:
        self._asked += 1
        header = Header(1, 1, self._asked.to_bytes(16, "big"), source=b"s" * 16)
        request = Request(header, self.port, blobs)
        handler: Handler = self._handlers[type(message)]
        result = handler(message, request)
        assert asyncio.iscoroutine(result)
        answer = await result
        if answer is None:
            answer = self.port.sent[-1]
        assert isinstance(answer, kind), answer
        return answer


async def test_a_version_from_save_to_removal(archive: Archive, tmp_path: Path) -> None:
    asking = Asking(archive)
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(1, 100)})
    saved = await asking.ask(save, Saved, CONFIG)
    row = (await asking.ask(VersionAsk("model"), VersionFound)).row
    assert (row.version, row.reference, row.kind) == (
        saved.version, saved.reference, VersionKind.MODEL,
    )  # fmt: skip
    assert row.files[1].name == "model.safetensors"
    await asking.ask(TagSet("model", "prod"), Message)
    await asking.ask(MetricsRecord("model:prod", {"accuracy": 0.5}), Message)
    (listed,) = (await asking.ask(VersionsAsk(), Versions)).rows
    assert (listed.tags, listed.metrics, listed.files) == (["prod"], {"accuracy": 0.5}, [])
    verified = await asking.ask(Verify(), Verified)
    assert (verified.versions, verified.objects, verified.damage) == (1, 2, [])
    with pytest.raises(RemoteError, match="has the tags prod"):
        await asking.ask(VersionRemove("model"), Message)
    with pytest.raises(RemoteError, match="names there are: model"):
        await asking.ask(VersionAsk("mode1"), VersionFound)
    assert (await asking.ask(Collect(), Collected)).objects == 0


async def test_import_and_export(
    archive: Archive, tmp_path: Path, plain_folder: Callable[[str, Tensors], Path]
) -> None:
    asking = Asking(archive)
    source = plain_folder("source", random_tensors(1, 10))
    saved = await asking.ask(Import(str(source), "plain"), Saved)
    await asking.ask(Export(saved.reference, str(tmp_path / "out")), Message)
    assert (tmp_path / "out" / "config.json").read_bytes() == CONFIG


async def test_older_checkpoints_go_after_the_answer(archive: Archive, tmp_path: Path) -> None:
    asking = Asking(archive)
    for step in range(1, 5):
        save = save_of(
            tmp_path / "b",
            {"optimizer.safetensors": random_tensors(step, 10)},
            kind=VersionKind.CHECKPOINT,
            lineage=Lineage(job=b"12345678", step=step),
        )
        await asking.ask(save, Saved, CONFIG)
    found = await asking.ask(VersionsAsk(checkpoints=True), Versions)
    assert [row.lineage.step for row in found.rows] == [4, 3]
    assert (await asking.ask(VersionsAsk(), Versions)).total == 0


class Slow(Disk):
    """Waits before its first change until it is told to go on."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.began = threading.Event()

    def point(self, what: str, path: Path) -> None:
        self.began.set()
        assert self.goes_on.wait(60)


async def test_a_save_holds_nobody_up_and_two_are_ordered(tmp_path: Path) -> None:
    disk = Slow()
    asking = Asking(Archive(tmp_path / "store", disk=disk))
    saves = [
        save_of(tmp_path / f"b{n}", {"model.safetensors": random_tensors(n, 100)}) for n in (1, 2)
    ]
    running = [asyncio.create_task(asking.ask(save, Saved, CONFIG)) for save in saves]
    await asyncio.to_thread(disk.began.wait, 60)
    assert (await asking.ask(VersionsAsk(), Versions)).total == 0
    disk.goes_on.set()
    first, second = await asyncio.gather(*running)
    listed = (await asking.ask(VersionsAsk(), Versions)).rows
    assert [row.version for row in listed] == [second.version, first.version]


async def test_no_more_wait_than_may(tmp_path: Path) -> None:
    disk = Slow()
    asking = Asking(Archive(tmp_path / "store", disk=disk))
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(1, 10)})
    running = [asyncio.create_task(asking.ask(save, Saved, CONFIG)) for _ in range(65)]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    disk.goes_on.set()
    results = await asyncio.gather(*running, return_exceptions=True)
    refused = [result for result in results if isinstance(result, RemoteError)]
    assert [error.kind for error in refused] == [ErrorKind.EXHAUSTED]


async def test_a_damaged_index_is_made_anew_while_asked(archive: Archive, tmp_path: Path) -> None:
    asking = Asking(archive)
    save = save_of(tmp_path / "b", {"model.safetensors": random_tensors(1, 100)})
    saved = await asking.ask(save, Saved, CONFIG)
    with archive.index.changing():
        archive.index._db.execute("drop table tags")
    row = (await asking.ask(VersionAsk("model"), VersionFound)).row
    assert row.version == saved.version
    more = msgspec.structs.replace(save, name="other")
    await asking.ask(more, Saved, CONFIG)
    assert (await asking.ask(VersionsAsk(), Versions)).total == 2
