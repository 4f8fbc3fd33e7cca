"""Conversation 0x0a: the store: versions of models, by content.

A version is a manifest over content-addressed objects, named by its digest.  A *reference* is
`name` (its newest version), `name:tag`, `name@digest` or `@digest`, where a digest may be cut to 4
or more hexadecimal digits as long as it is unambiguous.
"""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Id16, Int53, Message, Name, Path
from llmproto.generation import Thread

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""BLAKE3-256 of a version's manifest."""
Reference = Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES_MAX)]
Tag = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class VersionKind(enum.StrEnum):
    """What a version is for."""

    MODEL = "model"
    """Can be served, evaluated, exported, trained further."""
    CHECKPOINT = "checkpoint"
    """A step of a job on its way: collected when the job has a newer one, or is forgotten."""


class Lineage(msgspec.Struct, frozen=True):
    """Where a version comes from."""

    parent: Digest | None = None
    data: Annotated[str, Meta(max_length=128)] = ""
    """Digest of the dataset and its pipeline, hexadecimal."""
    recipe: str = ""
    """As TOML."""
    code: str = ""
    """Version of this software."""
    job: Thread | None = None
    step: Int53 = 0
    position: Int53 = 0
    """Batches consumed."""
    losses: Annotated[str, Meta(max_length=64)] = ""
    """Name of the file of the version that holds every StepReport, where there is one: safetensors
    with a float64 column for each field (NaN where a value is absent), rows in order of steps."""


