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
        rows: list[int] = []
        members: list[Thread] = []
        ended: list[tuple[Thread, int, int]] = []
        full: list[Thread] = []
        unknown: list[int] = []
        astray: list[Thread] = []
        marks: list[Thread] = []
        row = -1
        for name, residency, position, token, end in zip(*columns):
            row += 1
            thread = residents.get(residency)
            if thread is None or thread.id != name:
                unknown.append(residency)
                continue
            tokens = thread.tokens
            marks.append(thread)
            if position != len(tokens):
                if position > len(tokens):
                    t.send(session, Resync(thread.id, residency, len(tokens)))
                elif token is not None and token != tokens[position]:
                    astray.append(thread)
                continue
            if ended and any(thread is over for over, _, _ in ended):
                continue  # nothing follows an end, whatever its executor says
            if token is not None:
                length_max = thread.prompt_tokens + thread.output_tokens_max
                if position < length_max:
                    tokens.append(token)
                    rows.append(row)
                    members.append(thread)
                    if position - thread.credit_from >= limits.CREDIT_TOKENS:
                        full.append(thread)
                if position + 1 >= length_max:
                    end = end or END_LENGTH
            if end:
                ended.append((thread, end, row))
        if rows:
            self._commit(step, rows, members, {row: end for _, end, row in ended})
        self._ends(step, ended, rows)
        self._mark(session, marks)
        if unknown:
            t.send(session, Drop(unknown))
        for thread in astray:
            self._astray(thread)
        for thread in full:
            if not thread.end:
                self._lifecycle.pause(thread)

    def _astray(self, thread: Thread) -> None:
        """Its residency computes from tokens that are not the committed ones: it began before the
        kernel did, and another one committed meanwhile."""
        self._t.log("warning", "residency astray", process=thread.process, thread=thread.id.hex())
        self._lifecycle.leave(thread, tell=True)
        self._lifecycle.queue(thread)

    def _commit(
        self, step: Stepped, rows: list[int], members: list[Thread], ends: dict[int, int]
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
        facts = [token for token in tokens if token is not None]
        t.record_applied(TokensCommitted(threads, positions, facts, scores, prompt_scores))
        t.tokens_committed += len(rows)
        poison = t.poisons.get(members[0].model)
        if poison is not None and poison.watching:
            for thread in members:
                if poison.committed(thread.id):
                    t.dirty = True
        end_column = [ends.get(row, 0) for row in rows] if ends else [0] * len(rows)
        columns = Committed(threads, positions, tokens, end_column, scores, None, prompt_scores)
        self._tell(members, columns)

    def _tell(self, members: list[Thread], columns: Committed) -> None:
        """One message to each sink."""
        t = self._t
        now_ns = t.now_ns
        first = members[0].sink
        mixed = False
        for thread in members:
            thread.sink_ns = now_ns
            if thread.sink != first:
                mixed = True
        if not mixed:
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

    def _ends(self, step: Stepped, ended: list[tuple[Thread, int, int]], rows: list[int]) -> None:
        """Journal the ends; a row with a token told its sink already."""
        told = set(rows)
        for thread, end, row in ended:
            if row not in told and step.prompt_scores is not None:
                thread.prompt_scores = step.prompt_scores[row]
                # Durable with the end: written as a whole context, since no token carries it.
                self._t.record_applied(thread.admitted())
            untold = row not in told  # no watermark reaches an end without a token
            self._lifecycle.finish(thread, end, tell_executor=untold, tell_sink=untold)

    def _mark(self, session: Session, members: list[Thread]) -> None:
        """Tell the executor how far each thread is committed: the watermark."""
        if members:
            names = [thread.id for thread in members]
            positions = [len(thread.tokens) - 1 for thread in members]
            self._t.send(session, Committed(names, positions, [], []))

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
