"""Processes are started, watched, restarted and stopped.

Changes: the process table and its sessions' readiness; asks init for forks and signals.
"""

from collections.abc import Callable, Sequence, Set

from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError
from llmproto.execution import ExecutorReady
from llmproto.init import Child, Exit, Spec
from llmproto.models import ModelEntry
from llmproto.operation import DeviceRow, Lease, ProcessState

from llmkernel.events import HungKilled, KillHung, SignalChild, Start, Wake
from llmkernel.placement import Demand, NoRoom, place
from llmkernel.processes import POLICY, Process
from llmkernel.sessions import Session
from llmkernel.tables import MS, LoadFailure, Tables

SIGKILL = 9
SIGTERM = 15
FATAL_SIGNALS = frozenset({4, 5, 6, 7, 8, 10, 11, 31})
"""ILL, TRAP, ABRT, BUS and FPE, SEGV, SYS (and BUS on macOS): nobody sends these from outside."""
LOADING_DEATHS_MAX = 3
TAKEN_OVER_MS = 5_000
"""A child of an earlier kernel knows its way: it says Hello within moments, or is stopped."""
FAILURE_MS = 5_000
REPLICA_REST_MS = 60_000
"""After a further replica could not be loaded: those that are there do the work."""
PAUSED_KEPT_MS = 2_000
"""Threads that wait for slow readers keep an executor for so long against others' need."""


