"""The thread table: contexts, and where each is computed just now.

Invariant (`check`): a thread is in exactly one of the states below; a running one has a residency,
a process and a place in that process's residents; no other has any of them.
"""

import array
from collections.abc import Iterator
from typing import Final

from llmproto.base import Residency
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling, TokenScore
from llmproto.operation import ThreadState
from llmproto.wire import unpack_tokens

from llmkernel.facts import ThreadAdmitted

OLD: Final = -1 << 62
"""A time before every time."""


class Thread:
    """One control block: the durable context, and the soft facts of its present residency."""

    __slots__ = (
        "acked",
        "admitted_ns",
        "credit_from",
        "deadline_ns",
        "deployment",
        "detail",
        "digest",
        "end",
        "ended_ns",
        "error",
        "id",
        "index",
        "key",
        "length_max",
        "lengths",
        "lingering_ns",
        "model",
        "output_tokens_max",
        "pair_at",
        "priority",
        "process",
        "prompt_scores",
        "prompt_tokens",
        "residencies",
        "residency",
        "resumable",
        "run_ns",
        "sampling",
        "scores",
        "service_class",
        "session",
        "sink",
        "sink_ns",
        "sink_state",
        "state",
        "strikes",
        "suspended",
        "tenant",
        "tokens",
    )

    def __init__(self, fact: ThreadAdmitted) -> None:
        self.id = fact.thread
        self.tenant = fact.tenant
        self.session = fact.session
        self.key = fact.key
        self.index = fact.index
        self.digest = fact.digest
        self.model = fact.model
        self.deployment = fact.deployment
        self.tokens: array.array[int] = unpack_tokens(fact.tokens)
        self.prompt_tokens = fact.prompt_tokens
        self.output_tokens_max = fact.output_tokens_max
        self.length_max = fact.prompt_tokens + fact.output_tokens_max
        self.sampling: Sampling = fact.sampling
        self.sink = fact.sink
        self.sink_state = fact.sink_state
        self.service_class = fact.service_class
        self.priority = fact.priority
        self.deadline_ns = fact.deadline_ns
        self.resumable = fact.resumable
        self.admitted_ns = fact.admitted_ns
        self.scores: list[TokenScore] | None = (
            None if fact.sampling.logprobs is None else list(fact.scores or [])
        )
        self.prompt_scores = fact.prompt_scores
        self.suspended = fact.suspended
        self.lengths = fact.lengths
        """Of an encoder's thread: tokens of each of its inputs; else empty."""
        self.pair_at = fact.pair_at
        self.end = fact.end
        self.error: ErrorKind | None = fact.error
        self.detail = fact.detail
        self.ended_ns = fact.ended_ns
        # Soft from here on: rebuilt after a restart.
        self.state = ThreadState.ENDED if fact.end else ThreadState.QUEUED
        self.residency: Residency | None = None
        self.process: str | None = None
        self.residencies = 0
        self.strikes = 0
        self.acked = self.prompt_tokens - 1
        """Highest position that its reader has consumed, as far as is known."""
        self.credit_from = self.acked
        """From where what is unread is counted: credit starts anew with every kernel and sink."""
        self.run_ns = OLD
        """When its Run was last sent."""
        self.sink_ns = OLD
        """When tokens were last sent to its sink."""
        self.lingering_ns: int | None = None
        """Since when its reader is gone."""

    def admitted(self) -> ThreadAdmitted:
        """All of the durable context as one fact, for compaction."""
        return ThreadAdmitted(
            thread=self.id,
            tenant=self.tenant,
            session=self.session,
            key=self.key,
            index=self.index,
            digest=self.digest,
            model=self.model,
            tokens=self.tokens.tobytes(),
            prompt_tokens=self.prompt_tokens,
            output_tokens_max=self.output_tokens_max,
            sampling=self.sampling,
            sink=self.sink,
            sink_state=self.sink_state,
            service_class=self.service_class,
            priority=self.priority,
            deadline_ns=self.deadline_ns,
            resumable=self.resumable,
            admitted_ns=self.admitted_ns,
            scores=None if self.scores is None else list(self.scores),
            prompt_scores=self.prompt_scores,
            suspended=self.suspended,
            end=self.end,
            error=self.error,
            detail=self.detail,
            ended_ns=self.ended_ns,
            lengths=self.lengths,
            pair_at=self.pair_at,
            deployment=self.deployment,
        )

    @property
    def position(self) -> int:
        """Highest committed position."""
        return len(self.tokens) - 1

    @property
    def output_tokens(self) -> int:
        """Generated and committed."""
        return len(self.tokens) - self.prompt_tokens


