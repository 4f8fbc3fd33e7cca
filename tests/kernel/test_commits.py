"""Proposals become committed tokens: one record, one message to the sink, one watermark."""

from llmkernel.events import JournalRoom, Record, Send
from llmkernel.facts import TokensCommitted
from llmkernel.testkit.rig import Peer, Rig, spawn_of
from llmproto.errors import ErrorKind
from llmproto.execution import Drop, GaveBack, LoadFailed, Refused, Resync, Run, Stepped
from llmproto.operation import ThreadState
from llmproto.threads import END_ERROR, END_STOP, Committed, SinkOpen, ThreadSpawned


def boot(threads: int = 1) -> tuple[Rig, Peer, Peer, Peer, list[bytes]]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    client = rig.client()
    names = [rig.spawn(client, tokenizer, bytes((i,)) * 16) for i in range(threads)]
    return rig, client, tokenizer, rig.executor(), names


def row(rig: Rig, thread: bytes) -> int:
    residency = rig.thread(thread).residency
    assert residency is not None
    return residency


def test_one_step_is_one_record_one_message_and_one_watermark() -> None:
    rig, _, tokenizer, executor, threads = boot(3)
    residencies = [row(rig, thread) for thread in threads]
    executor.say(Stepped(threads, residencies, [3, 3, 3], [5, 6, 7], [0, 0, 0], 99))
    assert [e.fact for e in rig.effects if isinstance(e, Record)] == [
        TokensCommitted(threads, [3, 3, 3], [5, 6, 7])
    ]
    assert [(e.peer, e.message) for e in rig.effects if isinstance(e, Send)] == [
        (tokenizer.peer, Committed(threads, [3, 3, 3], [5, 6, 7], [0, 0, 0])),
        (executor.peer, Committed(threads, [3, 3, 3], [], [])),
    ]


def test_several_steps_of_a_thread_in_one_message() -> None:
    rig, _, _, executor, (thread,) = boot()
    residency = row(rig, thread)
    executor.say(Stepped([thread] * 2, [residency] * 2, [3, 4], [5, 6], [0, 0], 9))
    assert rig.thread(thread).tokens.tolist() == [1, 2, 3, 5, 6]
    assert executor.the(Committed).positions == [3, 4]


def test_a_duplicate_is_only_told_the_watermark() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    residency = row(rig, thread)
    for _ in range(2):
        executor.say(Stepped([thread], [residency], [3], [5], [0], 9))
    assert not [e for e in rig.effects if isinstance(e, Record)]
    assert tokenizer.said == []
    assert executor.said == [Committed([thread], [3], [], [])]


def test_a_gap_is_asked_for() -> None:
    rig, _, _, executor, (thread,) = boot()
    residency = row(rig, thread)
    executor.say(Stepped([thread], [residency], [5], [5], [0], 9))
    assert executor.the(Resync) == Resync(thread, residency, 3)
    assert rig.thread(thread).output_tokens == 0


def test_a_stale_residency_is_dropped() -> None:
    rig, _, _, executor, (thread,) = boot()
    residency = row(rig, thread)
    executor.say(Stepped([thread], [residency + 1], [3], [5], [0], 9))
    assert executor.said == [Drop([residency + 1])]
    executor.say(Stepped([b"?" * 8], [residency], [3], [5], [0], 9))
    assert executor.said == [Drop([residency])]


def test_a_residency_whose_tokens_differ_is_dropped_and_placed_anew() -> None:
    rig, _, _, executor, (thread,) = boot()
    residency = row(rig, thread)
    executor.say(Stepped([thread], [residency], [3], [5], [0], 9))
    executor.say(Stepped([thread], [residency], [3], [6], [0], 9))
    assert executor.the(Drop) == Drop([residency])
    assert row(rig, thread) != residency
    assert rig.thread(thread).tokens.tolist() == [1, 2, 3, 5]


def test_nothing_follows_an_end() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    residency = row(rig, thread)
    executor.say(Stepped([thread] * 2, [residency] * 2, [3, 4], [5, 6], [END_STOP, 0], 9))
    assert rig.thread(thread).tokens.tolist() == [1, 2, 3, 5]
    assert tokenizer.said == [Committed([thread], [3], [5], [END_STOP])]


def test_an_end_without_a_token() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    executor.say(Stepped([thread], [row(rig, thread)], [3], [None], [END_STOP], 9))
    assert tokenizer.said == [Committed([thread], [3], [None], [END_STOP])]
    assert rig.thread(thread).residency is None


def test_a_row_without_token_and_end_says_nothing() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    executor.say(Stepped([thread], [row(rig, thread)], [3], [None], [0], 9))
    assert tokenizer.said == []
    assert rig.thread(thread).state is ThreadState.RUNNING


