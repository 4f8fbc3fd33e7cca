"""Threads are admitted, paused, ended and forgotten."""

from typing import Any

import pytest
from llmkernel.events import JournalRoom, Record, Send, Start
from llmkernel.facts import ThreadAdmitted, ThreadEnded, ThreadsForgotten, decode
from llmkernel.testkit.rig import MS, Peer, Rig, executor_ready, numbered, spawn_of
from llmproto import limits, wire
from llmproto.base import Message
from llmproto.connection import Failed, Goodbye
from llmproto.errors import ErrorKind
from llmproto.execution import Drop, Run, Stepped
from llmproto.generation import Generate, Sampling, TokenScore
from llmproto.models import ModelEntry, ModelRegister
from llmproto.operation import DeviceRow, ProcessStarted, ThreadState
from llmproto.threads import (
    END_CANCEL,
    END_ERROR,
    END_LENGTH,
    END_STOP,
    Committed,
    Done,
    SinkAcked,
    SinkDrop,
    SinkOpen,
    ThreadCancel,
    ThreadEnd,
    ThreadResume,
    ThreadSpawned,
    ThreadSuspend,
)

KEY = b"k" * 16


def boot() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def step(rig: Rig, executor: Peer, thread: bytes, token: int | None = 7, end: int = 0) -> None:
    """The executor proposes the next token of a thread."""
    row = rig.thread(thread)
    assert row.residency is not None
    executor.say(Stepped([thread], [row.residency], [len(row.tokens)], [token], [end], 1000))


def refusal(answers: list[Message]) -> tuple[ErrorKind, str]:
    (failed,) = answers
    assert isinstance(failed, Failed), failed
    return failed.kind, failed.detail


def test_spawn_is_journaled_and_answered() -> None:
    rig, client, tokenizer = boot()
    cause = rig.ask(client, tokenizer)
    answers = tokenizer.say(spawn_of(KEY), cause=cause)
    thread = b"\0\0\0\1\0\0\0\1"
    assert answers == [ThreadSpawned(thread, False)]
    record, answer, start = [e for e in rig.effects if isinstance(e, Record | Send | Start)]
    assert isinstance(record, Record) and isinstance(record.fact, ThreadAdmitted)
    assert isinstance(answer, Send) and isinstance(start, Start)
    assert (record.fact.thread, record.fact.session, record.fact.key) == (
        thread,
        client.session,
        KEY,
    )
    assert start.spec.arguments[:4] == ["--model", "m", "--path", "/models/m"]


def test_the_same_key_finds_the_thread_that_goes_on() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    cause = rig.ask(client, tokenizer)
    opened, spawned = tokenizer.say(spawn_of(KEY), cause=cause)
    assert spawned == ThreadSpawned(thread, True)
    assert isinstance(opened, SinkOpen) and opened.thread == thread
    assert not [e for e in rig.effects if isinstance(e, Record)]


def test_the_same_key_of_another_session_moves_the_stream() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    other = rig.client()
    tokenizer.say(spawn_of(KEY), cause=rig.ask(other, tokenizer))
    assert tokenizer.the(SinkOpen).session == other.session
    assert rig.thread(thread).session == other.session
    assert rig.replayed().threads.by_id[thread].session == other.session


def test_the_same_key_with_other_content_is_invalid() -> None:
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer, KEY)
    answers = tokenizer.say(spawn_of(KEY, digest=b"e" * 16), cause=rig.ask(client, tokenizer))
    kind, detail = refusal(answers)
    assert kind is ErrorKind.INVALID and KEY.hex() in detail


def test_a_spent_key_starts_nothing() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    tokenizer.say(ThreadCancel(thread))
    tokenizer.say(SinkAcked([thread], [2], [True]))
    assert thread not in rig.kernel.tables.state.threads.by_id
    again = tokenizer.say(spawn_of(KEY), cause=rig.ask(client, tokenizer))
    assert again == [ThreadSpawned(thread, True)]
    other = tokenizer.say(spawn_of(KEY, digest=b"e" * 16), cause=rig.ask(client, tokenizer))
    assert refusal(other)[0] is ErrorKind.INVALID
    rig.restart()
    assert rig.kernel.tables.state.spent[(1, KEY, 0)].thread == thread


