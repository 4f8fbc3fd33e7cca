"""Real systems for the tests: real processes in a home of their own, real sockets, real models.

`system` boots one with the given configuration and takes it down again, and then asserts that
nothing of it is left.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from libllm.client import AsyncClient, open_client
from libllm.config import Home
from libllm.results import Completion
from llmproto.operation import ProcessState

from libllm import boot

EXACT = (
    '[executor]\nmode = "exact"\n[gateway]\nport = 0\n[services]\nrun = ["tokenizer", "monitor"]\n'
)
SERVED = '[executor]\nmode = "exact"\n[gateway]\nport = 0\n'
PROMPTS = (
    "The for statement",
    "A list is",
    "The `import` statement",
    "Return the",
    "Strings are",
    "class Counter",
    "If an exception",
    "This method",
)


class Ask(msgspec.Struct, frozen=True):
    """One request of a load, the same whenever it is made."""

    prompt: str
    temperature: float
    seed: int
    tokens: int


def load(count: int, tokens: int) -> list[Ask]:
    """So many requests: half greedy, half sampled."""
    return [
        Ask(
            prompt=PROMPTS[number % len(PROMPTS)] + " " * (number // len(PROMPTS)),
            temperature=0.0 if number % 2 else 0.8,
            seed=number,
            tokens=tokens,
        )
        for number in range(count)
    ]


async def complete(client: AsyncClient, ask: Ask) -> Completion:
    """The whole answer, read as a stream."""
    return await client.generate(
        ask.prompt,
        max_tokens=ask.tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        ignore_eos=True,
        logprobs=0,
    )


async def complete_all(client: AsyncClient, asks: Sequence[Ask]) -> list[Completion]:
    """All at once."""
    return list(await asyncio.gather(*(complete(client, ask) for ask in asks)))


class System:
    """A running system in a temporary home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def boot(self) -> None:
        """Start it, and wait until it is ready."""
        boot.boot(self.home, timeout_s=60)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """A connection of its operator."""
        client = await open_client(self.home)
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
                command = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
            except OSError:
                continue
            mine = wanted in environment or str(self.home.root).encode() in command
            if mine and state != b"Z" and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    async def until_settled(self, client: AsyncClient, *, seconds: float = 15) -> None:
        """Until no thread is left and every process is ready; asserts that it comes to that."""
        deadline = time.monotonic() + seconds
        while True:
            status = await client.status()
            threads = await client.threads()
            rows = await client.ps()
            leftovers = [
                *(f"{row.name} is {row.state.value}" for row in rows if not settled(row.state)),
                *(f"{row.name} holds {row.threads} threads" for row in rows if row.threads),
                *(f"thread {row.thread.hex()} is {row.state.value}" for row in threads),
                *status.not_ready,
            ]
            if not leftovers:
                return
            assert time.monotonic() < deadline, leftovers
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        """Take it down; asserts that nothing is left."""
        for pid in self.pids():
            if b"llmkernel.init" in _command(pid):
                os.kill(pid, signal.SIGTERM)
        self.until_gone()

    def until_gone(self, *, seconds: float = 15) -> None:
        """Until no process of it lives; asserts that it comes to that."""
        deadline = time.monotonic() + seconds
        while pids := self.pids():
            if time.monotonic() > deadline:
                left = {pid: _command(pid) for pid in pids}
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"processes are left: {left}")
            time.sleep(0.05)


def settled(state: ProcessState) -> bool:
    """It is where it should be when nothing happens."""
    return state in (ProcessState.READY, ProcessState.STOPPED)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


Boot = Callable[..., System]


@pytest.fixture
def booted() -> Iterator[Boot]:
    """Boot systems: `booted(config_toml)`; all are taken down and checked at the end."""
    systems: list[System] = []
    roots: list[Path] = []

    def start(config: str = EXACT) -> System:
        # Not tmp_path: the path of a Unix socket is at most 107 bytes.
        root = Path(tempfile.mkdtemp(prefix="llmos-"))
        roots.append(root)
        (root / "config.toml").write_text(config)
        system = System(Home.find(root))
        systems.append(system)
        system.boot()
        return system

    yield start
    try:
        for system in systems:
            system.stop()
    finally:
        for root in roots:
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def shared() -> Iterator[System]:
    """One system in exact mode for all tests of a module that leave it as they found it."""
    root = Path(tempfile.mkdtemp(prefix="llmos-"))
    (root / "config.toml").write_text(EXACT)
    system = System(Home.find(root))
    system.boot()
    yield system
    try:
        system.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def served() -> Iterator[System]:
    """One system with a gateway, in exact mode, for all tests that leave it as they found it."""
    root = Path(tempfile.mkdtemp(prefix="llmos-"))
    (root / "config.toml").write_text(SERVED)
    system = System(Home.find(root))
    system.boot()
    yield system
    try:
        system.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


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
