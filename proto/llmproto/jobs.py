"""Conversation 0x09: jobs: training and evaluation runs, and the processes that carry them.

A job is a thread with processes of its own.  Its context, kept by the kernel, is its recipe, its
last durable checkpoint, its step and its data position: any attempt can continue it.  The system
calls on threads (ThreadCancel, ThreadSuspend, ThreadResume, ThreadRenice) take a job's id too.
"""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto import limits
from llmproto.base import Detail, Id16, Int53, Message, Milliseconds, Name, Path
from llmproto.errors import ErrorKind
from llmproto.generation import Thread
from llmproto.versions import Digest


class JobKind(enum.StrEnum):
    """What a job's processes do."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class JobState(enum.StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    """For room on a device, or for a restart."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    """It saves what it has, because it is to leave its device."""
    SUSPENDED = "suspended"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobSpawn(Message, frozen=True):
    """Operator -> kernel.  Answered by JobSpawned after journaling, or Failed(INVALID | EXHAUSTED |
    DENIED): INVALID where another living job makes the same name."""

    key: Id16
    """Request key, random.  Repeating it never starts a second job."""
    kind: JobKind
    name: Name
    """Train: the name of the versions that it makes.  Evaluate: of the version that it judges."""
    recipe: Annotated[bytes, Meta(min_length=1, max_length=limits.RECIPE_BYTES_MAX)]
    """A `llmproto.recipes` struct as MessagePack; opaque to the kernel."""
    processes: Annotated[int, Meta(ge=1, le=limits.JOB_PROCESSES_MAX)] = 1
    """Ranks of torch.distributed, all on this node."""
    memory_bytes: Int53 = 2 << 30
    """Of each process: what its lease is for."""
    cores: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Of each process.  Absent: half of the device's cores, shared between the processes."""
    device: Name | None = None
    """Absent: the first with room, accelerators first."""
    service_class: Annotated[int, Meta(ge=0, le=3)] = 3
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0


class JobSpawned(Message, frozen=True):
    """Kernel -> requester, answers JobSpawn."""

    job: Thread
    existing: bool
    """The key was known: the job goes on."""


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """What one optimiser step (or, of an evaluation, one batch of examples) came to."""

    step: Int53
    """Counts from 1."""
    loss: float
    """Mean over the step's targets, natural logarithm; exact: the double that was computed."""
    tokens: Int53 = 0
    """Processed by this step, over all ranks."""
    learning_rate: float = 0.0
    gradient_norm: float | None = None
    """Before clipping."""
    ms: float = 0.0
    """How long it took; waiting for data and yielding included."""
    metrics: dict[str, float] = {}
    """Validation results, where this step ends with a validation."""
    difference: float = 0.0
    """From what an earlier attempt reported for this step (never on a CPU: there it is an
    error)."""


class JobRun(Message, frozen=True):
    """Kernel -> each process of a job, once all of them are ready, and again after Welcome:
    continue from here.  Not answered: StepsDone follows from rank 0.

    From then on its Beat lists the job (in `threads`); one that does not is told again.  Its
    progress grows with every micro-batch: without that for JOB_SILENT_MS, or what Working
    announced, it is dead."""

    job: Thread
    attempt: Int53
    """Numbered from 1; what another attempt says is not heard."""
    kind: JobKind
    name: Name
    recipe: Annotated[bytes, Meta(min_length=1, max_length=limits.RECIPE_BYTES_MAX)]
    rank: Int53
    processes: Int53
    rendezvous: Path
    """A file of this attempt, for torch.distributed's FileStore."""
    share: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    """As in JobPace."""
    checkpoint: Digest | None = None
    """The last durable version.  Absent: from the start."""
    step: Int53 = 0
    """Steps that the checkpoint holds."""
    position: Int53 = 0
    """Batches that it has consumed."""
    reported: Annotated[list[StepReport], Meta(max_length=limits.JOB_REPORTS_MAX)] = []
    """What earlier attempts reported beyond the checkpoint: recomputed steps are compared with
    it."""


