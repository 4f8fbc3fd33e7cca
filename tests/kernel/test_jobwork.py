"""Jobs get processes; attempts begin, run, die and go on."""

from typing import Any

import pytest
from llmkernel.events import ChildExited, KillHung, SignalChild, Start, Wake
from llmkernel.jobplaces import JOB_NICE
from llmkernel.jobs import Job
from llmkernel.testkit.rig import CONFIG, MS, Peer, Rig
from llmproto import limits
from llmproto.connection import Beat, Failed, Goodbye, Working
from llmproto.errors import ErrorKind
from llmproto.init import Child, Exit
from llmproto.jobs import (
    CheckpointCommitted,
    JobEnded,
    JobKind,
    JobMark,
    JobPace,
    JobRun,
    JobSpawned,
    JobState,
    JobStopped,
    StepReport,
    StepsDone,
)
from llmproto.metrics import MetricsAsk, MetricsText
from llmproto.operation import DeviceRow, Note, ProcessStarted, ProcessState
from llmproto.threads import Done, ThreadCancel, ThreadResume, ThreadSuspend

FOUR = (DeviceRow(name="cpu0", kind="cpu", cores=[0, 1, 2, 3], memory_bytes=1 << 30),)


def boot(devices: tuple[DeviceRow, ...] = FOUR) -> tuple[Rig, Peer]:
    rig = Rig(devices=devices)
    return rig, rig.client()


def the_job(rig: Rig, job: bytes) -> Job:
    return rig.kernel.tables.state.jobs.by_id[job]


def begun(
    rig: Rig,
    client: Peer,
    **changes: Any,  # the fields of JobSpawn
) -> tuple[bytes, list[Peer]]:
    """A job whose ranks all run."""
    job = rig.job(client, **changes)
    names = the_job(rig, job).names
    return job, [rig.trainer(name) for name in names]


def report(step: int, loss: float | None = None) -> StepReport:
    return StepReport(step, 1 / step if loss is None else loss, 12)


def effects(rig: Rig, kind: type) -> list[object]:
    return [e for e in rig.effects if isinstance(e, kind)]


def done(job: bytes, steps: range, attempt: int = 1, total: int = 9) -> StepsDone:
    return StepsDone(job, attempt, [report(step) for step in steps], total)


def test_a_job_starts_all_its_processes_at_once() -> None:
    rig, client = boot()
    job = rig.job(client, processes=2, memory_bytes=5)
    assert client.said == [JobSpawned(job, existing=False)]
    starts = [e for e in rig.effects if isinstance(e, Start)]
    assert [(s.spec.name, s.spec.cores, s.incarnation) for s in starts] == [
        ("trainer-1", [2], 1),
        ("trainer-2", [3], 1),
    ]
    spec = starts[1].spec
    assert (spec.role, spec.module, spec.fork, spec.nice) == (
        "trainer",
        "llmservices.trainer",
        True,
        JOB_NICE,
    )
    assert spec.arguments == [
        *("--job", job.hex(), "--attempt", "1", "--rank", "1", "--processes", "2"),
        *("--device", "cpu0", "--cores", "3", "--memory", "5"),
    ]
    assert the_job(rig, job).state is JobState.STARTING


def test_an_evaluation_is_a_new_interpreter() -> None:
    rig, client = boot()
    rig.job(client, kind=JobKind.EVALUATE)
    (start,) = [e for e in rig.effects if isinstance(e, Start)]
    assert (start.spec.name, start.spec.module, start.spec.fork) == (
        "evaluator-1",
        "llmservices.evaluator",
        False,
    )


def test_it_runs_when_the_last_rank_is_ready() -> None:
    rig, client = boot()
    job = rig.job(client, processes=2)
    first = rig.trainer("trainer-1")
    assert first.said == []
    second = rig.trainer("trainer-2")
    for rank, peer in enumerate((first, second)):
        assert peer.the(JobRun) == JobRun(
            job,
            1,
            JobKind.TRAIN,
            "bot",
            b"recipe",
            rank,
            2,
            f"{CONFIG.run_folder}/job-{job.hex()}-1",
        )
    assert the_job(rig, job).state is JobState.RUNNING


