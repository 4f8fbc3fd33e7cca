"""What names serve: entries are rolled out, taken back and retired.

Changes: deployments, retired models (through facts); asks supervision for executors.  A name's new
entry is loaded beside the old one where there is room, and serves from the moment that one of its
executors is ready; where there is none, or nothing of the old one is loaded, new threads wait for
it at once and the old one's threads end first.  An entry that cannot be loaded is taken back.

Invariant: an entry stays in the table while a deployment needs it or a thread of it lives.
"""

from llmproto.errors import ErrorKind, RemoteError
from llmproto.models import (
    DeploymentRow,
    DeploymentState,
    ModelDeploy,
    ModelEntry,
    ModelUndeploy,
)
from llmproto.operation import ProcessState
from msgspec import structs

from llmkernel.facts import Deployed, ModelRemoved, ModelRetired, Undeployed
from llmkernel.lifecycle import Lifecycle
from llmkernel.placement import NoRoom
from llmkernel.processes import Process
from llmkernel.rollouts import Wish, entries, exchangeable, pending, previous, proved, wishes
from llmkernel.supervision import Supervision
from llmkernel.tables import Tables
from llmkernel.threads import Thread


class Deployments:
    """The rules of the deployment table."""

    def __init__(self, tables: Tables, lifecycle: Lifecycle, supervision: Supervision) -> None:
        self._t = tables
        self._lifecycle = lifecycle
        self._supervision = supervision

    def boot(self) -> None:
        """What was under way goes on; what serves is loaded where there is room for it."""
        t = self._t
        self._index()
        for name, one in t.state.deployments.items():
            if pending(one):
                t.rollouts[name] = None
            for entry in one.proved:
                self._drain_later(entry)
            if not t.processes.executors_of(one.serving):
                self._supervision.start_replica(one.serving)
        for entry in t.state.retired:
            self._drain_later(entry)

    # --- asked ------------------------------------------------------------------------------------

    def deploy(self, call: ModelDeploy) -> None:
        """The name serves this from now on; again: nothing changes, or a failed one is tried
        anew."""
        t = self._t
        self._check(call)
        known = t.state.deployments.get(call.name)
        t.need_room()
        t.failures.pop(call.model, None)
        if known is None:
            self._record(self._begun(call, call.model, []))
        elif known.model != call.model or known.state is DeploymentState.FAILED:
            before = known.proved
            if not before and known.state is DeploymentState.ROLLING:
                before = [known.model]  # nothing speaks against it yet
            serving = known.serving
            if serving not in before:  # it was waited for, and never came
                serving = before[-1] if before else call.model
            self._record(self._begun(call, serving, before))
        else:
            again = structs.replace(known, replicas=call.replicas, device=call.device, key=call.key)
            if again != known:
                self._record(again)
        self.staff()

    def _begun(self, call: ModelDeploy, serving: str, proved_before: list[str]) -> Deployed:
        """A roll-out; one to the entry that serves anyway is over at once."""
        one = Deployed(
            name=call.name,
            model=call.model,
            serving=serving,
            proved=proved_before,
            replicas=call.replicas,
            device=call.device,
            state=DeploymentState.ROLLING,
            detail="",
            changed_s=self._now_s(),
            key=call.key,
        )
        if serving == call.model and serving in proved_before:
            one = structs.replace(one, state=DeploymentState.LIVE, proved=proved(one))
        return one

    def _check(self, call: ModelDeploy) -> None:
        """Raise the refusal that applies, if one does."""
        t = self._t
        registered = t.state.models.get(call.model)
        if registered is None:
            raise RemoteError(
                ErrorKind.INVALID, f"{call.model!r} is not in the model table: add it first"
            )
        if call.name in t.state.models:
            raise RemoteError(
                ErrorKind.INVALID,
                f"{call.name!r} is a model by itself: deploy under another name, or remove it",
            )
        devices = [d.name for d in t.devices]
        if call.device is not None and not any(call.device in (d.name, d.kind) for d in t.devices):
            raise RemoteError(
                ErrorKind.INVALID,
                f"there is no device {call.device!r}; there is: {', '.join(devices)}",
            )
        room = self._supervision.room_for(registered.model, call.device)
        if isinstance(room, NoRoom) and not room.ever:
            raise RemoteError(
                ErrorKind.INVALID,
                f"{call.model!r} needs {room.needed_bytes} bytes of memory, the largest "
                f"device that it may have {room.largest_bytes}",
            )

    def undeploy(self, call: ModelUndeploy) -> None:
        """The name serves nothing; its threads go on to their end."""
        t = self._t
        known = t.state.deployments.get(call.name)
        if known is None:
            names = ", ".join(sorted(t.state.deployments)) or "none"
            raise RemoteError(
                ErrorKind.INVALID, f"{call.name!r} is not deployed; there is: {names}"
            )
        t.record(Undeployed(call.name))
        t.rollouts.pop(call.name, None)
        self._settle(known)

    def rows(self) -> list[DeploymentRow]:
        """Every deployment."""
        return [self._row(one) for one in self._t.state.deployments.values()]

    def _row(self, one: Deployed) -> DeploymentRow:
        t = self._t
        ready = sum(1 for p in t.processes.executors_of(one.serving) if _ready(p))
        failure = t.failures.get(one.serving)
        broken = failure is not None and not ready and one.state is DeploymentState.LIVE
        return DeploymentRow(
            name=one.name,
            state=DeploymentState.FAILED if broken else one.state,
            model=one.model,
            serving=one.serving,
            previous=previous(one),
            replicas=one.replicas,
            replicas_ready=ready,
            device=one.device,
            detail=failure.detail if failure is not None and broken else one.detail,
            changed_s=one.changed_s,
            key=one.key,
        )

    # --- keeping account --------------------------------------------------------------------------

    def _now_s(self) -> int:
        return (self._t.now_ns + self._t.wall_offset_ns) // 1_000_000_000

    def _record(self, one: Deployed) -> None:
        """Write it down, and draw the consequences."""
        t = self._t
        before = t.state.deployments.get(one.name)
        t.record(one)
        if pending(one):
            t.rollouts[one.name] = None
        else:
            t.rollouts.pop(one.name, None)
        self._settle(before)

    def _settle(self, before: Deployed | None) -> None:
        """Entries that nobody serves any more drain; those that nobody needs leave, too."""
        t = self._t
        self._index()
        for entry in entries(before) if before is not None else ():
            if not any(entry in entries(one) for one in t.state.deployments.values()):
                t.record(ModelRetired(entry))
            self._drain_later(entry)
        t.dirty = True

    def _index(self) -> None:
        """The soft tables that follow from the deployments; at most MODELS_MAX of these."""
        t = self._t
        t.wishes = wishes(t.state.deployments)
        for entry, wish in t.wishes.items():
            if wish != Wish() or len(t.processes.executors_of(entry)) > 1:
                t.crowds[entry] = None

    def _drain_later(self, entry: str) -> None:
        if entry not in self._t.wishes:
            self._t.draining[entry] = None

    # --- rolling ----------------------------------------------------------------------------------

    def advance(self) -> None:
        """Go as far as can be gone now; called before threads are placed."""
        t = self._t
        if not t.journal_room or t.halting:
            return
        for name in list(t.rollouts):
            one = t.state.deployments.get(name)
            if one is None or not pending(one):
                del t.rollouts[name]
            else:
                self._roll(one)
        for entry in list(t.draining):
            self._drain(entry)

    def _roll(self, one: Deployed) -> None:
        t = self._t
        wanted = t.processes.executors_of(one.model)
        if any(map(_ready, wanted)):
            t.log("info", "deployed", name=one.name, model=one.model)
            live = structs.replace(
                one, serving=one.model, state=DeploymentState.LIVE, proved=proved(one), detail=""
            )
            self._record(live)
            self.staff()
            return
        if one.state is DeploymentState.FAILED:
            return  # tried again when somebody asks for it
        if one.serving != one.model and not t.processes.executors_of(one.serving):
            # Whatever is asked for next has to be loaded anyway.
            one = self._switch(one)
        if wanted:
            return
        missing = self._supervision.start_replica(one.model)
        if missing is not None:
            self._make_way(one, missing)

    def _switch(self, one: Deployed) -> Deployed:
        switched = structs.replace(one, serving=one.model)
        self._record(switched)
        return switched

    def _make_way(self, one: Deployed, missing: NoRoom) -> None:
        """There is no room beside what is loaded: idle models go first, then what is served now."""
        t = self._t
        if any(p.state is ProcessState.STOPPING for p in t.processes.executors.values()):
            return  # room is on its way
        if not missing.ever:
            detail = f"{one.model!r} needs {missing.needed_bytes} bytes; no device is that large"
            self._supervision.load_failed(one.model, ErrorKind.EXHAUSTED, detail)
            return
        if one.serving != one.model:
            old = t.processes.executors_of(one.serving)
            idle = [p for p in self._supervision.idle() if p not in old]
            if self._supervision.fits_without(one.model, idle):
                self._supervision.stop(min(idle, key=lambda p: p.idle_ns))
                return
            if not self._supervision.fits_without(one.model, [*idle, *old]):
                return  # others are busy: until they are done the old one serves
            t.log("info", "no room for both", name=one.name, old=one.serving, new=one.model)
            self._switch(one)
        self._supervision.want_model(one.model)

    def _drain(self, entry: str) -> None:
        """It serves no name: its executors stop with its last thread, and it leaves with them."""
        t = self._t
        if entry in t.wishes:
            del t.draining[entry]
            return
        if t.state.threads.living.get(entry):
            return
        executors = t.processes.executors_of(entry)
        for process in executors:
            self._supervision.stop(process)
        if executors and t.processes.executors_of(entry):
            return
        del t.draining[entry]
        if entry in t.state.retired:
            t.record(ModelRemoved(entry))
            t.failures.pop(entry, None)
            t.poisons.pop(entry, None)

    # --- replicas ---------------------------------------------------------------------------------

    def staff(self) -> None:
        """As many executors of each entry, and on such devices, as is wished and has room."""
        t = self._t
        for entry in list(t.crowds):
            wish = t.wishes.get(entry)
            executors = [p for p in t.processes.executors_of(entry) if p.desired]
            placed = [p for p in executors if wish is None or self._placed(p, wish.device)]
            if wish is None or (wish == Wish() and len(executors) <= 1):
                del t.crowds[entry]
                continue
            rested = t.now_ns >= t.rests.get(entry, 0)
            missing = wish.replicas - len(placed) if executors and rested else 0
            for _ in range(missing):
                if self._supervision.start_replica(entry) is not None:
                    break
            surplus = placed[wish.replicas :]
            if any(map(_ready, placed)):
                surplus += [p for p in executors if p not in placed]
            for process in surplus:
                for thread in list(process.residents.values()):
                    self._lifecycle.leave(thread, tell=True)
                    self._lifecycle.queue(thread)
                self._supervision.stop(process)

    def _placed(self, process: Process, device: str | None) -> bool:
        if device is None or process.lease is None:
            return True
        kinds = {d.name: d.kind for d in self._t.devices}
        return device in (process.lease.device, kinds.get(process.lease.device))

    # --- failing ----------------------------------------------------------------------------------

    def taken_back(self, model: str, detail: str) -> None:
        """This entry cannot be loaded: names that were on their way to it serve what they did."""
        t = self._t
        for name in list(t.rollouts):
            one = t.state.deployments.get(name)
            if one is None or one.model != model or one.state is not DeploymentState.ROLLING:
                continue
            serving = previous(one) or model
            t.log("error", "not deployed", name=name, model=model, serving=serving, why=detail)
            self._record(
                structs.replace(one, serving=serving, state=DeploymentState.FAILED, detail=detail)
            )

    def moved(self, thread: Thread) -> bool:
        """Where its model cannot be loaded, a thread that has computed nothing goes to what its
        deployment serves instead."""
        one = self.replaced(thread)
        if one is None or thread.output_tokens or thread.lengths:
            return False
        old, new = self._entry(thread.model), self._entry(one.serving)
        if old is None or new is None or not exchangeable(old, new):
            return False
        if thread.length_max > new.context_tokens:
            return False
        self._lifecycle.move(thread, one.serving)
        return True

    def replaced(self, thread: Thread) -> Deployed | None:
        """The deployment by which it was asked for, if that serves another entry."""
        one = self._t.state.deployments.get(thread.deployment or "")
        return one if one is not None and one.serving != thread.model else None

    def _entry(self, name: str) -> ModelEntry | None:
        registered = self._t.state.models.get(name)
        return registered.model if registered is not None else None


def _ready(process: Process) -> bool:
    return process.state is ProcessState.READY and process.ready_info is not None
