"""Conversation 0x05: looking at the system and acting on it."""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto.base import Detail, Int53, Message, Milliseconds, Name
from llmproto.generation import Thread


class ProcessState(enum.StrEnum):
    """Where a process stands."""

    WAITING = "waiting"
    """Backing off before its next start."""
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    QUARANTINED = "quarantined"
    """It died too often; tried again later."""
    STOPPED = "stopped"


class Lease(msgspec.Struct, frozen=True):
    """What a process was granted of a device."""

    device: Name
    cores: Annotated[list[Int53], Meta(max_length=4096)]
    memory_bytes: Int53


class ProcessRow(msgspec.Struct, frozen=True):
    """A line of `llmos ps`."""

    name: Name
    role: Name
    pid: Int53 | None
    state: ProcessState
    incarnation: Int53
    """Starts so far."""
    uptime_ms: Milliseconds
    lease: Lease | None = None
    doing: str = ""
    """What it announced with Working, or why it waits."""
    model: str = ""
    threads: Int53 = 0
    path: str = ""
    """Precision and code path in use, of an executor that is ready."""


class ProcessesAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by Processes."""


class Processes(Message, frozen=True):
    """Kernel -> requester, answers ProcessesAsk."""

    rows: list[ProcessRow]


class ThreadState(enum.StrEnum):
    """Where a thread stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    """No credit: its client does not read."""
    SUSPENDED = "suspended"
    """By ThreadSuspend."""
    ENDED = "ended"
    """Kept until its end was consumed."""


class ThreadRow(msgspec.Struct, frozen=True):
    """A line of `llmos threads`."""

    thread: Thread
    model: Name
    tenant: Name
    state: ThreadState
    prompt_tokens: Int53
    output_tokens: Int53
    output_tokens_max: Int53
    service_class: Int53
    priority: Annotated[int, Meta(ge=-8, le=7)]
    age_ms: Milliseconds
    process: str = ""
    residencies: Int53 = 0
    """Times it was placed so far."""
    strikes: Int53 = 0


class ThreadsAsk(Message, frozen=True):
    """Anyone -> kernel: the threads of the caller's tenant (an operator: all).  Answered by
    Threads."""

    limit: Annotated[int, Meta(ge=1, le=2048)] = 1024
    """At most so many rows, the youngest first."""


class Threads(Message, frozen=True):
    """Kernel -> requester, answers ThreadsAsk."""

    rows: list[ThreadRow]
    total: Int53


class DeviceRow(msgspec.Struct, frozen=True):
    """A device as it was detected."""

    name: Name
    kind: Name
    """`cpu` or `cuda`."""
    cores: list[Int53]
    memory_bytes: Int53
    memory_granted_bytes: Int53 = 0
    detail: str = ""


class StatusAsk(Message, frozen=True):
    """Anyone -> kernel.  Answered by Status."""


class Status(Message, frozen=True):
    """Kernel -> requester, answers StatusAsk."""

    ready: bool
    """Every service that should run is ready."""
    version: Name
    kernel_epoch: Int53
    uptime_ms: Milliseconds
    """Since this kernel started."""
    http: str = ""
    """Base URL of the gateway, once it listens."""
    default_model: str = ""
    journal_bytes: Int53 = 0
    journal_full: bool = False
    threads_queued: Int53 = 0
    threads_running: Int53 = 0
    threads_ended: Int53 = 0
    """Ended and not forgotten."""
    tokens_committed: Int53 = 0
    """Since this kernel started."""
    sessions: Int53 = 0
    devices: list[DeviceRow] = []
    not_ready: list[str] = []
    """Processes that are not ready, with the reason."""


class ProcessKill(Message, frozen=True):
    """Operator -> kernel: send this signal to a process; its restart policy then applies.
    Answered by Done, or Failed(STALE | DENIED)."""

    name: Name
    signal: Annotated[int, Meta(ge=1, le=64)] = 9


class ProcessStarted(Message, frozen=True):
    """Service -> kernel, once, when it is ready to answer; the gateway names its address.  Not
    answered."""

    address: Annotated[str, Meta(max_length=1024)] = ""


class Shutdown(Message, frozen=True):
    """Operator -> kernel: stop every process and end.  Answered by Done; accepted threads go on
    at the next boot."""


class Note(Message, frozen=True):
    """Service -> kernel: a line for the kernel's log and `llmos logs`, from a service without a
    log of its own."""

    text: Detail
