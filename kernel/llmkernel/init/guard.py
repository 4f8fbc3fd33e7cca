"""The process that cleans up after an init that was killed.

Children die with init by themselves (death signal), but what they started does not.  The guard
waits for the end of the lifeline, then kills every process whose session is that of a child of
init's or whose environment says that it belongs to this home.  It holds the home's lock until that
is done, so that nobody starts beside the remains.
"""

import mmap
import os
import signal
import struct
import time
from pathlib import Path
from typing import Final, NoReturn

from llmproto import limits

from llmkernel.init import descend

ROUNDS_MAX: Final = 200
ROUND_S: Final = 0.01
_PID: Final = struct.Struct("<I")


class Roll:
    """The sessions that init has begun, in memory that it shares with the guard."""

    def __init__(self) -> None:
        self._rows = limits.PROCESSES_MAX + 8  # the kernel, its standby, and room
        self._memory = mmap.mmap(-1, self._rows * _PID.size)

    def add(self, pid: int) -> None:
        """A child was started."""
        self._put(self.sessions().index(0), pid)

    def remove(self, pid: int) -> None:
        """It is gone, its descendants too."""
        self._put(self.sessions().index(pid), 0)

    def sessions(self) -> list[int]:
        """One a row; 0 where it is free."""
        return [pid for (pid,) in _PID.iter_unpack(self._memory[:])]

    def _put(self, index: int, pid: int) -> None:
        _PID.pack_into(self._memory, index * _PID.size, pid)


def start(roll: Roll, root: Path, *, lifeline_fd: int, lock_fd: int) -> int:
    """Fork the guard; its pid."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _be_guard(roll, root, (lifeline_fd, lock_fd))
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_guard(roll: Roll, root: Path, kept: tuple[int, int]) -> NoReturn:
    # All signals stay blocked: only SIGKILL, and the end of init, end it.
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        first = 0
        for descriptor in sorted(kept):
            os.closerange(first, descriptor)
            first = descriptor + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        while os.read(kept[0], 1):
            pass
        sweep({pid for pid in roll.sessions() if pid}, root)
    finally:
        os._exit(0)


def sweep(sessions: set[int], root: Path) -> None:
    """Kill the sessions and all that carries this home's mark, until there is none."""
    for _ in range(ROUNDS_MAX):
        for session in sessions:
            _kill_group(session)
        found = [
            row.pid
            for row in descend.everything()
            if not row.zombie
            and row.pid != os.getpid()
            and (row.session in sessions or carries_mark(row.pid, root))
        ]
        if not found:
            return
        for pid in found:
            kill(pid)
        time.sleep(ROUND_S)


def carries_mark(pid: int, root: Path) -> bool:
    """Whether its program was started by a process of this home."""
    found = descend.variables(pid)
    return (
        found.get(b"LLMOS_HOME") == os.fsencode(root)
        and b"LLMOS_PROCESS" in found
        and b"LLMOS_LIFELINE_FD" in found
    )


def kill(pid: int) -> None:
    """SIGKILL to whoever is left."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
