"""Real systems for the tests: real processes in a home of their own, real sockets, real models.

`shared` and `rigged` serve a whole module, `booted` boots what one test asks for; all are taken
down, and then nothing of them may be left.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from libllm.client import AsyncClient, open_client
from libllm.config import Home
from llmproto.operation import ProcessRow, ProcessState

from libllm import boot

from .load import Twins

EXACT = (
    '[executor]\nmode = "exact"\n[gateway]\nport = 0\n[services]\nrun = ["tokenizer", "monitor"]\n'
)
SERVED = '[executor]\nmode = "exact"\n[gateway]\nport = 0\n'
ROOT = Path(__file__).parents[2]
RIGGED = "tests.system.faults.init"
"""An init whose kernel, tokenizer and executor pass points."""
BOOT_S = 90
SETTLE_S = 30


class System:
    """A running system in a temporary home."""

    def __init__(self, home: Home, *, init: str = "llmkernel.init") -> None:
        """`init` is the module of its first process."""
        self.home = home
        self._command = [sys.executable, "-P", "-m", init, "--home", str(home.root)]
        self._sessions = 0

    def boot(self) -> None:
        """Start it, and wait until it is ready."""
        asyncio.run(self.boot_async())

    async def boot_async(self) -> None:
        """The same, inside an event loop."""
        await boot.boot_async(self.home, timeout_s=BOOT_S, command=self._command)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """A connection of its operator."""
        client = await open_client(self.home, timeout_s=SETTLE_S)
        try:
            yield client
        finally:
            await client.aclose()

    def pids(self) -> list[int]:
        """Every living process that was started for this home, whatever became of its parent."""
        wanted = f"LLMOS_HOME={self.home.root}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = _command(int(entry.name)).split(b"\0")
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
            except OSError:
                continue
            mine = wanted in environment or str(self.home.root).encode() in command
            if mine and state != b"Z" and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def init_pid(self) -> int:
        """Its first process."""
        return min(pid for pid in self.pids() if b"--home" in _command(pid).split(b"\0"))

    def descriptors(self) -> int:
        """How many init holds open."""
        return len(list(Path(f"/proc/{self.init_pid()}/fd").iterdir()))

    async def until_settled(self, client: AsyncClient, *, seconds: float = SETTLE_S) -> None:
        """Until no thread is left and every process is ready, as it was before; asserts that it
        comes to that."""
        deadline = time.monotonic() + seconds
        while leftovers := await self._leftovers(client):
            assert time.monotonic() < deadline, leftovers
            await asyncio.sleep(0.1)

    async def _leftovers(self, client: AsyncClient) -> list[str]:
        status = await client.status()
        threads = await client.threads()
        rows = await client.ps()
        names = [row.name for row in rows]
        # A kernel (with its standby), a guard beside init, and what `ps` shows.
        alive = len(self.pids())
        services = sum(1 for row in rows if row.pid is not None and row.role not in OWN)
        sessions = services + 1
        return [
            *(f"{row.name} is {row.state.value}" for row in rows if not settled(row.state)),
            *(f"{row.name} holds {row.threads} threads" for row in rows if row.threads),
            *(f"thread {row.thread.hex()} is {row.state.value}" for row in threads),
            *([] if len(names) == len(set(names)) else [f"twice in ps: {names}"]),
            *([] if alive <= services + 4 else [f"{alive} processes for {names}"]),
            *([] if status.sessions <= sessions else [f"{status.sessions} sessions of {sessions}"]),
            *status.not_ready,
        ]

    def stop(self) -> None:
        """Take it down; asserts that nothing is left."""
        for pid in self.pids():
            if b"--home" in _command(pid).split(b"\0"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        self.until_gone()

    def until_gone(self, *, seconds: float = SETTLE_S) -> None:
        """Until no process of it lives; asserts that it comes to that."""
        deadline = time.monotonic() + seconds
        while pids := self.pids():
            if time.monotonic() > deadline:
                left = {pid: _command(pid) for pid in pids}
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes are left: {left}")
            time.sleep(0.05)


OWN = ("init", "kernel")


def settled(state: ProcessState) -> bool:
    """It is where it should be when nothing happens."""
    return state in (ProcessState.READY, ProcessState.STOPPED)


async def find(client: AsyncClient, role: str) -> ProcessRow:
    """A living process of this role, once there is one."""
    while True:
        for row in await client.ps():
            if row.role == role and row.pid is not None:
                return row
        await asyncio.sleep(0.02)


async def strike(client: AsyncClient, role: str, number: int = signal.SIGKILL) -> int:
    """Signal a process of this role from outside; its pid."""
    while True:
        row = await find(client, role)
        assert row.pid is not None
        try:
            os.kill(row.pid, number)
        except ProcessLookupError:  # it has just ended by itself
            await asyncio.sleep(0.02)
            continue
        return row.pid


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def systems() -> Iterator[Callable[[str, str], System]]:
    """Boots systems (configuration, module of init), and takes them down."""
    made: list[System] = []

    def start(config: str, init: str) -> System:
        # Not tmp_path: the path of a Unix socket is at most 107 bytes.
        root = Path(tempfile.mkdtemp(prefix="llmos-"))
        (root / "config.toml").write_text(config)
        system = System(Home.find(root), init=init)
        made.append(system)
        system.boot()
        return system

    with pytest.MonkeyPatch.context() as patch:
        # The replaced parts stand in this folder.
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        try:
            yield start
        finally:
            try:
                for system in made:
                    system.stop()
            finally:
                for system in made:
                    shutil.rmtree(system.home.root, ignore_errors=True)


Boot = Callable[..., System]


@pytest.fixture
def booted() -> Iterator[Boot]:
    """Boot systems: `booted(config_toml, init=module)`."""
    with systems() as start:
        yield lambda config=EXACT, init="llmkernel.init": start(config, init)


@pytest.fixture(scope="module")
def shared() -> Iterator[System]:
    """One system in exact mode for all tests of a module that leave it as they found it."""
    with systems() as start:
        yield start(EXACT, "llmkernel.init")


@pytest.fixture(scope="module")
def gated() -> Iterator[System]:
    """The same with a gateway, which may be killed."""
    with systems() as start:
        yield start(SERVED, "llmkernel.init")


@pytest.fixture(scope="module")
def rigged() -> Iterator[System]:
    """The same, with processes that pass points and can be made to crash."""
    with systems() as start:
        yield start(EXACT, RIGGED)


@pytest.fixture(scope="session")
def served() -> Iterator[System]:
    """One system with a gateway, in exact mode, for all tests that leave it as they found it."""
    with systems() as start:
        yield start(SERVED, "llmkernel.init")


@pytest.fixture(scope="session")
def twins() -> Twins:
    """What undisturbed requests give, known to all tests."""
    return Twins()


def run_llmos(*arguments: str, home: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The command line, as a user would run it."""
    return subprocess.run(
        [sys.executable, "-m", "libllm.cli", *arguments],
        env={**os.environ, "LLMOS_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