class StepsDone(Message, frozen=True):
    """Rank 0 -> kernel: provisional steps, in order.  Not answered as a request is: JobMark follows
    when they are journaled.  Sent again after Welcome, from the mark on.

    Rows at or below the mark are duplicates, and not compared.  Rows that leave a gap, that come
    while the journal's disk is full, or beyond what one JobRun can hold since the checkpoint
    (JOB_REPORTS_MAX steps, JOB_METRICS_BYTES_MAX) are not taken: the mark says so, and they are
    to be sent again, in the last case after a checkpoint."""

    job: Thread
    attempt: Int53
    reports: Annotated[list[StepReport], Meta(max_length=1024)]
    steps_total: Int53 = 0
    """How many there will be, as far as is known."""
    doing: str = ""
    """For people: `saving`, `evaluating`, ..."""


class JobMark(Message, frozen=True):
    """Kernel -> rank 0: every report up to this step is journaled."""

    job: Thread
    attempt: Int53
    step: Int53


class CheckpointCommitted(Message, frozen=True):
    """Rank 0 -> kernel, after the store has said Saved.  Answered by Done, or Failed(STALE) for an
    attempt that is over, or Failed(UNAVAILABLE) while steps that it holds are not reported."""

    job: Thread
    attempt: Int53
    version: Digest
    step: Int53
    position: Int53


class JobEnded(Message, frozen=True):
    """Rank 0 -> kernel, when every step is marked: the job is over.  Answered by Done, after which
    the processes exit with code 0, within STOPPING_MS_MAX.  A rank that exits otherwise has died,
    and the kernel decides what follows."""

    job: Thread
    attempt: Int53
    version: Digest | None = None
    """What it made."""
    error: ErrorKind | None = None
    """It cannot succeed: INVALID (recipe, data), INTERNAL (it diverged), EXHAUSTED (no space)."""
    detail: Detail = ""
    metrics: dict[str, float] = {}


class JobStopped(Message, frozen=True):
    """Rank 0 -> kernel, after JobPace(stop): what could be saved is committed; the processes exit.
    Not answered."""

    job: Thread
    attempt: Int53


class JobPace(Message, frozen=True):
    """Kernel -> each process of a job: how much of its device it may take from now on.  Obeyed at
    micro-batch boundaries; the number of threads never changes.  Not answered."""

    job: Thread
    attempt: Int53
    share: Annotated[float, Meta(ge=0.0, le=1.0)]
    """1: run freely.  s: compute for at most s of the time.  0: hold until told otherwise."""
    stop: bool = False
    """Commit a checkpoint, say JobStopped and exit."""


class JobRow(msgspec.Struct, frozen=True):
    """A line of `llmos jobs`."""

    job: Thread
    kind: JobKind
    name: Name
    tenant: Name
    state: JobState
    step: Int53
    """Reported, provisional ones included."""
    steps_total: Int53
    checkpoint: Digest | None
    checkpoint_step: Int53
    attempts: Int53
    age_ms: Milliseconds
    processes: list[str] = []
    """Names, while it has some."""
    share: float = 1.0
    doing: str = ""
    version: Digest | None = None
    error: ErrorKind | None = None
    detail: Detail = ""
    metrics: dict[str, float] = {}
    service_class: Int53 = 3
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0


class JobAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by JobFound, or Failed(STALE | DENIED)."""

    job: Thread
    after_step: Int53 = 0
    """Only reports of later steps."""


class JobFound(Message, frozen=True):
    """Kernel -> requester, answers JobAsk."""

    row: JobRow
    reports: list[StepReport]
    """Oldest first, at most 1024 at once; those that the kernel no longer keeps are missing (the
    version's own record has all)."""


class JobsAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by Jobs: the living, and the ended of the last hours."""


class Jobs(Message, frozen=True):
    """Kernel -> requester, answers JobsAsk."""

    rows: list[JobRow]
