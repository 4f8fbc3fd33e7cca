"""How much of its device a job may take: a function of who runs beside it.

A job is held back by its share and by the operating system's priority, never by fewer threads and
never for ever: it goes on at a crawl however long others are served.
"""

from collections.abc import Callable, Iterable
from typing import Final

from llmproto.operation import Lease

from llmkernel.jobs import Job
from llmkernel.processes import Process
from llmkernel.tables import MS, Tables

QUIET_MS: Final = 1_000
"""A reader's next question follows within moments: the share does not follow each of them."""
URGENT_CLASS_MAX: Final = 1
"""Interactive and normal threads have somebody who waits for them; batch ones do not."""


def hurried(leases: Iterable[Lease], executors: Iterable[Process]) -> bool:
    """Whether an executor that shares a device or a core with these leases holds a thread that
    somebody waits for."""
    devices: set[str] = set()
    cores: set[int] = set()
    for lease in leases:
        devices.add(lease.device)
        cores.update(lease.cores)
    for executor in executors:
        held = executor.lease
        if held is None or not executor.residents:
            continue
        if held.device not in devices and cores.isdisjoint(held.cores):
            continue
        residents = executor.residents.values()  # bounded by residents_max
        if any(thread.service_class <= URGENT_CLASS_MAX for thread in residents):
            return True
    return False


class Pacing:
    """Tells the ranks of running jobs their share."""

    def __init__(self, tables: Tables, tell: Callable[[Job], None]) -> None:
        """`tell` says a job's share to its ranks."""
        self._t = tables
        self._tell = tell

    def share(self, job: Job) -> float:
        """What a job gets that begins to run now."""
        return self._t.config.job_share if self._hurried(job) else 1.0

    def hurry(self) -> None:
        """Somebody may wait for a device that jobs compute on: they are held back at once."""
        for job in self._t.state.jobs.running.values():
            if job.share == 1.0 and self._hurried(job):
                self._set(job, self._t.config.job_share)

    def tick(self) -> None:
        """They run freely again when nobody has waited for a while."""
        t = self._t
        for job in t.state.jobs.running.values():
            if self._hurried(job):
                job.hurried_ns = t.now_ns
            elif job.share < 1.0 and t.now_ns - job.hurried_ns > QUIET_MS * MS:
                self._set(job, 1.0)

    def _hurried(self, job: Job) -> bool:
        leases = [p.lease for p in job.ranks.values() if p.lease is not None]
        return hurried(leases, self._t.processes.executors.values())

    def _set(self, job: Job, share: float) -> None:
        job.share = share
        job.hurried_ns = self._t.now_ns
        self._tell(job)
