"""Calls of encoders on their way: spawned at the kernel, answered when their vectors come.

Nothing is kept of a call beyond this process: where it dies, its client asks again with the same
key.  Where vectors were lost between the kernel and here, the kernel says that it no longer knows
the thread, and the call is spawned again under its key.
"""

import asyncio
import time
from typing import Final

from libllm.port import Port
from llmproto import wire
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.encoding import Encode, Vectors
from llmproto.errors import ErrorKind, RemoteError
from llmproto.generation import Sampling
from llmproto.models import ModelFound
from llmproto.threads import END_ERROR, SinkAcked, SinkOpen, ThreadSpawn, ThreadSpawned

from llmservices.tokenizer.core import error_kind
from llmservices.tokenizer.encode import PreparedInputs

SPAWN_S: Final = 30
"""For how long a spawn is repeated; its client repeats the whole request anyway."""


class Pending:
    """One call that waits."""

    def __init__(
        self,
        spawn: ThreadSpawn,
        cause: bytes,
        future: "asyncio.Future[tuple[int, bytes]]",
    ) -> None:
        self.spawn = spawn
        self.cause = cause
        """The client's request."""
        self.future = future

    @property
    def position(self) -> int:
        """As the Beat counts: the last token."""
        return len(self.spawn.tokens) // 4 - 1


class Encodings:
    """Every call that waits, by its thread.

    Invariant: what is in the table is not settled.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self.by_thread: dict[bytes, Pending] = {}

    async def compute(
        self,
        encode: Encode,
        found: ModelFound,
        prepared: PreparedInputs,
        *,
        cause: bytes,
        deadline_ms: int | None,
    ) -> tuple[int, bytes]:
        """(width, vectors): inputs x width float32."""
        spawn = ThreadSpawn(
            key=encode.key,
            index=0,
            digest=prepared.digest,
            model=found.model.name,
            deployment=found.deployment,
            tokens=wire.pack_tokens(prepared.tokens),
            output_tokens_max=0,
            sampling=Sampling(),
            sink_state=b"",
            service_class=encode.service_class,
            priority=encode.priority,
            deadline_ms=deadline_ms,
            lengths=prepared.lengths,
            pair_at=prepared.pair_at,
        )
        pending = Pending(spawn, cause, self._port.loop.create_future())
        self._ask(pending)
        return await pending.future

    def _ask(self, pending: Pending) -> None:
        def answered(answer: Message) -> None:
            if pending.future.done():
                return
            if isinstance(answer, ThreadSpawned):
                self.by_thread[answer.thread] = pending
            elif isinstance(answer, Failed):
                pending.future.set_exception(
                    RemoteError(answer.kind, answer.detail, retry_after_ms=answer.retry_after_ms)
                )

        deadline_ns = time.monotonic_ns() + SPAWN_S * 1_000_000_000
        self._port.ask(pending.spawn, answered, cause=pending.cause, deadline_ns=deadline_ns)

    def vectors(self, vectors: Vectors, blob: bytes) -> None:
        """They came; those of calls that nobody waits for are lost."""
        for thread, offset, size in zip(vectors.threads, vectors.offsets, vectors.sizes):
            pending = self.by_thread.pop(thread, None)
            if pending is None or pending.future.done():
                continue
            wanted = 4 * vectors.width * len(pending.spawn.lengths)
            data = blob[offset : offset + size]
            if size == wanted == len(data):
                pending.future.set_result((vectors.width, data))
            else:
                detail = f"{len(data)} bytes of vectors came where {wanted} were expected"
                pending.future.set_exception(RemoteError(ErrorKind.INTERNAL, detail))

    def ended(self, thread: bytes, end: int, error: str) -> bool:
        """The kernel ended it without vectors; False: it is none of these."""
        pending = self.by_thread.pop(thread, None)
        if pending is None:
            return False
        kind, _, detail = error.partition(": ")
        if end != END_ERROR:
            failure = RemoteError(ErrorKind.DEADLINE, "the call was cancelled")
        else:
            failure = RemoteError(error_kind(kind), detail or error)
        if not pending.future.done():
            pending.future.set_exception(failure)
        self._port.send(SinkAcked([thread], [pending.position], [True]))
        return True

    def opened(self, opened: SinkOpen) -> None:
        """A call that has ended without vectors; perhaps one of an earlier incarnation, whose
        client asks again."""
        error = f"{opened.error}: {opened.detail}" if opened.error is not None else ""
        if not self.ended(opened.thread, opened.end, error):
            last = len(opened.tokens) // 4 - 1
            self._port.send(SinkAcked([opened.thread], [last], [True]))

    def dropped(self, thread: bytes) -> bool:
        """The kernel knows it no more: its vectors were lost on the way, and are computed again.
        False: it is none of these."""
        pending = self.by_thread.pop(thread, None)
        if pending is None:
            return False
        self._ask(pending)
        return True
