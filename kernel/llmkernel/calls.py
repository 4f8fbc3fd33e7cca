"""What may be asked of the kernel itself: looking, keys, models, signals.

Changes: models and keys (through facts), gateway handles.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from llmproto import limits
from llmproto.base import Message
from llmproto.connection import Goodbye
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import (
    CheckpointCommitted,
    JobAsk,
    JobEnded,
    JobsAsk,
    JobSpawn,
)
from llmproto.models import (
    Deployments,
    DeploymentsAsk,
    ModelAsk,
    ModelDeploy,
    ModelEntry,
    ModelFound,
    ModelLoad,
    ModelRegister,
    ModelRemove,
    ModelRow,
    Models,
    ModelsAsk,
    ModelState,
    ModelUndeploy,
)
from llmproto.operation import (
    DeviceRow,
    Note,
    Processes,
    ProcessesAsk,
    ProcessKill,
    ProcessRow,
    ProcessState,
    Shutdown,
    Status,
    StatusAsk,
    ThreadRow,
    Threads,
    ThreadsAsk,
    ThreadState,
)
from llmproto.rights import Right
from llmproto.tenants import KeyAdd, KeyPresent, KeyPresented, KeyRemove, KeyRow, Keys, KeysAsk
from llmproto.threads import (
    Done,
    ThreadAdopt,
    ThreadCancel,
    ThreadRenice,
    ThreadResume,
    ThreadSuspend,
)
from msgspec import structs

from llmkernel import deployments, rollouts
from llmkernel.asker import Asker
from llmkernel.events import Halt, SignalChild
from llmkernel.facts import KeyAdded, KeyRemoved, ModelRegistered, ModelRemoved, ModelRetired
from llmkernel.jobcalls import JobCalls
from llmkernel.jobwork import JobWork
from llmkernel.lifecycle import Lifecycle
from llmkernel.processes import Process
from llmkernel.supervision import Supervision
from llmkernel.tables import MS, Tables
from llmkernel.threads import Thread

KEY_NAME_MAX = limits.NAME_BYTES_MAX - len("key:")
"""Its tenant's name is a name too."""
ROWS_BYTES_MAX = limits.MESSAGE_BYTES_MAX - 4096
"""What a reply that lists things may take; the rest is its frame."""
ROW_BYTES = 160
"""A row of `Threads` without its names."""


