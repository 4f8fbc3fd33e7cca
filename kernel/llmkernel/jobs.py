"""Jobs: a recipe, a checkpoint, and what was reported beyond it.

What a fact can say of a job is durable; everything about its processes is soft and rebuilt from
those that live after a restart of the kernel.
"""

from collections.abc import Iterator

from llmproto import limits
from llmproto.jobs import JobState, StepReport

from llmkernel.facts import (
    AttemptBegun,
    AttemptLost,
    CheckpointTaken,
    JobAdmitted,
    JobChanged,
    JobOver,
    JobsForgotten,
    StepsReported,
)
from llmkernel.processes import Process

Urgency = tuple[int, int, int, bytes]
JobFact = AttemptBegun | AttemptLost | StepsReported | CheckpointTaken | JobOver | JobChanged


def metrics_bytes(report: StepReport) -> int:
    """What its metrics take as MessagePack, at most."""
    return sum(4 * len(name) + 16 for name in report.metrics)


class Job:
    """One training or evaluation run.

    Invariant: the kept reports are the steps up to `step` without a gap, and all of those beyond
    the checkpoint are among them.
    """

    __slots__ = (
        "admitted_ns",
        "attempt",
        "checkpoint",
        "checkpoint_step",
        "cores",
        "deaths",
        "detail",
        "device",
        "doing",
        "end",
        "ended_ns",
        "error",
        "hurried_ns",
        "id",
        "key",
        "kind",
        "losses",
        "memory_bytes",
        "metrics",
        "name",
        "names",
        "note",
        "position",
        "priority",
        "processes",
        "ranks",
        "recipe",
        "reports",
        "running",
        "service_class",
        "share",
        "start_ns",
        "state",
        "step",
        "steps_total",
        "stop_ns",
        "suspended",
        "tenant",
        "version",
    )

    def __init__(self, fact: JobAdmitted) -> None:
        self.id = fact.job
        self.tenant = fact.tenant
        self.key = fact.key
        self.kind = fact.kind
        self.name = fact.name
        self.recipe = fact.recipe
        self.processes = fact.processes
        self.memory_bytes = fact.memory_bytes
        self.cores = fact.cores
        self.device = fact.device
        self.service_class = fact.service_class
        self.priority = fact.priority
        self.admitted_ns = fact.admitted_ns
        self.suspended = fact.suspended
        self.attempt = fact.attempt
        """The last that was begun, 0 before the first."""
        self.deaths = fact.deaths
        """By itself, since the last new step or checkpoint."""
        self.losses = fact.losses
        """The same, of whatever cause."""
        self.checkpoint = fact.checkpoint
        self.checkpoint_step = fact.checkpoint_step
        self.position = fact.position
        self.step = fact.step
        """The highest that is reported: the mark."""
        self.steps_total = fact.steps_total
        self.reports = list(fact.reports)
        self.end = fact.end
        self.version = fact.version
        self.error = fact.error
        self.detail = fact.detail
        self.metrics = fact.metrics
        self.ended_ns = fact.ended_ns
        # Soft:
        self.state = self.rest_state
        self.ranks: dict[int, Process] = {}
        """Processes of the attempt that are not gone yet."""
        self.names: list[str] = []
        """Of its processes, by rank; the next attempt takes the same."""
        self.running = False
        """All ranks were told to run."""
        self.start_ns = 0
        """Not started again before."""
        self.stop_ns = 0
        """When it was told to leave its device."""
        self.share = 1.0
        self.hurried_ns = 0
        """When somebody last waited for its device."""
        self.doing = ""
        self.note = ""
        """What a rank of it said last, for people: why it cannot start."""

    def admitted(self) -> JobAdmitted:
        """The one fact that says all of it, for compaction."""
        return JobAdmitted(
            job=self.id,
            tenant=self.tenant,
            key=self.key,
            kind=self.kind,
            name=self.name,
            recipe=self.recipe,
            processes=self.processes,
            memory_bytes=self.memory_bytes,
            cores=self.cores,
            device=self.device,
            service_class=self.service_class,
            priority=self.priority,
            admitted_ns=self.admitted_ns,
            suspended=self.suspended,
            attempt=self.attempt,
            deaths=self.deaths,
            losses=self.losses,
            checkpoint=self.checkpoint,
            checkpoint_step=self.checkpoint_step,
            position=self.position,
            step=self.step,
            steps_total=self.steps_total,
            reports=list(self.reports),
            end=self.end,
            version=self.version,
            error=self.error,
            detail=self.detail,
            metrics=self.metrics,
            ended_ns=self.ended_ns,
        )

    @property
    def urgency(self) -> Urgency:
        """Smaller is placed first, and no two are equal."""
        return (self.service_class, -self.priority, self.admitted_ns, self.id)

    @property
    def rest_state(self) -> JobState:
        """Where it stands without processes."""
        if self.end is not None:
            return self.end
        return JobState.SUSPENDED if self.suspended else JobState.WAITING

    @property
    def beyond(self) -> list[StepReport]:
        """Reported steps that the checkpoint does not hold."""
        return self.reports[len(self.reports) - (self.step - self.checkpoint_step) :]

    def after(self, step: int) -> list[StepReport]:
        """Kept reports of later steps."""
        return self.reports[max(0, len(self.reports) - (self.step - step)) :]

    def apply(self, fact: JobFact) -> None:
        """Fold one fact in."""
        match fact:
            case AttemptBegun():
                self.attempt = max(self.attempt, fact.attempt)
            case AttemptLost():
                self.deaths, self.losses = fact.deaths, fact.losses
            case StepsReported():
                self._reported(fact)
            case CheckpointTaken():
                self.checkpoint, self.checkpoint_step = fact.version, fact.step
                self.position = fact.position
                self.deaths = self.losses = 0
                self._trim()
            case JobOver():
                self.end, self.ended_ns = fact.end, fact.ended_ns
                self.version, self.metrics = fact.version, fact.metrics
                self.error, self.detail = fact.error, fact.detail
                self.state = self.rest_state
            case JobChanged():
                self.suspended = fact.suspended
                self.service_class, self.priority = fact.service_class, fact.priority
                if not self.ranks:
                    self.state = self.rest_state

    def _reported(self, fact: StepsReported) -> None:
        self.steps_total = fact.steps_total
        for report in fact.reports:
            if report.step == self.step + 1:
                self.reports.append(report)
                self.step = report.step
                self.deaths = self.losses = 0
        self._trim()

    def _trim(self) -> None:
        """Those beyond the checkpoint are kept, and some for people who look in late."""
        beyond = self.step - self.checkpoint_step
        kept = max(beyond, limits.JOB_REPORTS_KEPT)
        gone = max(0, len(self.reports) - kept)
        excess = sum(map(metrics_bytes, self.reports[gone:])) - limits.JOB_METRICS_BYTES_MAX
        while excess > 0 and len(self.reports) - gone > beyond:
            excess -= metrics_bytes(self.reports[gone])
            gone += 1
        del self.reports[:gone]

    def check(self) -> None:
        """Assert the invariant in full."""
        steps = [report.step for report in self.reports]
        assert steps == list(range(self.step - len(steps) + 1, self.step + 1)), steps
        assert 0 <= self.step - self.checkpoint_step <= len(steps), (self.step, len(steps))
        assert self.step - self.checkpoint_step <= limits.JOB_REPORTS_MAX
        assert (self.checkpoint is None) <= (self.checkpoint_step == 0)
        if self.end is not None:
            assert self.state is self.end
        elif self.state in (JobState.STARTING, JobState.RUNNING):
            assert sorted(self.ranks) == list(range(self.processes)), self.ranks
            assert not self.suspended
            assert self.running == (self.state is JobState.RUNNING)
        elif self.state is JobState.STOPPING:
            assert self.ranks
        else:
            assert self.state is self.rest_state and not self.running
        for rank, process in self.ranks.items():
            assert (process.job, process.attempt, process.rank) == (self.id, self.attempt, rank)