class TensorPlace(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in a save buffer."""

    name: str
    dtype: Annotated[str, Meta(max_length=16)]
    """In the words of safetensors: F32, BF16, I64, ..."""
    shape: list[Int53]
    offset: Int53
    """From the buffer's beginning; a multiple of 64."""
    bytes: Int53
    digest: Digest | None = None
    """Of a tensor that is known to be in the store with exactly this content (frozen weights): it
    then takes no place in the buffer, and `offset` is 0."""


class TensorGroup(msgspec.Struct, frozen=True):
    """The tensors of one safetensors file, as a plain folder would have it."""

    file: Name
    """`model.safetensors`, `optimizer.safetensors`, `adapter_model.safetensors`, ..."""
    tensors: list[TensorPlace]
    metadata: dict[str, str] = {}


class Save(Message, frozen=True):
    """Trainer (or importer) -> `store`: make this a version, durable and whole.  Answered by Saved
    when it is, or Failed(EXHAUSTED: no space | INVALID | STALE: the buffer is gone).  Small files
    stand in blobs, in the order of `files`.

    The description of very many tensors does not fit a message: then `layout` names a file beside
    the buffer that holds the list of groups as MessagePack.
    """

    name: Name
    kind: VersionKind
    buffer: Path | None
    """A file of shared memory that the sender keeps unchanged until it is answered."""
    groups: list[TensorGroup] = []
    layout: Path | None = None
    files: Annotated[list[Name], Meta(max_length=limits.BLOBS_MAX)] = []
    """Names of the small files."""
    paths: Annotated[dict[Name, Path], Meta(max_length=limits.BLOBS_MAX)] = {}
    """More files, those that no message holds: where each stands until this is answered."""
    inherit: Digest | None = None
    """Take every file that is not given here from this version (tokenizer, configuration; for an
    adapter the base's weights)."""
    lineage: Lineage = Lineage()
    metrics: dict[str, float] = {}
    keep: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Of a checkpoint: how many of its job's stay.  One more does, until the next save: the kernel
    may not have heard of this one yet."""


class Saved(Message, frozen=True):
    """`store` -> requester, answers Save and Import."""

    version: Digest
    reference: Reference
    """`name@digest`, short."""
    bytes: Int53
    """Of all its content."""
    bytes_new: Int53
    """Of that, what the store did not have."""
    left_out: Annotated[list[str], Meta(max_length=limits.LEFT_OUT_MAX)] = []
    """Files of an imported folder that the version does not hold: pickles, weights in other
    formats.  Of very many the first."""


class Import(Message, frozen=True):
    """Operator or trainer -> `store`: make a plain Hugging Face folder (full, or a peft adapter
    with its base) a version.  Answered by Saved, or Failed."""

    path: Path
    name: Name
    base: Reference | None = None
    """Of an adapter."""


class Export(Message, frozen=True):
    """Operator -> `store`: write a version as a plain folder.  Answered by Done, or Failed(INVALID:
    the folder exists and is not empty)."""

    reference: Reference
    path: Path
    merge: bool = True
    """Of an adapter: one model with the adapter merged in; else the peft folder alone."""


class FileRow(msgspec.Struct, frozen=True, array_like=True):
    """One file of a version."""

    name: str
    bytes: Int53


class VersionRow(msgspec.Struct, frozen=True):
    """What is known of a version."""

    version: Digest
    reference: Reference
    name: Name
    kind: VersionKind
    path: Path
    """Its folder on this node: configuration and tokenizer as plain files, `manifest.json`, and no
    weights; `llmservices.versions` reads those."""
    created_s: Int53
    bytes: Int53
    bytes_own: Int53
    """Of objects that no other version has."""
    tags: list[str]
    lineage: Lineage
    metrics: dict[str, float]
    files: list[FileRow] = []
    adapter: bool = False
    task: str = "generate"
    """`generate`, `embed`, `classify`, `regress`."""


class VersionAsk(Message, frozen=True):
    """Anyone -> `store`.  Answered by VersionFound, or Failed(INVALID) naming what there is."""

    reference: Reference


class VersionFound(Message, frozen=True):
    """`store` -> requester, answers VersionAsk."""

    row: VersionRow


class VersionsAsk(Message, frozen=True):
    """Anyone -> `store`.  Answered by Versions, newest first."""

    name: Name | None = None
    checkpoints: bool = False
    limit: Annotated[int, Meta(ge=1, le=1000)] = 200


class Versions(Message, frozen=True):
    """`store` -> requester, answers VersionsAsk.  Rows without `files`."""

    rows: list[VersionRow]
    total: Int53


class TagSet(Message, frozen=True):
    """Operator -> `store`: compare and swap.  Answered by Done, or Failed(STALE) naming what the
    tag stands on."""

    reference: Reference
    tag: Tag
    expected: Digest | None = None
    """What the tag must stand on now, where `compare` is set; absent: on nothing."""
    compare: bool = False


class TagRemove(Message, frozen=True):
    """Operator -> `store`.  Answered by Done, or Failed."""

    name: Name
    tag: Tag


class VersionRemove(Message, frozen=True):
    """Operator -> `store`: forget a version; its objects go with the next collection.  Answered by
    Done, or Failed(INVALID: deployed, tagged, or the parent of an adapter's base)."""

    reference: Reference


class Verify(Message, frozen=True):
    """Operator -> `store`: read and compare every object.  Answered by Verified."""

    reference: Reference | None = None
    """Absent: all versions."""


class Damage(msgspec.Struct, frozen=True, array_like=True):
    """One object whose content is not what its name says."""

    reference: Reference
    file: str
    tensor: str
    object: str
    """Its path."""
    detail: Detail


class Verified(Message, frozen=True):
    """`store` -> requester, answers Verify.  No damage: all is well."""

    versions: Int53
    objects: Int53
    bytes: Int53
    damage: list[Damage]


class Collect(Message, frozen=True):
    """Operator -> `store`: remove what no version needs.  Answered by Collected."""


class Collected(Message, frozen=True):
    """`store` -> requester, answers Collect."""

    objects: Int53
    bytes: Int53
    versions: Int53
    """Superseded checkpoints among them."""


class MetricsRecord(Message, frozen=True):
    """Evaluator or operator -> `store`: these results belong to the version from now on.  Answered
    by Done, or Failed."""

    reference: Reference
    metrics: dict[str, float]


class Deploy(Message, frozen=True):
    """Operator or trainer -> `store`: verify, judge by the gate, and make this what the name
    serves.  Answered by Deploying once the kernel has recorded it, or Failed(INVALID: damaged, the
    gate says no, not a model that can be served)."""

    key: Id16
    reference: Reference
    name: Name | None = None
    """Served under this name.  Absent: the version's own."""
    replicas: Annotated[int, Meta(ge=1, le=64)] = 1
    device: Name | None = None
    gate: Annotated[str, Meta(max_length=256)] = ""
    """`accuracy>=0.87`, several joined by commas, all must hold of the version's metrics."""


class Deploying(Message, frozen=True):
    """`store` -> requester, answers Deploy and Rollback."""

    name: Name
    model: Name
    """`name@digest`: the entry of the model table."""
    version: Digest
    previous: Digest | None


class Rollback(Message, frozen=True):
    """Operator -> `store`: serve what was served before, or else the parent of what is served.
    Answered by Deploying, or Failed(INVALID: there is neither)."""

    key: Id16
    name: Name
