"""The durable state: a fold over the journal's facts, and nothing else.

Invariant: replaying the journal gives the state that the kernel had when it wrote the last record.
"""

import heapq
from collections.abc import Iterator
from hashlib import blake2b
from typing import assert_never

import msgspec
from llmproto import limits
from llmproto.operation import ThreadState

from llmkernel.facts import (
    AnyFact,
    AttemptBegun,
    AttemptLost,
    Booted,
    CheckpointTaken,
    Deployed,
    JobAdmitted,
    JobChanged,
    JobOver,
    JobsForgotten,
    KeyAdded,
    KeyRemoved,
    KeySpent,
    ModelRegistered,
    ModelRemoved,
    ModelRetired,
    StepsReported,
    TenantSeen,
    ThreadAdmitted,
    ThreadChanged,
    ThreadEnded,
    ThreadMoved,
    ThreadsForgotten,
    TokensCommitted,
    Undeployed,
)
from llmkernel.jobs import Job, JobTable
from llmkernel.rollouts import entries
from llmkernel.threads import Thread, ThreadTable


class State:
    """Threads, spent request keys, jobs, models, deployments, tenants and API keys."""

    def __init__(self) -> None:
        self.epoch = 0
        self.now_ns = 0
        """The latest time that any fact carries."""
        self.threads = ThreadTable()
        self.jobs = JobTable()
        self.spent: dict[tuple[int, bytes, int], KeySpent] = {}
        self._spent_until: list[tuple[int, tuple[int, bytes, int]]] = []
        """A heap of when they are over: compaction writes them in another order than they came."""
        self.models: dict[str, ModelRegistered] = {}
        self.deployments: dict[str, Deployed] = {}
        self.retired: dict[str, None] = {}
        """Models that leave with their last thread."""
        self.tenants: dict[int, str] = {}
        self.tenant_ids: dict[str, int] = {}
        self.keys: dict[str, KeyAdded] = {}
        self.keys_by_digest: dict[bytes, KeyAdded] = {}

    def apply(self, fact: AnyFact) -> None:
        """Fold one fact in.  Facts about threads that are not known are left-overs of
        compaction."""
        match fact:
            case TokensCommitted():
                self._commit(fact)
            case ThreadAdmitted():
                self.threads.insert(Thread(fact))
                self.now_ns = max(self.now_ns, fact.admitted_ns)
            case ThreadEnded():
                self._end(fact)
            case ThreadsForgotten():
                self._forget(fact)
            case ThreadChanged():
                thread = self.threads.get(fact.thread)
                if thread is not None:
                    if thread.session != fact.session:
                        self.threads.move(thread, fact.session)
                    thread.suspended = fact.suspended
                    thread.service_class = fact.service_class
                    thread.priority = fact.priority
            case KeySpent():
                self._spend(fact)
            case ModelRegistered():
                self.models[fact.model.name] = fact
            case ModelRemoved():
                self.models.pop(fact.name, None)
                self.retired.pop(fact.name, None)
            case Deployed():
                self.deployments[fact.name] = fact
                for entry in entries(fact):
                    self.retired.pop(entry, None)
            case Undeployed():
                self.deployments.pop(fact.name, None)
            case ModelRetired():
                if fact.leaves and fact.name in self.models:
                    self.retired[fact.name] = None
                else:
                    self.retired.pop(fact.name, None)
            case ThreadMoved():
                thread = self.threads.get(fact.thread)
                if thread is not None:
                    self.threads.rebind(thread, fact.model)
            case TenantSeen():
                self.tenants[fact.tenant] = fact.name
                self.tenant_ids[fact.name] = fact.tenant
            case KeyAdded():
                self.keys[fact.name] = fact
                self.keys_by_digest[fact.digest] = fact
            case KeyRemoved():
                key = self.keys.pop(fact.name, None)
                if key is not None:
                    del self.keys_by_digest[key.digest]
            case JobAdmitted():
                self.jobs.insert(Job(fact))
                self.now_ns = max(self.now_ns, fact.admitted_ns)
            case (
                AttemptBegun() | AttemptLost() | StepsReported() | CheckpointTaken() | JobChanged()
            ):
                self.jobs.apply(fact)
            case JobOver():
                self.jobs.apply(fact)
                self.now_ns = max(self.now_ns, fact.ended_ns)
            case JobsForgotten():
                self.jobs.forget(fact)
                self.now_ns = max(self.now_ns, fact.now_ns)
            case Booted():
                self.epoch = max(self.epoch, fact.epoch)
                self.now_ns = max(self.now_ns, fact.now_ns)
            case _:
                assert_never(fact)

    def _commit(self, fact: TokensCommitted) -> None:
        """Replay is made of these: a million rows take a few tenths of a second."""
        by_id = self.threads.by_id
        fresh: list[int] = []
        row = -1
        for thread_id, position, token in zip(fact.threads, fact.positions, fact.tokens):
            row += 1
            thread = by_id.get(thread_id)
            if thread is None:
                continue
            tokens = thread.tokens
            if position == len(tokens) and token is not None:
                tokens.append(token)
                fresh.append(row)
        if fact.scores is not None or fact.prompt_scores is not None:
            self._score(fact, fresh)

    def _score(self, fact: TokensCommitted, rows: list[int]) -> None:
        for row in rows:
            thread = self.threads.by_id[fact.threads[row]]
            if thread.scores is not None and fact.scores is not None:
                score = fact.scores[row]
                if score is not None:
                    thread.scores.append(score)
            if fact.prompt_scores is not None and fact.prompt_scores[row] is not None:
                thread.prompt_scores = fact.prompt_scores[row]

    def _end(self, fact: ThreadEnded) -> None:
        self.now_ns = max(self.now_ns, fact.ended_ns)
        thread = self.threads.get(fact.thread)
        if thread is None:
            return
        self.threads.ending(thread)
        del thread.tokens[fact.length :]
        if thread.scores is not None:
            del thread.scores[thread.output_tokens :]
        thread.acked = min(thread.acked, thread.position)
        thread.end = fact.end
        thread.error = fact.error
        thread.detail = fact.detail
        thread.ended_ns = fact.ended_ns
        thread.state = ThreadState.ENDED

    def _forget(self, fact: ThreadsForgotten) -> None:
        self.now_ns = max(self.now_ns, fact.now_ns)
        until_ns = fact.now_ns + limits.RESUME_MS_MAX * 1_000_000
        for thread_id in fact.threads:
            thread = self.threads.remove(thread_id)
            if thread is not None:
                key, index, digest = thread.key, thread.index, thread.digest
                self._spend(KeySpent(thread.tenant, key, index, digest, until_ns, thread.id))
        while self._spent_until:
            until_ns, place = self._spent_until[0]
            if until_ns > fact.now_ns and len(self.spent) <= limits.KEYS_SPENT_MAX:
                break
            heapq.heappop(self._spent_until)
            spent = self.spent.get(place)
            if spent is not None and spent.until_ns == until_ns:
                del self.spent[place]

    def _spend(self, fact: KeySpent) -> None:
        place = (fact.tenant, fact.key, fact.index)
        known = self.spent.get(place)
        if known is None or known.until_ns != fact.until_ns:
            heapq.heappush(self._spent_until, (fact.until_ns, place))
        self.spent[place] = fact

    def live(self) -> Iterator[AnyFact]:
        """The facts that say all of this again, one entity a fact: what compaction writes."""
        # Facts go on being written while this is read, a little each turn: what is gone by then
        # must not come back, and what was changed must not be unsaid.  Threads come before spent
        # keys, because a thread that is forgotten meanwhile becomes one.
        yield Booted(self.epoch, self.now_ns, 0)
        for tenant, name in list(self.tenants.items()):
            yield TenantSeen(tenant, name)
        for key_name in list(self.keys):
            if key_name in self.keys:
                yield self.keys[key_name]
        for model_name in list(self.models):
            if model_name in self.models:
                yield self.models[model_name]
        for deployed in list(self.deployments):
            if deployed in self.deployments:
                yield self.deployments[deployed]
        for model_name in list(self.retired):
            if model_name in self.retired:
                yield ModelRetired(model_name)
        for thread_id in list(self.threads.by_id):
            if thread_id in self.threads.by_id:
                yield self.threads.by_id[thread_id].admitted()
        for job_id in list(self.jobs.by_id):
            if job_id in self.jobs.by_id:
                yield self.jobs.by_id[job_id].admitted()
        for place in list(self.spent):
            if place in self.spent:
                yield self.spent[place]

    def digest(self) -> bytes:
        """The same for equal states, however they came about; for comparing."""
        parts: list[object] = [
            self.epoch,
            self.now_ns,
            sorted(self.tenants.items()),
            [fact for _, fact in sorted(self.keys.items())],
            [fact for _, fact in sorted(self.models.items())],
            [fact for _, fact in sorted(self.deployments.items())],
            sorted(self.retired),
            [fact for _, fact in sorted(self.spent.items())],
            [thread.admitted() for _, thread in sorted(self.threads.by_id.items())],
            [job.admitted() for _, job in sorted(self.jobs.by_id.items())],
        ]
        return blake2b(msgspec.msgpack.encode(parts), digest_size=16).digest()

    def check(self) -> None:
        """Assert the invariants of every durable table."""
        self.threads.check()
        self.jobs.check()
        for deployment in self.deployments.values():
            for entry in entries(deployment):
                assert entry in self.models, (deployment.name, entry)
                assert entry not in self.retired, (deployment.name, entry)
        assert not self.deployments.keys() & self.models.keys()
        assert self.retired.keys() <= self.models.keys()
        assert len(self.keys) == len(self.keys_by_digest)
        assert len(self.tenants) == len(self.tenant_ids)
        assert len(self.spent) <= limits.KEYS_SPENT_MAX
