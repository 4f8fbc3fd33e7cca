"""The kernel: one event in, a list of effects out.

Owns every table; knows nothing of processes, sockets or asyncio.  No clock, no randomness, no I/O,
no await; the same events at the same times give the same effects.  Read `handle` first, then the
parts: `router` (who may say what to whom), `lifecycle` (threads start and end), `commits` (tokens),
`dispatch` (who runs where), `supervision` (processes), `jobwork` (jobs and their processes),
`calls` and `jobcalls` (what may be asked).
"""

from typing import assert_never

from llmproto import limits, wire
from llmproto.base import Header, Message
from llmproto.connection import Beat, Failed, Goodbye, Hello, Working
from llmproto.encoding import Vectors
from llmproto.errors import ErrorKind, RemoteError
from llmproto.execution import ExecutorReady, GaveBack, LoadFailed, Refused, Stepped
from llmproto.jobs import JobStopped, StepsDone
from llmproto.kinds import KIND_OF
from llmproto.operation import ProcessStarted, ProcessState
from llmproto.rights import Right
from llmproto.threads import END_CANCEL, END_ERROR, SinkAcked, SinkDrop, ThreadEnd, ThreadSpawn

from llmkernel.asker import Asker
from llmkernel.calls import Calls
from llmkernel.commits import Commits
from llmkernel.deployments import Deployments
from llmkernel.dispatch import Dispatch
from llmkernel.encodings import Encodings
from llmkernel.events import (
    Arrived,
    ChildExited,
    ChildForked,
    Effect,
    Event,
    HungKilled,
    JournalRoom,
    PeerFull,
    PeerLost,
    Rejected,
    Restarted,
    SignalChild,
    StopAsked,
    Ticked,
)
from llmkernel.facts import Booted
from llmkernel.jobcalls import JobCalls
from llmkernel.jobwork import JobWork
from llmkernel.lifecycle import Lifecycle
from llmkernel.ondemand import OnDemand
from llmkernel.processes import Process
from llmkernel.router import Router
from llmkernel.sessions import Session
from llmkernel.state import State
from llmkernel.supervision import Supervision
from llmkernel.tables import MS, Tables
from llmkernel.threads import Thread

_HELLO = KIND_OF[Hello]
TICK_GAP_MS = 1_000
"""The kernel ticks several times a second; a longer gap means that it was stopped itself."""


