"""What the journal holds: durable facts, nothing soft.

Every fact is a frozen struct with a number that is never reused; fields are only ever added at the
end, with a default, so that an older journal stays readable.  Applying the same facts in the same
order gives the same durable state (`llmkernel.state`).
"""

from collections.abc import Sequence
from typing import Final

import msgspec
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling, TokenScore
from llmproto.jobs import JobKind, JobState, StepReport
from llmproto.models import DeploymentState, ModelEntry

FORMAT: Final = 1
"""Version of the records below; a change that old readers cannot survive makes a new one."""


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """Anything that is journaled."""


class Booted(Fact, frozen=True, tag=1):
    """A kernel took over: the epoch that it counts with, and the time below which no clock may
    fall."""

    epoch: int
    now_ns: int
    wall_ns: int
    format: int = FORMAT


class ThreadAdmitted(Fact, frozen=True, tag=2):
    """A thread was accepted; also written again, with all that happened since, by compaction."""

    thread: bytes
    tenant: int
    session: bytes
    key: bytes
    index: int
    digest: bytes
    model: str
    tokens: bytes
    """Packed: the prompt, and when written by compaction all that was committed."""
    prompt_tokens: int
    output_tokens_max: int
    sampling: Sampling
    sink: str
    sink_state: bytes
    service_class: int
    priority: int
    deadline_ns: int | None
    resumable: bool
    admitted_ns: int
    scores: list[TokenScore] | None = None
    prompt_scores: list[TokenScore] | None = None
    suspended: bool = False
    end: int = 0
    error: ErrorKind | None = None
    detail: str = ""
    ended_ns: int = 0
    lengths: list[int] = []
    """Encoders: tokens of each input."""
    pair_at: list[int] = []
    deployment: str | None = None
    """By this name the model was asked for."""


class TokensCommitted(Fact, frozen=True, tag=3):
    """One step's tokens, one row a thread, each at the next position of its thread."""

    threads: list[bytes]
    positions: list[int]
    tokens: Sequence[int | None]
    """Never absent; the type is that of the message that they came in."""
    scores: list[TokenScore | None] | None = None
    prompt_scores: list[list[TokenScore] | None] | None = None


class ThreadEnded(Fact, frozen=True, tag=4):
    """No token follows; those at `length` and beyond are cut."""

    thread: bytes
    end: int
    length: int
    """Tokens that remain, the prompt included."""
    ended_ns: int
    error: ErrorKind | None = None
    detail: str = ""


class ThreadsForgotten(Fact, frozen=True, tag=5):
    """Their ends were consumed (or their time is over): only the request keys are kept."""

    threads: list[bytes]
    now_ns: int


class ThreadChanged(Fact, frozen=True, tag=6):
    """By a system call: who reads it, whether it may run, and how urgent it is."""

    thread: bytes
    session: bytes
    suspended: bool
    service_class: int
    priority: int


class KeySpent(Fact, frozen=True, tag=7):
    """A request key whose thread is forgotten: until `until_ns` repeating it starts nothing."""

    tenant: int
    key: bytes
    index: int
    digest: bytes
    until_ns: int
    thread: bytes = b""


class ModelRegistered(Fact, frozen=True, tag=8):
    """The model table has this entry."""

    model: ModelEntry
    default: bool


class ModelRemoved(Fact, frozen=True, tag=9):
    """The model table no longer has it."""

    name: str


class TenantSeen(Fact, frozen=True, tag=10):
    """A tenant got its number; numbers are never reused."""

    tenant: int
    name: str


class KeyAdded(Fact, frozen=True, tag=11):
    """An API key is accepted: the SHA-256 of it."""

    name: str
    digest: bytes
    operator: bool
    created_s: int


class KeyRemoved(Fact, frozen=True, tag=12):
    """An API key is no longer accepted."""

    name: str


