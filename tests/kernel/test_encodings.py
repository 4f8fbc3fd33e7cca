"""Threads of encoders: admitted by the model's task, ended by their vectors, computed again when
those are lost."""

from typing import Any

import msgspec
import pytest
from llmkernel.events import Forward, JournalRoom, Record
from llmkernel.facts import ThreadsForgotten
from llmkernel.testkit.rig import MODEL, Peer, Rig, spawn_of
from llmproto import wire
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.encoding import Vectors
from llmproto.errors import ErrorKind
from llmproto.execution import Drop, Refused, Resync, Run
from llmproto.models import ModelRegister
from llmproto.operation import ThreadState
from llmproto.threads import (
    END_ERROR,
    Committed,
    SinkAcked,
    SinkDrop,
    SinkOpen,
    ThreadCancel,
    ThreadSpawned,
)

ENCODER = msgspec.structs.replace(MODEL, name="bert", digest=b"e" * 16, task="embed")
KEY = b"k" * 16
BLOB = bytes(range(24))


def boot(threads: int = 1) -> tuple[Rig, Peer, Peer, Peer, list[bytes]]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    tokenizer.say(ModelRegister(ENCODER))
    client = rig.client()
    names = [spawn(rig, client, tokenizer, bytes((i,)) * 16) for i in range(threads)]
    return rig, client, tokenizer, rig.executor(), names


def spawn(rig: Rig, client: Peer, tokenizer: Peer, key: bytes = KEY) -> bytes:
    return rig.spawn(
        client, tokenizer, key, model="bert", lengths=[1, 2], output_tokens_max=0, pair_at=[1, 1]
    )


def row(rig: Rig, thread: bytes) -> int:
    residency = rig.thread(thread).residency
    assert residency is not None
    return residency


def vectors(rig: Rig, threads: list[bytes]) -> Vectors:
    residencies = [row(rig, thread) for thread in threads]
    count = len(threads)
    return Vectors(threads, residencies, [24 * i for i in range(count)], [24] * count, 3)


