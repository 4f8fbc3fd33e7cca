"""Jobs get processes, and what these say and how they die.

An attempt is one start of all processes of a job.  It begins when there is room for every rank,
runs when every rank is ready, and is over when the first of them is gone: the others are ended, and
the next attempt goes on from the checkpoint.

Changes: jobs (through facts) and their soft state; starts and stops their processes.
"""

from typing import Final

from llmproto import limits
from llmproto.connection import Beat
from llmproto.errors import ErrorKind, RemoteError
from llmproto.init import Child, Exit
from llmproto.jobs import (
    CheckpointCommitted,
    JobEnded,
    JobMark,
    JobPace,
    JobRun,
    JobState,
    JobStopped,
    StepReport,
    StepsDone,
)
from llmproto.models import ModelEntry
from llmproto.operation import ProcessState
from llmproto.threads import Done

from llmkernel.facts import (
    AttemptLost,
    CheckpointTaken,
    JobOver,
    JobsForgotten,
    StepsReported,
)
from llmkernel.jobpace import Pacing
from llmkernel.jobplaces import Places
from llmkernel.jobs import Job, metrics_bytes
from llmkernel.processes import Process
from llmkernel.sessions import Session
from llmkernel.supervision import SIGKILL, Supervision
from llmkernel.tables import MS, Tables

RENDEZVOUS: Final = "job-"
"""How the names of the files begin that the ranks of an attempt meet at; job and attempt follow."""