class ThreadTable:
    """Every thread that is not forgotten, by id, by request key, by session."""

    def __init__(self) -> None:
        self.by_id: dict[bytes, Thread] = {}
        self.by_key: dict[tuple[int, bytes, int], Thread] = {}
        self.by_session: dict[bytes, dict[bytes, Thread]] = {}
        self.by_tenant: dict[int, int] = {}
        """How many threads each tenant has."""
        self.living: dict[str, int] = {}
        """How many threads of each model have not ended."""
        self.tokens_held = 0
        """Upper bound of all contexts together: what admission reserved."""

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[Thread]:
        return iter(self.by_id.values())

    def get(self, thread: bytes) -> Thread | None:
        """The thread of this id, if it is known."""
        return self.by_id.get(thread)

    def insert(self, thread: Thread) -> None:
        """Take a thread in; one of the same id is replaced (compaction writes it again)."""
        self.remove(thread.id)
        self.by_id[thread.id] = thread
        self.by_key[(thread.tenant, thread.key, thread.index)] = thread
        self.by_session.setdefault(thread.session, {})[thread.id] = thread
        self.by_tenant[thread.tenant] = self.by_tenant.get(thread.tenant, 0) + 1
        self.tokens_held += thread.prompt_tokens + thread.output_tokens_max
        if not thread.end:
            self.living[thread.model] = self.living.get(thread.model, 0) + 1

    def remove(self, thread_id: bytes) -> Thread | None:
        """Forget a thread, if it is known."""
        thread = self.by_id.pop(thread_id, None)
        if thread is None:
            return None
        del self.by_key[(thread.tenant, thread.key, thread.index)]
        self._leave_session(thread)
        self.by_tenant[thread.tenant] -= 1
        if not self.by_tenant[thread.tenant]:
            del self.by_tenant[thread.tenant]
        self.tokens_held -= thread.prompt_tokens + thread.output_tokens_max
        self.ending(thread)
        return thread

    def ending(self, thread: Thread) -> None:
        """It is about to get its end, or to be forgotten; one that has an end is not counted."""
        if not thread.end:
            self.living[thread.model] -= 1
            if not self.living[thread.model]:
                del self.living[thread.model]

    def rebind(self, thread: Thread, model: str) -> None:
        """It runs on another model from now on."""
        if not thread.end:
            self.ending(thread)
            self.living[model] = self.living.get(model, 0) + 1
        thread.model = model

    def move(self, thread: Thread, session: bytes) -> None:
        """Another session reads it from now on."""
        self._leave_session(thread)
        thread.session = session
        self.by_session.setdefault(session, {})[thread.id] = thread

    def _leave_session(self, thread: Thread) -> None:
        members = self.by_session[thread.session]
        del members[thread.id]
        if not members:
            del self.by_session[thread.session]

    def check(self) -> None:
        """Assert the invariant in full."""
        assert len(self.by_key) == len(self.by_id)
        assert sum(map(len, self.by_session.values())) == len(self.by_id)
        assert sum(self.by_tenant.values()) == len(self.by_id)
        held = 0
        living: dict[str, int] = {}
        for thread in self.by_id.values():
            if not thread.end:
                living[thread.model] = living.get(thread.model, 0) + 1
            held += thread.prompt_tokens + thread.output_tokens_max
            assert self.by_session[thread.session][thread.id] is thread
            assert 1 <= thread.prompt_tokens <= len(thread.tokens)
            assert thread.output_tokens <= thread.output_tokens_max, (
                thread.output_tokens,
                thread.output_tokens_max,
            )
            running = thread.state is ThreadState.RUNNING
            assert running == (thread.residency is not None) == (thread.process is not None)
            assert (thread.state is ThreadState.ENDED) == bool(thread.end)
            assert thread.acked <= thread.position
            assert not thread.lengths or sum(thread.lengths) == len(thread.tokens)
        assert held == self.tokens_held
        assert living == self.living, (living, self.living)