def test_a_spawn_without_its_request_is_unavailable() -> None:
    _, _, tokenizer = boot()
    kind, _ = refusal(tokenizer.say(spawn_of(KEY), cause=numbered(99)))
    assert kind is ErrorKind.UNAVAILABLE


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"model": "other"}, ["'other'", "m"]),
        ({"tokens": wire.pack_tokens([])}, ["0 bytes"]),
        ({"tokens": b"12345"}, ["5 bytes"]),
        ({"tokens": wire.pack_tokens([1, 1000])}, ["1000"]),
        ({"output_tokens_max": 2046}, ["3", "2046", "2049", "2048"]),
        (
            {
                "tokens": wire.pack_tokens([1]),
                "output_tokens_max": 2047,
                "sampling": Sampling(logprobs=20, prompt_logprobs=True),
                "model": "long",
            },
            [],
        ),
        (
            {
                "output_tokens_max": 9000,
                "sampling": Sampling(logprobs=20),
                "model": "long",
            },
            ["9000", "20"],
        ),
    ],
)
def test_admission_refuses_with_numbers(changes: dict[str, Any], numbers: list[str]) -> None:
    rig, client, tokenizer = boot()
    long = ModelEntry(
        name="long",
        path="/models/long",
        digest=b"l" * 16,
        architecture="Fake",
        context_tokens=10_000,
        vocabulary=1000,
        weight_bytes=1,
    )
    tokenizer.say(ModelRegister(long))
    answers = tokenizer.say(spawn_of(KEY, **changes), cause=rig.ask(client, tokenizer))
    if not numbers:
        assert isinstance(answers[0], ThreadSpawned)
        return
    kind, detail = refusal(answers)
    assert kind is ErrorKind.INVALID
    for number in numbers:
        assert number in detail, detail


def test_a_sink_open_with_all_admitted_scores_fits_a_message() -> None:
    rig, client, tokenizer = boot()
    sampling = Sampling(logprobs=20, prompt_logprobs=False)
    fits = 2000
    thread = rig.spawn(client, tokenizer, KEY, output_tokens_max=fits, sampling=sampling)
    row = rig.thread(thread)
    score = TokenScore(999, -0.1, [999] * 20, [-0.123] * 20)
    row.tokens.extend([999] * fits)
    assert row.scores is not None
    row.scores.extend([score] * fits)
    tokenizer.say(spawn_of(KEY), cause=rig.ask(client, tokenizer))
    sent = tokenizer.the(SinkOpen)
    assert sent.scores is not None and len(sent.scores) == fits
    assert len(wire.encode_body(sent)) < limits.MESSAGE_BYTES_MAX


def test_no_room_in_the_journal_is_exhausted() -> None:
    rig, client, tokenizer = boot()
    rig.handle(JournalRoom(False))
    kind, _ = refusal(tokenizer.say(spawn_of(KEY), cause=rig.ask(client, tokenizer)))
    assert kind is ErrorKind.EXHAUSTED


def test_a_model_that_fits_nowhere_is_invalid_with_both_sizes() -> None:
    rig = Rig(devices=(DeviceRow(name="cpu0", kind="cpu", cores=[0], memory_bytes=1 << 20),))
    tokenizer = rig.tokenizer()
    client = rig.client()
    kind, detail = refusal(tokenizer.say(spawn_of(KEY), cause=rig.ask(client, tokenizer)))
    assert kind is ErrorKind.INVALID
    assert str(2 << 20) in detail and str(1 << 20) in detail


def test_limits_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "THREADS_PER_TENANT_MAX", 1)
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer, KEY)
    kind, detail = refusal(tokenizer.say(spawn_of(b"l" * 16), cause=rig.ask(client, tokenizer)))
    assert kind is ErrorKind.EXHAUSTED and "2 threads of this tenant; 1" in detail


def test_run_commit_and_end_by_length() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY, output_tokens_max=2)
    executor = rig.executor()
    run = executor.the(Run)
    assert (run.thread, wire.unpack_tokens(run.tokens).tolist()) == (thread, [1, 2, 3])
    step(rig, executor, thread, 7)
    assert tokenizer.said == [Committed([thread], [3], [7], [0])]
    assert executor.said == [Committed([thread], [3], [], [])]
    step(rig, executor, thread, 8)
    assert tokenizer.said == [Committed([thread], [4], [8], [END_LENGTH])]
    assert rig.thread(thread).state is ThreadState.ENDED
    tokenizer.say(SinkAcked([thread], [4], [True]))
    assert len(rig.kernel.tables.state.threads) == 0