class JobWork:
    """Carries jobs out."""

    def __init__(self, tables: Tables, supervision: Supervision) -> None:
        self._t = tables
        self._supervision = supervision
        self.places = Places(tables, supervision)
        self.pacing = Pacing(tables, self._tell_pace)

    # --- after a restart of the kernel ------------------------------------------------------------

    def boot(self, children: tuple[Child, ...]) -> None:
        """Attempts whose processes all live go on; the rest of them are ended."""
        t = self._t
        for job in t.state.jobs:
            job.state = job.rest_state
        for child in children:
            self.places.adopt(child)
        for job in t.state.jobs.living():
            if len(job.ranks) == job.processes:
                job.names = [job.ranks[rank].name for rank in range(job.processes)]
                job.state = JobState.STOPPING if job.suspended else JobState.STARTING
                job.stop_ns = t.now_ns
            else:
                self._end_ranks(job)

    # --- running ----------------------------------------------------------------------------------

    def ready(self, session: Session, process: Process) -> None:
        """A rank is ready, or says so again after it was welcomed anew."""
        assert process.job is not None
        job = self._t.state.jobs.by_id[process.job]
        assert job.ranks[process.rank] is process
        if job.state is JobState.STOPPING:
            self._tell(process, self._pace(job))
        elif job.running:
            self._run(job, process)
        elif all(self._is_ready(rank) for rank in job.ranks.values()):
            job.state = JobState.RUNNING
            self._t.state.jobs.run(job)
            job.share = self.pacing.share(job)
            for rank in job.ranks.values():
                self._run(job, rank)

    def _is_ready(self, process: Process) -> bool:
        session = self._t.sessions.by_id.get(process.session or b"")
        return session is not None and session.ready and process.state is ProcessState.READY

    def _run(self, job: Job, process: Process) -> None:
        t = self._t
        process.running = True
        process.moved_ns = process.run_ns = t.now_ns
        self._tell(
            process,
            JobRun(
                job=job.id,
                attempt=job.attempt,
                kind=job.kind,
                name=job.name,
                recipe=job.recipe,
                rank=process.rank,
                processes=job.processes,
                rendezvous=f"{t.config.run_folder}/{RENDEZVOUS}{job.id.hex()}-{job.attempt}",
                share=job.share,
                checkpoint=job.checkpoint,
                step=job.checkpoint_step,
                position=job.position,
                reported=job.beyond,
            ),
        )

    def _tell(self, process: Process, message: JobRun | JobPace) -> None:
        session = self._t.sessions.by_id.get(process.session or b"")
        if session is not None:
            self._t.send(session, message)

    def holds(self, process: Process, beat: Beat) -> None:
        """A rank that does not list its job has not heard of it: it is told again."""
        job = self._t.state.jobs.get(process.job)
        late_ns = self._t.now_ns - limits.RUN_RESEND_MS * MS
        if job is None or job.state is not JobState.RUNNING or process.job in beat.threads:
            return
        if process.running and process.run_ns < late_ns:
            moved_ns = process.moved_ns
            self._run(job, process)
            process.moved_ns = moved_ns

    # --- what rank 0 says -------------------------------------------------------------------------

    def _current(self, session: Session, job_id: bytes, attempt: int) -> Job:
        """The job whose living attempt this is; RemoteError(STALE) otherwise."""
        job = self._t.state.jobs.get(job_id)
        process = self._t.processes.by_name.get(session.process or "")
        if job is None or process is None or process.job != job_id:
            raise RemoteError(ErrorKind.STALE, f"job {job_id.hex()} is not carried out by you")
        if job.attempt != attempt or process.attempt != attempt or process.rank != 0:
            now = f"attempt {job.attempt}, rank 0"
            raise RemoteError(
                ErrorKind.STALE,
                f"{now} of job {job_id.hex()} is heard, not attempt {attempt} rank {process.rank}",
            )
        return job

    def steps(self, session: Session, done: StepsDone) -> None:
        """Journal what comes next; the mark says how far that is."""
        t = self._t
        job = self._current(session, done.job, done.attempt)
        job.doing = done.doing[: limits.NAME_BYTES_MAX]
        largest = max(map(metrics_bytes, done.reports), default=0)
        if largest > limits.JOB_METRICS_BYTES_MAX:
            raise RemoteError(
                ErrorKind.INVALID,
                f"the metrics of one step take {largest} bytes, at most "
                f"{limits.JOB_METRICS_BYTES_MAX} may be kept of all since a checkpoint",
            )
        rows = self._fresh(job, done.reports)
        if job.end is None and t.journal_room and (rows or done.steps_total != job.steps_total):
            t.record(StepsReported(job.id, rows, done.steps_total))
        t.send(session, JobMark(job.id, done.attempt, job.step))

    def _fresh(self, job: Job, reports: list[StepReport]) -> list[StepReport]:
        """Those that follow the mark without a gap, as far as the next JobRun can hold them."""
        rows: list[StepReport] = []
        step = job.step
        most = job.checkpoint_step + limits.JOB_REPORTS_MAX
        room = limits.JOB_METRICS_BYTES_MAX - sum(map(metrics_bytes, job.beyond))
        for report in reports:
            if report.step == step + 1:
                room -= metrics_bytes(report)
                if room < 0 or report.step > most:
                    break  # the trainer is to take a checkpoint first
                rows.append(report)
                step = report.step
        return rows

    def checkpoint(self, session: Session, taken: CheckpointCommitted) -> Done:
        """The job goes on from here from now on."""
        t = self._t
        job = self._current(session, taken.job, taken.attempt)
        if job.end is not None or (job.checkpoint, job.checkpoint_step) == (
            taken.version,
            taken.step,
        ):
            return Done()
        if taken.step < job.checkpoint_step:
            raise RemoteError(
                ErrorKind.STALE,
                f"the checkpoint holds {taken.step} steps, the last one {job.checkpoint_step}",
            )
        if taken.step > job.step:
            raise RemoteError(
                ErrorKind.UNAVAILABLE,
                f"the checkpoint holds {taken.step} steps, {job.step} are reported: "
                "send the reports first",
                retry_after_ms=50,
            )
        t.need_room()
        t.record(CheckpointTaken(job.id, taken.version, taken.step, taken.position))
        return Done()

    def ended(self, session: Session, ended: JobEnded) -> Done:
        """It says that it is over; its processes exit by themselves."""
        job = self._current(session, ended.job, ended.attempt)
        most = limits.JOB_METRICS_BYTES_MAX
        if (size := sum(4 * len(name) + 16 for name in ended.metrics)) > most:
            detail = f"the metrics of a job take at most {most} bytes, these {size}"
            raise RemoteError(ErrorKind.INVALID, detail)
        if job.end is None:
            state = JobState.DONE if ended.error is None else JobState.FAILED
            self.finish(
                job,
                state,
                version=ended.version,
                error=ended.error,
                detail=ended.detail,
                metrics=ended.metrics,
            )
            for process in job.ranks.values():
                self._supervision.stop(process, signal=None)
        return Done()

    def stopped(self, session: Session, stopped: JobStopped) -> None:
        """What could be saved is: its processes exit by themselves."""
        try:
            job = self._current(session, stopped.job, stopped.attempt)
        except RemoteError:
            return  # of an attempt that is over
        if job.state is JobState.STOPPING:
            for process in job.ranks.values():
                self._supervision.stop(process, signal=None)

    # --- ends -------------------------------------------------------------------------------------

    def finish(
        self,
        job: Job,
        state: JobState,
        *,
        version: bytes | None = None,
        error: ErrorKind | None = None,
        detail: str = "",
        metrics: dict[str, float] | None = None,
    ) -> None:
        """End a job; the first end wins."""
        if job.end is not None:
            return
        t = self._t
        detail = detail[: limits.DETAIL_BYTES_MAX]
        self._t.state.jobs.rest(job)
        t.record(JobOver(job.id, state, t.now_ns, version, error, detail, metrics or {}))
        level = "info" if error is None else "warning"
        t.log(level, "job over", job=job.id.hex(), name=job.name, state=state.value, detail=detail)

    def leave(self, job: Job) -> None:
        """It is to leave its device: with a checkpoint, where it has begun to compute."""
        if job.state is JobState.RUNNING:
            job.state = JobState.STOPPING
            job.stop_ns = self._t.now_ns
            self._t.state.jobs.rest(job)
            self._tell_pace(job)
        elif job.state is JobState.STARTING:
            job.state = JobState.STOPPING
            job.stop_ns = self._t.now_ns
            self.stop_ranks(job)
        elif job.state is JobState.WAITING:
            job.state = job.rest_state

    def displace(self, model: ModelEntry) -> bool:
        """A job leaves its device for a model that somebody waits for; whether one does."""
        t = self._t
        if any(job.state is JobState.STOPPING for job in t.state.jobs.living()):
            return True
        job = self.places.to_displace(model)
        if job is not None:
            t.log("info", "job leaves for a model", job=job.id.hex(), model=model.name)
            self.leave(job)
        return job is not None

    def stop_ranks(self, job: Job) -> None:
        """SIGTERM."""
        for process in job.ranks.values():
            process.running = False
            self._supervision.stop(process)

    def _end_ranks(self, job: Job) -> None:
        for process in job.ranks.values():
            process.running = False
            self._supervision.stop(process, signal=SIGKILL)

    def exited(self, process: Process, exit: Exit, *, guilty: bool) -> None:
        """A rank is gone (its row is removed already)."""
        t = self._t
        job = t.state.jobs.get(process.job)
        if job is not None and job.ranks.get(process.rank) is process:
            del job.ranks[process.rank]
            by_itself = guilty or (exit.signal is None and not process.signalled)
            self._lost(job, process, exit, by_itself=by_itself)
        self.places.place()

    def _lost(self, job: Job, process: Process, exit: Exit, *, by_itself: bool) -> None:
        t = self._t
        if t.halting:
            self._t.state.jobs.rest(job)
            job.state = job.rest_state  # it goes on at the next boot
        elif job.state in (JobState.STARTING, JobState.RUNNING):
            self._t.state.jobs.rest(job)
            job.state = job.rest_state
            deaths = job.deaths + by_itself
            t.record(AttemptLost(job.id, deaths, job.losses + 1))
            rest_ms = _rest_ms(job.deaths)
            job.start_ns = t.now_ns + rest_ms * MS
            job.doing = f"{process.name}: {_how(exit)}"
            self._give_up(job, process, exit)
            self._end_ranks(job)
        elif job.state is JobState.STOPPING and exit.code != 0:
            self._end_ranks(job)  # the others would wait for it
        if not job.ranks:
            self._t.state.jobs.rest(job)
            if job.state is JobState.STOPPING:
                job.doing = ""
            job.state = job.rest_state

    def _give_up(self, job: Job, process: Process, exit: Exit) -> None:
        """A job that dies again and again comes nowhere."""
        if job.deaths < limits.JOB_DEATHS_MAX and job.losses < limits.JOB_LOSSES_MAX:
            return
        times = job.deaths if job.deaths >= limits.JOB_DEATHS_MAX else job.losses
        self.finish(
            job,
            JobState.FAILED,
            error=ErrorKind.INTERNAL,
            detail=f"its processes died {times} times without a new step (last {process.name}: "
            f"{_how(exit)}{': ' if job.note else ''}{job.note}); see `llmos logs {process.name}`",
        )

    # --- time -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """What is late is ended; what is old is forgotten; what waits may have room."""
        t = self._t
        late_ns = t.now_ns - limits.JOB_STOPPING_MS * MS
        for job in t.state.jobs.living():
            if job.state is JobState.STOPPING and job.stop_ns < late_ns:
                self.stop_ranks(job)
        self.pacing.tick()
        self._forget()
        self.places.place()

    def _forget(self) -> None:
        t = self._t
        old_ns = t.now_ns - limits.JOB_KEPT_MS * MS
        old = [
            job.id
            for job in t.state.jobs
            if job.end is not None and job.ended_ns < old_ns and not job.ranks
        ]
        if old:
            t.record(JobsForgotten(old, t.now_ns))

    def _tell_pace(self, job: Job) -> None:
        for process in job.ranks.values():
            self._tell(process, self._pace(job))

    def _pace(self, job: Job) -> JobPace:
        stop = job.state is JobState.STOPPING
        return JobPace(job.id, job.attempt, job.share, stop=stop)


def _rest_ms(deaths: int) -> int:
    """How long it rests after so many deaths: not at all after a first, then doubling."""
    if deaths <= 1:
        return 0
    return min(limits.BACKOFF_MS_FIRST << (deaths - 2), limits.BACKOFF_MS_MAX)


def _how(exit: Exit) -> str:
    if exit.out_of_memory:
        return "ended for want of memory"
    return f"signal {exit.signal}" if exit.signal is not None else f"exit code {exit.code}"