class JobAdmitted(Fact, frozen=True, tag=13):
    """A job was accepted; also written again, with all that happened since, by compaction."""

    job: bytes
    tenant: int
    key: bytes
    kind: JobKind
    name: str
    recipe: bytes
    processes: int
    memory_bytes: int
    cores: int | None
    device: str | None
    service_class: int
    priority: int
    admitted_ns: int
    suspended: bool = False
    attempt: int = 0
    deaths: int = 0
    losses: int = 0
    checkpoint: bytes | None = None
    checkpoint_step: int = 0
    position: int = 0
    step: int = 0
    steps_total: int = 0
    reports: list[StepReport] = []
    end: JobState | None = None
    version: bytes | None = None
    error: ErrorKind | None = None
    detail: str = ""
    metrics: dict[str, float] = {}
    ended_ns: int = 0


class AttemptBegun(Fact, frozen=True, tag=14):
    """Processes are started for a job; the numbers of attempts are not used twice."""

    job: bytes
    attempt: int


class AttemptLost(Fact, frozen=True, tag=15):
    """One of them died; how often so far without progress."""

    job: bytes
    deaths: int
    """By itself."""
    losses: int
    """Of whatever cause."""


class StepsReported(Fact, frozen=True, tag=16):
    """Steps beyond the last one, in order."""

    job: bytes
    reports: list[StepReport]
    steps_total: int


class CheckpointTaken(Fact, frozen=True, tag=17):
    """A durable version: the job goes on from here."""

    job: bytes
    version: bytes
    step: int
    position: int


class JobOver(Fact, frozen=True, tag=18):
    """Done, failed or cancelled; the first end wins."""

    job: bytes
    end: JobState
    ended_ns: int
    version: bytes | None = None
    error: ErrorKind | None = None
    detail: str = ""
    metrics: dict[str, float] = {}


class JobChanged(Fact, frozen=True, tag=19):
    """By a system call: whether it may run, and how urgent it is."""

    job: bytes
    suspended: bool
    service_class: int
    priority: int


class JobsForgotten(Fact, frozen=True, tag=20):
    """Their ends are long past."""

    jobs: list[bytes]
    now_ns: int


class Deployed(Fact, frozen=True, tag=30):
    """What a name serves, in full: the desired state, and how far it has come."""

    name: str
    model: str
    """The entry that is wanted."""
    serving: str
    """The entry that new threads get."""
    proved: list[str]
    """Entries that served before, the latest last; at most PROVED_MAX."""
    replicas: int
    device: str | None
    state: DeploymentState
    detail: str
    changed_s: int
    key: bytes | None = None
    """Of the request that asked for this."""


class Undeployed(Fact, frozen=True, tag=31):
    """The name serves nothing any more."""

    name: str


class ModelRetired(Fact, frozen=True, tag=32):
    """No deployment needs this entry any more: it leaves the table with its last thread.  Or, with
    `leaves` false, somebody added it again: it stays."""

    name: str
    leaves: bool = True


class ThreadMoved(Fact, frozen=True, tag=33):
    """A thread that has computed nothing runs on another entry."""

    thread: bytes
    model: str


AnyFact = (
    Booted
    | ThreadAdmitted
    | TokensCommitted
    | ThreadEnded
    | ThreadsForgotten
    | ThreadChanged
    | KeySpent
    | ModelRegistered
    | ModelRemoved
    | TenantSeen
    | KeyAdded
    | KeyRemoved
    | JobAdmitted
    | AttemptBegun
    | AttemptLost
    | StepsReported
    | CheckpointTaken
    | JobOver
    | JobChanged
    | JobsForgotten
    | Deployed
    | Undeployed
    | ModelRetired
    | ThreadMoved
)

_decoder: Final[msgspec.msgpack.Decoder[AnyFact]] = msgspec.msgpack.Decoder(AnyFact)
_encoder: Final = msgspec.msgpack.Encoder()


def encode(fact: AnyFact) -> bytes:
    """One journal record."""
    return _encoder.encode(fact)


def decode(record: bytes | memoryview) -> AnyFact:
    """The inverse of encode; raises msgspec.MsgspecError for anything else."""
    return _decoder.decode(record)