def test_a_prompt_is_scored_and_nothing_generated() -> None:
    rig, client, tokenizer = boot()
    sampling = Sampling(logprobs=0, prompt_logprobs=True)
    thread = rig.spawn(client, tokenizer, KEY, output_tokens_max=0, sampling=sampling)
    executor = rig.executor()
    run = executor.the(Run)
    assert run.prompt_scores and run.output_tokens_max == 0
    scores = [TokenScore(1, None), TokenScore(2, -1.0), TokenScore(3, -2.0)]
    executor.say(Stepped([thread], [run.residency], [3], [None], [END_LENGTH], 9, None, [scores]))
    assert tokenizer.said == [
        Committed([thread], [3], [None], [END_LENGTH], prompt_scores=[scores])
    ]
    again = rig.replayed().threads.by_id[thread]
    assert (again.prompt_scores, again.end) == (scores, END_LENGTH)
    assert rig.replayed().digest() == rig.kernel.tables.state.digest()


def test_a_token_beyond_the_length_only_ends() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY, output_tokens_max=0)
    executor = rig.executor()
    step(rig, executor, thread, 7)
    assert tokenizer.said == [Committed([thread], [3], [None], [END_LENGTH])]


def test_the_sink_ends_a_thread_and_cuts_it() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    executor = rig.executor()
    for token in (7, 8, 9):
        step(rig, executor, thread, token)
    residency = rig.thread(thread).residency
    assert residency is not None
    tokenizer.say(ThreadEnd(thread, 4))
    assert executor.said == [Drop([residency])]
    row = rig.thread(thread)
    assert (row.tokens.tolist(), row.end) == ([1, 2, 3, 7, 8], END_STOP)
    tokenizer.say(ThreadEnd(thread, 3))
    assert rig.thread(thread).tokens.tolist() == [1, 2, 3, 7]
    assert rig.replayed().digest() == rig.kernel.tables.state.digest()


def test_a_sink_cuts_what_its_executor_had_ended() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    executor = rig.executor()
    step(rig, executor, thread, 7)
    step(rig, executor, thread, 8, END_STOP)
    tokenizer.say(ThreadEnd(thread, 3))
    assert rig.thread(thread).tokens.tolist() == [1, 2, 3, 7]


def test_an_end_out_of_range_is_ignored() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    for at in (0, 1, 3, 100):
        tokenizer.say(ThreadEnd(thread, at))
    assert not rig.thread(thread).end


def test_an_acknowledged_end_stands_in_for_a_lost_thread_end() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    executor = rig.executor()
    step(rig, executor, thread, 7)
    tokenizer.say(SinkAcked([thread], [3], [True]))
    kinds = [type(e.fact) for e in rig.effects if isinstance(e, Record)]
    assert kinds == [ThreadEnded, ThreadsForgotten]


def test_cancel_ends_within_the_event() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    executor = rig.executor()
    residency = rig.thread(thread).residency
    assert residency is not None
    assert client.say(ThreadCancel(thread)) == [Done()]
    assert executor.said == [Drop([residency])]
    assert tokenizer.said == [Committed([thread], [3], [None], [END_CANCEL])]
    assert client.say(ThreadCancel(thread)) == [Done()]
    assert refusal(client.say(ThreadCancel(b"?" * 8)))[0] is ErrorKind.STALE


def test_credit_pauses_and_resumes() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY, output_tokens_max=1000)
    executor = rig.executor()
    for _ in range(limits.CREDIT_TOKENS - 1):
        step(rig, executor, thread)
    assert rig.thread(thread).state is ThreadState.RUNNING
    step(rig, executor, thread)
    assert rig.thread(thread).state is ThreadState.PAUSED
    assert isinstance(executor.said[-1], Drop)
    consumed = 2 + limits.CREDIT_TOKENS // 2
    tokenizer.say(SinkAcked([thread], [consumed - 1], [False]))
    assert rig.thread(thread).state is ThreadState.PAUSED
    tokenizer.say(SinkAcked([thread], [consumed], [False]))
    assert rig.thread(thread).state is ThreadState.RUNNING
    assert len(executor.the(Run).tokens) // 4 == 3 + limits.CREDIT_TOKENS


