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
from llmproto.init import Child, Exit, Spec
from llmproto.jobs import (
    CheckpointCommitted,
    JobEnded,
    JobKind,
    JobMark,
    JobPace,
    JobRun,
    JobState,
    JobStopped,
    StepReport,
    StepsDone,
)
from llmproto.operation import Lease, ProcessState
from llmproto.threads import Done

from llmkernel.events import Wake
from llmkernel.facts import (
    AttemptBegun,
    AttemptLost,
    CheckpointTaken,
    JobOver,
    JobsForgotten,
    StepsReported,
)
from llmkernel.jobpace import hurried
from llmkernel.jobs import Job
from llmkernel.placement import Misfit, Ranks, place_ranks
from llmkernel.processes import Process
from llmkernel.sessions import Session
from llmkernel.supervision import SIGKILL, Supervision
from llmkernel.tables import MS, Tables

JOB_NICE: Final = 10
"""Of the operating system: beside a serving process of nice 0 it gets a tenth of a shared core, and
all of an idle one."""
QUIET_MS: Final = 1_000
"""A reader's next question follows within moments: the share does not follow each of them."""
RENDEZVOUS: Final = "job-"
"""How the names of the files begin that the ranks of an attempt meet at; job and attempt follow."""
ROLES: Final = {JobKind.TRAIN: "trainer", JobKind.EVALUATE: "evaluator"}


