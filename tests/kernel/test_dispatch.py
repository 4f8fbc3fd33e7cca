"""Waiting threads are placed; what executors hold is reconciled."""

from llmkernel.events import Start
from llmkernel.testkit.rig import Peer, Rig, executor_ready
from llmproto.execution import Drop, Resync, Run, Stepped
from llmproto.operation import ThreadState
from llmproto.threads import ThreadCancel


def boot() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def key(number: int) -> bytes:
    return bytes((number,)) * 16


def residency(rig: Rig, thread: bytes) -> int:
    found = rig.thread(thread).residency
    assert found is not None
    return found


def test_the_first_thread_of_a_model_starts_its_executor_once() -> None:
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer, key(1))
    assert [e.spec.name for e in rig.effects if isinstance(e, Start)] == ["executor-1"]
    rig.spawn(client, tokenizer, key(2))
    assert not [e for e in rig.effects if isinstance(e, Start)]


def test_urgent_threads_first_and_no_more_than_fit() -> None:
    rig, client, tokenizer = boot()
    slow = rig.spawn(client, tokenizer, key(1), service_class=2)
    nice = rig.spawn(client, tokenizer, key(2), priority=-1)
    fast = rig.spawn(client, tokenizer, key(3), service_class=0)
    executor = rig.executor(residents_max=2)
    assert [m.thread for m in executor.said if isinstance(m, Run)] == [fast, nice]
    assert rig.thread(slow).state is ThreadState.QUEUED
    client.say(ThreadCancel(fast))
    assert executor.the(Run).thread == slow


def test_a_lower_class_makes_room() -> None:
    rig, client, tokenizer = boot()
    slow = rig.spawn(client, tokenizer, key(1), service_class=2)
    executor = rig.executor(residents_max=1)
    stay = residency(rig, slow)
    fast = rig.spawn(client, tokenizer, key(2), service_class=1)
    assert executor.the(Drop) == Drop([stay])
    assert executor.the(Run).thread == fast
    assert rig.thread(slow).state is ThreadState.QUEUED


def test_blocks_bound_what_is_placed() -> None:
    rig, client, tokenizer = boot()
    a = rig.spawn(client, tokenizer, key(1))
    b = rig.spawn(client, tokenizer, key(2))
    rig.executor(blocks=2)
    assert rig.thread(a).state is ThreadState.RUNNING
    assert rig.thread(b).state is ThreadState.QUEUED


def test_a_run_that_is_not_held_is_sent_again() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, key(1))
    executor = rig.executor()
    stay = residency(rig, thread)
    assert executor.beat(1) == []
    rig.wait(1250)
    client.beat()
    tokenizer.beat()
    again = executor.beat(2)
    assert [(m.thread, m.residency) for m in again if isinstance(m, Run)] == [(thread, stay)]
    assert len(again) == 1


def test_a_held_residency_that_does_not_move_is_nudged() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, key(1))
    executor = rig.executor()
    stay = residency(rig, thread)
    assert executor.beat(0, threads=(thread,), positions=(stay,)) == []
    rig.wait(1250)
    client.beat()
    tokenizer.beat()
    assert executor.beat(0, threads=(thread,), positions=(stay,)) == [Resync(thread, stay, 3)]


def test_what_an_executor_holds_needlessly_is_dropped() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, key(1))
    executor = rig.executor()
    stay = residency(rig, thread)
    held = (thread, thread)
    assert executor.beat(1, threads=held, positions=(stay, stay + 9)) == [Drop([stay + 9])]


def test_an_executor_that_says_hello_again_goes_on_or_starts_again() -> None:
    rig, client, tokenizer = boot()
    a = rig.spawn(client, tokenizer, key(1))
    b = rig.spawn(client, tokenizer, key(2))
    executor = rig.executor()
    stay = residency(rig, a)
    executor.hello(
        rig.executor_child.proof, process="executor-1", incarnation=rig.executor_child.incarnation
    )
    executor.beat(3, threads=(a,), positions=(stay,))
    assert executor.said == []  # it has not said that it is ready
    executor.say(executor_ready("m"))
    assert [type(m) for m in executor.said] == [Resync, Run]
    assert residency(rig, a) == stay
    assert executor.the(Run).thread == b


def test_a_new_kernel_adopts_what_runs() -> None:
    rig, client, tokenizer = boot()
    a = rig.spawn(client, tokenizer, key(1))
    b = rig.spawn(client, tokenizer, key(2))
    executor = rig.executor()
    stay = residency(rig, a)
    executor.say(Stepped([a], [stay], [3], [7], [0], 99))
    old = residency(rig, b)
    rig.restart(children=(rig.tokenizer_child, rig.executor_child))
    executor.greet(rig.executor_child)
    executor.beat(1, threads=(a, a, b"gone" * 2), positions=(stay - 1, stay, 5))
    executor.say(executor_ready("m"))
    assert residency(rig, a) == stay
    assert residency(rig, b) not in (old, stay)
    assert executor.the(Drop) == Drop([stay - 1, 5])
    assert executor.the(Resync) == Resync(a, stay, 4)
    executor.say(Stepped([a], [stay], [4], [8], [0], 99))
    assert rig.thread(a).tokens.tolist() == [1, 2, 3, 7, 8]


def test_threads_of_a_dead_executor_run_on_the_next() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, key(1))
    executor = rig.executor()
    first = residency(rig, thread)
    executor.say(Stepped([thread], [first], [3], [7], [0], 99))
    rig.exited(rig.executor_child, signal=9)
    assert rig.thread(thread).state is ThreadState.QUEUED
    assert rig.starts["executor-1"].incarnation == 2
    executor = rig.executor()
    run = executor.the(Run)
    assert (run.residency > first, len(run.tokens) // 4) == (True, 4)
    executor.say(Stepped([thread], [first], [4], [9], [0], 99))
    assert executor.said == [Drop([first])]


def test_paused_by_halting_nothing_is_placed() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, key(1))
    rig.kernel.tables.halting = True
    rig.executor()
    assert rig.thread(thread).state is ThreadState.QUEUED
