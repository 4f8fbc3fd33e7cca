"""Every process that init started: forked, signalled, reaped with all that descends from it.

Invariant: a pid stands in the table from its fork until it is reaped and none of its descendants is
left (or DESCENDANTS_S has passed); so a pid in the table is never somebody else's.
"""

import os
import secrets
import signal
import time
from typing import Final

from libllm.config import PROOF_BYTES, Home
from llmproto import limits
from llmproto.init import Child, Exit, Spec

from llmkernel.init import descend, guard, launch
from llmkernel.init.launch import Launch
from llmkernel.init.lifeline import Lifeline
from llmkernel.init.logs import Log
from llmkernel.init.oom import OomCount

DESCENDANTS_S: Final = limits.STOPPING_MS_MAX / 1000
"""A killed descendant that is not gone after so long hangs; its ancestor is reported."""
KERNEL: Final = "kernel"


class Process:
    """A row of the table."""

    def __init__(self, pid: int, name: str, incarnation: int) -> None:
        self.pid = pid
        self.name = name
        self.incarnation = incarnation
        self.child: Child | None = None
        """Absent for kernels, which no kernel is told of."""
        self.exit: Exit | None = None
        """Once it is reaped."""
        self.reaped_s = 0.0
        self.killed = False
        """By us, so that it did not die for memory."""


