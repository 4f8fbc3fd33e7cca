"""Services that run only while somebody asks them.

Changes: the process table, through supervision.
"""

from llmproto import limits
from llmproto.init import Spec
from llmproto.operation import ProcessState

from llmkernel.processes import Process
from llmkernel.supervision import Supervision
from llmkernel.tables import MS, Tables


class OnDemand:
    """Starts what is asked for, stops what nobody asks for any more."""

    def __init__(self, tables: Tables, supervision: Supervision) -> None:
        self._t = tables
        self._supervision = supervision
        self._used: dict[str, tuple[int, int]] = {}
        """By process: its progress when it last changed, and when it was last of use."""

    def want(self, role: str) -> bool:
        """Somebody asks a service that nobody serves; whether it is on its way now."""
        t = self._t
        spec = next((spec for spec in t.config.on_demand if spec.role == role), None)
        if spec is None or t.halting or len(t.processes.by_name) >= limits.PROCESSES_MAX:
            return False
        self._supervision.start(spec)
        self._used.pop(spec.name, None)
        return True

    def stop_idle(self) -> None:
        """It is of use while it holds requests, moves, or was asked a short while ago."""
        t = self._t
        for spec in t.config.on_demand:
            process = t.processes.by_name.get(spec.name)
            if process is None or process.state is not ProcessState.READY:
                continue
            idle_ms = (t.now_ns - self._used_ns(spec, process)) // MS
            if idle_ms > limits.SERVICE_IDLE_MS:
                t.log("info", "idle service stopped", process=process.name, idle_ms=idle_ms)
                self._supervision.stop(process)

    def _used_ns(self, spec: Spec, process: Process) -> int:
        t = self._t
        session = t.sessions.by_id.get(process.session or b"")
        progress, used_ns = self._used.get(spec.name, (-1, t.now_ns))
        if session is None or progress != process.progress:
            used_ns = t.now_ns
        else:
            used_ns = max(used_ns, session.asked_ns)
            late = t.now_ns - used_ns > limits.SERVICE_IDLE_MS * MS
            if late and any(r.responder is session for r in t.sessions.requests.values()):
                used_ns = t.now_ns
        self._used[spec.name] = (process.progress, used_ns)
        return used_ns
