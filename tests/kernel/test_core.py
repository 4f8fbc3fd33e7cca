"""The core as a whole: poison among neighbours, two sinks, what kernels say after a restart."""

from llmkernel.events import Log, PeerFull, PeerLost, Rejected
from llmkernel.testkit.rig import SERVICE_PROOF, Peer, Rig, spawn_of
from llmproto import limits
from llmproto.connection import Unknown
from llmproto.errors import ErrorKind
from llmproto.execution import ExecutorReady, Run, Stepped
from llmproto.generation import Generate, Sampling, TokenScore
from llmproto.operation import ProcessStarted, ThreadState
from llmproto.threads import END_ERROR, END_LENGTH, Committed, SinkOpen, ThreadSpawned

GUILTY = 13


class Machine:
    """An executor in a rig that steps all that it is given, and dies of some of it."""

    def __init__(self, threads: int, guilty: tuple[frozenset[int], ...]) -> None:
        self.rig = Rig()
        self.tokenizer = self.rig.tokenizer()
        self.client = self.rig.client()
        self.names = [
            self.rig.spawn(self.client, self.tokenizer, number.to_bytes(16), output_tokens_max=3)
            for number in range(threads)
        ]
        self.guilty = [frozenset(self.names[number] for number in group) for group in guilty]
        self.deaths = 0
        self.executor = self.rig.executor()

    def living(self) -> list[bytes]:
        return [name for name in self.names if not self.rig.thread(name).end]

    def turn(self, *, kill: bool = False) -> None:
        """One step of everything that is resident, or its death."""
        rig = self.rig
        batch = [n for n in self.living() if rig.thread(n).state is ThreadState.RUNNING]
        positions = [len(rig.thread(name).tokens) for name in batch]
        guilty = any(group <= set(batch) for group in self.guilty)
        if kill or guilty:
            self.deaths += not kill
            suspects = tuple(zip(batch, positions))
            rig.exited(rig.executor_child, signal=9 if kill else 11, suspects=suspects)
            self.executor = rig.executor()
            return
        residencies = [rig.thread(name).residency or 0 for name in batch]
        count = len(batch)
        self.executor.say(Stepped(batch, residencies, positions, [7] * count, [0] * count, 999))

    def run(self) -> None:
        turns = 0
        while self.living():
            self.turn()
            turns += 1
            assert turns < 200


def test_the_guilty_thread_ends_with_a_typed_error_and_31_neighbours_finish() -> None:
    machine = Machine(32, (frozenset({GUILTY}),))
    machine.run()
    rows = [machine.rig.thread(name) for name in machine.names]
    assert [number for number, row in enumerate(rows) if row.end == END_ERROR] == [GUILTY]
    assert rows[GUILTY].error is ErrorKind.INTERNAL
    assert "position 3 ended its executor 2 times" in rows[GUILTY].detail
    assert all(row.end == END_LENGTH for row in rows if row is not rows[GUILTY])
    assert machine.deaths == 5 + limits.STRIKES_MAX
    process = machine.rig.kernel.tables.processes.by_name["executor-1"]
    assert process.deaths_ns == []  # attributed


def test_a_pair_that_crashes_only_together_finishes_apart() -> None:
    machine = Machine(8, (frozenset({2, 5}),))
    machine.run()
    assert all(machine.rig.thread(name).end == END_LENGTH for name in machine.names)


def test_fifty_innocent_kills_strike_nobody() -> None:
    machine = Machine(8, ())
    for _ in range(50):
        machine.turn(kill=True)
    assert all(machine.rig.thread(name).strikes == 0 for name in machine.names)
    machine.run()
    assert all(machine.rig.thread(name).end == END_LENGTH for name in machine.names)


def test_kills_during_the_search_change_nothing() -> None:
    machine = Machine(8, (frozenset({3}),))
    turns = 0
    while machine.living():
        machine.turn(kill=turns % 3 == 1)
        turns += 1
        assert turns < 300
    ends = [machine.rig.thread(name).end for name in machine.names]
    assert ends == [END_LENGTH] * 3 + [END_ERROR] + [END_LENGTH] * 4


def boot() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def test_each_sink_gets_its_own_rows_and_scores_stay_with_their_threads() -> None:
    rig, client, tokenizer = boot()
    other = rig.peer("tokenizer")
    other.hello(SERVICE_PROOF)
    other.say(ProcessStarted())
    sampling = Sampling(logprobs=0, prompt_logprobs=True)
    a = rig.spawn(client, tokenizer, b"a" * 16, sampling=sampling)
    b = rig.spawn(client, tokenizer, b"b" * 16)
    rig.thread(b).sink = "elsewhere"  # a sink of another role; none is up
    executor = rig.executor()
    residencies = [rig.thread(name).residency or 0 for name in (a, b)]
    score = TokenScore(7, -0.5)
    prompt = [TokenScore(1, None)]
    step = Stepped([a, b], residencies, [3, 3], [7, 8], [0, 0], 9, [score, None], [prompt, None])
    executor.say(step)
    assert tokenizer.said == [Committed([a], [3], [7], [0], [score], None, [prompt])]
    replayed = rig.replayed().threads.by_id[a]
    assert (replayed.scores, replayed.prompt_scores) == ([score], prompt)
    again = Stepped([a, b], [residencies[0], 1], [4, 4], [7, 8], [0, 0], 9, [score, None], None)
    executor.say(again)
    assert tokenizer.said == [Committed([a], [4], [7], [0], [score])]
    assert rig.replayed().threads.by_id[a].scores == [score, score]


def test_peers_that_are_gone_or_do_not_read() -> None:
    rig, client, _ = boot()
    rig.handle(PeerFull(client.peer))
    assert [type(effect) for effect in rig.effects] == [Log]
    for peer in (b"nobody", client.peer):
        rig.handle(PeerLost(peer))
        rig.handle(PeerFull(b"nobody"))
        assert rig.effects == []
    assert rig.kernel.tables.sessions.by_peer[client.peer].lost


def test_executors_messages_before_readiness_are_ignored() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    executor = rig.service(rig.fork(rig.starts["executor-1"]))
    assert executor.say(Stepped([thread], [1], [3], [7], [0], 9)) == []
    executor.say(ExecutorReady("m", b"m" * 16, 2048, 99, 16, 4))
    assert executor.the(Run).thread == thread


def test_a_restarted_kernel_knows_nobody_and_forgets_nothing() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    children = (rig.tokenizer_child,)
    rig.restart(children=children)
    assert client.beat() == [Unknown(2)]
    tokenizer.greet(rig.tokenizer_child)
    tokenizer.say(ProcessStarted())
    assert tokenizer.the(SinkOpen).thread == thread
    client.hello(rig.config.operator_proof)
    client.say(Generate(key=b"k" * 16, prompt="x"), target="tokenizer", id=b"again" + bytes(11))
    ((header, _),) = tokenizer.heard
    tokenizer.say(spawn_of(b"k" * 16), cause=header.id)
    assert tokenizer.the(ThreadSpawned) == ThreadSpawned(thread, True)


def test_the_first_rejection_ends_no_thread() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    rig.restart(rejected=(Rejected(b"x" * 16, threads=(thread, b"?" * 8)),))
    assert not rig.thread(thread).end
    rig.restart(rejected=(Rejected(b"x" * 16, threads=(thread, b"?" * 8), deaths=2),))
    assert rig.thread(thread).end == END_ERROR
