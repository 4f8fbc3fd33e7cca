"""Deploy and roll back: what is judged before a name serves a version.

Keeps nothing: the kernel says what is deployed, and by which request.  So a request that is
repeated, after the death of whomever, is answered by what came of it, and not done twice.
"""

from collections.abc import Awaitable, Callable

from libllm.port import Port
from libllm.service import Request
from llmproto.errors import invalid
from llmproto.models import (
    DeploymentRow,
    Deployments,
    DeploymentsAsk,
    ModelAdd,
    ModelAdded,
    ModelDeploy,
    ModelEntry,
    Models,
    ModelsAsk,
)
from llmproto.threads import Done
from llmproto.versions import Damage, Deploy, Deploying, Rollback, VersionKind, VersionRow

from llmservices.store.gate import check_gate

TOKENIZER = "tokenizer"
ANCESTORS_MAX = 1000
"""A parent is looked for no further up: checkpoints lie between two models."""

Find = Callable[[str], Awaitable[VersionRow]]
"""The version that a reference means; INVALID where there is none."""
Check = Callable[[bytes], Awaitable[list[Damage]]]
"""Reads and compares every object of a version."""


class Deployer:
    """The store's part of a deployment."""

    def __init__(self, port: Port, *, find: Find, check: Check) -> None:
        self._port = port
        self._find = find
        self._check = check

    async def deploy(self, deploy: Deploy, request: Request) -> Deploying:
        """Verify, judge, add to the model table, and tell the kernel."""
        done = _asked_by(await self._rows(), deploy.key)
        if done is not None:
            return await self._answer(done)
        version = await self._find(deploy.reference)
        if version.kind is not VersionKind.MODEL:
            raise invalid(
                f"{version.reference} is a {version.kind.value} of a job, not a model that can be "
                "served"
            )
        check_gate(deploy.gate, version.metrics, of=version.reference)
        damage = await self._check(version.version)
        if damage:
            first = damage[0]
            raise invalid(
                f"{version.reference} is damaged: {first.file} {first.tensor}: {first.detail}"
                + (f", and {len(damage) - 1} more" if len(damage) > 1 else "")
                + "; it is not deployed"
            )
        name = deploy.name if deploy.name is not None else version.name
        return await self._serve(name, version, deploy.replicas, deploy.device, key=deploy.key)

    async def rollback(self, rollback: Rollback, request: Request) -> Deploying:
        """What was served before; its objects are compared when it is loaded, and it is taken back
        where one is damaged."""
        rows = await self._rows()
        row = next((row for row in rows if row.name == rollback.name), None)
        if row is None:
            names = ", ".join(sorted(row.name for row in rows)) or "none"
            raise invalid(f"{rollback.name!r} is not deployed; there is: {names}")
        if row.key == rollback.key:
            return await self._answer(row)
        entries = await self._entries()
        before = entries.get(row.previous or "")
        if before is not None and before.version is not None:
            version = await self._find(f"@{before.version.hex()}")
        else:
            version = await self._parent(row, entries.get(row.model))
        return await self._serve(row.name, version, row.replicas, row.device, key=rollback.key)

    async def in_table(self) -> dict[bytes, str]:
        """Versions that the model table has: deployed, or with threads that live; they stay."""
        entries = (await self._entries()).values()
        return {entry.version: entry.name for entry in entries if entry.version is not None}

    # --- inside -----------------------------------------------------------------------------------

    async def _serve(
        self, name: str, version: VersionRow, replicas: int, device: str | None, *, key: bytes
    ) -> Deploying:
        model = version.reference
        await self._port.call(ModelAdd(version.path, model), ModelAdded, target=TOKENIZER)
        await self._port.call(ModelDeploy(name, model, replicas, device, key), Done)
        row = next((row for row in await self._rows() if row.name == name), None)
        previous = await self._version(row.previous) if row is not None else None
        return Deploying(name, model, version.version, previous)

    async def _answer(self, row: DeploymentRow) -> Deploying:
        version = await self._version(row.model)
        if version is None:
            raise invalid(f"{row.model} was not deployed from the store")
        return Deploying(row.name, row.model, version, await self._version(row.previous))

    async def _parent(self, row: DeploymentRow, served: ModelEntry | None) -> VersionRow:
        """The nearest model that what is served was trained from."""
        digest = served.version if served is not None else None
        parent = (await self._find(f"@{digest.hex()}")).lineage.parent if digest else None
        for _ in range(ANCESTORS_MAX):
            if parent is None:
                break
            version = await self._find(f"@{parent.hex()}")
            if version.kind is VersionKind.MODEL:
                return version
            parent = version.lineage.parent
        raise invalid(
            f"{row.name!r} serves {row.model}, served nothing before it, and that has no parent: "
            "there is nothing to roll back to"
        )

    async def _version(self, entry: str | None) -> bytes | None:
        found = (await self._entries()).get(entry or "")
        return found.version if found is not None else None

    async def _rows(self) -> list[DeploymentRow]:
        return (await self._port.call(DeploymentsAsk(), Deployments)).rows

    async def _entries(self) -> dict[str, ModelEntry]:
        rows = (await self._port.call(ModelsAsk(), Models)).rows
        return {row.model.name: row.model for row in rows}


def _asked_by(rows: list[DeploymentRow], key: bytes) -> DeploymentRow | None:
    return next((row for row in rows if row.key == key), None)
