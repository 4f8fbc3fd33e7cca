"""The monitor as a service: reports in, text out; asks the kernel for its own numbers each time."""

import time
from typing import Final

from libllm.port import Port
from libllm.service import Handlers, Request, Service
from llmproto.errors import RemoteError
from llmproto.metrics import Metrics, MetricsAsk, MetricsText, Sample
from llmproto.operation import Processes, ProcessesAsk, Status, StatusAsk

from llmservices.monitor.core import Totals
from llmservices.monitor.exposition import COMMITTED, render

KERNEL_PATIENCE_NS: Final = 1_000_000_000
"""Who asks for numbers waits no longer for the kernel's: they are left out then."""


class MonitorService(Service):
    """Answers MetricsAsk, takes Metrics."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._totals = Totals()

    def handlers(self) -> Handlers:
        """What it takes."""
        return {Metrics: self.take, MetricsAsk: self.ask}

    def take(self, message: Metrics, request: Request) -> None:
        """One report."""
        self._totals.take(time.monotonic_ns(), message)

    async def ask(self, message: MetricsAsk, request: Request) -> MetricsText:
        """Everything, as text."""
        deadline_ns = time.monotonic_ns() + KERNEL_PATIENCE_NS
        status: Status | None = None
        processes: Processes | None = None
        try:
            status = await self._port.call(StatusAsk(), Status, deadline_ns=deadline_ns)
            processes = await self._port.call(ProcessesAsk(), Processes, deadline_ns=deadline_ns)
        except RemoteError:
            pass  # llmos_kernel_up tells
        now_ns = time.monotonic_ns()
        self._totals.silence(now_ns)
        if status is not None:
            self._totals.take(now_ns, committed(status))
        return MetricsText(render(self._totals, status, processes))


def committed(status: Status) -> Metrics:
    """The kernel's own counter as if it had reported it: its epoch is its incarnation."""
    sample = Sample(COMMITTED, float(status.tokens_committed))
    return Metrics("kernel", status.kernel_epoch, counters=[sample])
