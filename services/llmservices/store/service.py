"""The store's messages.  Whatever takes time is done beside the loop: changes by one thread, in the
order in which they were asked for; reading (verify, export) by another."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto.errors import invalid
from llmproto.jobs import Jobs, JobsAsk, JobState
from llmproto.threads import Done
from llmproto.versions import (
    Collect,
    Collected,
    Damage,
    Deploy,
    Export,
    Import,
    MetricsRecord,
    Rollback,
    Save,
    Saved,
    TagRemove,
    TagSet,
    Verified,
    Verify,
    VersionAsk,
    VersionFound,
    VersionRemove,
    VersionRow,
    Versions,
    VersionsAsk,
)

from libllm import logs
from llmservices.store.archive import Archive
from llmservices.store.deploying import Deployer
from llmservices.store.exporting import export
from llmservices.store.index import Entry, Index
from llmservices.store.rows import resolve, row, rows
from llmservices.store.upkeep import Pins, Upkeep
from llmservices.store.verifying import Verifier
from llmservices.store.worker import Worker
from llmservices.versions.manifest import folder_of

T = TypeVar("T")
ENDED: Final = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


class Store(Service):
    """Owns the folder `store` of the home."""

    def __init__(self, port: Port, archive: Archive) -> None:
        self._port = port
        self._archive = archive
        self._index_number = archive.index_number
        self._index = archive.open_index()
        self._pins = Pins()
        self._upkeep = Upkeep(archive, self._pins)
        self._writer = Worker("writer")
        self._reader = Worker("reader")
        self._deployer = Deployer(port, find=self.find, check=self.check)
        self._logger = logs.configure("store")

    def handlers(self) -> Handlers:
        """What it takes."""
        return {
            Save: self.save,
            Import: self.import_folder,
            Export: self.export,
            VersionAsk: self.version,
            VersionsAsk: self.versions,
            TagSet: self.set_tag,
            TagRemove: self.remove_tag,
            VersionRemove: self.remove,
            Verify: self.verify,
            Collect: self.collect,
            MetricsRecord: self.record,
            Deploy: self._deployer.deploy,
            Rollback: self._deployer.rollback,
        }

    # --- what other parts of this service ask -----------------------------------------------------

    async def find(self, reference: str) -> VersionRow:
        """The version that a reference means; INVALID, naming what there is."""
        root = self._archive.root
        return await self._ask(lambda index: row(index, root, resolve(index, reference)))

    async def check(self, digest: bytes) -> list[Damage]:
        """Read and compare every object of a version; what is damaged."""
        entry = await self._ask(lambda index: index.find(digest.hex()))
        if entry is None:
            raise invalid(f"version {digest.hex()[:8]} is not in the store")
        return (await self._verify(entry)).damage

    # --- messages ---------------------------------------------------------------------------------

    async def save(self, save: Save, request: Request) -> None:
        """Answered when it is durable; then older checkpoints of its job go."""
        blobs = request.blobs
        request.reply(await self._writer.do(lambda: self._archive.save(save, blobs)))
        job = save.lineage.job
        if job is not None:
            await self._writer.do(lambda: self._upkeep.retire(job, save.keep))

    async def import_folder(self, message: Import, request: Request) -> Saved:
        """Answered when it is durable."""
        path = Path(message.path)
        return await self._writer.do(
            lambda: self._archive.import_folder(path, message.name, message.base)
        )

    async def export(self, message: Export, request: Request) -> Done:
        """A plain folder."""
        entry = await self._ask(lambda index: resolve(index, message.reference))
        folder = folder_of(self._archive.root, bytes.fromhex(entry.digest))

        def write() -> None:
            with self._pins.hold(entry.digest):
                export(folder, Path(message.path), merge=message.merge)

        await self._reader.do(write)
        return Done()

    async def version(self, ask: VersionAsk, request: Request) -> VersionFound:
        """One version."""
        return VersionFound(await self.find(ask.reference))

    async def versions(self, ask: VersionsAsk, request: Request) -> Versions:
        """Many, newest first."""
        root = self._archive.root
        return await self._ask(lambda index: rows(index, root, ask))

    async def set_tag(self, message: TagSet, request: Request) -> Done:
        """Compare and swap."""
        await self._writer.do(lambda: self._upkeep.set_tag(message))
        return Done()

    async def remove_tag(self, message: TagRemove, request: Request) -> Done:
        """The version stays."""
        await self._writer.do(lambda: self._upkeep.remove_tag(message))
        return Done()

    async def record(self, message: MetricsRecord, request: Request) -> Done:
        """Results belong to the version."""
        await self._writer.do(lambda: self._upkeep.record(message.reference, message.metrics))
        return Done()

    async def remove(self, message: VersionRemove, request: Request) -> Done:
        """Unless something stands on it."""
        in_table = await self._deployer.in_table()
        await self._writer.do(lambda: self._upkeep.remove(message.reference, in_table=in_table))
        return Done()

    async def verify(self, message: Verify, request: Request) -> Verified:
        """One version, or all."""
        reference = message.reference
        if reference is None:
            return await self._verify(None)
        return await self._verify(await self._ask(lambda index: resolve(index, reference)))

    async def collect(self, message: Collect, request: Request) -> Collected:
        """Checkpoints of jobs that are over go too, but for those that the kernel may resume."""
        jobs = (await self._port.call(JobsAsk(), Jobs, cause=request.id)).rows
        living = {each.job.hex() for each in jobs if each.state not in ENDED}
        wanted = {
            each.checkpoint.hex()
            for each in jobs
            if each.checkpoint is not None and each.state not in ENDED
        }
        return await self._writer.do(lambda: self._upkeep.collect(living=living, wanted=wanted))

    # --- inside -----------------------------------------------------------------------------------

    async def _verify(self, entry: Entry | None) -> Verified:
        """Of one version, or (None) of all."""
        entries = await self._ask(lambda index: index.all()) if entry is None else [entry]
        damaged = self._archive.damaged if entry is None else {}

        def read() -> Verified:
            with self._pins.hold(*(each.digest for each in entries)):
                verifier = Verifier(self._archive.root)
                verified = verifier.verify(entries, damaged)
                self._archive.suspects |= verifier.damaged_objects
                return verified

        return await self._reader.do(read)

    async def _ask(self, question: Callable[[Index], T]) -> T:
        """From the index at once; where that is damaged, from one that is made anew."""
        if self._index_number != self._archive.index_number:
            self._reopen()
        try:
            return question(self._index)
        except sqlite3.DatabaseError as error:
            self._logger.error("index_damaged", detail=str(error))
            await self._writer.do(self._archive.rebuild)
            self._reopen()
            return question(self._index)

    def _reopen(self) -> None:
        self._index.close()
        self._index_number = self._archive.index_number
        self._index = self._archive.open_index()
