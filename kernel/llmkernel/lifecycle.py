"""How threads start, pause and end: the system calls on threads.

Changes: the thread table (through facts), the queue, residents.
"""

from llmproto import limits
from llmproto.base import Header
from llmproto.errors import ErrorKind, RemoteError
from llmproto.execution import Drop
from llmproto.models import ModelEntry
from llmproto.operation import ProcessState, ThreadState
from llmproto.threads import (
    END_CANCEL,
    END_ERROR,
    END_STOP,
    Committed,
    SinkDrop,
    SinkOpen,
    ThreadSpawn,
    ThreadSpawned,
)
from llmproto.wire import unpack_tokens
from msgspec import structs

from llmkernel.admission import check_lengths, check_task
from llmkernel.facts import (
    KeySpent,
    ThreadAdmitted,
    ThreadChanged,
    ThreadEnded,
    ThreadMoved,
    ThreadsForgotten,
)
from llmkernel.placement import NoRoom
from llmkernel.rollouts import exchangeable
from llmkernel.sessions import Request, Session
from llmkernel.supervision import Supervision
from llmkernel.tables import MS, Tables
from llmkernel.threads import Thread

SCORE_BYTES = 21
"""A TokenScore without alternatives, as MessagePack at its largest: four heads, id and number."""
SCORE_TOP_BYTES = 14
"""One alternative of it: an id below 2^24 and a double."""
OPEN_BYTES = limits.SINK_STATE_BYTES_MAX + limits.DETAIL_BYTES_MAX + 1024
"""The rest of a SinkOpen, tokens and scores apart."""


