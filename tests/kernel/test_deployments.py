"""What names serve: an event, then what the kernel does."""

import msgspec
import pytest
from llmkernel.events import Effect, Start
from llmkernel.state import State
from llmkernel.testkit.rig import (
    CONFIG,
    DEVICES,
    MODEL,
    SERVICE_PROOF,
    Peer,
    Rig,
    executor_ready,
    spawn_of,
)
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.execution import LoadFailed, Run, Stepped
from llmproto.init import Child
from llmproto.models import (
    DeploymentRow,
    Deployments,
    DeploymentsAsk,
    DeploymentState,
    ModelAsk,
    ModelDeploy,
    ModelEntry,
    ModelFound,
    ModelLoad,
    ModelRegister,
    ModelRemove,
    Models,
    ModelsAsk,
    ModelUndeploy,
)
from llmproto.operation import DeviceRow, ProcessStarted
from llmproto.threads import Done, SinkAcked, ThreadSpawned

A, B, C = "bot@aaaaaaaa", "bot@bbbbbbbb", "bot@cccccccc"
SMALL = (msgspec.structs.replace(DEVICES[0], memory_bytes=3 << 20),)
"""Room for one executor, not for two."""


def entry(name: str, **changes: object) -> ModelEntry:
    whole = msgspec.structs.replace(
        MODEL, name=name, digest=name[-8:].rjust(16).encode(), tokenizer=b"t" * 16
    )
    return msgspec.structs.replace(whole, **changes)


class Machine:
    """A kernel with a tokenizer, a client and a store, and three versions in the table."""

    def __init__(self, devices: tuple[DeviceRow, ...] = DEVICES, **changes: object) -> None:
        self.rig = Rig(devices=devices, config=msgspec.structs.replace(CONFIG, **changes))
        self.tokenizer = self.rig.tokenizer()
        self.client = self.rig.client()
        self.store = store(self.rig)
        for name in (A, B, C):
            assert self.tokenizer.say(ModelRegister(entry(name))) == [Done()]
        self.children: dict[str, Child] = {}
        self.executors: dict[str, Peer] = {}
        self.keys = 0

    def deploy(self, model: str, name: str = "bot", **changes: object) -> list[Effect]:
        """Ask for it; gives the effects."""
        call = msgspec.structs.replace(ModelDeploy(name, model), **changes)
        answers = self.store.say(call)
        effects = list(self.rig.effects)
        assert answers == [Done()], answers
        return effects

    def ready(self, model: str) -> Peer:
        """The executor that was asked for last for this model says that it is ready."""
        process = [
            name
            for name, start in self.rig.starts.items()
            if start.spec.arguments[1:2] == [model] and name not in self.executors
        ][-1]
        self.executors[process] = executor = self.rig.executor(process)
        self.children[model] = self.rig.executor_child
        return executor

    def failed(self, model: str) -> None:
        """The executor of this model cannot load it."""
        process, start = [
            (name, start)
            for name, start in self.rig.starts.items()
            if start.spec.arguments[1:2] == [model] and name not in self.executors
        ][-1]
        self.children[model] = child = self.rig.fork(start)
        self.executors[process] = peer = self.rig.peer("executor")
        peer.greet(child)
        peer.say(LoadFailed(model, ErrorKind.INVALID, "object 3f is damaged"))

    def spawn(self, model: str, deployment: str | None = "bot") -> bytes:
        self.keys += 1
        key = self.keys.to_bytes(16)
        return self.rig.spawn(self.client, self.tokenizer, key, model=model, deployment=deployment)

    def row(self, name: str = "bot") -> DeploymentRow:
        (answer,) = self.client.say(DeploymentsAsk())
        assert isinstance(answer, Deployments)
        (row,) = (row for row in answer.rows if row.name == name)
        return row

    def serves(self, name: str | None = "bot") -> str:
        (answer,) = self.client.say(ModelAsk(name))
        assert isinstance(answer, ModelFound), answer
        return answer.model.name

    def models(self) -> list[str]:
        (answer,) = self.client.say(ModelsAsk())
        assert isinstance(answer, Models)
        return [row.model.name for row in answer.rows if row.model.name.startswith("bot@")]

    def running(self) -> list[str]:
        """Models with an executor that was not told to end."""
        processes = self.rig.kernel.tables.processes.executors.values()
        return [p.model or "" for p in processes if p.desired]

    def live(self, model: str) -> Peer:
        """Deployed and ready."""
        self.deploy(model)
        return self.ready(model)

    def end(self, thread: bytes, executor: Peer) -> None:
        """The executor proposes one token and the end; the reader consumes it."""
        found = self.rig.thread(thread)
        assert found.residency is not None
        executor.say(Stepped([thread], [found.residency], [len(found.tokens)], [5], [1], 1000))
        self.tokenizer.say(SinkAcked([thread], [found.position], [True]))


