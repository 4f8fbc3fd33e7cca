"""Conversation 0x04: the model table."""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto.base import Detail, Id16, Int53, Message, Name, Path
from llmproto.generation import Token
from llmproto.versions import Digest

TaskName = Annotated[str, Meta(pattern="^(generate|embed|classify|regress)$")]


class ModelAdd(Message, frozen=True):
    """Operator -> `tokenizer`: examine this folder and put it into the table.  Answered by
    ModelAdded, or Failed(INVALID | DENIED).  Adding the same content under the same name again
    is no error."""

    path: Path
    """Absolute path of a Hugging Face folder, on the node of the system."""
    name: Name | None = None
    """Absent: the folder's own name."""


class ModelAdded(Message, frozen=True):
    """`tokenizer` -> operator, answers ModelAdd."""

    name: Name
    digest: Id16
    task: TaskName = "generate"
    """What it computes."""


class ModelEntry(msgspec.Struct, frozen=True):
    """What the kernel knows of a model: enough to admit and to place, nothing of its contents."""

    name: Name
    path: Path
    digest: Id16
    """Of configuration, tokenizer and weights."""
    architecture: Name
    context_tokens: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    vocabulary: Int53
    weight_bytes: Int53
    end_tokens: list[Token] = []
    chat: bool = False
    """It has a chat template."""
    created_s: Int53 = 0
    """Unix time of its registration, set by the kernel."""
    task: TaskName = "generate"
    """What its executors compute: tokens, or (encoders) vectors and scores."""
    version: Digest | None = None
    """Of the store's version that it is, where it is one."""
    tokenizer: Id16 | None = None
    """Of what turns text into ids: a thread that has computed nothing may move between two entries
    that share it."""


class ModelRegister(Message, frozen=True):
    """`tokenizer` or store -> kernel, citing an operator's request (or of its own for what is
    built in).  Answered by Done, or Failed(DENIED | EXHAUSTED | INVALID)."""

    model: ModelEntry
    default: bool = False
    """Use it where a request names no model, unless the configuration says otherwise."""


class ModelAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by ModelFound, or Failed(INVALID) naming the models there are."""

    name: Name | None = None
    """Absent: the default model."""


class ModelFound(Message, frozen=True):
    """Kernel -> requester, answers ModelAsk."""

    model: ModelEntry
    deployment: Name | None = None
    """The deployment that was named, and serves this now; absent where an entry was named."""


class ModelState(enum.StrEnum):
    """What a model's replicas are doing."""

    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class ModelRow(msgspec.Struct, frozen=True):
    """A line of `llmos models`."""

    model: ModelEntry
    state: ModelState
    replicas: Int53
    threads: Int53
    default: bool
    path: str = ""
    """Precision and code path in use, of a loaded replica."""
    detail: str = ""
    """Why it failed."""


class ModelsAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by Models."""


class Models(Message, frozen=True):
    """Kernel -> requester, answers ModelsAsk."""

    rows: list[ModelRow]


class ModelRemove(Message, frozen=True):
    """Operator -> kernel: forget this model; its threads go on to their end.  Answered by Done,
    or Failed."""

    name: Name


class ModelLoad(Message, frozen=True):
    """Client -> kernel: start loading now, before the first thread.  Answered by Done at once,
    or Failed(INVALID)."""

    name: Name | None = None
    """Absent: the default model."""


class ModelDeploy(Message, frozen=True):
    """Store -> kernel, once the entry `model` is in the table: the name serves this from now on.
    Answered by Done when that is journaled, or Failed(INVALID | EXHAUSTED).

    New threads run on the new entry as soon as one of its replicas is ready (or, where there is no
    room for both, at once, waiting for it); threads that run go on where they are.  An entry that
    cannot be loaded is taken back: the name serves the previous one, and the row says why.
    """

    name: Name
    model: Name
    """`name@digest`."""
    replicas: Annotated[int, Meta(ge=1, le=64)] = 1
    device: Name | None = None
    """Of a device, or a kind of device."""
    key: Id16 | None = None
    """Of the request for this; DeploymentRow shows the last one, so that a repeated request is
    known."""


class ModelUndeploy(Message, frozen=True):
    """Operator -> kernel: the name serves nothing any more; living threads go on to their end.
    Answered by Done, or Failed(INVALID)."""

    name: Name


class DeploymentState(enum.StrEnum):
    """Where a deployment stands."""

    ROLLING = "rolling"
    """The wanted entry is on its way."""
    LIVE = "live"
    FAILED = "failed"
    """The wanted entry could not be loaded; the previous one serves."""


class DeploymentRow(msgspec.Struct, frozen=True):
    """Desired state of one name, and where it stands."""

    name: Name
    state: DeploymentState
    model: Name
    """What is wanted."""
    serving: Name | None
    """What new threads get now."""
    previous: Name | None
    """What was wanted before: where a rollback goes."""
    replicas: Int53
    replicas_ready: Int53
    device: Name | None = None
    detail: Detail = ""
    changed_s: Int53 = 0
    key: Id16 | None = None
    """Of the last ModelDeploy."""


class DeploymentsAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by Deployments."""


class Deployments(Message, frozen=True):
    """Kernel -> requester, answers DeploymentsAsk."""

    rows: list[DeploymentRow]
