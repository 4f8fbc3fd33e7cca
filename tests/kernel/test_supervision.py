"""Processes are started, watched, restarted, stopped."""

import msgspec
import pytest
from llmkernel.events import (
    ChildForked,
    Halt,
    HungKilled,
    KillHung,
    Log,
    Record,
    Rejected,
    SignalChild,
    Start,
    StopAsked,
    Wake,
)
from llmkernel.processes import POLICY, RestartPolicy
from llmkernel.testkit.rig import CONFIG, MODEL, MS, SERVICE_PROOF, TOKENIZER, Peer, Rig
from llmproto import limits
from llmproto.connection import Failed, Goodbye, Unknown, Working
from llmproto.errors import ErrorKind
from llmproto.execution import Stepped
from llmproto.generation import Generate
from llmproto.init import Child, Exit, Spec
from llmproto.models import ModelEntry, ModelRegister
from llmproto.operation import DeviceRow, ProcessKill, ProcessStarted, ProcessState, Shutdown
from llmproto.threads import Done


def boot() -> tuple[Rig, Peer, Peer]:
    rig = Rig()
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def state(rig: Rig, name: str) -> ProcessState:
    return rig.kernel.tables.processes.by_name[name].state


def effects(rig: Rig, kind: type) -> list[object]:
    return [e for e in rig.effects if isinstance(e, kind)]


def alive(rig: Rig, peers: list[Peer], ms: int) -> list[object]:
    """Time passes and these peers beat; gives the kills that the kernel asked for."""
    kills: list[object] = []
    for _ in range(ms // 250):
        kills += [e for e in rig.wait(250) if isinstance(e, KillHung)]
        for peer in peers:
            peer.beat()
    return kills


def test_configured_services_start_at_boot_and_restart() -> None:
    rig = Rig()
    assert effects(rig, Start) == [Start(TOKENIZER, 1)]
    child = rig.fork(rig.starts["tokenizer"])
    assert state(rig, "tokenizer") is ProcessState.STARTING
    peer = rig.service(child)
    assert state(rig, "tokenizer") is ProcessState.READY
    rig.exited(child, signal=9)
    assert effects(rig, Start) == [Start(TOKENIZER, 2)]
    assert peer.beat() == [Unknown(1)]


@pytest.mark.parametrize(
    ("deaths", "rest"),
    [(1, (0, False)), (2, (50, False)), (3, (100, False)), (8, (2000, False)), (9, (30_000, True))],
)
def test_policy(deaths: int, rest: tuple[int, bool]) -> None:
    now_ns = 10_000 * MS
    assert RestartPolicy().rest_ms([now_ns] * deaths, now_ns) == rest
    later = now_ns + POLICY.window_ms * MS
    assert RestartPolicy().rest_ms([now_ns] * deaths, later) == (0, False)


def test_back_off_then_quarantine_then_another_try() -> None:
    rig = Rig()
    rests = []
    for death in range(1, limits.RESTARTS_MAX + 2):
        child = rig.fork(rig.starts["tokenizer"])
        rig.exited(child, code=1)
        if death == 1:
            assert len(effects(rig, Start)) == 1
            continue
        (wake,) = [e for e in rig.effects if isinstance(e, Wake)]
        rests.append((wake.at_ns - rig.now_ns) // MS)
        if death <= limits.RESTARTS_MAX:
            rig.wait(rests[-1])
            assert rig.starts["tokenizer"].incarnation == death + 1
    assert rests == [50, 100, 200, 400, 800, 1600, 2000, 30_000]
    assert state(rig, "tokenizer") is ProcessState.QUARANTINED
    rig.wait(limits.QUARANTINE_MS)
    assert state(rig, "tokenizer") is ProcessState.STARTING


def test_an_exit_that_nobody_asked_for_counts_whatever_its_code() -> None:
    rig = Rig()
    for _ in range(2):
        rig.exited(rig.fork(rig.starts["tokenizer"]), code=0)
    assert not effects(rig, Start)


def test_kills_from_outside_are_not_counted() -> None:
    rig = Rig()
    for incarnation in range(1, 20):
        rig.exited(rig.fork(rig.starts["tokenizer"]), signal=9)
        assert rig.starts["tokenizer"].incarnation == incarnation + 1


def test_a_silent_service_is_killed_and_a_stopped_one_is_not_to_blame() -> None:
    rig, client, _ = boot()
    assert alive(rig, [client], limits.SERVICE_SILENT_MS) == []
    child = rig.tokenizer_child
    assert alive(rig, [client], 500) == [KillHung("tokenizer", child.pid, child.incarnation)]
    for stopped, strikes in ((True, 0), (False, 1)):
        child = rig.tokenizer_child
        rig.handle(HungKilled("tokenizer", child.incarnation, stopped))
        rig.exited(child, signal=9)
        process = rig.kernel.tables.processes.by_name["tokenizer"]
        assert len(process.deaths_ns) == strikes
        rig.tokenizer_child = rig.fork(rig.starts["tokenizer"])


def test_an_executor_that_beats_without_progress_is_killed_when_it_holds_work() -> None:
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer)
    executor = rig.executor()
    kills = alive(rig, [client, tokenizer, executor], limits.STEP_BUDGET_MS + 500)
    assert [k.process for k in kills if isinstance(k, KillHung)] == ["executor-1"]


def test_working_excuses_for_its_budget() -> None:
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer)
    executor = rig.executor()
    executor.say(Working("capturing", 5000))
    assert alive(rig, [client, tokenizer, executor], 4750) == []
    assert len(alive(rig, [client, tokenizer, executor], 500)) == 1


