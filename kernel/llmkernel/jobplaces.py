"""Where jobs go: leases for all ranks of a job at once, and who makes room for whom.

Serving comes first.  A job takes what is free, and what executors have left idle for long; a model
that somebody waits for takes what jobs of a lower class hold, and these leave with a checkpoint.

Changes: begins attempts (through facts), starts their processes, stops idle executors.
"""

from collections.abc import Callable
from typing import Final

from llmproto import limits
from llmproto.init import Child, Spec
from llmproto.jobs import JobKind, JobState
from llmproto.models import ModelEntry
from llmproto.operation import Lease

from llmkernel.events import Wake
from llmkernel.facts import AttemptBegun
from llmkernel.jobpace import URGENT_CLASS_MAX
from llmkernel.jobs import Job
from llmkernel.placement import Misfit, Ranks, place_ranks
from llmkernel.processes import Process
from llmkernel.supervision import SIGKILL, Supervision
from llmkernel.tables import MS, Tables

JOB_NICE: Final = 5
"""Of the operating system: beside a busy process of nice 0 it gets a quarter of a shared core (335
parts to 1024), the share that it is held to anyway, and all of an idle one.  Less would make its
start, which nothing else holds back, take a minute."""
IDLE_MS: Final = 60_000
"""An executor that nobody asked for so long makes room for a job.  Sooner, the two would take turns
at loading."""
ROLES: Final = {JobKind.TRAIN: "trainer", JobKind.EVALUATE: "evaluator"}


class Places:
    """Gives leases to jobs."""

    def __init__(self, tables: Tables, supervision: Supervision) -> None:
        self._t = tables
        self._supervision = supervision
        self.preload: Callable[[], tuple[str, ...]] = tuple
        """Set by the core: models that stay loaded though nobody asks."""

    def adopt(self, child: Child) -> Process | None:
        """A living rank of an earlier kernel: what it was started with says job and lease."""
        t = self._t
        said = dict(zip(child.spec.arguments[::2], child.spec.arguments[1::2]))
        if child.spec.role not in ROLES.values() or "--job" not in said:
            return None
        process = t.processes.by_name[child.spec.name]
        process.job = bytes.fromhex(said["--job"])
        process.attempt, process.rank = int(said["--attempt"]), int(said["--rank"])
        process.lease = Lease(
            device=said["--device"],
            cores=[int(core) for core in said["--cores"].split(",") if core],
            memory_bytes=int(said["--memory"]),
        )
        job = t.state.jobs.get(process.job)
        process.model = job.name if job is not None else None
        if job is None or job.end is not None or job.attempt != process.attempt:
            self._supervision.stop(process, signal=SIGKILL)
        else:
            job.ranks[process.rank] = process
        return process

    # --- placing ----------------------------------------------------------------------------------

    def ranks_of(self, job: Job) -> Ranks:
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
            elif kept and (None in kept or job.device is None or job.device in kept):
                job.doing = "waits behind an earlier job"
            else:
                self._try(job, kept)

    def _try(self, job: Job, kept: set[str | None]) -> None:
        t = self._t
        granted = self._supervision.promised()
        leases = place_ranks(t.devices, granted, self._busy(), self.ranks_of(job))
        if isinstance(leases, Misfit):
            job.doing = f"waits for room: {leases.detail}"
            kept.add(job.device)
            if leases.short_of is not None:
                self._stop_idle(leases.short_of)
        elif len(t.processes.by_name) + job.processes > limits.PROCESSES_MAX:
            job.doing = f"waits: {len(t.processes.by_name)} processes live already"
        else:
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
        job.doing = ""
        self._name(job)
        for rank, lease in enumerate(leases):
            spec = self._spec(job, rank, lease)
            process = Process(spec.name, spec.role, spec, t.now_ns)
            process.incarnation = job.attempt - 1  # its start makes it the attempt's number
            process.job, process.attempt, process.rank = job.id, job.attempt, rank
            process.lease, process.model = lease, job.name
            t.processes.insert(process)
            job.ranks[rank] = process
        self._supervision.start_due()

    def _spec(self, job: Job, rank: int, lease: Lease) -> Spec:
        config = self._t.config
        trains = job.kind is JobKind.TRAIN
        return Spec(
            name=job.names[rank],
            role=ROLES[job.kind],
            module=config.trainer_module if trains else config.evaluator_module,
            fork=trains,
            arguments=[
                *("--job", job.id.hex(), "--attempt", str(job.attempt)),
                *("--rank", str(rank), "--processes", str(job.processes)),
                *("--device", lease.device, "--cores", ",".join(map(str, lease.cores))),
                *("--memory", str(lease.memory_bytes)),
            ],
            cores=lease.cores,
            nice=JOB_NICE,
        )

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

    # --- making room ------------------------------------------------------------------------------

    def _stop_idle(self, device: str) -> None:
        """One executor that nobody has asked for long makes room there, and no other while it
        goes."""
        t = self._t
        here = [
            p
            for p in t.processes.executors.values()
            if p.lease is not None and p.lease.device == device
        ]
        if any(not p.desired for p in here):
            return
        old_ns = t.now_ns - IDLE_MS * MS
        kept = {*map(t.entry_of, self.preload()), *t.wishes}
        idle = [p for p in self._supervision.idle() if p in here and p.idle_ns < old_ns]
        idle = [p for p in idle if p.model not in kept]
        if idle:
            first = min(idle, key=lambda p: p.idle_ns)
            t.log("info", "idle model unloaded for a job", model=first.model)
            self._supervision.stop(first)

    def to_displace(self, model: ModelEntry) -> Job | None:
        """The job that is to leave for this model: the least urgent of a lower class than who waits
        for it, if it fits once all such jobs are gone."""
        t = self._t
        first = t.queue.first(model.name)
        urgency = first.service_class if first is not None else URGENT_CLASS_MAX
        lower = [
            job
            for job in t.state.jobs.living()
            if job.ranks and job.service_class > urgency and not self._leaves(job)
        ]
        if not lower or not self._supervision.would_fit(model, {job.id for job in lower}):
            return None
        return max(lower, key=lambda job: job.urgency)

    def _leaves(self, job: Job) -> bool:
        return job.state not in (JobState.STARTING, JobState.RUNNING)
