"""Conversation 0x08: init and the kernel, over their socketpair (one message a datagram, no
header).

Init has no policy: it forks, kills and reports.  Everything here may be repeated to a new
kernel.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from llmproto.base import Id16, Int53, Message, Name


class Spec(msgspec.Struct, frozen=True):
    """How a process is started."""

    name: Name
    """`tokenizer`, `executor-1`, ..."""
    role: Name
    module: Name
    """Started as `python -m MODULE`."""
    fork: bool = False
    """Forked without exec from init's own image, into which torch is imported."""
    arguments: Annotated[list[str], Meta(max_length=64)] = []
    cores: Annotated[list[Int53], Meta(max_length=4096)] = []
    """CPU affinity; empty: inherited."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 0
    """Scheduling priority of the operating system: 19 yields to everybody."""


class Fork(Message, frozen=True):
    """Kernel -> init.  Answered by Forked."""

    spec: Spec
    incarnation: Int53


class Signal(Message, frozen=True):
    """Kernel -> init: signal this child and, for SIGKILL, its descendants.  A pid that is gone
    is no error."""

    pid: Int53
    incarnation: Int53
    signal: Annotated[int, Meta(ge=1, le=64)]


class KernelBeat(Message, frozen=True):
    """Kernel -> init, several times a second, during replay too."""


class Halt(Message, frozen=True):
    """Kernel -> init: end every process and then yourself."""


class Child(msgspec.Struct, frozen=True):
    """A living child, or one whose exit no kernel has heard of."""

    spec: Spec
    incarnation: Int53
    pid: Int53
    proof: bytes
    """The one-time key that it inherited and will say Hello with."""
    started_ns: Int53


class Exit(msgspec.Struct, frozen=True):
    """How a child ended."""

    name: Name
    incarnation: Int53
    pid: Int53
    code: Annotated[int, Meta(ge=0, le=255)] | None
    """Exit code, or absent when a signal ended it."""
    signal: Annotated[int, Meta(ge=1, le=64)] | None
    out_of_memory: bool = False
    """The cgroup counted an OOM kill meanwhile."""


class Promoted(Message, frozen=True):
    """Init -> kernel, first: you are the kernel now, and this is what lives.  Sent to a fresh
    or a standby kernel."""

    boot_id: Id16
    children: list[Child]
    exits: list[Exit]
    """Of children that died while no kernel lived."""
    kernel_incarnation: Int53
    """Starts of the kernel since init began."""


class Forked(Message, frozen=True):
    """Init -> kernel, answers Fork.  A fork that failed is reported as an Exited with code 127."""

    child: Child


class Exited(Message, frozen=True):
    """Init -> kernel: a child was reaped, and its descendants are gone."""

    exit: Exit


class Stop(Message, frozen=True):
    """Init -> kernel: it was told to end (SIGTERM): finish, then Halt."""


InitMessage = Fork | Signal | KernelBeat | Halt | Promoted | Forked | Exited | Stop