def test_progress_excuses() -> None:
    rig, client, tokenizer = boot()
    rig.spawn(client, tokenizer)
    executor = rig.executor()
    for progress in range(1, 12):
        assert alive(rig, [client, tokenizer], 500) == []
        executor.beat(progress)


def test_a_process_that_does_not_register_or_does_not_stop_is_killed() -> None:
    rig = Rig()
    rig.fork(rig.starts["tokenizer"])
    assert alive(rig, [], limits.STARTING_MS_MAX) == []
    assert len(alive(rig, [], 500)) == 1


def test_a_child_that_says_goodbye_and_stays_is_killed() -> None:
    rig, client, tokenizer = boot()
    tokenizer.say(Goodbye("draining"))
    assert len(alive(rig, [client], limits.SERVICE_SILENT_MS + 500)) == 1


def test_a_service_that_believes_it_is_ready_is_asked_to_register_again() -> None:
    rig = Rig()
    child = rig.fork(rig.starts["tokenizer"])
    peer = rig.peer("tokenizer")
    peer.greet(child)
    assert peer.beat(5) == []  # its word may be on the way
    rig.wait(1250)
    assert peer.beat(6) == [Unknown(1)]
    peer.greet(child)
    peer.say(ProcessStarted())
    assert peer.beat(7) == []


def test_an_unknown_child_is_killed() -> None:
    rig = Rig()
    child = Child(Spec("stray", "stray", "x"), 3, 77, b"", 0)
    rig.handle(ChildForked(child))
    assert effects(rig, SignalChild) == [SignalChild(77, 3, 9)]


def test_a_new_kernel_takes_living_children_over_and_counts_on() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    rig.executor()
    executor = rig.executor_child
    gone = Exit("tokenizer", 4, 1, None, 9)
    rig.restart(children=(executor,), exits=(gone,))
    assert effects(rig, Start) == [Start(TOKENIZER, 5)]
    process = rig.kernel.tables.processes.by_name["executor-1"]
    assert (process.pid, process.model, process.lease is not None) == (executor.pid, "m", True)
    assert not rig.thread(thread).end


def test_a_kernel_with_nothing_to_do_unloads_idle_models() -> None:
    rig = Rig(config=msgspec.structs.replace(CONFIG, model_idle_ms=1000))
    tokenizer = rig.tokenizer()
    client = rig.client()
    thread = rig.spawn(client, tokenizer, output_tokens_max=1)
    executor = rig.executor()
    residency = rig.thread(thread).residency
    assert residency is not None
    executor.say(Stepped([thread], [residency], [3], [7], [0], 9))
    found: list[object] = []
    for _ in range(5):
        found += [e for e in rig.wait(250) if isinstance(e, SignalChild)]
        for peer in (client, tokenizer, executor):
            peer.beat()
    child = rig.executor_child
    assert found == [SignalChild(child.pid, child.incarnation, 15)]
    rig.exited(child, code=0)
    assert "executor-1" not in rig.kernel.tables.processes.by_name
    rig.spawn(client, tokenizer, b"l" * 16)
    assert rig.starts["executor-2"].incarnation == 1


def _other(name: str) -> ModelEntry:
    return ModelEntry(
        name=name,
        path="/models/" + name,
        digest=(name.encode() * 17)[1:] if name != "m" else b"n" * 16,
        architecture="Fake",
        context_tokens=2048,
        vocabulary=1000,
        weight_bytes=1 << 20,
    )


