"""How much of its device a job may take."""

import pytest
from llmkernel.jobpace import hurried
from llmkernel.processes import Process
from llmkernel.testkit.rig import CONFIG, MS, Peer, Rig
from llmproto.jobs import JobPace, JobRun
from llmproto.operation import DeviceRow, Lease
from llmproto.threads import ThreadCancel

CPU = DeviceRow(name="cpu0", kind="cpu", cores=[0, 1, 2, 3], memory_bytes=1 << 30)


def serving() -> tuple[Rig, Peer, Peer]:
    """A system with a job that starts, and a model that nobody has asked for."""
    rig = Rig(devices=(CPU,))
    tokenizer = rig.tokenizer()
    client = rig.client()
    rig.job(client)
    return rig, client, tokenizer


def paces(rig: Rig, trainer: Peer) -> list[float]:
    return [m.share for m in trainer.said if isinstance(m, JobPace)]


def test_it_is_held_back_when_a_thread_is_placed_beside_it() -> None:
    rig, client, tokenizer = serving()
    trainer = rig.trainer()
    assert trainer.the(JobRun).share == 1.0
    rig.spawn(client, tokenizer)
    assert paces(rig, trainer) == []
    rig.executor()
    assert paces(rig, trainer) == [CONFIG.job_share]


def running(service_class: int) -> tuple[Rig, Peer, Peer, Peer, bytes]:
    """A trainer beside an executor, and a thread on its way."""
    rig, client, tokenizer = serving()
    trainer = rig.trainer()
    first = rig.spawn(client, tokenizer)
    executor = rig.executor()
    executor.beat(1)
    client.say(ThreadCancel(first))
    for _ in range(12):
        rig.wait(250)
        for peer in (trainer, executor, client, tokenizer):
            peer.beat(1)
    rig.spawn(client, tokenizer, b"2" * 16, service_class=service_class)
    thread = next(t.id for t in rig.kernel.tables.state.threads if not t.end)
    return rig, client, trainer, executor, thread


@pytest.mark.parametrize(("service_class", "share"), [(0, 0.25), (1, 0.25), (2, 1.0), (3, 1.0)])
def test_only_threads_that_somebody_waits_for_count(service_class: int, share: float) -> None:
    rig, _, _, _, thread = running(service_class)
    (job,) = rig.kernel.tables.state.jobs
    assert rig.thread(thread).process == "executor-1"
    assert job.share == share
    rig.wait(250)
    assert job.share == share


def test_the_share_comes_back_when_nobody_has_waited_for_a_second() -> None:
    rig, client, trainer, executor, thread = running(1)
    (job,) = rig.kernel.tables.state.jobs
    client.say(ThreadCancel(thread))
    shares = []
    for _ in range(6):
        rig.now_ns += 250 * MS
        for peer in (trainer, executor, client):
            peer.beat(1)
        rig.wait(1)
        shares.append((job.share, paces(rig, trainer)))
    assert shares == [(0.25, [])] * 3 + [(1.0, [1.0]), (1.0, []), (1.0, [])]


def test_a_job_that_begins_beside_readers_is_told_so() -> None:
    rig, *_ = running(1)
    (job,) = rig.kernel.tables.state.jobs
    rig.exited(rig.ranks["trainer-1"], signal=9)
    assert rig.trainer().the(JobRun).share == job.share == 0.25


def executor_on(lease: Lease | None, *, busy: bool = True) -> Process:
    process = Process("executor-1", "executor", None, 0)
    process.lease = lease
    if busy:
        rig, client, tokenizer = serving()
        process.residents[1] = rig.thread(rig.spawn(client, tokenizer))
    return process


@pytest.mark.parametrize(
    ("lease", "busy", "expected"),
    [
        (Lease(device="cpu0", cores=[0], memory_bytes=1), True, True),
        (Lease(device="cuda:0", cores=[3], memory_bytes=1), True, True),
        (Lease(device="cuda:0", cores=[0], memory_bytes=1), True, False),
        (Lease(device="cpu0", cores=[0], memory_bytes=1), False, False),
        (None, True, False),
    ],
)
def test_sharing_a_device_or_a_core(lease: Lease | None, busy: bool, expected: bool) -> None:
    mine = Lease(device="cpu0", cores=[2, 3], memory_bytes=1)
    assert hurried([mine], [executor_on(lease, busy=busy)]) is expected
