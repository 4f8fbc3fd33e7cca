"""What may be asked about jobs."""

import msgspec
import pytest
from llmkernel.testkit.rig import MS, SERVICE_PROOF, Peer, Rig, job_of
from llmproto import limits
from llmproto.base import Message
from llmproto.connection import Failed
from llmproto.errors import ErrorKind
from llmproto.jobs import (
    CheckpointCommitted,
    JobAsk,
    JobEnded,
    JobFound,
    JobKind,
    Jobs,
    JobsAsk,
    JobSpawned,
    JobState,
    StepReport,
    StepsDone,
)
from llmproto.operation import Processes, ProcessesAsk
from llmproto.threads import Done, ThreadCancel, ThreadRenice, ThreadResume, ThreadSuspend


def boot() -> tuple[Rig, Peer]:
    rig = Rig()
    return rig, rig.client()


def refusal(answers: list[Message]) -> tuple[ErrorKind, str]:
    (failed,) = answers
    assert isinstance(failed, Failed), failed
    return failed.kind, failed.detail


def test_a_repeated_spawn_finds_its_job_and_other_content_does_not() -> None:
    rig, client = boot()
    job = rig.job(client)
    assert client.say(job_of(b"j" * 16)) == [JobSpawned(job, existing=True)]
    rig.restart()
    client = rig.client()
    assert client.say(job_of(b"j" * 16)) == [JobSpawned(job, existing=True)]
    kind, detail = refusal(client.say(job_of(b"j" * 16, recipe=b"other")))
    assert kind is ErrorKind.INVALID and "used for another job" in detail


def test_two_living_trainings_of_one_name() -> None:
    rig, client = boot()
    job = rig.job(client)
    kind, detail = refusal(client.say(job_of(b"2" * 16)))
    assert kind is ErrorKind.INVALID
    assert job.hex() in detail and "'bot'" in detail and "starting" in detail
    rig.job(client, b"3" * 16, kind=JobKind.EVALUATE)
    client.say(ThreadCancel(job))
    rig.job(client, b"4" * 16)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"memory_bytes": 2 << 30}, (str(2 << 30), str(1 << 30))),
        ({"memory_bytes": 300 << 20, "processes": 4}, (str(1200 << 20), str(1 << 30))),
        ({"cores": 3}, ("1 x 3 cores", "has 2")),
        ({"device": "cuda:7"}, ("no device 'cuda:7'",)),
    ],
)
def test_what_can_never_run_is_refused_with_both_numbers(
    changes: dict[str, object], numbers: tuple[str, ...]
) -> None:
    rig, client = boot()
    kind, detail = refusal(client.say(msgspec.structs.replace(job_of(b"j" * 16), **changes)))
    assert kind is ErrorKind.INVALID
    assert all(number in detail for number in numbers), detail
    assert len(rig.kernel.tables.state.jobs) == 0


def test_a_full_table_forgets_what_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOBS_MAX", 2)
    rig, client = boot()
    first = rig.job(client, b"1" * 16, name="1")
    second = rig.job(client, b"2" * 16, name="2")
    kind, detail = refusal(client.say(job_of(b"3" * 16, name="3")))
    assert kind is ErrorKind.EXHAUSTED and "2 jobs" in detail
    client.say(ThreadCancel(first))
    rig.job(client, b"3" * 16, name="3")
    assert first not in rig.kernel.tables.state.jobs.by_id
    assert second in rig.kernel.tables.state.jobs.by_id


def test_nothing_is_accepted_while_the_disk_is_full() -> None:
    rig, client = boot()
    job = rig.job(client)
    rig.kernel.tables.journal_room = False
    for message in (job_of(b"2" * 16, name="2"), ThreadSuspend(job), ThreadRenice(job, 1)):
        assert refusal(client.say(message))[0] is ErrorKind.EXHAUSTED


def test_ended_jobs_are_forgotten_in_the_end() -> None:
    rig, client = boot()
    job = rig.job(client)
    rig.trainer()
    client.say(ThreadCancel(job))
    rig.exited(rig.ranks["trainer-1"], signal=15)
    rig.now_ns += limits.JOB_KEPT_MS * MS
    rig.wait(250)
    assert refusal(rig.client().say(JobAsk(job)))[0] is ErrorKind.STALE
    assert rig.replayed().digest() == rig.kernel.tables.state.digest()


# --- looking --------------------------------------------------------------------------------------


def test_the_row_of_a_job_and_of_its_process() -> None:
    rig, client = boot()
    job = rig.job(client, priority=2)
    trainer = rig.trainer()
    rig.now_ns += 7 * MS
    rows = [StepReport(step, 1 / step, 64) for step in range(1, 4)]
    trainer.say(StepsDone(job, 1, rows, 100, "saving"))
    client.say(JobAsk(job, after_step=1))
    found = client.the(JobFound)
    row = found.row
    assert found.reports == rows[1:]
    assert (row.name, row.tenant, row.state, row.step, row.steps_total, row.attempts) == (
        "bot",
        "uid:0",
        JobState.RUNNING,
        3,
        100,
        1,
    )
    assert (row.processes, row.doing, row.share, row.priority) == (["trainer-1"], "saving", 1.0, 2)
    assert row.age_ms == 7
    client.say(ProcessesAsk())
    (process,) = [p for p in client.the(Processes).rows if p.name == "trainer-1"]
    assert (process.role, process.model, process.threads) == ("trainer", "bot", 1)
    assert process.lease is not None and process.lease.cores == [1]
    trainer.say(JobEnded(job, 1, b"v" * 32, metrics={"loss": 0.25}))
    client.say(JobsAsk())
    (row,) = client.the(Jobs).rows
    assert (row.state, row.version, row.metrics) == (JobState.DONE, b"v" * 32, {"loss": 0.25})


