"""The journal says all that is durable: replayed, compacted, cut off in the middle."""

from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmkernel.events import Record
from llmkernel.facts import (
    AnyFact,
    AttemptBegun,
    AttemptLost,
    Booted,
    CheckpointTaken,
    JobAdmitted,
    JobChanged,
    JobOver,
    JobsForgotten,
    KeyAdded,
    KeyRemoved,
    KeySpent,
    ModelRegistered,
    ModelRemoved,
    StepsReported,
    TenantSeen,
    ThreadAdmitted,
    ThreadChanged,
    ThreadEnded,
    ThreadsForgotten,
    TokensCommitted,
    decode,
    encode,
)
from llmkernel.state import State
from llmkernel.testkit.rig import MODEL, MS, Rig
from llmproto import limits
from llmproto.errors import ErrorKind
from llmproto.generation import Sampling, TokenScore
from llmproto.jobs import JobKind, JobState, StepReport

THREADS = st.integers(0, 3)
SECOND = 1_000_000_000


def admitted(number: int, key: int, now_ns: int, *, scored: bool) -> ThreadAdmitted:
    return ThreadAdmitted(
        thread=number.to_bytes(8),
        tenant=1,
        session=bytes(16),
        key=key.to_bytes(16),
        index=0,
        digest=bytes(16),
        model="m",
        tokens=b"\1\0\0\0",
        prompt_tokens=1,
        output_tokens_max=5,
        sampling=Sampling(logprobs=0 if scored else None),
        sink="tokenizer",
        sink_state=b"s",
        service_class=1,
        priority=0,
        deadline_ns=None,
        resumable=False,
        admitted_ns=now_ns,
    )


class Life:
    """Makes facts that a kernel could write, from numbers; the state tells what is possible."""

    def __init__(self) -> None:
        self.state = State()
        self.now_ns = SECOND
        self.made = 0
        self.journal: list[bytes] = []

    def record(self, fact: AnyFact) -> None:
        record = encode(fact)
        self.journal.append(record)
        self.state.apply(decode(record))
        self.state.check()

    def act(self, what: int, which: int) -> None:
        self.now_ns += SECOND
        state = self.state
        threads = list(state.threads)
        thread = threads[which % len(threads)] if threads else None
        match what:
            case 0 | 1:
                self.made += 1
                self.record(admitted(self.made, self.made, self.now_ns, scored=bool(which % 2)))
            case 2 | 3 | 4 if thread is not None and not thread.end and thread.output_tokens < 5:
                scored = thread.scores is not None
                score: list[TokenScore | None] | None = [TokenScore(7, -0.5)] if scored else None
                fact = TokensCommitted([thread.id], [len(thread.tokens)], [which], score)
                self.record(fact)
            case 5 if thread is not None:
                length = thread.prompt_tokens + which % (thread.output_tokens + 1)
                self.record(
                    ThreadEnded(thread.id, 4, length, self.now_ns, ErrorKind.DEADLINE, "late")
                )
            case 6 if thread is not None and thread.end:
                self.record(ThreadsForgotten([thread.id], self.now_ns))
            case 7 if thread is not None:
                self.record(ThreadChanged(thread.id, bytes((which,)) * 16, which > 1, 2, -1))
            case 8:
                self.record(ModelRegistered(MODEL, default=bool(which % 2)))
            case 9:
                self.record(ModelRemoved("m"))
            case 10 if str(which) not in state.keys:
                self.made += 1
                digest = self.made.to_bytes(32)
                self.record(KeyAdded(str(which), digest, operator=False, created_s=self.made))
            case 11:
                self.record(KeyRemoved(str(which)))
            case 12 if f"t{which}" not in state.tenant_ids:
                self.record(TenantSeen(len(state.tenants) + 1, f"t{which}"))
            case 13:
                self.record(Booted(state.epoch + 1, self.now_ns, 0))
            case 14:
                self.now_ns += limits.RESUME_MS_MAX * MS // 2
            case 15 if len(state.jobs) < 4:
                self.made += 1
                self.record(job(self.made, self.now_ns))
            case 16 | 17 | 18 | 19 | 20:
                self.work(what, which)
            case _:
                pass

    def work(self, what: int, which: int) -> None:
        """Something happens to a job, if there is one."""
        jobs = list(self.state.jobs)
        if not jobs:
            return
        job = jobs[which % len(jobs)]
        match what:
            case 16 if job.end is None:
                self.record(AttemptBegun(job.id, job.attempt + 1))
                self.record(AttemptLost(job.id, job.deaths + which % 2, job.losses + 1))
            case 17 if job.end is None:
                reports = [StepReport(job.step + n, n / 3) for n in range(1, 2 + which)]
                self.record(StepsReported(job.id, reports, 99))
            case 18 if job.end is None:
                step = max(job.checkpoint_step, job.step - which % 2)
                self.record(CheckpointTaken(job.id, step.to_bytes(32), step, 8 * step))
            case 19:
                self.record(JobChanged(job.id, which > 1, which, -1))
            case _ if job.end is None:
                self.record(JobOver(job.id, JobState.FAILED, self.now_ns, error=ErrorKind.INVALID))
            case _:
                self.record(JobsForgotten([job.id], self.now_ns))


