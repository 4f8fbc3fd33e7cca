"""The process table, and the restart policy as data.

Invariant (`check`): a process that has a pid is starting, ready or stopping; names are unique; what
an executor holds is listed both ways (its residents, and the thread's residency).
"""

from typing import Final

import msgspec
from llmproto import limits
from llmproto.execution import ExecutorReady
from llmproto.init import Spec
from llmproto.operation import Lease, ProcessState

from llmkernel.threads import Thread

MS: Final = 1_000_000


class RestartPolicy(msgspec.Struct, frozen=True):
    """How often a process may die by itself, and how long it rests in between.

    Source: restart intensity and period, Erlang/OTP design principles (supervisor behaviour).
    """

    restarts_max: int = limits.RESTARTS_MAX
    window_ms: int = limits.RESTART_WINDOW_MS
    backoff_first_ms: int = limits.BACKOFF_MS_FIRST
    backoff_max_ms: int = limits.BACKOFF_MS_MAX
    quarantine_ms: int = limits.QUARANTINE_MS

    def rest_ms(self, deaths_ns: list[int], now_ns: int) -> tuple[int, bool]:
        """How long to rest after these deaths (ascending), and whether that is quarantine."""
        recent = sum(1 for at in deaths_ns if now_ns - at < self.window_ms * MS)
        if recent > self.restarts_max:
            return self.quarantine_ms, True
        if recent <= 1:
            return 0, False
        return min(self.backoff_first_ms << (recent - 2), self.backoff_max_ms), False


POLICY: Final = RestartPolicy()


class Process:
    """One row: a process that init started, or a service that registered by itself.

    One of a job is started once: what follows its death is the job's affair.
    """

    __slots__ = (
        "address",
        "arriving",
        "attempt",
        "blocks_free",
        "born_ns",
        "deaths_ns",
        "desired",
        "doing",
        "external",
        "hello_ms",
        "idle_ns",
        "incarnation",
        "job",
        "killed_hung",
        "lease",
        "model",
        "moved_ns",
        "name",
        "pid",
        "progress",
        "proof",
        "rank",
        "ready_info",
        "residents",
        "role",
        "run_ns",
        "running",
        "session",
        "signalled",
        "spec",
        "start_ns",
        "state",
        "stop_ns",
        "working_ns",
    )

    def __init__(self, name: str, role: str, spec: Spec | None, now_ns: int) -> None:
        self.name = name
        self.role = role
        self.spec = spec
        self.external = spec is None
        """Started by somebody else, who also restarts it."""
        self.desired = True
        """It is to be started again when it dies."""
        self.state = ProcessState.WAITING
        self.incarnation = 0
        self.pid: int | None = None
        self.proof = b""
        self.session: bytes | None = None
        self.lease: Lease | None = None
        self.start_ns = now_ns
        """When it is to be started (waiting), or was asked for (starting)."""
        self.born_ns = now_ns
        self.stop_ns = 0
        """When stopping began."""
        self.deaths_ns: list[int] = []
        self.killed_hung = False
        self.signalled = False
        """Somebody asked for a signal to it, after which it may exit with any code."""
        self.hello_ms = limits.STARTING_MS_MAX
        """How long it may take to say Hello."""
        self.doing = ""
        self.working_ns = 0
        """Until when Working excuses a lack of progress."""
        self.progress = 0
        self.moved_ns = now_ns
        """When it last made progress."""
        self.address = ""
        # Of a job only:
        self.job: bytes | None = None
        self.attempt = 0
        self.rank = 0
        self.running = False
        """It was told to run: from now on it computes."""
        self.run_ns = 0
        """When it was told last."""
        # Executors only:
        self.model: str | None = None
        self.ready_info: ExecutorReady | None = None
        self.residents: dict[int, Thread] = {}
        """Residency -> thread."""
        self.blocks_free = 0
        """KV blocks free when it last said so."""
        self.arriving: dict[int, int] = {}
        """Residency -> blocks that it will take, of threads that have not stepped yet."""
        self.idle_ns = now_ns
        """Since when no thread wanted it."""

    @property
    def working(self) -> bool:
        """It holds work, so that a standstill means something."""
        return bool(self.residents) or self.running

    @property
    def path(self) -> str:
        """Precision and code path in use, of an executor that is ready; else empty."""
        return "" if self.ready_info is None else self.ready_info.path

    @property
    def alive(self) -> bool:
        """It has a pid as far as we know."""
        return self.state in (ProcessState.STARTING, ProcessState.READY, ProcessState.STOPPING)


class ProcessTable:
    """Processes by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Process] = {}
        self.executors: dict[str, Process] = {}
        self.executors_named = 0

    def insert(self, process: Process) -> None:
        """A new row."""
        self.by_name[process.name] = process
        if process.role == "executor":
            self.executors[process.name] = process

    def remove(self, process: Process) -> None:
        """The row is not wanted any more."""
        del self.by_name[process.name]
        self.executors.pop(process.name, None)

    def of_child(self, name: str, incarnation: int) -> Process | None:
        """The process whose current incarnation this is."""
        process = self.by_name.get(name)
        return process if process is not None and process.incarnation == incarnation else None

    def executors_of(self, model: str) -> list[Process]:
        """Replicas of a model, in the order of their names' creation."""
        return [p for p in self.executors.values() if p.model == model]

    def check(self) -> None:
        """Assert the invariant in full."""
        assert len(self.by_name) <= limits.PROCESSES_MAX
        for name, process in self.by_name.items():
            assert process.name == name
            if process.pid is not None:
                assert process.alive, (name, process.state)
            for residency, thread in process.residents.items():
                assert thread.residency == residency
                assert thread.process == name
            if process.residents:
                assert process.state is ProcessState.READY, (name, process.state)