class Children:
    """The table, by pid."""

    def __init__(self, home: Home, oom: OomCount, log: Log) -> None:
        self._home = home
        self._oom = oom
        self._log = log
        self._lifeline = Lifeline()
        self._roll = guard.Roll()
        self._processes: dict[int, Process] = {}
        self._guard_pid: int | None = None

    # --- starting -----------------------------------------------------------------------------

    def start_guard(self, lock_fd: int) -> None:
        """Fork the guard, if none lives."""
        if self._guard_pid is None:
            self._guard_pid = guard.start(
                self._roll,
                self._home.root,
                lifeline_fd=self._lifeline.read_end,
                lock_fd=lock_fd,
            )

    def fork(self, spec: Spec, incarnation: int, *, image: bool) -> Child | Exit:
        """Start a process; one of this name and incarnation that lives is that process."""
        for process in self._processes.values():
            known = process.child
            if known and (known.spec.name, known.incarnation) == (spec.name, incarnation):
                return known
        refusal = self._refusal(spec)
        if refusal is not None:
            self._log.error("not started", name=spec.name, reason=refusal)
            return not_started(spec, incarnation)
        proof = secrets.token_bytes(PROOF_BYTES)
        read_end, write_end = os.pipe()
        try:
            os.write(write_end, proof)
            process = self._start(spec, incarnation, {"LLMOS_PROOF_FD": read_end}, image=image)
        except OSError as error:
            self._log.error("not started", name=spec.name, reason=str(error))
            return not_started(spec, incarnation)
        finally:
            os.close(read_end)
            os.close(write_end)
        child = Child(
            spec=spec,
            incarnation=incarnation,
            pid=process.pid,
            proof=proof,
            started_ns=min(time.monotonic_ns(), (1 << 53) - 1),
        )
        process.child = child
        return child

    def start_kernel(self, module: str, arguments: list[str], init_fd: int, number: int) -> int:
        """Start a kernel or a standby with its end of the socketpair; its pid."""
        spec = Spec(name=KERNEL, role=KERNEL, module=module, arguments=arguments)
        return self._start(spec, number, {"LLMOS_INIT_FD": init_fd}, image=False).pid

    def _refusal(self, spec: Spec) -> str | None:
        if len(self._processes) >= limits.PROCESSES_MAX:
            return f"{len(self._processes)} processes live, at most {limits.PROCESSES_MAX} may"
        if "/" in spec.name or "\0" in spec.name or spec.name.startswith("."):
            return "its name is not one of a file"
        return None

    def _start(
        self, spec: Spec, incarnation: int, descriptors: dict[str, int], *, image: bool
    ) -> Process:
        descriptors = {"LLMOS_LIFELINE_FD": self._lifeline.read_end, **descriptors}
        variables: dict[str, str | None] = {
            "LLMOS_PROOF_FD": None,
            "LLMOS_INIT_FD": None,
            "LLMOS_HOME": str(self._home.root),
            "LLMOS_PROCESS": spec.name,
            "LLMOS_INCARNATION": str(incarnation),
            **{name: str(descriptor) for name, descriptor in descriptors.items()},
        }
        pid = launch.start(
            Launch(
                name=spec.name,
                module=spec.module,
                arguments=list(spec.arguments),
                log=self._home.logs / f"{spec.name}.log",
                variables=variables,
                descriptors=list(descriptors.values()),
                cores=list(spec.cores),
                nice=spec.nice,
                image=image,
            )
        )
        self._roll.add(pid)
        process = self._processes[pid] = Process(pid, spec.name, incarnation)
        self._log.info("started", name=spec.name, pid=pid, incarnation=incarnation)
        return process

    # --- looking ------------------------------------------------------------------------------

    def living(self) -> list[Child]:
        """The children that no exit was reported of, as a new kernel is told."""
        return [process.child for process in self._processes.values() if process.child]

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def ending(self) -> bool:
        """Some are reaped and wait for the end of their descendants."""
        return any(process.exit for process in self._processes.values())

    # --- ending -------------------------------------------------------------------------------

    def signal(self, pid: int, incarnation: int, number: int) -> None:
        """Signal a child that kernels know; of another incarnation, or gone, it is left alone."""
        process = self._processes.get(pid)
        if process and process.child and process.incarnation == incarnation:
            self._signal(process, number)

    def kill(self, pid: int) -> None:
        """SIGKILL for one that no kernel knows."""
        if (process := self._processes.get(pid)) is not None:
            self._signal(process, signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """Every living process, kernels too."""
        for process in list(self._processes.values()):
            self._signal(process, number)

    def reap(self, now_s: float) -> list[Process]:
        """Those that have ended since, with everything that descends from them."""
        while (ended := _wait()) is not None:
            self._take_exit(*ended, now_s)
        ending = [process for process in self._processes.values() if process.exit]
        if not ending:
            return []
        left = self._kill_orphans()
        gone = [
            process
            for process in ending
            if process.pid not in left or now_s > process.reaped_s + DESCENDANTS_S
        ]
        for process in gone:
            del self._processes[process.pid]
            self._roll.remove(process.pid)
        return gone

    def end_guard(self) -> None:
        """Nothing is left to guard."""
        guard_pid, self._guard_pid = self._guard_pid, None
        if guard_pid is not None:
            guard.kill(guard_pid)
            os.waitpid(guard_pid, 0)

    def _signal(self, process: Process, number: int) -> None:
        if process.exit:
            return
        os.kill(process.pid, number)  # not reaped, so the pid is its own, dead or alive
        if number == signal.SIGKILL:
            process.killed = True
            _kill_group(process.pid)

    def _take_exit(self, pid: int, status: int, now_s: float) -> None:
        process = self._processes.get(pid)
        if process is None:  # an orphan that we adopted, or the guard
            if pid == self._guard_pid:
                self._guard_pid = None
            return
        _kill_group(pid)
        code = os.waitstatus_to_exitcode(status)
        process.reaped_s = now_s
        process.exit = Exit(
            name=process.name,
            incarnation=process.incarnation,
            pid=pid,
            code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            out_of_memory=code == -signal.SIGKILL and not process.killed and self._oom.take(),
        )

    def _kill_orphans(self) -> set[int]:
        """Kill those whose ancestor has ended; the ancestors (pids) of those not gone yet."""
        left: set[int] = set()
        for row in descend.children_of_self():
            if row.pid in self._processes or row.pid == self._guard_pid:
                continue
            owner = self._owner(row)
            if owner is not None and owner.exit is None:
                continue  # a daemon of a living child
            guard.kill(row.pid)
            left |= {owner.pid} if owner else {p.pid for p in self._processes.values() if p.exit}
        return left

    def _owner(self, row: descend.Row) -> Process | None:
        """By its session; where it began one of its own, by the environment of its program."""
        if row.session in self._processes:
            return self._processes[row.session]
        found = descend.variables(row.pid)
        for process in self._processes.values():  # at most PROCESSES_MAX, and daemons are rare
            if (
                found.get(b"LLMOS_PROCESS") == process.name.encode()
                and found.get(b"LLMOS_INCARNATION") == str(process.incarnation).encode()
            ):
                return process
        return None


def not_started(spec: Spec, incarnation: int) -> Exit:
    """What is reported of a process that never was; its pid is init's own, which no child has."""
    return Exit(
        name=spec.name,
        incarnation=incarnation,
        pid=os.getpid(),
        code=launch.FAILED,
        signal=None,
    )


def _wait() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