def refused(rig: Rig, client: Peer, tokenizer: Peer, key: bytes = KEY, **changes: Any) -> Failed:
    cause = rig.ask(client, tokenizer)
    tokenizer.say(spawn_of(key, **changes), cause=cause)
    return tokenizer.the(Failed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": [3], "output_tokens_max": 0}, "its task is 'generate'"),
        ({"model": "bert"}, "its task is 'embed'"),
        ({"model": "bert", "lengths": [1], "output_tokens_max": 0}, "1 tokens together, 3 tokens"),
        ({"model": "bert", "lengths": [1, 2]}, "8 are to be generated"),
        (
            {
                "model": "bert",
                "lengths": [1, 2049],
                "tokens": wire.pack_tokens([1] * 2050),
                "output_tokens_max": 0,
            },
            "input 1 has 2049 tokens; 'bert' takes 2048",
        ),
        (
            {"model": "bert", "lengths": [1, 2], "output_tokens_max": 0, "pair_at": [1]},
            "1 places for 2 inputs",
        ),
        (
            {"model": "bert", "lengths": [1, 2], "output_tokens_max": 0, "pair_at": [2, 0]},
            "one outside",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(changes: dict[str, Any], says: str) -> None:
    rig, client, tokenizer = idle()
    failed = refused(rig, client, tokenizer, **changes)
    assert failed.kind is ErrorKind.INVALID
    assert says in failed.detail


def idle() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    tokenizer.say(ModelRegister(ENCODER))
    return rig, rig.client(), tokenizer


def test_more_inputs_than_a_context_are_no_long_input() -> None:
    rig, client, tokenizer = idle()
    rig.spawn(
        client,
        tokenizer,
        model="bert",
        tokens=wire.pack_tokens([1] * 4096),
        lengths=[2048, 2048],
        output_tokens_max=0,
    )


def test_it_runs_with_its_lengths() -> None:
    rig, client, tokenizer, executor, _ = boot()
    cause = rig.ask(client, tokenizer)
    fields: dict[str, Any] = {
        "model": "bert",
        "lengths": [1, 2],
        "output_tokens_max": 0,
        "pair_at": [1, 1],
    }
    tokenizer.say(spawn_of(b"z" * 16, **fields), cause=cause)
    run = executor.the(Run)
    assert (run.lengths, run.pair_at, run.output_tokens_max) == ([1, 2], [1, 1], 0)


def test_vectors_end_their_threads_and_go_to_the_sink_with_their_blob() -> None:
    rig, _, tokenizer, executor, threads = boot(2)
    said = vectors(rig, threads)
    say(executor, said, BLOB * 2)
    assert [e.fact for e in rig.effects if isinstance(e, Record)] == [
        ThreadsForgotten(threads, rig.now_ns)
    ]
    (forward,) = [e for e in rig.effects if isinstance(e, Forward)]
    assert forward.peer == tokenizer.peer
    assert forward.header.blobs == [48]
    assert forward.body == (wire.encode_body(said), BLOB * 2)
    assert executor.said == [Drop(said.residencies)]
    assert not len(rig.kernel.tables.state.threads)


def test_only_rows_of_current_residencies_go_on() -> None:
    rig, _, tokenizer, executor, (a, b) = boot(2)
    said = vectors(rig, [a, b])
    stale = msgspec.structs.replace(said, residencies=[1, said.residencies[1]])
    say(executor, stale, BLOB * 2)
    assert tokenizer.said == [Vectors([b], [said.residencies[1]], [24], [24], 3)]
    assert executor.said == [Drop([1, said.residencies[1]])]
    assert rig.thread(a).state is ThreadState.RUNNING
    say(executor, said, BLOB * 2)
    assert tokenizer.said == [Vectors([a], [said.residencies[0]], [0], [24], 3)]


def test_uneven_columns_or_no_blob_change_nothing() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    said = vectors(rig, [thread])
    say(executor, msgspec.structs.replace(said, sizes=[]), BLOB)
    executor.say(said)
    assert tokenizer.said == executor.said == []
    assert rig.thread(thread).state is ThreadState.RUNNING


def test_vectors_of_somebody_who_is_no_ready_executor_are_ignored() -> None:
    rig, _, tokenizer, _, (thread,) = boot()
    said = vectors(rig, [thread])
    client = rig.client()
    say(client, said, BLOB)
    assert client.the(Failed).kind is ErrorKind.DENIED
    assert rig.thread(thread).state is ThreadState.RUNNING
    assert tokenizer.said == []


def test_a_full_journal_asks_for_them_again() -> None:
    rig, _, tokenizer, executor, (thread,) = boot()
    said = vectors(rig, [thread])
    rig.handle(JournalRoom(False))
    say(executor, said, BLOB)
    assert executor.said == tokenizer.said == []
    rig.handle(JournalRoom(True))
    assert executor.said == [Resync(thread, said.residencies[0], 3)]


def test_without_a_sink_they_are_lost_and_the_key_is_computed_again() -> None:
    rig, client, tokenizer, executor, (thread,) = boot()
    said = vectors(rig, [thread])
    rig.exited(rig.tokenizer_child)
    say(executor, said, BLOB)
    assert not [e for e in rig.effects if isinstance(e, Forward)]
    rig.wait(100)
    tokenizer = rig.service(rig.fork(rig.starts["tokenizer"]))
    again = spawn(rig, client, tokenizer, bytes(16))
    assert again != thread
    assert rig.thread(again).state is ThreadState.RUNNING


def test_the_same_key_with_other_content_is_refused() -> None:
    rig, client, tokenizer, executor, (thread,) = boot()
    say(executor, vectors(rig, [thread]), BLOB)
    fields: dict[str, Any] = {"model": "bert", "lengths": [1, 2], "output_tokens_max": 0}
    failed = refused(rig, client, tokenizer, key=bytes(16), digest=b"o" * 16, **fields)
    assert failed.kind is ErrorKind.INVALID
    assert "was used for another request" in failed.detail


def test_a_living_one_goes_on_and_is_not_opened_at_its_sink() -> None:
    rig, client, tokenizer, executor, (thread,) = boot()
    cause = rig.ask(client, tokenizer)
    fields: dict[str, Any] = {
        "model": "bert",
        "lengths": [1, 2],
        "output_tokens_max": 0,
        "pair_at": [1, 1],
    }
    tokenizer.say(spawn_of(bytes(16), **fields), cause=cause)
    assert tokenizer.said == [ThreadSpawned(thread, True)]
    rig.wait(1500)
    assert tokenizer.beat(1) == []
    say(executor, vectors(rig, [thread]), BLOB)
    assert isinstance(tokenizer.said[0], Vectors)
    assert tokenizer.beat(2, threads=(thread,), positions=(2,)) == [SinkDrop([thread])]


def test_one_that_failed_says_so_once_under_its_key() -> None:
    rig, client, tokenizer, executor, (thread,) = boot()
    executor.say(Refused(thread, row(rig, thread), ErrorKind.INVALID, "too wide"))
    assert isinstance(tokenizer.said[0], Committed)
    failed = refused(
        rig, client, tokenizer, key=bytes(16), model="bert", lengths=[1, 2], output_tokens_max=0
    )
    assert (failed.kind, failed.detail) == (ErrorKind.INVALID, "too wide")
    assert not len(rig.kernel.tables.state.threads)


def test_one_that_kills_its_executor_ends_and_its_neighbour_is_computed() -> None:
    """The two are tried in halves: the good one is cleared by its vectors, the bad one dies twice
    alone."""
    rig, _, _, _, (bad, good) = boot(2)
    suspects = ((bad, 1), (good, 0))
    for died in (suspects, ((bad, 1),)):
        rig.exited(rig.executor_child, suspects=died)
        rig.wait(500)
        executor = rig.executor()
        assert rig.thread(bad).residency is not None
        assert rig.thread(good).residency is None
    rig.exited(rig.executor_child, suspects=((bad, 1),))
    assert (rig.thread(bad).end, rig.thread(bad).error) == (END_ERROR, ErrorKind.INTERNAL)
    rig.wait(500)
    executor = rig.executor()
    say(executor, vectors(rig, [good]), BLOB)
    assert list(rig.kernel.tables.state.threads.by_id) == [bad]
    assert rig.kernel.tables.poisons["bert"].trials == []


def test_a_cancelled_one_is_told_and_dropped() -> None:
    rig, client, tokenizer, executor, (thread,) = boot()
    residency = row(rig, thread)
    client.say(ThreadCancel(thread))
    assert executor.said == [Drop([residency])]
    assert isinstance(tokenizer.said[0], Committed)
    rig.wait(1500)
    opened = tokenizer.beat(1)
    assert [type(each) for each in opened] == [SinkOpen]
    tokenizer.say(SinkAcked([thread], [2], [True]))
    assert not len(rig.kernel.tables.state.threads)


def test_it_survives_the_kernel() -> None:
    rig, _, _, _, (thread,) = boot()
    rig.restart()
    assert rig.thread(thread).lengths == [1, 2]
    assert rig.thread(thread).pair_at == [1, 1]
    assert rig.thread(thread).state is ThreadState.QUEUED


def say(peer: Peer, message: Message, blob: bytes) -> None:
    peer.say(message, blobs=(blob,))