class JobTable:
    """Every job that is not forgotten, by id and by request key."""

    def __init__(self) -> None:
        self.by_id: dict[bytes, Job] = {}
        self.by_key: dict[tuple[int, bytes], Job] = {}
        self.running: dict[bytes, Job] = {}
        """Soft: those whose ranks were told to run."""

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.by_id.values())

    def get(self, job: bytes | None) -> Job | None:
        """The job of this id, if it is known."""
        return self.by_id.get(job) if job is not None else None

    def living(self) -> list[Job]:
        """Those that have not ended; at most JOBS_MAX are looked through."""
        return [job for job in self.by_id.values() if job.end is None]

    def insert(self, job: Job) -> None:
        """Take a job in; one of the same id is replaced (compaction writes it again)."""
        self.remove(job.id)
        self.by_id[job.id] = job
        self.by_key[(job.tenant, job.key)] = job

    def remove(self, job_id: bytes) -> None:
        """Forget a job, if it is known."""
        job = self.by_id.pop(job_id, None)
        if job is not None:
            del self.by_key[(job.tenant, job.key)]

    def run(self, job: Job) -> None:
        """Its ranks compute from now on."""
        job.running = True
        self.running[job.id] = job

    def rest(self, job: Job) -> None:
        """They do not, whatever else they do."""
        job.running = False
        self.running.pop(job.id, None)

    def apply(self, fact: JobFact) -> None:
        """Fold one fact in; one about a job that is not known is a left-over of compaction."""
        job = self.by_id.get(fact.job)
        if job is not None:
            job.apply(fact)

    def forget(self, fact: JobsForgotten) -> None:
        """Their ends are long past."""
        for job_id in fact.jobs:
            self.remove(job_id)

    def check(self) -> None:
        """Assert the invariant in full."""
        assert len(self.by_id) == len(self.by_key) <= limits.JOBS_MAX
        assert list(self.running.values()) == [j for j in self.running.values() if j.running]
        for job in self.by_id.values():
            assert self.by_key[(job.tenant, job.key)] is job
            assert job.running == (job.id in self.running)
            job.check()