class Supervision:
    """The process table's rules."""

    def __init__(self, tables: Tables) -> None:
        self._t = tables
        self.fail_waiting: Callable[[str, ErrorKind, str], None] = _unset
        """Set by the core: end the threads that wait for a model."""
        self.displace: Callable[[ModelEntry], bool] = _nobody
        """Set by the core: let a job leave its device for a model."""

    # --- starting ---------------------------------------------------------------------------------

    def boot(self, children: tuple[Child, ...], exits: tuple[Exit, ...]) -> None:
        """Take over what lives, start what should; incarnations are not used twice."""
        t = self._t
        for child in children:
            process = self._row(child.spec)
            self._born(process, child)
            process.hello_ms = TAKEN_OVER_MS
            if child.spec.role == "executor":
                self._executor_arguments(process)
        for spec in t.config.services:
            if spec.name not in t.processes.by_name:
                self._row(spec)
        for exit in exits:
            gone = t.processes.by_name.get(exit.name)
            if gone is not None and gone.pid is None:
                gone.incarnation = max(gone.incarnation, exit.incarnation)
        wanted = {spec.name for spec in (*t.config.services, *t.config.on_demand)}
        for process in t.processes.by_name.values():
            if process.name not in wanted:
                process.desired = process.role == "executor"
        self.start_due()

    def _row(self, spec: Spec) -> Process:
        process = Process(spec.name, spec.role, spec, self._t.now_ns)
        self._t.processes.insert(process)
        return process

    def start(self, spec: Spec) -> None:
        """Start what nobody started before."""
        self._row(spec)
        self.start_due()

    def start_due(self) -> None:
        """Start every waiting process whose time has come."""
        t = self._t
        if t.halting:
            return
        for process in t.processes.by_name.values():
            waiting = process.state in (ProcessState.WAITING, ProcessState.QUARANTINED)
            if not waiting or process.spec is None or not process.desired:
                continue
            if t.now_ns < process.start_ns:
                t.effects.append(Wake(process.start_ns))
                continue
            process.state = ProcessState.STARTING
            process.doing = ""
            process.incarnation += 1
            process.start_ns = t.now_ns
            process.moved_ns = t.now_ns
            process.working_ns = 0
            process.killed_hung = process.signalled = False
            process.hello_ms = limits.STARTING_MS_MAX
            t.effects.append(Start(process.spec, process.incarnation))

    def forked(self, child: Child) -> None:
        """Init did it."""
        process = self._t.processes.of_child(child.spec.name, child.incarnation)
        if process is None:
            self._t.effects.append(SignalChild(child.pid, child.incarnation, SIGKILL))
            return
        stopping = process.state is ProcessState.STOPPING
        self._born(process, child)
        if stopping:
            process.state = ProcessState.STOPPING
            self._t.effects.append(SignalChild(child.pid, child.incarnation, SIGTERM))

    def _born(self, process: Process, child: Child) -> None:
        process.pid = child.pid
        process.incarnation = child.incarnation
        process.proof = child.proof
        process.born_ns = self._t.now_ns
        process.start_ns = self._t.now_ns
        process.state = ProcessState.STARTING

    # --- registering ------------------------------------------------------------------------------

    def greeted(self, session: Session, process: Process) -> None:
        """It said Hello (again): it is there, and not ready before it says so."""
        t = self._t
        process.session = session.id
        process.moved_ns = t.now_ns
        session.process = process.name
        session.incarnation = process.incarnation
        session.ready = False
        session.beat = None
        session.reconciled = False

    def ready(
        self, session: Session, *, address: str = "", info: ExecutorReady | None = None
    ) -> None:
        """It can answer from now on."""
        t = self._t
        process = t.processes.by_name.get(session.process or "")
        if process is None or process.state is ProcessState.STOPPING:
            return
        if process.state is not ProcessState.READY:
            t.log("info", "ready", process=process.name, incarnation=process.incarnation)
        process.state = ProcessState.READY
        process.doing = ""
        process.working_ns = 0
        process.address = address or process.address
        process.moved_ns = t.now_ns
        session.ready = True
        if info is not None and process.ready_info is None:
            process.ready_info = info
            process.model = info.model
            process.blocks_free = info.blocks
            process.idle_ns = t.now_ns
            t.failures.pop(info.model, None)
        t.dirty = True

    def working(self, session: Session, what: str, budget_ms: int) -> None:
        """It will make no visible progress for a while."""
        process = self._t.processes.by_name.get(session.process or "")
        if process is not None:
            process.doing = what if budget_ms else ""
            process.working_ns = self._t.now_ns + budget_ms * MS if budget_ms else 0
            process.moved_ns = self._t.now_ns

    def check_external(self, session: bytes) -> None:
        """Refuse a service that somebody else started, where the table is full."""
        processes = self._t.processes.by_name
        if session not in self._t.sessions.by_id and len(processes) >= limits.PROCESSES_MAX:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{len(processes)} processes are known, the most there may be",
                retry_after_ms=1000,
            )

    def external(self, session: Session) -> Process:
        """A service that somebody else started registers, or says Hello again."""
        known = self._t.processes.by_name.get(session.process or "")
        if known is not None:
            return known
        name = f"{session.role}-{session.id.hex()}"[: limits.NAME_BYTES_MAX]
        process = Process(name, session.role, None, self._t.now_ns)
        process.incarnation = 1
        process.state = ProcessState.STARTING
        self._t.processes.insert(process)
        return process

    # --- dying ------------------------------------------------------------------------------------

    def self_made(self, process: Process, exit: Exit) -> bool:
        """It died of what it did, not of what somebody did to it."""
        if process.killed_hung or exit.out_of_memory:
            return True
        if exit.signal is not None:
            return exit.signal in FATAL_SIGNALS
        return exit.code != 0

    def hung(self, event: HungKilled) -> None:
        """A process without progress was killed; by itself unless somebody had stopped it."""
        process = self._t.processes.of_child(event.process, event.incarnation)
        if process is not None:
            process.killed_hung = not event.stopped

    def exited(self, process: Process, exit: Exit, *, guilty: bool, attributed: bool) -> None:
        """A process is gone; its policy says when it comes back."""
        t = self._t
        how = f"signal {exit.signal}" if exit.signal is not None else f"exit code {exit.code}"
        expected = process.state is ProcessState.STOPPING
        level = "info" if expected else "warning"
        t.log(level, "exited", process=process.name, incarnation=exit.incarnation, how=how)
        loading = process.role == "executor" and process.ready_info is None
        process.pid = None
        process.session = None
        process.proof = b""
        process.ready_info = None
        process.address = ""
        process.working_ns = 0
        process.doing = how
        if process.job is not None or (expected and not process.desired):
            t.processes.remove(process)
            t.dirty = True
            return
        process.state = ProcessState.WAITING
        # One that nobody killed died by itself too, whatever its exit code says.
        by_itself = guilty or (exit.signal is None and not process.signalled)
        if by_itself and not attributed and not expected:
            process.deaths_ns = [*process.deaths_ns[-(POLICY.restarts_max + 1) :], t.now_ns]
        rest_ms, quarantined = POLICY.rest_ms(process.deaths_ns, t.now_ns)
        process.start_ns = t.now_ns + rest_ms * MS
        if quarantined:
            process.state = ProcessState.QUARANTINED
            t.log("error", "quarantined", process=process.name, rest_ms=rest_ms)
        if loading and guilty and len(process.deaths_ns) >= LOADING_DEATHS_MAX:
            self._cannot_load(process, how)
        self.start_due()

    def _cannot_load(self, process: Process, how: str) -> None:
        model = process.model
        process.desired = False
        self._t.processes.remove(process)
        if model is not None:
            detail = (
                f"the executor of {model!r} died {len(process.deaths_ns)} times while loading "
                f"({how}); see its log"
            )
            self.load_failed(model, ErrorKind.INTERNAL, detail)

    def load_failed(self, model: str, kind: ErrorKind, detail: str) -> None:
        """Nobody can run this model for now: those who wait are told why."""
        t = self._t
        executors = t.processes.executors_of(model)
        for process in executors:
            if process.ready_info is None:
                self.stop(process)
        if any(process.ready_info is not None for process in executors):
            t.log("error", "a replica cannot be loaded", model=model, why=detail)
            t.rests[model] = t.now_ns + REPLICA_REST_MS * MS
            return
        t.failures[model] = LoadFailure(kind, detail, t.now_ns + FAILURE_MS * MS)
        self.fail_waiting(model, kind, detail)

    # --- stopping ---------------------------------------------------------------------------------

    def stop(self, process: Process, *, signal: int | None = SIGTERM) -> None:
        """Stop it for good; without a signal where it ends by itself."""
        t = self._t
        process.desired = False
        if process.state in (ProcessState.WAITING, ProcessState.QUARANTINED):
            t.processes.remove(process)
            return
        if process.state is ProcessState.STOPPING and signal != SIGKILL:
            return
        if process.state is not ProcessState.STOPPING:
            process.stop_ns = t.now_ns
        process.state = ProcessState.STOPPING
        if process.pid is not None and signal is not None:
            t.effects.append(SignalChild(process.pid, process.incarnation, signal))

    # --- watching ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """Find processes that are there and do not move."""
        t = self._t
        for process in list(t.processes.by_name.values()):  # at most PROCESSES_MAX
            if process.pid is None or not process.alive:
                continue
            why = self._why_hung(process)
            if why:
                t.log("warning", "no progress", process=process.name, why=why)
                t.effects.append(KillHung(process.name, process.pid, process.incarnation))
                process.moved_ns = t.now_ns  # gives init time to report the exit

    def _why_hung(self, process: Process) -> str:
        t = self._t
        if process.state is ProcessState.STOPPING:
            late = t.now_ns - process.stop_ns > limits.STOPPING_MS_MAX * MS
            return "does not stop" if late else ""
        silent_ns = t.now_ns - process.moved_ns
        session = t.sessions.by_id.get(process.session or b"")
        if t.now_ns < process.working_ns:
            return ""
        if process.state is ProcessState.STARTING and session is None:
            return "does not register" if silent_ns > process.hello_ms * MS else ""
        is_job = process.job is not None
        silent_ms = limits.JOB_BEAT_SILENT_MS if is_job else limits.SERVICE_SILENT_MS
        if session is None:  # it was there, left, and lives on
            return "has no connection" if silent_ns > silent_ms * MS else ""
        beat_ms = (t.now_ns - max(session.beat_ns, process.moved_ns)) // MS
        if beat_ms > silent_ms:
            return f"no beat for {beat_ms} ms"
        if process.state is ProcessState.STARTING:
            return "is not ready" if silent_ns > limits.STARTING_MS_MAX * MS else ""
        late = silent_ns > limits.JOB_SILENT_MS * MS
        if process.running and late and not self._waits(session):
            return f"no micro-batch for {silent_ns // MS} ms"
        if process.residents and t.journal_room and silent_ns > limits.STEP_BUDGET_MS * MS:
            return f"{len(process.residents)} threads without a step for {silent_ns // MS} ms"
        return ""

    def _waits(self, session: Session) -> bool:
        """Others have not answered it yet: they are the ones to be judged."""
        return bool(session.requests) or session.id in self._t.state.threads.by_session

    def excuse(self, gap_ns: int) -> None:
        """The kernel itself was away for so long: nobody could have been heard."""
        now_ns = self._t.now_ns
        for process in self._t.processes.by_name.values():
            process.moved_ns = min(now_ns, process.moved_ns + gap_ns)
            process.working_ns += gap_ns if process.working_ns else 0
        for session in self._t.sessions.by_id.values():
            session.beat_ns = min(now_ns, session.beat_ns + gap_ns)

    # --- models -----------------------------------------------------------------------------------

    def _demand(self, model: ModelEntry) -> Demand:
        config = self._t.config
        return Demand(model.weight_bytes + config.executor_memory_bytes, config.executor_cores)

    def _devices(self, wish: str | None) -> Sequence[DeviceRow]:
        """Where an executor may be, by the name of a device or a kind."""
        devices = self._t.devices
        return devices if wish is None else [d for d in devices if wish in (d.name, d.kind)]

    def _wish(self, model: str) -> str | None:
        wish = self._t.wishes.get(model)
        return wish.device if wish is not None else None

    def room_for(self, model: ModelEntry, device: str | None = None) -> Lease | NoRoom:
        """Where a replica would go, if idle ones make room."""
        granted = self._granted(lambda p: bool(p.residents) and p.model != model.name)
        devices = self._devices(device or self._wish(model.name))
        return place(devices, granted, self._demand(model))

    def fits_without(self, name: str, gone: list[Process]) -> bool:
        """A replica would find room if these were stopped."""
        model = self._t.state.models[name].model
        granted = self._granted(lambda p: p not in gone)
        return isinstance(
            place(self._devices(self._wish(name)), granted, self._demand(model)), Lease
        )

    def would_fit(self, model: ModelEntry, gone: Set[bytes]) -> bool:
        """Whether there is room for a replica once these jobs are gone."""
        granted = self._granted(lambda p: p.job not in gone)
        devices = self._devices(self._wish(model.name))
        return isinstance(place(devices, granted, self._demand(model)), Lease)

    def granted(self) -> dict[str, int]:
        """Bytes of every device that processes hold now."""
        return self._granted(lambda process: True)

    def promised(self) -> dict[str, int]:
        """Bytes of every device that processes hold, and those that models need which somebody
        waits for and which found no room."""
        t = self._t
        promised = self.granted()
        for name in list(t.roomless):
            known = t.state.models.get(name)
            if known is None or t.queue.first(name) is None or t.processes.executors_of(name):
                del t.roomless[name]
                continue
            demand = self._demand(known.model)
            lease = place(self._devices(self._wish(name)), {}, demand)
            if isinstance(lease, Lease):
                promised[lease.device] = promised.get(lease.device, 0) + lease.memory_bytes
        return promised

    def _granted(self, counts: Callable[[Process], bool]) -> dict[str, int]:
        granted: dict[str, int] = {}
        for process in self._t.processes.by_name.values():
            if process.lease is not None and counts(process):
                device = process.lease.device
                granted[device] = granted.get(device, 0) + process.lease.memory_bytes
        return granted

    def want_model(self, name: str) -> None:
        """Somebody waits for a model: see that a replica is on its way."""
        t = self._t
        if t.processes.executors_of(name):
            return
        registered = t.state.models.get(name)
        if registered is None:
            self.fail_waiting(name, ErrorKind.INVALID, f"model {name!r} was removed")
            return
        missing = self.start_replica(name)
        if missing is not None:
            self._make_room(registered.model, missing)

    def start_replica(self, name: str) -> NoRoom | None:
        """Start an executor of a model, if there is room beside all that is there."""
        t = self._t
        model = t.state.models[name].model
        devices = self._devices(self._wish(name))
        lease = place(devices, self.granted(), self._demand(model))
        if isinstance(lease, NoRoom):
            return lease
        if len(t.processes.by_name) >= limits.PROCESSES_MAX:
            return None
        t.processes.executors_named += 1
        number = t.processes.executors_named
        while f"executor-{number}" in t.processes.by_name:
            number += 1
        t.processes.executors_named = number
        spec = Spec(
            name=f"executor-{number}",
            role="executor",
            module=t.config.executor_module,
            fork=True,
            arguments=[
                *("--model", model.name, "--path", model.path, "--digest", model.digest.hex()),
                *("--device", lease.device, "--cores", ",".join(map(str, lease.cores))),
                *("--memory", str(lease.memory_bytes)),
            ],
            cores=lease.cores,
        )
        process = self._row(spec)
        process.model = name
        process.lease = lease
        self.start_due()
        return None

    def _executor_arguments(self, process: Process) -> None:
        """A living executor of an earlier kernel: what it was started with says model and lease."""
        assert process.spec is not None
        said = dict(zip(process.spec.arguments[::2], process.spec.arguments[1::2]))
        process.model = said["--model"]
        process.lease = Lease(
            device=said["--device"],
            cores=[int(core) for core in said["--cores"].split(",") if core],
            memory_bytes=int(said["--memory"]),
        )

    def _make_room(self, model: ModelEntry, missing: NoRoom) -> None:
        """Stop the replica that has been idle for longest; refuse where even that cannot help."""
        t = self._t
        t.roomless[model.name] = None
        executors = t.processes.executors.values()
        if any(p.state is ProcessState.STOPPING for p in executors):
            return  # room is on its way
        idle = self.idle()
        if idle:
            self.stop(min(idle, key=lambda p: p.idle_ns))
        elif missing.ever:
            self.displace(model)
        else:
            detail = (
                f"{model.name!r} needs {missing.needed_bytes} bytes of memory, "
                f"{missing.free_bytes} are free"
            )
            self.fail_waiting(model.name, ErrorKind.EXHAUSTED, detail)

    def idle(self) -> list[Process]:
        """Executors that nobody needs now: others may have their room."""
        t = self._t
        recent_ns = t.now_ns - PAUSED_KEPT_MS * MS
        return [
            p
            for p in t.processes.executors.values()
            if not p.residents
            and (p.ready_info is not None or p.model not in t.wishes)  # else it comes for a name
            and t.queue.first(p.model or "") is None
            and not (p.idle_ns > recent_ns and t.state.threads.living.get(p.model or ""))
        ]

    def unload_idle(self) -> None:
        """Stop replicas that nobody has wanted for long."""
        t = self._t
        for process in list(t.processes.executors.values()):
            idle_ms = (t.now_ns - process.idle_ns) // MS
            if (
                process.state is ProcessState.READY
                and not process.residents
                and idle_ms > t.config.model_idle_ms
                and t.queue.first(process.model or "") is None
                and process.model not in t.wishes
            ):
                t.log("info", "idle model unloaded", model=process.model, idle_ms=idle_ms)
                self.stop(process)


def _nobody(model: ModelEntry) -> bool:
    return False


def _unset(model: str, kind: ErrorKind, detail: str) -> None:
    raise AssertionError((model, kind, detail))