def test_a_rank_that_has_not_heard_is_told_again() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    rig.now_ns += (limits.RUN_RESEND_MS + 1) * MS
    assert trainer.beat(1, threads=(job,), positions=(1,)) == []
    assert isinstance(trainer.beat(1)[0], JobRun)
    assert trainer.beat(1) == []


def test_steps_are_journaled_once_in_order_without_gaps() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    assert trainer.say(done(job, range(1, 4))) == [JobMark(job, 1, 3)]
    assert trainer.say(done(job, range(2, 6))) == [JobMark(job, 1, 5)]
    assert trainer.say(done(job, range(8, 9))) == [JobMark(job, 1, 5)]
    assert [r.step for r in the_job(rig, job).reports] == [1, 2, 3, 4, 5]
    assert the_job(rig, job).reports[1] == report(2)
    again = StepsDone(job, 1, [report(2, loss=99.0)])
    assert trainer.say(again) == [JobMark(job, 1, 5)]
    assert the_job(rig, job).reports[1] == report(2)
    assert rig.replayed().digest() == rig.kernel.tables.state.digest()


def test_nothing_is_journaled_while_the_disk_is_full() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    rig.kernel.tables.journal_room = False
    assert trainer.say(done(job, range(1, 4))) == [JobMark(job, 1, 0)]
    (failed,) = trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 0, 0))
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.EXHAUSTED


def test_reports_beyond_the_checkpoint_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOB_REPORTS_MAX", 4)
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    assert trainer.say(done(job, range(1, 7))) == [JobMark(job, 1, 4)]
    trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 3, 30))
    assert trainer.say(done(job, range(5, 9))) == [JobMark(job, 1, 7)]


def test_a_checkpoint_is_where_the_next_attempt_begins() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    trainer.say(done(job, range(1, 6)))
    assert trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 3, 30)) == [Done()]
    assert trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 3, 30)) == [Done()]
    rig.exited(rig.ranks["trainer-1"], signal=9)
    assert effects(rig, Start) == [Start(rig.starts["trainer-1"].spec, 2)]
    assert rig.starts["trainer-1"].spec.arguments[3] == "2"
    run = rig.trainer().the(JobRun)
    assert (run.attempt, run.checkpoint, run.step, run.position) == (2, b"v" * 32, 3, 30)
    assert run.reported == [report(4), report(5)]


def test_a_checkpoint_beyond_the_reports_has_to_wait_for_them() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    (failed,) = trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 3, 30))
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.UNAVAILABLE
    trainer.say(done(job, range(1, 6)))
    trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 3, 30))
    (failed,) = trainer.say(CheckpointCommitted(job, 1, b"w" * 32, 2, 20))
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.STALE


def test_the_death_of_one_rank_ends_the_attempt() -> None:
    rig, client = boot()
    job, _ = begun(rig, client, processes=2)
    rig.exited(rig.ranks["trainer-2"], signal=9)
    child = rig.ranks["trainer-1"]
    assert effects(rig, SignalChild) == [SignalChild(child.pid, 1, 9)]
    assert effects(rig, Start) == []
    assert the_job(rig, job).state is JobState.WAITING
    rig.exited(child, signal=9)
    starts = [e for e in rig.effects if isinstance(e, Start)]
    assert [(s.spec.name, s.incarnation) for s in starts] == [("trainer-1", 2), ("trainer-2", 2)]


def test_an_attempt_that_is_over_is_not_heard() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    for message in (
        done(job, range(1, 3), attempt=2),
        CheckpointCommitted(job, 2, b"v" * 32, 0, 0),
        JobEnded(job, 2),
        JobEnded(b"x" * 8, 1),
    ):
        (failed,) = trainer.say(message)
        assert isinstance(failed, Failed) and failed.kind is ErrorKind.STALE
    assert trainer.say(JobStopped(job, 2)) == []
    assert the_job(rig, job).step == 0