class JobWork:
    """Carries jobs out."""

    def __init__(self, tables: Tables, supervision: Supervision) -> None:
        self._t = tables
        self._supervision = supervision

    # --- after a restart of the kernel ------------------------------------------------------------

    def boot(self, children: tuple[Child, ...]) -> None:
        """Attempts whose processes all live go on; the rest of them are ended."""
        t = self._t
        for job in t.state.jobs:
            job.state = job.rest_state
        for child in children:
            process = t.processes.by_name[child.spec.name]
            said = dict(zip(child.spec.arguments[::2], child.spec.arguments[1::2]))
            if child.spec.role not in ROLES.values() or "--job" not in said:
                continue
            process.job = bytes.fromhex(said["--job"])
            process.attempt, process.rank = int(said["--attempt"]), int(said["--rank"])
            process.lease = Lease(
                device=said["--device"],
                cores=[int(core) for core in said["--cores"].split(",") if core],
                memory_bytes=int(said["--memory"]),
            )
            found = t.state.jobs.get(process.job)
            process.model = found.name if found is not None else None
            if found is None or found.end is not None or found.attempt != process.attempt:
                self._supervision.stop(process, signal=SIGKILL)
            else:
                found.ranks[process.rank] = process
        for job in t.state.jobs.living():
            if len(job.ranks) == job.processes:
                job.names = [job.ranks[rank].name for rank in range(job.processes)]
                job.state = JobState.STOPPING if job.suspended else JobState.STARTING
                job.stop_ns = t.now_ns
            else:
                self._end_ranks(job)
        self.place()

    # --- placing ----------------------------------------------------------------------------------

    def ranks(self, job: Job) -> Ranks:
        """What it asks for."""
        cores = job.cores if job.cores is not None else self._t.config.job_cores
        return Ranks(job.processes, job.memory_bytes, cores, job.device)

    def place(self) -> None:
        """Start what waits and has room, the most urgent first.  What waits for a device keeps it
        free of those behind it, so that a large job is not passed over for ever."""
        t = self._t
        if t.halting or not t.journal_room:
            return
        waiting = [j for j in t.state.jobs.living() if j.state is JobState.WAITING and not j.ranks]
        kept: set[str | None] = set()
        for job in sorted(waiting, key=lambda j: j.urgency):
            if t.now_ns < job.start_ns:
                t.effects.append(Wake(job.start_ns))
                continue
            if kept and (None in kept or job.device is None or job.device in kept):
                job.doing = "waits behind an earlier job"
                continue
            leases = place_ranks(
                t.devices, self._supervision.granted(), self._busy(), self.ranks(job)
            )
            if isinstance(leases, Misfit):
                job.doing = f"waits for room: {leases.detail}"
                kept.add(job.device)
            elif len(t.processes.by_name) + job.processes <= limits.PROCESSES_MAX:
                self._begin(job, leases)

    def _busy(self) -> dict[int, int]:
        """Cores that jobs hold."""
        busy: dict[int, int] = {}
        for process in self._t.processes.by_name.values():  # at most PROCESSES_MAX
            if process.job is not None and process.lease is not None:
                for core in process.lease.cores:
                    busy[core] = busy.get(core, 0) + 1
        return busy

    def _begin(self, job: Job, leases: list[Lease]) -> None:
        t = self._t
        t.record(AttemptBegun(job.id, job.attempt + 1))
        job.state = JobState.STARTING
        self._t.state.jobs.rest(job)
        job.doing = ""
        self._name(job)
        module = t.config.trainer_module if job.kind is JobKind.TRAIN else t.config.evaluator_module
        for rank, lease in enumerate(leases):
            spec = Spec(
                name=job.names[rank],
                role=ROLES[job.kind],
                module=module,
                fork=job.kind is JobKind.TRAIN,
                arguments=[
                    *("--job", job.id.hex(), "--attempt", str(job.attempt)),
                    *("--rank", str(rank), "--processes", str(job.processes)),
                    *("--device", lease.device, "--cores", ",".join(map(str, lease.cores))),
                    *("--memory", str(lease.memory_bytes)),
                ],
                cores=lease.cores,
                nice=JOB_NICE,
            )
            process = Process(spec.name, spec.role, spec, t.now_ns)
            process.incarnation = job.attempt - 1  # its start makes it the attempt's number
            process.job, process.attempt, process.rank = job.id, job.attempt, rank
            process.lease, process.model = lease, job.name
            t.processes.insert(process)
            job.ranks[rank] = process
        self._supervision.start_due()

    def _name(self, job: Job) -> None:
        """The names that it had, where nobody else has them now."""
        names = self._t.processes.by_name
        taken = {n for j in self._t.state.jobs.living() if j is not job for n in j.names}
        if job.names and not any(name in names or name in taken for name in job.names):
            return
        job.names = []
        number = 1
        while len(job.names) < job.processes:
            name = f"{ROLES[job.kind]}-{number}"
            if name not in names and name not in taken:
                job.names.append(name)
            number += 1

    # --- running ----------------------------------------------------------------------------------

    def ready(self, session: Session, process: Process) -> None:
        """A rank is ready, or says so again after it was welcomed anew."""
        job = self._t.state.jobs.get(process.job)
        if job is None or job.ranks.get(process.rank) is not process:
            return
        if job.state is JobState.STOPPING:
            self._tell(process, self._pace(job))
        elif job.running:
            self._run(job, process)
        elif all(self._is_ready(rank) for rank in job.ranks.values()):
            job.state = JobState.RUNNING
            self._t.state.jobs.run(job)
            job.share = self._t.config.job_share if self._hurried(job) else 1.0
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

    def steps(self, session: Session, done: StepsDone) -> JobMark:
        """Journal what comes next; the mark says how far that is."""
        t = self._t
        job = self._current(session, done.job, done.attempt)
        job.doing = done.doing[: limits.NAME_BYTES_MAX]
        largest = max(map(_metrics_bytes, done.reports), default=0)
        if largest > limits.JOB_METRICS_BYTES_MAX:
            raise RemoteError(
                ErrorKind.INVALID,
                f"the metrics of one step take {largest} bytes, at most "
                f"{limits.JOB_METRICS_BYTES_MAX} may be kept of all since a checkpoint",
            )
        rows = self._fresh(job, done.reports)
        if job.end is None and t.journal_room and (rows or done.steps_total != job.steps_total):
            t.record(StepsReported(job.id, rows, done.steps_total))
        return JobMark(job.id, done.attempt, job.step)

    def _fresh(self, job: Job, reports: list[StepReport]) -> list[StepReport]:
        """Those that follow the mark without a gap, as far as the next JobRun can hold them."""
        rows: list[StepReport] = []
        step = job.step
        most = job.checkpoint_step + limits.JOB_REPORTS_MAX
        room = limits.JOB_METRICS_BYTES_MAX - sum(map(_metrics_bytes, job.beyond))
        for report in reports:
            if report.step == step + 1:
                room -= _metrics_bytes(report)
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
            for process in job.ranks.values():
                self._tell(process, self._pace(job))
        elif job.state is JobState.STARTING:
            job.state = JobState.STOPPING
            job.stop_ns = self._t.now_ns
            self.stop_ranks(job)
        elif job.state is JobState.WAITING:
            job.state = job.rest_state

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
        self.place()

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
            job.doing = f"{process.name} {_how(exit)}"
            self._give_up(job, process, exit)
            self._end_ranks(job)
        elif job.state is JobState.STOPPING and exit.code != 0:
            self._end_ranks(job)  # the others would wait for it
        if not job.ranks:
            self._t.state.jobs.rest(job)
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
            detail=f"its processes died {times} times without a new step (last: {process.name}, "
            f"{_how(exit)}); see `llmos logs {process.name}`",
        )

    # --- time -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """What is late is ended; what is old is forgotten; what waits may have room."""
        t = self._t
        late_ns = t.now_ns - limits.JOB_STOPPING_MS * MS
        for job in t.state.jobs.living():
            if job.state is JobState.STOPPING and job.stop_ns < late_ns:
                self.stop_ranks(job)
            elif job.running:
                self._relax(job)
        self._forget()
        self.place()

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

    # --- pace -------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Somebody may wait for a device that jobs compute on: they are held back at once."""
        for job in self._t.state.jobs.running.values():
            if job.share == 1.0 and self._hurried(job):
                self._set_share(job, self._t.config.job_share)

    def _relax(self, job: Job) -> None:
        """They run freely again when nobody has waited for a while."""
        t = self._t
        if self._hurried(job):
            job.hurried_ns = t.now_ns
            if job.share == 1.0:
                self._set_share(job, t.config.job_share)
        elif job.share < 1.0 and t.now_ns - job.hurried_ns > QUIET_MS * MS:
            self._set_share(job, 1.0)

    def _hurried(self, job: Job) -> bool:
        leases = [p.lease for p in job.ranks.values() if p.lease is not None]
        return hurried(leases, self._t.processes.executors.values())

    def _set_share(self, job: Job, share: float) -> None:
        job.share = share
        job.hurried_ns = self._t.now_ns
        for process in job.ranks.values():
            self._tell(process, self._pace(job))

    def _pace(self, job: Job) -> JobPace:
        stop = job.state is JobState.STOPPING
        return JobPace(job.id, job.attempt, job.share, stop=stop)


def _metrics_bytes(report: StepReport) -> int:
    return sum(4 * len(name) + 16 for name in report.metrics)


def _rest_ms(deaths: int) -> int:
    """How long it rests after so many deaths: not at all after a first, then doubling."""
    if deaths <= 1:
        return 0
    return min(limits.BACKOFF_MS_FIRST << (deaths - 2), limits.BACKOFF_MS_MAX)


def _how(exit: Exit) -> str:
    if exit.out_of_memory:
        return "was ended for want of memory"
    return f"signal {exit.signal}" if exit.signal is not None else f"exit code {exit.code}"