def store(rig: Rig) -> Peer:
    peer = rig.peer("store")
    peer.hello(SERVICE_PROOF)
    peer.say(ProcessStarted())
    return peer


def refusal(answers: list[Message]) -> str:
    (failed,) = answers
    assert isinstance(failed, Failed), failed
    assert failed.kind is ErrorKind.INVALID, failed
    return failed.detail


def starts(effects: list[Effect]) -> list[str]:
    """Models of the executors that were asked for."""
    specs = [e.spec for e in effects if isinstance(e, Start)]
    return [spec.arguments[1] for spec in specs if spec.role == "executor"]


# --- the first, and the next ----------------------------------------------------------------------


def test_the_first_deployment_is_loaded_at_once_and_serves_from_the_start() -> None:
    m = Machine()
    assert starts(m.deploy(A)) == [A]
    assert (m.serves(), m.row().state) == (A, DeploymentState.ROLLING)
    thread = m.spawn(A)
    executor = m.ready(A)
    assert executor.the(Run).thread == thread
    row = m.row()
    assert (row.state, row.serving, row.previous, row.replicas_ready) == (
        DeploymentState.LIVE,
        A,
        None,
        1,
    )


def test_with_room_the_new_one_is_loaded_beside_and_switched_to_when_ready() -> None:
    m = Machine()
    old = m.live(A)
    assert starts(m.deploy(B)) == [B]
    assert m.serves() == A
    running = m.spawn(A)
    m.ready(B)
    row = m.row()
    assert (m.serves(), row.previous, row.state) == (B, A, DeploymentState.LIVE)
    assert m.rig.thread(running).process is not None  # it goes on where it is
    assert m.running() == [A, B]
    m.end(running, old)
    assert m.running() == [B]
    assert m.models() == [A, B, C]  # A is where a rollback goes


def test_the_concrete_name_of_an_old_entry_is_found_and_loaded_again() -> None:
    m = Machine()
    m.live(A)
    m.live(B)
    m.rig.exited(m.children[A], code=0)
    assert m.serves(A) == A
    m.spawn(A, deployment=None)
    assert m.running() == [B, A]


def test_older_entries_leave_the_table_with_their_last_thread() -> None:
    m = Machine()
    old = m.live(A)
    thread = m.spawn(A)
    m.live(B)
    m.live(C)
    assert m.models() == [A, B, C]  # a thread of A lives
    m.end(thread, old)
    m.rig.exited(m.children[A], code=0)
    assert m.models() == [B, C]


def test_a_retired_entry_that_is_added_and_deployed_again_stays() -> None:
    m = Machine()
    old = m.live(A)
    thread = m.spawn(A)
    m.live(B)
    m.live(C)
    assert m.tokenizer.say(ModelRegister(entry(A))) == [Done()]
    m.end(thread, old)
    m.rig.exited(m.children[A], code=0)
    m.deploy(A)
    assert m.row().model == A