def test_only_rank_0_is_heard() -> None:
    rig, client = boot()
    job, (_, second) = begun(rig, client, processes=2)
    (failed,) = second.say(done(job, range(1, 3)))
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.STALE


def test_deaths_without_progress_end_the_job() -> None:
    rig, client = boot()
    job = rig.job(client)
    rests = []
    for _ in range(limits.JOB_DEATHS_MAX):
        rig.trainer()
        rig.exited(rig.ranks["trainer-1"], code=1)
        rests += [(e.at_ns - rig.now_ns) // MS for e in rig.effects if isinstance(e, Wake)]
        rig.wait(limits.BACKOFF_MS_MAX)
    assert rests == [50, 100, 200]
    found = the_job(rig, job)
    assert (found.state, found.error) == (JobState.FAILED, ErrorKind.INTERNAL)
    assert "died 5 times" in found.detail and "llmos logs trainer-1" in found.detail
    assert rig.kernel.tables.processes.by_name.get("trainer-1") is None


def test_a_new_step_is_progress_and_an_outside_kill_no_strike() -> None:
    rig, client = boot()
    job = rig.job(client)
    for number in range(1, 3 * limits.JOB_DEATHS_MAX):
        trainer = rig.trainer()
        trainer.say(done(job, range(1, number + 1), attempt=number))
        rig.exited(rig.ranks["trainer-1"], code=1)
        assert the_job(rig, job).deaths == 1
    trainer = rig.trainer()
    for _ in range(limits.JOB_DEATHS_MAX):
        rig.exited(rig.ranks["trainer-1"], signal=9)
        rig.trainer()
    assert the_job(rig, job).deaths == 1
    for _ in range(limits.JOB_LOSSES_MAX):
        if the_job(rig, job).end is None:
            rig.exited(rig.ranks["trainer-1"], signal=9)
            if the_job(rig, job).end is None:
                rig.trainer()
    assert the_job(rig, job).state is JobState.FAILED


def test_the_end_and_its_processes() -> None:
    rig, client = boot()
    job, (trainer, _) = begun(rig, client, processes=2)
    ended = JobEnded(job, 1, b"v" * 32, metrics={"loss": 0.5})
    assert trainer.say(ended) == [Done()]
    assert effects(rig, SignalChild) == []
    found = the_job(rig, job)
    assert (found.state, found.version, found.metrics) == (JobState.DONE, b"v" * 32, {"loss": 0.5})
    assert trainer.say(ended) == [Done()]
    for name in ("trainer-2", "trainer-1"):
        rig.exited(rig.ranks[name], code=0)
    assert effects(rig, Start) == [] and found.ranks == {}
    assert "trainer-1" not in rig.kernel.tables.processes.by_name
    rig.wait(1000)
    assert effects(rig, Start) == []


def test_an_exit_without_an_end_is_a_death() -> None:
    rig, client = boot()
    job, _ = begun(rig, client)
    rig.exited(rig.ranks["trainer-1"], code=0)
    assert the_job(rig, job).deaths == 1
    assert the_job(rig, job).state is JobState.STARTING


def test_a_job_that_cannot_succeed_says_why() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    trainer.say(JobEnded(job, 1, error=ErrorKind.INVALID, detail="line 3: no label"))
    found = the_job(rig, job)
    assert (found.state, found.error, found.detail) == (
        JobState.FAILED,
        ErrorKind.INVALID,
        "line 3: no label",
    )


def test_cancel() -> None:
    rig, client = boot()
    job, _ = begun(rig, client)
    assert client.say(ThreadCancel(job)) == [Done()]
    child = rig.ranks["trainer-1"]
    assert effects(rig, SignalChild) == [SignalChild(child.pid, 1, 15)]
    assert the_job(rig, job).state is JobState.CANCELLED
    rig.exited(child, signal=15)
    assert effects(rig, Start) == []


def test_suspend_saves_and_resume_begins_a_new_attempt() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    client.say(ThreadSuspend(job))
    assert trainer.the(JobPace) == JobPace(job, 1, 1.0, stop=True)
    assert the_job(rig, job).state is JobState.STOPPING
    trainer.say(StepsDone(job, 1, [report(1), report(2)], 9, "saving"))
    trainer.say(CheckpointCommitted(job, 1, b"v" * 32, 2, 20))
    assert the_job(rig, job).doing == "saving"
    trainer.say(JobStopped(job, 1))
    rig.exited(rig.ranks["trainer-1"], code=0)
    assert (the_job(rig, job).state, the_job(rig, job).doing) == (JobState.SUSPENDED, "")
    assert rig.kernel.tables.processes.by_name.get("trainer-1") is None
    rig.wait(1000)
    assert effects(rig, Start) == []
    client.say(ThreadResume(job))
    assert effects(rig, Start) == [Start(rig.starts["trainer-1"].spec, 2)]
    assert rig.trainer().the(JobRun).step == 2


def test_suspend_before_it_runs_and_resume_before_it_has_left() -> None:
    rig, client = boot()
    job = rig.job(client)
    child = rig.fork(rig.starts["trainer-1"])
    client.say(ThreadSuspend(job))
    assert effects(rig, SignalChild) == [SignalChild(child.pid, 1, 15)]
    client.say(ThreadResume(job))
    assert the_job(rig, job).state is JobState.STOPPING
    rig.exited(child, signal=15)
    assert effects(rig, Start) == [Start(rig.starts["trainer-1"].spec, 2)]
    assert the_job(rig, job).losses == 0


def test_a_job_that_does_not_stop_is_told_harder() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    client.say(ThreadSuspend(job))
    signals = []
    for progress in range(limits.JOB_STOPPING_MS // 250 + 2):
        signals += [e for e in rig.wait(250) if isinstance(e, SignalChild)]
        client.beat()
        trainer.beat(progress, threads=(job,), positions=(1,))
    assert [s.signal for s in signals if isinstance(s, SignalChild)] == [15]


def alive(rig: Rig, peers: list[Peer], ms: int, beat: Beat) -> list[object]:
    kills: list[object] = []
    for _ in range(ms // 250):
        kills += [e for e in rig.wait(250) if isinstance(e, KillHung)]
        for peer in peers:
            peer.say(beat)
    return kills


def test_a_trainer_that_computes_nothing_is_killed_unless_it_said_so() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    held = Beat(7, [job], [1])
    assert alive(rig, [client, trainer], limits.JOB_SILENT_MS, held) == []
    assert len(alive(rig, [client, trainer], 1000, held)) == 1
    trainer.say(Working("saving", 100_000))
    assert alive(rig, [client, trainer], limits.JOB_SILENT_MS + 1000, held) == []


def test_a_nice_process_may_beat_late() -> None:
    rig, client = boot()
    begun(rig, client)
    held = Beat(7, [], [])
    assert alive(rig, [client], limits.JOB_BEAT_SILENT_MS - 1000, held) == []
    assert len(alive(rig, [client], 2000, held)) == 1


def test_waiting_for_room_in_order() -> None:
    rig, client = boot()
    first, _ = begun(rig, client, cores=3)
    second = rig.job(client, b"2" * 16, name="second", cores=2)
    third = rig.job(client, b"3" * 16, name="third", cores=1)
    urgent = rig.job(client, b"4" * 16, name="urgent", cores=1, priority=1)
    assert the_job(rig, second).state is JobState.WAITING
    assert "2 cores are asked for" in the_job(rig, second).doing
    # A core is free, but not for one that came later than the second and is no more urgent.
    assert the_job(rig, third).state is JobState.WAITING
    assert the_job(rig, third).doing == "waits behind an earlier job"
    assert the_job(rig, urgent).state is JobState.STARTING
    client.say(ThreadCancel(first))
    rig.exited(rig.ranks["trainer-1"], code=0)
    states = [the_job(rig, job).state for job in (urgent, second, third)]
    assert states == [JobState.STARTING, JobState.STARTING, JobState.STARTING]


# --- restarts of the kernel -----------------------------------------------------------------------


def children(rig: Rig) -> tuple[Child, ...]:
    return tuple(rig.ranks.values())


def test_a_whole_attempt_goes_on_under_the_next_kernel() -> None:
    rig, client = boot()
    job, (trainer, second) = begun(rig, client, processes=2)
    trainer.say(done(job, range(1, 4)))
    rig.restart(children=children(rig))
    found = the_job(rig, job)
    assert (found.state, found.attempt, found.step) == (JobState.STARTING, 1, 3)
    assert effects(rig, SignalChild) == []
    assert [e.spec.role for e in rig.effects if isinstance(e, Start)] == ["tokenizer"]
    for peer, child in zip((trainer, second), children(rig)):
        peer.greet(child)
        peer.say(ProcessStarted())
    assert [r.step for r in trainer.the(JobRun).reported] == [1, 2, 3]
    assert trainer.say(done(job, range(2, 6))) == [JobMark(job, 1, 5)]
    lease = rig.kernel.tables.processes.by_name["trainer-2"].lease
    assert lease is not None and lease.cores == [3]


def test_an_attempt_that_lost_a_rank_meanwhile_is_ended() -> None:
    rig, client = boot()
    job, _ = begun(rig, client, processes=2)
    left = rig.ranks["trainer-1"]
    rig.restart(children=(left,))
    assert effects(rig, SignalChild) == [SignalChild(left.pid, 1, 9)]
    assert [e.spec.name for e in rig.effects if isinstance(e, Start)] == ["tokenizer"]
    rig.exited(left, signal=9)
    starts = [e for e in rig.effects if isinstance(e, Start)]
    assert [(s.spec.name, s.incarnation) for s in starts] == [("trainer-1", 2), ("trainer-2", 2)]
    assert the_job(rig, job).attempt == 2


def test_what_carries_no_living_job_is_ended() -> None:
    rig, client = boot()
    job, _ = begun(rig, client)
    child = rig.ranks["trainer-1"]
    client.say(ThreadCancel(job))
    rig.restart(children=(child,))
    assert effects(rig, SignalChild) == [SignalChild(child.pid, 1, 9)]
    rig.journal.clear()
    rig.restart(children=(child,))
    assert effects(rig, SignalChild) == [SignalChild(child.pid, 1, 9)]
    rig.exited(child, signal=9)
    assert "trainer-1" not in rig.kernel.tables.processes.by_name


def test_a_job_goes_on_at_the_next_boot() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    trainer.say(done(job, range(1, 3)))
    rig.kernel.tables.halting = True
    rig.exited(rig.ranks["trainer-1"], signal=15)
    assert effects(rig, Start) == []
    assert the_job(rig, job).losses == 0
    rig.restart()
    assert the_job(rig, job).state is JobState.STARTING
    assert rig.trainer().the(JobRun).reported == [report(1), report(2)]


def test_a_suspended_job_that_was_leaving_is_told_again() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    client.say(ThreadSuspend(job))
    rig.restart(children=children(rig))
    assert the_job(rig, job).state is JobState.STOPPING
    trainer.greet(rig.ranks["trainer-1"])
    trainer.say(ProcessStarted())
    assert trainer.the(JobPace).stop
    rig.exited(rig.ranks["trainer-1"], code=0)
    assert the_job(rig, job).state is JobState.SUSPENDED


def test_suspend_and_resume_while_an_attempt_dies() -> None:
    rig, client = boot()
    job, _ = begun(rig, client, processes=2)
    rig.exited(rig.ranks["trainer-2"], signal=9)
    client.say(ThreadSuspend(job))
    assert the_job(rig, job).state is JobState.SUSPENDED
    client.say(ThreadResume(job))
    assert the_job(rig, job).state is JobState.WAITING
    assert effects(rig, Start) == []
    rig.exited(rig.ranks["trainer-1"], signal=9)
    assert len(effects(rig, Start)) == 2


def test_a_job_that_takes_too_much_memory_says_so() -> None:
    rig, client = boot()
    job = rig.job(client)
    for _ in range(limits.JOB_DEATHS_MAX):
        child = rig.fork(rig.starts["trainer-1"])
        exit = Exit("trainer-1", child.incarnation, child.pid, None, 9, out_of_memory=True)
        rig.handle(ChildExited(exit))
        rig.wait(limits.BACKOFF_MS_MAX)
    found = the_job(rig, job)
    assert found.state is JobState.FAILED
    assert "trainer-1: ended for want of memory" in found.detail


def test_one_rank_out_of_reach_does_not_keep_the_others_from_hearing() -> None:
    rig, client = boot()
    job, (first, second) = begun(rig, client, processes=2)
    first.say(Goodbye("draining"))
    client.say(ThreadSuspend(job))
    assert second.the(JobPace).stop


def test_a_rank_of_an_attempt_that_is_over_is_ended_by_the_next_kernel() -> None:
    rig, client = boot()
    job, _ = begun(rig, client)
    child = rig.ranks["trainer-1"]
    rig.exited(child, signal=9)
    assert the_job(rig, job).attempt == 2
    rig.restart(children=(child,))
    assert effects(rig, SignalChild) == [SignalChild(child.pid, 1, 9)]


def test_metrics_of_the_end_are_bounded() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    many = {"x" * limits.JOB_METRICS_BYTES_MAX: 0.5}
    (failed,) = trainer.say(JobEnded(job, 1, metrics=many))
    assert isinstance(failed, Failed) and failed.kind is ErrorKind.INVALID
    assert the_job(rig, job).state is JobState.RUNNING


def test_what_people_may_look_at_later_is_bounded_too() -> None:
    rig, client = boot()
    job, (trainer,) = begun(rig, client)
    metrics = {"x" * 1000: 0.5}
    for step in range(1, 301):
        trainer.say(StepsDone(job, 1, [StepReport(step, 0.5, metrics=metrics)]))
        trainer.say(CheckpointCommitted(job, 1, b"v" * 32, step, step))
    kept = the_job(rig, job).reports
    assert len(kept) == limits.JOB_METRICS_BYTES_MAX // 4016
    assert kept[-1].step == 300


def test_what_a_rank_said_before_it_died_is_told() -> None:
    rig, client = boot()
    job = rig.job(client)
    for _ in range(limits.JOB_DEATHS_MAX):
        child = rig.fork(rig.starts["trainer-1"])
        trainer = rig.peer("trainer")
        trainer.greet(child)
        trainer.say(Note("peft is not installed"))
        rig.exited(child, code=1)
        rig.wait(limits.BACKOFF_MS_MAX)
    assert "(last trainer-1: exit code 1: peft is not installed)" in the_job(rig, job).detail


def test_who_waits_for_another_service_is_not_judged() -> None:
    rig, client = boot()
    tokenizer = rig.tokenizer()
    job, (trainer,) = begun(rig, client)
    trainer.say(MetricsAsk(), target="tokenizer")
    ((header, _),) = tokenizer.heard

    def minute() -> list[object]:
        kills: list[object] = []
        for _ in range((limits.JOB_SILENT_MS + 2000) // 250):
            tokenizer.beat(1)
            kills += alive(rig, [client, trainer], 250, Beat(7, [job], [1]))
        return kills

    assert minute() == []
    tokenizer.say(MetricsText(""), reply_to=header.id)
    assert minute() != []


def test_a_full_process_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, client = boot()
    monkeypatch.setattr(limits, "PROCESSES_MAX", 1)
    job = rig.job(client)
    assert the_job(rig, job).doing == "waits: 1 processes live already"
    monkeypatch.undo()
    rig.wait(250)
    assert the_job(rig, job).state is JobState.STARTING


def test_a_start_that_failed_is_a_death() -> None:
    rig, client = boot()
    job = rig.job(client)
    start = rig.starts["trainer-1"]
    rig.handle(ChildExited(Exit(start.spec.name, 1, 1, 127, None)))
    assert the_job(rig, job).deaths == 1
    assert rig.starts["trainer-1"].incarnation == 2
    assert rig.kernel.tables.processes.by_name["trainer-1"].state is ProcessState.STARTING