def test_a_model_makes_room_for_another_when_it_is_idle() -> None:
    rig = Rig(devices=(DeviceRow(name="cpu0", kind="cpu", cores=[0], memory_bytes=3 << 20),))
    tokenizer = rig.tokenizer()
    client = rig.client()
    tokenizer.say(ModelRegister(_other("o")))
    thread = rig.spawn(client, tokenizer, output_tokens_max=1)
    executor = rig.executor()
    child = rig.executor_child
    rig.spawn(client, tokenizer, b"o" * 16, model="o")
    assert not effects(rig, Start)
    residency = rig.thread(thread).residency
    assert residency is not None
    executor.say(Stepped([thread], [residency], [3], [7], [0], 9))
    assert effects(rig, SignalChild) == [SignalChild(child.pid, child.incarnation, 15)]
    rig.exited(child, code=0)
    assert rig.starts["executor-2"].spec.arguments[1] == "o"


def test_three_self_made_deaths_while_loading_fail_the_threads() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    for _ in range(3):
        rig.exited(rig.fork(rig.starts["executor-1"]), signal=11)
        rig.wait(250)
        client.beat()
        tokenizer.beat()
    row = rig.thread(thread)
    assert row.error is ErrorKind.INTERNAL and "3 times while loading" in row.detail


def test_a_service_is_killed_by_name() -> None:
    rig, client, _ = boot()
    assert client.say(ProcessKill("tokenizer", 15)) == [Done()]
    child = rig.tokenizer_child
    assert effects(rig, SignalChild) == [SignalChild(child.pid, child.incarnation, 15)]
    (failed,) = client.say(ProcessKill("nobody"))
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.STALE


@pytest.mark.parametrize("by_signal", [True, False])
def test_shutdown_says_goodbye_to_everybody_and_starts_nothing(by_signal: bool) -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    if by_signal:
        rig.handle(StopAsked())
        assert client.said == [Goodbye("shutdown")]
    else:
        assert client.say(Shutdown()) == [Goodbye("shutdown"), Done()]
    assert tokenizer.said == [Goodbye("shutdown")]
    assert effects(rig, Halt) == [Halt()]
    rig.handle(StopAsked())
    assert rig.effects == []
    rig.exited(rig.tokenizer_child, code=0)
    assert not effects(rig, Start)
    assert not rig.replayed().threads.by_id[thread].end


def test_a_rejected_request_is_refused_and_a_rejected_process_is_killed() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer)
    child = rig.tokenizer_child
    bad = b"x" * 16
    rejected = Rejected(bad, "tokenizer", child.incarnation, (thread,), 2)
    rig.restart(children=(child,), rejected=(rejected,))
    row = rig.thread(thread)
    assert row.error is ErrorKind.INTERNAL
    tokenizer.hello(child.proof, process="tokenizer", incarnation=child.incarnation)
    assert effects(rig, SignalChild) == [SignalChild(child.pid, child.incarnation, 9)]
    client.hello(CONFIG.operator_proof)
    tokenizer.say(ProcessStarted())
    (failed,) = client.say(Generate(key=b"k" * 16, prompt="x"), target="tokenizer", id=bad)
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.INTERNAL


def test_replacing_a_model_waits_for_its_threads() -> None:
    rig, client, tokenizer = boot()
    thread = rig.spawn(client, tokenizer, output_tokens_max=1)
    changed = ModelRegister(_other("m"))
    (failed,) = tokenizer.say(changed)
    assert isinstance(failed, Failed) and "1 living" in failed.detail
    executor = rig.executor()
    residency = rig.thread(thread).residency
    assert residency is not None
    executor.say(Stepped([thread], [residency], [3], [7], [0], 9))
    assert tokenizer.say(changed) == [Done()]
    assert len(effects(rig, SignalChild)) == 1
    assert rig.kernel.tables.state.models[MODEL.name].model.digest == b"n" * 16


def test_a_log_line_is_an_effect() -> None:
    rig = Rig()
    peer = rig.peer("echo")
    peer.hello(SERVICE_PROOF)
    peer.say(ProcessStarted("http://x"))
    assert [e.event for e in rig.effects if isinstance(e, Log)] == ["ready"]
    assert not effects(rig, Record)


def test_a_child_taken_over_that_stays_silent_is_killed_soon() -> None:
    rig, _, _ = boot()
    rig.restart(children=(rig.tokenizer_child,))
    assert alive(rig, [], 5000) == []
    assert len(alive(rig, [], 250)) == 1


def test_an_exit_that_an_operator_asked_for_is_not_counted() -> None:
    rig, client, _ = boot()
    for _ in range(5):
        client.say(ProcessKill("tokenizer", 15))
        rig.exited(rig.tokenizer_child, code=0)
        assert len(effects(rig, Start)) == 1
        rig.tokenizer_child = rig.fork(rig.starts["tokenizer"])