class Calls:
    """One method for each call; each returns its answer or raises RemoteError."""

    def __init__(
        self,
        tables: Tables,
        lifecycle: Lifecycle,
        supervision: Supervision,
        jobs: JobCalls,
        work: JobWork,
        deployments: deployments.Deployments,
    ) -> None:
        self._t = tables
        self._lifecycle = lifecycle
        self._supervision = supervision
        self._jobs = jobs
        self._deploying = deployments
        # Any: each handler takes its own message type, and is only called with that.
        self.table: dict[type[Message], Callable[[Asker, Any], Message]] = {
            ThreadCancel: self._cancel,
            ThreadSuspend: self._suspend,
            ThreadResume: self._resume,
            ThreadRenice: self._renice,
            ThreadAdopt: self._adopt,
            ModelRegister: self._register,
            ModelAsk: self._model,
            ModelsAsk: self._models,
            ModelRemove: self._remove_model,
            ModelLoad: self._load,
            ModelDeploy: self._deploy,
            ModelUndeploy: self._undeploy,
            DeploymentsAsk: self._deployments,
            ProcessesAsk: self._processes,
            ThreadsAsk: self._threads,
            StatusAsk: self._status,
            ProcessKill: self._kill,
            Shutdown: self._shutdown,
            Note: self._note,
            KeyPresent: self._present,
            KeyAdd: self._add_key,
            KeyRemove: self._remove_key,
            KeysAsk: self._keys,
            JobSpawn: jobs.spawn,
            JobAsk: jobs.ask,
            JobsAsk: jobs.all_rows,
            CheckpointCommitted: lambda asker, call: work.checkpoint(asker.session, call),
            JobEnded: lambda asker, call: work.ended(asker.session, call),
        }

    # --- threads ----------------------------------------------------------------------------------

    def _thread(self, asker: Asker, thread_id: bytes) -> Thread:
        thread = self._t.state.threads.get(thread_id)
        if thread is None:
            raise RemoteError(ErrorKind.STALE, f"thread {thread_id.hex()} is not known (any more)")
        sink = Right.SINK in asker.session.rights and thread.sink == asker.session.role
        if not (asker.operator or sink or thread.tenant == asker.tenant):
            raise RemoteError(ErrorKind.DENIED, f"thread {thread_id.hex()} is another tenant's")
        return thread

    def _cancel(self, asker: Asker, call: ThreadCancel) -> Message:
        job = self._jobs.find(asker, call.thread)
        if job is not None:
            self._jobs.cancel(job)
        else:
            thread = self._thread(asker, call.thread)
            self._lifecycle.cancel(thread)
            if call.forget:
                self._lifecycle.drop(thread)
        return Done()

    def _suspend(self, asker: Asker, call: ThreadSuspend) -> Message:
        self._t.need_room()
        job = self._jobs.find(asker, call.thread)
        if job is not None:
            self._jobs.suspend(job)
        else:
            self._lifecycle.suspend(self._thread(asker, call.thread))
        return Done()

    def _resume(self, asker: Asker, call: ThreadResume) -> Message:
        self._t.need_room()
        job = self._jobs.find(asker, call.thread)
        if job is not None:
            self._jobs.resume(job)
        else:
            self._lifecycle.resume(self._thread(asker, call.thread))
        return Done()

    def _renice(self, asker: Asker, call: ThreadRenice) -> Message:
        job = self._jobs.find(asker, call.thread)
        if job is not None:
            self._jobs.renice(job, call)
            return Done()
        thread = self._thread(asker, call.thread)
        if not thread.end:
            self._t.need_room()
            self._lifecycle.change(thread, priority=call.priority, service_class=call.service_class)
            if thread.state is ThreadState.QUEUED:
                self._t.queue.push(thread)
                self._t.dirty = True
        return Done()

    def _adopt(self, asker: Asker, call: ThreadAdopt) -> Message:
        request = self._t.sessions.requests.get(asker.header.cause or b"")
        if request is None or request.responder is not asker.session:
            raise RemoteError(ErrorKind.STALE, "the Attach that asks for this is not in flight")
        thread = self._t.state.threads.get(call.thread)
        if thread is None:
            raise RemoteError(
                ErrorKind.STALE, f"thread {call.thread.hex()} is not known (any more)"
            )
        if thread.tenant != request.tenant and not request.operator:
            raise RemoteError(ErrorKind.DENIED, f"thread {call.thread.hex()} is another tenant's")
        if thread.session != request.requester.id:
            self._lifecycle.adopt(thread, request.requester.id)
        thread.lingering_ns = None
        return Done()

    def _threads(self, asker: Asker, call: ThreadsAsk) -> Message:
        mine = [t for t in self._t.state.threads if asker.operator or t.tenant == asker.tenant]
        rows: list[ThreadRow] = []
        left = ROWS_BYTES_MAX
        for thread in mine[: -call.limit - 1 : -1]:
            row = self._thread_row(thread)
            left -= ROW_BYTES + 4 * (len(row.model) + len(row.tenant) + len(row.process))
            if left < 0:
                break
            rows.append(row)
        return Threads(rows, len(mine))

    def _thread_row(self, thread: Thread) -> ThreadRow:
        return ThreadRow(
            thread=thread.id,
            model=thread.model,
            tenant=self._t.state.tenants[thread.tenant],
            state=thread.state,
            prompt_tokens=thread.prompt_tokens,
            output_tokens=thread.output_tokens,
            output_tokens_max=thread.output_tokens_max,
            service_class=thread.service_class,
            priority=thread.priority,
            age_ms=(self._t.now_ns - thread.admitted_ns) // MS,
            process=thread.process or "",
            residencies=thread.residencies,
            strikes=thread.strikes,
        )

    # --- models -----------------------------------------------------------------------------------

    def _register(self, asker: Asker, call: ModelRegister) -> Message:
        t = self._t
        cause = asker.header.cause
        if cause is not None:
            request = t.sessions.requests.get(cause)
            if request is None or request.responder is not asker.session:
                raise RemoteError(ErrorKind.UNAVAILABLE, "the request for this is not in flight")
            if not request.operator:
                raise RemoteError(ErrorKind.DENIED, "adding a model is an operator's right")
        if call.model.name in t.state.deployments:
            raise RemoteError(
                ErrorKind.INVALID,
                f"{call.model.name!r} is a deployment: choose another name, or undeploy it first",
            )
        known = t.state.models.get(call.model.name)
        if known is not None and known.model.digest != call.model.digest:
            self._replace(known.model)
        elif known is None and len(t.state.models) >= limits.MODELS_MAX:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{len(t.state.models)} models are known, the most there may be",
            )
        created_s = (t.now_ns + t.wall_offset_ns) // 1_000_000_000
        if known is not None and known.model.digest == call.model.digest:
            created_s = known.model.created_s
        fact = ModelRegistered(structs.replace(call.model, created_s=created_s), call.default)
        retired = call.model.name in t.state.retired
        if fact != known or retired:
            t.need_room()
            t.record(fact)
        if retired:
            t.record(ModelRetired(call.model.name, False))
        t.failures.pop(call.model.name, None)
        if call.model.name in map(t.entry_of, self.preload()):
            self._supervision.want_model(call.model.name)
        return Done()

    def _replace(self, model: ModelEntry) -> None:
        """New content under an old name: only when no thread would change its model in mid-life."""
        t = self._t
        living = t.state.threads.living.get(model.name, 0)
        if living:
            raise RemoteError(
                ErrorKind.INVALID,
                f"{model.name!r} has other content and {living} living threads: "
                "choose another name, or wait for their end",
            )
        for process in t.processes.executors_of(model.name):
            self._supervision.stop(process)

    def default_model(self) -> str | None:
        """The configured one, or the one that was registered as default."""
        t = self._t
        if t.config.default_model is not None:
            return t.config.default_model
        for name, registered in t.state.models.items():
            if registered.default:
                return name
        return None

    def preload(self) -> tuple[str, ...]:
        """Models that are loaded without being asked for."""
        preload = self._t.config.preload
        if preload is not None:
            return preload
        default = self.default_model()
        return () if default is None else (default,)

    def _find(self, name: str | None) -> ModelEntry:
        models = self._t.state.models
        wanted = name if name is not None else self.default_model()
        found = models.get(self._t.entry_of(wanted)) if wanted is not None else None
        if found is None:
            names = ", ".join(sorted([*models, *self._t.state.deployments])) or "none"
            what = "there is no default model" if wanted is None else f"unknown model {wanted!r}"
            raise RemoteError(ErrorKind.INVALID, f"{what}; there is: {names}")
        return found.model

    def _model(self, asker: Asker, call: ModelAsk) -> Message:
        name = call.name if call.name is not None else self.default_model()
        return ModelFound(self._find(name), name if name in self._t.state.deployments else None)

    def _load(self, asker: Asker, call: ModelLoad) -> Message:
        model = self._find(call.name)
        self._t.failures.pop(model.name, None)
        self._supervision.want_model(model.name)
        return Done()

    def _remove_model(self, asker: Asker, call: ModelRemove) -> Message:
        t = self._t
        using = [o.name for o in t.state.deployments.values() if call.name in rollouts.entries(o)]
        if using or call.name in t.state.deployments:
            raise RemoteError(
                ErrorKind.INVALID,
                f"{call.name!r} is deployed ({', '.join(using or [call.name])}): undeploy it first",
            )
        self._find(call.name)
        t.record(ModelRemoved(call.name))
        t.draining.pop(call.name, None)
        for process in self._t.processes.executors_of(call.name):
            if not process.residents:
                self._supervision.stop(process)
        return Done()

    def _models(self, asker: Asker, call: ModelsAsk) -> Message:
        t = self._t
        default = self.default_model()
        entry = t.entry_of(default) if default is not None else None
        return Models([self._model_row(r.model, default=entry) for r in t.state.models.values()])

    def _deploy(self, asker: Asker, call: ModelDeploy) -> Message:
        self._deploying.deploy(call)
        return Done()

    def _undeploy(self, asker: Asker, call: ModelUndeploy) -> Message:
        self._deploying.undeploy(call)
        return Done()

    def _deployments(self, asker: Asker, call: DeploymentsAsk) -> Message:
        return Deployments(self._deploying.rows())

    def _model_row(self, model: ModelEntry, *, default: str | None) -> ModelRow:
        t = self._t
        replicas = t.processes.executors_of(model.name)
        ready = [p for p in replicas if p.ready_info is not None]
        failure = t.failures.get(model.name)
        failed = failure is not None and not replicas
        state = (
            ModelState.READY
            if ready
            else ModelState.LOADING
            if replicas
            else ModelState.FAILED
            if failed
            else ModelState.IDLE
        )
        return ModelRow(
            model=model,
            state=state,
            replicas=len(ready),
            threads=t.state.threads.living.get(model.name, 0),
            default=model.name == default,
            path=ready[0].path if ready else "",
            detail=failure.detail if failure is not None and failed else "",
        )

    # --- processes --------------------------------------------------------------------------------

    def _processes(self, asker: Asker, call: ProcessesAsk) -> Message:
        rows = [self._process_row(p) for p in self._t.processes.by_name.values()]
        return Processes([*self._own_rows(), *rows])

    def _own_rows(self) -> list[ProcessRow]:
        t = self._t
        starts = {"init": 1, "kernel": t.kernel_starts}
        return [
            ProcessRow(
                name=name,
                role=name,
                pid=pid,
                state=ProcessState.READY,
                incarnation=starts[name],
                uptime_ms=(t.now_ns - t.started_ns) // MS,
            )
            for name, pid in t.pids.items()
        ]

    def _process_row(self, process: Process) -> ProcessRow:
        t = self._t
        session = t.sessions.by_id.get(process.session or b"")
        pid = process.pid if session is None or process.pid is not None else session.pid
        return ProcessRow(
            name=process.name,
            role=process.role,
            pid=pid,
            state=process.state,
            incarnation=process.incarnation,
            uptime_ms=(t.now_ns - process.born_ns) // MS if process.alive else 0,
            lease=process.lease,
            doing=process.doing,
            model=process.model or "",
            threads=len(process.residents) + process.running,
            path=process.path,
        )

    def _kill(self, asker: Asker, call: ProcessKill) -> Message:
        own = self._t.pids.get(call.name)
        if own is not None:
            self._t.effects.append(SignalChild(own, 0, call.signal))
            return Done()
        process = self._t.processes.by_name.get(call.name)
        if process is None or process.pid is None:
            others = (p.name for p in self._t.processes.by_name.values() if p.pid)
            names = ", ".join((*self._t.pids, *others))
            raise RemoteError(ErrorKind.STALE, f"no process {call.name!r} runs; there is: {names}")
        process.signalled = True
        effect = SignalChild(process.pid, process.incarnation, call.signal)
        self._t.effects.append(effect)
        return Done()

    def _shutdown(self, asker: Asker, call: Shutdown) -> Message:
        self.halt()
        return Done()

    def halt(self) -> None:
        """Everything ends; accepted threads go on at the next boot."""
        t = self._t
        if t.halting:
            return
        t.halting = True
        for session in t.sessions.by_id.values():
            t.send(session, Goodbye("shutdown"))
        t.effects.append(Halt())

    def _note(self, asker: Asker, call: Note) -> Message:
        self._t.log("info", "note", process=asker.session.process, text=call.text)
        process = self._t.processes.by_name.get(asker.session.process or "")
        job = self._t.state.jobs.get(process.job) if process is not None else None
        if job is not None:
            job.note = call.text
        return Done()

    def _status(self, asker: Asker, call: StatusAsk) -> Message:
        t = self._t
        states = [thread.state for thread in t.state.threads]
        waiting = self.not_ready()
        http = [
            p.address for p in t.processes.by_name.values() if p.role == "gateway" and p.address
        ]
        return Status(
            ready=not waiting,
            version=t.config.version,
            kernel_epoch=t.epoch,
            uptime_ms=(t.now_ns - t.started_ns) // MS,
            http=http[0] if http else "",
            default_model=self.default_model() or "",
            journal_bytes=t.journal_bytes,
            journal_full=not t.journal_room,
            threads_queued=states.count(ThreadState.QUEUED),
            threads_running=states.count(ThreadState.RUNNING),
            threads_ended=states.count(ThreadState.ENDED),
            tokens_committed=t.tokens_committed,
            sessions=len(t.sessions.by_id),
            devices=[self._device(device) for device in t.devices],
            not_ready=waiting,
        )

    def not_ready(self) -> list[str]:
        """What should run and does not."""
        t = self._t
        missing = []
        for spec in t.config.services:
            process = t.processes.by_name[spec.name]
            if process.state is not ProcessState.READY:
                doing = f" ({process.doing})" if process.doing else ""
                missing.append(f"{spec.name}: {process.state.value}{doing}")
        default = self.default_model()
        for name in map(t.entry_of, self.preload()) if default is not None else ():
            replicas = t.processes.executors_of(name)
            if name not in t.state.models or (
                name not in t.failures and not any(p.ready_info for p in replicas) and replicas
            ):
                missing.append(f"model {name}: loading")
        return missing

    def _device(self, device: DeviceRow) -> DeviceRow:
        leases = (p.lease for p in self._t.processes.by_name.values() if p.lease is not None)
        granted = sum(lease.memory_bytes for lease in leases if lease.device == device.name)
        return DeviceRow(
            name=device.name,
            kind=device.kind,
            cores=device.cores,
            memory_bytes=device.memory_bytes,
            memory_granted_bytes=granted,
            detail=device.detail,
        )

    # --- keys -------------------------------------------------------------------------------------

    def _present(self, asker: Asker, call: KeyPresent) -> Message:
        key = self._t.state.keys_by_digest.get(hashlib.sha256(call.key).digest())
        if key is None:
            raise RemoteError(ErrorKind.DENIED, "this API key is not known")
        tenant = self._t.tenant(f"key:{key.name}")
        # The tenant's own number: a gateway that presents its keys to the next kernel, in whatever
        # order, gets back the handles that its unanswered requests and its streams cite.
        asker.session.handles[tenant] = (tenant, key.operator)
        return KeyPresented(tenant, key.name, key.operator)

    def _add_key(self, asker: Asker, call: KeyAdd) -> Message:
        t = self._t
        known = t.state.keys.get(call.name)
        if known is not None and known.digest != call.digest:
            raise RemoteError(
                ErrorKind.INVALID, f"a key named {call.name!r} exists; remove it first"
            )
        if known is None:
            t.need_room()
            other = t.state.keys_by_digest.get(call.digest)
            if other is not None:
                raise RemoteError(
                    ErrorKind.INVALID, f"this key exists already, under the name {other.name!r}"
                )
            if len(call.name) > KEY_NAME_MAX:
                detail = f"a key's name has at most {KEY_NAME_MAX} characters, not {len(call.name)}"
                raise RemoteError(ErrorKind.INVALID, detail)
            if len(t.state.keys) >= limits.API_KEYS_MAX:
                detail = f"{len(t.state.keys)} keys are known, the most there may be"
                raise RemoteError(ErrorKind.EXHAUSTED, detail)
            created_s = (t.now_ns + t.wall_offset_ns) // 1_000_000_000
            t.record(KeyAdded(call.name, call.digest, call.operator, created_s))
        return Done()

    def _remove_key(self, asker: Asker, call: KeyRemove) -> Message:
        t = self._t
        key = t.state.keys.get(call.name)
        if key is None:
            raise RemoteError(ErrorKind.STALE, f"there is no key named {call.name!r}")
        t.record(KeyRemoved(call.name))
        tenant = t.state.tenant_ids.get(f"key:{call.name}")
        if tenant is not None:
            for session in t.sessions.by_id.values():
                session.handles.pop(tenant, None)
        return Done()

    def _keys(self, asker: Asker, call: KeysAsk) -> Message:
        keys = self._t.state.keys.values()
        return Keys([KeyRow(key.name, key.operator, key.created_s) for key in keys])
