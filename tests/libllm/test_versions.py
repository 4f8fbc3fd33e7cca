"""What a client asks about versions and deployments, against prepared answers."""

import asyncio
from typing import cast

import pytest
from libllm.jobs import Ask
from libllm.versions import ANY_TAG, STORE, VersionTable
from llmproto.base import Message
from llmproto.errors import ErrorKind, RemoteError
from llmproto.models import DeploymentRow, Deployments, DeploymentsAsk, DeploymentState
from llmproto.threads import Done
from llmproto.versions import (
    Deploy,
    Deploying,
    Lineage,
    TagSet,
    VersionAsk,
    VersionFound,
    VersionRow,
)
from llmproto.versions import VersionKind as Kind

A, B = "bot@aaaaaaaa", "bot@bbbbbbbb"
ROW = VersionRow(
    *(b"a" * 32, A, "bot", Kind.MODEL, "/v", 0, 1, 1, [], Lineage(), {}),
)


def row(state: DeploymentState, model: str = B, serving: str = A, detail: str = "") -> Deployments:
    found = DeploymentRow("bot", state, model, serving, None, 1, 1, detail=detail)
    return Deployments([found])


class Answers:
    """Asked one after another; notes the messages."""

    def __init__(self, *deployments: Deployments) -> None:
        self.deployments = list(deployments)
        self.asked: list[tuple[Message, str]] = []
        self.table = VersionTable(cast(Ask, self.ask))

    async def ask(
        self,
        message: Message,
        answer: type[Message],
        *,
        target: str = "kernel",
        patience_s: float | None = None,
    ) -> Message:
        self.asked.append((message, target))
        match message:
            case DeploymentsAsk():
                return self.deployments.pop(0)
            case Deploy():
                return Deploying("bot", B, b"b" * 32, None)
            case VersionAsk():
                return VersionFound(ROW)
        return Done()

    def deploy(self, *, wait: bool = True) -> Deploying:
        asked = self.table.deploy("bot", name=None, replicas=1, device=None, gate="", wait=wait)
        return asyncio.run(asked)


def test_a_deploy_waits_until_the_version_serves() -> None:
    rolling, live = row(DeploymentState.ROLLING), row(DeploymentState.LIVE, serving=B)
    answers = Answers(rolling, rolling, live)
    assert answers.deploy().model == B
    assert not answers.deployments
    message, target = answers.asked[0]
    assert isinstance(message, Deploy)
    assert target == STORE
    assert len(Answers().deploy(wait=False).version) == 32


def test_what_cannot_be_loaded_is_said_with_its_reason() -> None:
    with pytest.raises(RemoteError) as refused:
        Answers(row(DeploymentState.FAILED, detail="object 3f")).deploy()
    assert refused.value.kind is ErrorKind.INVALID
    assert refused.value.detail == f"{B} cannot be loaded: object 3f; it serves {A}"


@pytest.mark.parametrize("now", [Deployments([]), row(DeploymentState.LIVE, "bot@c", "bot@c")])
def test_somebody_else_wants_another_one_by_now(now: Deployments) -> None:
    with pytest.raises(RemoteError) as refused:
        Answers(now).deploy()
    assert refused.value.kind is ErrorKind.STALE


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        (ANY_TAG, TagSet("bot", "prod")),
        (None, TagSet("bot", "prod", None, compare=True)),
        (A, TagSet("bot", "prod", ROW.version, compare=True)),
    ],
)
def test_a_tag_is_set_if_it_stands_where_it_is_expected(
    expect: str | None, message: TagSet
) -> None:
    answers = Answers()
    asyncio.run(answers.table.tag("bot", "prod", expect=expect))
    assert answers.asked[-1] == (message, STORE)
