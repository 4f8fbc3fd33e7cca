"""What a run leaves behind: checkpoints on the way, a version at the end, tags, a deployment."""

from typing import Final

import msgspec
from blake3 import blake3
from libllm.version import __version__
from llmproto.errors import ErrorKind, RemoteError
from llmproto.recipes import Recipe
from llmproto.threads import Done
from llmproto.versions import (
    Deploy,
    Deploying,
    Digest,
    Lineage,
    Save,
    Saved,
    TagSet,
    VersionKind,
)

from llmservices.trainer import state
from llmservices.trainer.core import Progress, Training
from llmservices.trainer.savebuffer import Groups, SaveBuffer, Written
from llmservices.trainer.setup import Setup
from llmservices.trainer.source import Asking

KEY_BYTES: Final = 16


class Checkpoint(msgspec.Struct, frozen=True):
    """A save, and what the kernel is told when it is durable."""

    buffer: SaveBuffer
    """To be settled first."""

    save: Save
    blobs: tuple[bytes, ...]
    step: int
    position: int


def checkpoint(
    job: bytes, name: str, ready: Setup, found: state.State, written: Written, buffer: SaveBuffer
) -> Checkpoint:
    """Of the state that stands in the buffer."""
    progress = found.progress
    small, paths = buffer.beside(ready.files | {state.STATE: state.encode(found)})
    return Checkpoint(
        buffer,
        Save(
            name=name,
            kind=VersionKind.CHECKPOINT,
            buffer=written.buffer,
            groups=written.groups,
            layout=written.layout,
            files=list(small),
            paths=paths,
            inherit=ready.base,
            lineage=lineage(job, ready, progress),
            keep=ready.recipe.training.keep_checkpoints,
        ),
        tuple(small.values()),
        progress.step,
        progress.position,
    )


def lineage(job: bytes, ready: Setup, progress: Progress) -> Lineage:
    """Where it comes from."""
    return Lineage(
        parent=ready.base,
        data=ready.train.prepared.dataset,
        recipe=msgspec.toml.encode(_plain(ready.recipe)).decode(),
        code=__version__,
        job=job,
        step=progress.step,
        position=progress.position,
        losses=state.LOSSES,
    )


def _plain(recipe: Recipe) -> object:
    """Without what is absent: TOML has no word for it."""

    def pruned(value: object) -> object:
        if isinstance(value, dict):
            return {key: pruned(each) for key, each in value.items() if each is not None}
        return value

    return pruned(msgspec.to_builtins(recipe))


def model_tensors(training: Training, ready: Setup, losses: state.Losses) -> Groups:
    """Of the finished model, in the precision of its base."""
    stored = ready.built.stored
    adapter = training.learner.file != "model.safetensors"
    weights = {
        name: each if adapter or not each.is_floating_point() else each.to(stored)
        for name, each in (training.best or training.learner.exported()).items()
    }
    return {training.learner.file: weights, state.LOSSES: losses.tensors()}


def publish(
    bus: Asking,
    job: bytes,
    recipe: Recipe,
    ready: Setup,
    written: Written,
    buffer: SaveBuffer,
    progress: Progress,
    metrics: dict[str, float],
) -> tuple[Digest, str]:
    """Make the version, set its tags, deploy it; gives what people should know of that."""
    buffer.settle()
    small, paths = buffer.beside(ready.files)
    saved = bus.ask(
        Save(
            name=recipe.name,
            kind=VersionKind.MODEL,
            buffer=written.buffer,
            groups=written.groups,
            layout=written.layout,
            files=list(small),
            paths=paths,
            inherit=ready.base,
            lineage=lineage(job, ready, progress),
            metrics=metrics,
        ),
        Saved,
        target="store",
        blobs=tuple(small.values()),
    )
    reference = f"@{saved.version.hex()}"
    for tag in recipe.finish.tags:
        bus.ask(TagSet(f"{recipe.name}{reference}", tag), Done, target="store")
    if not recipe.finish.deploy:
        return saved.version, ""
    key = blake3(job + saved.version).digest(KEY_BYTES)
    try:
        bus.ask(
            Deploy(key, f"{recipe.name}{reference}", recipe.name, gate=recipe.finish.gate),
            Deploying,
            target="store",
        )
    except RemoteError as error:
        if error.kind is not ErrorKind.INVALID:
            raise
        return saved.version, f"not deployed: {error.detail}"
    return saved.version, ""
