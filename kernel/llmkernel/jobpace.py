"""How much of its device a job may take: a pure function of who runs beside it.

A job is held back by its share and by the operating system's priority, never by fewer threads and
never for ever: it goes on at a crawl however long others are served.
"""

from collections.abc import Iterable
from typing import Final

from llmproto.operation import Lease

from llmkernel.processes import Process

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
