"""What may be asked of the kernel about jobs.

Changes: jobs (through facts).
"""

from typing import Final

import msgspec
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import (
    JobAsk,
    JobFound,
    JobKind,
    JobRow,
    Jobs,
    JobsAsk,
    JobSpawn,
    JobSpawned,
    JobState,
    StepReport,
)
from llmproto.threads import ThreadRenice

from llmkernel.asker import Asker
from llmkernel.facts import JobAdmitted, JobChanged, JobsForgotten
from llmkernel.jobs import Job, metrics_bytes
from llmkernel.jobwork import JobWork
from llmkernel.placement import Misfit, place_ranks
from llmkernel.tables import MS, Tables

REPORTS_MAX: Final = 1024
"""In one answer, as the schema says."""
REPORT_BYTES: Final = 80
"""A report without its metrics, at most."""
ANSWER_BYTES_MAX: Final = limits.MESSAGE_BYTES_MAX - 16_384
"""What rows and reports of an answer may take; the rest is its frame."""


class JobCalls:
    """One method for each call; each returns its answer or raises RemoteError."""

    def __init__(self, tables: Tables, work: JobWork) -> None:
        self._t = tables
        self._work = work

    # --- spawn ------------------------------------------------------------------------------------

    def spawn(self, asker: Asker, call: JobSpawn) -> JobSpawned:
        """Accept a job, or find the one of this key."""
        t = self._t
        known = t.state.jobs.by_key.get((asker.tenant, call.key))
        if known is not None:
            if (known.kind, known.name, known.recipe) != (call.kind, call.name, call.recipe):
                raise RemoteError(
                    ErrorKind.INVALID, f"request key {call.key.hex()} was used for another job"
                )
            return JobSpawned(known.id, existing=True)
        t.need_room()
        self._check_name(call)
        self._check_room()
        fact = JobAdmitted(
            job=t.thread_id(),
            tenant=asker.tenant,
            key=call.key,
            kind=call.kind,
            name=call.name,
            recipe=call.recipe,
            processes=call.processes,
            memory_bytes=call.memory_bytes,
            cores=call.cores,
            device=call.device,
            service_class=call.service_class,
            priority=call.priority,
            admitted_ns=t.now_ns,
        )
        self._check_fit(Job(fact))
        t.record(fact)
        self._work.places.place()
        return JobSpawned(fact.job, existing=False)

    def _check_name(self, call: JobSpawn) -> None:
        if call.kind is not JobKind.TRAIN:
            return
        for job in self._t.state.jobs.living():
            if job.kind is JobKind.TRAIN and job.name == call.name:
                raise RemoteError(
                    ErrorKind.INVALID,
                    f"job {job.id.hex()} makes {call.name!r} already and is {job.state.value}: "
                    "wait for it, cancel it, or choose another name",
                )

    def _check_room(self) -> None:
        """A full table loses what ended first; without that, no more are taken."""
        t = self._t
        if len(t.state.jobs) < limits.JOBS_MAX:
            return
        ended = [job for job in t.state.jobs if job.end is not None]
        if not ended:
            detail = f"{len(t.state.jobs)} jobs are living, the most there may be"
            raise RemoteError(ErrorKind.EXHAUSTED, detail, retry_after_ms=1000)
        oldest = min(ended, key=lambda job: (job.ended_ns, job.id))
        t.record(JobsForgotten([oldest.id], t.now_ns))

    def _check_fit(self, job: Job) -> None:
        found = place_ranks(self._t.devices, {}, {}, self._work.places.ranks_of(job))
        if isinstance(found, Misfit):
            raise RemoteError(ErrorKind.INVALID, f"{job.name!r} can never run: {found.detail}")

    # --- looking ----------------------------------------------------------------------------------

    def find(self, asker: Asker, job_id: bytes) -> Job | None:
        """The job of this id, if it is one; RemoteError(DENIED) for another tenant's."""
        job = self._t.state.jobs.get(job_id)
        if job is not None and not asker.operator and job.tenant != asker.tenant:
            raise RemoteError(ErrorKind.DENIED, f"job {job_id.hex()} is another tenant's")
        return job

    def ask(self, asker: Asker, call: JobAsk) -> JobFound:
        """One job, with reports that the asker has not seen."""
        job = self.find(asker, call.job)
        if job is None:
            raise RemoteError(ErrorKind.STALE, f"job {call.job.hex()} is not known (any more)")
        row = self._row(job)
        left = ANSWER_BYTES_MAX - _row_bytes(row)
        reports: list[StepReport] = []
        for report in job.after(call.after_step)[:REPORTS_MAX]:
            left -= REPORT_BYTES + metrics_bytes(report)
            if left < 0:
                break
            reports.append(report)
        return JobFound(row, reports)

    def all_rows(self, asker: Asker, call: JobsAsk) -> Jobs:
        """All that fit an answer, the youngest first."""
        rows: list[JobRow] = []
        left = ANSWER_BYTES_MAX
        for job in sorted(self._t.state.jobs, key=lambda j: (j.admitted_ns, j.id), reverse=True):
            if not asker.operator and job.tenant != asker.tenant:
                continue
            row = self._row(job)
            left -= _row_bytes(row)
            if left < 0:
                break
            rows.append(row)
        return Jobs(rows)

    def _row(self, job: Job) -> JobRow:
        t = self._t
        ranks = [job.ranks[rank] for rank in sorted(job.ranks)]
        doing = job.doing
        if job.state in (JobState.STARTING, JobState.RUNNING) and not doing:
            doing = next((p.doing for p in ranks if p.doing), "")
        return JobRow(
            job=job.id,
            kind=job.kind,
            name=job.name,
            tenant=t.state.tenants[job.tenant],
            state=job.state,
            step=job.step,
            steps_total=job.steps_total,
            checkpoint=job.checkpoint,
            checkpoint_step=job.checkpoint_step,
            attempts=job.attempt,
            age_ms=(t.now_ns - job.admitted_ns) // MS,
            processes=[process.name for process in ranks],
            share=job.share,
            doing="" if job.end is not None else doing,
            version=job.version,
            error=job.error,
            detail=job.detail,
            metrics=job.metrics,
            service_class=job.service_class,
            priority=job.priority,
        )

    # --- acting -----------------------------------------------------------------------------------

    def cancel(self, job: Job) -> None:
        """End it now, whatever it does."""
        self._work.finish(job, JobState.CANCELLED, error=ErrorKind.DEADLINE, detail="cancelled")
        self._work.stop_ranks(job)

    def suspend(self, job: Job) -> None:
        """Off its device, with a checkpoint if it computes."""
        if job.end is None and not job.suspended:
            self._change(job, suspended=True)
            self._work.leave(job)

    def resume(self, job: Job) -> None:
        """The inverse; what still leaves its device leaves it first."""
        if job.end is None and job.suspended:
            self._change(job, suspended=False)
            if job.state is JobState.SUSPENDED:
                job.state = job.rest_state
            self._work.places.place()

    def renice(self, job: Job, call: ThreadRenice) -> None:
        """Changes its place among those that wait."""
        if job.end is None:
            self._change(job, priority=call.priority, service_class=call.service_class)

    def _change(
        self,
        job: Job,
        *,
        suspended: bool | None = None,
        service_class: int | None = None,
        priority: int | None = None,
    ) -> None:
        self._t.need_room()
        self._t.record(
            JobChanged(
                job.id,
                job.suspended if suspended is None else suspended,
                job.service_class if service_class is None else service_class,
                job.priority if priority is None else priority,
            )
        )


def _row_bytes(row: JobRow) -> int:
    return len(msgspec.msgpack.encode(row))