def test_a_rollback_goes_to_what_served_before_and_back() -> None:
    m = Machine()
    m.live(A)
    m.live(B)
    m.rig.exited(m.children[A], code=0)
    m.live(A)
    assert (m.serves(), m.row().previous) == (A, B)


def test_the_same_again_changes_nothing() -> None:
    m = Machine()
    m.live(A)
    m.deploy(B)
    before = m.rig.kernel.tables.state.digest()
    assert starts(m.deploy(B)) == []
    assert m.rig.kernel.tables.state.digest() == before


def test_what_serves_wanted_again_in_the_middle_of_a_roll_out() -> None:
    m = Machine()
    m.live(A)
    m.deploy(B)
    m.deploy(A)
    assert (m.row().state, m.serves()) == (DeploymentState.LIVE, A)
    assert m.running() == [A]
    assert m.row().previous is None  # B never served


# --- without room ---------------------------------------------------------------------------------


def test_without_room_new_threads_wait_and_old_ones_end_first() -> None:
    m = Machine(SMALL)
    old = m.live(A)
    running = m.spawn(A)
    assert starts(m.deploy(B)) == []
    assert m.serves() == B
    waiting = m.spawn(B)
    assert m.running() == [A]
    m.end(running, old)
    assert m.running() == []  # it was told to end
    effects = m.rig.exited(m.children[A], code=0)
    assert starts(effects) == [B]
    assert m.ready(B).the(Run).thread == waiting
    assert m.row().state is DeploymentState.LIVE


def test_an_idle_stranger_makes_room_before_what_serves() -> None:
    m = Machine((msgspec.structs.replace(DEVICES[0], memory_bytes=5 << 20),))
    m.live(A)
    m.client.say(ModelLoad("m"))
    m.ready("m")
    m.deploy(B)
    assert m.running() == [A]
    assert starts(m.rig.exited(m.children["m"], code=0)) == [B]
    assert m.serves() == A


def test_a_busy_stranger_is_waited_for() -> None:
    m = Machine((msgspec.structs.replace(DEVICES[0], memory_bytes=5 << 20),))
    m.live(A)
    m.spawn("m", deployment=None)
    m.ready("m")
    m.spawn(A)
    m.deploy(B)
    assert sorted(m.running()) == [A, "m"]
    assert m.serves() == B  # A's room is enough, once its thread has ended


def test_nothing_of_the_old_one_loaded_the_new_one_serves_at_once() -> None:
    m = Machine()
    m.live(A)
    child = m.children[A]
    m.rig.exited(child, code=0)
    m.rig.kernel.tables.processes.executors.clear()
    m.rig.kernel.tables.processes.by_name.pop(child.spec.name, None)
    m.deploy(B)
    assert m.serves() == B


# --- failures -------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_taken_back() -> None:
    m = Machine()
    m.live(A)
    m.deploy(B)
    m.failed(B)
    row = m.row()
    assert (row.state, row.model, row.serving) == (DeploymentState.FAILED, B, A)
    assert "object 3f is damaged" in row.detail
    assert m.serves() == A


def waiting_for_a_failure() -> tuple[Machine, bytes]:
    m = Machine(SMALL)
    m.live(A)
    m.deploy(B)
    assert m.serves() == B
    waiting = m.spawn(B)
    m.rig.exited(m.children[A], code=0)
    return m, waiting


def test_threads_that_waited_for_it_go_to_the_previous_one() -> None:
    m, waiting = waiting_for_a_failure()
    m.failed(B)
    assert m.rig.thread(waiting).model == A
    effects = m.rig.exited(m.children[B], code=0)
    assert starts(effects) == [A]
    assert m.ready(A).the(Run).thread == waiting
    assert m.rig.replayed().digest() == m.rig.kernel.tables.state.digest()