class Lifecycle:
    """Admission, end, suspension, forgetting."""

    def __init__(self, tables: Tables, supervision: Supervision) -> None:
        self._t = tables
        self._supervision = supervision

    # --- spawn ------------------------------------------------------------------------------------

    def spawn(self, sink: Session, header: Header, spawn: ThreadSpawn) -> None:
        """A sink wants a thread for the request that it cites."""
        t = self._t
        request = t.sessions.requests.get(header.cause or b"")
        if request is None or request.responder is not sink:
            t.fail(
                sink,
                header.id,
                ErrorKind.UNAVAILABLE,
                "the request that this thread is for is not in flight here; its client repeats it",
            )
            return
        existing = t.state.threads.by_key.get((request.tenant, spawn.key, spawn.index))
        if existing is not None:
            self._again(sink, header, spawn, existing, request)
            return
        spent = t.state.spent.get((request.tenant, spawn.key, spawn.index))
        # Of an encoder's thread nothing is kept: who asks again has lost it, and it is computed
        # again.
        if spent is not None and not (spawn.lengths and spawn.digest == spent.digest):
            self._spent(sink, header, spawn, spent)
            return
        try:
            spawn = self._bound(spawn, request)
            self._admit(sink, spawn, request)
        except RemoteError as error:
            t.fail(sink, header.id, error.kind, error.detail, error.retry_after_ms)
            return
        thread = self._insert(sink, spawn, request)
        t.reply(sink, header.id, ThreadSpawned(thread.id, False))

    def _again(
        self,
        sink: Session,
        header: Header,
        spawn: ThreadSpawn,
        thread: Thread,
        request: Request,
    ) -> None:
        """The request key is known: the thread goes on, whatever happened in between."""
        t = self._t
        if spawn.digest != thread.digest:
            detail = f"request key {spawn.key.hex()} was used for another request"
            t.fail(sink, header.id, ErrorKind.INVALID, detail)
            return
        if thread.lengths and thread.end:
            self.forget([thread])  # it failed, and that is all there is to say of it
            t.fail(sink, header.id, thread.error or ErrorKind.INTERNAL, thread.detail)
            return
        if thread.session != request.requester.id:
            self.adopt(thread, request.requester.id)
        thread.lingering_ns = None
        self.open_at_sink(thread, sink)
        t.reply(sink, header.id, ThreadSpawned(thread.id, True))

    def _spent(self, sink: Session, header: Header, spawn: ThreadSpawn, spent: KeySpent) -> None:
        """Its end was consumed before the answer to the request arrived: nothing is left to do.
        Who never read it finds its stream STALE."""
        if spawn.digest != spent.digest:
            detail = f"request key {spawn.key.hex()} was used for another request"
            self._t.fail(sink, header.id, ErrorKind.INVALID, detail)
        else:
            self._t.reply(sink, header.id, ThreadSpawned(spent.thread, True))

    def _bound(self, spawn: ThreadSpawn, request: Request) -> ThreadSpawn:
        """With the entry that it is to run on: what its deployment serves, what its request's first
        choice runs on, or one that was replaced a moment ago and is still there."""
        t = self._t
        if spawn.deployment is None:
            return spawn
        first = t.state.threads.by_key.get((request.tenant, spawn.key, 0))
        if first is not None and first.deployment == spawn.deployment:
            asked, bound = t.state.models.get(spawn.model), t.state.models.get(first.model)
            if asked and bound and exchangeable(asked.model, bound.model):
                return structs.replace(spawn, model=first.model)
        deployed = t.state.deployments.get(spawn.deployment)
        if deployed is not None and deployed.serving == spawn.model:
            return spawn
        there = spawn.model in t.state.models and spawn.model not in t.failures
        executors = t.processes.executors_of(spawn.model)
        if there and any(p.state is not ProcessState.STOPPING for p in executors):
            return spawn
        serves = repr(deployed.serving) if deployed is not None else "nothing"
        raise RemoteError(
            ErrorKind.STALE,
            f"{spawn.deployment!r} serves {serves} now, {spawn.model!r} no more: ask again",
        )

    def _admit(self, sink: Session, spawn: ThreadSpawn, request: Request) -> None:
        """Raise the refusal that applies, if one does."""
        t = self._t
        t.need_room()
        registered = t.state.models.get(spawn.model)
        if registered is None:
            names = ", ".join(sorted(t.state.models)) or "none"
            raise RemoteError(
                ErrorKind.INVALID, f"unknown model {spawn.model!r}; there is: {names}"
            )
        model = registered.model
        prompt_tokens, odd = divmod(len(spawn.tokens), 4)
        if odd or not prompt_tokens:
            raise RemoteError(
                ErrorKind.INVALID,
                f"a prompt is at least one token of 4 bytes, this one {len(spawn.tokens)} bytes",
            )
        check_task(spawn, model)
        self._check_tokens(spawn, model)
        asked = prompt_tokens + spawn.output_tokens_max
        context = model.context_tokens
        for executor in t.processes.executors_of(spawn.model):
            if executor.ready_info is not None:
                context = min(context, executor.ready_info.context_tokens)
        if spawn.lengths:
            check_lengths(spawn, context)
        elif asked > context:
            raise RemoteError(
                ErrorKind.INVALID,
                f"prompt of {prompt_tokens} + output of {spawn.output_tokens_max} tokens = "
                f"{asked}; {spawn.model!r} takes {context} here",
            )
        self._check_bytes(spawn, prompt_tokens)
        self._check_limits(request.tenant, asked)
        failure = t.failures.get(spawn.model)
        if failure is not None and t.now_ns < failure.until_ns:
            raise RemoteError(failure.kind, failure.detail)
        room = self._supervision.room_for(model)
        if isinstance(room, NoRoom) and not room.ever:
            raise RemoteError(
                ErrorKind.INVALID,
                f"{spawn.model!r} needs {room.needed_bytes} bytes of memory, "
                f"the largest device has {room.largest_bytes}",
            )

    def _check_tokens(self, spawn: ThreadSpawn, model: ModelEntry) -> None:
        """No id beyond the vocabulary reaches an executor."""
        highest = max(unpack_tokens(spawn.tokens))
        if highest >= model.vocabulary:
            raise RemoteError(
                ErrorKind.INVALID,
                f"token id {highest} in the prompt; {spawn.model!r} knows {model.vocabulary} "
                "tokens, from 0",
            )

    def _check_bytes(self, spawn: ThreadSpawn, prompt_tokens: int) -> None:
        """With all scores it must fit the one message that opens it at its sink."""
        sampling = spawn.sampling
        if sampling.logprobs is None:
            return
        each = SCORE_BYTES + SCORE_TOP_BYTES * sampling.logprobs
        scored = spawn.output_tokens_max + (prompt_tokens if sampling.prompt_logprobs else 0)
        fixed = OPEN_BYTES + 4 * (prompt_tokens + spawn.output_tokens_max)
        most = (limits.MESSAGE_BYTES_MAX - fixed) // each
        if scored > most:
            raise RemoteError(
                ErrorKind.INVALID,
                f"log-probabilities of {scored} tokens with {sampling.logprobs} alternatives each; "
                f"at most {most} fit a message: ask for fewer tokens or alternatives",
            )

    def _check_limits(self, tenant: int, asked: int) -> None:
        threads = self._t.state.threads
        for what, have, most in (
            ("threads", len(threads) + 1, limits.THREADS_MAX),
            (
                "threads of this tenant",
                threads.by_tenant.get(tenant, 0) + 1,
                limits.THREADS_PER_TENANT_MAX,
            ),
            ("tokens of context", threads.tokens_held + asked, limits.CONTEXT_TOKENS_TOTAL_MAX),
        ):
            if have > most:
                detail = f"this would make {have} {what}; {most} is the limit"
                raise RemoteError(ErrorKind.EXHAUSTED, detail, retry_after_ms=1000)

    def _insert(self, sink: Session, spawn: ThreadSpawn, request: Request) -> Thread:
        t = self._t
        fact = ThreadAdmitted(
            thread=t.thread_id(),
            tenant=request.tenant,
            session=request.requester.id,
            key=spawn.key,
            index=spawn.index,
            digest=spawn.digest,
            model=spawn.model,
            tokens=spawn.tokens,
            prompt_tokens=len(spawn.tokens) // 4,
            output_tokens_max=spawn.output_tokens_max,
            sampling=spawn.sampling,
            sink=sink.role,
            sink_state=spawn.sink_state,
            service_class=spawn.service_class,
            priority=spawn.priority,
            deadline_ns=None if spawn.deadline_ms is None else t.now_ns + spawn.deadline_ms * MS,
            resumable=spawn.resumable,
            admitted_ns=t.now_ns,
            lengths=spawn.lengths,
            pair_at=spawn.pair_at,
            deployment=spawn.deployment,
        )
        t.record(fact)
        thread = t.state.threads.by_id[fact.thread]
        thread.sink_ns = t.now_ns
        self.queue(thread)
        return thread

    # --- placing and leaving ----------------------------------------------------------------------

    def queue(self, thread: Thread) -> None:
        """It wants to run: its state says why not, if it may not."""
        t = self._t
        if thread.end:
            thread.state = ThreadState.ENDED
        elif thread.suspended:
            thread.state = ThreadState.SUSPENDED
        elif thread.position - thread.credit_from >= limits.CREDIT_TOKENS:
            thread.state = ThreadState.PAUSED
        else:
            thread.state = ThreadState.QUEUED
            t.queue.push(thread)
            t.dirty = True

    def leave(self, thread: Thread, *, tell: bool) -> None:
        """Off its executor, out of the queue; the caller gives it its next state."""
        t = self._t
        if thread.process is not None and thread.residency is not None:
            process = t.processes.by_name[thread.process]
            del process.residents[thread.residency]
            process.arriving.pop(thread.residency, None)
            if not process.residents:
                process.idle_ns = t.now_ns
            session = t.sessions.by_id.get(process.session or b"")
            if tell and session is not None:
                t.send(session, Drop([thread.residency]))
            t.dirty = True
        thread.residency = None
        thread.process = None
        t.queue.remove(thread)

    # --- end --------------------------------------------------------------------------------------

    def finish(
        self,
        thread: Thread,
        end: int,
        *,
        length: int | None = None,
        error: ErrorKind | None = None,
        detail: str = "",
        tell_executor: bool = True,
        tell_sink: bool = True,
    ) -> None:
        """End a thread; the first end wins."""
        if thread.end:
            return
        t = self._t
        self.leave(thread, tell=tell_executor)
        length = len(thread.tokens) if length is None else length
        detail = detail[: limits.DETAIL_BYTES_MAX]
        t.record(ThreadEnded(thread.id, end, length, t.now_ns, error, detail))
        self._poison_forget(thread)
        if tell_sink:
            self._tell_end(thread)

    def _tell_end(self, thread: Thread) -> None:
        t = self._t
        sink = t.sessions.of_service(thread.sink)
        if sink is None or not sink.reconciled:
            return
        thread.sink_ns = t.now_ns
        failure = f"{thread.error.value}: {thread.detail}" if thread.error else ""
        # Otherwise they went out with the first token.
        unsaid = thread.prompt_scores is not None and not thread.output_tokens
        t.send(
            sink,
            Committed(
                [thread.id],
                [len(thread.tokens)],
                [None],
                [thread.end],
                errors=[failure] if thread.end == END_ERROR else None,
                prompt_scores=[thread.prompt_scores] if unsaid else None,
            ),
        )

    def _poison_forget(self, thread: Thread) -> None:
        poison = self._t.poisons.get(thread.model)
        if poison is not None:
            poison.forget(thread.id)
            self._t.dirty = True

    def cancel(self, thread: Thread, detail: str = "cancelled") -> None:
        """End it now, whatever it does."""
        self.finish(thread, END_CANCEL, error=ErrorKind.DEADLINE, detail=detail)

    def end_by_sink(self, thread: Thread, at: int) -> None:
        """A stop string matched: what lies beyond is cut, even if the executor ended it
        meanwhile."""
        t = self._t
        length = at + 1
        if not thread.prompt_tokens <= length <= len(thread.tokens):
            return
        if not thread.end:
            self.finish(thread, END_STOP, length=length, tell_sink=False)
        elif length < len(thread.tokens) and thread.end != END_ERROR:
            t.record(ThreadEnded(thread.id, END_STOP, length, thread.ended_ns))

    def forget(self, threads: list[Thread]) -> None:
        """Their ends were consumed."""
        if threads:
            self._t.record(ThreadsForgotten([thread.id for thread in threads], self._t.now_ns))

    def drop(self, thread: Thread) -> None:
        """Nobody will read a thread that has ended: forget it, and let its sink forget it."""
        self.forget([thread])
        sink = self._t.sessions.of_service(thread.sink)
        if sink is not None and sink.reconciled:
            self._t.send(sink, SinkDrop([thread.id]))

    # --- changes ----------------------------------------------------------------------------------

    def change(
        self,
        thread: Thread,
        *,
        session: bytes | None = None,
        suspended: bool | None = None,
        service_class: int | None = None,
        priority: int | None = None,
    ) -> None:
        """Journal a change by a system call."""
        self._t.record(
            ThreadChanged(
                thread.id,
                thread.session if session is None else session,
                thread.suspended if suspended is None else suspended,
                thread.service_class if service_class is None else service_class,
                thread.priority if priority is None else priority,
            )
        )

    def adopt(self, thread: Thread, session: bytes) -> None:
        """Another session of the same tenant reads it from now on."""
        self.change(thread, session=session)
        thread.lingering_ns = None

    def suspend(self, thread: Thread) -> None:
        """Off the device, context kept."""
        if thread.end or thread.suspended:
            return
        self.change(thread, suspended=True)
        self.leave(thread, tell=True)
        self._withdraw(thread)
        self.queue(thread)

    def move(self, thread: Thread, model: str) -> None:
        """Let a thread that waits, and has computed nothing, wait for another model."""
        self.leave(thread, tell=True)
        self._withdraw(thread)
        self._t.record(ThreadMoved(thread.id, model))
        self.queue(thread)

    def resume(self, thread: Thread) -> None:
        """The inverse of suspend."""
        if thread.end or not thread.suspended:
            return
        self.change(thread, suspended=False)
        self.queue(thread)

    def pause(self, thread: Thread) -> None:
        """Its reader has used up its credit."""
        self.leave(thread, tell=True)
        self._withdraw(thread)
        thread.state = ThreadState.PAUSED

    def _withdraw(self, thread: Thread) -> None:
        poison = self._t.poisons.get(thread.model)
        if poison is not None:
            poison.withdraw(thread.id)
            self._t.dirty = True

    def acked(self, thread: Thread, position: int, *, ended: bool) -> bool:
        """Its reader has consumed up to here; True when the thread may be forgotten."""
        position = min(position, thread.position)
        if ended and not thread.end:
            # A stop string that only the sink saw, whose ThreadEnd was lost.
            self.end_by_sink(thread, position)
        thread.acked = max(thread.acked, position)
        thread.credit_from = max(thread.credit_from, position)
        unread = thread.position - thread.credit_from
        if thread.state is ThreadState.PAUSED and unread <= limits.CREDIT_TOKENS // 2:
            self.queue(thread)
        return ended and bool(thread.end)

    def credit_anew(self, thread: Thread) -> None:
        """What its reader had consumed may have been lost on the way: count from here."""
        thread.credit_from = thread.position
        if thread.state is ThreadState.PAUSED:
            self.queue(thread)

    # --- sinks ------------------------------------------------------------------------------------

    def open_at_sink(self, thread: Thread, sink: Session) -> None:
        """Give a sink all that it needs to make the thread's text.  Of an encoder's thread only
        its end says something: its vectors come when they are computed."""
        if thread.lengths and not thread.end:
            return
        thread.sink_ns = self._t.now_ns
        self._t.send(
            sink,
            SinkOpen(
                thread=thread.id,
                tenant=thread.tenant,
                session=thread.session,
                sink_state=thread.sink_state,
                prompt_tokens=thread.prompt_tokens,
                tokens=thread.tokens.tobytes(),
                acked=max(thread.acked, 0),
                end=thread.end,
                error=thread.error,
                detail=thread.detail,
                scores=thread.scores,
                prompt_scores=thread.prompt_scores,
            ),
        )
