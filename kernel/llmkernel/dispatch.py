"""Which waiting thread becomes resident on which executor, and what was lost on the way there.

Changes: residents, the queue.  Looks only when a table says that somebody may be placed (`dirty`).
"""

from hashlib import blake2b

from llmproto import limits
from llmproto.base import Residency
from llmproto.connection import Beat
from llmproto.errors import ErrorKind
from llmproto.execution import Drop, Resync, Run
from llmproto.operation import ProcessState, ThreadState
from llmproto.threads import END_ERROR

from llmkernel.lifecycle import Lifecycle
from llmkernel.processes import Process
from llmkernel.scheduling import victim
from llmkernel.sessions import Session
from llmkernel.supervision import Supervision
from llmkernel.tables import MS, Tables
from llmkernel.threads import Thread


class Dispatch:
    """Places threads, and reconciles with what executors say they hold."""

    def __init__(self, tables: Tables, lifecycle: Lifecycle, supervision: Supervision) -> None:
        self._t = tables
        self._lifecycle = lifecycle
        self._supervision = supervision

    def run(self) -> None:
        """Place all that can be placed now."""
        t = self._t
        if not t.dirty:
            return
        t.dirty = False
        if not t.journal_room or t.halting:
            return
        for model in t.queue.models():
            executors = [
                p
                for p in t.processes.executors_of(model)
                if p.state is ProcessState.READY and p.ready_info is not None and self._here(p)
            ]
            if not executors:
                self._supervision.want_model(model)
                continue
            poison = t.poisons.get(model)
            if poison is not None and poison.trials:
                self._trial(model, executors[0])
            else:
                self._fill(model, executors)

    def _here(self, process: Process) -> bool:
        session = self._t.sessions.by_id.get(process.session or b"")
        return session is not None and session.reconciled

    def _fill(self, model: str, executors: list[Process]) -> None:
        """Most urgent first, each to the executor with the fewest residents."""
        t = self._t
        poison = t.poisons.get(model)
        passed: list[Thread] = []
        for thread in t.queue.waiting(model):
            enemies = poison.enemies(thread.id) if poison is not None and poison.apart else {}
            places = [
                p
                for p in executors
                if not enemies or not any(r.id in enemies for r in p.residents.values())
            ]  # bounded by residents_max; only after a set crashed that crashes only together
            if not places:
                t.queue.remove(thread)
                passed.append(thread)
                continue
            place = min(places, key=lambda p: len(p.residents))
            if not self._fits(place, thread):
                loser = victim(place.residents.values(), thread)
                if loser is None:
                    break
                self._lifecycle.leave(loser, tell=True)
                self._lifecycle.queue(loser)
                t.dirty = False
            self._place(place, thread)
        for thread in passed:  # when those that they crash with have ended
            t.queue.push(thread)

    def _fits(self, process: Process, thread: Thread) -> bool:
        info = process.ready_info
        assert info is not None
        if not process.residents:
            return True
        if len(process.residents) >= info.residents_max:
            return False
        free = process.blocks_free - sum(process.arriving.values())
        # One block of growth for each resident keeps it from being given back at once.
        return free - self._blocks(process, thread) >= len(process.residents)

    def _blocks(self, process: Process, thread: Thread) -> int:
        assert process.ready_info is not None
        return len(thread.tokens) // process.ready_info.block_tokens + 1

    def _trial(self, model: str, process: Process) -> None:
        """Suspects run alone: everybody else waits until each of them has committed one
        position."""
        t = self._t
        trial = t.poison(model).current
        assert trial is not None
        for thread in list(process.residents.values()):
            if thread.id not in trial:
                self._lifecycle.leave(thread, tell=True)
                self._lifecycle.queue(thread)
        t.dirty = False
        for thread_id in trial:
            thread = t.state.threads.by_id[thread_id]
            if thread.state is ThreadState.QUEUED:
                self._place(process, thread)

    def _place(self, process: Process, thread: Thread) -> None:
        t = self._t
        residency = Residency(t.residency())
        t.queue.remove(thread)
        thread.state = ThreadState.RUNNING
        thread.process = process.name
        thread.residency = residency
        thread.residencies += 1
        if not process.residents:
            process.moved_ns = t.now_ns
        process.residents[residency] = thread
        process.arriving[residency] = self._blocks(process, thread)
        self._send_run(process, thread)

    def _send_run(self, process: Process, thread: Thread) -> None:
        t = self._t
        thread.run_ns = t.now_ns
        session = t.sessions.by_id.get(process.session or b"")
        assert thread.residency is not None
        if session is None:
            return
        t.send(
            session,
            Run(
                thread=thread.id,
                residency=thread.residency,
                tokens=thread.tokens.tobytes(),
                prompt_tokens=thread.prompt_tokens,
                output_tokens_max=thread.output_tokens_max,
                sampling=thread.sampling,
                service_class=thread.service_class,
                priority=thread.priority,
                domain=self._domain(thread),
                prompt_scores=thread.sampling.prompt_logprobs and thread.prompt_scores is None,
                lengths=thread.lengths,
                pair_at=thread.pair_at,
            ),
        )

    def _domain(self, thread: Thread) -> bytes:
        """The cache domain: who may share prefixes with whom."""
        model = self._t.state.models.get(thread.model)
        digest = model.model.digest if model is not None else b""
        return blake2b(thread.tenant.to_bytes(8) + digest, digest_size=16).digest()

    # --- executors say what they hold -------------------------------------------------------------

    def held(self, session: Session, process: Process, beat: Beat) -> None:
        """Compare an executor's residencies with the table: continue, drop, or send again."""
        t = self._t
        first = not session.reconciled
        session.reconciled = True
        held = dict(zip(beat.positions, beat.threads))  # residency -> thread
        drop: list[int] = []
        for residency, thread_id in held.items():
            if residency in process.residents:
                continue
            found = t.state.threads.get(thread_id)
            # Of several stays of one thread only the last can be the current one.
            last = all(residency >= other for other, t_id in held.items() if t_id == thread_id)
            if not (
                first and last and found is not None and self._adopt(process, found, residency)
            ):
                drop.append(residency)
        if drop:
            t.send(session, Drop(drop))
        for residency, resident in list(process.residents.items()):
            if residency in held:
                if first or t.now_ns - process.moved_ns > limits.RUN_RESEND_MS * MS:
                    # What it proposed meanwhile, or what it was told, may have been lost.
                    t.send(session, Resync(resident.id, residency, len(resident.tokens)))
                continue
            if first:
                # It was welcomed anew and does not hold it: it starts again as a new residency.
                self._lifecycle.leave(resident, tell=False)
                self._lifecycle.queue(resident)
            elif t.now_ns - resident.run_ns > limits.RUN_RESEND_MS * MS:
                self._send_run(process, resident)
        if first:
            t.dirty = True

    def _adopt(self, process: Process, thread: Thread, residency: int) -> bool:
        """A residency that began under an earlier kernel goes on; False: it does not."""
        if thread.state is not ThreadState.QUEUED or thread.model != process.model:
            return False
        poison = self._t.poisons.get(thread.model)
        if poison is not None and (poison.trials or poison.apart):
            return False
        self._t.queue.remove(thread)
        thread.state = ThreadState.RUNNING
        thread.process = process.name
        thread.residency = Residency(residency)
        thread.residencies += 1
        thread.run_ns = self._t.now_ns
        if not process.residents:
            process.moved_ns = self._t.now_ns
        process.residents[residency] = thread
        return True

    # --- deaths -----------------------------------------------------------------------------------

    def executor_lost(self, process: Process, suspects: dict[bytes, int] | None) -> bool:
        """Its threads return to the queue.  With suspects (a self-made death) the guilty are looked
        for; True when the death is theirs and not the executor's own."""
        t = self._t
        threads = list(process.residents.values())
        for thread in threads:
            self._lifecycle.leave(thread, tell=False)
            self._lifecycle.queue(thread)
        process.arriving.clear()
        if not suspects or process.model is None:
            return False
        living = {
            thread_id: position
            for thread_id, position in suspects.items()
            if (suspect := t.state.threads.get(thread_id)) is not None
            and suspect.state is ThreadState.QUEUED
        }
        if not living:
            return False
        poison = t.poison(process.model)
        condemned = poison.died(living)
        for thread_id in living:
            thread = t.state.threads.by_id[thread_id]
            thread.strikes = poison.alone_deaths.get(thread_id, thread.strikes)
        for thread_id in condemned:
            thread = t.state.threads.by_id[thread_id]
            self._lifecycle.finish(
                thread,
                END_ERROR,
                error=ErrorKind.INTERNAL,
                detail=f"computing position {living[thread_id]} ended its executor "
                f"{max(thread.strikes, limits.STRIKES_MAX)} times; it is not tried again",
            )
        t.dirty = True
        return True