class Kernel:
    """Owns the tables; knows nothing of processes, sockets or asyncio."""

    def __init__(self, state: State) -> None:
        """`state` is what replaying the journal gave."""
        self.tables = Tables(state)
        t = self.tables
        self._supervision = Supervision(t)
        self._lifecycle = Lifecycle(t, self._supervision)
        self._commits = Commits(t, self._lifecycle)
        self._encodings = Encodings(t, self._lifecycle)
        self._dispatch = Dispatch(t, self._lifecycle, self._supervision)
        self._router = Router(t, self._supervision)
        self._deployments = Deployments(t, self._lifecycle, self._supervision)
        self._jobs = JobWork(t, self._supervision)
        self._calls = Calls(
            t,
            self._lifecycle,
            self._supervision,
            JobCalls(t, self._jobs),
            self._jobs,
            self._deployments,
        )
        self._supervision.fail_waiting = self._fail_waiting
        self._on_demand = OnDemand(t, self._supervision)
        self._router.external_lost = self._external_lost
        self._router.want = self._on_demand.want
        self._supervision.displace = self._jobs.displace
        self._jobs.places.preload = self._calls.preload
        self._ticked_ns = 0

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take one event, change state, return what the shell must now do."""
        t = self.tables
        assert now_ns >= t.now_ns, (now_ns, t.now_ns)
        t.now_ns = now_ns
        t.effects = []
        match event:
            case Arrived():
                self._arrived(event)
            case Ticked():
                self._tick()
            case PeerLost():
                session = t.sessions.by_peer.get(event.peer)
                if session is not None:
                    session.lost = True
            case PeerFull():
                session = t.sessions.by_peer.get(event.peer)
                if session is not None:
                    t.log(
                        "warning", "a peer does not read; a message was dropped", role=session.role
                    )
            case ChildForked():
                self._supervision.forked(event.child)
            case ChildExited():
                self._exited(event)
            case HungKilled():
                self._supervision.hung(event)
            case JournalRoom():
                self._journal(event)
            case StopAsked():
                self._calls.halt()
            case Restarted():
                self._restarted(event)
            case _:
                assert_never(event)
        placed = t.dirty
        if t.dirty and (t.rollouts or t.draining):
            self._deployments.advance()
        self._dispatch.run()
        if placed:
            self._jobs.pacing.hurry()
        return t.effects

    def check(self) -> None:
        """Assert the invariants of all tables."""
        self.tables.check()

    # --- begin ------------------------------------------------------------------------------------

    def _restarted(self, event: Restarted) -> None:
        t = self.tables
        t.epoch = event.epoch
        t.boot_id = event.boot_id
        t.pids = {"init": event.init_pid, "kernel": event.pid}
        t.kernel_starts = event.kernel_starts
        t.config = event.config
        t.devices = event.devices
        t.started_ns = self._ticked_ns = t.now_ns
        t.wall_offset_ns = event.wall_ns - t.now_ns
        t.record(Booted(event.epoch, t.now_ns, event.wall_ns))
        for thread in t.state.threads:
            thread.lingering_ns = t.now_ns  # until its reader says Hello
            if not thread.end:
                thread.credit_from = thread.position
                self._lifecycle.queue(thread)
        for rejected in event.rejected:
            self._reject(rejected)
        self._supervision.boot(event.children, event.exits)
        self._jobs.boot(event.children)
        self._deployments.boot()
        for name in map(t.entry_of, self._calls.preload()):
            if name in t.state.models:
                self._supervision.want_model(name)
        self._jobs.places.place()

    def _reject(self, rejected: Rejected) -> None:
        """An earlier kernel died of this event."""
        t = self.tables
        reason = "handling this request ended the kernel; it is not tried again"
        self._router.refuse(rejected.message, reason)
        if rejected.process:
            t.rejected[rejected.process] = rejected
        if rejected.deaths > 1:
            for thread_id in rejected.threads:
                thread = t.state.threads.get(thread_id)
                if thread is not None:
                    detail = "a message about this thread ended the kernel twice"
                    self._lifecycle.finish(
                        thread, END_ERROR, error=ErrorKind.INTERNAL, detail=detail
                    )

    # --- messages ---------------------------------------------------------------------------------

    def _arrived(self, event: Arrived) -> None:
        t = self.tables
        session = t.sessions.by_peer.get(event.peer)
        try:
            header = wire.decode_header(event.frames)
        except RemoteError as error:
            if session is None:
                self._router.unknown(event.peer)
            else:
                t.fail(session, bytes(16), error.kind, error.detail)
            return
        if header.kind == _HELLO:
            self._hello(event.peer, header, event.frames[1])
            return
        if session is None:
            self._router.unknown(event.peer)
            return
        session.lost = False
        session.beat_ns = t.now_ns
        if not self._router.allowed(session, header):
            return
        if header.peer is None and header.target == "kernel" and header.reply_to is None:
            self._asked(session, header, event.frames)
        else:
            self._router.pass_on(session, header, event.frames[1:])

    def _hello(self, peer: bytes, header: Header, frame: bytes) -> None:
        try:
            hello = wire.decode_body(header.kind, frame)
        except RemoteError:
            self._router.unknown(peer)
            return
        assert isinstance(hello, Hello)
        session = self._router.hello(peer, header, hello)
        if session is None:
            return
        rejected = self.tables.rejected.pop(session.process or "", None)
        process = self._process(session)
        if rejected is None or process is None or process.pid is None:
            return
        if rejected.incarnation == process.incarnation:
            kill = SignalChild(process.pid, process.incarnation, 9)
            self.tables.effects.append(kill)

    def _process(self, session: Session) -> Process | None:
        return self.tables.processes.by_name.get(session.process or "")

    def _asked(self, session: Session, header: Header, frames: tuple[bytes, ...]) -> None:
        """The kernel itself is meant."""
        t = self.tables
        reason = t.refused.get(header.id)
        if reason is not None:
            t.fail(session, header.id, ErrorKind.INTERNAL, reason)
            return
        try:
            message = wire.decode_body(header.kind, frames[1])
            if isinstance(message, Vectors):
                self._vectors(session, header, message, frames[1:])
                return
            call = self._calls.table.get(type(message))
            if call is None:
                self._told(session, header, message)
                return
            principal = self._router.principal(session, header)
            if principal is not None:
                asker = Asker(session, header, tenant=principal[0], operator=principal[1])
                t.reply(session, header.id, call(asker, message))
        except RemoteError as error:
            t.fail(session, header.id, error.kind, error.detail, error.retry_after_ms)

    def _told(self, session: Session, header: Header, message: Message) -> None:
        """Messages of the running system; most have no answer."""
        match message:
            case Stepped() | GaveBack() | Refused():
                process = self._process(session)
                if process is None or process.ready_info is None:
                    return
                if isinstance(message, Stepped):
                    self._commits.stepped(session, process, message)
                elif isinstance(message, GaveBack):
                    self._commits.gave_back(process, message)
                else:
                    self._commits.refused(process, message)
            case SinkAcked():
                self._acked(session, message)
            case Beat():
                self._beat(session, message)
            case ThreadSpawn():
                self._lifecycle.spawn(session, header, message)
            case ThreadEnd():
                thread = self.tables.state.threads.get(message.thread)
                if thread is not None and thread.sink == session.role:
                    self._lifecycle.end_by_sink(thread, message.at)
            case ExecutorReady():
                self._ready(session, info=message)
            case ProcessStarted():
                self._ready(session, address=message.address)
            case Working():
                self._supervision.working(session, message.what, message.budget_ms)
            case LoadFailed():
                self._supervision.load_failed(message.model, message.kind, message.detail)
            case StepsDone():
                self._jobs.steps(session, message)
            case JobStopped():
                self._jobs.stopped(session, message)
            case Goodbye():
                self._goodbye(session)
            case Failed():
                pass  # the answer to something unasked: the log of its sender says more
            case _:
                detail = f"{type(message).__name__} is not for the kernel: name a service as target"
                raise RemoteError(ErrorKind.INVALID, detail)

    def _vectors(
        self, session: Session, header: Header, vectors: Vectors, body: tuple[bytes, ...]
    ) -> None:
        """An encoder has computed threads; the blob behind the message is passed on unread."""
        process = self._process(session)
        if process is not None and process.ready_info is not None:
            self._encodings.vectors(session, process, header, vectors, body)

    def _goodbye(self, session: Session) -> None:
        """An orderly leave: what nobody asked to keep is cancelled."""
        threads = list(self.tables.state.threads.by_session.get(session.id, {}).values())
        self._router.leave(session)
        if session.service:
            return
        for thread in threads:
            if not thread.resumable:
                self._lifecycle.cancel(thread, "its reader left")
        self._lifecycle.forget([thread for thread in threads if not thread.resumable])

    def _acked(self, session: Session, acks: SinkAcked) -> None:
        t = self.tables
        over: list[Thread] = []
        for thread_id, position, ended in zip(acks.threads, acks.positions, acks.ended):
            thread = t.state.threads.get(thread_id)
            if thread is None or thread.sink != session.role:
                continue
            if self._lifecycle.acked(thread, position, ended=ended):
                over.append(thread)
        self._lifecycle.forget(over)

    # --- beats ------------------------------------------------------------------------------------

    def _beat(self, session: Session, beat: Beat) -> None:
        t = self.tables
        process = self._process(session)
        if process is None:
            return
        if beat.progress != process.progress:
            process.progress = beat.progress
            process.moved_ns = t.now_ns
        elif not process.working and process.state is ProcessState.READY:
            process.moved_ns = t.now_ns
        settled = t.now_ns - session.welcomed_ns > limits.SESSION_LEASE_MS * MS // 2
        if beat.progress and not session.ready and settled:
            # It believes that it is ready; what it said was lost on the way.
            self._router.unknown(session.peer)
            return
        if session.ready:
            self._holds(session, process, beat)
        else:
            session.beat = beat

    def _holds(self, session: Session, process: Process, beat: Beat) -> None:
        """What a service that is ready holds."""
        if process.job is not None:
            self._jobs.holds(process, beat)
        elif Right.EXECUTE in session.rights:
            if process.ready_info is not None:
                self._dispatch.held(session, process, beat)
        elif Right.SINK in session.rights:
            self._sink_holds(session, beat)

    def _ready(
        self, session: Session, *, address: str = "", info: ExecutorReady | None = None
    ) -> None:
        """It is ready; what it said before that it holds counts now."""
        self._supervision.ready(session, address=address, info=info)
        process = self._process(session)
        if session.ready and process is not None and session.beat is not None:
            self._holds(session, process, session.beat)
            if session.reconciled:
                session.beat = None
        if session.ready and process is not None and process.job is not None:
            self._jobs.ready(session, process)

    def _sink_holds(self, session: Session, beat: Beat) -> None:
        """Send again what a sink has not received; positions count an end as one more."""
        t = self.tables
        first = not session.reconciled
        session.reconciled = True
        held = dict(zip(beat.threads, beat.positions))
        unknown = [thread_id for thread_id in held if thread_id not in t.state.threads.by_id]
        if unknown:
            t.send(session, SinkDrop(unknown))
        late_ns = t.now_ns - limits.SINK_RESEND_MS * MS
        for thread in t.state.threads:
            if thread.sink != session.role or (thread.sink_ns > late_ns and not first):
                continue
            if first:
                self._lifecycle.credit_anew(thread)
            known = held.get(thread.id, -1)
            if known < thread.position + (1 if thread.end else 0):
                self._lifecycle.open_at_sink(thread, session)

    # --- deaths -----------------------------------------------------------------------------------

    def _exited(self, event: ChildExited) -> None:
        t = self.tables
        exit = event.exit
        process = t.processes.of_child(exit.name, exit.incarnation)
        if process is None:
            return
        guilty = self._supervision.self_made(process, exit)
        session = t.sessions.by_id.get(process.session or b"")
        attributed = False
        if process.role == "executor":
            suspects = {row.thread: row.position for row in event.suspects} if guilty else None
            attributed = self._dispatch.executor_lost(process, suspects)
        if session is not None:
            if guilty and session.service:
                self._router.responder_died(session)
            self._router.leave(session)
        self._supervision.exited(process, exit, guilty=guilty, attributed=attributed)
        if process.job is not None:
            self._jobs.exited(process, exit, guilty=guilty)

    def _external_lost(self, process: Process) -> None:
        """Whoever started it starts it again; it will be another one."""
        self._dispatch.executor_lost(process, None)
        self.tables.processes.remove(process)
        self.tables.dirty = True

    def _fail_waiting(self, model: str, kind: ErrorKind, detail: str) -> None:
        self._deployments.taken_back(model, detail)
        for thread in self.tables.queue.all_waiting(model):
            if self._deployments.moved(thread):
                continue
            if thread.lengths and self._deployments.replaced(thread):
                # Its client computes it again, by the entry that serves.
                failed = ErrorKind.UNAVAILABLE
            else:
                failed = kind
            self._lifecycle.finish(thread, END_ERROR, error=failed, detail=detail)

    # --- time -------------------------------------------------------------------------------------

    def _journal(self, event: JournalRoom) -> None:
        t = self.tables
        t.journal_bytes = event.bytes
        if t.journal_room == event.room:
            return
        t.journal_room = event.room
        t.log("warning" if not event.room else "info", "journal room", room=event.room)
        if event.room:
            t.dirty = True
            for process in t.processes.executors.values():
                session = t.sessions.by_id.get(process.session or b"")
                process.moved_ns = t.now_ns
                if session is not None:
                    self._commits.resync(session, process)

    def _tick(self) -> None:
        t = self.tables
        gap_ns = t.now_ns - self._ticked_ns
        if gap_ns > TICK_GAP_MS * MS:
            self._supervision.excuse(gap_ns)
        self._ticked_ns = t.now_ns
        self._supervision.start_due()
        self._supervision.watch()
        self._supervision.unload_idle()
        self._on_demand.stop_idle()
        self._jobs.tick()
        self._deployments.staff()
        if t.rollouts or t.draining or len(t.queue):
            t.dirty = True  # what an executor was kept for may be over
        self._router.expire()
        self._end_of_time()

    def _end_of_time(self) -> None:
        """Deadlines, readers that do not come back, ends that nobody consumes."""
        t = self.tables
        linger_ns = t.now_ns - limits.LINGER_MS * MS
        resume_ns = t.now_ns - limits.RESUME_MS_MAX * MS
        over: list[Thread] = []
        for thread in t.state.threads:  # at most THREADS_MAX, four times a second
            if thread.end:
                gone = thread.lingering_ns is not None and thread.lingering_ns < linger_ns
                if thread.ended_ns < resume_ns or (gone and not thread.resumable):
                    over.append(thread)
            elif thread.lingering_ns is not None and thread.lingering_ns < linger_ns:
                detail = f"nobody has read it for {limits.LINGER_MS} ms"
                self._lifecycle.finish(thread, END_CANCEL, error=ErrorKind.DEADLINE, detail=detail)
            elif thread.deadline_ns is not None and thread.deadline_ns <= t.now_ns:
                ran_ms = (t.now_ns - thread.admitted_ns) // MS
                self._lifecycle.finish(
                    thread,
                    END_ERROR,
                    error=ErrorKind.DEADLINE,
                    detail=f"time ran out after {ran_ms} ms",
                )
        self._lifecycle.forget(over)