def test_those_that_have_computed_end_with_the_error() -> None:
    m, waiting = waiting_for_a_failure()
    thread = m.rig.thread(waiting)
    thread.tokens.append(7)
    m.failed(B)
    assert thread.error is ErrorKind.INVALID
    assert "object 3f" in thread.detail


@pytest.mark.parametrize("changes", [{"tokenizer": b"u" * 16}, {"context_tokens": 4}])
def test_those_that_the_previous_one_could_not_run_end_with_the_error(
    changes: dict[str, object],
) -> None:
    m = Machine(SMALL)
    m.tokenizer.say(ModelRegister(entry(A, **changes)))
    m.live(A)
    m.deploy(B)
    waiting = m.spawn(B)
    m.rig.exited(m.children[A], code=0)
    m.failed(B)
    assert m.rig.thread(waiting).error is ErrorKind.INVALID


def test_a_first_one_that_fails_is_tried_again_when_it_is_asked_for() -> None:
    m = Machine()
    m.deploy(A)
    m.failed(A)
    assert (m.row().state, m.row().serving) == (DeploymentState.FAILED, A)
    m.rig.exited(m.children[A], code=0)
    m.client.say(ModelLoad("bot"))
    m.ready(A)
    assert m.row().state is DeploymentState.LIVE


def test_a_failed_one_is_tried_again_by_another_deploy() -> None:
    m = Machine()
    m.live(A)
    m.deploy(B)
    m.failed(B)
    m.rig.exited(m.children[B], code=0)
    assert starts(m.deploy(B)) == [B]
    m.ready(B)
    assert (m.row().state, m.row().detail, m.serves()) == (DeploymentState.LIVE, "", B)


# --- races ----------------------------------------------------------------------------------------


def test_a_spawn_for_what_was_replaced_runs_on_it_while_it_is_there() -> None:
    m = Machine()
    m.live(A)
    keeps = m.spawn(A)
    m.live(B)
    late = m.spawn(A)
    assert m.rig.thread(late).model == m.rig.thread(keeps).model == A


def test_a_spawn_for_what_is_gone_asks_again() -> None:
    m = Machine()
    m.live(A)
    m.live(B)
    m.rig.exited(m.children[A], code=0)
    cause = m.rig.ask(m.client, m.tokenizer)
    m.tokenizer.say(spawn_of(b"q" * 16, model=A, deployment="bot"), cause=cause)
    failed = m.tokenizer.the(Failed)
    assert failed.kind is ErrorKind.STALE
    assert B in failed.detail
    m.tokenizer.say(spawn_of(b"q" * 16, model=B, deployment="bot"), cause=cause)
    assert not m.tokenizer.the(ThreadSpawned).existing


def test_all_choices_of_a_request_run_on_one_version() -> None:
    m = Machine()
    m.live(A)
    m.spawn(A)
    m.live(B)
    first = m.spawn(A)
    key = m.rig.thread(first).key
    second = m.rig.spawn(m.client, m.tokenizer, key, model=B, deployment="bot", index=1)
    assert m.rig.thread(second).model == A


# --- names ----------------------------------------------------------------------------------------


def test_a_name_is_either_a_model_or_a_deployment() -> None:
    m = Machine()
    assert "is a model by itself" in refusal(m.store.say(ModelDeploy("m", A)))
    m.live(A)
    detail = refusal(m.tokenizer.say(ModelRegister(entry("bot"))))
    assert "is a deployment" in detail
    for name in ("bot", A):
        assert "undeploy it first" in refusal(m.client.say(ModelRemove(name)))
    assert m.client.say(ModelRemove(C)) == [Done()]


def test_what_cannot_be_deployed() -> None:
    m = Machine()
    assert "not in the model table" in refusal(m.store.say(ModelDeploy("bot", "bot@dddddddd")))
    detail = refusal(m.store.say(ModelDeploy("bot", A, device="cuda:7")))
    assert "'cuda:7'; there is: cpu0" in detail
    m.tokenizer.say(ModelRegister(entry("huge@111", weight_bytes=1 << 40)))
    assert str((1 << 40) + (1 << 20)) in refusal(m.store.say(ModelDeploy("bot", "huge@111")))
    assert "there is: none" in refusal(m.client.say(ModelUndeploy("bot")))


