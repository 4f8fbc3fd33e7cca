"""Executors' proposals become committed tokens: the hot path of the kernel.

Changes: threads' tokens, residents; journals one record a step, sends one message to each sink and
one to the executor.
"""

from llmproto import limits
from llmproto.execution import Drop, GaveBack, Refused, Resync, Stepped
from llmproto.threads import END_ERROR, END_LENGTH, Committed

from llmkernel.facts import TokensCommitted
from llmkernel.lifecycle import Lifecycle
from llmkernel.processes import Process
from llmkernel.sessions import Session
from llmkernel.tables import Tables
from llmkernel.threads import Thread


class Commits:
    """Takes what executors say about the threads resident on them."""

    def __init__(self, tables: Tables, lifecycle: Lifecycle) -> None:
        self._t = tables
        self._lifecycle = lifecycle

    def stepped(self, session: Session, process: Process, step: Stepped) -> None:
        """Commit each row whose residency is current and whose position is the next one."""
        t = self._t
        columns = (step.threads, step.residencies, step.positions, step.tokens, step.ends)
        sides = (step.scores, step.prompt_scores)
        lengths = {len(column) for column in (*columns, *sides) if column is not None}
        if len(lengths) != 1:
            t.log("error", "stepped with uneven columns", process=process.name)
            return
        process.moved_ns = t.now_ns
        if step.blocks_free > process.blocks_free:
            t.dirty = True  # who found no room may find some now
        process.blocks_free = step.blocks_free
        if process.arriving:
            for residency in step.residencies:
                process.arriving.pop(residency, None)
        if not t.journal_room:
            return  # asked for again (Resync) when there is room
        residents = process.residents
        credit, now_ns = limits.CREDIT_TOKENS, t.now_ns
        rows: list[int] = []
        members: list[Thread] = []
        ended: dict[int, tuple[Thread, int]] = {}
        full: list[Thread] = []
        odd: list[tuple[int, Thread | None]] = []
        """Rows that are not the next ones of their threads."""
        row = -1
        for name, residency, position, token, end in zip(*columns):
            row += 1
            thread = residents.get(residency)
            if thread is None or thread.id != name or position != len(thread.tokens):
                odd.append((row, thread))
                continue
            if ended and any(thread is over for over, _ in ended.values()):
                odd.append((row, thread))  # nothing follows an end, whatever its executor says
                continue
            if token is not None and position < thread.length_max:
                thread.tokens.append(token)
                thread.sink_ns = now_ns
                rows.append(row)
                members.append(thread)
                if position - thread.credit_from >= credit:
                    full.append(thread)
            if end or (token is not None and position + 1 >= thread.length_max):
                ended[row] = (thread, end or END_LENGTH)
        if rows:
            self._commit(step, rows, members, ended)
        self._ends(step, ended, rows)
        if rows and len(rows) == row + 1:
            t.send(session, Committed(step.threads, step.positions, [], []))
        else:
            marks = self._odd(session, step, odd)
            marks.update((thread.id, len(thread.tokens) - 1) for thread, _ in ended.values())
            marks.update((thread.id, len(thread.tokens) - 1) for thread in members)
            if marks:
                t.send(session, Committed(list(marks), list(marks.values()), [], []))
        for thread in full:
            if not thread.end:
                self._lifecycle.pause(thread)

    def _odd(
        self, session: Session, step: Stepped, odd: list[tuple[int, Thread | None]]
    ) -> dict[bytes, int]:
        """Rows that are not the next ones of their threads.  Gives the watermarks to repeat."""
        t = self._t
        marks: dict[bytes, int] = {}
        unknown: list[int] = []
        for row, thread in odd:
            residency, position = step.residencies[row], step.positions[row]
            if thread is None or thread.id != step.threads[row]:
                unknown.append(residency)
                continue
            marks[thread.id] = len(thread.tokens) - 1
            if position > len(thread.tokens):
                t.send(session, Resync(thread.id, residency, len(thread.tokens)))
            elif position < len(thread.tokens) and thread.residency == residency:
                token = step.tokens[row]
                if token is not None and token != thread.tokens[position]:
                    self._astray(thread)
        if unknown:
            t.send(session, Drop(unknown))
        return marks

    def _astray(self, thread: Thread) -> None:
        """Its residency computes from tokens that are not the committed ones: it began before the
        kernel did, and another one committed meanwhile."""
        self._t.log("warning", "residency astray", process=thread.process, thread=thread.id.hex())
        self._lifecycle.leave(thread, tell=True)
        self._lifecycle.queue(thread)

    def _commit(
        self,
        step: Stepped,
        rows: list[int],
        members: list[Thread],
        ended: dict[int, tuple[Thread, int]],
    ) -> None:
        """Journal the accepted rows (their tokens are in the threads already) and tell the
        sinks."""
        t = self._t
        if len(rows) == len(step.tokens):
            threads, positions, tokens = step.threads, step.positions, step.tokens
            scores, prompt_scores = step.scores, step.prompt_scores
        else:
            threads = [step.threads[row] for row in rows]
            positions = [step.positions[row] for row in rows]
            tokens = [step.tokens[row] for row in rows]
            scores = None if step.scores is None else [step.scores[row] for row in rows]
            prompt_scores = (
                None if step.prompt_scores is None else [step.prompt_scores[row] for row in rows]
            )
        if scores is not None:
            for thread, score in zip(members, scores):
                if thread.scores is not None and score is not None:
                    thread.scores.append(score)
        if prompt_scores is not None:
            for thread, score_list in zip(members, prompt_scores):
                if score_list is not None:
                    thread.prompt_scores = score_list
        # No accepted row lacks its token.
        t.record_applied(TokensCommitted(threads, positions, tokens, scores, prompt_scores))
        t.tokens_committed += len(rows)
        poison = t.poisons.get(members[0].model)
        if poison is not None and poison.watching:
            for thread in members:
                if poison.committed(thread.id):
                    t.dirty = True
        end_column = [0] * len(rows)
        for place, row in enumerate(rows) if ended else ():
            if row in ended:
                end_column[place] = ended[row][1]
        columns = Committed(threads, positions, tokens, end_column, scores, None, prompt_scores)
        self._tell(members, columns)

    def _tell(self, members: list[Thread], columns: Committed) -> None:
        """One message to each sink."""
        t = self._t
        first = members[0].sink
        if len({thread.sink for thread in members}) == 1:
            sink = t.sessions.of_service(first)
            if sink is not None and sink.reconciled:
                t.send(sink, columns)
            return
        groups: dict[str, list[int]] = {}
        for row, thread in enumerate(members):
            groups.setdefault(thread.sink, []).append(row)
        for name, rows in groups.items():
            sink = t.sessions.of_service(name)
            if sink is not None and sink.reconciled:
                t.send(sink, _rows(columns, rows))

    def _ends(self, step: Stepped, ended: dict[int, tuple[Thread, int]], rows: list[int]) -> None:
        """Journal the ends; a row with a token told its sink already."""
        if not ended:
            return
        told = set(rows)
        for row, (thread, end) in ended.items():
            if row not in told and step.prompt_scores is not None:
                thread.prompt_scores = step.prompt_scores[row]
                # Durable with the end: written as a whole context, since no token carries it.
                self._t.record_applied(thread.admitted())
            self._lifecycle.finish(thread, end, tell_executor=False, tell_sink=row not in told)

    def resync(self, session: Session, process: Process) -> None:
        """Ask an executor to send again what it proposed and was not committed."""
        for residency, thread in process.residents.items():
            self._t.send(session, Resync(thread.id, residency, len(thread.tokens)))

    def gave_back(self, process: Process, gone: GaveBack) -> None:
        """No blocks left: these threads return to the queue with what was committed."""
        process.moved_ns = self._t.now_ns
        for name, residency in zip(gone.threads, gone.residencies):
            thread = process.residents.get(residency)
            if thread is not None and thread.id == name:
                self._lifecycle.leave(thread, tell=False)
                self._lifecycle.queue(thread)
        process.blocks_free = gone.blocks_free

    def refused(self, process: Process, refusal: Refused) -> None:
        """The executor can never run this thread."""
        thread = process.residents.get(refusal.residency)
        if thread is not None and thread.id == refusal.thread:
            self._lifecycle.finish(
                thread,
                END_ERROR,
                error=refusal.kind,
                detail=refusal.detail,
                tell_executor=False,
            )


def _rows(columns: Committed, rows: list[int]) -> Committed:
    return Committed(
        [columns.threads[row] for row in rows],
        [columns.positions[row] for row in rows],
        [columns.tokens[row] for row in rows],
        [columns.ends[row] for row in rows],
        None if columns.scores is None else [columns.scores[row] for row in rows],
        None,
        None if columns.prompt_scores is None else [columns.prompt_scores[row] for row in rows],
    )
