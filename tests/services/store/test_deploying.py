"""What is judged before a name serves a version, against a kernel that is a few tables."""

import asyncio
from typing import Any, cast

import pytest
from libllm.port import Port
from libllm.service import Request
from llmproto.base import Message
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.models import (
    DeploymentRow,
    Deployments,
    DeploymentsAsk,
    DeploymentState,
    ModelAdd,
    ModelAdded,
    ModelDeploy,
    ModelEntry,
    ModelRow,
    Models,
    ModelsAsk,
    ModelState,
)
from llmproto.threads import Done
from llmproto.versions import (
    Damage,
    Deploy,
    Deploying,
    Lineage,
    Rollback,
    VersionKind,
    VersionRow,
)
from llmservices.store.deploying import Deployer

REQUEST = cast(Request, None)  # it is answered by what is returned


def digest(letter: str) -> bytes:
    return letter.encode() * 32


def version(letter: str, **changes: Any) -> VersionRow:  # Any: fields of several types
    values: dict[str, Any] = {
        "version": digest(letter),
        "reference": f"bot@{digest(letter).hex()[:8]}",
        "name": "bot",
        "kind": VersionKind.MODEL,
        "path": f"/store/versions/{letter}",
        "created_s": 0,
        "bytes": 1,
        "bytes_own": 1,
        "tags": [],
        "lineage": Lineage(),
        "metrics": {"accuracy": 0.9},
    }
    return VersionRow(**(values | changes))


class World:
    """A model table, deployments, and versions; the port of a store."""

    def __init__(self, *versions: VersionRow) -> None:
        self.versions = {row.version: row for row in versions}
        self.damage: dict[bytes, list[Damage]] = {}
        self.entries: dict[str, ModelEntry] = {}
        self.rows: dict[str, DeploymentRow] = {}
        self.asked: list[Message] = []
        self.deployer = Deployer(cast(Port, self), find=self.find, check=self.check)

    async def find(self, reference: str) -> VersionRow:
        for row in self.versions.values():
            if reference in (row.reference, row.name, f"@{row.version.hex()}"):
                return row
        raise invalid(f"{reference!r} is no version")

    async def check(self, version: bytes) -> list[Damage]:
        return self.damage.get(version, [])

    async def call(
        self, message: Message, answer: type[Message], *, target: str = "kernel"
    ) -> Message:
        self.asked.append(message)
        match message:
            case DeploymentsAsk():
                return Deployments(list(self.rows.values()))
            case ModelsAsk():
                return Models(
                    [
                        ModelRow(entry, ModelState.IDLE, 0, 0, False)
                        for entry in self.entries.values()
                    ]
                )
            case ModelAdd(path=path, name=name):
                assert name is not None
                (found,) = (row for row in self.versions.values() if row.path == path)
                self.entries[name] = ModelEntry(
                    name, path, bytes(16), "x", 1, 1, 1, version=found.version
                )
                return ModelAdded(name, bytes(16))
            case ModelDeploy():
                before = self.rows.get(message.name)
                self.rows[message.name] = DeploymentRow(
                    name=message.name,
                    state=DeploymentState.LIVE,
                    model=message.model,
                    serving=message.model,
                    previous=before.model if before is not None else None,
                    replicas=message.replicas,
                    replicas_ready=1,
                    device=message.device,
                    key=message.key,
                )
                return Done()
        raise AssertionError(message)

    def deploy(self, reference: str, key: bytes = bytes(16), **changes: Any) -> Deploying:
        return asyncio.run(self.deployer.deploy(Deploy(key, reference, **changes), REQUEST))

    def rollback(self, name: str = "bot", key: bytes = b"r" * 16) -> Deploying:
        return asyncio.run(self.deployer.rollback(Rollback(key, name), REQUEST))

    def refused(self, reference: str, **changes: Any) -> str:
        """Why it is not deployed; nothing was changed."""
        with pytest.raises(RemoteError) as error:
            self.deploy(reference, **changes)
        assert error.value.kind is ErrorKind.INVALID
        assert not self.rows
        assert not self.entries
        return error.value.detail


A, B = version("a"), version("b", name="bot", lineage=Lineage(parent=digest("a")))


def test_a_version_is_added_to_the_table_and_served_under_its_name() -> None:
    world = World(A)
    answer = world.deploy("bot", replicas=2, device="cpu")
    assert answer == Deploying("bot", A.reference, A.version, None)
    assert ModelAdd(A.path, A.reference) in world.asked
    assert ModelDeploy("bot", A.reference, 2, "cpu", bytes(16)) in world.asked
    assert world.deploy(A.reference, b"2" * 16, name="prod").name == "prod"


def test_the_gate_decides_before_anything_is_read() -> None:
    world = World(A)
    assert "accuracy is 0.9, not >= 0.95" in world.refused("bot", gate="accuracy>=0.95")
    assert "no metric 'f1'" in world.refused("bot", gate="f1>=0.5")
    assert world.deploy("bot", gate="accuracy>=0.87").model == A.reference


def test_a_damaged_version_is_refused_and_named() -> None:
    world = World(A)
    world.damage[A.version] = [Damage("bot", "model.safetensors", "w", "objects/ab", "flipped")]
    detail = world.refused("bot")
    assert A.reference in detail
    assert "model.safetensors w: flipped" in detail


def test_a_checkpoint_is_no_model() -> None:
    world = World(version("c", kind=VersionKind.CHECKPOINT))
    assert "is a checkpoint of a job" in world.refused("bot")


def test_a_repeated_deploy_is_answered_by_what_came_of_it() -> None:
    world = World(A, B)
    first = world.deploy(A.reference, b"k" * 16)
    world.asked.clear()
    assert world.deploy(A.reference, b"k" * 16) == first
    assert not [m for m in world.asked if isinstance(m, ModelDeploy | ModelAdd)]


def test_a_rollback_goes_to_what_was_served_before_and_once() -> None:
    world = World(A, B)
    world.deploy(A.reference, b"1" * 16)
    world.deploy(B.reference, b"2" * 16)
    back = Deploying("bot", A.reference, A.version, B.version)
    assert world.rollback() == back
    assert world.rollback() == back  # the same request again
    assert world.rollback(key=b"s" * 16).model == B.reference


def test_without_anything_before_it_goes_to_the_parent() -> None:
    checkpoint = version("c", kind=VersionKind.CHECKPOINT, lineage=Lineage(parent=digest("a")))
    child = version("d", lineage=Lineage(parent=digest("c")))
    world = World(A, checkpoint, child)
    world.deploy(child.reference)
    assert world.rollback().model == A.reference


def test_without_a_parent_there_is_nothing_to_roll_back_to() -> None:
    world = World(A)
    world.deploy("bot")
    with pytest.raises(RemoteError, match="has no parent"):
        world.rollback()
    with pytest.raises(RemoteError, match="'other' is not deployed; there is: bot"):
        world.rollback("other")


def test_what_the_table_has_stays_in_the_store() -> None:
    world = World(A)
    world.deploy("bot")
    assert asyncio.run(world.deployer.in_table()) == {A.version: A.reference}