def test_undeployed_its_threads_go_on_and_then_everything_leaves() -> None:
    m = Machine()
    old = m.live(A)
    thread = m.spawn(A)
    assert m.client.say(ModelUndeploy("bot")) == [Done()]
    assert "unknown model 'bot'" in refusal(m.client.say(ModelAsk("bot")))
    assert A in m.models()
    m.end(thread, old)
    m.rig.exited(m.children[A], code=0)
    assert m.models() == [B, C]


def test_the_default_model_may_be_a_deployment() -> None:
    m = Machine(default_model="bot", preload=("bot",))
    m.live(A)
    assert m.serves(None) == A
    (answer,) = m.client.say(ModelAsk(None))
    assert isinstance(answer, ModelFound)
    assert answer.deployment == "bot"


# --- replicas and devices -------------------------------------------------------------------------


def test_as_many_replicas_as_are_wished_and_have_room() -> None:
    m = Machine((msgspec.structs.replace(DEVICES[0], memory_bytes=5 << 20),))
    m.deploy(A, replicas=3)
    m.rig.wait(250)
    assert m.running() == [A, A]
    m.deploy(A, replicas=1)
    assert m.running() == [A]


def test_the_device_that_is_wished() -> None:
    devices = (DEVICES[0], msgspec.structs.replace(DEVICES[0], name="cuda:0", kind="cuda"))
    m = Machine(devices)
    m.deploy(A, device="cpu0")
    (first,) = m.rig.kernel.tables.processes.executors.values()
    assert first.lease is not None
    assert first.lease.device == "cpu0"
    m.ready(A)
    m.deploy(A, device="cuda")
    second = list(m.rig.kernel.tables.processes.executors.values())[-1]
    assert second.lease is not None
    assert second.lease.device == "cuda:0"
    m.ready(A)
    m.rig.wait(250)
    assert [p.name for p in m.rig.kernel.tables.processes.executors.values() if p.desired] == [
        second.name
    ]


def test_a_replica_that_cannot_be_loaded_hurts_nobody() -> None:
    m = Machine()
    m.live(A)
    thread = m.spawn(A)
    m.deploy(A, replicas=2)
    (second,) = (s for n, s in m.rig.starts.items() if n == "executor-2")
    peer = m.rig.peer("executor")
    peer.greet(m.rig.fork(second))
    peer.say(LoadFailed(A, ErrorKind.EXHAUSTED, "no memory"))
    assert not m.rig.thread(thread).end
    m.spawn(A)
    assert m.row().state is DeploymentState.LIVE


# --- restarts -------------------------------------------------------------------------------------


def test_a_kernel_dies_in_the_middle_of_a_roll_out() -> None:
    m = Machine()
    m.live(A)
    m.deploy(B)
    child = m.rig.fork(m.rig.starts["executor-2"])
    m.rig.restart(children=(m.rig.tokenizer_child, m.children[A], child))
    peer = m.rig.peer("executor")
    peer.greet(child)
    peer.say(executor_ready(B))
    assert m.rig.kernel.tables.state.deployments["bot"].serving == B


def test_a_boot_loads_what_serves() -> None:
    m = Machine()
    m.live(A)
    m.rig.starts.clear()
    assert starts(m.rig.restart()) == [A]


def test_compaction_says_deployments_again() -> None:
    m = Machine()
    m.live(A)
    thread = m.spawn(A)
    m.live(B)
    m.live(C)
    again = State()
    for fact in m.rig.kernel.tables.state.live():
        again.apply(fact)
    assert again.digest() == m.rig.kernel.tables.state.digest()
    assert list(again.retired) == [A]
    assert again.threads.by_id[thread].deployment == "bot"