def test_reports_that_are_no_longer_kept_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOB_REPORTS_KEPT", 2)
    rig, client = boot()
    job = rig.job(client)
    trainer = rig.trainer()
    trainer.say(StepsDone(job, 1, [StepReport(step, 0.5) for step in range(1, 6)]))
    client.say(JobAsk(job))
    assert [r.step for r in client.the(JobFound).reports] == [1, 2, 3, 4, 5]
    trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 4, 4))
    for after, steps in ((0, [4, 5]), (4, [5]), (5, []), (99, [])):
        client.say(JobAsk(job, after_step=after))
        assert [r.step for r in client.the(JobFound).reports] == steps


def test_answers_fit_a_message() -> None:
    rig, client = boot()
    first = rig.job(client, b"0" * 16, name="bot-0")
    trainer = rig.trainer()
    metrics = {f"metric-{number}": 0.5 for number in range(100)}
    rows = [StepReport(step, 0.5, metrics=metrics) for step in range(1, 1000)]
    for begin in range(0, 999, 100):
        trainer.say(StepsDone(first, 1, rows[begin : begin + 100]))
    job = rig.kernel.tables.state.jobs.by_id[first]
    # The metrics that the next JobRun has to carry are bounded: a checkpoint has to come first.
    assert 50 <= job.step < 999
    huge = StepReport(job.step + 1, 0.5, metrics={"x" * limits.JOB_METRICS_BYTES_MAX: 1.0})
    assert refusal(trainer.say(StepsDone(first, 1, [huge])))[0] is ErrorKind.INVALID
    client.say(JobAsk(first))
    assert len(client.the(JobFound).reports) == job.step
    trainer.say(JobEnded(first, 1, error=ErrorKind.INVALID, detail="x" * limits.DETAIL_BYTES_MAX))
    for number in range(1, 400):
        rig.job(client, number.to_bytes(16), name=f"bot-{number}")
        spawned = client.the(JobSpawned).job
        found = rig.kernel.tables.state.jobs.by_id[spawned]
        rig.kernel._jobs.finish(found, JobState.FAILED, detail="x" * limits.DETAIL_BYTES_MAX)
        rig.kernel._jobs.stop_ranks(found)
    client.say(JobsAsk())
    listed = client.the(Jobs).rows
    assert 200 < len(listed) < 400
    assert listed[0].name == "bot-399"


# --- rights ---------------------------------------------------------------------------------------


def test_another_tenants_job_is_not_shown_and_not_touched() -> None:
    rig, client = boot()
    job = rig.job(client)
    rig.kernel.tables.tenant("somebody")
    stranger = rig.peer("echo")
    stranger.hello(SERVICE_PROOF)
    session = rig.kernel.tables.sessions.by_id[stranger.session]
    session.tenant = rig.kernel.tables.tenant("somebody")
    for message in (JobAsk(job), ThreadCancel(job), ThreadSuspend(job), ThreadRenice(job, 1)):
        assert refusal(stranger.say(message))[0] is ErrorKind.DENIED
    assert stranger.say(JobsAsk()) == [Jobs([])]
    assert refusal(stranger.say(job_of(b"2" * 16)))[0] is ErrorKind.DENIED


def test_calls_on_a_job_that_is_over_do_nothing() -> None:
    rig, client = boot()
    job = rig.job(client)
    client.say(ThreadCancel(job))
    before = rig.kernel.tables.state.digest()
    for message in (
        ThreadCancel(job),
        ThreadSuspend(job),
        ThreadResume(job),
        ThreadRenice(job, 1),
    ):
        assert client.say(message) == [Done()]
    assert rig.kernel.tables.state.digest() == before


def test_renice_changes_who_is_placed_first() -> None:
    rig, client = boot()
    first = rig.job(client, b"1" * 16, name="1", cores=2)
    second = rig.job(client, b"2" * 16, name="2", cores=2)
    third = rig.job(client, b"3" * 16, name="3", cores=2)
    client.say(ThreadRenice(third, 5))
    client.say(ThreadCancel(first))
    rig.exited(rig.fork(rig.starts["trainer-1"]), signal=15)
    jobs = rig.kernel.tables.state.jobs.by_id
    assert (jobs[second].state, jobs[third].state) == (JobState.WAITING, JobState.STARTING)
    client.say(ThreadRenice(second, 1, 2))
    assert (jobs[second].priority, jobs[second].service_class) == (1, 2)
