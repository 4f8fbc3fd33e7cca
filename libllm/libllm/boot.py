"""Starting a system, and telling whether one runs.

Init runs in a session of its own and outlives whoever started it. The lock in the home decides who
runs there, so that two who start at once end up with one system.
"""

import asyncio
import fcntl
import os
import sys
import time
from collections.abc import Sequence
from typing import Final, NoReturn

import msgspec
from llmproto.errors import ErrorKind, RemoteError
from llmproto.operation import Status, StatusAsk

from libllm.config import Home, SystemConfig, child_environment
from libllm.connection import Connection, open_connection

BOOT_S: Final = 60.0
EXIT_HELD: Final = 3
"""Init's exit code for a home in which a system runs already."""
WORDS_BYTES_MAX: Final = 2_000
POLL_S: Final = 0.02
CLAIMS_MAX: Final = 5
"""Whoever asks whether a system runs holds the lock for an instant; so init is started again if
nobody kept it."""


class LastWords(msgspec.Struct, frozen=True):
    """A line of the log that says why."""

    event: str
    detail: str


class Held(Exception):
    """Another init has the home."""


class Init:
    """An init that this process has started."""

    def __init__(self, home: Home, command: Sequence[str]) -> None:
        """Starts it, and waits until it has claimed the home or given up; blocks for as long."""
        self._home = home
        reading, writing = os.pipe()
        try:
            self._pid = os.posix_spawn(
                command[0],
                list(command),
                child_environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, writing, 2),
                ],
                setsid=True,
            )
        finally:
            os.close(writing)
        with os.fdopen(reading, "rb") as words:
            self._said = words.read(WORDS_BYTES_MAX)  # Until it turns to its log, or ends.
            while words.read(WORDS_BYTES_MAX):
                pass

    def check_alive(self) -> None:
        """Held where another init has the home, RemoteError with its last words where it ended
        otherwise."""
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        if not ended:
            return
        code = os.waitstatus_to_exitcode(status)
        if code == EXIT_HELD:
            raise Held
        words = self._said.decode(errors="replace").strip().removeprefix("llmos: ")
        log = self._home.logs / "init.log"
        if not words and log.exists():
            words = log.read_bytes()[-WORDS_BYTES_MAX:].decode(errors="replace").strip()
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        kind = ErrorKind.INVALID if code == 2 else ErrorKind.UNAVAILABLE
        raise RemoteError(kind, words if code == 2 else f"init ended with {how}: {words}")


def is_running(home: Home) -> bool:
    """Whether an init holds this home."""
    try:
        lock = os.open(home.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def init_command(home: Home, *, foreground: bool = False) -> list[str]:
    """How init is started."""
    command = [sys.executable, "-P", "-m", "llmkernel.init", "--home", str(home.root)]
    return [*command, "--foreground"] if foreground else command


def boot_foreground(home: Home) -> NoReturn:
    """Become init, for containers; a configuration that no kernel could start with is refused."""
    SystemConfig.read(home.config)
    sys.stdout.flush()
    sys.stderr.flush()
    command = init_command(home, foreground=True)
    os.execve(command[0], command, child_environment())


def boot(home: Home, *, timeout_s: float = BOOT_S) -> Status:
    """Boot where nothing runs, wait until all services are ready, and give the status.

    Raises RemoteError with init's own words where it gives up, DEADLINE with what is not ready
    where it takes too long.
    """
    return asyncio.run(boot_async(home, timeout_s=timeout_s))


async def boot_async(
    home: Home, *, timeout_s: float = BOOT_S, command: Sequence[str] | None = None
) -> Status:
    """`boot`, for event loops; `command` starts another init than the installed one."""
    deadline_s = time.monotonic() + timeout_s
    for _ in range(CLAIMS_MAX):
        try:
            init = None
            if not is_running(home):
                SystemConfig.read(home.config)  # Before init tries it again and again.
                init = await asyncio.to_thread(Init, home, command or init_command(home))
            return await _wait_ready(home, init, deadline_s=deadline_s)
        except Held:
            continue
    raise RemoteError(ErrorKind.UNAVAILABLE, f"{home.lock} changes hands too often: try again")


async def wait_ended(home: Home, *, timeout_s: float) -> bool:
    """Until nothing runs in this home; False: something still does."""
    deadline_s = time.monotonic() + timeout_s
    while is_running(home):
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def _wait_ready(home: Home, init: Init | None, *, deadline_s: float) -> Status:
    """Until every service is ready; an init of ours must live meanwhile."""
    why = "the kernel does not answer yet"
    connection: Connection | None = None
    try:
        while (left_s := deadline_s - time.monotonic()) > 0:
            if init is not None:
                init.check_alive()
            elif not is_running(home):
                raise Held  # It ended, and left the home to whoever comes.
            if connection is None:
                connection = await _try_connect(home, left_s)
            else:
                status = await _try_status(connection, left_s)
                if status is not None and status.ready:
                    return status
                if status is not None:
                    why = "; ".join(status.not_ready) or "its services are starting"
            await asyncio.sleep(POLL_S)
    finally:
        if connection is not None:
            connection.close()
    if connection is None:
        why = _why_no_kernel(home) or why
    raise RemoteError(
        ErrorKind.DEADLINE,
        f"the system in {home.root} is not ready in time: {why}; see {home.logs}",
    )


def _why_no_kernel(home: Home) -> str:
    """What the last kernel died of, where that is the last thing that its log says."""
    try:
        with (home.logs / "kernel.log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - WORDS_BYTES_MAX))
            said = msgspec.json.decode(log.read().splitlines()[-1], type=LastWords)
    except (OSError, IndexError, msgspec.MsgspecError, UnicodeDecodeError):
        return ""
    return f"the kernel {said.event}: {said.detail}"


async def _try_connect(home: Home, left_s: float) -> Connection | None:
    """A session, if the kernel gives one within a second."""
    if not home.operator_key.exists():
        return None
    try:
        return await open_connection(home, timeout_s=min(1.0, left_s))
    except RemoteError as error:
        if error.kind is ErrorKind.DEADLINE:
            return None
        raise


async def _try_status(connection: Connection, left_s: float) -> Status | None:
    """How the system is, if it says so within a second."""
    deadline_ns = time.monotonic_ns() + int(min(1.0, left_s) * 1e9)
    try:
        return await connection.port.call(StatusAsk(), Status, deadline_ns=deadline_ns)
    except RemoteError as error:
        if error.kind is ErrorKind.DEADLINE:
            return None
        raise