def test_suspend_and_resume() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    executor = rig.executor()
    client.say(ThreadSuspend(thread))
    assert isinstance(executor.the(Drop), Drop)
    assert rig.thread(thread).state is ThreadState.SUSPENDED
    assert rig.replayed().threads.by_id[thread].suspended
    client.say(ThreadResume(thread))
    assert rig.thread(thread).state is ThreadState.RUNNING


def test_a_deadline_ends_with_the_time_it_had() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY, deadline_ms=1000)
    client.beat()
    rig.wait(750)
    assert not rig.thread(thread).end
    rig.wait(250)
    row = rig.thread(thread)
    assert (row.end, row.error) == (END_ERROR, ErrorKind.DEADLINE)
    assert "1000 ms" in row.detail


def test_a_goodbye_cancels_and_forgets_what_is_not_resumable() -> None:
    rig, client, tokenizer = boot()
    kept = rig.spawn(client, tokenizer, KEY, resumable=True)
    gone = rig.spawn(client, tokenizer, b"l" * 16)
    client.say(Goodbye())
    assert list(rig.kernel.tables.state.threads.by_id) == [kept]
    assert tokenizer.beat(threads=(kept, gone), positions=(2, 2)) == [SinkDrop([gone])]


def keep_alive(rig: Rig, peers: list[Peer], ms: int) -> None:
    for _ in range(ms // 500):
        rig.wait(500)
        for peer in peers:
            peer.beat()


def test_a_lost_reader_lingers_and_is_then_cancelled() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    keep_alive(rig, [tokenizer], limits.SESSION_LEASE_MS + limits.LINGER_MS - 1000)
    assert not rig.thread(thread).end
    keep_alive(rig, [tokenizer], 2000)
    assert thread not in rig.kernel.tables.state.threads.by_id
    ends = [fact for fact in map(decode, rig.journal) if isinstance(fact, ThreadEnded)]
    assert [(end.end, end.error) for end in ends] == [(END_CANCEL, ErrorKind.DEADLINE)]


def test_a_reader_that_comes_back_finds_its_thread() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY)
    keep_alive(rig, [tokenizer], 10_000)
    assert rig.thread(thread).lingering_ns is not None
    client.hello(rig.config.operator_proof)
    assert rig.thread(thread).lingering_ns is None


def test_an_ended_resumable_thread_is_kept_until_its_time_is_over() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY, resumable=True)
    client.say(ThreadCancel(thread))
    client.say(Goodbye())
    keep_alive(rig, [tokenizer], limits.LINGER_MS + 1000)
    assert thread in rig.kernel.tables.state.threads.by_id
    rig.now_ns += limits.RESUME_MS_MAX * MS
    rig.wait(250)
    assert thread not in rig.kernel.tables.state.threads.by_id


def test_a_generate_is_passed_on_with_source_and_tenant() -> None:
    _, client, tokenizer = boot()
    client.say(Generate(key=KEY, prompt="x"), target="tokenizer")
    ((header, message),) = tokenizer.heard
    assert (header.source, header.tenant) == (client.session, 1)
    assert message == Generate(key=KEY, prompt="x")


def test_credit_starts_anew_with_a_kernel_and_with_a_sink() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, KEY, output_tokens_max=1000)
    executor = rig.executor()
    for _ in range(limits.CREDIT_TOKENS):
        step(rig, executor, thread)
    assert rig.thread(thread).state is ThreadState.PAUSED
    children = (rig.tokenizer_child, rig.executor_child)
    rig.restart(children=children)
    assert rig.thread(thread).state is ThreadState.QUEUED
    executor.greet(rig.executor_child)
    executor.say(executor_ready("m"))
    for _ in range(limits.CREDIT_TOKENS):
        step(rig, executor, thread)
    assert rig.thread(thread).state is ThreadState.PAUSED
    tokenizer.greet(rig.tokenizer_child)
    tokenizer.say(ProcessStarted())
    assert tokenizer.the(SinkOpen).acked == 2
    assert rig.thread(thread).state is ThreadState.RUNNING