def test_some_rows_of_a_step_count() -> None:
    rig, _, tokenizer, executor, (a, b) = boot(2)
    executor.say(Stepped([a, b], [row(rig, a), 1], [3, 3], [5, 6], [0, 0], 9))
    assert tokenizer.said == [Committed([a], [3], [5], [0])]
    assert executor.said == [Drop([1]), Committed([a], [3], [], [])]


def test_uneven_columns_change_nothing() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    executor.say(Stepped([thread], [row(rig, thread)], [3], [5, 6], [0], 9))
    assert executor.said == tokenizer.said == []
    residency = row(rig, thread)
    executor.say(Stepped([thread], [residency], [3], [5], [0], 9, scores=[]))
    assert executor.said == tokenizer.said == []


def test_a_full_journal_pauses_and_goes_on() -> None:
    rig, _, _, executor, (thread,) = boot()
    residency = row(rig, thread)
    rig.handle(JournalRoom(False))
    executor.say(Stepped([thread], [residency], [3], [5], [0], 9))
    assert executor.said == []
    rig.handle(JournalRoom(False))
    rig.handle(JournalRoom(True))
    assert executor.said == [Resync(thread, residency, 3)]


def test_given_back_is_placed_again_when_there_is_room() -> None:
    rig, _, _, executor, (a, b) = boot(2)
    residency = row(rig, b)
    executor.say(GaveBack([b], [residency], 0))
    assert rig.thread(b).state is ThreadState.QUEUED
    executor.say(Stepped([a], [row(rig, a)], [3], [5], [0], 0))
    assert rig.thread(b).state is ThreadState.QUEUED
    executor.say(Stepped([a], [row(rig, a)], [4], [5], [0], 10))
    assert executor.the(Run).thread == b


def test_refused_ends_with_the_executors_reason() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    executor.say(Refused(thread, row(rig, thread), ErrorKind.INVALID, "900 of 100 blocks"))
    assert tokenizer.said == [
        Committed([thread], [3], [None], [END_ERROR], errors=["INVALID: 900 of 100 blocks"])
    ]


def test_a_model_that_does_not_load_fails_its_threads_and_then_its_spawns() -> None:
    rig = Rig()
    tokenizer = rig.tokenizer()
    client = rig.client()
    thread = rig.spawn(client, tokenizer)
    child = rig.fork(rig.starts["executor-1"])
    executor = rig.service(child)
    executor.say(LoadFailed("m", ErrorKind.INVALID, "no such tensor"))
    row_ = rig.thread(thread)
    assert (row_.end, row_.error, row_.detail) == (END_ERROR, ErrorKind.INVALID, "no such tensor")
    tokenizer.say(spawn_of(b"l" * 16), cause=rig.ask(client, tokenizer))
    assert "no such tensor" in str(tokenizer.said)
    rig.exited(child, code=1)
    for _ in range(11):
        rig.wait(500)
        client.beat()
        tokenizer.beat()
    tokenizer.say(spawn_of(b"l" * 16), cause=rig.ask(client, tokenizer))
    assert isinstance(tokenizer.said[0], ThreadSpawned)


def test_a_sink_that_comes_back_gets_everything_again() -> None:
    rig, client, tokenizer, executor, (a, b) = boot(2)
    executor.say(Stepped([a], [row(rig, a)], [3], [5], [END_STOP], 9))
    rig.exited(rig.tokenizer_child, signal=9)
    executor.say(Stepped([b], [row(rig, b)], [3], [6], [0], 9))
    rig.tokenizer_child = rig.fork(rig.starts["tokenizer"])
    tokenizer = rig.service(rig.tokenizer_child)
    opened = [m for m in tokenizer.said if isinstance(m, SinkOpen)]
    assert [(m.thread, m.end, len(m.tokens) // 4) for m in opened] == [(a, END_STOP, 4), (b, 0, 4)]
    assert opened[0].session == client.session


def test_a_sink_is_sent_again_what_its_beat_lacks_but_not_at_once() -> None:
    rig, client, tokenizer, executor, (thread,) = boot()
    executor.say(Stepped([thread], [row(rig, thread)], [3], [5], [0], 9))
    assert tokenizer.beat(threads=(thread,), positions=(2,)) == []
    rig.wait(1250)
    client.beat()
    executor.beat(1, threads=(thread,), positions=(row(rig, thread),))
    (opened,) = tokenizer.beat(threads=(thread,), positions=(2,))
    assert isinstance(opened, SinkOpen)
    rig.wait(1250)
    assert tokenizer.beat(threads=(thread,), positions=(3,)) == []
