"""What follows from a deployment's facts, as pure functions.

A deployment names entries of the model table: the one that is wanted, the one that new threads get,
and those that have served (`proved`), of which the last that is not wanted is where a rollback
goes.
"""

from typing import Final

import msgspec
from llmproto.models import DeploymentState, ModelEntry

from llmkernel.facts import Deployed

PROVED_MAX: Final = 2
"""What serves, and what served before; older entries leave the table with their last thread."""


class Wish(msgspec.Struct, frozen=True):
    """How the executors of an entry should be, by the deployments that serve or want it."""

    replicas: int = 1
    device: str | None = None


def entries(deployment: Deployed) -> list[str]:
    """The entries that it needs."""
    return list(dict.fromkeys((deployment.model, deployment.serving, *deployment.proved)))


def previous(deployment: Deployed) -> str | None:
    """The entry that served before the wanted one."""
    return next((name for name in reversed(deployment.proved) if name != deployment.model), None)


def proved(deployment: Deployed) -> list[str]:
    """`proved`, now that the wanted entry is ready."""
    others = [name for name in deployment.proved if name != deployment.model]
    return [*others, deployment.model][-PROVED_MAX:]


def pending(deployment: Deployed) -> bool:
    """Its wanted entry may yet become what serves, or be the only one there is."""
    waits = deployment.serving == deployment.model
    return deployment.state is DeploymentState.ROLLING or (
        deployment.state is DeploymentState.FAILED and waits
    )


def wishes(deployments: dict[str, Deployed]) -> dict[str, Wish]:
    """By entry: two deployments may share one; it gets the most replicas and the first device that
    anybody asks for."""
    found: dict[str, Wish] = {}
    for deployment in deployments.values():
        for name in {deployment.model: None, deployment.serving: None}:
            known = found.get(name, Wish())
            found[name] = Wish(
                max(known.replicas, deployment.replicas), known.device or deployment.device
            )
    return found


def exchangeable(one: ModelEntry, other: ModelEntry) -> bool:
    """The same request has the same ids and the same ends with both."""
    return (
        one.tokenizer is not None
        and one.tokenizer == other.tokenizer
        and one.vocabulary == other.vocabulary
        and one.end_tokens == other.end_tokens
        and one.task == other.task
    )
