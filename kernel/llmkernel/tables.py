"""All that the kernel knows, and the list of effects that its parts add to.

The parts of the core (router, admission, commits, dispatch, supervision, calls) share these tables
and nothing else; each names in its docstring what it changes.
"""

import msgspec
from llmproto import limits
from llmproto.base import Header, Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind, RemoteError
from llmproto.kinds import KIND_OF
from llmproto.operation import DeviceRow, ProcessState

from llmkernel.events import Effect, Forward, KernelConfig, Log, Record, Rejected, Send
from llmkernel.facts import AnyFact, TenantSeen
from llmkernel.poison import Poison
from llmkernel.processes import ProcessTable
from llmkernel.rollouts import Wish, pending, wishes
from llmkernel.scheduling import Queue
from llmkernel.sessions import Session, SessionTable
from llmkernel.state import State

MS = 1_000_000


class LoadFailure(msgspec.Struct, frozen=True):
    """Why a model could not be loaded, and until when asking again is answered with that."""

    kind: ErrorKind
    detail: str
    until_ns: int


class Tables:
    """Durable state, soft state, the clock of the present event, and its effects so far."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.sessions = SessionTable()
        self.processes = ProcessTable()
        self.queue = Queue()
        self.poisons: dict[str, Poison] = {}
        """By model: an executor has one."""
        self.failures: dict[str, LoadFailure] = {}
        self.wishes: dict[str, Wish] = {}
        """By model: how its executors should be, where a deployment says so."""
        self.rollouts: dict[str, None] = {}
        """Names whose wanted entry is on its way."""
        self.draining: dict[str, None] = {}
        """Models that serve no name any more."""
        self.crowds: dict[str, None] = {}
        """Models that should have, or have, several executors, or on a certain device."""
        self.rests: dict[str, int] = {}
        """By model: until when no further replica is tried, because one could not be loaded."""
        self.roomless: dict[str, None] = {}
        """Models that somebody waits for and that found no room."""
        self.suspect_requests: dict[bytes, int] = {}
        """Requests that were in a service when it died by itself: strikes alone so far."""
        self.refused: dict[bytes, str] = {}
        """Ids of requests that are never tried again, with the reason."""
        self.rejected: dict[str, Rejected] = {}
        self.config = KernelConfig()
        self.devices: tuple[DeviceRow, ...] = ()
        self.epoch = 0
        self.boot_id = bytes(16)
        self.pids: dict[str, int] = {}
        """Of init and the kernel: no rows of the process table, but people look for them."""
        self.kernel_starts = 1
        self.started_ns = 0
        self.now_ns = state.now_ns
        self.wall_offset_ns = 0
        self.journal_room = True
        self.journal_bytes = 0
        self.halting = False
        self.tokens_committed = 0
        self.dirty = False
        """Somebody may be placed now."""
        self.effects: list[Effect] = []
        self._ids = 0
        self._residencies = 0
        self._threads = 0

    # --- names ------------------------------------------------------------------------------------

    def message_id(self) -> bytes:
        """A fresh id for a message of the kernel's own."""
        self._ids += 1
        return self.epoch.to_bytes(8) + self._ids.to_bytes(8)

    def thread_id(self) -> bytes:
        """A fresh thread id."""
        self._threads += 1
        return self.epoch.to_bytes(4) + self._threads.to_bytes(4)

    def residency(self) -> int:
        """A fresh residency number."""
        self._residencies += 1
        return (self.epoch << 32) + self._residencies

    def tenant(self, name: str) -> int:
        """The number of a tenant, made when it is first seen."""
        known = self.state.tenant_ids.get(name)
        if known is not None:
            return known
        if len(self.state.tenants) >= limits.TENANTS_MAX:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{len(self.state.tenants)} tenants of at most {limits.TENANTS_MAX} are known",
            )
        self.record(TenantSeen(len(self.state.tenants) + 1, name))
        return self.state.tenant_ids[name]

    def poison(self, model: str) -> Poison:
        """The suspects of a model's executors."""
        poison = self.poisons.get(model)
        if poison is None:
            poison = self.poisons[model] = Poison()
        return poison

    def need_room(self) -> None:
        """Raise the refusal of whatever must be journaled and can wait, while the disk is full."""
        if not self.journal_room:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                "the journal's disk is full: free some space",
                retry_after_ms=1000,
            )

    # --- effects ----------------------------------------------------------------------------------

    def record(self, fact: AnyFact) -> None:
        """Change the durable state, and journal it."""
        self.state.apply(fact)
        self.effects.append(Record(fact))

    def record_applied(self, fact: AnyFact) -> None:
        """Journal what the hot path has already applied."""
        self.effects.append(Record(fact))

    def send(self, session: Session, message: Message) -> None:
        """Say something unasked to a peer."""
        if session.lost:
            return
        header = Header(
            limits.PROTOCOL_VERSION,
            KIND_OF[type(message)],
            self.message_id(),
            target=session.role,
            peer=session.id,
            epoch=self.epoch,
        )
        self.effects.append(Send(session.peer, header, message))

    def reply(self, session: Session, asked: bytes, message: Message) -> None:
        """Answer a request that was made to the kernel."""
        if session.lost:
            return
        header = Header(
            limits.PROTOCOL_VERSION,
            KIND_OF[type(message)],
            self.message_id(),
            target=session.role,
            peer=session.id,
            reply_to=asked,
            epoch=self.epoch,
        )
        self.effects.append(Send(session.peer, header, message))

    def fail(
        self,
        session: Session,
        asked: bytes,
        kind: ErrorKind,
        detail: str,
        retry_after_ms: int | None = None,
    ) -> None:
        """Refuse a request."""
        message = Failed(kind, detail[: limits.DETAIL_BYTES_MAX], retry_after_ms)
        self.reply(session, asked, message)

    def forward(self, session: Session, header: Header, body: tuple[bytes, ...]) -> None:
        """Pass a message on to a peer."""
        if not session.lost:
            self.effects.append(Forward(session.peer, header, body))

    def log(self, level: str, event: str, **fields: str | int | float | bool | None) -> None:
        """A line for the log."""
        self.effects.append(Log(level, event, fields))

    def entry_of(self, name: str) -> str:
        """The entry that a name stands for: what a deployment of this name serves, or itself."""
        deployed = self.state.deployments.get(name)
        return deployed.serving if deployed is not None else name

    def check(self) -> None:
        """Assert every table's invariant, and those between tables."""
        self.state.check()
        self.sessions.check()
        self.processes.check()
        for process in self.processes.by_name.values():
            job = self.state.jobs.get(process.job)
            if job is not None and process.state not in (ProcessState.STOPPING,):
                assert job.ranks[process.rank] is process, (process.name, job.id)
        for job in self.state.jobs:
            for process in job.ranks.values():
                assert self.processes.by_name[process.name] is process
        assert self.wishes == wishes(self.state.deployments)
        for name, deployment in self.state.deployments.items():
            assert not pending(deployment) or name in self.rollouts, name
        for retired in self.state.retired:
            assert retired in self.draining, retired
        for poison in self.poisons.values():
            poison.check()
        for thread in self.state.threads:
            queued = thread in self.queue
            assert queued == (thread.state == "queued"), (thread.id, thread.state, queued)
            if thread.process is not None:
                process = self.processes.by_name[thread.process]
                assert thread.residency is not None
                assert process.residents[thread.residency] is thread
