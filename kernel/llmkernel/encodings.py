"""Threads of encoders: what happens when their vectors come.

The journal keeps that such a thread was asked for and that it is over.  Its vectors go through
unread; where they are lost, their sink asks for the thread again under its key, and it is computed
again.

Changes: the thread table (through facts), residents.
"""

from llmproto import wire
from llmproto.base import Header, replaced
from llmproto.encoding import Vectors
from llmproto.execution import Drop

from llmkernel.facts import ThreadsForgotten
from llmkernel.lifecycle import Lifecycle
from llmkernel.processes import Process
from llmkernel.sessions import Session
from llmkernel.tables import Tables
from llmkernel.threads import Thread

Body = tuple[bytes, ...]
"""The frames of a message behind its header."""


class Encodings:
    """Takes the vectors that executors computed."""

    def __init__(self, tables: Tables, lifecycle: Lifecycle) -> None:
        self._t = tables
        self._lifecycle = lifecycle

    def vectors(
        self, session: Session, process: Process, header: Header, vectors: Vectors, body: Body
    ) -> None:
        """End each thread whose residency is current, and pass its vectors to its sink."""
        t = self._t
        columns = (vectors.threads, vectors.residencies, vectors.offsets, vectors.sizes)
        if len({len(column) for column in columns}) != 1 or len(body) != 2:
            t.log("error", "vectors with uneven columns or no blob", process=process.name)
            return
        process.moved_ns = t.now_ns
        for residency in vectors.residencies:
            process.arriving.pop(residency, None)
        if not t.journal_room:
            return  # asked for again (Resync) when there is room
        rows: dict[str, list[int]] = {}
        members: list[Thread] = []
        for row, (name, residency) in enumerate(zip(vectors.threads, vectors.residencies)):
            thread = process.residents.get(residency)
            if thread is None or thread.id != name or not thread.lengths:
                continue
            self._lifecycle.leave(thread, tell=False)
            members.append(thread)
            rows.setdefault(thread.sink, []).append(row)
        if members:
            self._over(members)
        for role, theirs in rows.items():
            sink = t.sessions.of_service(role)
            if sink is not None and sink.reconciled:
                self._pass_on(sink, header, vectors, theirs, body)
        t.send(session, Drop(vectors.residencies))

    def _over(self, threads: list[Thread]) -> None:
        t = self._t
        t.record(ThreadsForgotten([thread.id for thread in threads], t.now_ns))
        poison = t.poisons.get(threads[0].model)
        if poison is not None:
            for thread in threads:
                poison.committed(thread.id)
                poison.forget(thread.id)
            t.dirty = True

    def _pass_on(
        self, sink: Session, header: Header, vectors: Vectors, rows: list[int], body: Body
    ) -> None:
        """The rows that are this sink's, and the blob as it came."""
        t = self._t
        if len(rows) < len(vectors.threads):
            mine = Vectors(
                [vectors.threads[row] for row in rows],
                [vectors.residencies[row] for row in rows],
                [vectors.offsets[row] for row in rows],
                [vectors.sizes[row] for row in rows],
                vectors.width,
            )
            body = (wire.encode_body(mine), *body[1:])
        told = replaced(header, source=b"", tenant=None, target=sink.role, peer=sink.id)
        t.forward(sink, told, body)
