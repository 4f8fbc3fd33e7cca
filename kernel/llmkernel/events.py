"""The two closed unions of the kernel: what can happen to it, and what it can ask for."""

import msgspec
from llmproto.base import Header, Message
from llmproto.init import Child, Exit, Spec
from llmproto.operation import DeviceRow

from llmkernel.facts import AnyFact


class Suspect(msgspec.Struct, frozen=True):
    """A row of an executor's crash note: what it was computing when it died."""

    thread: bytes
    position: int


class KernelConfig(msgspec.Struct, frozen=True):
    """What the core must know of the configuration."""

    services: tuple[Spec, ...] = ()
    """Processes that should always run."""
    executor_module: str = "llmservices.executor"
    executor_cores: int | None = None
    """Cores of one executor; absent: all of the device."""
    executor_memory_bytes: int = 2 << 30
    """What an executor takes beside its weights: KV cache and working memory."""
    on_demand: tuple[Spec, ...] = ()
    """Services that start when they are first asked, and stop when nobody asks them."""
    trainer_module: str = "llmservices.trainer"
    evaluator_module: str = "llmservices.evaluator"
    job_cores: int | None = None
    """Cores of each process of a job that names none; absent: half of the device's, shared."""
    job_share: float = 0.25
    """Of its device, while threads that somebody waits for run there."""
    run_folder: str = "/run"
    """Where the files are that processes of one job meet at."""
    default_model: str | None = None
    preload: tuple[str, ...] | None = None
    """Models to load at boot; absent: the default model."""
    model_idle_ms: int = 900_000
    operator_proof: bytes = b""
    service_proof: bytes = b""
    uid: int = 0
    version: str = "0"


class Rejected(msgspec.Struct, frozen=True):
    """An event on which an earlier kernel of this home died."""

    message: bytes
    """Id of the message; its repetitions are refused."""
    process: str = ""
    """The service that sent it, if one did."""
    incarnation: int = 0
    threads: tuple[bytes, ...] = ()
    """Threads that it named; the second death ends them."""
    deaths: int = 1


class Restarted(msgspec.Struct, frozen=True, tag=True):
    """Always first: a kernel begins (its durable state has been replayed)."""

    epoch: int
    boot_id: bytes
    wall_ns: int
    config: KernelConfig
    devices: tuple[DeviceRow, ...]
    children: tuple[Child, ...] = ()
    exits: tuple[Exit, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    pid: int = 0
    """Of the kernel itself."""
    init_pid: int = 0
    kernel_starts: int = 1
    """Kernels since init began."""


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """A whole message came over the connection `peer` (the socket's routing id)."""

    peer: bytes
    frames: tuple[bytes, ...]


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """A message to this connection could not be delivered: it is gone."""

    peer: bytes


class PeerFull(msgspec.Struct, frozen=True, tag=True):
    """A message to this connection was dropped, because it does not read."""

    peer: bytes


class ChildForked(msgspec.Struct, frozen=True, tag=True):
    """Init did it."""

    child: Child


class ChildExited(msgspec.Struct, frozen=True, tag=True):
    """Init has reaped a child and its descendants."""

    exit: Exit
    suspects: tuple[Suspect, ...] = ()
    """Content of its crash note, if it wrote one."""


class HungKilled(msgspec.Struct, frozen=True, tag=True):
    """The shell killed a process that made no progress; its exit follows."""

    process: str
    incarnation: int
    stopped: bool
    """It was in state T: somebody stopped it, it did not hang by itself."""


class JournalRoom(msgspec.Struct, frozen=True, tag=True):
    """The disk under the journal became full, or has room again."""

    room: bool
    bytes: int = 0


class StopAsked(msgspec.Struct, frozen=True, tag=True):
    """Init was told to end."""


class Ticked(msgspec.Struct, frozen=True, tag=True):
    """Time has passed: what waits for a time is looked at."""


Event = (
    Restarted
    | Arrived
    | PeerLost
    | PeerFull
    | ChildForked
    | ChildExited
    | HungKilled
    | JournalRoom
    | StopAsked
    | Ticked
)


class Send(msgspec.Struct, frozen=True, tag=True):
    """Send a message of the kernel's own; leaves when the records before it are safe."""

    peer: bytes
    header: Header
    message: Message


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Pass a message on: a new header, the same body and blobs."""

    peer: bytes
    header: Header
    body: tuple[bytes, ...]


class Record(msgspec.Struct, frozen=True, tag=True):
    """Append this fact to the journal."""

    fact: AnyFact


class Start(msgspec.Struct, frozen=True, tag=True):
    """Ask init to fork."""

    spec: Spec
    incarnation: int


class SignalChild(msgspec.Struct, frozen=True, tag=True):
    """Ask init to signal a child."""

    pid: int
    incarnation: int
    signal: int


class KillHung(msgspec.Struct, frozen=True, tag=True):
    """See whether the process was stopped from outside, kill it, and say HungKilled."""

    process: str
    pid: int
    incarnation: int


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Say Ticked at this time at the latest."""

    at_ns: int


class Log(msgspec.Struct, frozen=True, tag=True):
    """A line for the log: an event name and its fields."""

    level: str
    event: str
    fields: dict[str, str | int | float | bool | None]


class Halt(msgspec.Struct, frozen=True, tag=True):
    """Everything is to end: tell init."""


Effect = Send | Forward | Record | Start | SignalChild | KillHung | Wake | Log | Halt
