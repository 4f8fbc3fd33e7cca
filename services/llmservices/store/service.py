"""The store's messages.  Whatever takes time is done beside the loop: changes by one thread, in the
order in which they were asked for; reading (verify, export) by another."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto.versions import (
    Damage,
    Deploy,
    Import,
    Rollback,
    Save,
    Saved,
    VersionAsk,
    VersionFound,
    VersionRow,
    Versions,
    VersionsAsk,
)

from llmservices.store.archive import Archive
from llmservices.store.damage import damage_of
from llmservices.store.deploying import Deployer
from llmservices.store.index import Index
from llmservices.store.rows import resolve, row
from llmservices.store.worker import Worker

T = TypeVar("T")
VERSIONS_BYTES_MAX: Final = 900_000
"""Of one answer: what is left of a message beside its rows."""


class Store(Service):
    """Owns the folder `store` of the home."""

    def __init__(self, port: Port, archive: Archive) -> None:
        self._port = port
        self._archive = archive
        self._index = archive.open_index()
        self._writer = Worker("writer")
        self._reader = Worker("reader")
        self._deployer = Deployer(port, find=self._row, check=self._damage)

    def handlers(self) -> Handlers:
        """What it takes."""
        return {
            Save: self.save,
            Import: self.import_folder,
            VersionAsk: self.version,
            VersionsAsk: self.versions,
            Deploy: self._deployer.deploy,
            Rollback: self._deployer.rollback,
        }

    async def save(self, save: Save, request: Request) -> Saved:
        """Answered when it is durable."""
        blobs = request.blobs
        return await self._writer.do(lambda: self._archive.save(save, blobs))

    async def import_folder(self, message: Import, request: Request) -> Saved:
        """Answered when it is durable."""
        return await self._writer.do(
            lambda: self._archive.import_folder(Path(message.path), message.name, message.base)
        )

    async def version(self, ask: VersionAsk, request: Request) -> VersionFound:
        """One version."""
        root = self._archive.root
        return await self._ask(
            lambda index: VersionFound(row(index, root, resolve(index, ask.reference)))
        )

    async def versions(self, ask: VersionsAsk, request: Request) -> Versions:
        """Many, newest first."""
        root = self._archive.root

        def read(index: Index) -> Versions:
            entries, total = index.listed(ask.name, checkpoints=ask.checkpoints, limit=ask.limit)
            return Versions([row(index, root, entry, files=False) for entry in entries], total)

        return await self._ask(read)

    async def _row(self, reference: str) -> VersionRow:
        root = self._archive.root
        return await self._ask(lambda index: row(index, root, resolve(index, reference)))

    async def _damage(self, version: bytes) -> list[Damage]:
        root = self._archive.root
        return await self._reader.do(lambda: damage_of(root, version))

    async def _ask(self, question: Callable[[Index], T]) -> T:
        """From the index at once; where that is damaged, from one that is made anew."""
        try:
            return question(self._index)
        except sqlite3.DatabaseError:
            self._index.close()
            await self._writer.do(self._archive.rebuild)
            self._index = self._archive.open_index()
            return question(self._index)