def job(number: int, now_ns: int) -> JobAdmitted:
    return JobAdmitted(
        job=number.to_bytes(8),
        tenant=1,
        key=number.to_bytes(16),
        kind=JobKind.TRAIN,
        name="bot",
        recipe=b"r",
        processes=1,
        memory_bytes=1,
        cores=None,
        device=None,
        service_class=3,
        priority=0,
        admitted_ns=now_ns,
    )


@pytest.fixture(autouse=True)
def few_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOB_REPORTS_KEPT", 3)


def replayed(records: list[bytes]) -> State:
    state = State()
    for record in records:
        state.apply(decode(record))
    state.check()
    return state


STEPS = st.lists(st.tuples(st.integers(0, 20), THREADS), max_size=40)


@given(STEPS)
def test_the_journal_replayed_is_the_live_state(steps: list[tuple[int, int]]) -> None:
    life = Life()
    for step in steps:
        life.act(*step)
    assert replayed(life.journal).digest() == life.state.digest()


@given(STEPS)
def test_live_facts_say_everything(steps: list[tuple[int, int]]) -> None:
    life = Life()
    for step in steps:
        life.act(*step)
    assert replayed([encode(fact) for fact in life.state.live()]).digest() == life.state.digest()


@given(STEPS, STEPS, st.lists(st.integers(0, 3), max_size=60), st.integers(0, 100))
@settings(max_examples=300)
def test_compaction_beside_new_facts_and_a_crash_while_old_ones_are_dropped(
    before: list[tuple[int, int]],
    during: list[tuple[int, int]],
    pace: list[int],
    dropped: int,
) -> None:
    life = Life()
    for step in before:
        life.act(*step)
    old = len(life.journal)
    live: Iterator[AnyFact] = life.state.live()
    coming = iter(during)
    done = False
    for count in [*pace, 10_000]:
        for _ in range(count):
            fact = next(live, None)
            if fact is None:
                done = True
                break
            life.journal.append(encode(fact))
        for what, which in islice(coming, 1):
            life.act(what, which)
    assert done
    wanted = life.state.digest()
    # Segments are dropped oldest first; a crash leaves any suffix of them.
    for cut in (0, min(dropped, old), old):
        assert replayed(life.journal[cut:]).digest() == wanted, cut


def test_facts_about_unknown_threads_are_left_overs() -> None:
    state = State()
    for fact in (
        TokensCommitted([b"t" * 8], [1], [2]),
        ThreadEnded(b"t" * 8, 1, 1, 5),
        ThreadChanged(b"t" * 8, bytes(16), False, 1, 0),
        ThreadsForgotten([b"t" * 8], 6),
        ModelRemoved("x"),
        KeyRemoved("x"),
        AttemptBegun(b"j" * 8, 1),
        AttemptLost(b"j" * 8, 1, 1),
        StepsReported(b"j" * 8, [StepReport(1, 0.5)], 2),
        CheckpointTaken(b"j" * 8, bytes(32), 1, 1),
        JobChanged(b"j" * 8, True, 1, 1),
        JobOver(b"j" * 8, JobState.DONE, 5),
        JobsForgotten([b"j" * 8], 6),
    ):
        state.apply(fact)
    state.check()
    assert (len(state.threads), len(state.spent), state.now_ns) == (0, 0, 6)


def test_spent_keys_are_bounded_and_end_in_order_of_time() -> None:
    state = State()
    for number in (3, 1, 2):
        state.apply(KeySpent(1, number.to_bytes(16), 0, bytes(16), number * SECOND))
    state.apply(ThreadsForgotten([], 2 * SECOND))
    assert [spent.until_ns for spent in state.spent.values()] == [3 * SECOND]
    for number in range(limits.KEYS_SPENT_MAX + 5):
        state.apply(KeySpent(2, number.to_bytes(16), 0, bytes(16), 9 * SECOND + number))
    state.apply(ThreadsForgotten([], 3 * SECOND - 1))
    state.check()
    assert len(state.spent) == limits.KEYS_SPENT_MAX
    assert (2, (0).to_bytes(16), 0) not in state.spent


def test_a_kernel_counts_on_where_the_last_one_stopped() -> None:
    rig = Rig()
    tokenizer = rig.tokenizer()
    rig.spawn(rig.client(), tokenizer)
    before = rig.kernel.tables.state.digest()
    assert replayed(rig.journal).digest() == before
    rig.restart()
    booted = [e.fact for e in rig.effects if isinstance(e, Record)]
    assert booted == [Booted(2, rig.now_ns, rig.now_ns)]
    assert rig.kernel.tables.state.epoch == 2
