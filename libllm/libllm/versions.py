"""Versions and deployments, as a client imports, names, deploys and removes them.

    llm.import_version("./support-bot", "support-bot")
    llm.tag("support-bot", "prod")
    llm.deploy("support-bot:prod", gate="accuracy>=0.87")

A reference is `name` (its newest version), `name:tag`, `name@digest` or `@digest`.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.models import (
    DeploymentRow,
    Deployments,
    DeploymentsAsk,
    DeploymentState,
    ModelUndeploy,
)
from llmproto.threads import Done
from llmproto.versions import (
    Collect,
    Collected,
    Deploy,
    Deploying,
    Export,
    Import,
    Rollback,
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

from libllm.jobs import Ask

STORE: Final = "store"
READING_S: Final = 3600.0
"""Reading and writing all of a large model, from a slow disk."""
LOADING_S: Final = limits.WORKING_MS_MAX / 1000
WATCH_S: Final = 0.02
"""Between two looks at a roll-out: a swap takes tenths of a second."""
ANY_TAG: Final = "*"
"""`tag(..., expect=ANY_TAG)`: whatever it stands on."""


class VersionTable:
    """What a client asks of store and kernel, by its own asking method."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def import_version(
        self, path: str | Path, name: str, *, base: str | None = None
    ) -> Saved:
        """Copy a folder into the store."""
        message = Import(os.path.abspath(os.path.expanduser(path)), name, base)
        return await self._ask(message, Saved, target=STORE, patience_s=READING_S)

    async def export_version(self, reference: str, path: str | Path, *, merge: bool) -> None:
        """Write a version as a plain folder."""
        message = Export(reference, os.path.abspath(os.path.expanduser(path)), merge)
        await self._ask(message, Done, target=STORE, patience_s=READING_S)

    async def versions(
        self,
        name: str | None,
        *,
        checkpoints: bool,
        limit: int,
        patience_s: float | None = None,
    ) -> list[VersionRow]:
        """Newest first."""
        ask = VersionsAsk(name, checkpoints, limit)
        return (await self._ask(ask, Versions, target=STORE, patience_s=patience_s)).rows

    async def version(self, reference: str) -> VersionRow:
        """One of them."""
        return (await self._ask(VersionAsk(reference), VersionFound, target=STORE)).row

    async def tag(self, reference: str, tag: str, *, expect: str | None) -> None:
        """Let a tag stand on a version."""
        if expect == ANY_TAG:
            message = TagSet(reference, tag)
        else:
            expected = None if expect is None else (await self.version(expect)).version
            message = TagSet(reference, tag, expected, compare=True)
        await self._ask(message, Done, target=STORE)

    async def untag(self, name: str, tag: str) -> None:
        """Remove a tag."""
        await self._ask(TagRemove(name, tag), Done, target=STORE)

    async def remove_version(self, reference: str) -> None:
        """Forget a version."""
        await self._ask(VersionRemove(reference), Done, target=STORE)

    async def verify(self, reference: str | None) -> Verified:
        """Read and compare every object."""
        return await self._ask(Verify(reference), Verified, target=STORE, patience_s=READING_S)

    async def collect(self) -> Collected:
        """Remove what no version needs."""
        return await self._ask(Collect(), Collected, target=STORE, patience_s=READING_S)

    # --- deployments ------------------------------------------------------------------------------

    async def deploy(
        self,
        reference: str,
        *,
        name: str | None,
        replicas: int,
        device: str | None,
        gate: str,
        wait: bool,
    ) -> Deploying:
        """Let a name serve a version."""
        message = Deploy(secrets.token_bytes(16), reference, name, replicas, device, gate)
        answer = await self._ask(message, Deploying, target=STORE, patience_s=READING_S)
        if wait:
            await self._live(answer)
        return answer

    async def rollback(self, name: str, *, wait: bool) -> Deploying:
        """Let a name serve what it served before."""
        message = Rollback(secrets.token_bytes(16), name)
        answer = await self._ask(message, Deploying, target=STORE, patience_s=READING_S)
        if wait:
            await self._live(answer)
        return answer

    async def undeploy(self, name: str) -> None:
        """Let a name serve nothing."""
        await self._ask(ModelUndeploy(name), Done)

    async def deployments(self) -> list[DeploymentRow]:
        """Every name that serves a version."""
        return (await self._ask(DeploymentsAsk(), Deployments)).rows

    async def _live(self, asked: Deploying) -> None:
        """Wait until the name serves it; INVALID with the reason where it cannot, STALE where
        somebody wants something else by now, DEADLINE after LOADING_S."""
        deadline_s = time.monotonic() + LOADING_S
        while time.monotonic() < deadline_s:
            row = _named(await self.deployments(), asked.name)
            if row is None or row.model != asked.model:
                wanted = "nothing" if row is None else row.model
                raise RemoteError(
                    ErrorKind.STALE, f"{asked.name} is to serve {wanted} by now, not {asked.model}"
                )
            if row.state is DeploymentState.LIVE:
                return
            if row.state is DeploymentState.FAILED:
                serving = "" if row.serving == row.model else f"; it serves {row.serving}"
                raise invalid(f"{asked.model} cannot be loaded: {row.detail}{serving}")
            await asyncio.sleep(WATCH_S)
        raise RemoteError(
            ErrorKind.DEADLINE,
            f"{asked.model} was not ready within {LOADING_S:g} s; the roll-out goes on",
        )


def _named(rows: Sequence[DeploymentRow], name: str) -> DeploymentRow | None:
    return next((row for row in rows if row.name == name), None)
