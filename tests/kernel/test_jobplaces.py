"""Jobs and models on one device: who makes room for whom."""

import msgspec
from llmkernel.events import SignalChild, Start
from llmkernel.jobplaces import IDLE_MS
from llmkernel.jobs import Job
from llmkernel.testkit.rig import CONFIG, MODEL, Peer, Rig
from llmproto.jobs import CheckpointCommitted, JobPace, JobRun, JobState, JobStopped
from llmproto.models import ModelRegister
from llmproto.operation import DeviceRow
from llmproto.threads import ThreadCancel

MIB = 1 << 20
SMALL = (DeviceRow(name="cpu0", kind="cpu", cores=[0, 1], memory_bytes=10 * MIB),)
"""A model with its executor takes 2 MiB here."""


def boot(preload: tuple[str, ...] = ()) -> tuple[Rig, Peer, Peer]:
    rig = Rig(msgspec.structs.replace(CONFIG, preload=preload), devices=SMALL)
    tokenizer = rig.tokenizer()
    return rig, rig.client(), tokenizer


def the_job(rig: Rig, job: bytes) -> Job:
    return rig.kernel.tables.state.jobs.by_id[job]


def effects(rig: Rig, kind: type) -> list[object]:
    return [e for e in rig.effects if isinstance(e, kind)]


def alive(rig: Rig, ms: int, *peers: Peer) -> list[object]:
    found: list[object] = []
    for _ in range(ms // 250):
        found += [e for e in rig.wait(250) if isinstance(e, (SignalChild, Start))]
        for peer in peers:
            peer.beat(1)
            found += effects(rig, Start)
    return found


def test_a_model_that_somebody_waits_for_takes_what_a_job_holds() -> None:
    rig, client, tokenizer = boot()
    job = rig.job(client, memory_bytes=9 * MIB)
    trainer = rig.trainer()
    rig.spawn(client, tokenizer)
    assert the_job(rig, job).state is JobState.STOPPING
    trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 0, 0))
    trainer.say(JobStopped(job, 1))
    rig.exited(rig.ranks["trainer-1"], code=0)
    # What it gave back is the model's, though the job was the first to look.
    assert [e.spec.role for e in rig.effects if isinstance(e, Start)] == ["executor"]
    assert the_job(rig, job).state is JobState.WAITING
    rig.wait(250)
    assert the_job(rig, job).doing.startswith("waits for room: ")
    assert the_job(rig, job).losses == 0


def test_a_job_that_fits_beside_the_waiting_model_does_not_wait_for_it() -> None:
    rig, client, tokenizer = boot()
    first = rig.job(client, memory_bytes=9 * MIB, service_class=1, cores=1)
    rig.spawn(client, tokenizer)
    second = rig.job(client, b"2" * 16, name="2", memory_bytes=1 * MIB, cores=1)
    # The byte that is left is the model's, which will need two of them.
    assert the_job(rig, second).state is JobState.WAITING
    assert "0 of them free" in the_job(rig, second).doing
    client.say(ThreadCancel(first))
    rig.exited(rig.fork(rig.starts["trainer-1"]), signal=15)
    rig.wait(250)
    assert the_job(rig, second).state is JobState.STARTING
    assert "executor-1" in rig.starts


def test_a_job_as_urgent_as_the_thread_stays() -> None:
    rig, client, tokenizer = boot()
    job = rig.job(client, memory_bytes=9 * MIB, service_class=1)
    rig.trainer()
    thread = rig.spawn(client, tokenizer)
    assert rig.thread(thread).state == "queued"
    assert the_job(rig, job).state is JobState.RUNNING


def test_a_job_does_not_leave_for_nothing() -> None:
    rig, client, tokenizer = boot()
    job = rig.job(client, memory_bytes=5 * MIB)
    rig.trainer()
    tokenizer.say(ModelRegister(msgspec.structs.replace(MODEL, name="big", weight_bytes=8 * MIB)))
    rig.spawn(client, tokenizer, b"1" * 16)
    executor = rig.executor()
    executor.beat(1)
    # 5 + 2 are held, 9 are asked for: too much even without the job, while the other model answers.
    rig.spawn(client, tokenizer, b"2" * 16, model="big")
    assert the_job(rig, job).state is JobState.RUNNING


def test_the_least_urgent_of_several_jobs_leaves_and_one_is_enough() -> None:
    rig, client, tokenizer = boot()
    jobs = [
        rig.job(client, bytes([n]) * 16, name=f"{n}", cores=1, memory_bytes=4 * MIB, priority=n)
        for n in (1, 2)
    ]
    for name in ("trainer-1", "trainer-2"):
        rig.trainer(name)
    tokenizer.say(ModelRegister(msgspec.structs.replace(MODEL, name="big", weight_bytes=2 * MIB)))
    rig.spawn(client, tokenizer, model="big")
    assert [the_job(rig, job).state for job in jobs] == [JobState.STOPPING, JobState.RUNNING]
    rig.spawn(client, tokenizer, b"2" * 16, model="big")
    assert the_job(rig, jobs[1]).state is JobState.RUNNING


def test_a_job_that_has_not_begun_leaves_at_once() -> None:
    rig, client, tokenizer = boot()
    job = rig.job(client, memory_bytes=9 * MIB)
    child = rig.fork(rig.starts["trainer-1"])
    rig.kernel.tables.effects = []
    rig.spawn(client, tokenizer)
    assert the_job(rig, job).state is JobState.STOPPING
    rig.exited(child, signal=15)
    assert [e.spec.role for e in rig.effects if isinstance(e, Start)] == ["executor"]


def idle_model(preload: tuple[str, ...] = ()) -> tuple[Rig, Peer, Peer]:
    rig, client, tokenizer = boot(preload)
    thread = rig.spawn(client, tokenizer)
    executor = rig.executor()
    executor.beat(1)
    client.say(ThreadCancel(thread))
    return rig, client, executor


def test_a_job_takes_the_room_of_a_model_only_after_long_idleness() -> None:
    rig, client, executor = idle_model()
    job = rig.job(client, memory_bytes=9 * MIB)
    assert the_job(rig, job).state is JobState.WAITING
    assert alive(rig, IDLE_MS, client, executor) == []
    signal, *rest = alive(rig, 1000, client, executor)
    assert signal == SignalChild(rig.executor_child.pid, 1, 15) and rest == []
    rig.exited(rig.executor_child, code=0)
    rig.wait(250)
    assert the_job(rig, job).state is JobState.STARTING
    assert rig.trainer().the(JobRun).attempt == 1


def test_a_model_that_is_to_be_loaded_always_stays() -> None:
    rig, client, executor = idle_model(preload=("m",))
    rig.job(client, memory_bytes=9 * MIB)
    assert alive(rig, IDLE_MS + 2000, client, executor) == []


def test_who_leaves_is_told_once() -> None:
    rig, client, tokenizer = boot()
    rig.job(client, memory_bytes=9 * MIB)
    trainer = rig.trainer()
    stops = []
    for number in range(3):
        tokenizer.say(
            ModelRegister(msgspec.structs.replace(MODEL, name=f"m{number}", digest=bytes(16)))
        )
        rig.spawn(client, tokenizer, bytes([number]) * 16, model=f"m{number}")
        stops += [m for m in trainer.said if isinstance(m, JobPace)]
    assert [stop.stop for stop in stops] == [True]
